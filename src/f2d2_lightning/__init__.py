"""Few-step samples and log-likelihoods for flow models, for PyTorch Lightning.

Time runs from ``t = 0`` (noise) to ``t = 1`` (data) throughout; log-densities are in nats, per sample.

These are the names that most users need; the others are in folders (``f2d2_lightning.objectives``, ``.data``,
``.callbacks`` and so on). Everything is imported when it is first asked for: the core needs no Lightning, and the
command line answers before torch is there.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from f2d2_lightning import _moved

if TYPE_CHECKING:
    from f2d2_lightning.callbacks import F2D2Callback
    from f2d2_lightning.checkpoints import from_pretrained, load_joint, save_pretrained
    from f2d2_lightning.divergence import Hutchinson
    from f2d2_lightning.flows import Direction, FlowMap, GaussianBaseline, JointMap, as_flow_map
    from f2d2_lightning.likelihood import (
        Inversion,
        Quantization,
        Reference,
        SelfGuidance,
        bits_per_dim,
        log_prob,
        reference_log_prob,
        reference_sample,
        sample,
    )
    from f2d2_lightning.modules import F2D2Module, FlowMatchingModule, load
    from f2d2_lightning.nn import DivergenceHead, JointFlowMap
    from f2d2_lightning.objectives import Intervals, TrajectoryRegression, Weighting

__version__ = version("f2d2-lightning")

_NAMES = {
    "callbacks": "F2D2Callback",
    "checkpoints": "from_pretrained load_joint save_pretrained",
    "divergence": "Hutchinson",
    "flows": "Direction FlowMap GaussianBaseline JointMap as_flow_map",
    "likelihood": (
        "Inversion Quantization Reference SelfGuidance bits_per_dim log_prob reference_log_prob reference_sample sample"
    ),
    "modules": "F2D2Module FlowMatchingModule load",
    "nn": "DivergenceHead JointFlowMap",
    "objectives": "Intervals TrajectoryRegression Weighting",
}
_FOLDER = {name: folder for folder, names in _NAMES.items() for name in names.split()}
_FOLDERS = (*_NAMES, "adapters", "cli", "data", "metrics", "plots", "testing")


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FOLDER:
        return getattr(importlib.import_module(f"{__name__}.{_FOLDER[name]}"), name)
    return _moved.from_door(name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_FOLDERS})


__all__ = [
    "Direction",
    "DivergenceHead",
    "F2D2Callback",
    "F2D2Module",
    "FlowMap",
    "FlowMatchingModule",
    "GaussianBaseline",
    "Hutchinson",
    "Intervals",
    "Inversion",
    "JointFlowMap",
    "JointMap",
    "Quantization",
    "Reference",
    "SelfGuidance",
    "TrajectoryRegression",
    "Weighting",
    "as_flow_map",
    "bits_per_dim",
    "from_pretrained",
    "load",
    "load_joint",
    "log_prob",
    "reference_log_prob",
    "reference_sample",
    "sample",
    "save_pretrained",
]
