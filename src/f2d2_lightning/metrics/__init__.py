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
from f2d2_lightning.metrics.posterior import Calibration, c2st, calibration

__all__ = [
    "Agreement",
    "Calibration",
    "Diagnosis",
    "Faults",
    "InceptionFeatures",
    "LikelihoodAgreement",
    "LikelihoodEvaluation",
    "MeanLikelihood",
    "RoundTripError",
    "SmallFeatures",
    "agreement",
    "c2st",
    "calibration",
    "percentile_rank",
]
