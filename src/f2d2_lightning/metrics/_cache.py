"""Statistics of real images on disk, by what they were computed from."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.metrics.image import FeatureStatistics, read_arrays

__all__ = ["StatisticsCache"]

TOLERANCE = 0.01
"""Largest relative difference of features on another device or with another library."""


class StatisticsCache:
    """A folder of statistics, each by a key that says what they are of.

    A file also holds the features of some images. Where the network answers others now, its code has changed and the
    file is of no use, which the key cannot know.

    Args:
        folder: The folder; by default ``f2d2_lightning/feature_statistics`` in the user's cache (``XDG_CACHE_HOME``, or
            ``~/.cache``).
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = Path(folder or Path(home) / "f2d2_lightning" / "feature_statistics").expanduser()

    def path(self, key: str) -> Path:
        """Where statistics of a key are."""
        return self.folder / f"{key}.npz"

    def read(self, key: str, probe: Tensor) -> FeatureStatistics | None:
        """Statistics of a key; ``None``, and a warning, if the file is damaged or of other features.

        Args:
            key: Key.
            probe: The network's features of the images that were given to :meth:`write`, ``(N, F)``.
        """
        path = self.path(key)
        if not path.exists():
            return None
        try:
            arrays = read_arrays(path)
            statistics = FeatureStatistics.from_arrays(arrays, path)
        except ValueError as error:
            warnings.warn(f"{error}; the statistics are computed again", stacklevel=2)
            return None
        before, now = torch.from_numpy(arrays.get("probe", np.zeros(0))).double(), probe.cpu().double()
        if before.shape != now.shape or not bool((before - now).norm() <= TOLERANCE * now.norm() + 1e-12):
            warnings.warn(
                f"{path} was made with other features of the same images: the network's code has changed; the "
                "statistics are computed again",
                stacklevel=2,
            )
            return None
        return statistics

    def write(self, key: str, statistics: FeatureStatistics, probe: Tensor) -> None:
        """Keep statistics; only a warning where the folder cannot be written."""
        try:
            statistics.save(self.path(key), probe=probe.cpu().double().numpy())
        except OSError as error:
            warnings.warn(
                f"statistics of real images cannot be kept in {self.folder} ({error}), and will be computed again by "
                "the next run; choose another folder: cache=...",
                stacklevel=2,
            )
