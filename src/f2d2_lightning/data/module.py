"""Data modules: a checkerboard and a Gaussian mixture in the plane, and scikit-learn's digits.

Batches are states ``(B, ...)`` ready for the flow, or pairs ``(states, labels)``. Discrete data are dequantized with
noise that is a function of seed, epoch and sample (:mod:`f2d2_lightning.utils.seeding`): fresh every epoch in
training, fixed in validation and test, and the same after an interruption. Which training images are mirrored is
such a function too. Data sets of images are in :mod:`f2d2_lightning.data.images`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from f2d2_lightning.checkpoints.trust import build_arguments
from f2d2_lightning.data.dataset import Values, as_values
from f2d2_lightning.flows.mixture import MixtureFlow
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.training.loading import described, read_checkpoint
from f2d2_lightning.training.progress import Place, place_of
from f2d2_lightning.utils.seeding import counter_uniform, mix_seed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Checkerboard", "DequantizedDataset", "Digits", "FlowDataModule", "GaussianMixture"]

PROBED = 64
"""Lazy values of each split that are read beforehand, to see whether they use their levels."""


class DequantizedDataset(Dataset):
    """Integer data dequantized on access, or continuous data as they are.

    An index is ``epoch * len(self) + position``; plain indices are epoch 0.

    Args:
        values: Integers ``(N, ...)`` with ``quantization``, else states ``(N, ...)``; a tensor, or what
            :func:`f2d2_lightning.data.dataset.as_values` takes. Of lazy values each batch is checked as it is read.
        labels: Integers ``(N,)``, or ``None``.
        quantization: Levels and range; ``None`` for continuous data.
        seed: Stream of the noise.
        flip: Mirror images left to right from epoch 1 on, each with probability 1/2 in each epoch. Plain indices
            are the images as they are.

    Raises:
        ValueError: If the values do not fit ``quantization``, the labels are not as many, or there is no image to flip.
    """

    def __init__(
        self,
        values: Values | Any,
        labels: Tensor | None = None,
        quantization: Quantization | None = None,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        values = as_values(values)
        if quantization is not None and isinstance(values, Tensor):
            quantization.check(values)
        if labels is not None and len(labels) != len(values):
            raise ValueError(f"there are {len(values)} values and {len(labels)} labels; as many are expected")
        if flip and len(values.shape) != 4:
            raise ValueError(
                f"flip=True mirrors images (N, C, H, W), and the data have shape {tuple(values.shape)}; set flip=False"
            )
        self.values, self.labels, self.quantization, self.seed, self.flip = values, labels, quantization, seed, flip
        self.dim = math.prod(values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch at once."""
        index = torch.as_tensor(indices)
        position = index % len(self)
        values = self.values[position]
        if self.flip:
            coin = counter_uniform(index, mix_seed(self.seed, "flip")) < 0.5
            mirrored = coin & (index >= len(self))
            values = torch.where(mirrored[:, None, None, None], values.flip(-1), values)
        if self.quantization is not None:
            counters = index[:, None] * self.dim + torch.arange(self.dim)
            values = self.quantization.dequantize(values, counter_uniform(counters, self.seed).reshape(values.shape))
        return values if self.labels is None else (values, self.labels[position])

    def __iter__(self) -> Iterator[Any]:
        """One epoch: indices themselves have no end, and a loop over them had none either."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        batch = self.__getitems__([index])
        return tuple(part[0] for part in batch) if isinstance(batch, tuple) else batch[0]


class _EpochSampler(DistributedSampler):
    """A permutation of the data for each epoch, a function of seed and epoch, that can start part of the way in.

    Indices of the first epoch begin at ``first * count``: what a data set does to its epoch 0 can be left out.

    It is a distributed sampler, so that Lightning leaves it as it is: processes take every n-th sample of one
    permutation, as many each, and the few that are then left over wait for another epoch.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        place: Callable[[], Place],
        replicas: int = 1,
        rank: int = 0,
        first: int = 0,
    ) -> None:
        self.count, self.seed, self.place, self.first = count, seed, place, first
        self.replicas, self.rank = replicas, rank
        self.resumed_at = (0, 0)  # epoch, and samples of it that came before

    def __len__(self) -> int:
        return self.count // self.replicas

    def set_epoch(self, epoch: int) -> None:
        """Lightning's way; the epoch is asked for instead."""

    def __iter__(self) -> Iterator[int]:
        # more than one iterator may be made of the epoch that a run resumes in, and workers begin before Lightning has
        # counted an epoch that was complete
        epoch = max(self.place().epoch, self.resumed_at[0])
        skip = self.resumed_at[1] if epoch == self.resumed_at[0] else 0
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "order", epoch))
        order = torch.randperm(self.count, generator=generator) + (self.first + epoch) * self.count
        return iter(order[self.rank :: self.replicas][: len(self)][skip:].tolist())


class _ResumableLoader(DataLoader):
    """A loader whose place goes into Lightning's checkpoints."""

    place: Callable[[], Place] = staticmethod(lambda: Place(0, 0))

    def state_dict(self) -> dict[str, int]:
        epoch, batch = self.place()
        return {"epoch": epoch, "batches": batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if isinstance(self.sampler, _EpochSampler) and self.batch_size is not None:
            # older checkpoints do not say the epoch, which Lightning has restored by now, and count to its end
            epoch = state.get("epoch", self.place().epoch + state["batches"] // len(self))
            self.sampler.resumed_at = (epoch, state["batches"] % len(self) * self.batch_size)


def _as_is(batch: Any) -> Any:
    return batch


class FlowDataModule(L.LightningDataModule):
    """Base of the data modules here; also the way to bring tensors of one's own, or lazy values of large data.

    Write :meth:`splits` (called once), and set ``shape``.

    Args:
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        num_workers: Processes that load; data in memory need none.
        seed: Of split, order and noise.
        quantization: Levels and range of discrete data; ``None`` for continuous data.
        flip: Mirror training images left to right with probability 1/2, a function of seed, epoch and sample;
            validation and test images, and :meth:`dataset`, stay as they are. For likelihoods of such a model see
            :mod:`f2d2_lightning.likelihood.mirror`.
    """

    shape: tuple[int, ...]

    def __init__(
        self,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        quantization: Quantization | None = None,
        flip: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(f"batch sizes are {batch_size} and {eval_batch_size}; they are at least 1")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed, self.quantization, self.flip = num_workers, seed, quantization, flip
        self._sets: dict[str, DequantizedDataset] = {}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *, trust: Sequence[str] = (), **kwargs: Any
    ) -> Self:
        """As Lightning's, for a subclass that keeps hyper-parameters; nothing that the checkpoint says is run.

        Args:
            checkpoint_path: A local file.
            trust: Packages whose classes the checkpoint may name (:mod:`f2d2_lightning.checkpoints.trust`).
            kwargs: Arguments that the checkpoint does not hold, or that replace its.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the checkpoint is damaged, or names a class that is not trusted.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        found, arguments, trust = described(checkpoint, checkpoint_path, cls, trust)
        made = found(**build_arguments(found, arguments, trust, kwargs))
        made.load_state_dict(checkpoint.get(found.__qualname__, {}))
        return made

    @property
    def levels(self) -> int | None:
        """Number of levels of discrete data, ``None`` for continuous data."""
        return None if self.quantization is None else self.quantization.levels

    def splits(self) -> Mapping[str, tuple[Values | Any, Tensor | None]]:
        """Values and labels of ``"train"``, ``"val"`` and ``"test"``; values as :class:`DequantizedDataset` takes."""
        raise NotImplementedError(f"{type(self).__name__} must define splits()")

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once."""
        if self._sets:
            return
        sets = {}
        for name, (values, labels) in self.splits().items():
            seed = mix_seed(self.seed, "dequantization", name)
            sets[name] = DequantizedDataset(values, labels, self.quantization, seed)
        if self.quantization is not None:
            self._check_range([data.values for data in sets.values()], self.quantization)
        self._sets = sets

    @staticmethod
    def _check_range(splits: list[Values], quantization: Quantization) -> None:
        """Whether all the data use their levels; of lazy values a few are enough to see it."""
        ends = []
        for values in splits:
            if not isinstance(values, Tensor):
                values = values[torch.linspace(0, len(values) - 1, min(PROBED, len(values))).round().long()]
            ends += [values.min(), values.max()]
        quantization.check_range_of(torch.stack(ends))

    def dataset(self, split: str) -> DequantizedDataset:
        """The data of ``"train"``, ``"val"`` or ``"test"``."""
        self.setup()
        if split not in self._sets:
            raise ValueError(f"split is {split!r}; {type(self).__name__} has {', '.join(self._sets)}")
        return self._sets[split]

    def _place(self) -> Place:
        return Place(0, 0) if self.trainer is None else place_of(self.trainer)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, the last incomplete batch dropped where there are several."""
        dataset = self.dataset("train")
        if self.flip:
            dataset = DequantizedDataset(dataset.values, dataset.labels, self.quantization, dataset.seed, flip=True)
        kwargs = (None if self.trainer is None else self.trainer.distributed_sampler_kwargs) or {}
        replicas, rank = int(kwargs.get("num_replicas", 1)), int(kwargs.get("rank", 0))
        sampler = _EpochSampler(len(dataset), self.seed, self._place, replicas, rank, first=int(self.flip))
        loader = _ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) > self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_as_is,
        )
        loader.place = self._place
        return loader

    def _evaluation(self, split: str) -> DataLoader:
        return DataLoader(
            self.dataset(split), batch_size=self.eval_batch_size, num_workers=self.num_workers, collate_fn=_as_is
        )

    def val_dataloader(self) -> DataLoader:
        """In order, with fixed noise."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        """In order, with fixed noise."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """The test data."""
        return self.test_dataloader()


class Checkerboard(FlowDataModule):
    """Uniform on the dark squares of a 4 x 4 board on [-2, 2]^2.

    Args:
        count: Training points; a tenth each for validation and test.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        seed: Of the draws and of the order.
    """

    shape = (2,)

    def __init__(self, count: int = 50_000, batch_size: int = 1024, eval_batch_size: int = 4096, seed: int = 0) -> None:
        super().__init__(batch_size, eval_batch_size, seed=seed)
        self.count = count

    @staticmethod
    def log_prob(x: Tensor) -> Tensor:
        """Exact log-density, ``(B, 2) -> (B,)``, nats: ``-log 8`` on dark squares, ``-inf`` elsewhere."""
        cell = x.floor()
        dark = (cell.sum(-1) % 2 == 0) & (x.abs() < 2).all(-1)
        return torch.where(dark, -math.log(8.0), -math.inf)

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Draw the three sets."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "checkerboard"))

        def draw(count: int) -> Tensor:
            column = torch.randint(-2, 2, (count,), generator=generator)
            half = torch.randint(0, 2, (count,), generator=generator)
            row = 2 * half - 2 + column % 2
            return torch.stack((column, row), -1) + torch.rand(count, 2, generator=generator)

        parts = {"train": self.count, "val": self.count // 10, "test": self.count // 10}
        return {name: (draw(max(1, count)), None) for name, count in parts.items()}


class GaussianMixture(FlowDataModule):
    """A ring of rotated anisotropic Gaussians in the plane, with exact density and velocity (:attr:`flow`).

    Args:
        components: Number of Gaussians.
        radius: Of the ring.
        spread: Standard deviations along and across each Gaussian's long axis.
        count: Training points; a tenth each for validation and test.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        seed: Of the draws and of the order.
    """

    shape = (2,)

    def __init__(
        self,
        components: int = 5,
        radius: float = 2.0,
        spread: tuple[float, float] = (0.6, 0.2),
        count: int = 50_000,
        batch_size: int = 1024,
        eval_batch_size: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed=seed)
        self.count = count
        angle = torch.arange(components) * (2 * math.pi / components)
        tilt = angle + math.pi / 4
        rotation = torch.stack((tilt.cos(), -tilt.sin(), tilt.sin(), tilt.cos()), -1).reshape(-1, 2, 2)
        axes = rotation * torch.tensor(spread)
        means = radius * torch.stack((angle.cos(), angle.sin()), -1)
        self.flow = MixtureFlow(torch.ones(components), means, axes @ axes.transpose(1, 2))

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density, ``(B, 2) -> (B,)``, nats."""
        return self.flow.log_prob(x)

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Draw the three sets."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "mixture"))
        parts = {"train": self.count, "val": self.count // 10, "test": self.count // 10}
        return {name: (self.flow.sample(max(1, count), generator), None) for name, count in parts.items()}


class Digits(FlowDataModule):
    """scikit-learn's digits: 1,797 scans of 8 x 8 pixels with 17 grey levels, dequantized to [-1, 1].

    The data come with scikit-learn (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
    https://doi.org/10.24432/C50P49). The split is fixed: 1,297 to train, 200 to validate, 300 to test.

    Args:
        labels: Give batches ``(states, labels)`` with the digit, for class-conditional models.
        levels: Number of grey levels; the data have 17.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        num_workers: Processes that load; the data are in memory, so 0 is best.
        seed: Of order and noise; the split does not depend on it.
    """

    shape = (1, 8, 8)

    def __init__(
        self,
        labels: bool = False,
        levels: int = 17,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, Quantization(levels))
        self.with_labels = labels

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Read and split the scans."""
        from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        values = torch.from_numpy(images).to(torch.uint8).reshape(-1, 1, 8, 8)
        classes = torch.from_numpy(digits).long()
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        parts = dict(zip(("train", "val", "test"), order.split([1297, 200, 300]), strict=True))
        return {name: (values[rows], classes[rows] if self.with_labels else None) for name, rows in parts.items()}
