"""The images that samples are compared with: those of a Trainer's data, each process a share of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from f2d2_lightning.callbacks._wrapping import overrides
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.quantization import state_images
from f2d2_lightning.training.batches import transferred
from f2d2_lightning.utils.conditions import Cond, joined, some_of
from f2d2_lightning.utils.fingerprints import fingerprint
from f2d2_lightning.utils.seeding import mix_seed

STAGES = {"train": "fit", "val": "validate", "test": "test"}


def find_loader(trainer: L.Trainer, module: L.LightningModule, split: str) -> Any:
    """The one loader of a split: the Trainer's own, else a new one of the data module or of the module."""
    loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders, "test": trainer.test_dataloaders}
    loader = loaders[split]
    if loader is None:
        name, data = f"{split}_dataloader", getattr(trainer, "datamodule", None)
        if data is not None and overrides(data, name):
            data.setup(STAGES[split])
            loader = getattr(data, name)()
        elif overrides(module, name):
            loader = getattr(module, name)()
        else:
            raise ValueError(
                f"sample quality compares with the {split} data (data={split!r}), and this run has none; give the "
                "Trainer a data module that has them, or choose other data: data='train', 'val' or 'test'"
            )
    if isinstance(loader, (list, tuple)):
        if len(loader) != 1:
            raise ValueError(f"there are {len(loader)} loaders of {split} data; sample quality compares with one")
        (loader,) = loader
    return loader


class RealImages:
    """Images of a loader's data set in one fixed random order, all or ``count``, and conditioning that is theirs.

    A map-style data set is divided between processes, and the same whatever their number, the size of batches and the
    number of workers: random augmentations are seeded for each image. Of a stream each process takes what its own
    loader gives; where that is the same in all of them (:meth:`settle`), the first one's is taken.
    """

    def __init__(
        self, trainer: L.Trainer, model: LikelihoodModel, loader: Any, count: int | None, batch_size: int
    ) -> None:
        self.trainer, self.model, self.loader, self.batch_size = trainer, model, loader, batch_size
        self.rank, self.world = trainer.global_rank, trainer.world_size
        self.dataset: Any = getattr(loader, "dataset", None)
        self.streams = not isinstance(loader, DataLoader) or isinstance(self.dataset, IterableDataset)
        self.count = count
        self.copies = False
        """Whether the first process's stream is taken, as the others' are copies of it."""
        if self.streams:
            return
        size = len(loader.dataset)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        self.order = order[: size if count is None else count].tolist()
        self.share = -(-len(self.order) // self.world)
        """Images per process; the last ones may have fewer."""

    def part(self, count: int) -> int:
        """This process's part of ``count`` images of a stream."""
        if self.copies:
            return count if self.rank == 0 else 0
        return count // self.world + (self.rank < count % self.world)

    def settle(self, digests: list[list[str]]) -> bool:
        """Whether a stream is the same on all processes, by their :meth:`digests`: it is taken once from now on."""
        if not self.streams or self.world == 1 or self.copies:
            return False
        longest = max(digests, key=len)
        self.copies = bool(longest) and all(own == longest[: len(own)] for own in digests)
        return self.copies

    def first(self, count: int = 8) -> tuple[Tensor, Cond | None]:
        """States and conditioning of the first images, the same on every process."""
        rows = None if self.streams else self.order[:count]
        for x, cond in self._batches(rows):
            return x[:count], some_of(cond, slice(count))
        raise ValueError(f"there are no data to compare samples of {self.model.title} with")

    def images(self, x: Tensor) -> Tensor:
        """States as 8-bit images, ``uint8 (B, C, H, W)``."""
        return state_images(x, self.model.levels, self.model.low, self.model.high)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Place among all of this process's next images, and the images, ``uint8 (B, C, H, W)``."""
        rows, place, wanted = None, 0, None
        if not self.streams:
            place = self.rank * self.share
            rows = self.order[place : place + self.share]
        elif self.copies and self.rank > 0:
            return
        elif self.count is not None:
            wanted = self.part(self.count)
        for x, _ in self._batches(rows):
            if wanted is not None:
                x = x[: wanted - place]
                if len(x) == 0:
                    return
            yield place, self.images(x)
            place += len(x)

    def digests(self) -> list[str]:
        """A fingerprint of each of this process's images."""
        return [fingerprint(image) for _, images in self for image in images.cpu()]

    def conditions(self, start: int, end: int) -> Cond:
        """Conditioning of the images at these places of the order, from the beginning again after the last one."""
        if self.streams:
            raise ValueError(
                f"{self.model.title} is conditional, and its data are a stream; sample quality takes conditioning from "
                "a map-style data set (one with __getitem__ and __len__)"
            )
        rows = [self.order[i % len(self.order)] for i in range(start, end)]
        parts = [cond for _, cond in self._batches(rows) if cond is not None]
        return joined(parts)

    def _batches(self, rows: list[int] | None) -> Iterator[tuple[Tensor, Cond | None]]:
        """States and conditioning of rows of the data set, or of the whole stream; random numbers begin anew."""
        _seed_all(0)
        for batch in self.loader if rows is None else self._loader(rows):
            x, cond = self.model.state(transferred(self.trainer, batch))
            yield x.detach(), cond

    def _loader(self, rows: list[int]) -> DataLoader:
        # another loader: a second iterator of one with persistent workers would reset the first
        return DataLoader(
            _Seeded(self.dataset, rows),
            batch_size=self.batch_size,
            num_workers=self.loader.num_workers,
            worker_init_fn=self.loader.worker_init_fn,
            collate_fn=default_collate if self.loader.batch_sampler is None else self.loader.collate_fn,
        )


def _seed_all(seed: int) -> None:
    """For augmentations that are random by whichever generator: they are then the same in every run."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class _Seeded(Subset):
    """Rows of a data set; what is random in an image depends on its row alone, not on those that came before."""

    def __init__(self, dataset: Dataset, rows: list[int]) -> None:
        super().__init__(dataset, rows)
        # a data set that reads whole batches has no transforms of single images
        self.whole = callable(getattr(dataset, "__getitems__", None)) and not isinstance(dataset, Subset)

    def __getitem__(self, index: Any) -> Any:
        _seed_all(mix_seed("real image", self.indices[index]))
        return super().__getitem__(index)

    def __getitems__(self, indices: list[int]) -> Any:
        return super().__getitems__(indices) if self.whole else [self[index] for index in indices]
