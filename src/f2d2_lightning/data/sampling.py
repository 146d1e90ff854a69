"""The order of training data: a function of seed and epoch, that goes on where an interrupted run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from f2d2_lightning.training.progress import Place
from f2d2_lightning.utils.seeding import mix_seed


class EpochSampler(DistributedSampler):
    """A permutation of the data for each epoch, a function of seed and epoch, that can start part of the way in.

    Indices of the first epoch begin at ``first * count``: what a data set does to its epoch 0 can be left out.

    It is a distributed sampler, so that Lightning leaves it as it is: processes take every n-th sample of one
    permutation, as many each, and the few that are then left over wait for another epoch.
    """

    def __init__(
        self, count: int, seed: int, place: Callable[[], Place], replicas: int = 1, rank: int = 0, first: int = 0
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


class ResumableLoader(DataLoader):
    """A loader whose place goes into Lightning's checkpoints."""

    place: Callable[[], Place] = staticmethod(lambda: Place(0, 0))

    def state_dict(self) -> dict[str, int]:
        epoch, batch = self.place()
        return {"epoch": epoch, "batches": batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if isinstance(self.sampler, EpochSampler) and self.batch_size is not None:
            # older checkpoints do not say the epoch, which Lightning has restored by now, and count to its end
            epoch = state.get("epoch", self.place().epoch + state["batches"] // len(self))
            self.sampler.resumed_at = (epoch, state["batches"] % len(self) * self.batch_size)
