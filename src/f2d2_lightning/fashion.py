"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels, 256 levels."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from f2d2_lightning.data import FlowDataModule
from f2d2_lightning.idx import read_idx
from f2d2_lightning.quantisation import Quantisation

__all__ = ["FashionMNIST"]

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files."""
FILES = {"train": "train", "test": "t10k"}


class FashionMNIST(FlowDataModule):
    """Fashion-MNIST from its four IDX files, dequantised to [-1, 1].

    Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017,
    https://arxiv.org/abs/1708.07747. The last ``val`` of the 60,000 training images validate; the 10,000 test images
    test. Nothing is downloaded.

    Args:
        folder: Where ``train-images-idx3-ubyte`` and its three companions are, plain or with ``.gz``; by default
            the environment's ``FASHION_MNIST``, else where Debian's package puts them.
        labels: Give batches ``(states, labels)``, labels 0 to 9, for class-conditional models.
        count: Training images to use; ``None`` for all.
        val: Validation images.
        test: Test images to use, the first ones; ``None`` for all.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        num_workers: Processes that load; the data are in memory, so 0 is best.
        seed: Of order and noise; the split does not depend on it.

    Raises:
        FileNotFoundError: When the data are first asked for, if a file is missing.
        ValueError: If a file is corrupt or of another size, or more images are asked for than there are.
    """

    shape = (1, 28, 28)

    def __init__(
        self,
        folder: str | None = None,
        labels: bool = False,
        count: int | None = None,
        val: int = 1000,
        test: int | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, Quantisation(256))
        self.folder = Path(folder or os.environ.get("FASHION_MNIST") or SYSTEM_FOLDER)
        self.with_labels, self.count, self.val, self.test = labels, count, val, test

    def _read(self, name: str) -> Tensor:
        found = [path for suffix in ("", ".gz") if (path := self.folder / f"{name}{suffix}").is_file()]
        if not found:
            raise FileNotFoundError(
                f"{self.folder} has no {name} or {name}.gz; install Debian's package dataset-fashion-mnist, or get the "
                "four files from https://github.com/zalandoresearch/fashion-mnist and say where they are "
                "(FashionMNIST(folder=...), --data.init_args.folder, or the environment's FASHION_MNIST)"
            )
        return read_idx(found[0])

    def _load(self, part: str) -> tuple[Tensor, Tensor]:
        images, classes = self._read(f"{FILES[part]}-images-idx3-ubyte"), self._read(f"{FILES[part]}-labels-idx1-ubyte")
        if tuple(images.shape[1:]) != self.shape[1:] or classes.shape != images.shape[:1]:
            raise ValueError(
                f"{self.folder} has {part} images of shape {tuple(images.shape)} and labels {tuple(classes.shape)}; "
                "(N, 28, 28) and (N,) are expected: these are not the files of Fashion-MNIST"
            )
        return images[:, None], classes.long()

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Read the files and split."""
        images, classes = self._load("train")
        test_images, test_classes = self._load("test")
        count = len(images) - self.val if self.count is None else self.count
        test = len(test_images) if self.test is None else self.test
        if not (self.val >= 1 and 1 <= count <= len(images) - self.val and 1 <= test <= len(test_images)):
            raise ValueError(
                f"count={self.count}, val={self.val} and test={self.test} do not fit {len(images)} training and "
                f"{len(test_images)} test images; val images are taken from the end of the training images"
            )
        parts = {
            "train": (images[:count], classes[:count]),
            "val": (images[len(images) - self.val :], classes[len(images) - self.val :]),
            "test": (test_images[:test], test_classes[:test]),
        }
        return {name: (x, y if self.with_labels else None) for name, (x, y) in parts.items()}
