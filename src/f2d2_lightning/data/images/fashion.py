"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels, 256 levels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from f2d2_lightning.data.images._download import Source, fetch
from f2d2_lightning.data.images._idx import read_idx
from f2d2_lightning.data.images._stores import first_of
from f2d2_lightning.data.images.base import ImageDataModule, LabeledImages, divide

__all__ = ["FashionMNIST"]

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files."""
SITE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SOURCES = {
    name: Source(f"{SITE}{name}.gz", md5)
    for name, md5 in {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    }.items()
}
"""Addresses and checksums as torchvision has them."""


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST from its four IDX files, dequantized to [-1, 1].

    Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017,
    https://arxiv.org/abs/1708.07747. The last ``val`` of the 60,000 training images validate; the 10,000 test images
    test.

    Args:
        folder: Where ``train-images-idx3-ubyte`` and its three companions are, plain or with ``.gz``; by default
            the environment's ``FASHION_MNIST``, else where Debian's package puts them.
        labels: Give batches ``(states, labels)``, labels 0 to 9, for class-conditional models.
        download: Fetch missing files (30 MB) into ``folder``.
        **kwargs: As :class:`ImageDataModule`.

    Raises:
        FileNotFoundError: When the data are first asked for, if a file is missing and cannot be fetched.
        ValueError: If a file is corrupt or of another size, or more images are asked for than there are.
    """

    shape = (1, 28, 28)

    def __init__(self, folder: str | None = None, labels: bool = False, download: bool = False, **kwargs: Any) -> None:
        super().__init__(labels, **kwargs)
        self.folder = Path(folder or os.environ.get("FASHION_MNIST") or SYSTEM_FOLDER)
        self.download = download

    def _read(self, name: str) -> Tensor:
        path = first_of(self.folder, name, f"{name}.gz")
        if path is None and self.download:
            path = self.folder / f"{name}.gz"
            fetch(SOURCES[name], path)
        if path is None:
            raise FileNotFoundError(
                f"{self.folder} has no {name} or {name}.gz; install Debian's package dataset-fashion-mnist, or get the "
                "four files from https://github.com/zalandoresearch/fashion-mnist and say where they are "
                "(FashionMNIST(folder=...), --data.init_args.folder, or the environment's FASHION_MNIST), or say "
                "download=True (--data.init_args.download true) and where they go"
            )
        return read_idx(path)

    def _load(self, part: str) -> tuple[Tensor, Tensor]:
        images, classes = (self._read(f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if tuple(images.shape[1:]) != self.shape[1:] or classes.shape != images.shape[:1]:
            raise ValueError(
                f"{self.folder} has {part} images of shape {tuple(images.shape)} and labels {tuple(classes.shape)}; "
                "(N, 28, 28) and (N,) are expected: these are not the files of Fashion-MNIST"
            )
        return images[:, None], classes.long()

    def splits(self) -> dict[str, LabeledImages]:
        train, test = ((x, y if self.with_labels else None) for x, y in (self._load("train"), self._load("t10k")))
        return divide(train, None, test, count=self.count, val=self.val, test=self.test)
