"""The teacher: flow matching on the diagonal of a flow map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from f2d2_lightning.adapters import check_differentiable
from f2d2_lightning.checkpoints.pretrained import state_shape
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.flows.paths import LinearPath, Path
from f2d2_lightning.likelihood._inputs import Array, in_parts, seed_of
from f2d2_lightning.likelihood._log_prob import LogProb
from f2d2_lightning.likelihood.determinant import Determinant
from f2d2_lightning.likelihood.guidance import SelfGuidance
from f2d2_lightning.likelihood.ode import reference_sample
from f2d2_lightning.likelihood.reference import Reference
from f2d2_lightning.likelihood.sampling import Samples
from f2d2_lightning.metrics.likelihood import MeanLikelihood, doubt
from f2d2_lightning.modules.base import FlowModule, object_names
from f2d2_lightning.modules.ema import copy_frozen
from f2d2_lightning.modules.evaluation import SharedReference
from f2d2_lightning.utils.checks import check_arguments, checked, one_of, share
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.processes import Places
from f2d2_lightning.utils.seeding import counter_normal, counter_uniform, mix_seed, row_keys

CLOSEST = 1 / 512  # to the data; finer than a level of 8-bit data


class FlowMatchingModule(FlowModule):
    """Flow matching: trains the diagonal of a flow map to be a velocity field. The teacher.

    Lipman et al., "Flow Matching for Generative Modeling", 2022, https://arxiv.org/abs/2210.02747

    Args:
        flow_map: Backbone; it is trained, and later evaluated, at ``s = t``.
        shape: Shape of one state, ``(d,)`` or ``(C, H, W)``; ``None`` takes the backbone's.
        levels: Levels of discrete data, for bits per dimension; ``None`` takes those of the data module, or of the
            checkpoint; where these say none, data are continuous and reported in nats.
        low: Lower edge of the range that the levels fill; ``None`` takes it likewise, else -1.
        high: Upper edge; ``None`` takes it likewise, else 1.
        path: Probability path; the linear one by default.
        optimizer: Makes the optimiser; AdamW at 1e-3 by default.
        lr_scheduler: Makes a schedule per step; by default a linear rise and a cosine to zero at the run's last step,
            if settings and data say which that is (``max_steps`` for data without a length).
        warmup: Steps of linear rise of the default schedule.
        ema_decay: Decay of the weight average, which is used in validation and after training.
        reference: Solver of the likelihood that validation logs; ``validate_nll`` turns it on.
        units: ``"natural"``: errors of the velocity are in standard deviations per radian of the backbone's Gaussian
            baseline and times follow its clock, where it has one; ``"velocity"``: plain errors, uniform times.
        near_data: Share of training times close to the data, spread evenly in ``log(1 - t)`` from 1 down to
            ``1 / 512``. Where pixels have point masses each stretch of that logarithm counts as much for the
            likelihood, and uniform times hardly see the last ones.
        validate_nll: Log the reference likelihood in validation, not only in test.
        channels_last: Memory format of convolutions' weights, see :class:`FlowModule`.
        compile: Compile the backbone, see :class:`FlowModule`.
        coupling: Which noise goes with which data, ``(noise, data) -> noise``, each ``(B, ...)``; independent by
            default. Of what it answers the distribution must be the normal one still: noise in another order within a
            batch (Tong et al., 2023, https://arxiv.org/abs/2302.00482), or turned as data may be turned as well (Klein
            et al., 2023, https://arxiv.org/abs/2306.15030). Paths are straighter then, and take fewer steps.

    >>> from f2d2_lightning.nn import MLP
    >>> teacher = FlowMatchingModule(MLP((2,), width=8, blocks=1), reference=Reference(steps=8))
    >>> teacher.log_prob([[0.0, 1.0]]).evaluations
    16
    """

    average: FlowMap
    steps = ()
    inversion = None
    method: str = "euler"
    """Solver of :meth:`sample`, one with fixed steps."""

    def __init__(
        self,
        flow_map: FlowMap,
        shape: Sequence[int] | None = None,
        levels: int | None = None,
        low: float | None = None,
        high: float | None = None,
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
        coupling: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check_arguments(FlowMatchingModule.__init__, locals())
        one_of("units", units, ("natural", "velocity"))
        share(near_data=near_data)
        shape = state_shape(flow_map) if shape is None else shape
        super().__init__(
            shape, levels, low, high, optimizer, lr_scheduler, warmup, ema_decay, reference, channels_last, compile
        )
        objects = ("flow_map", "path", "optimizer", "lr_scheduler", "reference", "coupling")
        self.save_hyperparameters(ignore=object_names(locals(), *objects))
        self.flow_map = flow_map
        self.average = copy_frozen(flow_map)
        self.path, self.coupling = path or LinearPath(), coupling
        self.units = units
        self.near_data = near_data
        self.validate_nll = validate_nll
        self._speed_up()

    @property
    def live(self) -> FlowMap:
        return self.flow_map

    # --- as a model with likelihoods: its steps are a solver's ---

    @property
    def directions(self) -> Direction:
        return Direction.NONE

    @property
    def draws_samples(self) -> bool:
        return True

    @property
    def reference_name(self) -> str:
        return "teacher"

    def reference_velocity(self) -> Callable[..., Tensor]:
        return self.average.velocity

    @checked
    def log_prob(
        self,
        x: Array,
        steps: Any = None,
        cond: Cond | None = None,
        *,
        determinant: Determinant | str | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> LogProb:
        """Reference log-likelihood of states at ``t = 1``, nats, without gradients.

        Steps, probes and their seed are those of :attr:`reference`; of ``seed`` and ``generator`` nothing depends.

        Raises:
            ValueError: If steps or determinants are asked for, which are of a few-step map's jumps.
        """
        for name, value in (("determinant", determinant), ("steps", steps)):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} is of a few-step map's jumps, and the teacher makes none: it integrates as its "
                    "reference says, FlowMatchingModule(reference=Reference(steps=...))"
                )
        seed_of(seed, generator)
        x, velocity = self._fitting(x, "x"), self.average.velocity
        cond = self._conditioning(cond, x)
        return in_parts(partial(self.settled_reference(velocity, x, cond), velocity), x, cond, batch_size)

    @checked
    def sample(
        self,
        noise: int | Array,
        steps: int | Sequence[float] = 100,
        cond: Cond | None = None,
        *,
        with_log_prob: bool = False,
        determinant: Determinant | str | None = None,
        guidance: SelfGuidance | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Samples by :attr:`method` in a number of steps.

        Raises:
            ValueError: If likelihoods or guidance are asked for, which need a head, or the times themselves.
        """
        if with_log_prob or determinant or guidance is not None or not isinstance(steps, int):
            raise ValueError(
                "the teacher draws samples in a number of solver steps, without likelihoods and guidance; distil it "
                "(F2D2Module), or use reference_sample and reference_log_prob"
            )
        drawn, noise = not hasattr(noise, "__len__"), self._noise(noise, seed, generator)
        draw = partial(reference_sample, self.average.velocity, method=self.method, steps=steps)
        return in_parts(draw, noise, self._conditioning(cond, noise, drawn), batch_size)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Velocity of the weight average, ``(B, ...), () or (B,) -> (B, ...)``."""
        return self.average.velocity(x, t, cond)

    def _error(self, flow_map: FlowMap, x: Tensor, cond: Cond | None, draw: int | None = None) -> Tensor:
        """Error of the velocity, ``(B, ...)``; time and noise of a ``draw`` are a function of each sample alone."""
        found = getattr(flow_map, "baseline", None)
        baseline = found if self.units == "natural" and isinstance(found, GaussianBaseline) else None
        keys = None if draw is None else row_keys(x, mix_seed("validation", draw))

        def uniform(stream: int) -> Tensor:
            if keys is not None:
                return counter_uniform(keys, stream).to(x)
            return torch.rand(len(x), dtype=x.dtype, device=x.device)

        if baseline is None:
            t = uniform(0)
        else:
            t = (baseline.draw_times(len(x)) if keys is None else baseline.times_at(uniform(0))).to(x)
        if self.near_data:
            close = 1 - CLOSEST ** uniform(1)
            t = torch.where(uniform(2) < self.near_data, close, t)
        if keys is None:
            noise = torch.randn_like(x)
        else:
            places = keys[:, None] + torch.arange(self.dim, device=x.device)
            noise = counter_normal(places, 3).to(x).reshape(x.shape)
        if self.coupling is not None:
            noise = self._coupled(self.coupling, noise, x)
        error = flow_map.velocity(self.path.sample(x, noise, t), t, cond)
        error = error - self.path.conditional_velocity(x, noise, t)
        if baseline is not None:
            error = baseline.to_axes(error) / (baseline.marginal_variances(t).sqrt() * baseline.angle_rate(t, t))
        return error

    @staticmethod
    def _coupled(coupling: Callable[[Tensor, Tensor], Tensor], noise: Tensor, x: Tensor) -> Tensor:
        found = coupling(noise, x)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            came = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"coupling(noise, data) answered {came}; noise like the data is expected, {tuple(x.shape)}"
            )
        return found.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Conditional flow-matching loss."""
        loss = self._error(self.flow_map, *self.state(batch)).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Reference log-likelihood of a batch, nats."""
        x, cond = self.state(batch)
        return self.log_prob(x, cond=cond).value

    def on_validation_epoch_start(self) -> None:
        self._places = Places(self.trainer)
        self._shared = SharedReference(self, self.trainer, None if self._wants_nll else 0)
        self._nll = MeanLikelihood(self.dim, self.quantization).to(self.device)
        self._mean_loss = MeanMetric().to(self.device)

    on_test_epoch_start = on_validation_epoch_start

    @property
    def _wants_nll(self) -> bool:
        return self.validate_nll or self.trainer.testing

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The same loss with fixed noise, and the likelihood in test, or if asked for."""
        x, cond = self.state(batch)
        counted = self._places.take(len(x))[1].to(x.device)
        for draw in range(4):
            self._mean_loss.update(self._error(self.average, x, cond, draw)[counted].square())
        if self._wants_nll:
            if not bool(self._nll.count > 0):
                check_differentiable(self.average.velocity, x, cond, getattr(self.reference, "mode", "forward"))
            self._shared.settle(x, cond)
            self._nll.update(self.reference_log_prob(self.average.velocity, x, cond).value[counted])

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        # before anything that processes compute together: the others broadcast in their first step
        self._shared.finish()
        del self._shared, self._places  # a module that holds its trainer cannot be pickled
        self.log(f"{stage}/loss", self._mean_loss.compute(), prog_bar=True)
        if not self._wants_nll:
            return
        mean, error, _ = self._nll.compute()
        if said := doubt({"nll": float(mean)}, self.levels is not None):
            rank_zero_warn(f"the teacher's likelihood is doubtful: {said}")
        self.log(f"{stage}/nll", mean.float(), prog_bar=True)
        self.log(f"{stage}/nll_standard_error", error.float())

    on_test_epoch_end = on_validation_epoch_end
