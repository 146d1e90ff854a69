"""What all data modules share: loaders of data in memory or not, whose order and noise are functions of a seed.

Batches are states ``(B, ...)`` ready for the flow, or pairs ``(states, labels)``. Discrete data are dequantized with
noise that is a function of seed, epoch and sample (:mod:`f2d2_lightning.utils.seeding`): fresh every epoch in
training, fixed in validation and test, and the same after an interruption. Which training images are mirrored is
such a function too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from f2d2_lightning.checkpoints.trust import build_arguments
from f2d2_lightning.data.dataset import DequantizedDataset, Values
from f2d2_lightning.data.sampling import EpochSampler, ResumableLoader
from f2d2_lightning.likelihood.quantization import Quantization, extremes
from f2d2_lightning.training.loading import described, read_checkpoint
from f2d2_lightning.training.progress import Place, place_of
from f2d2_lightning.utils.checks import at_least, checked
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.seeding import mix_seed
from f2d2_lightning.utils.text import briefly

if TYPE_CHECKING:
    from typing_extensions import Self

PROBED = 64
"""Lazy values of each split that are read beforehand, to see whether they use their levels."""


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

    @checked
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
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(0, num_workers=num_workers)
        self.batch_size, self.eval_batch_size = int(batch_size), int(eval_batch_size)
        self.num_workers, self.seed, self.quantization, self.flip = num_workers, seed, quantization, flip
        self._sets: dict[str, DequantizedDataset] = {}

    def __repr__(self) -> str:
        return briefly(self)

    __str__ = __repr__

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

    def splits(self) -> Mapping[str, tuple[Values | Any, Cond | None]]:
        """Values and labels of ``"train"``, ``"val"`` and ``"test"``; values as :class:`DequantizedDataset` takes."""
        raise NotImplementedError(f"{type(self).__name__} must define splits()")

    @property
    def quantisation(self) -> Quantization | None:
        """:attr:`quantization` by its name of version 0.1, for data modules that set it."""
        return self.quantization

    @quantisation.setter
    def quantisation(self, value: Quantization | None) -> None:
        warnings.warn("quantisation is quantization now", DeprecationWarning, stacklevel=2)
        self.quantization = value

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once."""
        if self._sets:
            return
        sets: dict[str, DequantizedDataset] = {}
        ends: list[int] = []
        for name, (values, labels) in self.splits().items():
            # the word is part of the seed, and so of every figure that was published
            seed = mix_seed(self.seed, "dequantisation", name)
            sets[name] = DequantizedDataset(values, labels, self.quantization, seed)
        if self.quantization is not None:
            # whether all the data use their levels: of lazy values a few are enough to see it
            for values in (data.values for data in sets.values()):
                if not isinstance(values, Tensor):
                    values = values[torch.linspace(0, len(values) - 1, min(PROBED, len(values))).round().long()]
                ends += extremes(values)
            self.quantization.check_range_of(torch.tensor(ends))
        self._sets = sets

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
        sampler = EpochSampler(len(dataset), self.seed, self._place, replicas, rank, first=int(self.flip))
        loader = ResumableLoader(
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
        """In order, with fixed noise."""
        return DataLoader(
            self.dataset(split), batch_size=self.eval_batch_size, num_workers=self.num_workers, collate_fn=_as_is
        )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()
