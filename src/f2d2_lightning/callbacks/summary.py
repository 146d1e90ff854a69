"""A model summary that names the parts of a joint map: teacher, backbone, head and average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelSummary
from rich import get_console
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from f2d2_lightning.adapters import AdaptedFlowMap
from f2d2_lightning.adapters.features import find_submodule
from f2d2_lightning.callbacks.f2d2 import F2D2Callback
from f2d2_lightning.modules import F2D2Module, FlowMatchingModule


@dataclass(frozen=True)
class Part:
    """A part of a model. Parameters are counted once: those that an earlier part has are left out."""

    name: str
    kind: str
    """Class of the network."""
    trainable: int
    """Parameters that are trained."""
    frozen: int
    """Parameters that are not."""
    note: str = ""
    saved: bool = True
    """Whether checkpoints of the run hold it."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.trainable + self.frozen


class _Parts(list[Part]):
    """Parts of a model, whose parameters are counted once. Of a sharded one, what it has on all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def add(self, name: str, module: Any, note: str = "", kind: str = "", saved: bool = True) -> None:
        found = module.parameters() if isinstance(module, nn.Module) else ()
        new = [p for p in found if id(p) not in self.seen and not is_lazy(p)]
        self.seen |= {id(p) for p in new}
        trainable = sum(p.numel() for p in new if p.requires_grad)
        frozen = sum(p.numel() for p in new) - trainable
        self.append(Part(name, kind or _kind(module), trainable, frozen, note, saved))


def model_parts(module: L.LightningModule, callbacks: Iterable[Any] = ()) -> list[Part]:
    """Parts of a module of this package, or of somebody else's with :class:`~f2d2_lightning.F2D2Callback`.

    They are teacher, backbone, head, average, and what else the module has; callbacks are the trainer's. Under FSDP2
    parameters are counted over all processes; FSDP1's flat shards are those of this process.
    """
    added = [c for c in callbacks if isinstance(c, F2D2Callback)]
    parts = _Parts()
    if isinstance(module, F2D2Module):
        _add_student(parts, module)
    elif isinstance(module, FlowMatchingModule):
        parts.add("backbone", module.flow_map)
        parts.add("average", module.average, "of the weights; used after training")
    for callback in added:
        _add_added(parts, callback, module, f" of {callback.flow_map}" if len(added) > 1 else "")
    parts.add("rest" if parts else "module", module)
    return parts[:-1] if len(parts) > 1 and parts[-1].parameters == 0 else parts


def _add_student(parts: _Parts, module: F2D2Module) -> None:
    teacher, joint = module.teacher, module.joint
    if teacher is not None:
        network = teacher.average if isinstance(teacher, FlowMatchingModule) else teacher
        parts.add("teacher", network, "not saved with the student", saved=False)
    parts.add("backbone", joint.flow_map, "frozen: only the head is trained" if joint.frozen else "")
    parts.add("head", joint.head)
    of = "of the head's weights" if joint.frozen else "of backbone and head"
    parts.add("average", module.average, f"{of}; used after training")


def _add_added(parts: _Parts, callback: F2D2Callback, module: L.LightningModule, of: str) -> None:
    if isinstance(callback.teacher, nn.Module):
        parts.add(f"teacher{of}", callback.teacher, "not saved", saved=False)
    network = find_submodule(module, callback.flow_map, "network")
    kind = f"{type(getattr(network, '_orig_mod', network)).__name__} through {type(callback.adapter).__name__}"
    trained = "the added loss leaves it alone" if callback.frozen else "trained by both losses"
    parts.add(f"backbone{of}", network, f"{callback.flow_map}; {trained}", kind)
    if not callback.has_head:
        return
    live, average = callback.added.live, callback.added.average
    parts.add(f"head{of}", live["head"], "in the callback")
    if "interval" in live:
        parts.add(f"interval{of}", live["interval"], "added time embedding")
    parts.add(f"average{of}", average, "of what was added; used after training", _kind(average["head"]))


def _kind(module: Any) -> str:
    if isinstance(module, AdaptedFlowMap):
        return f"{type(module.network).__name__} through {type(module.adapter).__name__}"
    return type(module).__name__


def summary_table(parts: Iterable[Part], title: str = "") -> Table:
    """The parts as a rich table, with a row for their sum."""
    parts = list(parts)
    table = Table(title=title or None)
    for name in ("part", "class", "trainable", "frozen", "note"):
        table.add_column(name, justify="right" if name in ("trainable", "frozen") else "left", overflow="fold")
    for part in parts:
        table.add_row(part.name, part.kind, _count(part.trainable), _count(part.frozen), part.note)
    table.add_section()
    trainable, frozen = sum(p.trainable for p in parts), sum(p.frozen for p in parts)
    saved = sum(p.parameters for p in parts if p.saved)
    table.add_row("all", "", _count(trainable), _count(frozen), f"{saved:,} parameters in checkpoints")
    return table


def _count(parameters: int) -> str:
    return f"{parameters:,}" if parameters else ""


class JointSummary(ModelSummary):
    """Prints :func:`model_parts` when training starts, instead of Lightning's summary of layers.

    With :class:`~f2d2_lightning.F2D2Callback` it is printed as soon as there is a head, before the first step.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=1)
        self._due = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._due = any(isinstance(c, F2D2Callback) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if not self._due:
            self._print(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Every callback has started by now, and made its head."""
        if self._due:
            self._due = False
            self._print(trainer, pl_module)

    def _print(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        parts = model_parts(module, trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            get_console().print(summary_table(parts, type(module).__name__))
