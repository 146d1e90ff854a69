"""Activation checkpointing of a backbone's blocks, where it can be had."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from f2d2_lightning.nn._attention import has_tangent

__all__ = ["run_block"]


def run_block(block: nn.Module, h: Tensor, time: Tensor, recompute: bool) -> Tensor:
    """``block(h, time)``; with ``recompute`` its inner activations are computed again in the backward pass.

    Forward-mode derivatives do not pass through a checkpoint, and without gradients there is nothing to save.
    """
    if recompute and torch.is_grad_enabled() and not has_tangent(h, time):
        return checkpoint(block, h, time, use_reentrant=False)
    return block(h, time)
