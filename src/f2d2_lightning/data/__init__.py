"""Data modules."""

from __future__ import annotations

from f2d2_lightning.data.images.base import ImageDataModule
from f2d2_lightning.data.images.celeba import CelebA64
from f2d2_lightning.data.images.cifar import CIFAR10
from f2d2_lightning.data.images.edm_zip import EDMZip
from f2d2_lightning.data.images.fashion import FashionMNIST
from f2d2_lightning.data.images.folder import ImageFolder
from f2d2_lightning.data.images.imagenet import ImageNet64
from f2d2_lightning.data.module import Checkerboard, Digits, FlowDataModule, GaussianMixture

__all__ = [
    "CIFAR10",
    "CelebA64",
    "Checkerboard",
    "Digits",
    "EDMZip",
    "FashionMNIST",
    "FlowDataModule",
    "GaussianMixture",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet64",
]
