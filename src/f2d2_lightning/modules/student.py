"""The student: few-step samples and log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap
from f2d2_lightning.checkpoints.pretrained import state_shape
from f2d2_lightning.checkpoints.trust import packages_of
from f2d2_lightning.divergence.estimators import DivergenceEstimator
from f2d2_lightning.flows.maps import FlowMap
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.reference import Reference
from f2d2_lightning.metrics.evaluation import check_draws
from f2d2_lightning.modules._teaching import KeptTeacher, check_teacher
from f2d2_lightning.modules.base import FlowModule, object_names
from f2d2_lightning.modules.distillation import DistilledModel, default_head
from f2d2_lightning.modules.ema import copied, copy_frozen, share_weights, without_dropout
from f2d2_lightning.modules.evaluation import Evaluation
from f2d2_lightning.modules.teacher import FlowMatchingModule
from f2d2_lightning.nn.head import Head, JointFlowMap
from f2d2_lightning.nn.second_time import one_time_state
from f2d2_lightning.objectives.base import Objective
from f2d2_lightning.objectives.sources import ConditionalSource, DiagonalSource, TeacherSource, VelocitySource
from f2d2_lightning.utils.checks import at_least, check_arguments, counts, one_of
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.sharding import load_whole


class F2D2Module(FlowModule, DistilledModel):
    """Joint distillation of sampling and likelihood: a few-step student with a divergence head.

    Ai et al., "Joint Distillation for Fast Likelihood Evaluation and Sampling in Flow-based Models", 2025,
    https://arxiv.org/abs/2512.02636

    Override :meth:`data_to_state`, :meth:`make_source` or :meth:`prepare` to change where data, targets and starting
    values come from.

    Args:
        flow_map: Backbone of the student; ``None`` takes a copy of the teacher's, without its dropout; its file
            is then read at once. A trained student's ``average`` goes on in a copy, with the head that it has.
        shape: Shape of one state, ``(d,)`` or ``(C, H, W)``; ``None`` takes the teacher's, else the backbone's.
        teacher: A trained :class:`FlowMatchingModule`, a flow map or velocity ``(x, t, cond) -> v``, or the path of a
            checkpoint of the first. It is not part of this module's checkpoint and is needed only to train and to
            compare. ``None`` distils the student's own diagonal, trained by flow matching.
        trust: Packages whose classes the teacher's checkpoint may name, such as the one that your own backbone is in;
            that of ``flow_map`` is trusted already. See :mod:`f2d2_lightning.checkpoints.trust`.
        head: Divergence head; by default on the backbone's features, with the Gaussian fit that it has.
        objective: Training objective; trajectory regression in both directions by default.
        estimator: Divergence estimator of the targets; by default measured with the nodes, or Hutchinson's, one probe.
        frozen: Train the head only; backbone and samples stay bit for bit as they were.
        warm_start: Start the backbone from the teacher's weights, where it is a :class:`FlowMatchingModule`: the same
            network, or one with an :class:`~f2d2_lightning.nn.AddedTime` around the teacher's embedding.
        off_diagonal: With a teacher, whose velocity and divergence intervals are taught with: the ``"teacher"``'s, or
            the ``"student"``'s own diagonal, which the teacher then teaches alone (Lagrangian self-distillation in
            the released JAX code).
        steps: Step counts that validation reports.
        draws: Dequantization draws per sample that validation averages few-step likelihoods over.
        reference_samples: Samples per evaluation compared with the reference, the data's first; ``None`` for 64 while
            training, and all in ``validate`` and ``test``.
        inversion: For maps that only go to data: how validation and :meth:`log_prob` invert them.
        levels: Levels of discrete data, for bits per dimension; ``None`` takes the teacher's, if any, else those of the
            data module or of the checkpoint; where these say none, data are continuous and reported in nats.
        low: Lower edge of the range that the levels fill; ``None`` takes it likewise, else -1.
        high: Upper edge; ``None`` takes it likewise, else 1.
        optimizer: Makes the optimiser; AdamW at 1e-3 by default.
        lr_scheduler: Makes a schedule per step; by default a linear rise and a cosine to zero at the run's last step,
            if settings and data say which that is (``max_steps`` for data without a length).
        warmup: Steps of linear rise of the default schedule.
        ema_decay: Decay of the weight average, which is used in validation and after training.
        reference: Solver of the teacher's likelihood that validation compares with.
        channels_last: Memory format of convolutions' weights, see :class:`FlowModule`.
        compile: Compile the backbone, see :class:`FlowModule`.

    Raises:
        ValueError: If the objective trains other directions than the backbone declares, levels and range are not the
            teacher's or the objective's, or parts are missing.

    >>> from f2d2_lightning.nn import MLP
    >>> student = F2D2Module(MLP((2,), width=8, blocks=1))
    >>> student.sample(3, steps=2, seed=0).state.shape
    torch.Size([3, 2])
    >>> student.nll([[0.0, 1.0], [1.0, 0.0]], steps=2).shape
    torch.Size([2])
    """

    average: JointFlowMap

    def __init__(
        self,
        flow_map: FlowMap | JointFlowMap | None = None,
        shape: Sequence[int] | None = None,
        teacher: str | Path | FlowMatchingModule | None = None,
        head: Head | None = None,
        objective: Objective | None = None,
        estimator: DivergenceEstimator | None = None,
        frozen: bool = False,
        warm_start: bool = True,
        steps: Sequence[int] = (1, 2, 4, 8),
        draws: int = 1,
        reference_samples: int | None = None,
        inversion: Inversion | None = None,
        levels: int | None = None,
        low: float | None = None,
        high: float | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: int = 200,
        ema_decay: float = 0.999,
        reference: Reference | None = None,
        channels_last: bool = False,
        compile: bool | str = False,
        off_diagonal: str = "teacher",
        trust: Sequence[str] = (),
    ) -> None:
        check_arguments(F2D2Module.__init__, locals() | {"teacher": None})  # which says itself what it may be
        one_of("off_diagonal", off_diagonal, ("teacher", "student"))
        goes_on = isinstance(flow_map, JointFlowMap) and head is None
        if isinstance(flow_map, JointFlowMap):
            joint = copied(flow_map).requires_grad_(True).train()
            flow_map, head = joint.flow_map, head or joint.head
        kept = KeptTeacher(teacher, trust)
        if from_file := flow_map is None and kept.path is not None:
            teacher = kept.get(torch.device("cpu"))
        if isinstance(teacher, FlowMatchingModule):
            shape = shape or teacher.shape
            if teacher.levels is not None:
                levels = teacher.levels if levels is None else levels
                low, high = teacher.low if low is None else low, teacher.high if high is None else high
            if flow_map is None or share_weights(teacher, flow_map):
                # training must not change the teacher
                own = without_dropout(teacher.average) if flow_map is None else copied(flow_map)
                flow_map = own.requires_grad_(True).train()
        if flow_map is None:
            raise ValueError(
                "flow_map is needed where the teacher is neither a FlowMatchingModule, whose network is copied, nor "
                "its file"
            )
        shape = state_shape(flow_map) if shape is None else shape
        at_least(1, draws=draws)
        parameters = list(flow_map.parameters())
        if not frozen and parameters and not any(p.requires_grad for p in parameters):
            raise ValueError(
                f"no parameter of the student's backbone ({type(flow_map).__name__}) requires gradients, so it would "
                "not be trained: flow_map.requires_grad_(True), or frozen=True to train the head only"
            )
        if reference is None:
            # what the network can be differentiated by is the same for its targets and its likelihood
            reference = Reference() if estimator is None else Reference(mode=estimator.mode)
        super().__init__(
            shape, levels, low, high, optimizer, lr_scheduler, warmup, ema_decay, reference, channels_last, compile
        )
        objects = ("flow_map", "teacher", "head", "objective", "estimator", "inversion")
        self.save_hyperparameters(ignore=object_names(locals(), *objects, "optimizer", "lr_scheduler", "reference"))
        if from_file:
            # so that the student is made again without its teacher
            self.save_hyperparameters({"shape": list(self.shape), **kept.described_network})
        self.distill(objective, estimator, flow_map.directions, moving=teacher is None, scattering=teacher is None)
        if head is not None and head.baseline is not None and type(head.baseline.path) is not type(self.objective.path):
            raise ValueError(
                f"the head's baseline is on {type(head.baseline.path).__name__}, the objective on "
                f"{type(self.objective.path).__name__}; give both the same path"
            )
        self.draws = draws
        head = head or default_head(_feature_channels(flow_map, self.shape), self.shape, flow_map)
        self.joint = JointFlowMap(flow_map, head, frozen)
        # a module that is made without memory has no numbers yet
        self._first_scale = None if goes_on else 1.0 if head.scale.is_meta else float(head.scale)
        self.kept_teacher = kept
        self._inherit()
        shared = {id(flow_map): flow_map} if frozen else {}
        self.average = copy_frozen(self.joint, shared)
        self.steps = counts("steps", steps)
        if reference_samples is not None:
            at_least(0, reference_samples=reference_samples)
        self.reference_samples = reference_samples
        self.evaluation = Evaluation(self)
        self.inversion = inversion or Inversion()
        self.warm_start = warm_start
        self.off_diagonal = off_diagonal
        self._sources: tuple[VelocitySource, VelocitySource] | None = None
        self.trust = (*trust, *packages_of(*(type(part) for part in flow_map.modules())))
        kept.trust = self.trust
        kept.keep_apart(flow_map)
        self._speed_up()

    @property
    def live(self) -> JointFlowMap:
        """The joint map in training."""
        return self.joint

    def to_shard(self) -> list[nn.Module]:
        """Backbone and head, in training and averaged; a frozen backbone that both share once."""
        parts = [self.joint.flow_map, self.joint.head, self.average.flow_map, self.average.head]
        return list(dict.fromkeys(parts))

    # --- teacher and targets ---

    @property
    def teacher(self) -> Any:
        """The teacher, loaded on first use and moved to this module's device; ``None`` in self-distillation."""
        return self.kept_teacher.get(self.device, self.dtype)

    def teacher_velocity(self) -> Any:
        """``(x, t, cond) -> v`` that likelihoods are compared with; the student's own diagonal without a teacher."""
        teacher = self.teacher
        if teacher is None:
            return self.average.velocity
        return teacher.average.velocity if isinstance(teacher, FlowMatchingModule) else teacher

    def reference_velocity(self) -> Any:
        return self.teacher_velocity()

    @property
    def reference_fixed(self) -> bool:
        # asked at every step: :attr:`teacher` would go through all its modules to move them
        return self.kept_teacher.there

    def make_source(self) -> tuple[VelocitySource, VelocitySource]:
        """Where targets come from: ``(source, anchor)``, see :class:`~f2d2_lightning.objectives.Batch`."""
        if self.teacher is not None:
            anchor: VelocitySource = TeacherSource(self.teacher_velocity(), self.estimator)
            return (DiagonalSource(self.joint) if self.off_diagonal == "student" else anchor), anchor
        anchor = ConditionalSource(self.joint, self.estimator, self.objective.path)
        return DiagonalSource(self.joint), anchor

    def target_source(self, velocity: Any) -> VelocitySource:
        source = self.make_source()[0]
        # what answers is the average
        return DiagonalSource(self.average) if isinstance(source, DiagonalSource) else source

    def setup(self, stage: str) -> None:
        """Load the teacher where it is needed, and compare shapes."""
        if stage != "predict" or not self.trained:
            _ = self.teacher  # a file is read
            self._inherit()
        super().setup(stage)
        if stage == "predict":
            return
        self._follow_teacher()

    def _follow_teacher(self) -> None:
        """Labels mean what they mean to the teacher.

        Raises:
            ValueError: If the student was trained with another order of the classes.
        """
        theirs = getattr(self.kept_teacher.known, "class_names", None)
        if theirs is None or not self.conditional:
            return
        if self.trained and self.class_names not in (None, theirs):
            raise ValueError(
                f"the student's classes are {self.class_names}, the teacher's {theirs}, in the order of their labels; "
                "use the teacher that the student was trained with"
            )
        self._follow_classes(theirs)

    @property
    def known_teacher(self) -> Any:
        return self.kept_teacher.known

    def _inherit(self) -> None:
        """Levels and range of the teacher, which are the objective's as well.

        Raises:
            ValueError: If they, or the shapes, are not the same.
        """
        teacher = self.known_teacher
        if isinstance(teacher, FlowMatchingModule):
            check_teacher(teacher, self)
            if self.levels is None:
                self._set_range(teacher.levels, teacher.low, teacher.high)
        self.take_range()

    @property
    def _goes_on(self) -> bool:
        """Whether the head was trained: its scale, which is set from the data once, is not the one that it began with.

        An average without memory (``ema_decay=0``) does not tell: it never leaves the weights.
        """
        return float(self.joint.head.scale) != self._first_scale

    @torch.no_grad()
    def prepare(self) -> None:
        """Check a foreign backbone's convention, start from the teacher, and set the head's scale from the data."""
        x, cond = next(self._states())
        teacher = self.teacher
        self.check_networks(self.joint.flow_map, None if teacher is None else self.teacher_velocity(), x, cond)
        if self.warm_start and not (self.joint.frozen or self._goes_on) and isinstance(teacher, FlowMatchingModule):
            try:
                state = one_time_state(self.joint.flow_map, teacher.average.state_dict())
                load_whole(self.joint.flow_map, state)
            except RuntimeError as error:
                raise ValueError(
                    "the student's backbone cannot start from the teacher's weights, they are of different networks; "
                    f"use the same flow_map for both, or warm_start=False ({error})"
                ) from error
        if teacher is not None:
            self.measure_targets(self.trainer, self.teacher_velocity(), x, cond)
            self._sources = None  # of the estimator that was chosen
        if not self._goes_on:  # what a trained head answers is in the scale that it has
            self.fit_scale(self.joint.head, self._targets()[1], self._states(), self.sum_over_processes)

    def _states(self) -> Iterator[tuple[Tensor, Cond | None]]:
        for batch in self.training_batches():
            yield self.state(batch)

    # --- training ---

    def on_fit_start(self) -> None:
        """Make the targets' source anew: teacher and device may be others than in the last run."""
        check_draws(self.draws, self.quantization)
        self._sources = None

    def _targets(self) -> tuple[VelocitySource, VelocitySource]:
        """Source and anchor, made when they are first asked for: a Tuner takes steps before a run begins."""
        self._sources = self._sources or self.make_source()
        return self._sources

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The objective's loss; its parts are logged beside it."""
        x, cond = self.state(batch)
        terms = self.objective_loss(self.trainer, batch_idx, self.joint, x, cond, *self._targets())
        self.log("train/loss", terms.loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in terms._asdict().items() if name != "loss"})
        return terms.loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["f2d2"]["objective"] = self.objective_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._follow_teacher()
        state = checkpoint.get("f2d2", {})
        self.load_objective_state(state.get("objective"), None if "version" in state else False)

    # --- evaluation ---

    def on_validation_epoch_start(self) -> None:
        # weights of a checkpoint are there by now
        if self.trainer.state.fn in ("validate", "test") and not self.trained:
            rank_zero_warn(
                f"this {type(self).__name__} was not trained: its likelihoods are those of its initial weights. Fit it "
                "first, or load a checkpoint (ckpt_path=...)"
            )
        self.evaluation.start(self.trainer)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Few-step likelihoods beside the teacher's on the same points."""
        self.evaluation.add(*self.state(batch), dataloader_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        prefix = "test/" if self.trainer.testing else "val/"
        shown = f"{prefix}nll_{self.steps[-1]}"
        self.evaluation.log(lambda name, value: self.log(name, value, prog_bar=name == shown), prefix)

    on_test_epoch_end = on_validation_epoch_end

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Any:
        """``(u, D)`` of the weight average."""
        return self.average(x, s, t, cond)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[int, Tensor]:
        """Log-likelihood of a batch at each of ``steps``, nats."""
        x, cond = self.state(batch)
        return {k: self.log_prob(x, k, cond).value for k in self.steps}


def _feature_channels(flow_map: FlowMap, shape: tuple[int, ...]) -> int:
    if isinstance(flow_map, AdaptedFlowMap) and not flow_map.probed and flow_map.adapter.conditional is False:
        # one call says it, which needs nothing but states
        return flow_map.probe(next(flow_map.parameters(), torch.zeros(())).new_zeros(2, *shape))
    channels = getattr(flow_map, "features", None)
    if not isinstance(channels, int):
        raise ValueError(
            f"{type(flow_map).__name__} does not say how many feature channels it gives; pass "
            "head=DivergenceHead(features=...) or head=DivergenceHead(network=...)"
        )
    return channels
