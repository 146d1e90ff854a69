"""The engine of joint distillation: what a module and a callback do alike, written once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from f2d2_lightning.adapters import AdaptedFlowMap, check_convention, check_differentiable
from f2d2_lightning.divergence.estimators import DivergenceEstimator, Hutchinson
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.modules.evaluation import Evaluation
from f2d2_lightning.nn.head import DivergenceHead, Head, JointFlowMap
from f2d2_lightning.objectives._scale import measure_scale
from f2d2_lightning.objectives.base import Batch, Objective, Terms
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import VelocitySource
from f2d2_lightning.objectives.trajectories import TrajectoryRegression
from f2d2_lightning.training.run_seed import RunSeed
from f2d2_lightning.utils.processes import gather_states, own_state

__all__ = ["Distillation", "DistilledModel", "default_head", "default_objective"]

MOST_AXES = 1024
"""Dimensions up to which the default head fits a full covariance."""


def default_objective(directions: Direction, moving: bool) -> Objective:
    """Trajectory regression in the directions that a map declares.

    Args:
        directions: Of the map.
        moving: Whether the velocity that is learned from changes as training goes on: trajectories are then few, and
            made anew all the time.
    """
    if not moving:
        return TrajectoryRegression(intervals=Intervals(directions))
    return TrajectoryRegression(
        capacity=2048,
        max_mib=64.0,
        refresh=8.0,
        chunk=256,
        starts={"data": 0.3, "mixed": 0.2, "path": 0.1, "noise": 0.4},
        intervals=Intervals(directions),
    )


def default_head(channels: int, shape: tuple[int, ...], flow_map: FlowMap) -> DivergenceHead:
    """A head on a backbone's features.

    Args:
        channels: Of the features.
        shape: Of one state.
        flow_map: The backbone: a Gaussian fit of its own says which covariance the head's has.
    """
    own = getattr(flow_map, "baseline", None)
    # principal axes of a large state are as many numbers as a network has weights
    covariance = "full" if math.prod(shape) <= MOST_AXES else "diagonal"
    baseline = GaussianBaseline(shape, own.covariance if isinstance(own, GaussianBaseline) else covariance)
    return DivergenceHead(channels, baseline=baseline)


class Distillation:
    """Objective, estimator and seed of a run that gives a map likelihoods.

    Args:
        objective: The objective; by default :func:`default_objective`.
        estimator: Divergence estimator of its targets; Hutchinson's with one probe by default.
        directions: Orders of time that the map declares.
        seed: Of the run.
        moving: Whether the velocity that is learned from changes as training goes on.

    Raises:
        ValueError: If the objective trains other directions than the map declares.
    """

    def __init__(
        self,
        objective: Objective | None,
        estimator: DivergenceEstimator | None,
        directions: Direction,
        seed: RunSeed,
        moving: bool,
    ) -> None:
        self.directions, self.chosen = directions, objective is not None
        self.estimator, self.seed = estimator or Hutchinson(), seed
        self.objective = objective or default_objective(directions, moving)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        if objective.directions != self.directions:
            raise ValueError(
                f"the objective trains {objective.directions}, but the map declares {self.directions}; a map that "
                "answers for a direction it never saw gives wrong likelihoods: set directions of both alike"
            )
        self._objective = objective

    def take_range(self, quantization: Quantization | None, of_teacher: Any) -> None:
        """Levels and range of the data, which are the objective's as well.

        Args:
            quantization: Of the model's data; ``None`` for continuous data.
            of_teacher: The teacher, whose must be the same where it says them.

        Raises:
            ValueError: If the objective or the teacher have others.
        """
        theirs = getattr(of_teacher, "quantization", None)
        says = isinstance(theirs, Quantization) or isinstance(of_teacher, L.LightningModule)
        if says and theirs != quantization:
            raise ValueError(
                f"the teacher was trained on {theirs}, the model is for {quantization}; make them agree, or leave out "
                "levels, low and high"
            )
        self.objective.quantize(quantization)

    def check(self, flow_map: FlowMap, teacher: Callable[..., Tensor] | None, x: Tensor, cond: Tensor | None) -> None:
        """Compare a foreign network with its adapter, and what is differentiated with differences.

        Args:
            flow_map: The student's backbone.
            teacher: Velocity ``(x, t, cond) -> v`` to learn from; ``None`` for the backbone's own diagonal.
            x: States of the data, ``(B, ...)``.
            cond: Conditioning.

        Raises:
            ValueError: Says what is wrong.
        """
        mode = self.estimator.mode
        if isinstance(flow_map, AdaptedFlowMap):
            check_convention(flow_map, x, cond, mode)
        elif teacher is None:
            check_differentiable(flow_map, x, cond, mode)
        if teacher is not None:
            check_differentiable(teacher, x, cond, mode)

    def fit_scale(
        self,
        head: Head,
        source: VelocitySource,
        batches: Iterable[tuple[Tensor, Tensor | None]],
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Set the scale of the head's answers from data, once its baseline is fitted."""
        head.scale.fill_(measure_scale(head, source, batches, self.objective.path, reduce=reduce))

    def loss(
        self,
        trainer: L.Trainer,
        batch_index: int,
        student: JointFlowMap,
        x: Tensor,
        cond: Tensor | None,
        source: VelocitySource,
        anchor: VelocitySource | None = None,
    ) -> Terms:
        """The objective on a batch, in the random state of the step (:meth:`RunSeed.begin_step`)."""
        self.objective.structure = self.seed.structure(trainer, batch_index)
        progress = min(1.0, trainer.global_step / max(1.0, trainer.estimated_stepping_batches))
        return self.objective.loss(student, Batch(x, source, cond, anchor, progress))

    # --- what a resumed run needs ---

    def objective_state(self) -> list[Any]:
        """The objective's state on every process, which must all call this."""
        return gather_states(self.objective.state_dict())

    def load_objective_state(self, states: Any, moving_in_0_1: bool | None) -> None:
        """Inverse of :meth:`objective_state`; nothing where a checkpoint has none.

        Args:
            states: The state.
            moving_in_0_1: Of a run that version 0.1 began, what it took ``moving`` for, whatever the velocity, where
                no objective was given: the run goes on with what it began with. ``None`` for a later run.
        """
        if moving_in_0_1 is not None and not self.chosen:
            before = self.objective.quantization
            self.objective = default_objective(self.directions, moving_in_0_1)
            self.objective.quantize(before)
        if states:
            state: Mapping[str, Any] = own_state(states)
            try:
                self.objective.load_state_dict(state)
            except KeyError as error:
                raise ValueError(
                    f"the checkpoint's objective has no {error}: it is of another class than "
                    f"{type(self.objective).__name__}; go on with the objective that the run began with"
                ) from error


class DistilledModel(LikelihoodModel):
    """A model whose likelihoods are trained and evaluated here: a student module, or what a callback adds."""

    distillation: Distillation
    evaluation: Evaluation
    teacher: Any
    draws: int
    """Dequantization draws per sample that validation averages few-step likelihoods over."""
    reference_samples: int | None
    """Samples per evaluation that are compared with the reference, the first ones of the data; ``None`` for all."""

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.distillation.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self.distillation.objective, self.distillation.chosen = objective, True
        objective.quantize(self.quantization)

    @property
    def estimator(self) -> DivergenceEstimator:
        """Of the targets' divergences."""
        return self.distillation.estimator

    @estimator.setter
    def estimator(self, estimator: DivergenceEstimator) -> None:
        self.distillation.estimator = estimator

    @property
    def reference_fixed(self) -> bool:
        return self.teacher is not None

    def reference_log_prob(self, x: Tensor, cond: Tensor | None, velocity: Any) -> Tensor:
        """Reference log-likelihood of a batch, ``(B,)``, nats; computed once per batch of points and kept."""
        return self.reference_and_error(x, cond, velocity)[0]

    def reference_and_error(self, x: Tensor, cond: Tensor | None, velocity: Any) -> tuple[Tensor, Tensor | None]:
        """:meth:`reference_log_prob` and its standard error over random probes, ``(B,)``, where that is known."""
        return self.evaluation.reference(velocity, x, cond)

    def agreement_values(self) -> tuple[dict[int, Tensor], Tensor]:
        """Negative log-likelihoods of the last evaluation by step count, and the reference's, each ``(N,)``.

        Those that this process compared.
        """
        return self.evaluation.compared_values()

    def agreement_table(self) -> list[dict[str, Any]]:
        """Rows of the last evaluation: one per step count, and one (``steps`` is ``None``) of the reference."""
        return self.evaluation.table()

    def evaluated_reference(self, values: Mapping[int, Tensor]) -> Tensor | None:
        return self.evaluation.known_reference(values)
