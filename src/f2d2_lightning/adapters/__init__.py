"""Other people's few-step models as flow maps."""

from f2d2_lightning.adapters.adapter import AdaptedFlowMap, Adapter, adapter_from_config
from f2d2_lightning.adapters.checks import ConventionError, check_convention, check_differentiable
from f2d2_lightning.adapters.families import FlowMatching, MeanFlow, Shortcut, TorchCFM, TwoTime
from f2d2_lightning.adapters.features import FeatureTap
from f2d2_lightning.adapters.interval import AddedInterval
from f2d2_lightning.adapters.variance_exploding import CTM, Consistency, Denoiser, VarianceExploding
from f2d2_lightning.adapters.variance_preserving import LatentConsistency, VariancePreserving

__all__ = [
    "CTM",
    "AdaptedFlowMap",
    "Adapter",
    "AddedInterval",
    "Consistency",
    "ConventionError",
    "Denoiser",
    "FeatureTap",
    "FlowMatching",
    "LatentConsistency",
    "MeanFlow",
    "Shortcut",
    "TorchCFM",
    "TwoTime",
    "VarianceExploding",
    "VariancePreserving",
    "adapter_from_config",
    "check_convention",
    "check_differentiable",
]
