"""Weights that are trained beside a model whose optimisers know nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from f2d2_lightning.modules.ema import copy_frozen, update_average, warmed_decay
from f2d2_lightning.utils.processes import process_count

__all__ = ["AddedWeights"]


class AddedWeights:
    """Modules with an optimiser and a weight average of their own, kept alike on all processes.

    No strategy of Lightning sees them, so what DDP does is done here: :meth:`broadcast` once, and gradients averaged
    over processes in :meth:`step`.

    Args:
        live: The modules in training.
        optimizer: Makes the optimiser from parameters.
        decay: Of the weight average, in [0, 1).
        clip: Largest norm of the gradient; ``None`` for no clipping.
    """

    def __init__(
        self,
        live: nn.ModuleDict,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        decay: float,
        clip: float | None,
    ) -> None:
        self.live = live
        self.average = copy_frozen(live)
        self.parameters = [p for p in live.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.parameters)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.decay, self.clip = decay, clip
        self.steps = 0

    @torch.no_grad()
    def broadcast(self) -> None:
        """Take over the first process's weights and buffers, and start the average there."""
        if process_count() > 1:
            for tensor in (*self.live.parameters(), *self.live.buffers()):
                # booleans are no arithmetic type for every backend
                value = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().clone()
                dist.broadcast(value, src=0)
                tensor.copy_(value)
        update_average(self.average, self.live, 0.0)

    @torch.no_grad()
    def step(self, gradient_scale: float = 1.0, rate_factor: float = 1.0) -> None:
        """Average gradients over processes, step, and move the average.

        Args:
            gradient_scale: What a gradient scaler multiplied the loss with. A step whose gradients are then not finite
                is left out, as the scaler does with the model's own.
            rate_factor: Factor of the optimiser's learning rates.
        """
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        if process_count() == 1 and all(p.grad is None for p in self.parameters):
            return
        if process_count() > 1:
            dist.all_reduce(flat)
            flat = flat / process_count()
        flat = flat / gradient_scale
        norm = torch.linalg.vector_norm(flat)
        if not bool(norm.isfinite()):
            self._refuse(gradient_scale)
            return
        if self.clip is not None:
            flat = flat * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        update_average(self.average, self.live, warmed_decay(self.decay, self.steps))

    def step_with(self, trainer: L.Trainer, gradient_scale: float, follow: bool) -> None:
        """:meth:`step`, at rates that ``follow`` those of the trainer's first optimiser."""
        factor = 1.0
        if follow and trainer.optimizers:
            group = trainer.optimizers[0].param_groups[0]
            peak = group.get("max_lr", group.get("initial_lr", group["lr"]))
            factor = float(group["lr"]) / float(peak) if peak else 1.0
        self.step(gradient_scale, factor)

    def _refuse(self, gradient_scale: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if gradient_scale == 1.0:
            raise FloatingPointError(
                "the gradient of the divergence head is NaN or infinite; look at the model's own loss and samples, "
                "lower the learning rate, or train in bf16-mixed or 32-bit precision"
            )

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, optimiser and step count."""
        return {
            "live": self.live.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            ValueError: If the weights are of another head.
        """
        try:
            self.live.load_state_dict(state["live"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "the checkpoint's divergence head is of another shape than the callback's; give F2D2Callback the head, "
                f"features and optimiser of the run that is resumed ({error})"
            ) from error
        self.steps = int(state["steps"])

    def to(self, device: torch.device) -> AddedWeights:
        """Move everything to a device."""
        self.live.to(device)
        self.average.to(device)
        for values in self.optimizer.state.values():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    values[name] = value.to(device)
        return self
