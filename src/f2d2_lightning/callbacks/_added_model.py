"""What a callback adds to somebody else's network, as a model with likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap, Adapter
from f2d2_lightning.adapters.features import find_submodule
from f2d2_lightning.callbacks._auxiliary import AddedWeights
from f2d2_lightning.checkpoints.export import CHECKPOINT_KEY, describe_head, describe_joint, make_head
from f2d2_lightning.checkpoints.pretrained import save_pretrained
from f2d2_lightning.flows._held import HeldFlowMap, evaluating, weights_held
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.likelihood.error_bars import kept_bars, read_bars
from f2d2_lightning.likelihood.reference import ReferenceChoice
from f2d2_lightning.likelihood.units import Units
from f2d2_lightning.modules._ranges import RANGE
from f2d2_lightning.modules._teaching import KeptTeacher
from f2d2_lightning.modules.distillation import DistilledModel, default_head
from f2d2_lightning.nn.head import Head, JointFlowMap
from f2d2_lightning.objectives.sources import TeacherSource
from f2d2_lightning.training.batches import HALF, BatchStates, FirstLook, training_batches
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.sharding import whole_state


class AddedModel(DistilledModel):
    """Network, adapter and divergence head of a :class:`F2D2Callback`: made, trained, saved, and asked."""

    flow_map: str
    adapter: Adapter
    features: str | None
    interval: str | None
    head: Head | None
    frozen: bool
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    gradient_clip: float | None
    ema_decay: float
    states: BatchStates
    fit_samples: int

    def __init__(self) -> None:
        self._added: AddedWeights | None = None
        self._pending: Mapping[str, Any] | None = None
        self._network: nn.Module
        self._trainer: Any = None
        self._module: Any = None
        self._look = FirstLook()
        self._student: JointFlowMap | None = None

    # --- as a model with likelihoods ---

    @property
    def title(self) -> str:
        return f"F2D2Callback({self.flow_map!r})"

    @property
    def known_shape(self) -> tuple[int, ...] | None:
        return self.states.shape

    @property
    def directions(self) -> Direction:
        # known before there is a head
        return Direction.BOTH if self.interval is not None else self.adapter.directions

    @property
    def conditional(self) -> bool | None:
        return self.adapter.conditional

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    def attach(self, module: L.LightningModule) -> None:
        """Say whose network it is; a trainer does so by itself."""
        self._module = module

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with evaluating(self._network), weights_held(self._network):
            yield

    def data_to_state(self, batch: Any) -> tuple[Tensor, Cond | None]:
        return self.states(batch, self._module)

    def state(self, batch: Any) -> tuple[Tensor, Cond | None]:
        """States and conditioning; the first states of each stage are compared with levels and range."""
        x, cond = self.data_to_state(batch)
        self._look(x, self.quantization, self._trainer)
        return x, cond

    # --- the maps ---

    @property
    def has_head(self) -> bool:
        """Whether there is a divergence head yet: training has started, or a checkpoint was restored."""
        return self._added is not None

    ready = has_head

    @property
    def added(self) -> AddedWeights:
        """Head and added embedding, their optimiser and average; ``RuntimeError`` before they are there."""
        if self._added is None:
            raise RuntimeError(
                "there is no divergence head yet: it is made when training starts (Trainer.fit), or restored from a "
                "checkpoint that was saved with this callback (ckpt_path=...)"
            )
        return self._added

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of one state, known once data or a checkpoint have shown it; ``RuntimeError`` before that."""
        if self.states.shape is None:
            raise RuntimeError("the shape of the states is not known before training starts, or a checkpoint is read")
        return self.states.shape

    @property
    def joint(self) -> JointFlowMap:
        """The network with the average of the added weights: what validates and answers."""
        return JointFlowMap(self._mapped("average"), self._head("average"))

    joint_map = joint

    def export(self, path: str | Path, units: Units | None = None) -> None:
        """Write network, head and conventions to a folder, for :func:`f2d2_lightning.from_pretrained`.

        Under FSDP every process must call it; the first one writes. ``units`` are those of a ``Table``.
        """
        state = whole_state(self._network)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            save_pretrained(
                self.joint,
                path,
                shape=self.shape,
                levels=self.levels,
                low=self.low,
                high=self.high,
                network_state=state,
                error_bars=self.error_bars,
                units=units,
            )

    def _head(self, kind: str) -> Head:
        """The head in training (``"live"``) or its average (``"average"``)."""
        return getattr(self.added, kind)["head"]

    def _mapped(self, kind: str) -> AdaptedFlowMap:
        """The network through its adapter, with the added interval, if any, in training or averaged."""
        modules = getattr(self.added, kind)
        if "interval" not in modules:
            return self.adapter(self._network, features=self.features)
        mapped = self.adapter(self._network, features=self.features, directions=Direction.BOTH)
        mapped.interval_name, mapped.interval = self.interval, modules["interval"]
        return mapped

    def _check_run(self, trainer: L.Trainer) -> None:
        """Refuse a module, precision or data that cannot be right; take over the range of the data."""
        if str(trainer.precision) in HALF:
            rank_zero_warn(
                f"with precision={trainer.precision!r} the network computes in half precision, and likelihoods are "
                "those of its rounded answers, off by a percent of their divergence; head and states stay in float32. "
                "'bf16-mixed' and '32-true' keep weights whole"
            )
        self.agree_with_data(getattr(trainer, "datamodule", None))

    def _find(self, pl_module: L.LightningModule) -> None:
        network = find_submodule(pl_module, self.flow_map)
        # compiled code is left to the module's own training: features and derivatives come from the code behind it
        self._network = getattr(network, "_orig_mod", network)

    def reference_velocity(self) -> Callable[..., Tensor] | None:
        """``(x, t, cond) -> v`` that likelihoods are compared with: the teacher's, else the network's own diagonal.

        ``None`` for a network that has no velocity (a consistency model).
        """
        if self.teacher is not None:
            return self.teacher
        flow_map = self._mapped("average")
        return None if flow_map.endpoint_only else HeldFlowMap(flow_map).velocity

    # --- making and training it ---

    def _make_head(self, flow_map: AdaptedFlowMap, x: Tensor, cond: Cond | None) -> Head:
        if self.head is not None and not self.head.reads_features:
            return self.head
        channels = flow_map.probe(x, cond)
        if self.head is None:
            return default_head(channels, tuple(x.shape[1:]), flow_map)
        if self.head.features != channels:
            raise ValueError(
                f"the head reads {self.head.features} feature channels, and {self.flow_map!r} gives {channels} (from "
                f"{flow_map.tap.layer if flow_map.tap else None!r}); set DivergenceHead(features={channels})"
            )
        return self.head

    def _assemble(self, head: Head, interval: nn.Module | None, device: torch.device) -> None:
        live = nn.ModuleDict({"head": head} | ({} if interval is None else {"interval": interval})).to(device).train()
        self._added = AddedWeights(live, self.optimizer, self.ema_decay, self.gradient_clip)

    def _prepare_training(self) -> None:
        mapped = self._mapped("live")
        held = HeldFlowMap(mapped)
        self.added.optimizer.zero_grad(set_to_none=True)
        self.added.peak = 0.0  # another run's optimiser has another
        self._student = JointFlowMap(held if self.frozen else mapped, self._head("live"))
        self._source: TeacherSource
        if self.teacher is None:
            if mapped.endpoint_only:
                raise ValueError(
                    f"{self.flow_map!r} maps to data only and has no instantaneous velocity to learn divergences from; "
                    "give F2D2Callback the teacher that it was distilled from, or interval='name of the time embedding'"
                )
            self._source = TeacherSource(held.velocity, self.estimator, stationary=False)
        else:
            kept = KeptTeacher(self.teacher)
            kept.keep_apart(self._network)
            self.teacher = kept.get(self._module.device)
            self._source = TeacherSource(self.teacher, self.estimator)

    @torch.no_grad()
    def _fit(self, trainer: L.Trainer) -> None:
        head = self._head("live")
        self._look.at_training_data(self.state, self.quantization, trainer)
        states = [self.state(batch) for batch in training_batches(trainer, self.fit_samples)]
        if head.baseline is not None and not bool(head.baseline.fitted):
            enough = head.baseline.enough
            more = map(self.state, training_batches(trainer, enough)) if enough > self.fit_samples else states
            head.baseline.fit(x for x, _ in more)
            # targets are measured with the fit of the average
            self.added.broadcast()
        if self.teacher is not None:
            self.measure_targets(trainer, self._source.velocity, *states[0])
            self._source.estimator = self.estimator
        self.fit_scale(head, self._source, states)
        # every process saw the same samples; broadcast all the same, for data that differ between machines
        self.added.broadcast()

    # --- keeping it ---

    def _saving(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        # through the module's hook as well: weights-only checkpoints leave out everything of callbacks
        self._describe(checkpoint)

    def _loading(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        kept = checkpoint.get(CHECKPOINT_KEY, {}).get(self.flow_map)
        if self._added is not None and kept is not None and "callbacks" not in checkpoint:
            # the head of the network that is loaded now, in the place of the one in training
            self._added.load_weights({name.removeprefix("flow_map."): value for name, value in kept["state"].items()})
            self.error_bars = read_bars(kept["error_bars"])

    def _describe(self, checkpoint: dict[str, Any]) -> None:
        if self._added is not None:
            described = describe_joint(self.joint, self.shape) | {"range": [self.levels, self.low, self.high]}
            described["error_bars"] = kept_bars(self.error_bars)
            checkpoint.setdefault(CHECKPOINT_KEY, {})[self.flow_map] = described

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run or an evaluation needs."""
        if self._added is None:
            return dict(self._pending or {})
        return {
            "seed": self.run_seed.value,
            "shape": list(self.shape),
            "range": [self.levels, self.low, self.high],
            "head": describe_head(self._head("live")),
            "added": self._added.state_dict(),
            "objective": self.objective_state(),
            "reference": self.reference_choice and self.reference_choice.to_dict(),
            "error_bars": kept_bars(self.error_bars),
            "version": 2,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken over once network and data are there: at once in a run, in which a learning rate was tried out."""
        self._pending = state_dict or None
        if self._student is not None and self._pending is not None:
            self._restore_pending()

    def _make_from(self, state: Mapping[str, Any], device: torch.device) -> None:
        head = self.head or make_head(state["head"])
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
        kept = dict(zip(RANGE, state.get("range", ())))
        # a head that was trained in nats may go on in bits
        if kept.get("levels") is not None:
            self.agree_with_checkpoint(kept)
        self.run_seed.value = state["seed"]
        self.reference_choice = ReferenceChoice.from_dict(state.get("reference"), self.reference)
        self.error_bars = read_bars(state.get("error_bars"))
        self.added.load_state_dict(state["added"])
        self.load_objective_state(state["objective"], None if "version" in state else True)
        if "_source" in vars(self):
            self._source.estimator = self.estimator
