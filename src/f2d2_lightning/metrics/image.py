"""Mean and covariance of features of images, over batches and processes, and in files. No Lightning."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from f2d2_lightning.metrics.distances import root_distance, symmetric_root
from f2d2_lightning.metrics.networks import extract_features
from f2d2_lightning.utils.arrays import read_numbers
from f2d2_lightning.utils.files import whole_file

__all__ = ["FeatureMoments", "FeatureStatistics", "double_device", "feature_statistics"]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of a set of features, on the CPU, float64."""

    mean: Tensor
    """``(F,)``."""
    covariance: Tensor
    """Unbiased (over ``count - 1``), ``(F, F)``; NaN below two samples."""
    count: int
    """Number of samples."""
    features: Tensor | None = None
    """Features themselves, of all samples or the first ones, ``(N, F)``, where they were asked for."""

    @functools.cached_property
    def root(self) -> Tensor:
        """Symmetric root of the covariance, ``(F, F)``; computed once."""
        return symmetric_root(self.covariance)

    def kept(self) -> Tensor:
        """The features themselves, ``(N, F)``.

        Raises:
            ValueError: If they were not kept.
        """
        if self.features is None:
            raise ValueError("the features themselves were not kept, but only their mean and covariance: keep=True")
        return self.features

    def distance(self, other: FeatureStatistics) -> float:
        """Frechet's distance to another set (:func:`f2d2_lightning.metrics.distances.frechet_distance`).

        Raises:
            ValueError: If a set has fewer than 2 samples, or the features are of different numbers.
        """
        if min(self.count, other.count) < 2:
            raise ValueError(
                f"the sets have {self.count} and {other.count} samples; a covariance needs at least 2 of each"
            )
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"the sets have {len(self.mean)} and {len(other.mean)} features; both must be of one feature network"
            )
        return root_distance(self.mean, self.root, other.mean, other.root)

    def save(self, path: str | Path, **more: np.ndarray) -> None:
        """Write to an ``.npz`` file, over an older one; beside its place first, so that no half of one is left.

        Args:
            path: File.
            more: Further arrays to keep in it.
        """
        content = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count)}
        content |= {} if self.features is None else {"features": self.features}
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez(file, **{name: value.numpy() for name, value in content.items()}, **more)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """What :meth:`save` wrote; arrays only, no code in the file is run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or of another kind.
        """
        return cls.from_arrays(read_arrays(path), path)

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], path: str | Path) -> FeatureStatistics:
        """From the arrays of a file.

        Raises:
            ValueError: If some are missing, of other shapes, or not finite.
        """
        found = {name: (value.dtype.kind, value.shape) for name, value in arrays.items()}
        size = arrays["mean"].shape[0] if "mean" in arrays and arrays["mean"].ndim == 1 else -1
        wanted = {"mean": ("f", (size,)), "covariance": ("f", (size, size)), "count": ("i", ())}
        kept = arrays.get("features")
        fits = all(found.get(name) == form for name, form in wanted.items())
        fits = fits and (kept is None or (kept.ndim == 2 and kept.shape[1] == size))
        if not fits or not all(np.isfinite(arrays[name]).all() for name in wanted):
            raise ValueError(f"{path} does not hold the mean, covariance and count of features; it has {found}")
        mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mean", "covariance"))
        return cls(mean, covariance, int(arrays["count"]), None if kept is None else torch.from_numpy(kept))


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file, without pickles.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no statistics of features at {path}")
    return read_numbers(path, remedy="it is damaged or no file of statistics, remove it")


class FeatureMoments(Metric):
    """Mean and covariance of features over batches and processes: sums in float64, so that no batch is lost in one.

    Args:
        num_features: Number of features.
        kwargs: torchmetrics' own, such as ``sync_on_compute``.
    """

    full_state_update = False
    higher_is_better = None
    total: Tensor
    products: Tensor
    count: Tensor
    kept: list[Tensor]

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_features = num_features
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        self.add_state("total", default=zeros(num_features), dist_reduce_fx="sum")
        self.add_state("products", default=zeros(num_features, num_features), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("kept", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, keep: int = 0) -> None:
        """Add a batch; a process without samples adds an empty one.

        Args:
            features: ``(B, F)``; for no samples ``(0, F)``.
            keep: Keep the first so many of the batch themselves.
        """
        features = features.detach().to(self.total.device).double()
        self.total += features.sum(0)
        self.products += features.T @ features
        self.count += len(features)
        # an empty part as well: processes gather as many tensors of as many axes
        self.kept.append(features[:keep])

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, covariance, count and the features kept, over everything added.

        torchmetrics drops the axes of single numbers; :meth:`statistics` does not.
        """
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        if int(self.count) < 2:
            covariance = torch.full_like(covariance, math.nan)
        kept = torch.cat(self.kept) if isinstance(self.kept, list) else self.kept
        return mean, 0.5 * (covariance + covariance.T), self.count, kept

    def statistics(self) -> FeatureStatistics:
        """Over everything added, by all processes; mean and covariance are NaN where there are too few samples."""
        mean, covariance, count, kept = (value.cpu() for value in self.compute())
        size = self.num_features
        features = kept.reshape(-1, size) if kept.numel() else None
        return FeatureStatistics(mean.reshape(size), covariance.reshape(size, size), int(count), features)


def feature_statistics(
    network: nn.Module, images: Tensor | Iterable[Tensor], batch_size: int = 256, keep: bool = False
) -> FeatureStatistics:
    """Statistics of the features of images, of this process alone.

    Args:
        network: Feature network (:mod:`f2d2_lightning.metrics.networks`).
        images: ``uint8 (N, C, H, W)``, or batches of them, where the network is.
        batch_size: Images at a time, of a tensor.
        keep: Keep the features as well, for KID, precision and recall.

    Raises:
        ValueError: If there are no images, or images or features are unfit.
    """
    moments: FeatureMoments | None = None
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        if len(batch) == 0:
            continue
        features = extract_features(network, batch, None if moments is None else moments.num_features)
        if moments is None:
            moments = FeatureMoments(features.shape[1], sync_on_compute=False).to(double_device(features.device))
        moments.update(features, len(batch) if keep else 0)
    if moments is None:
        raise ValueError("there are no images to take features of")
    return moments.statistics()


def double_device(device: torch.device) -> torch.device:
    """The device, or the CPU where the device has no float64 (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device
