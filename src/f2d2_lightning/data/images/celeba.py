"""CelebA at 64 x 64 pixels: 202,599 photographs of faces, aligned and cropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.data.dataset import take
from f2d2_lightning.data.images._cache import cached
from f2d2_lightning.data.images._download import Source, fetch
from f2d2_lightning.data.images._reader import Filter, Framing, ImageReader
from f2d2_lightning.data.images._stores import open_store
from f2d2_lightning.data.images.base import ImageDataModule, LabeledImages, divide
from f2d2_lightning.utils.checks import checked

HOME = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
AGAIN = f"get it again from {HOME}"
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
SOURCES = {
    "img_align_celeba.zip": Source(DRIVE + "0B7EVK8r0v71pZjFTYXZWM3FlRnM", "00d2c5bc6d35e252742224ab0c1e8fcb"),
    "list_eval_partition.txt": Source(DRIVE + "0B7EVK8r0v71pY0NSMzRuSXJEVkk", "d32c9cbf5e040fd4025c592c306e6668"),
    "list_attr_celeba.txt": Source(DRIVE + "0B7EVK8r0v71pblRyaVFSWGxPY0U", "75e246fa4810816ffd6ee81facbd244c"),
}
"""The authors' files on Google Drive; numbers and checksums as in torchvision's ``datasets/celeba.py``."""

COUNTS = {"train": 162_770, "val": 19_867, "test": 19_962}
"""Images of each split, in the order of their numbers in ``list_eval_partition.txt``."""


class CelebA64(ImageDataModule):
    """CelebA in its official split, cropped about the centre, resized to 64 x 64, then dequantized to [-1, 1].

    Liu, Luo, Wang and Tang, "Deep Learning Face Attributes in the Wild", 2015, https://arxiv.org/abs/1411.7766. Files
    as torchvision's ``CelebA`` keeps them: ``img_align_celeba/`` or ``img_align_celeba.zip``, and
    ``list_eval_partition.txt``.

    Likelihoods of different crops and filters do not compare. 140 pixels are usual in work on score-based models (Song
    and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019,
    https://arxiv.org/abs/1907.05600, and before it Tolstikhin et al., "Wasserstein Auto-Encoders", 2018,
    https://arxiv.org/abs/1711.01558), 148 in code for variational autoencoders
    (https://github.com/AntixK/PyTorch-VAE).

    Args:
        folder: Where the files are; torchvision's ``root/celeba``.
        crop: Side of the square about the centre, of 178 x 218 pixels.
        resize: Filter, with antialiasing: ``bicubic``, ``bilinear``, ``lanczos`` or ``box``.
        attribute: Give batches ``(states, labels)``, labels 1 where the face has this attribute and 0 where it has
            not, one of the 40 in ``list_attr_celeba.txt``, such as ``"Smiling"``; ``None`` for states alone.
        val: Validation images to use, the first ones; ``None`` for all 19,867.
        cache: Folder for the decoded images as a memory-mapped array (2.5 GB), made once; ``None`` decodes them anew.
        download: Fetch missing files (1.4 GB) from the authors' Google Drive, which refuses when too many have asked.
        **kwargs: As :class:`ImageDataModule`; ``num_workers`` had better be several, without a cache.

    Raises:
        FileNotFoundError: When the data are first asked for, if a file is missing and cannot be fetched.
        ValueError: If a file is corrupt, truncated or another one; of an image, when it is read.
    """

    shape = (3, 64, 64)

    @checked
    def __init__(
        self,
        folder: str = "data/celeba",
        crop: int = 140,
        resize: Filter = "bicubic",
        attribute: str | None = None,
        val: int | None = None,
        cache: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(attribute is not None, val=val, **kwargs)
        self.folder, self.attribute, self.cache, self.download = Path(folder).expanduser(), attribute, cache, download
        self.framing = Framing(64, crop, resize, source=(178, 218))
        self.classes = None if attribute is None else [f"not {attribute}", attribute]

    def splits(self) -> dict[str, LabeledImages]:
        folder = self.folder / "img_align_celeba"
        store = open_store(folder if folder.is_dir() else self._file("img_align_celeba.zip"))
        partition = _partition(self._file("list_eval_partition.txt"))
        of = {name.rpartition("/")[2]: row for row, name in enumerate(store.names)}
        images = ImageReader(store, _all_of(of, list(partition), store.path), 3, self.framing)
        values = cached(images, self.cache, "celeba64")
        labels = None if self.attribute is None else self._labels(self._file("list_attr_celeba.txt"), list(partition))
        splits = torch.tensor(list(partition.values()))
        parts = [(splits == number).nonzero()[:, 0] for number in range(len(COUNTS))]
        held = [(take(values, rows), None if labels is None else labels[rows]) for rows in parts]
        return divide(*held, count=self.count, val=self.val, test=self.test)

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            source = SOURCES[name]
            if not self.download:
                folder = "the folder img_align_celeba or " if name.endswith(".zip") else ""
                raise FileNotFoundError(
                    f"{self.folder} lacks {folder}{name}; get it from {HOME} (Align&Cropped Images; {name} is "
                    f"{source.url} with MD5 {source.md5}) and put it there, say where the files are "
                    "(CelebA64(folder=...), --data.init_args.folder), or say download=True "
                    "(--data.init_args.download true)"
                )
            fetch(source, path)
        return path

    def _labels(self, path: Path, names: list[str]) -> Tensor:
        """1 where an image has the attribute, else 0, ``(N,)``, ``int64``."""
        lines = _lines(path)
        attributes = lines[1].split() if len(lines) > 1 else []
        if self.attribute not in attributes:
            raise ValueError(
                f"attribute={self.attribute!r}; {path} has {', '.join(attributes) or 'none'}: choose one, or {AGAIN}"
            )
        column, found = attributes.index(self.attribute), {}
        for number, line in enumerate(lines[2:], 3):
            name, *values = line.split()
            if len(values) != len(attributes) or values[column] not in ("-1", "1"):
                raise ValueError(
                    f"line {number} of {path} has {len(values)} values, or others than -1 and 1; {len(attributes)} are "
                    f"expected: {AGAIN}"
                )
            found[name] = int(values[column] == "1")
        return torch.tensor(_all_of(found, names, path))


def _partition(path: Path) -> dict[str, int]:
    """Number of the split of each image, by file name."""
    found: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        name, _, split = line.partition(" ")
        if split.strip() not in ("0", "1", "2"):
            raise ValueError(f"line {number} of {path} is {line!r}; a name and 0, 1 or 2 are expected: {AGAIN}")
        found[name] = int(split)
    came = {name: list(found.values()).count(number) for number, name in enumerate(COUNTS)}
    if came != COUNTS:
        listed = [", ".join(f"{count} {name}" for name, count in counts.items()) for counts in (came, COUNTS)]
        raise ValueError(
            f"{path} lists {listed[0]} images; {listed[1]} are expected: it is truncated or another file; {AGAIN}"
        )
    return found


def _all_of(found: Mapping[str, int], names: list[str], path: Path) -> list[int]:
    """The number of each image, in the order of ``names``; a missing one is an error."""
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(names)} images ({missing[0]}, ...); it is truncated or incomplete: "
            + AGAIN
        )
    return [found[name] for name in names]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); {AGAIN}") from error
