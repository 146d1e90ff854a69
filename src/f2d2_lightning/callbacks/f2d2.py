"""Likelihoods for somebody else's LightningModule: one callback, its code untouched.

The callback owns what it adds (head, its optimiser and average): nothing becomes a submodule of the model, so the
model's own optimisers, schedulers and checkpoints stay as they are. While it trains, the model's ``training_step`` is
wrapped, so that the added loss is computed inside the strategy's forward pass and its share of the backbone's gradient
is synchronised like any other.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap, Adapter, check_convention, check_differentiable
from f2d2_lightning.adapters.features import find_submodule
from f2d2_lightning.callbacks._auxiliary import AddedWeights
from f2d2_lightning.checkpoints.export import CHECKPOINT_KEY, describe_joint, save_joint
from f2d2_lightning.divergence.estimators import DivergenceEstimator, Hutchinson
from f2d2_lightning.flows._held import HeldFlowMap, evaluating
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.likelihood._log_prob import LogProb, log_prob
from f2d2_lightning.likelihood.guidance import SelfGuidance
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.reference import Reference
from f2d2_lightning.likelihood.sampling import Samples, check_shape, draw_noise, sample
from f2d2_lightning.metrics.evaluation import LikelihoodEvaluation, check_draws
from f2d2_lightning.modules.ema import kept_apart
from f2d2_lightning.nn.head import DivergenceHead, JointFlowMap
from f2d2_lightning.objectives._scale import measure_scale
from f2d2_lightning.objectives.base import Objective
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import TeacherSource, VelocitySource
from f2d2_lightning.objectives.trajectories import TrajectoryRegression
from f2d2_lightning.training.batches import HALF, BatchStates, check_values, compare_ranges, training_batches
from f2d2_lightning.training.progress import begin_epoch, mend_progress
from f2d2_lightning.utils.processes import Places, gather_states, own_state
from f2d2_lightning.utils.seeding import mix_seed
from f2d2_lightning.utils.sharding import whole_state

__all__ = ["F2D2Callback"]

WRAPPED = ("training_step", "manual_backward", "on_save_checkpoint")


class F2D2Callback(L.Callback):
    """Adds a divergence head and the F2D2 loss to a LightningModule that holds a few-step network.

    ``Trainer(callbacks=[F2D2Callback(flow_map="net", adapter=MeanFlow(directions="both"))])`` trains the module's own
    loss and the head's beside it, logs likelihoods in validation, and answers :meth:`log_prob` and :meth:`sample`.
    Ai et al., "Joint Distillation for Fast Likelihood Evaluation and Sampling in Flow-based Models", 2025,
    https://arxiv.org/abs/2512.02636

    Works with automatic and manual optimisation, accumulation, clipping, any scheduler, mixed precision, compiled
    networks, DDP and FSDP2. Random numbers are drawn apart from the module's own: with ``frozen=True`` its training is
    the same, bit for bit, as without the callback.

    Args:
        flow_map: Name of the network in the LightningModule, as in ``named_modules()``: ``"net"``, ``"model.unet"``.
        adapter: How the network is called (:mod:`f2d2_lightning.adapters`). Its ``directions`` are those that are
            trained: ``"both"`` gives likelihoods of data in K evaluations, ``"to_data"`` by inversion.
        features: Submodule of the network whose output the head reads; by default the input of its last layer.
        interval: Submodule that embeds the network's time, to which a pair of times is added
            (:class:`~f2d2_lightning.adapters.AddedInterval`), for networks whose second time cannot say a direction.
        teacher: Velocity ``(x, t, cond) -> v``, flow map or module to learn from; by default the model's own diagonal
            as it trains. One that holds the network itself is kept as it is when training starts.
        head: Divergence head; by default one on the network's features with a diagonal Gaussian baseline.
        objective: What relates ``(u, D)`` to the velocity; trajectory regression by default.
        estimator: Divergence estimator of the targets; Hutchinson's with one probe by default.
        frozen: The added loss trains the head alone and leaves the network to the module's own loss. Declare no
            direction then that this loss does not train. For the density of a few-step sampler's own jumps give
            ``objective=VolumeRegression(refresh=8.0)``.
        weight: Of the added loss per dimension, beside the module's own.
        optimizer: Makes the head's optimiser from its parameters; AdamW at 1e-3 by default.
        follow_schedule: Scale the head's learning rate as the module's first optimiser scales its own.
        gradient_clip: Largest norm of the head's gradient; ``None`` for no clipping.
        ema_decay: Decay of the average of the added weights, which validates and answers.
        data_to_state: ``batch -> (x, cond)``, states ``(B, ...)`` at ``t = 1`` as the network sees them in training,
            or the name of a method of the module that does so; by default a tensor, or the first two items of a
            sequence.
        levels: Levels of discrete data: likelihoods are logged in bits per dimension; ``None`` takes those and the
            range of a teacher or a data module of this package, else likelihoods are in nats.
        low: Lower edge of the range that the levels fill.
        high: Upper edge.
        steps: Step counts that validation and test report.
        draws: Dequantization draws per sample that validation averages few-step likelihoods over.
        inversion: How maps that only go to data are inverted.
        reference: Solver of the likelihood of the network's own velocity, for comparison.
        reference_samples: Samples per evaluation that are compared with it, the first ones of the data; 0 for none.
        fit_samples: Samples that the baseline and the head's scale are set from, once.
        backward: Which ``manual_backward`` of a training step carries the added loss, from 0, in manual optimisation;
            by default the first one while the network's parameters require gradients (a GAN's generator).
        check: Compare the adapter with the network and a batch before the first step.

    Raises:
        ValueError: If numbers are out of range; at the start of a run, before its first step, if the network is not
            there, does not fit the adapter, or two callbacks are on one network.
    """

    def __init__(
        self,
        flow_map: str,
        adapter: Adapter | None = None,
        features: str | None = None,
        interval: str | None = None,
        teacher: Callable[..., Tensor] | None = None,
        head: DivergenceHead | None = None,
        objective: Objective | None = None,
        estimator: DivergenceEstimator | None = None,
        frozen: bool = False,
        weight: float = 1.0,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        follow_schedule: bool = True,
        gradient_clip: float | None = 1.0,
        ema_decay: float = 0.999,
        data_to_state: Callable[[Any], tuple[Tensor, Tensor | None]] | str | None = None,
        levels: int | None = None,
        low: float = -1.0,
        high: float = 1.0,
        steps: Sequence[int] = (1, 2, 4, 8),
        draws: int = 1,
        inversion: Inversion | None = None,
        reference: Reference | None = None,
        reference_samples: int = 128,
        fit_samples: int = 2048,
        backward: int | None = None,
        check: bool = True,
    ) -> None:
        theirs = getattr(teacher, "quantization", None)
        if levels is None and isinstance(theirs, Quantization):
            levels, low, high = theirs.levels, theirs.low, theirs.high
        if not low < high:
            raise ValueError(f"low={low} and high={high} are the edges of the data's range; low < high is needed")
        if not 0 <= ema_decay < 1 or not weight > 0 or fit_samples < 2 or reference_samples < 0:
            raise ValueError(
                f"ema_decay={ema_decay} lies in [0, 1), weight={weight} is positive, fit_samples={fit_samples} is at "
                f"least 2, reference_samples={reference_samples} at least 0"
            )
        if frozen and interval is not None:
            raise ValueError("interval= adds a direction by training the network, and frozen=True does not train it")
        self.flow_map = flow_map
        self.adapter = adapter or Adapter()
        self.features, self.interval = features, interval
        self.teacher, self.head = teacher, head
        directions = Direction.BOTH if interval is not None else self.adapter.directions
        if directions == Direction.NONE:
            raise ValueError(
                f"{self.adapter!r} is of an instantaneous velocity, which makes no jumps; distil it with "
                "F2D2Module(teacher=...), or give interval= to train it into a flow map here"
            )
        self.objective = objective or TrajectoryRegression(
            capacity=2048,
            max_mib=64.0,
            refresh=8.0,
            chunk=256,
            starts={"data": 0.3, "mixed": 0.2, "path": 0.1, "noise": 0.4},
            intervals=Intervals(directions),
        )
        if self.objective.directions != directions:
            raise ValueError(
                f"the objective trains {self.objective.directions}, but the adapter declares {directions}; a map that "
                "answers for a direction it never saw gives wrong likelihoods: set directions of both alike"
            )
        self._quantize(levels, low, high)
        if isinstance(theirs, Quantization) and theirs != self.quantization:
            raise ValueError(
                f"the teacher was trained on {theirs}, F2D2Callback has {self.quantization}; make them agree"
            )
        self.estimator = estimator or Hutchinson()
        self.frozen, self.weight = frozen, weight
        self.optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99))
        self.follow_schedule, self.gradient_clip, self.ema_decay = follow_schedule, gradient_clip, ema_decay
        self.states = BatchStates(data_to_state, conditional=self.adapter.conditional)
        self.steps = tuple(steps)
        check_draws(draws, levels)
        self.draws = draws
        self.inversion = inversion or Inversion()
        # what the network can be differentiated by is the same for its targets and its likelihood
        self.reference = reference or Reference(steps=50, mode=self.estimator.mode)
        self.reference_samples, self.fit_samples = reference_samples, fit_samples
        self.backward, self.check = backward, check
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))
        self._added: AddedWeights | None = None
        self._pending: Mapping[str, Any] | None = None
        self._own: dict[str, Any] = {}
        self._network: nn.Module
        self._looked_at = ""  # the stage whose first batch was
        self._student: JointFlowMap | None = None
        self._before_trial: dict[str, Any] | None = None
        self._evaluation: LikelihoodEvaluation | None = None
        self._forget_step()

    def _quantize(self, levels: int | None, low: float, high: float) -> None:
        self.levels, self.low, self.high = levels, low, high
        self.quantization = None if levels is None else Quantization(levels, low, high)
        self.objective.quantize(self.quantization)

    # --- the maps ---

    @property
    def state_key(self) -> str:
        return self._generate_state_key(flow_map=self.flow_map)

    @property
    def has_head(self) -> bool:
        """Whether there is a divergence head yet: training has started, or a checkpoint was restored."""
        return self._added is not None

    @property
    def added(self) -> AddedWeights:
        """Head and added embedding, their optimiser and average.

        Raises:
            RuntimeError: Before training, or before a checkpoint was restored.
        """
        if self._added is None:
            raise RuntimeError(
                "there is no divergence head yet: it is made when training starts (Trainer.fit), or restored from a "
                "checkpoint that was saved with this callback (ckpt_path=...)"
            )
        return self._added

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one state, known once data or a checkpoint have shown it.

        Raises:
            RuntimeError: Before that.
        """
        if self.states.shape is None:
            raise RuntimeError("the shape of the states is not known before training starts, or a checkpoint is read")
        return self.states.shape

    @property
    def joint(self) -> JointFlowMap:
        """The network with the average of the added weights: what validates and answers."""
        return JointFlowMap(self._mapped("average"), self._head("average"))

    def log_prob(self, x: Tensor, steps: int | Sequence[float] = 4, cond: Tensor | None = None) -> LogProb:
        """Log-likelihood of states at ``t = 1``, nats; see :func:`f2d2_lightning.log_prob`."""
        joint = self.joint
        check_shape(x, self.shape)
        inversion = None if Direction.TO_NOISE in joint.directions else self.inversion
        with evaluating(self._network):
            return log_prob(joint, x, steps, cond, inversion=inversion)

    def sample(
        self,
        noise: int | Tensor,
        steps: int | Sequence[float] = 4,
        cond: Tensor | None = None,
        *,
        with_log_prob: bool = False,
        guidance: SelfGuidance | None = None,
    ) -> Samples:
        """Samples from a number of draws or from given noise; see :func:`f2d2_lightning.sample`.

        With ``guidance`` towards higher likelihood, see :class:`f2d2_lightning.SelfGuidance`.
        """
        joint = self.joint
        if isinstance(noise, int):
            noise = draw_noise(noise, self.shape, next(self._network.parameters()).device)
        check_shape(noise, self.shape)
        with evaluating(self._network):
            if guidance is not None:
                return guidance(joint, noise, steps, cond, log_prob=with_log_prob)
            return sample(joint, noise, steps, cond, log_prob=with_log_prob)

    def export(self, path: str | Path) -> None:
        """Write network, head and conventions to one file, for :func:`f2d2_lightning.load_joint`.

        Under FSDP every process must call it; the first one writes.
        """
        state = whole_state(self._network)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            save_joint(self.joint, path, self.shape, state)

    def _head(self, kind: str) -> DivergenceHead:
        """The head in training (``"live"``) or its average (``"average"``)."""
        head = getattr(self.added, kind)["head"]
        assert isinstance(head, DivergenceHead)
        return head

    def _mapped(self, kind: str) -> AdaptedFlowMap:
        """The network through its adapter, with the added interval, if any, in training or averaged."""
        modules = getattr(self.added, kind)
        if "interval" not in modules:
            return self.adapter(self._network, features=self.features)
        mapped = self.adapter(self._network, features=self.features, directions=Direction.BOTH)
        mapped.interval_name, mapped.interval = self.interval, modules["interval"]
        return mapped

    # --- finding the network, wrapping the module ---

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and wrap the module's methods."""
        if not isinstance(pl_module, L.LightningModule):
            raise ValueError(
                f"{type(pl_module).__name__} is no lightning.LightningModule, but perhaps one of pytorch_lightning, "
                "whose classes are others: write `import lightning as L` in place of `import pytorch_lightning as pl`, "
                "for the module and for the Trainer"
            )
        if str(trainer.precision) in HALF:
            rank_zero_warn(
                f"with precision={trainer.precision!r} the network computes in half precision, and likelihoods are "
                "those of its rounded answers, off by a percent of their divergence; head and states stay in float32. "
                "'bf16-mixed' and '32-true' keep weights whole"
            )
        data = getattr(trainer, "datamodule", None)
        theirs = getattr(data, "quantization", None)
        if self.levels is None and isinstance(theirs, Quantization):
            self._quantize(theirs.levels, theirs.low, theirs.high)
        compare_ranges("F2D2Callback", self.quantization, data)
        self._looked_at = ""
        if not is_overridden("configure_model", pl_module):
            self._find(pl_module)
        self._trainer, self._module = trainer, pl_module
        self._wrap("on_save_checkpoint", self._saving)
        if stage == "fit":
            self._check_signature(pl_module)
            self._wrap("training_step", self._stepping)
            self._wrap("manual_backward", self._backward)

    def _find(self, pl_module: L.LightningModule) -> None:
        network = find_submodule(pl_module, self.flow_map)
        # compiled code is left to the module's own training: features and derivatives come from the code behind it
        original = getattr(network, "_orig_mod", network)
        assert isinstance(original, nn.Module)
        self._network = original

    def _check_signature(self, pl_module: L.LightningModule) -> None:
        import inspect

        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError(
                f"{type(pl_module).__name__}.training_step takes dataloader_iter, so its batches are not seen; write "
                "training_step(batch, batch_idx), or compute the loss by hand (f2d2_lightning.JointFlowMap)"
            )

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        before = vars(self._module).get(name)
        original = getattr(self._module, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self._own[name] = before
        setattr(self._module, name, wrapped)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own methods back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """As teardown, which does not come then."""
        self._restore()

    def _restore(self) -> None:
        self._student = None
        for name, before in self._own.items():
            if before is None:
                vars(self._module).pop(name, None)
            else:
                setattr(self._module, name, before)
        self._own = {}

    # --- making the head ---

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The network exists by now, also where ``configure_model`` makes it."""
        self._find(pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, F2D2Callback) and other is not self and vars(other).get("_network") is self._network:
                raise ValueError(
                    f"two F2D2Callbacks are on one network, {self.flow_map!r} and {other.flow_map!r}; keep one of them"
                )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put Lightning's counts right."""
        mend_progress(checkpoint)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make or restore the head, check the adapter, set baseline and scale from data, and share them."""
        begin_epoch(trainer)
        if self._before_trial is not None:
            # what a Tuner tried out is no part of the run
            self.objective.load_state_dict(self._before_trial)
            self._before_trial = None
            if self.added.steps == 0:
                self._added = None
        self._start(trainer, pl_module)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"), torch.random.fork_rng([]):
            torch.manual_seed(mix_seed(self._seed, "start"))
            x, cond = self._state(next(training_batches(trainer, self.fit_samples)))
            flow_map = self.adapter(self._network, features=self.features, interval=self.interval).to(pl_module.device)
            if self.check:
                check_convention(flow_map, x, cond, self.estimator.mode)
                if self.teacher is not None:
                    check_differentiable(self.teacher, x, cond, self.estimator.mode)
            if self._added is None:
                self._assemble(self._make_head(flow_map, x, cond), flow_map.interval, pl_module.device)
            self._prepare_training()
            if self._pending is not None:
                self._restore_pending()
            elif self.added.steps == 0:
                self._fit(trainer)

    def _make_head(self, flow_map: AdaptedFlowMap, x: Tensor, cond: Tensor | None) -> DivergenceHead:
        if self.head is not None and not self.head.reads_features:
            return self.head
        with evaluating(self._network), torch.no_grad():
            low, high = (0.25, 0.75) if Direction.TO_DATA in flow_map.directions else (0.75, 0.25)
            features = flow_map.forward_features(x, low, high, cond)[1]
        channels = features.shape[1]
        if self.head is None:
            return DivergenceHead(
                channels, per_axis=features.ndim == 2, baseline=GaussianBaseline(x.shape[1:], "diagonal")
            )
        if self.head.features != channels:
            raise ValueError(
                f"the head reads {self.head.features} feature channels, and {self.flow_map!r} gives {channels} (from "
                f"{flow_map.tap.layer if flow_map.tap else None!r}); set DivergenceHead(features={channels})"
            )
        return self.head

    def _assemble(self, head: DivergenceHead, interval: nn.Module | None, device: torch.device) -> None:
        live = nn.ModuleDict({"head": head} | ({} if interval is None else {"interval": interval})).to(device).train()
        self._added = AddedWeights(live, self.optimizer, self.ema_decay, self.gradient_clip)

    def _prepare_training(self) -> None:
        mapped = self._mapped("live")
        held = HeldFlowMap(mapped)
        self.added.optimizer.zero_grad(set_to_none=True)
        self._student = JointFlowMap(held if self.frozen else mapped, self._head("live"))
        self._source: VelocitySource
        if self.teacher is None:
            if mapped.endpoint_only:
                raise ValueError(
                    f"{self.flow_map!r} maps to data only and has no instantaneous velocity to learn divergences from; "
                    "give F2D2Callback the teacher that it was distilled from, or interval='name of the time embedding'"
                )
            self._source = TeacherSource(held.velocity, self.estimator, stationary=False)
        else:
            self.teacher = kept_apart(self.teacher, self._network)
            if isinstance(self.teacher, nn.Module):
                # nothing is differentiated with respect to its weights, whose owner may want to train them elsewhere
                self.teacher.eval().to(self._module.device)
            self._source = TeacherSource(self.teacher, self.estimator)

    @torch.no_grad()
    def _fit(self, trainer: L.Trainer) -> None:
        head = self._head("live")
        states = [self._state(batch) for batch in training_batches(trainer, self.fit_samples)]
        if head.baseline is not None and not bool(head.baseline.fitted):
            head.baseline.fit(x for x, _ in states)
        head.scale.fill_(measure_scale(head, self._source, states, self.objective.path))
        # every process saw the same samples; broadcast all the same, for data that differ between machines
        self.added.broadcast()

    def _state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """States and conditioning; the first states of each stage are compared with levels and range."""
        x, cond = self.states(batch, self._module)
        stage = str(self._trainer.state.stage)
        if self._looked_at != stage:
            check_values(x, self.quantization)
            self._looked_at = stage
        return x, cond

    # --- training ---

    def _forget_step(self) -> None:
        self._due: tuple[Any, int] | None = None
        self._backwards = 0
        self._stepped = False
        self._gradient_scale = 1.0

    def _stepping(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._student is None:
            # a Tuner takes steps of a run that has not begun, without its callbacks
            self._before_trial = self.objective.state_dict()
            self._find(self._module)
            self._start(self._trainer, self._module)
        batch = args[0] if args else kwargs["batch"]
        index = int(kwargs.get("batch_idx", args[1] if len(args) > 1 else 0))
        self._forget_step()
        if self._module.automatic_optimization:
            output = original(*args, **kwargs)
            if output is None:  # the module leaves this batch out
                return None
            own = output["loss"] if isinstance(output, Mapping) else output
            total = own + self._loss(batch, index).to(own)
            return {**output, "loss": total} if isinstance(output, Mapping) else total
        self._due = batch, index
        output = original(*args, **kwargs)
        if self._due is not None and (self._backwards > 0 or self._stepped):
            raise RuntimeError(
                f"{type(self._module).__name__}.training_step called manual_backward {self._backwards} times, none of "
                f"which the added loss could go with (backward={self.backward}; the parameters of {self.flow_map!r} "
                "must require gradients then); use self.manual_backward(loss) instead of loss.backward(), and say "
                "which call: F2D2Callback(backward=0)"
            )
        return output

    def _backward(self, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        index, self._backwards = self._backwards, self._backwards + 1
        if self._due is not None and self._carries(index):
            (batch, batch_index), self._due = self._due, None
            loss = loss + self._loss(batch, batch_index).to(loss)
        original(loss, *args, **kwargs)

    def _carries(self, index: int) -> bool:
        if self.backward is not None:
            return index == self.backward
        return self.frozen or any(p.requires_grad for p in self._network.parameters())

    def _loss(self, batch: Any, batch_index: int) -> Tensor:
        trainer, module = self._trainer, self._module
        assert self._student is not None
        x, cond = self._state(batch)
        devices = [x.device] if x.device.type == "cuda" else []
        parts = (self._seed, trainer.current_epoch, batch_index)
        total = trainer.estimated_stepping_batches
        with torch.random.fork_rng(devices):
            torch.manual_seed(mix_seed(*parts, trainer.global_rank))
            if trainer.world_size > 1:
                # processes may share a sharded network, and must call it equally often
                self.objective.structure = torch.Generator().manual_seed(mix_seed(*parts, "structure"))
            progress = min(1.0, trainer.global_step / max(1.0, total))
            terms = self.objective(self._student, self._source, x, cond, progress=progress)
        named = {f"train/f2d2_{name}": value.detach() for name, value in terms._asdict().items()}
        module.log_dict(named, batch_size=len(x))
        return self.weight / x[0].numel() * terms.loss

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The head's gradients are there as well now; in manual optimisation they may still grow within the batch."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._gradient_scale = 1.0 if scaler is None else float(scaler.get_scale())
        if pl_module.automatic_optimization:
            self._step(trainer)
        else:
            self._stepped = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In manual optimisation the head steps once in a batch in which an optimiser of the module did."""
        if self._stepped:
            self._stepped = False
            self._step(trainer)

    def _step(self, trainer: L.Trainer) -> None:
        factor = 1.0
        if self.follow_schedule and trainer.optimizers:
            group = trainer.optimizers[0].param_groups[0]
            peak = group.get("max_lr", group.get("initial_lr", group["lr"]))
            factor = float(group["lr"]) / float(peak) if peak else 1.0
        self.added.step(self._gradient_scale, factor)

    # --- evaluation ---

    def _start_evaluation(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluation = None
        if trainer.sanity_checking:
            return
        self._find(pl_module)
        self._module = pl_module
        if self._added is None and self._pending is not None:
            self._make_from(self._pending, pl_module.device)
            self._restore_pending()
        if self._added is None:
            warnings.warn(
                "F2D2Callback has no trained head to evaluate; pass a checkpoint that was saved with it "
                "(ckpt_path=...), or fit first",
                stacklevel=2,
            )
            return
        self.added.to(pl_module.device)
        self._places = Places(trainer)
        dim = math.prod(self.shape)
        self._evaluation = LikelihoodEvaluation(
            self.steps, dim, self.levels, self.low, self.high, pl_module.device, self.draws
        )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start afresh."""
        self._start_evaluation(trainer, pl_module)

    on_test_epoch_start = on_validation_epoch_start

    @torch.no_grad()
    def _evaluate(self, batch: Any, loader: int) -> None:
        evaluation = self._evaluation
        if evaluation is None:
            return
        x, cond = self._state(batch)
        place, counted = self._places.take(len(x), loader)
        compared = int((counted & (place < self.reference_samples)).sum())  # places ascend
        velocity = self.reference_velocity()
        reference = error = None
        if compared > 0 and velocity is not None:
            with evaluating(self._network):
                answer = self.reference(velocity, x[:compared], None if cond is None else cond[:compared])
            reference, error = answer.value, answer.standard_error
        goes_back = Direction.TO_DATA in self.joint.directions
        evaluation.evaluate(self.log_prob, self.sample if goes_back else None, x, cond, reference, error, counted)

    def reference_velocity(self) -> Callable[..., Tensor] | None:
        """``(x, t, cond) -> v`` that likelihoods are compared with: the teacher's, else the network's own diagonal.

        ``None`` for a network that has no velocity (a consistency model).
        """
        flow_map = self._mapped("average")
        return self.teacher or (None if flow_map.endpoint_only else flow_map.velocity)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Few-step likelihoods of the batch."""
        self._evaluate(batch, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def _log(self, pl_module: L.LightningModule, stage: str) -> None:
        if self._evaluation is None:
            return
        inverted = Direction.TO_NOISE not in self.joint.directions
        for name, value in self._evaluation.results().items():
            if inverted or not name.startswith("unconverged") or bool(value > 0):
                pl_module.log(f"{stage}/f2d2_{name}", value)
        if doubts := self._evaluation.doubts():
            rank_zero_warn(doubts)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was gathered."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was gathered."""
        self._log(pl_module, "test")

    # --- checkpoints ---

    def _saving(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        # through the module's hook as well: weights-only checkpoints leave out everything of callbacks
        self._describe(checkpoint)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What :func:`f2d2_lightning.load_joint` needs, beside the state that a resumed run needs."""
        self._describe(checkpoint)

    def _describe(self, checkpoint: dict[str, Any]) -> None:
        if self._added is not None:
            checkpoint.setdefault(CHECKPOINT_KEY, {})[self.flow_map] = describe_joint(self.joint, self.shape)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run or an evaluation needs."""
        if self._added is None:
            return dict(self._pending or {})
        return {
            "seed": self._seed,
            "shape": list(self.shape),
            "range": [self.levels, self.low, self.high],
            "head": self._head("live").config(),
            "added": self._added.state_dict(),
            "objective": gather_states(self.objective.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken over once network and data are there."""
        self._pending = state_dict or None

    def _make_from(self, state: Mapping[str, Any], device: torch.device) -> None:
        head = self.head or DivergenceHead.from_config(state["head"])
        self.states.shape = tuple(state["shape"])
        interval = self.adapter(self._network, interval=self.interval).interval
        self._assemble(head, interval, device)

    def _restore_pending(self) -> None:
        state, self._pending = self._pending, None
        assert state is not None
        if tuple(state["shape"]) != self.shape:
            raise ValueError(
                f"the checkpoint's head is for states of shape {tuple(state['shape'])}, the data have {self.shape}"
            )
        kept = tuple(state.get("range", (self.levels, self.low, self.high)))
        if self.levels is None and kept[0] is not None:
            self._quantize(*kept)
        if kept[0] is not None and kept != (self.levels, self.low, self.high):
            raise ValueError(
                f"the checkpoint's head is for levels, low and high {kept}, F2D2Callback has "
                f"{(self.levels, self.low, self.high)}; give it those of the run that is resumed"
            )
        self._seed = state["seed"]
        self.added.load_state_dict(state["added"])
        self.objective.load_state_dict(own_state(state["objective"]))
