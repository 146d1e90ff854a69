"""What processes that train together tell each other, beside what their strategy does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

__all__ = ["gather_states", "own_state", "process_count"]


def process_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_states(state: Any) -> list[Any]:
    """A state of each process, in their order: one file, written by the first, then holds them all.

    Every process must call it, as all do when Lightning saves a checkpoint.
    """
    count = process_count()
    if count == 1:
        return [state]
    states: list[Any] = [None] * count
    dist.all_gather_object(states, state)
    return states


def own_state(states: Sequence[Any]) -> Any:
    """This process's state among those of :func:`gather_states`; another one's if the number of processes changed."""
    rank = dist.get_rank() if process_count() > 1 else 0
    return states[rank % len(states)]
