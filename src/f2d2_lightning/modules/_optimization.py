"""Optimisers and schedules of the modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn

from f2d2_lightning.training.progress import planned_steps

if TYPE_CHECKING:
    from f2d2_lightning.modules.base import FlowModule


def make_optimizers(module: FlowModule) -> dict[str, Any]:
    """Optimiser over the trainable parameters, schedule per step."""
    parameters = [p for p in module.live.parameters() if p.requires_grad]
    # biases and gains are not decayed, whatever the optimiser's weight_decay
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.ndim > 1]}]
    if vectors := [p for p in parameters if p.ndim <= 1]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = module.optimizer(groups) if module.optimizer else torch.optim.AdamW(groups, lr=1e-3)
    if module.lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = module.lr
    if module.lr_scheduler is not None:
        scheduler = module.lr_scheduler(optimizer)
    else:
        factor = warmup_cosine(module.warmup, lambda: planned_steps(module.trainer))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def optimizers_of(network: nn.Module, trainer: L.Trainer) -> list[torch.optim.Optimizer]:
    """The trainer's optimisers that hold a parameter of a network: of a GAN's generator, say, and not its critic's."""
    own = {id(p) for p in network.parameters()}
    return [o for o in trainer.optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]


def warmup_cosine(warmup: int, total: Callable[[], float]) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear rise over ``warmup`` steps, then a cosine to zero at ``total()``.

    Without an end, ``total()`` infinite, it stays at one after the rise. The number of steps is asked for only once
    training runs: earlier there are no data to count.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step == 0:
            return 1.0
        progress = (step - warmup) / max(1.0, total() - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
