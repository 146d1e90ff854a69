"""Networks from checkpoints of other people's code, whose code is neither needed nor run."""

from f2d2_lightning.foreign_checkpoints.embeddings import LogTimeEmbedding, MeanFlowEmbedding
from f2d2_lightning.foreign_checkpoints.files import read_checkpoint
from f2d2_lightning.foreign_checkpoints.mean_flow import load_py_meanflow
from f2d2_lightning.foreign_checkpoints.official import (
    FlattenedHead,
    OfficialFlowMap,
    load_official,
    load_official_joint,
)

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
