"""What the LightningModules share: optimisation, weight average, reproducible steps, data, likelihood metrics."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from f2d2_lightning.checkpoints.descriptions import describe_model
from f2d2_lightning.flows.gaussian import fit_baselines
from f2d2_lightning.likelihood._inputs import Array, as_cond, check_cond
from f2d2_lightning.likelihood.error_bars import kept_bars, read_bars
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.reference import Reference, ReferenceChoice
from f2d2_lightning.modules._checks import check_finite, check_same_model, not_finite
from f2d2_lightning.modules._compile import compile_network
from f2d2_lightning.modules._optimization import make_optimizers, optimizers_of
from f2d2_lightning.modules._ranges import RANGE, RangedModel
from f2d2_lightning.modules.ema import update_average, warmed_decay
from f2d2_lightning.nn._backbone import fit_conditions
from f2d2_lightning.nn.head import JointFlowMap
from f2d2_lightning.training.batches import FirstLook, all_training_batches, check_precision, check_trained
from f2d2_lightning.training.loading import read_checkpoint, restore_module
from f2d2_lightning.training.progress import begin_epoch, mend_progress
from f2d2_lightning.training.run_seed import RunSeed
from f2d2_lightning.utils.checks import at_least, check_arguments, counts
from f2d2_lightning.utils.class_names import agree_on_classes, as_names
from f2d2_lightning.utils.conditions import Cond, as_pair, halves
from f2d2_lightning.utils.processes import ends_with_run
from f2d2_lightning.utils.sharding import is_sharded, shard, whole, whole_weights

if TYPE_CHECKING:
    from typing_extensions import Self


class FlowModule(L.LightningModule, RangedModel):
    """What teacher and student share: optimisation, weight average, reproducible steps, data, likelihood metrics.

    Each training step seeds the random state from (seed, epoch, batch, process), so that a resumed run draws what the
    uninterrupted one would have drawn. Arguments that are not here are described at teacher and student.

    Args:
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
        low: float | None,
        high: float | None,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        warmup: int,
        ema_decay: float,
        reference: Reference | None,
        channels_last: bool = False,
        compile: bool | str = False,
    ) -> None:
        check_arguments(FlowModule.__init__, locals())
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay}; it lies in [0, 1)")
        at_least(0, warmup=warmup)
        self.shape = counts("shape", shape)
        self.say_range(levels, low, high)
        self.optimizer, self.lr_scheduler, self.warmup = optimizer, lr_scheduler, warmup
        self.ema_decay = ema_decay
        self.reference = reference or Reference()
        self.channels_last, self.compile_how = channels_last, compile
        self.lr: float | None = None
        """Learning rate in place of the optimiser's own, which ``Tuner.lr_find`` sets; ``None`` leaves it."""
        self.run_seed = RunSeed()
        self._averaged_steps = 0
        self._model_description: dict[str, Any] | None = None
        self._batch: Any = None
        self._batch_index = 0
        self._followed: list[Any] = []
        self._look = FirstLook()

    # --- what a subclass may override ---

    def data_to_state(self, batch: Any) -> tuple[Tensor, Cond | None]:
        """State at ``t = 1`` and conditioning from a batch; override for batches of another form.

        A batch is states ``(B, *shape)`` or a sequence whose first items are states and conditioning: a tensor, or a
        tuple or dictionary of them, each with first axis ``B``.

        Raises:
            ValueError: If the states have another shape than the module's.
        """
        x, cond = halves(batch)
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

    def state(self, batch: Any) -> tuple[Tensor, Cond | None]:
        """:meth:`data_to_state`; the first states of each stage are compared with ``levels``, ``low`` and ``high``.

        Raises:
            ValueError: If they are of another range, or were never dequantized.
        """
        x, cond = as_pair(self.data_to_state(batch), f"{type(self).__name__}.data_to_state")
        self._look(x, self.quantization, self.attached)
        x = x.to(self.dtype)
        return x, as_cond(cond, x)

    @property
    @abstractmethod
    def live(self) -> nn.Module:
        """The model in training, which ``average`` follows."""

    @property
    def joint_map(self) -> Any:
        return self.average

    @property
    def attached(self) -> L.Trainer | None:
        """The trainer, if there is one."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    def __repr__(self) -> str:
        # not the layers, which the summary of a Trainer lists
        return RangedModel.__repr__(self)

    def _fitting(self, x: Array, what: str = "x") -> Tensor:
        """States of the module's shape, in its precision."""
        x = super()._fitting(x, what)
        return x.to(self.dtype) if x.is_floating_point() else x

    @property
    def conditional(self) -> bool | None:
        """Whether the backbone needs ``cond``; ``False``: labels of the data are left out, ``None``: passed on."""
        return getattr(self.live, "conditional", None)

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
        """Take over what the data module says and the module was not told, and compare the rest."""
        # the average evaluates on purpose, and Lightning takes that for a mistake
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
        check_precision(self.trainer)
        self._look = FirstLook()
        said = self.quantization
        self.agree_with_data(getattr(self.trainer, "datamodule", None), self.shape, take=not self.trained)
        if stage == "fit" and self.quantization != said and ends_with_run(self.trainer):
            raise ValueError(
                f"the data say levels={self.levels}, low={self.low}, high={self.high}, and a strategy whose processes "
                f"end with the run does not bring that back; give them to {type(self).__name__}, or use strategy='ddp'"
            )
        self._follow_classes(self.class_names)

    def _follow_classes(self, known: list[str] | None) -> None:
        """Keep the names of classes that are known, else the data's; labels of the data follow."""
        if self.attached is not None and self.conditional:
            known = agree_on_classes(getattr(self.trainer, "datamodule", None), known)
        self.class_names = known

    @torch.no_grad()
    def fit_baselines(self) -> None:
        """Fit every Gaussian baseline that is not fitted yet to the training data, and the scale of conditions."""

        def parts(of: int) -> Callable[[], Iterable[Any]]:
            return lambda: (self.state(batch)[of] for batch in self.training_batches())

        fit_baselines(self.live, parts(0), self.sum_over_processes)
        fit_conditions(self.live, parts(1), self.sum_over_processes)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes, each of which sees a part of the training data."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum").cpu()

    def training_batches(self) -> Iterable[Any]:
        """One pass over the trainer's training data, as batches; of data that have no end the first 131,072 samples."""
        return all_training_batches(self.trainer)

    def configure_model(self) -> None:
        """Shard model and average over processes under ``ModelParallelStrategy`` (FSDP2); nothing otherwise."""
        # load_from_checkpoint asks for this without a trainer
        if isinstance(getattr(self.attached, "strategy", None), ModelParallelStrategy):
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

    @property
    def trained(self) -> bool:
        """Whether there is something to lose: the average has left the weights, or a checkpoint was loaded."""
        if self._averaged_steps > 0:
            return True
        pairs = zip(self.average.parameters(), self.live.parameters(), strict=True)
        return not is_sharded(self.live) and any(not torch.equal(mine, theirs) for mine, theirs in pairs)

    def on_train_start(self) -> None:
        """First start only: look at the training data, fit baselines to them, start the average at the weights.

        A module that was trained before goes on from where it is, whichever trainer trains it.
        """
        begin_epoch(self.trainer)
        if self.trainer.global_step == 0:
            self._look.at_training_data(self.state, self.quantization, self.trainer)
        if self.trained:
            # where nothing says how old the average is (``load_state_dict``), it is not taken for a young one
            self._averaged_steps = self._averaged_steps or 10**9
        elif self.trainer.global_step == 0:
            self.fit_baselines()
            with whole_weights(self.trainer.model):
                self.prepare()
                update_average(self.average, self.live, 0.0)
        # Lightning calls optimizer_step in automatic optimisation alone
        self._follow([] if self.automatic_optimization else optimizers_of(self.live, self.trainer))

    def on_fit_end(self) -> None:
        self._follow([])  # a module with hooks cannot be pickled
        check_trained(self.trainer)

    def prepare(self) -> None:
        """Anything else that is set from data or teacher once, before the first step."""

    def train(self, mode: bool = True) -> FlowModule:
        # the average always evaluates
        super().train(mode)
        if "average" in self._modules:
            self.average.eval()
        return self

    def configure_optimizers(self) -> Any:
        return make_optimizers(self)

    # --- training ---

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.run_seed.begin_step(self.trainer, batch_idx)
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
            raise FloatingPointError(not_finite(self, self._batch, self._batch_index))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, then the average's: before any checkpoint of this step is written."""
        super().optimizer_step(*args, **kwargs)
        self._move_average()

    def _follow(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Move the average after each step of these, and of no others."""
        for handle in self._followed:
            handle.remove()
        self._followed = [one.register_step_post_hook(lambda *_: self._move_average()) for one in optimizers]

    def _move_average(self) -> None:
        self._averaged_steps += 1
        self.forget_reference()
        update_average(self.average, self.live, warmed_decay(self.ema_decay, self._averaged_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run needs besides weights.

        Raises:
            FloatingPointError: If a weight is NaN or infinite: such a state is not saved over a good one.
        """
        check_finite(self)
        state = {"seed": self.run_seed.value, "averaged_steps": self._averaged_steps, "classes": self.class_names}
        reference = self.reference_choice and self.reference_choice.to_dict()
        found = {name: getattr(self, name) for name in RANGE}
        checkpoint["f2d2"] = state | {"range": list(found.values()), "reference": reference, "version": 2}
        checkpoint["f2d2"] |= {"objects": self._described(), "error_bars": kept_bars(self.error_bars)}
        # the arguments of a subclass may be others
        said = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        said.update({name: value for name, value in found.items() if name in said})
        # a checkpoint with numbers of NumPy is none of plain values, and would not be read
        numbers = (np.generic, np.ndarray)
        for key in {"f2d2", self.CHECKPOINT_HYPER_PARAMS_KEY} & {*checkpoint}:
            checkpoint[key] = apply_to_collection(checkpoint[key], numbers, lambda v: v.tolist(), allow_frozen=True)

    def _described(self) -> dict[str, Any]:
        """The objects that a script gave, as plain values, so that :func:`f2d2_lightning.load` makes them again.

        Nothing of those that cannot be described, and of a LightningCLI, which keeps its configuration, unless the
        network was that of a teacher's file.
        """
        if ("_instantiator" in self.hparams and self.hparams.get("flow_map") is not None) or is_sharded(self.live):
            return {}
        if self._model_description is None:
            try:
                self._model_description = describe_model(self.live)  # type: ignore[arg-type]
            except ValueError:
                # of somebody's own class, whose owner gives it again
                self._model_description = {}
        settings: dict[str, Any] = {"inversion": self.inversion, "reference": self.reference}
        plain = {name: asdict(value) for name, value in settings.items() if type(value) in (Inversion, Reference)}
        return {"model": self._model_description, **plain} if self._model_description else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mend_progress(checkpoint)
        state = checkpoint.get("f2d2", {})
        self.run_seed.value = state.get("seed", self.run_seed.value)
        self._averaged_steps = state.get("averaged_steps", 0)
        self.reference_choice = ReferenceChoice.from_dict(state.get("reference"), self.reference)
        self.error_bars = read_bars(state.get("error_bars"))
        names = as_names(state.get("classes"), "the checkpoint")
        self._follow_classes(self.class_names if names is None else names)
        check_same_model(self, checkpoint)


def object_names(arguments: dict[str, Any], *names: str) -> list[str]:
    """Names of arguments that hold objects: those are not hyper-parameters.

    A LightningCLI keeps their classes and arguments instead, so under one nothing is left out.
    """
    if _given_hyperparameters.get() is not None:
        return []
    return [name for name in names if arguments[name] is not None and not isinstance(arguments[name], (str, Path))]
