r"""Identities of the pair ``f = (u, D)``, each written once for both.

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

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from f2d2_lightning.divergence._tangents import forward_mode
from f2d2_lightning.divergence.estimators import same_draws
from f2d2_lightning.flows.maps import Direction, Joint, JointMap
from f2d2_lightning.flows.paths import Path, Point, like
from f2d2_lightning.objectives.base import Batch, Examples, Objective, Terms, Weighting
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import VelocitySource
from f2d2_lightning.utils.checks import checked, one_of, positive


class Identity(Objective):
    """The student is regressed on one side of an identity, in which it may stand itself; arguments as an objective."""

    @abstractmethod
    def target(self, student: JointMap, source: VelocitySource, point: Point, t: Tensor) -> Joint:
        """Right-hand side of the identity, detached.

        Args:
            student: The joint map in training.
            source: Gives ``(v, div v)``.
            point: States ``x`` at their times ``s``, with the pair that they lie between for sources that need it.
            t: Ends, ``(B,)``.
        """

    def examples(self, student: JointMap, source: VelocitySource, point: Point, t: Tensor) -> Examples:
        """Training examples for intervals off the diagonal."""
        return Examples(point.x, point.t, t, point.cond, self.target(student, source, point, t))

    def loss(self, student: JointMap, batch: Batch) -> Terms:
        return self.regress(student, batch, lambda point, t: self.examples(student, batch.source, point, t))


class Semigroup(Identity):
    """Two short steps teach one long step.

    Args:
        split: ``"midpoint"`` (shortcut models) or ``"random"`` (a uniform point between).
        intervals: Distribution of ``(s, t)``; needs a share on the diagonal, where the source comes in.
        weighting: How errors become a loss.
        path: Probability path.

    Raises:
        ValueError: If ``split`` is neither, or the intervals never touch the diagonal.
    """

    @checked
    def __init__(
        self,
        split: str = "midpoint",
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: Path | None = None,
    ) -> None:
        # the rule only spreads what the diagonal learns, which therefore needs a large share
        super().__init__(intervals or Intervals(diagonal=0.5, grid=0.25), weighting, path)
        one_of("split", split, ("midpoint", "random"))
        if self.intervals.diagonal == 0:
            raise ValueError("the semigroup rule alone does not see the data; Intervals(diagonal=...) must be positive")
        self.split = split

    @torch.no_grad()
    def target(self, student: JointMap, source: VelocitySource, point: Point, t: Tensor) -> Joint:
        x, s, cond = point.x, point.t, point.cond
        share = torch.full_like(s, 0.5) if self.split == "midpoint" else torch.rand_like(s)
        middle = s + share * (t - s)
        u1, d1 = student(x, s, middle, cond)
        u2, d2 = student(x + like(middle - s, x) * u1, middle, t, cond)
        weight = like(share, x)
        return Joint(weight * u1 + (1 - weight) * u2, share * d1 + (1 - share) * d2)


class _MovingTime(Identity):
    """Objectives that differentiate the student along time.

    Args:
        intervals: Distribution of ``(s, t)``; both directions by default.
        weighting: How errors become a loss.
        path: Probability path.
        mode: ``"forward"``, or ``"finite"``, central differences, for backbones without a forward-mode rule.
        step: Half-width of the difference, in time.
    """

    @checked
    def __init__(
        self,
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: Path | None = None,
        mode: str = "forward",
        step: float = 2e-3,
    ) -> None:
        super().__init__(intervals, weighting, path)
        one_of("mode", mode, ("forward", "finite"))
        positive(step=step)
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
        up, down = (same_draws(function, x + like(end - time, x) * dx, end) for end in (later, earlier))
        span = later - earlier
        slope = Joint((up.velocity - down.velocity) / like(span, x), (up.divergence - down.divergence) / span)
        return function(x.clone(), time), slope


class Lagrangian(_MovingTime):
    """The end of the interval moves. Needs a source that answers anywhere."""

    @torch.no_grad()
    def target(self, student: JointMap, source: VelocitySource, point: Point, t: Tensor) -> Joint:
        if not source.anywhere:
            raise ValueError(
                f"the Lagrangian objective asks for the velocity where the student lands, and {type(source).__name__} "
                "answers on the data pair's path only; use a teacher or the student's own diagonal"
            )
        x, s, cond = point.x, point.t, point.cond
        still = torch.zeros_like(x)
        here, slope = self._along(lambda y, end: student(y, s, end, cond), x, still, t, s)
        v, divergence = source(Point(x + like(t - s, x) * here.velocity, t, cond))
        return Joint(v - like(t - s, x) * slope.velocity, divergence - (t - s) * slope.divergence)


class Eulerian(_MovingTime):
    """The start of the interval moves along the flow: MeanFlow, for the pair."""

    @torch.no_grad()
    def target(self, student: JointMap, source: VelocitySource, point: Point, t: Tensor) -> Joint:
        x, s, cond = point.x, point.t, point.cond
        v, divergence = source(point)
        _, slope = self._along(lambda y, start: student(y, start, t, cond), x, v, s, t)
        return Joint(v + like(t - s, x) * slope.velocity, divergence + (t - s) * slope.divergence)


class Consistency(Eulerian):
    """The Eulerian objective with the end fixed at data, ``t = 1``: continuous-time consistency.

    Such a map answers for ``t = 1`` only, so a likelihood of data needs it inverted in one step.
    """

    @checked
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

    def examples(self, student: JointMap, source: VelocitySource, point: Point, t: Tensor) -> Examples:
        assert point.pair is not None
        anywhere = self.path.point(*point.pair, torch.rand_like(point.t), point.cond)
        return super().examples(student, source, anywhere, torch.ones_like(t))


def _unpack(dual: Tensor) -> tuple[Tensor, Tensor]:
    value, tangent = forward_ad.unpack_dual(dual)
    return value, torch.zeros_like(value) if tangent is None else tangent
