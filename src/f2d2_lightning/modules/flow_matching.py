"""The teacher: flow matching on the diagonal of a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from f2d2_lightning.average import copy_frozen
from f2d2_lightning.baseline import GaussianBaseline
from f2d2_lightning.counter_noise import mix_seed
from f2d2_lightning.flow_map import FlowMap
from f2d2_lightning.metrics import MeanLikelihood
from f2d2_lightning.modules.base import FlowModule, object_names
from f2d2_lightning.paths import LinearPath, Path
from f2d2_lightning.reference import Reference

__all__ = ["FlowMatchingModule"]

CLOSEST = 1 / 512  # to the data; finer than a level of 8-bit data


class FlowMatchingModule(FlowModule):
    """Flow matching: trains the diagonal of a flow map to be a velocity field. The teacher.

    Lipman et al., "Flow Matching for Generative Modeling", 2022, https://arxiv.org/abs/2210.02747

    Args:
        flow_map: Backbone; it is trained, and later evaluated, at ``s = t``.
        shape: Shape of one state, ``(d,)`` or ``(C, H, W)``.
        levels: Levels of discrete data, for bits per dimension; ``None`` for continuous data, reported in nats.
        low: Lower edge of the range that the levels fill.
        high: Upper edge.
        path: Probability path; the linear one by default.
        optimizer: Makes the optimiser; AdamW at 1e-3 by default.
        lr_scheduler: Makes a schedule per step; by default a linear rise and a cosine to zero.
        warmup: Steps of linear rise of the default schedule.
        ema_decay: Decay of the weight average that validates, samples and answers.
        reference: Solver of the likelihood that validation logs; ``validate_nll`` turns it on.
        units: ``"natural"``: errors of the velocity are in standard deviations per radian of the backbone's Gaussian
            baseline and times follow its clock, where it has one; ``"velocity"``: plain errors, uniform times.
        near_data: Share of training times close to the data, spread evenly in ``log(1 - t)`` from 1 down to
            ``1 / 512``. Where pixels have point masses each stretch of that logarithm counts as much for the
            likelihood, and uniform times hardly see the last ones.
        validate_nll: Log the reference likelihood in validation, not only in test.
        channels_last: Memory format of convolutions' weights, see :class:`FlowModule`.
        compile: Compile the backbone, see :class:`FlowModule`.
    """

    average: FlowMap

    def __init__(
        self,
        flow_map: FlowMap,
        shape: Sequence[int],
        levels: int | None = None,
        low: float = -1.0,
        high: float = 1.0,
        path: Path | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: int = 200,
        ema_decay: float = 0.999,
        reference: Reference | None = None,
        units: str = "natural",
        near_data: float = 0.0,
        validate_nll: bool = False,
        channels_last: bool = False,
        compile: bool | str = False,
    ) -> None:
        if units not in ("natural", "velocity"):
            raise ValueError(f"units is {units!r}; it is 'natural' or 'velocity'")
        if not 0 <= near_data <= 1:
            raise ValueError(f"near_data is {near_data}; it is a share, in [0, 1]")
        super().__init__(
            shape, levels, low, high, optimizer, lr_scheduler, warmup, ema_decay, reference, channels_last, compile
        )
        objects = ("flow_map", "path", "optimizer", "lr_scheduler", "reference")
        self.save_hyperparameters(ignore=object_names(locals(), *objects))
        self.flow_map = flow_map
        self.average = copy_frozen(flow_map)
        self.path = path or LinearPath()
        self.units = units
        self.near_data = near_data
        self.validate_nll = validate_nll
        self._speed_up()

    @property
    def live(self) -> FlowMap:
        """The flow map in training."""
        return self.flow_map

    def forward(self, x: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """Velocity of the weight average, ``(B, ...), () or (B,) -> (B, ...)``."""
        return self.average.velocity(x, t, cond)

    def _loss(self, flow_map: FlowMap, x: Tensor, cond: Tensor | None) -> Tensor:
        found = getattr(flow_map, "baseline", None)
        baseline = found if self.units == "natural" and isinstance(found, GaussianBaseline) else None
        t = (
            torch.rand(len(x), dtype=x.dtype, device=x.device)
            if baseline is None
            else baseline.draw_times(len(x)).to(x)
        )
        if self.near_data:
            close = 1 - CLOSEST ** torch.rand_like(t)
            t = torch.where(torch.rand_like(t) < self.near_data, close, t)
        noise = torch.randn_like(x)
        error = flow_map.velocity(self.path.sample(x, noise, t), t, cond)
        error = error - self.path.conditional_velocity(x, noise, t)
        if baseline is not None:
            error = baseline.to_axes(error) / (baseline.marginal_variances(t).sqrt() * baseline.angle_rate(t, t))
        return error.square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Conditional flow-matching loss."""
        loss = self._loss(self.flow_map, *self.state(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start afresh."""
        super().on_validation_epoch_start()
        self._nll = MeanLikelihood(self.dim, self.levels, self.low, self.high).to(self.device)

    def _evaluate(self, batch: Any, batch_idx: int, nll: bool) -> Tensor:
        x, cond = self.state(batch)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(mix_seed("validation", batch_idx, self.global_rank))
            loss = torch.stack([self._loss(self.average, x, cond) for _ in range(4)]).mean()
        if nll:
            value = self.reference(self.average.velocity, x, cond).value
            self._nll.update(value[self._places.take(len(x))[1].to(value.device)])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The same loss with fixed noise, and the likelihood if asked for."""
        loss = self._evaluate(batch, batch_idx, self.validate_nll)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and likelihood."""
        self.log("test/loss", self._evaluate(batch, batch_idx, True), sync_dist=True)

    def _log_nll(self, stage: str) -> None:
        mean, error, _ = self._nll.compute()
        self.log(f"{stage}/nll", mean.float(), prog_bar=True)
        self.log(f"{stage}/nll_standard_error", error.float())

    def on_validation_epoch_end(self) -> None:
        """Log the likelihood."""
        if self.validate_nll:
            self._log_nll("val")

    def on_test_epoch_end(self) -> None:
        """Log the likelihood."""
        self._log_nll("test")
