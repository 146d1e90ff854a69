"""Backbones that take two times in any order and are smooth enough for derivatives."""

from f2d2_lightning.nn.embedding import IntervalEmbedding
from f2d2_lightning.nn.mlp import MLP
from f2d2_lightning.nn.precondition import (
    AngleEmbedding,
    GaussianPreconditioned,
    PreconditionedMLP,
    PreconditionedUNet,
)
from f2d2_lightning.nn.resnet import ResNet
from f2d2_lightning.nn.transformer import DiT
from f2d2_lightning.nn.two_times import AddedTime, OneTimeEmbedding, with_second_time
from f2d2_lightning.nn.unet import UNet

__all__ = [
    "MLP",
    "AddedTime",
    "AngleEmbedding",
    "DiT",
    "GaussianPreconditioned",
    "IntervalEmbedding",
    "OneTimeEmbedding",
    "PreconditionedMLP",
    "PreconditionedUNet",
    "ResNet",
    "UNet",
    "with_second_time",
]
