"""What the LightningModules share: optimisation, weight average, reproducible steps, data, likelihood metrics."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from f2d2_lightning.adapters import check_differentiable
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.reference import Reference
from f2d2_lightning.likelihood.sampling import check_cond
from f2d2_lightning.metrics.evaluation import clock
from f2d2_lightning.modules._compile import compile_network
from f2d2_lightning.modules.ema import update_average, warmed_decay
from f2d2_lightning.nn.head import JointFlowMap
from f2d2_lightning.training.batches import FIT_SAMPLES, check_precision, check_values, compare_ranges
from f2d2_lightning.training.loading import read_checkpoint, restore_module
from f2d2_lightning.training.progress import begin_epoch, mend_progress
from f2d2_lightning.utils.class_names import agree_on_classes, as_names
from f2d2_lightning.utils.fingerprints import network_hash, update_with
from f2d2_lightning.utils.processes import Places, gather_states
from f2d2_lightning.utils.seeding import mix_seed
from f2d2_lightning.utils.sharding import all_finite, is_sharded, shard, whole

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FlowModule", "object_names", "warmup_cosine"]


class FlowModule(L.LightningModule):
    """What teacher and student share: optimisation, weight average, reproducible steps, data, likelihood metrics.

    Each training step seeds the random state from (seed, epoch, batch, process), so that a resumed run draws what the
    uninterrupted one would have drawn.

    Args:
        shape: Shape of one state, ``(d,)`` or ``(C, H, W)``.
        levels: Levels of discrete data, for bits per dimension; ``None`` for continuous data, reported in nats.
        low: Lower edge of the range that the levels fill.
        high: Upper edge.
        optimizer: Makes the optimiser from the trainable parameters; AdamW at 1e-3 by default.
        lr_scheduler: Makes a schedule stepped every optimiser step; by default ``warmup`` steps of linear rise, then a
            cosine to zero at the end of training.
        warmup: Steps of linear rise of the default schedule.
        ema_decay: Decay of the weight average that validates, samples and answers; 0 for none.
        reference: Solver of reference likelihoods.
        channels_last: Keep the weights of convolutions with channels as the last axis in memory, which their kernels
            like, on GPUs with half precision above all.
        compile: Compile the backbone, in training and averaged, with ``torch.compile``: ``True``, or the name of a mode
            or of a backend; see :func:`f2d2_lightning.modules._compile.compile_network`. Forward-mode derivatives
            (divergences, the Lagrangian and Eulerian objectives' targets) run the code as it was written. Names in
            checkpoints are the same with and without.
    """

    average: nn.Module

    def __init__(
        self,
        shape: Sequence[int],
        levels: int | None,
        low: float,
        high: float,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        warmup: int,
        ema_decay: float,
        reference: Reference | None,
        channels_last: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1 or warmup < 0:
            raise ValueError(f"ema_decay={ema_decay} lies in [0, 1) and warmup={warmup} is at least 0")
        if not low < high:
            raise ValueError(f"low={low} and high={high} are the edges of the data's range; low < high is needed")
        self.shape = tuple(shape)
        self.dim = math.prod(self.shape)
        self.levels, self.low, self.high = levels, low, high
        self.optimizer, self.lr_scheduler, self.warmup = optimizer, lr_scheduler, warmup
        self.ema_decay = ema_decay
        self.class_names: list[str] | None = None
        """Names of the classes in the order of their labels (:mod:`f2d2_lightning.utils.class_names`)."""
        self.reference = reference or Reference()
        self.channels_last, self.compile_how = channels_last, compile
        self.lr: float | None = None
        """Learning rate in place of the optimiser's own, which ``Tuner.lr_find`` sets; ``None`` leaves it."""
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))
        self._averaged_steps = 0
        self._batch: Any = None
        self._batch_index = 0
        self._references: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._identities: dict[int, tuple[nn.Module, str]] | None = None
        # whose derivative was compared with differences; in a tuple, so that it is no submodule
        self._compared: tuple[Any, ...] = ()
        self._reference_cost = (0.0, 0)  # seconds, evaluations per sample
        self._looked_at = ""  # the stage whose first batch was

    # --- what a subclass may override ---

    def data_to_state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """State at ``t = 1`` and conditioning from a batch; override for batches of another form.

        A batch is states ``(B, *shape)`` or a sequence whose first items are states and conditioning.

        Raises:
            ValueError: If the states have another shape than the module's.
        """
        x, cond = batch, None
        if isinstance(batch, (tuple, list)) and batch:
            x, cond = batch[0], batch[1] if len(batch) > 1 else None
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != self.shape:
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"a batch of states has {came}, but the module was made for (B, {', '.join(map(str, self.shape))}); "
                "set shape to that of the data, or override data_to_state"
            )
        if self.conditional is False:
            return x, None
        check_cond(cond, len(x))
        return x, cond

    def state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """:meth:`data_to_state`; the first states of each stage are compared with ``levels``, ``low`` and ``high``.

        Raises:
            ValueError: If they are of another range, or were never dequantized.
        """
        x, cond = self.data_to_state(batch)
        stage = "" if self._trainer is None else str(self._trainer.state.stage)
        if self._looked_at != stage or not x.is_floating_point():
            check_values(x, self.quantization)
            self._looked_at = stage
        return x.to(self.dtype), cond

    @property
    @abstractmethod
    def live(self) -> nn.Module:
        """The model in training, which ``average`` follows."""

    @property
    def conditional(self) -> bool | None:
        """Whether the backbone needs ``cond``; ``False``: labels of the data are left out, ``None``: passed on."""
        return getattr(self.live, "conditional", None)

    @property
    def quantization(self) -> Quantization | None:
        """Levels and range of discrete data; ``None`` for continuous data."""
        return None if self.levels is None else Quantization(self.levels, self.low, self.high)

    # --- set-up ---

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        trust: Sequence[str] = (),
        **kwargs: Any,
    ) -> Self:
        """As Lightning's, but nothing that the checkpoint says is run (:mod:`f2d2_lightning.checkpoints.trust`).

        Args:
            checkpoint_path: A local file.
            map_location: Device of the module; the CPU by default.
            hparams_file: Not taken: hyper-parameters are in the checkpoint.
            strict: Whether names of weights must be the same.
            weights_only: Always the case; ``False`` is refused.
            trust: Packages whose classes the checkpoint may name, besides this package, ``torch.nn``, ``torch.optim``
                and the package of this class.
            kwargs: Arguments that the checkpoint does not hold, or that replace its.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the checkpoint is damaged, of another class, or names a class that is not trusted.
        """
        if hparams_file is not None or weights_only is False:
            raise ValueError(
                "hyper-parameters are read from the checkpoint, as plain values: leave out hparams_file and "
                "weights_only=False, and give objects as keyword arguments"
            )
        checkpoint = read_checkpoint(checkpoint_path)
        module = restore_module(checkpoint, checkpoint_path, cls, trust, strict, kwargs)
        return module if map_location is None else module.to(map_location)

    def _speed_up(self) -> None:
        """Memory format and compilation of the backbones; the last thing that a subclass's ``__init__`` does."""
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if self.compile_how:
            for part in (self.live, self.average):
                compile_network(part.flow_map if isinstance(part, JointFlowMap) else part, self.compile_how)

    def setup(self, stage: str) -> None:
        """Compare the module's data settings with the data module's."""
        # the average evaluates on purpose, and Lightning takes that for a mistake
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
        check_precision(self.trainer)
        self._looked_at = ""
        compare_ranges("the module", self.quantization, getattr(self.trainer, "datamodule", None), self.shape)
        self._follow_classes(self.class_names)

    def _follow_classes(self, known: list[str] | None) -> None:
        """Keep the names of classes that are known, else the data's; labels of the data follow."""
        if self._trainer is not None and self.conditional:
            known = agree_on_classes(getattr(self.trainer, "datamodule", None), known)
        self.class_names = known

    @torch.no_grad()
    def fit_baselines(self) -> None:
        """Fit every Gaussian baseline that is not fitted yet to the training data."""
        baselines = [m for m in self.live.modules() if isinstance(m, GaussianBaseline)]
        for baseline in baselines:
            if baseline.fitted:
                continue
            # the head's and the backbone's are often alike; one pass then serves both
            twins = [
                b for b in baselines if b.fitted and (b.shape, b.covariance) == (baseline.shape, baseline.covariance)
            ]
            if twins:
                baseline.load_state_dict(twins[0].state_dict())
            else:
                states = (self.state(batch)[0] for batch in self.training_batches())
                baseline.fit(states, reduce=self.sum_over_processes)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes, each of which sees a part of the training data."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum").cpu()

    def training_batches(self) -> Iterable[Any]:
        """One pass over the trainer's training data, as batches; of data that have no end the first 131,072 samples."""
        loader = self.trainer.train_dataloader
        if loader is None:
            raise RuntimeError("there are no training data yet; call this from on_train_start or later")
        try:
            len(loader)
        except (TypeError, NotImplementedError, AttributeError):
            count = max(1, FIT_SAMPLES // (getattr(loader, "batch_size", None) or 1))
            rank_zero_info(
                f"the training data have no length: what is set from them comes from {count} batches at most"
            )
            return itertools.islice(loader, count)
        return loader

    def configure_model(self) -> None:
        """Shard model and average over processes under ``ModelParallelStrategy`` (FSDP2); nothing otherwise."""
        # load_from_checkpoint asks for this without a trainer
        if isinstance(getattr(self._trainer, "strategy", None), ModelParallelStrategy):
            if self.channels_last or self.compile_how:
                raise ValueError(
                    f"channels_last={self.channels_last} and compile={self.compile_how!r} are for whole networks, and "
                    "ModelParallelStrategy spreads them over processes; leave both out, or use another strategy"
                )
            for module in self.to_shard():
                shard(module, self.device_mesh["data_parallel"])  # type: ignore[index]

    def to_shard(self) -> list[nn.Module]:
        """Networks that are sharded, each on its own; override it with a network's own layers."""
        return [self.live, self.average]

    def _copy_to_average(self) -> None:
        update_average(self.average, self.live, 0.0)

    @property
    def trained(self) -> bool:
        """Whether there is something to lose: the average has left the weights, or a checkpoint was loaded."""
        if self._averaged_steps > 0:
            return True
        pairs = zip(self.average.parameters(), self.live.parameters(), strict=True)
        return not is_sharded(self.live) and any(not torch.equal(mine, theirs) for mine, theirs in pairs)

    def on_train_start(self) -> None:
        """First start only: fit baselines to the training data, start the average at the weights.

        A module that was trained before goes on from where it is, whichever trainer trains it.
        """
        begin_epoch(self.trainer)
        if self.trained:
            # where nothing says how old the average is (``load_state_dict``), it is not taken for a young one
            self._averaged_steps = self._averaged_steps or 10**9
        elif self.trainer.global_step == 0:
            self.fit_baselines()
            self.prepare()
            self._copy_to_average()

    def prepare(self) -> None:
        """Anything else that is set from data or teacher once, before the first step."""

    def train(self, mode: bool = True) -> FlowModule:
        """Training mode; the average always evaluates."""
        super().train(mode)
        if "average" in self._modules:
            self.average.eval()
        return self

    def configure_optimizers(self) -> Any:
        """Optimiser over the trainable parameters, schedule per step."""
        parameters = [p for p in self.live.parameters() if p.requires_grad]
        # biases and gains are not decayed, whatever the optimiser's weight_decay
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.ndim > 1]}]
        if vectors := [p for p in parameters if p.ndim <= 1]:
            groups.append({"params": vectors, "weight_decay": 0.0})
        optimizer = self.optimizer(groups) if self.optimizer else torch.optim.AdamW(groups, lr=1e-3)
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
        else:
            factor = warmup_cosine(self.warmup, lambda: self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- training ---

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        torch.manual_seed(mix_seed(self._seed, self.trainer.current_epoch, batch_idx, self.global_rank))
        self._batch, self._batch_index = batch, batch_idx

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a step that would make the weights NaN.

        Raises:
            FloatingPointError: Says where the first NaN or infinity is.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # a gradient scaler leaves such steps out by itself
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not bool(whole(torch.nn.utils.get_total_norm(gradients)).isfinite()):
            raise FloatingPointError(self._not_finite())

    def _not_finite(self) -> str:
        """What to say of a gradient that is NaN or infinite."""
        bad = [name for name, p in self.live.named_parameters() if p.grad is not None and not all_finite(p.grad)]
        batch = self._batch if isinstance(self._batch, (tuple, list)) else (self._batch,)
        data = any(isinstance(part, Tensor) and not all_finite(part) for part in batch)
        cause = (
            "the batch itself holds NaN or infinity: look at the data"
            if data
            else "the batch is finite: lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at "
            "the teacher's samples"
        )
        where = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "") or "their norm overflows"
        step, epoch = self.trainer.global_step + 1, self.trainer.current_epoch
        return (
            f"training stopped before optimiser step {step} (epoch {epoch}, batch {self._batch_index}): the gradient "
            f"is NaN or infinite in {len(bad)} parameters ({where}), and {cause}. The weights are as they were before "
            "it, and so is the last checkpoint"
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, then the average's: before any checkpoint of this step is written."""
        super().optimizer_step(*args, **kwargs)
        self._averaged_steps += 1
        update_average(self.average, self.live, warmed_decay(self.ema_decay, self._averaged_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run needs besides weights.

        Raises:
            FloatingPointError: If a weight is NaN or infinite: such a state is not saved over a good one.
        """
        bad = [name for name, value in self.state_dict().items() if isinstance(value, Tensor) and not all_finite(value)]
        # all processes stop where one holds a share that is bad
        if bad := [name for names in gather_states(bad) for name in names]:
            raise FloatingPointError(
                f"nothing was saved: {len(bad)} weights or buffers are NaN or infinite, first {bad[0]}; the last "
                "checkpoint is from before that. Lower the learning rate or clip gradients (trainer.gradient_clip_val)"
            )
        checkpoint["f2d2"] = {"seed": self._seed, "averaged_steps": self._averaged_steps, "classes": self.class_names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of :meth:`on_save_checkpoint`."""
        mend_progress(checkpoint)
        state = checkpoint.get("f2d2", {})
        self._seed = state.get("seed", self._seed)
        self._averaged_steps = state.get("averaged_steps", 0)
        names = as_names(state.get("classes"), "the checkpoint")
        self._follow_classes(self.class_names if names is None else names)
        said = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if said.get("levels") is not None or self.levels is not None:
            for name in ("levels", "low", "high"):
                if name in said and said[name] is not None and said[name] != getattr(self, name):
                    raise ValueError(
                        f"the checkpoint is of a model with {name}={said[name]}, and this module has "
                        f"{name}={getattr(self, name)}: bits per dimension would be others; give it "
                        f"{name}={said[name]} (in a configuration: model.init_args.{name})"
                    )
        mine, theirs = self.state_dict(), checkpoint.get("state_dict", {})
        if theirs and not mine.keys() & theirs.keys():
            name = checkpoint.get("hyper_parameters", {}).get("_class_path", "another class")
            raise ValueError(
                f"the checkpoint is of {name}: none of its weights ({next(iter(theirs))}, ...) is one of this "
                f"{type(self).__name__}; give the checkpoint of this model, or the configuration of that one"
            )
        wrong = [
            f"{name}: checkpoint {tuple(value.shape)}, module {tuple(mine[name].shape)}"
            # a sharded checkpoint's weights are read later, into place
            for name, value in theirs.items()
            if name in mine and value.shape != mine[name].shape
        ]
        if wrong:
            raise ValueError(
                f"the checkpoint is of another model ({len(wrong)} tensors differ in shape; first: {wrong[0]}); "
                "use the configuration that was saved beside the checkpoint"
            )

    # --- likelihood metrics ---

    @property
    def unit(self) -> str:
        """Unit of logged likelihoods."""
        return "nats" if self.levels is None else "bits/dim"

    def on_validation_epoch_start(self) -> None:
        """Start afresh."""
        self._places, self._identities, self._compared = Places(self.trainer), {}, ()

    def on_validation_epoch_end(self) -> None:
        """Forget what held for this evaluation only."""
        self._identities = None

    def on_test_epoch_start(self) -> None:
        """As validation."""
        self.on_validation_epoch_start()

    def reference_log_prob(self, x: Tensor, cond: Tensor | None, velocity: Any) -> Tensor:
        """Reference log-likelihood of a batch, ``(B,)``, nats; computed once per batch of points and kept."""
        return self.reference_and_error(x, cond, velocity)[0]

    def reference_and_error(self, x: Tensor, cond: Tensor | None, velocity: Any) -> tuple[Tensor, Tensor | None]:
        """:meth:`reference_log_prob` and its standard error over random probes, ``(B,)``, where that is known."""
        owner = getattr(velocity, "__self__", velocity)
        identity = self._identity(owner)
        digest = hashlib.sha1(f"{self.reference} {identity} {self.device}".encode())
        for part in (x,) if cond is None else (x, cond):
            update_with(digest, part)
        key = digest.hexdigest()
        if identity is None:
            self._references.clear()  # nothing tells what a function answers, but the function
        if key not in self._references:
            if not any(known is owner for known in self._compared):
                check_differentiable(velocity, x, cond, getattr(self.reference, "mode", "forward"))
                self._compared = (owner,)
            start = clock(self.device)
            answer = self.reference(velocity, x, cond)
            error = None if answer.standard_error is None else answer.standard_error.cpu()
            self._references[key] = answer.value.cpu(), error
            seconds, _ = self._reference_cost
            self._reference_cost = (seconds + clock(self.device) - start, answer.evaluations)
        value, error = self._references[key]
        return value.to(x.device), None if error is None else error.to(x.device)

    def _identity(self, owner: Any) -> str | None:
        """What a velocity's answers depend on: its weights; ``None`` if that is not known, or changes anyway."""
        if not isinstance(owner, nn.Module) or is_sharded(owner):
            return None
        # weights stay as they are during an evaluation
        if self._identities is None:
            return network_hash(owner)
        kept = self._identities.get(id(owner))
        if kept is None or kept[0] is not owner:
            kept = self._identities[id(owner)] = owner, network_hash(owner)
        return kept[1]


def warmup_cosine(warmup: int, total: Callable[[], float]) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear rise, then a cosine to zero.

    The number of steps is asked for only once training runs. Asking earlier makes Lightning set up the training data
    before a checkpoint's loop state is restored, and a resumed epoch then starts from its beginning.

    Args:
        warmup: Steps of linear rise.
        total: Gives the number of optimiser steps of the whole run.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step == 0:
            return 1.0
        progress = (step - warmup) / max(1.0, total() - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def object_names(arguments: dict[str, Any], *names: str) -> list[str]:
    """Names of arguments that hold objects: those are not hyper-parameters.

    A LightningCLI keeps their classes and arguments instead, so under one nothing is left out.
    """
    if _given_hyperparameters.get() is not None:
        return []
    return [name for name in names if arguments[name] is not None and not isinstance(arguments[name], (str, Path))]
