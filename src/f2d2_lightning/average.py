"""Exponential moving average of weights, as a second copy of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["update_average"]


@torch.no_grad()
def update_average(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Move the average towards the live weights: ``average = decay * average + (1 - decay) * live``.

    Parameters that are not trained and buffers are copied. Modules that both share are left alone.

    Args:
        average: The copy that is kept.
        live: The model in training, of the same structure.
        decay: Share of the old average, in [0, 1).
    """
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
    for kept, current in zip(average.buffers(), live.buffers(), strict=True):
        if kept is not current:
            kept.copy_(current)
