"""CIFAR-10: 60,000 colour images of ten classes, 32 x 32 pixels."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.data.images._download import Source, fetch
from f2d2_lightning.data.images._stores import first_of
from f2d2_lightning.data.images.base import ImageDataModule, LabeledImages, checked_batch, divide
from f2d2_lightning.utils.checks import checked
from f2d2_lightning.utils.pickles import read_arrays

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
AGAIN = f"get it again from {HOME}"
SOURCE = Source("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
"""Checksum as on the authors' page and in torchvision."""

BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
ROWS = 10_000
"""Images of each batch."""
DIM = 3 * 32 * 32
CLASSES = 10


class CIFAR10(ImageDataModule):
    """CIFAR-10 as its authors distribute it, dequantized to [-1, 1].

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
    The last ``val`` of the 50,000 training images validate; the 10,000 test images test. All are held in memory
    (184 MB). Pickles are read without running what else they might hold (:mod:`f2d2_lightning.utils.pickles`).

    Args:
        folder: Where ``cifar-10-batches-py``, ``cifar-10-python.tar.gz``, ``cifar-10-batches-bin`` or
            ``cifar-10-binary.tar.gz`` is; the first of these that there is is read. It may be one of these itself.
        labels: Give batches ``(states, labels)``, labels 0 to 9.
        download: Fetch ``cifar-10-python.tar.gz`` (170 MB) into ``folder`` if none of these is there.
        **kwargs: As :class:`ImageDataModule`.

    Raises:
        FileNotFoundError: When the data are first asked for, if there are none and none can be fetched.
        ValueError: If a file is corrupt, truncated or another one, or more images are asked for than there are.
    """

    shape = (3, 32, 32)

    @checked
    def __init__(self, folder: str = "data", labels: bool = False, download: bool = False, **kwargs: Any) -> None:
        super().__init__(labels, **kwargs)
        self.folder, self.download = Path(folder).expanduser(), download

    def splits(self) -> dict[str, LabeledImages]:
        path = self._find()
        files = path.iterdir() if path.is_dir() else ()
        content = {file.name: file.read_bytes() for file in files if file.name.removesuffix(".bin") in BATCHES}
        content = _complete(content if path.is_dir() else dict(_archive(path)), path)
        *parts, test = (_batch(data, f"{path}/{name}") for name, data in content.items())
        images, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        train, held_out = ((x, y if self.with_labels else None) for x, y in ((images, labels), test))
        return divide(train, None, held_out, count=self.count, val=self.val, test=self.test)

    def _find(self) -> Path:
        names = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-10-batches-bin", "cifar-10-binary.tar.gz")
        if self.folder.name in names and self.folder.exists():
            return self.folder
        if found := first_of(self.folder, *names):
            return found
        if not self.download:
            raise FileNotFoundError(
                f"{self.folder} has none of {', '.join(names)}; get {SOURCE.url} (MD5 {SOURCE.md5}, 170 MB) and put "
                f"it there as it is, say where it is (CIFAR10(folder=...), --data.init_args.folder), or say "
                f"download=True (--data.init_args.download true). See {HOME}"
            )
        fetch(SOURCE, self.folder / names[1])
        return self.folder / names[1]


def _archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Batches in a gzipped tar file, which is read to its end, where its checksum is."""
    try:
        with gzip.open(path) as stream:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    name, file = Path(member.name).name, archive.extractfile(member) if member.isfile() else None
                    if name.removesuffix(".bin") in BATCHES and file is not None:
                        yield name, file.read()
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is a truncated or corrupt archive ({error}); remove it, and {AGAIN}") from error


def _complete(content: dict[str, bytes], path: Path) -> dict[str, bytes]:
    """The six batches of one version, in the order of :data:`BATCHES`."""
    for names in (BATCHES, tuple(f"{name}.bin" for name in BATCHES)):
        if all(name in content for name in names):
            return {name: content[name] for name in names}
    missing = [name for name in BATCHES if name not in content and f"{name}.bin" not in content]
    lacks = ", ".join(missing) or "batches of one version"
    raise ValueError(f"{path} lacks {lacks}; it is incomplete or truncated: remove it, and {AGAIN}")


def _batch(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Images ``(ROWS, 3, 32, 32)``, ``uint8``, and labels ``(ROWS,)`` of one batch."""
    found: Mapping[str, Any]
    if not name.endswith(".bin"):
        found = read_arrays(content, name, HOME)
    elif len(content) % (1 + DIM):
        came = f"{len(content)} bytes, no multiple of {1 + DIM}"
        raise ValueError(f"{name} has {came}; it is truncated or another file: {AGAIN}")
    else:
        rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + DIM)
        found = {"data": rows[:, 1:], "labels": rows[:, 0]}
    images, labels = checked_batch(found, name, (3, 32, 32), range(CLASSES), HOME)
    if len(images) != ROWS:
        came = f"{len(images)} images; {ROWS} are expected"
        raise ValueError(f"{name} has {came}: it is truncated or another data set; {AGAIN}")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)
