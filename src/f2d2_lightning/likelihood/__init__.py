"""From states to log-likelihoods and from noise to samples: few steps, and the fine reference."""

from f2d2_lightning.likelihood._log_prob import LogProb, log_prob
from f2d2_lightning.likelihood.data_checks import Finding, check_data
from f2d2_lightning.likelihood.determinant import Determinant
from f2d2_lightning.likelihood.guidance import GuidedSamples, SelfGuidance
from f2d2_lightning.likelihood.importance import ImportanceWeights
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.mirror import mirrored_log_prob
from f2d2_lightning.likelihood.model import JointModel, LikelihoodModel
from f2d2_lightning.likelihood.ode import reference_log_prob, reference_sample
from f2d2_lightning.likelihood.quantization import (
    DequantizationBounds,
    Quantization,
    bits_per_dim,
    dequantization_bounds,
    state_images,
)
from f2d2_lightning.likelihood.reference import Reference, ReferenceChoice
from f2d2_lightning.likelihood.sampling import Samples, sample
from f2d2_lightning.likelihood.units import Units

__all__ = [
    "DequantizationBounds",
    "Determinant",
    "Finding",
    "GuidedSamples",
    "ImportanceWeights",
    "Inversion",
    "JointModel",
    "LikelihoodModel",
    "LogProb",
    "Quantization",
    "Reference",
    "ReferenceChoice",
    "Samples",
    "SelfGuidance",
    "Units",
    "bits_per_dim",
    "check_data",
    "dequantization_bounds",
    "log_prob",
    "mirrored_log_prob",
    "reference_log_prob",
    "reference_sample",
    "sample",
    "state_images",
]
