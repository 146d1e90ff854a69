"""Backbones that take two times in any order and are smooth enough for derivatives."""

from f2d2_lightning.nn.embedding import IntervalEmbedding
from f2d2_lightning.nn.mlp import MLP
from f2d2_lightning.nn.precondition import AngleEmbedding, GaussianPreconditioned, PreconditionedMLP
from f2d2_lightning.nn.resnet import ResNet

__all__ = ["MLP", "AngleEmbedding", "GaussianPreconditioned", "IntervalEmbedding", "PreconditionedMLP", "ResNet"]
