"""What is known of real images on disk, by what it was computed from."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.utils.arrays import read_numbers
from f2d2_lightning.utils.files import whole_file

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]
NAMES = ("total", "products", "count", "kept")
TOLERANCE = 0.01
"""Largest relative difference of features on another device or with another library."""


class StatisticsCache:
    """A folder of sums of features (:attr:`f2d2_lightning.metrics.image.ImageDistance.real`), each by a key.

    A file also holds the features of some images. Where the network answers others now, its code has changed and the
    file is of no use, which the key cannot know. By default the folder is ``f2d2_lightning/feature_statistics`` in the
    user's cache (``XDG_CACHE_HOME``, or ``~/.cache``).
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = Path(folder or Path(home) / "f2d2_lightning" / "feature_statistics").expanduser()

    def path(self, key: str) -> Path:
        """Where statistics of a key are."""
        return self.folder / f"{key}.npz"

    def read(self, key: str, probe: Tensor) -> Statistics | None:
        """Statistics of a key; ``None``, and a warning, if the file is damaged or of other features.

        ``probe`` are the network's features of the images that were given to :meth:`write`, ``(N, F)``.
        """
        path = self.path(key)
        if not path.exists():
            return None
        try:
            found = read_numbers(path, remedy="it is damaged or no file of statistics, remove it")
            size, shapes = probe.shape[1], {name: value.shape for name, value in found.items()}
            wanted = {"total": (size,), "products": (size, size), "count": (), "probe": tuple(probe.shape)}
            if shapes != wanted | {"kept": (*shapes.get("kept", ())[:1], size)}:
                raise ValueError(f"{path} holds arrays {shapes}; sums, products and features are expected, remove it")
        except ValueError as error:
            warnings.warn(f"{error}; the statistics are computed again", stacklevel=2)
            return None
        before, now = torch.from_numpy(found["probe"]).double(), probe.cpu().double()
        if not bool((before - now).norm() <= TOLERANCE * now.norm() + 1e-12):
            changed = f"{path} was made with other features of the same images: the network's code has changed"
            warnings.warn(f"{changed}; the statistics are computed again", stacklevel=2)
            return None
        total, products, count, kept = (torch.from_numpy(found[name]) for name in NAMES)
        return total.double(), products.double(), count.long(), kept.double()

    def write(self, key: str, statistics: Statistics, probe: Tensor) -> None:
        """Keep statistics; only a warning where the folder cannot be written."""
        arrays = {name: value.cpu().numpy() for name, value in zip(NAMES, statistics)}
        try:
            with whole_file(self.path(key)) as partial, partial.open("wb") as file:
                np.savez(file, probe=probe.cpu().double().numpy(), **arrays)  # type: ignore[arg-type]
        except OSError as error:
            failed = f"statistics of real images cannot be kept in {self.folder} ({error})"
            again = "will be computed again by the next run; choose another folder: cache=..."
            warnings.warn(f"{failed}, and {again}", stacklevel=2)
