r"""Where an objective takes velocity and divergence from: a teacher, the student's own diagonal, or the data pair.

A source answers ``g = (v, div v)`` at a point, always detached.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import Conditional, DivergenceEstimator, Hutchinson, instantaneous
from f2d2_lightning.flows.maps import Joint, JointMap
from f2d2_lightning.flows.paths import LinearPath, Path, Point


class VelocitySource(ABC):
    """Instantaneous velocity and divergence for targets."""

    anywhere: bool = True
    """Whether it can answer off the data pair's own path, as trajectories and the Lagrangian objective need."""

    stationary: bool = False
    """Whether it answers the same throughout training, so that what it was integrated to can be made again."""

    @abstractmethod
    def __call__(self, point: Point) -> Joint:
        """``(v, div v)`` at a point, detached; shapes ``(B, ...)`` and ``(B,)``, nats per unit of time."""

    def along_path(self) -> VelocitySource:
        """The source for one path of a batch, see :meth:`DivergenceEstimator.along_path`."""
        return self


class TeacherSource(VelocitySource):
    """A frozen teacher's velocity, its divergence from an estimator.

    Args:
        velocity: ``(x, t, cond) -> v``, or a flow map, whose diagonal is used.
        estimator: Divergence estimator; Hutchinson's with one probe by default.
        stationary: Whether the teacher stays as it is throughout training; a model in training that teaches its own
            head does not.
    """

    def __init__(
        self, velocity: Callable[..., Tensor], estimator: DivergenceEstimator | None = None, stationary: bool = True
    ) -> None:
        self.velocity = instantaneous(velocity)
        self.estimator = estimator or Hutchinson()
        self.stationary = stationary

    @torch.no_grad()
    def __call__(self, point: Point) -> Joint:
        estimator = self.estimator
        if isinstance(estimator, Conditional) and point.pair is None:
            estimator = estimator.near_data  # a point of a trajectory belongs to no data pair
        v, divergence, _ = estimator(self.velocity, point)
        return Joint(v, divergence)

    def along_path(self) -> TeacherSource:
        source = copy.copy(self)
        if isinstance(self.estimator, DivergenceEstimator):  # a plain function has nothing to remember
            source.estimator = self.estimator.along_path()
        return source


class DiagonalSource(VelocitySource):
    """The student's own diagonal, ``(u, D)(x, t, t)``: self-distillation. Costs one evaluation and no derivative."""

    def __init__(self, student: JointMap) -> None:
        self.student = student

    @torch.no_grad()
    def __call__(self, point: Point) -> Joint:
        return self.student(point.x, point.t, point.t, point.cond)


class ConditionalSource(VelocitySource):
    """The data pair's own velocity (``x_1 - eps`` on the linear path), unbiased where it enters a target linearly.

    Its divergence is an estimate for the student's diagonal velocity.

    Args:
        student: Joint map whose diagonal velocity the divergence is taken of.
        estimator: Divergence estimator; by default :class:`~f2d2_lightning.divergence.Conditional` on the linear path,
            Hutchinson's on others.
        path: Probability path of the pair.
    """

    anywhere = False

    def __init__(
        self, student: JointMap, estimator: DivergenceEstimator | None = None, path: Path | None = None
    ) -> None:
        self.student = student
        self.path = path or LinearPath()
        linear = isinstance(self.path, LinearPath)
        if isinstance(estimator, Conditional) and not linear:
            raise ValueError(
                f"Conditional holds on the linear path only, and the path is {type(self.path).__name__}; use Hutchinson"
            )
        self.estimator = estimator or (Conditional() if linear else Hutchinson())

    @torch.no_grad()
    def __call__(self, point: Point) -> Joint:
        if point.pair is None:
            raise ValueError(
                "the conditional velocity exists only on the path of a data pair, and none was given; give the "
                "objective a teacher (TeacherSource) or the student's own diagonal (DiagonalSource)"
            )
        divergence = self.estimator(self.student.velocity, point).divergence
        return Joint(self.path.conditional_velocity(*point.pair, point.t), divergence)
