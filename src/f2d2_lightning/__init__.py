"""Few-step samples and log-likelihoods for flow models, for PyTorch Lightning.

Time runs from ``t = 0`` (noise) to ``t = 1`` (data) throughout; log-densities are in nats, per sample.

The core needs no Lightning and does not import it; data and LightningModules are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from f2d2_lightning.analytic import MixtureFlow
from f2d2_lightning.baseline import GaussianBaseline, GaussianFlow
from f2d2_lightning.divergence import Conditional, Divergence, DivergenceEstimator, Exact, Hutchinson
from f2d2_lightning.export import load_joint
from f2d2_lightning.flow_map import Direction, FlowMap, Joint, JointMap, Jump, as_flow_map
from f2d2_lightning.foreign_checkpoints import load_official, load_official_joint, load_py_meanflow
from f2d2_lightning.guidance import GuidedSamples, SelfGuidance
from f2d2_lightning.heads import DivergenceHead, JointFlowMap
from f2d2_lightning.intervals import Intervals
from f2d2_lightning.inversion import Inversion
from f2d2_lightning.likelihood import LogProb, log_prob
from f2d2_lightning.mirror import mirrored_log_prob
from f2d2_lightning.objectives import Consistency, Eulerian, Lagrangian, Objective, Semigroup, Terms, Weighting
from f2d2_lightning.paths import LinearPath, Path, TrigonometricPath
from f2d2_lightning.pretrained import from_pretrained, save_pretrained
from f2d2_lightning.quantisation import Quantisation, bits_per_dim
from f2d2_lightning.reference import Reference, reference_log_prob, reference_sample
from f2d2_lightning.sampling import Samples, sample
from f2d2_lightning.sources import ConditionalSource, DiagonalSource, TeacherSource, VelocitySource
from f2d2_lightning.trajectory import TrajectoryPool, TrajectoryRegression
from f2d2_lightning.volume import VolumeRegression

if TYPE_CHECKING:
    from f2d2_lightning.callback import F2D2Callback
    from f2d2_lightning.data import Checkerboard, Digits, FlowDataModule, GaussianMixture
    from f2d2_lightning.image_data import CIFAR10, CelebA64, EDMZip, FashionMNIST, ImageFolder, ImageNet64
    from f2d2_lightning.modules import F2D2Module, FlowMatchingModule, FlowModule
    from f2d2_lightning.pictures import Pictures
    from f2d2_lightning.sample_quality import SampleQuality
    from f2d2_lightning.summary import JointSummary

_LIGHTNING = {
    "F2D2Callback": "f2d2_lightning.callback",
    "CIFAR10": "f2d2_lightning.image_data",
    "CelebA64": "f2d2_lightning.image_data",
    "Checkerboard": "f2d2_lightning.data",
    "Digits": "f2d2_lightning.data",
    "EDMZip": "f2d2_lightning.image_data",
    "FashionMNIST": "f2d2_lightning.image_data",
    "F2D2Module": "f2d2_lightning.modules",
    "FlowDataModule": "f2d2_lightning.data",
    "FlowMatchingModule": "f2d2_lightning.modules",
    "FlowModule": "f2d2_lightning.modules",
    "GaussianMixture": "f2d2_lightning.data",
    "ImageFolder": "f2d2_lightning.image_data",
    "ImageNet64": "f2d2_lightning.image_data",
    "JointSummary": "f2d2_lightning.summary",
    "Pictures": "f2d2_lightning.pictures",
    "SampleQuality": "f2d2_lightning.sample_quality",
}


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING:
        return getattr(importlib.import_module(_LIGHTNING[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIGHTNING})


__all__ = [
    "CIFAR10",
    "CelebA64",
    "Checkerboard",
    "Conditional",
    "ConditionalSource",
    "Consistency",
    "DiagonalSource",
    "Digits",
    "Direction",
    "Divergence",
    "DivergenceEstimator",
    "DivergenceHead",
    "EDMZip",
    "Eulerian",
    "Exact",
    "F2D2Callback",
    "F2D2Module",
    "FashionMNIST",
    "FlowDataModule",
    "FlowMap",
    "FlowMatchingModule",
    "FlowModule",
    "GaussianBaseline",
    "GaussianFlow",
    "GaussianMixture",
    "GuidedSamples",
    "Hutchinson",
    "ImageFolder",
    "ImageNet64",
    "Intervals",
    "Inversion",
    "Joint",
    "JointFlowMap",
    "JointMap",
    "JointSummary",
    "Jump",
    "Lagrangian",
    "LinearPath",
    "LogProb",
    "MixtureFlow",
    "Objective",
    "Path",
    "Pictures",
    "Quantisation",
    "Reference",
    "SampleQuality",
    "Samples",
    "SelfGuidance",
    "Semigroup",
    "TeacherSource",
    "Terms",
    "TrajectoryPool",
    "TrajectoryRegression",
    "TrigonometricPath",
    "VelocitySource",
    "VolumeRegression",
    "Weighting",
    "as_flow_map",
    "bits_per_dim",
    "from_pretrained",
    "load_joint",
    "load_official",
    "load_official_joint",
    "load_py_meanflow",
    "log_prob",
    "mirrored_log_prob",
    "reference_log_prob",
    "reference_sample",
    "sample",
    "save_pretrained",
]
