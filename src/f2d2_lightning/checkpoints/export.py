"""Joint maps in files: everything that inference needs beside the network's own code, and nothing of Lightning.

A file holds weights and plain values only, so reading one runs no code that is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap, Adapter, adapter_from_config
from f2d2_lightning.checkpoints.trust import check_extent, check_sizes, said, stored_in, within_size
from f2d2_lightning.nn.head import DivergenceHead, JointFlowMap
from f2d2_lightning.utils.arrays import check_stored_archive
from f2d2_lightning.utils.files import whole_file

__all__ = ["CHECKPOINT_KEY", "describe_joint", "load_joint", "save_joint"]

CHECKPOINT_KEY = "f2d2_joint"
"""Where a Lightning checkpoint holds the joint maps that callbacks added to it, by name of the network."""

# what wrappers put into the names of a network's weights
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def describe_joint(joint: JointFlowMap, shape: tuple[int, ...]) -> dict[str, Any]:
    """A joint map of an adapted network as plain values and weights, without the network's own weights."""
    flow_map = joint.flow_map
    if not isinstance(flow_map, AdaptedFlowMap):
        raise ValueError(
            f"the backbone is a {type(flow_map).__name__}; networks are exported through their adapter: "
            "JointFlowMap(adapter(network), head)"
        )
    added = flow_map.interval
    return {
        "version": 1,
        "shape": list(shape),
        "adapter": flow_map.adapter.config(),
        "features": None if flow_map.tap is None else flow_map.tap.name,
        "interval": flow_map.interval_name,
        "interval_state": None if added is None else _on_cpu(added.state_dict()),
        "directions": flow_map.directions.name,
        "head": joint.head.config(),
        "head_state": _on_cpu(joint.head.state_dict()),
    }


def save_joint(
    joint: JointFlowMap,
    path: str | Path,
    shape: tuple[int, ...],
    network_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a joint map of an adapted network to a file, for :func:`load_joint`.

    Args:
        joint: The map.
        path: File; written beside its place first, so that an interruption leaves no half of one.
        shape: Shape of one state.
        network_state: The network's weights, where they are sharded and had to be gathered; by default its own.

    Raises:
        ValueError: If the backbone is no adapted network.
    """
    content = describe_joint(joint, shape)
    if network_state is None:
        network = joint.flow_map.network
        if not isinstance(network, nn.Module):
            raise ValueError("the network is a plain function and has no weights to export; keep the head's state_dict")
        network_state = network.state_dict()
    with whole_file(path) as partial:
        torch.save(content | {"network_state": _on_cpu(_plain_names(network_state))}, partial)


def load_joint(
    path: str | Path,
    network: nn.Module,
    name: str | None = None,
    adapter: Adapter | None = None,
    head_network: nn.Module | None = None,
) -> JointFlowMap:
    """The joint map that a callback added to somebody's network, from an export or from a Lightning checkpoint.

    Needs no Lightning. A checkpoint of ``ModelCheckpoint(save_weights_only=True)`` is enough.

    Args:
        path: What :meth:`F2D2Callback.export` wrote, or a checkpoint that was saved with the callback in the trainer.
        network: The network, made as it was in training; it is filled with the weights of the file.
        name: Name of the network in the LightningModule, for a checkpoint that holds several.
        adapter: The adapter, if it is none of :mod:`f2d2_lightning.adapters`.
        head_network: The head's network, if it had one of its own.

    Returns:
        The map in evaluation mode, on the CPU, for :func:`f2d2_lightning.log_prob` and :func:`f2d2_lightning.sample`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no joint map, or the network is of another shape.
    """
    try:
        content = _read(Path(path), name)
        # initial weights that are written over are no reason to draw other numbers afterwards
        with torch.random.fork_rng(devices=[]):
            return _joint(content, network, adapter, head_network, str(path))
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # a file that is damaged, or says of itself what is not so, fails anywhere
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}, or is damaged ({said(error)}); make "
            "the network with the arguments of training"
        ) from error


def _joint(
    content: Mapping[str, Any],
    network: nn.Module,
    adapter: Adapter | None,
    head_network: nn.Module | None,
    what: str,
) -> JointFlowMap:
    check_extent([content["adapter"], content["head"]], what)
    adapter = adapter or adapter_from_config(content["adapter"])
    flow_map = AdaptedFlowMap(
        network,
        adapter,
        features=content["features"],
        interval=content["interval"],
        directions=content["directions"].lower(),
    )
    network.load_state_dict(content["network_state"])
    if flow_map.interval is not None:
        flow_map.interval.load_state_dict(content["interval_state"])
    held = stored_in(content["head_state"], what)

    def make() -> DivergenceHead:
        check_sizes(DivergenceHead, content["head"])
        return DivergenceHead.from_config(content["head"], head_network)

    head = within_size(make, *held, what)
    head.load_state_dict(content["head_state"])
    return JointFlowMap(flow_map, head).eval()


def _read(path: Path, name: str | None) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, as sharded checkpoints are; export one file in training (F2D2Callback.export), or "
            "consolidate it: python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        check_stored_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails wherever its damage is
        raise ValueError(f"{path} cannot be read as weights and plain values: {said(error)}") from error
    if isinstance(content, dict) and "network_state" in content:
        return content
    joints = content.get(CHECKPOINT_KEY) if isinstance(content, dict) else None
    if not joints:
        raise ValueError(
            f"{path} holds no joint map: it is neither an export (F2D2Callback.export) nor a checkpoint of a trainer "
            "with F2D2Callback"
        )
    if name is None and len(joints) == 1:
        (name,) = joints
    if name not in joints:
        raise ValueError(f"{path} holds joint maps of {', '.join(map(repr, joints))}; name= is {name!r}")
    states = _plain_names(content["state_dict"])
    prefix = f"{name}."
    mine = {key[len(prefix) :]: value for key, value in states.items() if key.startswith(prefix)}
    return joints[name] | {"network_state": mine}


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {}
    for key, value in state.items():
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        plain[key] = value
    return plain


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # cloned: a view would take the whole storage into the file
    return {key: value.detach().cpu().clone() for key, value in state.items()}
