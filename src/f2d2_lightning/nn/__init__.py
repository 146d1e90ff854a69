"""Backbones that take two times in any order and are smooth enough for derivatives."""

from f2d2_lightning.nn.dit import DiT
from f2d2_lightning.nn.embedding import IntervalEmbedding, VectorEmbedding
from f2d2_lightning.nn.head import DivergenceHead, JointFlowMap
from f2d2_lightning.nn.mlp import MLP
from f2d2_lightning.nn.preconditioned import (
    AngleEmbedding,
    GaussianPreconditioned,
    PreconditionedMLP,
    PreconditionedUNet,
)
from f2d2_lightning.nn.resnet import ResNet
from f2d2_lightning.nn.second_time import AddedTime, OneTimeEmbedding, with_second_time
from f2d2_lightning.nn.unet import UNet

__all__ = [
    "MLP",
    "AddedTime",
    "AngleEmbedding",
    "DiT",
    "DivergenceHead",
    "GaussianPreconditioned",
    "IntervalEmbedding",
    "JointFlowMap",
    "OneTimeEmbedding",
    "PreconditionedMLP",
    "PreconditionedUNet",
    "ResNet",
    "UNet",
    "VectorEmbedding",
    "with_second_time",
]
