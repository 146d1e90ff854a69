"""Figures of likelihoods and of samples."""

from __future__ import annotations

from f2d2_lightning.metrics.diagnosis import Diagnosis, Faults
from f2d2_lightning.metrics.evaluation import LikelihoodEvaluation
from f2d2_lightning.metrics.likelihood import (
    Agreement,
    LikelihoodAgreement,
    MeanLikelihood,
    RoundTripError,
    agreement,
    percentile_rank,
)
from f2d2_lightning.metrics.networks import InceptionFeatures, SmallFeatures

__all__ = [
    "Agreement",
    "Diagnosis",
    "Faults",
    "InceptionFeatures",
    "LikelihoodAgreement",
    "LikelihoodEvaluation",
    "MeanLikelihood",
    "RoundTripError",
    "SmallFeatures",
    "agreement",
    "percentile_rank",
]
