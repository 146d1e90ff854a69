"""Networks from checkpoints of other people's code, whose code is neither needed nor run."""

from __future__ import annotations

from f2d2_lightning.checkpoints.foreign.embeddings import LogTimeEmbedding, MeanFlowEmbedding
from f2d2_lightning.checkpoints.foreign.f2d2 import FlattenedHead, OfficialFlowMap, load_official, load_official_joint
from f2d2_lightning.checkpoints.foreign.files import read_checkpoint
from f2d2_lightning.checkpoints.foreign.py_meanflow import load_py_meanflow

__all__ = [
    "FlattenedHead",
    "LogTimeEmbedding",
    "MeanFlowEmbedding",
    "OfficialFlowMap",
    "load_official",
    "load_official_joint",
    "load_py_meanflow",
    "read_checkpoint",
]
