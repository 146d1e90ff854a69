"""What processes that train together tell each other, beside what their strategy does."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data.distributed import DistributedSampler


def process_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_states(state: Any) -> list[Any]:
    """A state of each process, in their order: one file, written by the first, then holds them all.

    Every process must call it, as all do when Lightning saves a checkpoint.
    """
    states = [state] * process_count()
    if len(states) > 1:
        dist.all_gather_object(states, state)
    return states


def own_state(states: Sequence[Any]) -> Any:
    """This process's state among those of :func:`gather_states`; another one's if the number of processes changed."""
    rank = dist.get_rank() if process_count() > 1 else 0
    return states[rank % len(states)]


class Places:
    """Where the samples of this process's batches stand in the data of an evaluation, and which are repeated.

    Lightning's distributed sampler deals samples to the processes in turn, and repeats some so that all have as many.
    A figure counts each once, and compares the same ones, whatever the number of processes.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._seen: dict[int, int] = {}

    def take(self, count: int, loader: int = 0) -> tuple[Tensor, Tensor]:
        """Places of the next ``count`` samples of a loader, ``(count,)``, and whether they count, ``(count,)`` bool."""
        seen = self._seen.get(loader, 0)
        self._seen[loader] = seen + count
        place = torch.arange(seen, seen + count)
        # of a batch sampler of somebody's own, Lightning deals out the sampler inside
        sampler = getattr(getattr(self._loaders()[loader], "batch_sampler", None), "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return place, torch.ones(count, dtype=torch.bool)
        place = place * sampler.num_replicas + sampler.rank
        return place, place < len(sampler.dataset)  # type: ignore[arg-type]

    def expected(self, most: int | None = None) -> float:
        """Samples to come on all processes, at most so many of a loader; infinite if neither says."""
        trainer = self.trainer
        batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        counts = []
        for loader, count in zip(self._loaders(), batches):
            dataset, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None) or math.inf
            whole = len(dataset) if isinstance(dataset, Sized) else math.inf
            counts.append(min(whole, count * size * trainer.world_size, math.inf if most is None else most))
        return sum(counts)

    def _loaders(self) -> list[Any]:
        return tree_leaves(self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders)


def ends_with_run(trainer: Any) -> bool:
    """Whether training is in processes that end with it, as in ``ddp_spawn``: a module gets back its weights alone."""
    return getattr(trainer.strategy, "_start_method", "popen") != "popen"
