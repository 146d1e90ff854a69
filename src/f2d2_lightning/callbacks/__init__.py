"""Likelihoods for somebody else's module, and what a run shows of itself."""

from __future__ import annotations

from f2d2_lightning.callbacks.f2d2 import F2D2Callback
from f2d2_lightning.callbacks.last_checkpoint import LastCheckpoint
from f2d2_lightning.callbacks.logger import RunLogger
from f2d2_lightning.callbacks.pictures import Pictures
from f2d2_lightning.callbacks.progress import RunProgress
from f2d2_lightning.callbacks.report import TestReport
from f2d2_lightning.callbacks.sample_quality import SampleQuality
from f2d2_lightning.callbacks.summary import JointSummary

__all__ = [
    "F2D2Callback",
    "JointSummary",
    "LastCheckpoint",
    "Pictures",
    "RunLogger",
    "RunProgress",
    "SampleQuality",
    "TestReport",
]
