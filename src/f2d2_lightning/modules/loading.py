"""Any model with likelihoods from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from f2d2_lightning.adapters.features import find_submodule
from f2d2_lightning.checkpoints.export import CHECKPOINT_KEY, load_joint
from f2d2_lightning.checkpoints.pretrained import CONFIG, from_pretrained, located, read_description, read_error_bars
from f2d2_lightning.checkpoints.trust import build_arguments, make, stored_in, within_size
from f2d2_lightning.likelihood.error_bars import read_bars
from f2d2_lightning.likelihood.model import JointModel, LikelihoodModel
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.modules.student import F2D2Module
from f2d2_lightning.modules.teacher import FlowMatchingModule
from f2d2_lightning.training.loading import described, read_checkpoint, restore_module
from f2d2_lightning.utils.checks import checked


@checked
def load(
    path: str | Path, network: nn.Module | None = None, *, name: str | None = None, trust: Sequence[str] = ()
) -> LikelihoodModel:
    """A model with ``log_prob`` and ``sample`` from whatever holds one.

    Args:
        path: A checkpoint of a module of this package; a checkpoint of somebody's module that was trained with an
            ``F2D2Callback``; a folder that ``save_pretrained`` or ``F2D2Callback.export`` wrote; or the name of one, as
            of :func:`from_pretrained`: ``"digits"``.
        network: Somebody's network, made as it was in training, where the file holds the weights of one: of a
            checkpoint that ``f2d2 fit`` wrote it is made from what the checkpoint says, if ``trust`` allows it.
        name: Name of the network in its module, where there were several callbacks.
        trust: Packages whose classes a checkpoint may name.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds no such model, or names a class that is not trusted; if a network is needed.

    >>> import tempfile
    >>> from f2d2_lightning import DivergenceHead, JointFlowMap, save_pretrained
    >>> from f2d2_lightning.nn import MLP
    >>> backbone = MLP((2,), width=8, blocks=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = load(save_pretrained(JointFlowMap(backbone, DivergenceHead(backbone.features)), folder))
    >>> model.log_prob([[0.0, 1.0]], steps=2).evaluations
    2
    """
    path = located(path)
    if (path / CONFIG).is_file():
        about = read_description(path)
        quantization = None if about.levels is None else Quantization(about.levels, about.low, about.high)
        model = JointModel(from_pretrained(path, network=network), about.shape, quantization)
        model.error_bars = read_error_bars(path)
        return model
    checkpoint = read_checkpoint(path)
    joints = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(joints, Mapping) or not joints:
        if name is not None:
            raise ValueError(f"{path} is of a module with one network, which has no name; leave name={name!r} out")
        # of a module that a script made the class is not said, and a student has a joint map
        student = any(str(key).startswith("joint.") for key in checkpoint["state_dict"])
        cls = F2D2Module if student else FlowMatchingModule
        return restore_module(checkpoint, path, cls, trust, None, {}).eval()
    if name is None and len(joints) == 1:
        (name,) = joints
    if name not in joints:
        raise ValueError(f"{path} holds joint maps of {', '.join(map(repr, joints))}; say which: name=")
    content = joints[name]
    if network is None:
        network = _network_of(checkpoint, path, str(name), trust)
    levels, low, high = content.get("range", (None, -1.0, 1.0))
    joint = load_joint(path, network, name)
    model = JointModel(joint, content["shape"], None if levels is None else Quantization(levels, low, high))
    model.error_bars = read_bars(content.get("error_bars"))
    return model


def _network_of(checkpoint: Mapping[str, Any], path: Path, name: str, trust: Sequence[str]) -> nn.Module:
    """The network inside of the module that a checkpoint describes."""
    if "_class_path" not in checkpoint.get(L.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}):
        raise ValueError(
            f"{path} holds what F2D2Callback added to the network {name!r} of somebody's module, and does not say "
            "which class that is; give the network, made as it was in training: load(path, network) in Python, "
            "--network CLASS_PATH [--network_args JSON] on the command line"
        )
    cls, arguments, trust = described(checkpoint, path, L.LightningModule, trust)
    module = within_size(
        lambda: make(cls, build_arguments(cls, arguments, trust)), *stored_in(checkpoint["state_dict"], str(path)),
        str(path),
    )  # fmt: skip
    module.configure_model()
    network = find_submodule(module, name)
    return getattr(network, "_orig_mod", network)
