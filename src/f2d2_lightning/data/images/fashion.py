"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels, 256 levels."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.data.images._download import Source, fetch
from f2d2_lightning.data.images._stores import first_of
from f2d2_lightning.data.images.base import ImageDataModule, LabeledImages, divide
from f2d2_lightning.utils.checks import checked

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files."""
SITE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SUMS = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
SOURCES = {name: Source(f"{SITE}{name}.gz", md5) for name, md5 in SUMS.items()}
"""Addresses and checksums as torchvision has them."""

DEFLATE = 1100
"""More than gzip can grow: 258 bytes come of 2 bits at the most, 1032-fold (RFC 1951, 3.2.5)."""


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

    @checked
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


def read_idx(path: str | Path) -> Tensor:
    """Array of unsigned bytes in an IDX file, plain or gzipped, ``uint8``, shape as the file says.

    The format of MNIST and its relatives, http://yann.lecun.com/exdb/mnist/. A file of another kind, or a damaged one,
    is a ``ValueError``.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            return _read(stream, path, DEFLATE * size if packed else size)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is a truncated or corrupt gzip file ({error}); get it again") from error


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path, most: int) -> Tensor:
    """The array of a stream that cannot have more than ``most`` bytes; no more than the head says is read."""
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0":
        raise ValueError(f"{path} does not begin as an IDX file does (it has {head.hex(' ') or 'no bytes'})")
    if head[2] != 0x08:
        raise ValueError(f"{path} holds numbers of IDX type 0x{head[2]:02x}; unsigned bytes (0x08) are expected")
    sizes = stream.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise ValueError(f"{path} ends within its head ({4 + len(sizes)} bytes); it is truncated, get it again")
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    count = math.prod(shape)
    # one byte more than there should be, which also brings gzip to its checksum
    content = stream.read(count + 1) if count <= most else b""
    if len(content) != count:
        came = "it cannot" if count > most else f"holds {'more' if len(content) > count else len(content)}"
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, and {came}; "
            "it is truncated or corrupt, get it again"
        )
    try:
        return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())
    except ValueError as error:
        raise ValueError(f"{path} says that its shape is {shape} ({error}); it is corrupt, get it again") from error
