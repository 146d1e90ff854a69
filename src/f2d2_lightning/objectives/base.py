r"""Training objectives for the pair ``f = (u, D)``, each written once for both.

Average velocity and average divergence are time averages along the same trajectory, so they obey one set of
identities. With ``g = (v, div v)`` and ``X`` the map itself:

- semigroup: :math:`(t - s) f(x, s, t) = (m - s) f(x, s, m) + (t - m) f(X_{s \to m}(x), m, t)`
  (shortcut models, Frans et al., 2024, https://arxiv.org/abs/2410.12557);
- Lagrangian: :math:`f(x, s, t) = g(X_{s \to t}(x), t) - (t - s)\,\partial_t f(x, s, t)`
  (Boffi et al., 2025, https://arxiv.org/abs/2505.18825);
- Eulerian: :math:`f(x, s, t) = g(x, s) + (t - s)\,D_s f(x, s, t)`, with :math:`D_s` the derivative along
  :math:`(dx, ds) = (v, 1)` (MeanFlow, Geng et al., 2025, https://arxiv.org/abs/2505.13447); with ``t = 1`` it is
  the continuous-time consistency objective (Song et al., 2023, https://arxiv.org/abs/2303.01469).

The student's answer is regressed on the right-hand side, which is detached. On the diagonal all of them say
``f(x, t, t) = g(x, t)``. Trajectory regression, without bootstrapping, is in
:mod:`f2d2_lightning.objectives.trajectories`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from f2d2_lightning.divergence._tangents import forward_mode
from f2d2_lightning.divergence.estimators import check_mode
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Direction, Joint, JointMap
from f2d2_lightning.flows.paths import LinearPath, Path, like
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import VelocitySource

__all__ = ["Consistency", "Eulerian", "Examples", "Lagrangian", "Objective", "Semigroup", "Terms", "Weighting"]


class Terms(NamedTuple):
    """An objective's value, by part. All are means over the batch."""

    loss: Tensor
    """What is minimised."""
    velocity_loss: Tensor
    """Its velocity part, weighted."""
    divergence_loss: Tensor
    """Its divergence part, weighted."""
    velocity_mse: Tensor
    """Raw squared error of ``u``, per dimension."""
    divergence_mse: Tensor
    """Raw squared error of ``D``, per sample, (nats per unit of time) squared."""


class Examples(NamedTuple):
    """What a student is regressed on."""

    x: Tensor
    """States at time ``s``, ``(B, ...)``."""
    s: Tensor
    """Starts, ``(B,)``."""
    t: Tensor
    """Ends, ``(B,)``."""
    cond: Tensor | None
    """Conditioning."""
    target: Joint
    """``(u, D)`` from ``s`` to ``t``, detached."""


def _concatenate(parts: list[Examples]) -> Examples:
    if len(parts) == 1:
        return parts[0]
    conds = [part.cond for part in parts if part.cond is not None]
    return Examples(
        torch.cat([part.x for part in parts]),
        torch.cat([part.s for part in parts]),
        torch.cat([part.t for part in parts]),
        torch.cat(conds) if conds else None,
        Joint(
            torch.cat([part.target.velocity for part in parts]),
            torch.cat([part.target.divergence for part in parts]),
        ),
    )


def baseline_of(student: JointMap) -> GaussianBaseline | None:
    """The Gaussian fit of a student's divergence head, if it has one."""
    baseline = getattr(getattr(student, "head", None), "baseline", None)
    return baseline if isinstance(baseline, GaussianBaseline) else None


def unit_baseline(x: Tensor) -> GaussianBaseline:
    """The fit that stands in where there is none: zero mean, unit variance, for states like ``x``, ``(B, ...)``."""
    return GaussianBaseline(x.shape[1:], "isotropic").to(x)


@dataclass(frozen=True)
class Weighting:
    """How errors of ``u`` and ``D`` become one loss.

    In units of ``"velocity"``, ``|u - u*|^2 / d + divergence * (D - D*)^2 / d``. In ``"natural"`` units, an error
    counts as what it does to the log-likelihood: the error of the position where the jump lands, in standard
    deviations of the Gaussian fit there (per axis, squared and summed), plus ``divergence`` times the squared error of
    the log-density's change, in nats. On the diagonal, where a jump has no length, it is given ``diagonal`` radians of
    the fit's mean angle (:mod:`f2d2_lightning.flows.gaussian`). Either is divided, per sample, by its own detached
    value to the power ``adaptive`` (Geng et al., 2024, https://arxiv.org/abs/2406.14548).

    Args:
        divergence: Weight of the divergence error.
        adaptive: 0 for plain squared errors, up to 1 for the adaptive ones.
        units: ``"natural"`` or ``"velocity"``.
        diagonal: Length of a diagonal jump in natural units, radians.

    Raises:
        ValueError: If a weight is negative or the units unknown.
    """

    divergence: float = 0.1
    adaptive: float = 0.0
    units: str = "natural"
    diagonal: float = 0.3

    def __post_init__(self) -> None:
        if self.divergence < 0 or not 0 <= self.adaptive <= 1 or not self.diagonal > 0:
            raise ValueError(
                f"divergence={self.divergence} must be at least 0, adaptive={self.adaptive} lie in [0, 1] and "
                f"diagonal={self.diagonal} be positive"
            )
        if self.units not in ("natural", "velocity"):
            raise ValueError(f"units is {self.units!r}; it is 'natural' or 'velocity'")

    def __call__(self, predicted: Joint, examples: Examples, baseline: GaussianBaseline | None = None) -> Terms:
        """Terms for a batch.

        Args:
            predicted: The student's answer at the examples.
            examples: What it should have answered, detached here.
            baseline: Gaussian fit that gives natural units; unit variance without one.
        """
        velocity_error = predicted.velocity - examples.target.velocity.detach()
        divergence_error = predicted.divergence - examples.target.divergence.detach()
        velocity_squared = velocity_error.flatten(1).square().mean(-1)
        if self.units == "velocity":
            weighted_velocity = velocity_squared
            weighted_divergence = self.divergence * divergence_error.square() / velocity_error[0].numel()
        else:
            weighted_velocity, length = self._natural(velocity_error, examples, baseline)
            weighted_divergence = self.divergence * (length * divergence_error).square()
        velocity_loss, divergence_loss = self._adapt(weighted_velocity), self._adapt(weighted_divergence)
        return Terms(
            velocity_loss + divergence_loss,
            velocity_loss,
            divergence_loss,
            velocity_squared.detach().mean(),
            divergence_error.detach().square().mean(),
        )

    def _natural(self, error: Tensor, examples: Examples, baseline: GaussianBaseline | None) -> tuple[Tensor, Tensor]:
        """Squared position error in standard deviations, ``(B,)``, and the length of the jumps, ``(B,)``."""
        baseline = baseline or unit_baseline(error)
        s, t = examples.s, examples.t
        rate = baseline.angle_rate(s, t).mean(-1).expand_as(t)
        length = torch.where(s == t, self.diagonal / rate.clamp(min=1.0), t - s)
        return (length[:, None] * baseline.deviations(error, t)).square().sum(-1), length

    def _adapt(self, error: Tensor) -> Tensor:
        if self.adaptive:
            error = error / (error.detach() + 1e-3) ** self.adaptive
        return error.mean()


class Objective(ABC):
    """A training objective.

    Args:
        intervals: Distribution of ``(s, t)``; both directions by default.
        weighting: How errors become a loss.
        path: Probability path that states are drawn from.
    """

    def __init__(
        self, intervals: Intervals | None = None, weighting: Weighting | None = None, path: Path | None = None
    ) -> None:
        self.intervals = intervals or Intervals()
        self.weighting = weighting or Weighting()
        self.path = path or LinearPath()
        self.quantization: Quantization | None = None
        self.structure: torch.Generator | None = None
        """Where choices that decide how often the network is called are drawn from; ``None`` for the global generator.

        Processes that share a sharded network must call it equally often: give all of them the same CPU generator.
        """

    @property
    def directions(self) -> Direction:
        """Orders of time that training covers."""
        return self.intervals.directions

    @abstractmethod
    def target(
        self,
        student: JointMap,
        source: VelocitySource,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
        data: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Joint:
        """Right-hand side of the identity at ``(x, s, t)``, detached.

        Args:
            student: The joint map in training.
            source: Gives ``(v, div v)``.
            x: State at time ``s``, ``(B, ...)``.
            s: Start, ``(B,)``.
            t: End, ``(B,)``.
            cond: Conditioning, or ``None``.
            data: Data of the pair that ``x`` lies between, for sources that need it.
            noise: Noise of that pair.
        """

    def examples(
        self,
        student: JointMap,
        source: VelocitySource,
        data: Tensor,
        noise: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
    ) -> Examples:
        """Training examples for intervals off the diagonal; by default states on the path and :meth:`target`."""
        x = self.path.sample(data, noise, s)
        return Examples(x, s, t, cond, self.target(student, source, x, s, t, cond, data, noise))

    def __call__(
        self,
        student: JointMap,
        source: VelocitySource,
        data: Tensor,
        cond: Tensor | None = None,
        *,
        anchor: VelocitySource | None = None,
        progress: float = 0.0,
    ) -> Terms:
        """Loss on a batch.

        Args:
            student: The joint map in training.
            source: Gives ``(v, div v)`` to the identity.
            data: Batch at ``t = 1``, ``(B, ...)``; noise and times are drawn here.
            cond: Conditioning, ``(B, ...)`` or ``None``.
            anchor: Gives ``(v, div v)`` on the diagonal, ``source`` by default. Self-distillation takes the
                student's own diagonal as source and the conditional velocity as anchor.
            progress: Share of training that is done, in [0, 1], for objectives with phases.
        """
        times = self.intervals.sample(len(data), data.device, self.structure)
        s, t = (time.to(data.dtype) for time in times)
        noise = torch.randn_like(data)
        parts = []
        on, off = (s == t).nonzero().squeeze(-1), (s != t).nonzero().squeeze(-1)
        if len(on):
            x, cond_on = self.path.sample(data[on], noise[on], s[on]), None if cond is None else cond[on]
            target = (anchor or source)(x, s[on], cond_on, data=data[on], noise=noise[on])
            parts.append(Examples(x, s[on], t[on], cond_on, target))
        if len(off):
            cond_off = None if cond is None else cond[off]
            parts.append(self.examples(student, source, data[off], noise[off], s[off], t[off], cond_off))
        examples = _concatenate(parts)
        predicted = student(examples.x, examples.s, examples.t, examples.cond)
        return self.weighting(predicted, examples, baseline_of(student))

    def quantize(self, quantization: Quantization | None) -> None:
        """Take over the levels and range of the data, to which states that are made to look like data are put back.

        Raises:
            ValueError: If the objective has others.
        """
        if self.quantization is None:
            self.quantization = quantization
        elif self.quantization != quantization:
            raise ValueError(
                f"the objective has {self.quantization}, but the model's data have {quantization}; leave out the "
                "objective's, or make them agree"
            )

    # trajectory regression has a state to keep; the others have none
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on as if nothing had happened."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, and the checkpoint holds {sorted(state)}")


class Semigroup(Objective):
    """Two short steps teach one long step.

    Args:
        split: ``"midpoint"`` (shortcut models) or ``"random"`` (a uniform point between).
        intervals: Distribution of ``(s, t)``; needs a share on the diagonal, where the source comes in.
        weighting: How errors become a loss.
        path: Probability path.

    Raises:
        ValueError: If ``split`` is neither, or the intervals never touch the diagonal.
    """

    def __init__(
        self,
        split: str = "midpoint",
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: Path | None = None,
    ) -> None:
        # the rule only spreads what the diagonal learns, which therefore needs a large share
        super().__init__(intervals or Intervals(diagonal=0.5, grid=0.25), weighting, path)
        if split not in ("midpoint", "random"):
            raise ValueError(f"split is {split!r}; it is 'midpoint' or 'random'")
        if self.intervals.diagonal == 0:
            raise ValueError("the semigroup rule alone does not see the data; Intervals(diagonal=...) must be positive")
        self.split = split

    @torch.no_grad()
    def target(
        self,
        student: JointMap,
        source: VelocitySource,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
        data: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Joint:
        share = torch.full_like(s, 0.5) if self.split == "midpoint" else torch.rand_like(s)
        middle = s + share * (t - s)
        u1, d1 = student(x, s, middle, cond)
        u2, d2 = student(x + like(middle - s, x) * u1, middle, t, cond)
        weight = like(share, x)
        return Joint(weight * u1 + (1 - weight) * u2, share * d1 + (1 - share) * d2)


class _MovingTime(Objective):
    """Objectives that differentiate the student along time.

    Args:
        intervals: Distribution of ``(s, t)``; both directions by default.
        weighting: How errors become a loss.
        path: Probability path.
        mode: ``"forward"``, or ``"finite"``, central differences, for backbones without a forward-mode rule.
        step: Half-width of the difference, in time.

    Raises:
        ValueError: If the mode is neither, or the step not positive.
    """

    def __init__(
        self,
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: Path | None = None,
        mode: str = "forward",
        step: float = 2e-3,
    ) -> None:
        super().__init__(intervals, weighting, path)
        check_mode(mode, step)
        if mode == "reverse":
            raise ValueError(f"mode is {mode!r}; a derivative along time is 'forward' or 'finite'")
        self.mode, self.step = mode, step

    def _along(
        self, function: Callable[[Tensor, Tensor], Joint], x: Tensor, dx: Tensor, time: Tensor, other: Tensor
    ) -> tuple[Joint, Joint]:
        """``f(x, time)`` and its derivative along ``(dx, 1)``; ``other`` is the interval's other end."""
        if self.mode == "forward":
            with forward_mode():
                # copies: a network may change its inputs in place
                state = forward_ad.make_dual(x.clone(), dx.clone())
                pair = function(state, forward_ad.make_dual(time.clone(), torch.ones_like(time)))
                (u, u_dt), (divergence, divergence_dt) = _unpack(pair.velocity), _unpack(pair.divergence)
            return Joint(u, divergence), Joint(u_dt, divergence_dt)
        # the interval keeps its order, and its times stay in [0, 1]
        later = torch.minimum(time + self.step, torch.where(time < other, other, torch.ones_like(time)))
        earlier = torch.maximum(time - self.step, torch.where(time > other, other, torch.zeros_like(time)))
        up = function(x + like(later - time, x) * dx, later)
        down = function(x + like(earlier - time, x) * dx, earlier)
        span = later - earlier
        slope = Joint((up.velocity - down.velocity) / like(span, x), (up.divergence - down.divergence) / span)
        return function(x.clone(), time), slope


class Lagrangian(_MovingTime):
    """The end of the interval moves. Needs a source that answers anywhere."""

    @torch.no_grad()
    def target(
        self,
        student: JointMap,
        source: VelocitySource,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
        data: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Joint:
        if not source.anywhere:
            raise ValueError(
                f"the Lagrangian objective asks for the velocity where the student lands, and {type(source).__name__} "
                "answers on the data pair's path only; use a teacher or the student's own diagonal"
            )
        still = torch.zeros_like(x)
        here, slope = self._along(lambda y, end: student(y, s, end, cond), x, still, t, s)
        v, divergence = source(x + like(t - s, x) * here.velocity, t, cond)
        return Joint(v - like(t - s, x) * slope.velocity, divergence - (t - s) * slope.divergence)


class Eulerian(_MovingTime):
    """The start of the interval moves along the flow: MeanFlow, for the pair."""

    @torch.no_grad()
    def target(
        self,
        student: JointMap,
        source: VelocitySource,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
        data: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Joint:
        v, divergence = source(x, s, cond, data=data, noise=noise)
        _, slope = self._along(lambda y, start: student(y, start, t, cond), x, v, s, t)
        return Joint(v + like(t - s, x) * slope.velocity, divergence + (t - s) * slope.divergence)


class Consistency(Eulerian):
    """The Eulerian objective with the end fixed at data, ``t = 1``: continuous-time consistency.

    Such a map answers for ``t = 1`` only, so a likelihood of data needs it inverted in one step.
    """

    def __init__(
        self,
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: Path | None = None,
        mode: str = "forward",
        step: float = 2e-3,
    ) -> None:
        super().__init__(intervals or Intervals("to_data", diagonal=0.0, grid=0.0), weighting, path, mode, step)
        if self.intervals.directions != Direction.TO_DATA:
            raise ValueError('consistency maps only go to data; use Intervals(directions="to_data")')

    def examples(
        self,
        student: JointMap,
        source: VelocitySource,
        data: Tensor,
        noise: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
    ) -> Examples:
        s = torch.rand_like(s)
        return super().examples(student, source, data, noise, s, torch.ones_like(s), cond)


def _unpack(dual: Tensor) -> tuple[Tensor, Tensor]:
    value, tangent = forward_ad.unpack_dual(dual)
    return value, torch.zeros_like(value) if tangent is None else tangent
