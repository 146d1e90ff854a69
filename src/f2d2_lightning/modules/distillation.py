"""The engine of joint distillation: what a module and a callback do alike, written once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from f2d2_lightning.adapters import AdaptedFlowMap, check_convention, check_differentiable
from f2d2_lightning.divergence.estimators import DivergenceEstimator, Hutchinson
from f2d2_lightning.flows.gaussian import GaussianBaseline, baseline_of
from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.metrics.diagnosis import Diagnosis, Taught, diagnose
from f2d2_lightning.modules._ranges import RangedModel
from f2d2_lightning.modules.evaluation import Evaluation
from f2d2_lightning.nn.head import DivergenceHead, Head, JointFlowMap
from f2d2_lightning.objectives.base import Batch, Objective, Terms, Weighting
from f2d2_lightning.objectives.integrator import trajectory_times
from f2d2_lightning.objectives.sources import TeacherSource, VelocitySource
from f2d2_lightning.objectives.targets import PASSES, choose_targets
from f2d2_lightning.objectives.trajectories import CAPACITY, TrajectoryRegression
from f2d2_lightning.objectives.volume import VolumeRegression
from f2d2_lightning.training.progress import planned_steps, share_done
from f2d2_lightning.training.run_seed import RunSeed
from f2d2_lightning.utils.conditions import Cond, moved, some_of
from f2d2_lightning.utils.processes import gather_states, own_state

PATH_NODES = 64
"""Of the teacher's path in a diagnosis, for objectives without trajectories."""
SHARE = 3.0
"""Evaluations that trajectories may take, in those of training; in large batches without gradients they are cheaper."""
REUSED, STARTS = 16, 2**24
"""Where more than the usual number of trajectories are kept: how often each is drawn from at least, and how many
numbers their starts may be in a checkpoint."""
MOVING_NODES = 24
"""Of trajectories of a velocity that is still trained."""
MEASURED, MANY = 64, 256
"""States that targets are measured on, and dimensions above which a quarter of them are."""
SCALED = 1024
"""States that the scale of a head's answers is set from."""


def default_objective(moving: bool, scattering: bool) -> TrajectoryRegression:
    """Trajectory regression.

    A velocity that is ``moving`` changes as training goes on: trajectories are then few, and made anew all the time,
    and there is nothing yet that nodes could be measured on. Targets that are ``scattering``, as conditional velocities
    on the diagonal are, have squared errors, whose least is at their mean.
    """
    if not moving:
        return TrajectoryRegression()
    if not scattering:
        # few, so that none is old (docs/RECIPE.md)
        return TrajectoryRegression(nodes=MOVING_NODES, capacity=512, max_mib=64.0, refresh=4.0, chunk=256)
    return TrajectoryRegression(
        nodes=MOVING_NODES,
        capacity=2048,
        max_mib=64.0,
        refresh=8.0,
        chunk=256,
        starts={"data": 0.3, "mixed": 0.2, "path": 0.1, "noise": 0.4},
        weighting=Weighting(),
    )


def default_head(channels: int, shape: tuple[int, ...], flow_map: FlowMap) -> DivergenceHead:
    """A head on a backbone's features, with the Gaussian fit that the backbone has, or else one of its own."""
    # an adapted network of this package has its fit inside
    fits = (part for part in flow_map.modules() if isinstance(part, GaussianBaseline) and part.shape == shape)
    return DivergenceHead(channels, baseline=copy.deepcopy(next(fits, None)) or GaussianBaseline(shape))


class DistilledModel(RangedModel):
    """A model whose likelihoods are trained and evaluated here: a student module, or what a callback adds."""

    joint: Any
    evaluation: Evaluation
    teacher: Any
    run_seed: RunSeed
    estimator: DivergenceEstimator
    """Of the targets' divergences."""
    draws: int
    """Dequantization draws per sample that validation averages few-step likelihoods over."""
    reference_samples: int | None
    """Samples per evaluation that are compared with the reference, the first ones of the data; ``None`` for 64 while
    training, and else all."""

    def distill(
        self,
        objective: Objective | None,
        estimator: DivergenceEstimator | None,
        directions: Direction,
        moving: bool,
        scattering: bool,
    ) -> None:
        """Say what is minimised. To be called by ``__init__``.

        Args:
            objective: The objective, of which a copy is taken where it is another model's already; by default
                :func:`default_objective`.
            estimator: Divergence estimator of its targets; ``None`` for what is measured, or one probe.
            directions: Orders of time that the map declares.
            moving: Whether the velocity that is learned from changes as training goes on.
            scattering: Whether targets then include conditional velocities.

        Raises:
            ValueError: If the objective trains other directions than the map declares.
        """
        self.estimator, self._estimator_given = estimator or Hutchinson(), estimator is not None
        self._trained_directions, self._chosen = directions, objective is not None
        self._set_objective((objective or default_objective(moving, scattering)).for_a_model())

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        if objective is not self._objective:
            objective = objective.for_a_model()
        self._set_objective(objective)
        self._chosen = True
        objective.quantize(self.quantization)

    def _set_objective(self, objective: Objective) -> None:
        objective.intervals.follow(self._trained_directions)
        if objective.directions != self._trained_directions:
            raise ValueError(
                f"the objective trains {objective.directions}, but the map declares {self._trained_directions}; a map "
                "that answers for a direction it never saw gives wrong likelihoods: set directions of both alike"
            )
        self._objective = objective

    @property
    def known_teacher(self) -> Any:
        """The teacher as far as it is known: ``None`` for a file that was not read yet."""
        return self.teacher

    def quantize(self, levels: int | None, low: float | None, high: float | None) -> None:
        super().quantize(levels, low, high)
        self.take_range()

    def take_range(self) -> None:
        """Make levels and range of the data the objective's as well.

        Raises:
            ValueError: If the objective has others, or the teacher, where it says them.
        """
        teacher = self.known_teacher
        theirs = getattr(teacher, "quantization", None)
        says = isinstance(theirs, Quantization) or isinstance(teacher, L.LightningModule)
        if says and theirs != self.quantization:
            raise ValueError(
                f"the teacher was trained on {theirs}, the model is for {self.quantization}; make them agree, or leave "
                "out levels, low and high"
            )
        self.objective.quantize(self.quantization)

    def check_networks(
        self, flow_map: FlowMap, teacher: Callable[..., Tensor] | None, x: Tensor, cond: Cond | None
    ) -> None:
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

    def measure_targets(
        self, trainer: L.Trainer, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None
    ) -> None:
        """Choose what was left open of trajectories and their estimator, by what it costs and what targets it makes.

        States of the data, ``(B, ...)``, are looked at; every process takes the first one's, and so chooses the same.
        """
        objective = self.objective
        if not isinstance(objective, TrajectoryRegression) or objective.nodes is not None:
            return
        # the states may come in other batches than those of training
        size = getattr(trainer.train_dataloader, "batch_size", None) or len(x)
        steps, count = planned_steps(trainer), size * trainer.world_size
        steps = steps if math.isfinite(steps) else 10_000
        evaluations = PASSES * count * steps
        trajectories = (objective.capacity or CAPACITY) * trainer.world_size
        few = MEASURED if x[0].numel() <= MANY else MEASURED // 4
        device = x.device
        x, cond = trainer.strategy.broadcast((x[:few], some_of(cond, slice(few))))
        choice = choose_targets(
            velocity,
            x.to(device),
            moved(cond, device),
            baseline_of(self.joint),
            objective.grids,
            affordable=SHARE * evaluations / trajectories,
            estimator=self.estimator if self._estimator_given else None,
            mode=self.estimator.mode,
        )
        if objective.capacity is None:
            most = min(evaluations / choice.cost, count * steps / REUSED, STARTS / x[0].numel())
            # a short run does not pay for many
            least = min(CAPACITY * trainer.world_size, SHARE * evaluations / choice.cost)
            choice = replace(choice, trajectories=max(1, int(max(least, most) / trainer.world_size)))
        objective.choice = choice
        self._take_choice()
        if trainer.num_training_batches * count < trajectories:
            objective.begin_around_few()
        (rank_zero_info if choice.good else rank_zero_warn)(
            f"targets: {choice}" + ("" if choice.good else f"; more would take {choice.remedy()}")
        )
        if choice.only_fit:
            rank_zero_warn(
                f"the teacher's log p is that of the Gaussian fit of the data to within {choice.beyond_fit:.1%} of its "
                "spread: unless the data are Gaussian, the teacher has not learned them, and the student will agree "
                "with it all the same; train the teacher longer, in larger batches or at a higher rate"
            )

    def _take_choice(self) -> None:
        choice = self.objective.choice if isinstance(self.objective, TrajectoryRegression) else None
        if choice is not None and choice.probes is not None:
            self.estimator = choice.estimator(baseline_of(self.joint), self.estimator.mode)

    @torch.no_grad()
    def fit_scale(
        self,
        head: Head,
        source: VelocitySource,
        batches: Iterable[tuple[Tensor, Cond | None]],
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Set the scale of the head's answers: root mean square of what it has to add to its fitted baseline.

        Args:
            head: The head, whose own units it is in.
            source: Gives divergences.
            batches: Data at ``t = 1``, ``(B, ...)``, with conditioning, of which about :data:`SCALED` are looked at.
            reduce: Sums a tensor over processes, where each of them sees a part of the data.
        """
        baseline = head.baseline
        sums = torch.zeros(2, dtype=torch.float64)
        for x, cond in batches:
            noise, t = torch.randn_like(x), torch.rand(len(x), dtype=x.dtype, device=x.device)
            divergence = source(self.objective.path.point(x, noise, t, cond)).divergence
            if baseline is not None:
                divergence = divergence - baseline.divergence(t, t)
            if head.per_axis and baseline is not None:
                # in units of what independent answers of order one would add up to
                divergence = divergence / baseline.angle_rate(t, t).mean(-1) / math.sqrt(baseline.dim)
            sums += torch.tensor([float(divergence.square().sum()), len(x)], dtype=torch.float64)
            if sums[1] >= SCALED:
                break
        if reduce is not None:
            sums = reduce(sums)
        head.scale.fill_(max(1e-3, math.sqrt(float(sums[0] / sums[1]))))

    def objective_loss(
        self,
        trainer: L.Trainer,
        batch_index: int,
        student: JointFlowMap,
        x: Tensor,
        cond: Cond | None,
        source: VelocitySource,
        anchor: VelocitySource | None = None,
    ) -> Terms:
        """The objective on a batch, in the random state of the step (:meth:`RunSeed.begin_step`)."""
        self.objective.structure = self.run_seed.structure(trainer, batch_index)
        return self.objective.loss(student, Batch(x, source, cond, anchor, share_done(trainer, batch_index)))

    # --- what a resumed run needs ---

    def objective_state(self) -> list[Any]:
        """The objective's state on every process, which must all call this."""
        return gather_states(self.objective.state_dict())

    def load_objective_state(self, states: Any, moving_in_0_1: bool | None) -> None:
        """Inverse of :meth:`objective_state`; nothing where a checkpoint has none.

        A run that version 0.1 began without an objective goes on with what it took then, by ``moving_in_0_1``, whatever
        its velocity does; ``None`` for a later run.
        """
        if moving_in_0_1 is not None and not self._chosen:
            before = self.objective.quantization
            taken = default_objective(moving_in_0_1, scattering=True)
            taken.nodes = None
            self._set_objective(taken)
            self.objective.quantize(before)
        if states:
            state: Mapping[str, Any] = own_state(states)
            try:
                self.objective.load_state_dict(state)
                self._take_choice()
            except KeyError as error:
                raise ValueError(
                    f"the checkpoint's objective has no {error}: it is of another class than "
                    f"{type(self.objective).__name__}; go on with the objective that the run began with"
                ) from error

    # --- its evaluations ---

    def target_source(self, velocity: Callable[..., Tensor]) -> VelocitySource:
        """Where velocities and divergences of targets come from, of a model whose reference is ``velocity``."""
        return TeacherSource(velocity, self.estimator)

    def taught(self, velocity: Callable[..., Tensor]) -> Taught:
        """How targets are made, for a diagnosis."""
        objective, joint = self.objective, self.joint_map
        frozen = bool(getattr(self, "frozen", False) or getattr(joint, "frozen", False))
        if isinstance(objective, TrajectoryRegression):
            times, baseline = objective.times(joint)
            return Taught(self.target_source(velocity), times, *objective.placing, baseline, frozen)
        # a path to ask the head along, that nobody learned from
        source = TeacherSource(velocity, self.estimator)
        return Taught(source, trajectory_times(PATH_NODES, self.steps), frozen=frozen)

    def diagnose(
        self, x: Tensor, cond: Cond | None = None, reference: Tensor | None = None, reference_error: float = math.nan
    ) -> Diagnosis:
        x, cond = self._fitting(x).to(self.device), moved(cond, self.device)
        velocity = self.reference_velocity()
        if velocity is None:
            raise ValueError(
                f"{self.title} has no velocity, so nothing says what its likelihoods should be; give it the teacher "
                "that it was distilled from"
            )
        if isinstance(self.objective, VolumeRegression):
            raise ValueError(
                "the head learns the density of the map's own jumps (VolumeRegression), and a diagnosis compares it "
                "with that of the reference's flow, which it need not have"
            )
        if reference is None:
            with self.evaluating():
                answer = self.evaluation.settled(velocity, x, cond)(velocity, x, cond)
            reference = self.nll_of(answer.value)
            if answer.standard_error is not None:
                # of a normal error, the mean size
                off = self.nll_of(answer.value + answer.standard_error) - reference
                reference_error = math.sqrt(2 / math.pi) * float(off.abs().mean())
        return diagnose(self, self.taught(velocity), x, reference, cond, reference_error=reference_error)

    @property
    def reference_fixed(self) -> bool:
        return self.teacher is not None

    def agreement_values(self) -> tuple[dict[int, Tensor], Tensor]:
        """NLL by step count of the last evaluation, and the reference's, each ``(N,)``, that this process compared."""
        return self.evaluation.compared_values()

    def agreement_table(self) -> list[dict[str, Any]]:
        """Rows of the last evaluation: one per step count, and one (``steps`` is ``None``) of the reference."""
        return self.evaluation.table()

    def evaluated_reference(self, values: Mapping[int, Tensor]) -> Tensor | None:
        return self.evaluation.known_reference(values)
