"""Exponential moving average of weights, as a second copy of the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.sharding import reshard

__all__ = ["copy_frozen", "share_weights", "update_average", "warmed_decay"]


def copy_frozen(module: Any, shared: dict[int, Any] | None = None) -> Any:
    """A copy in evaluation mode whose parameters are not trained; objects in ``shared``, by ``id``, are not copied."""
    return copy.deepcopy(module, shared or {}).requires_grad_(False).eval()


def share_weights(one: Any, other: nn.Module) -> bool:
    """Whether two modules have a parameter in common."""
    own = {id(p) for p in other.parameters()}
    return isinstance(one, nn.Module) and any(id(p) in own for p in one.parameters())


def warmed_decay(decay: float, steps: int) -> float:
    """Decay after a number of steps: a young average forgets faster, so that the initial weights do not linger."""
    return min(decay, (1 + steps) / (10 + steps))


@torch.no_grad()
def update_average(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Move the average towards the live weights: ``average = decay * average + (1 - decay) * live``.

    Parameters that are not trained and buffers are copied. Modules that both share are left alone.

    Args:
        average: The copy that is kept.
        live: The model in training, of the same structure.
        decay: Share of the old average, in [0, 1).
    """
    for module in (average, live):
        reshard(module)
    moved: list[Tensor] = []
    towards: list[Tensor] = []
    for mine, theirs in zip(average.parameters(), live.parameters(), strict=True):
        if mine is theirs:
            continue
        if theirs.requires_grad:
            moved.append(mine)
            towards.append(theirs)
        else:
            mine.copy_(theirs)
    if moved:
        torch._foreach_lerp_(moved, towards, 1 - decay)
    pairs = [(a, b) for a, b in zip(average.buffers(), live.buffers(), strict=True) if a is not b]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
