"""Weights that are trained beside a model whose optimisers know nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from f2d2_lightning.modules.ema import copy_frozen, update_average, warmed_decay
from f2d2_lightning.utils.processes import process_count


class AddedWeights:
    """Modules with an optimiser and a weight average of their own, kept alike on all processes.

    No strategy of Lightning sees them, so what DDP does is done here: :meth:`broadcast` once, and gradients averaged
    over processes, and clipped to a norm, in :meth:`step`.
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
        self.steps, self.peak = 0, 0.0

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
    def step(self, gradient_scale: float = 1.0, followed: torch.optim.Optimizer | None = None) -> None:
        """Average gradients over processes, step, and move the average.

        ``gradient_scale`` is what a gradient scaler multiplied the loss with. A step whose gradients are then not
        finite is left out, as the scaler does with the model's own; without a scaler it is a
        :class:`FloatingPointError`. Learning rates go with the schedule of the optimiser that is ``followed``.
        """
        if process_count() == 1 and all(p.grad is None for p in self.parameters):
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        if process_count() > 1:
            dist.all_reduce(flat)
            flat = flat / process_count()
        flat = flat / gradient_scale
        norm = torch.linalg.vector_norm(flat)
        if not bool(norm.isfinite()):
            self.optimizer.zero_grad(set_to_none=True)
            if gradient_scale == 1.0:
                raise FloatingPointError(
                    "the gradient of the divergence head is NaN or infinite; look at the model's own loss and samples, "
                    "lower the learning rate, or train in bf16-mixed or 32-bit precision"
                )
            return
        if self.clip is not None:
            flat = flat * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        share = 1.0 if followed is None else self._share(followed)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        update_average(self.average, self.live, warmed_decay(self.decay, self.steps))

    def _share(self, optimizer: torch.optim.Optimizer) -> float:
        """Share of its largest learning rate that an optimiser has now, as its schedule says it or as it was seen."""
        group = optimizer.param_groups[0]
        rate = float(group["lr"])
        # where a schedule says none (ReduceLROnPlateau), or begins at its lowest, only what was seen tells
        self.peak = max(self.peak, rate, float(group.get("max_lr", group.get("initial_lr", 0.0))))
        return rate / self.peak if self.peak else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, optimiser and step count."""
        return {
            "live": self.live.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "peak": self.peak,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; ``ValueError`` for weights of another head."""
        try:
            self.live.load_state_dict(state["live"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "the checkpoint's divergence head is of another shape than the callback's; give F2D2Callback the head, "
                f"features and optimiser of the run that is resumed ({error})"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)  # of other weights
        self.steps, self.peak = int(state["steps"]), float(state.get("peak", 0.0))

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take over weights of an average, and start from them."""
        self.live.load_state_dict(state)
        update_average(self.average, self.live, 0.0)

    def to(self, device: torch.device) -> AddedWeights:
        """Move everything to a device."""
        self.live.to(device)
        self.average.to(device)
        for values in self.optimizer.state.values():
            moved = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor) and v.ndim > 0}
            values.update(moved)
        return self
