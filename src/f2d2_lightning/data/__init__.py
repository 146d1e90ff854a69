"""Data modules: points in the plane, scans of digits, images of others and of one's own.

Images are 8-bit values, cropped and resized as such where that is asked for, and dequantized last. Those that do not
fit into memory are decoded in the workers or mapped from an array on disk. Nothing is downloaded unless asked for.
"""

from __future__ import annotations

from f2d2_lightning.data.dataset import DequantizedDataset, LazyValues, StoredValues
from f2d2_lightning.data.digits import Digits
from f2d2_lightning.data.images.base import ImageDataModule
from f2d2_lightning.data.images.celeba import CelebA64
from f2d2_lightning.data.images.cifar import CIFAR10
from f2d2_lightning.data.images.edm_zip import EDMZip
from f2d2_lightning.data.images.fashion import FashionMNIST
from f2d2_lightning.data.images.folder import ImageFolder
from f2d2_lightning.data.images.imagenet import ImageNet64
from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.data.rows import read_rows
from f2d2_lightning.data.table import Pairs, Table
from f2d2_lightning.data.toy import Checkerboard, GaussianMixture

__all__ = [
    "CIFAR10",
    "CelebA64",
    "Checkerboard",
    "DequantizedDataset",
    "Digits",
    "EDMZip",
    "FashionMNIST",
    "FlowDataModule",
    "GaussianMixture",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet64",
    "LazyValues",
    "Pairs",
    "StoredValues",
    "Table",
    "read_rows",
]
