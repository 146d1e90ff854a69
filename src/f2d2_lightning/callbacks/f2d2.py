"""Likelihoods for somebody else's LightningModule: one callback, its code untouched.

The callback owns what it adds (head, its optimiser and average): nothing becomes a submodule of the model, so the
model's own optimisers, schedulers and checkpoints stay as they are. While it trains, the model's ``training_step`` is
wrapped, so that the added loss is computed inside the strategy's forward pass and its share of the backbone's gradient
is synchronised like any other.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from f2d2_lightning.adapters import Adapter
from f2d2_lightning.callbacks._added_model import AddedModel
from f2d2_lightning.callbacks._names import network_name
from f2d2_lightning.callbacks._wrapping import AddedLoss, Wrapped, overrides
from f2d2_lightning.checkpoints.export import make_head
from f2d2_lightning.divergence.estimators import DivergenceEstimator
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.reference import Reference
from f2d2_lightning.metrics.evaluation import check_draws
from f2d2_lightning.modules._optimization import optimizers_of
from f2d2_lightning.modules.evaluation import Evaluation
from f2d2_lightning.nn.head import Head
from f2d2_lightning.objectives.base import Objective
from f2d2_lightning.training.batches import BatchStates, FirstLook, check_trained, training_batches
from f2d2_lightning.training.progress import begin_epoch, mend_progress
from f2d2_lightning.training.run_seed import RunSeed
from f2d2_lightning.utils.checks import at_least, checked, counts, positive, share
from f2d2_lightning.utils.conditions import Cond, some_of
from f2d2_lightning.utils.processes import ends_with_run
from f2d2_lightning.utils.seeding import mix_seed, own_random_state


class F2D2Callback(AddedModel, L.Callback):
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
        head: Divergence head; by default one on the network's features and a Gaussian baseline, of the usual covariance
            (:class:`~f2d2_lightning.flows.gaussian.GaussianBaseline`) or of the kind that the network has.
        objective: What relates ``(u, D)`` to the velocity; trajectory regression by default.
        estimator: Divergence estimator of the targets, by default as in ``F2D2Module``.
        frozen: The added loss trains the head alone and leaves the network to the module's own loss. Declare no
            direction then that this loss does not train. For the density of a few-step sampler's own jumps give
            ``objective=VolumeRegression(refresh=8.0)``.
        weight: Of the added loss per dimension, beside the module's own; 1 / N where a module accumulates the gradients
            of N batches by hand, in manual optimisation, which is not seen.
        batch_share: Of a batch's states that the added loss is computed on, drawn anew each step, at least one.
        optimizer: Makes the head's optimiser from its parameters; AdamW at 1e-3 by default.
        follow_schedule: Scale the head's learning rate as the module's first optimiser scales its own.
        gradient_clip: Largest norm of the head's gradient; ``None`` for no clipping.
        ema_decay: Decay of the average of the added weights, which is used in validation and after training.
        data_to_state: ``batch -> (x, cond)``, states ``(B, ...)`` at ``t = 1`` as the network sees them in training,
            or the name of a method of the module that does so; by default a tensor, or the first two items of a
            sequence.
        levels: Levels of discrete data: likelihoods are logged in bits per dimension; ``None`` takes those and the
            range of a teacher or a data module of this package, else likelihoods are in nats.
        low: Lower edge of the range that the levels fill; ``None`` takes it likewise, else -1.
        high: Upper edge; ``None`` takes it likewise, else 1.
        steps: Step counts that validation and test report.
        draws: Dequantization draws per sample that validation averages few-step likelihoods over.
        inversion: How maps that only go to data are inverted.
        reference: Solver of the likelihood of the network's own velocity, for comparison.
        reference_samples: Samples per evaluation that are compared with it, the first ones of the data; 0 for none.
        fit_samples: Samples that the head's scale is set from, once; its baseline, if of a full covariance, from 64 a
            dimension where there are as many.
        backward: Which ``manual_backward`` of a training step carries the added loss, from 0, in manual optimisation;
            by default the first one while the network's parameters require gradients (a GAN's generator).
        check: Compare the adapter with the network and a batch before the first step.

    Raises:
        ValueError: If numbers are out of range; at the start of a run, before its first step, if the network is not
            there, does not fit the adapter, or two callbacks are on one network.

    >>> F2D2Callback("net", steps=(1, 2))
    F2D2Callback('net', shape=None, directions=both, steps=(1, 2))
    """

    @checked
    def __init__(
        self,
        flow_map: str,
        adapter: Adapter | None = None,
        features: str | None = None,
        interval: str | None = None,
        teacher: Callable[..., Tensor] | None = None,
        head: Head | None = None,
        objective: Objective | None = None,
        estimator: DivergenceEstimator | None = None,
        frozen: bool = False,
        weight: float = 1.0,
        batch_share: float = 0.5,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        follow_schedule: bool = True,
        gradient_clip: float | None = 1.0,
        ema_decay: float = 0.999,
        data_to_state: Callable[[Any], tuple[Tensor, Cond | None]] | str | None = None,
        levels: int | None = None,
        low: float | None = None,
        high: float | None = None,
        steps: Sequence[int] = (1, 2, 4, 8),
        draws: int = 1,
        inversion: Inversion | None = None,
        reference: Reference | None = None,
        reference_samples: int = 128,
        fit_samples: int = 2048,
        backward: int | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        theirs = getattr(teacher, "quantization", None)
        if levels is None and isinstance(theirs, Quantization):
            levels, low, high = theirs.levels, theirs.low if low is None else low, theirs.high if high is None else high
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay}; it lies in [0, 1)")
        positive(weight=weight, batch_share=batch_share)
        share(batch_share=batch_share)
        at_least(2, fit_samples=fit_samples)
        at_least(1, draws=draws)
        at_least(0, reference_samples=reference_samples, backward=backward or 0)
        if gradient_clip is not None:
            positive(gradient_clip=gradient_clip)
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
        self.run_seed = RunSeed()
        self.distill(objective, estimator, directions, moving=teacher is None, scattering=False)
        self.say_range(levels, low, high)
        self.take_range()
        self.frozen, self.weight, self.batch_share = frozen, weight, batch_share
        self.optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99))
        self.follow_schedule, self.gradient_clip, self.ema_decay = follow_schedule, gradient_clip, ema_decay
        self.states = BatchStates(data_to_state, self.adapter.conditional)
        self.steps = counts("steps", steps)
        self.inversion = inversion or Inversion()
        # what the network can be differentiated by is the same for its targets and its likelihood
        self.reference = reference or Reference(mode=self.estimator.mode)
        self.fit_samples, self.backward, self.check = fit_samples, backward, check
        self.draws, self.reference_samples = draws, reference_samples
        self.evaluation = Evaluation(self, check)
        self._wrapped: Wrapped | None = None
        self._riding: AddedLoss
        self._before_trial: dict[str, Any] | None = None
        self._evaluates = False
        self._gradient_scale = 1.0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(flow_map=self.flow_map)

    # --- finding the network, wrapping the module ---

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and wrap the module's methods."""
        self._check_run(trainer)
        self._look = FirstLook()
        if not overrides(pl_module, "configure_model"):
            self._find(pl_module)
        self._trainer, self._module = trainer, pl_module
        self._wrapped = Wrapped(pl_module)
        self._wrapped.wrap("on_save_checkpoint", self._saving)
        self._wrapped.wrap("on_load_checkpoint", self._loading)
        if stage == "fit":
            if ends_with_run(trainer):
                rank_zero_warn(
                    "training is in processes that end with it, and with them the divergence head ends: it is in "
                    "checkpoints only, for f2d2_lightning.load, validate or test (ckpt_path=...); 'ddp' keeps it here"
                )
            self._riding = AddedLoss(pl_module, self._loss, self.backward, self._carries, self.flow_map)
            self._wrapped.wrap("training_step", self._stepping)
            self._wrapped.wrap("manual_backward", self._riding.backward)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._student = None
        if self._wrapped is not None:
            self._wrapped.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    # --- making the head ---

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The network exists by now, also where ``configure_model`` makes it."""
        self._find(pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, F2D2Callback) and other is not self and vars(other).get("_network") is self._network:
                raise ValueError(
                    f"two F2D2Callbacks are on one network, {self.flow_map!r} and {other.flow_map!r}; keep one of them"
                )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_trained(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
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
            torch.manual_seed(mix_seed(self.run_seed.value, "start"))
            x, cond = self.state(next(training_batches(trainer, self.fit_samples)))
            flow_map = self.adapter(self._network, features=self.features, interval=self.interval).to(pl_module.device)
            if self.check:
                self.check_networks(flow_map, self.teacher, x, cond)
            if self._added is None:
                kept = None if self._pending is None or self.head is not None else make_head(self._pending["head"])
                self._assemble(kept or self._make_head(flow_map, x, cond), flow_map.interval, pl_module.device)
            self._prepare_training()
            if self._pending is not None:
                self._restore_pending()
            elif self.added.steps == 0:
                self._fit(trainer)
        check_draws(self.draws, self.quantization)

    def _logged(self, stage: str) -> str:
        return f"{stage}/{network_name(self._trainer, F2D2Callback, self.flow_map)}f2d2_"

    # --- training ---

    def _stepping(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._student is None:
            # a Tuner takes steps of a run that has not begun, without its callbacks
            self._before_trial = self.objective.state_dict()
            self._find(self._module)
            self._start(self._trainer, self._module)
        output = self._riding.step(original, *args, **kwargs)
        if self._riding.stepped:
            self._step_head(self._trainer)
        return output

    def _carries(self) -> bool:
        return self.frozen or any(p.requires_grad for p in self._network.parameters())

    def _loss(self, batch: Any, batch_index: int) -> Tensor:
        trainer, module = self._trainer, self._module
        assert self._student is not None
        with own_random_state(module.device):
            self.run_seed.begin_step(trainer, batch_index)
            x, cond = self.state(batch)
            if self.batch_share < 1:
                rows = torch.randperm(len(x), device=x.device)[: math.ceil(self.batch_share * len(x))]
                x, cond = x[rows], some_of(cond, rows)
            terms = self.objective_loss(trainer, batch_index, self._student, x, cond, self._source)
        prefix = self._logged("train")
        named = {f"{prefix}{name}": value.detach() for name, value in terms._asdict().items()}
        module.log_dict(named, batch_size=len(x))
        return self.weight / x[0].numel() * terms.loss

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The head's gradients are there as well now; in manual optimisation they may still grow within the batch.

        It then steps once in a batch in which an optimiser of the network did.
        """
        if not (pl_module.automatic_optimization or self.frozen):
            theirs = optimizers_of(self._network, trainer)
            if theirs and optimizer not in theirs:
                return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._gradient_scale = 1.0 if scaler is None else float(scaler.get_scale())
        if pl_module.automatic_optimization:
            self._step_head(trainer)
        else:
            self._riding.stepped = True

    def _step_head(self, trainer: L.Trainer) -> None:
        followed = trainer.optimizers[0] if self.follow_schedule and trainer.optimizers else None
        self.added.step(self._gradient_scale, followed)
        self.forget_reference()

    # --- evaluation ---

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a pass, where there is a head to evaluate."""
        self._evaluates = False
        if trainer.sanity_checking:
            return
        self._take_over(pl_module)
        if self._added is None:
            given = "pass a checkpoint that was saved with it (ckpt_path=...), or fit first"
            warnings.warn(f"F2D2Callback has no trained head to evaluate; {given}", stacklevel=2)
            return
        self._evaluates = True
        self.evaluation.start(trainer)

    on_test_epoch_start = on_validation_epoch_start

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_over(pl_module)

    def _take_over(self, pl_module: L.LightningModule) -> None:
        """The head that a checkpoint of this run had, also in the place of one that is there."""
        self._find(pl_module)
        self._module = pl_module
        if self._pending is not None:
            if self._added is None:
                self._make_from(self._pending, pl_module.device)
            self._restore_pending()
        if self._added is not None:
            self._added.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._evaluates:
            seed = mix_seed("states", trainer.global_rank, dataloader_idx, batch_idx)
            with own_random_state(pl_module.device, seed):
                states = self.state(batch)
            self.evaluation.add(*states, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluates:
            self.evaluation.log(pl_module.log, self._logged("test" if trainer.testing else "val"))

    on_test_epoch_end = on_validation_epoch_end

    # --- checkpoints ---

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._describe(checkpoint)
