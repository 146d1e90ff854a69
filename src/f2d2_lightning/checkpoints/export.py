"""Joint maps that callbacks added to somebody's network: in Lightning checkpoints, and in files of version 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters import Adapter
from f2d2_lightning.checkpoints.descriptions import describe, describe_model, make_part, own_state
from f2d2_lightning.checkpoints.pretrained import CONFIG, Stored, fill, from_pretrained, plain_name, save_pretrained
from f2d2_lightning.checkpoints.trust import check_extent, said, stored_in
from f2d2_lightning.nn.head import Head, JointFlowMap
from f2d2_lightning.utils.arrays import check_stored_archive
from f2d2_lightning.utils.checks import checked
from f2d2_lightning.utils.configured import public_name

# where a Lightning checkpoint holds the joint maps that callbacks added to it, by name of the network
CHECKPOINT_KEY = "f2d2_joint"


def describe_joint(joint: JointFlowMap, shape: tuple[int, ...]) -> dict[str, Any]:
    """A joint map of an adapted network as plain values and weights, without the network's own weights.

    Where it cannot be described, what is wrong is for :func:`load_joint` to say: a checkpoint of a training run is
    saved all the same.
    """
    try:
        model = describe_model(joint)
    except ValueError as error:
        model = {"undescribed": str(error)}
    # cloned: a view would take the whole storage into the file
    state = {name: value.detach().cpu().clone() for name, value in own_state(joint).items()}
    return {"version": 2, "shape": list(shape), **model, "state": state}


def save_joint(
    joint: JointFlowMap, path: str | Path, shape: tuple[int, ...], network_state: Mapping[str, Tensor] | None = None
) -> None:
    """:func:`f2d2_lightning.save_pretrained` of a joint map, as version 0.1 called it."""
    save_pretrained(joint, path, shape=shape, network_state=network_state)


@checked
def load_joint(
    path: str | Path,
    network: nn.Module,
    name: str | None = None,
    adapter: Adapter | None = None,
    head_network: nn.Module | None = None,
    head: Head | None = None,
) -> JointFlowMap:
    """The joint map that a callback added to somebody's network, from a folder or from a Lightning checkpoint.

    Needs no Lightning. A checkpoint of ``ModelCheckpoint(save_weights_only=True)`` is enough.

    Args:
        path: What :meth:`F2D2Callback.export` wrote, or a checkpoint that was saved with the callback in the trainer.
        network: The network, made as it was in training; it is filled with the weights of the file.
        name: Name of the network in the LightningModule, for a checkpoint that holds several.
        adapter: The adapter, if it is none of :mod:`f2d2_lightning.adapters`.
        head_network: The head's network, if it had one of its own.
        head: The head, if its class is none of this package's.

    Returns:
        The map in evaluation mode, on the CPU, for :func:`f2d2_lightning.log_prob` and :func:`f2d2_lightning.sample`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no joint map, or the network is of another shape.

    >>> import tempfile
    >>> from f2d2_lightning.nn import DivergenceHead
    >>> network = nn.Linear(2, 2)
    >>> flow_map = Adapter("net(x)", directions="to_data")(network)
    >>> head = DivergenceHead(network=None, features=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_pretrained(JointFlowMap(flow_map, head), folder, shape=(2,))
    ...     load_joint(folder, nn.Linear(2, 2)).directions.label
    'to_data'
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return from_pretrained(path, network=network, adapter=adapter, head_network=head_network, head=head)
    given = {"network": network, "adapter": adapter, "head_network": head_network, "head": head}
    try:
        content = _read(path, name)
        check_extent({key: content[key] for key in content if not key.endswith("state")}, str(path))
        if "undescribed" in content:
            raise ValueError(f"{path} holds a joint map that could not be described: {content['undescribed']!s:.1000}")
        if content.get("version") == 1:
            content = _of_0_1(content, adapter)
        state = {str(key): value for key, value in content["state"].items()}
        state |= {f"flow_map.network.{key}": value for key, value in content["network_state"].items()}
        stored_in(state, str(path))
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        double = any(value.dtype == torch.float64 for value in state.values())
        joint = fill(content, given, Stored(shapes, {}, state.__getitem__, double), str(path))
        if not isinstance(joint, JointFlowMap):
            raise ValueError(f"it describes a {type(joint).__name__}")
        return joint
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # a file that is damaged, or says of itself what is not so, fails anywhere
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}, or is damaged ({said(error)}); make "
            "the network with the arguments of training"
        ) from error


def describe_head(head: Head) -> dict[str, Any]:
    """A head for :func:`make_head`; one of somebody else's class is given again by its owner."""
    try:
        return describe(head, "the head")
    except ValueError:
        return {"given": "head", "class": public_name(type(head))}


def make_head(description: Mapping[str, Any]) -> Head:
    """A head, with fresh weights, from what a checkpoint of a callback says of it, today's or of version 0.1."""
    of_today = "arguments" in description or "given" in description
    return make_part(description if of_today else _head_of_0_1(description), {})


# --- version 0.1 ---


def _of_0_1(content: Mapping[str, Any], adapter: Adapter | None) -> dict[str, Any]:
    """What version 0.1 wrote, as today's description and weights."""
    state = {f"head.{key}": value for key, value in content["head_state"].items()}
    state |= {f"flow_map.interval.{key}": value for key, value in (content["interval_state"] or {}).items()}
    arguments = dict(content["adapter"])
    family = arguments.pop("class", None)
    theirs = {"given": "adapter", "class": str(family)}
    backbone = {
        "network": {"given": "network", "class": "network"},
        "adapter": _object(f"adapters.{family}", arguments) if adapter is None else theirs,
        "features": content["features"],
        "interval": content["interval"],
        "directions": content["directions"].lower(),
    }
    parts = {"flow_map": _object("adapters.AdaptedFlowMap", backbone), "head": _head_of_0_1(content["head"])}
    model = _object("nn.JointFlowMap", parts)
    return {"model": model, "state": state, "network_state": content["network_state"]}


def _head_of_0_1(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(config)
    fit = arguments["baseline"]
    if fit is not None:
        path = _object(f"flows.{fit['path']}", {})
        arguments["baseline"] = _object("flows.GaussianBaseline", dict(fit) | {"path": path})
    if arguments["network"] is not None:
        arguments["network"] = {"given": "head_network", "class": arguments["network"]}
    return _object("nn.DivergenceHead", arguments)


def _object(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # nothing of version 0.1 refers to a number
    return {"class": f"f2d2_lightning.{name}", "number": name, "arguments": arguments}


def _read(path: Path, name: str | None) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder without {CONFIG}, as sharded checkpoints are; export the map in training "
            "(F2D2Callback.export), or consolidate it: "
            "python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER"
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
    states = {plain_name(key): value for key, value in content["state_dict"].items()}
    mine = {key.removeprefix(f"{name}."): value for key, value in states.items() if key.startswith(f"{name}.")}
    return joints[name] | {"network_state": mine}
