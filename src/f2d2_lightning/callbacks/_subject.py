"""What is asked of a model that is looked at, whoever wrote it: a student, a module with a callback, or a teacher."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from f2d2_lightning.callbacks.f2d2 import F2D2Callback
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.likelihood.quantization import bits_per_dim
from f2d2_lightning.likelihood.reference import FIXED, Reference, reference_sample
from f2d2_lightning.modules import F2D2Module, FlowMatchingModule

__all__ = ["Subject", "find_sampler", "find_subjects"]


class Subject(ABC):
    """A model whose samples and likelihoods are looked at. Only the model itself draws random numbers here.

    Args:
        owner: Who knows shape, levels and range: a module or a callback.
        module: The LightningModule.
        name: Tells several of one trainer apart; empty where there is one.
    """

    owner: Any

    def __init__(self, owner: Any, module: L.LightningModule, name: str = "") -> None:
        self.owner, self.module, self.name = owner, module, name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one state."""
        return tuple(self.owner.shape)

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return type(self.owner).__name__

    @property
    def known_shape(self) -> tuple[int, ...] | None:
        """:attr:`shape`, or ``None`` where the data have yet to show it."""
        return self.shape

    @property
    def levels(self) -> int | None:
        """Of discrete data; ``None`` for continuous data."""
        return self.owner.levels

    @property
    def low(self) -> float:
        """Lower edge of the data's range."""
        return float(self.owner.low)

    @property
    def high(self) -> float:
        """Upper edge."""
        return float(self.owner.high)

    @property
    def unit(self) -> str:
        """Unit of :meth:`nll`."""
        return "nats" if self.levels is None else "bits/dim"

    def nll(self, log_prob: Tensor) -> Tensor:
        """Negative log-likelihoods in :attr:`unit` from log-likelihoods in nats, any shape; float64 on the CPU."""
        value = log_prob.detach().cpu().double()
        if self.levels is None:
            return -value
        return bits_per_dim(value, math.prod(self.shape), self.levels, self.low, self.high)

    @property
    def ready(self) -> bool:
        """Whether there is a model to look at."""
        return True

    @property
    def steps(self) -> tuple[int, ...]:
        """Step counts, empty for a model that makes no steps."""
        return tuple(self.owner.steps)

    @property
    @abstractmethod
    def directions(self) -> Direction:
        """Where the model's steps lead."""

    @property
    def samples(self) -> bool:
        """Whether :meth:`sample` can be asked."""
        return Direction.TO_DATA in self.directions

    @property
    @abstractmethod
    def reference_fixed(self) -> bool:
        """Whether the reference stays the same while the model trains."""

    @property
    def reference_name(self) -> str:
        """Whose the reference is."""
        return "teacher" if self.reference_fixed else "own velocity"

    @abstractmethod
    def state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """States ``(B, *shape)`` at ``t = 1`` and conditioning of a batch."""

    def sample(self, noise: Tensor, steps: int, cond: Tensor | None) -> Tensor:
        """Samples from noise ``(B, *shape)``."""
        return self.owner.sample(noise, steps, cond).state

    def log_prob(self, x: Tensor, steps: int, cond: Tensor | None) -> Tensor:
        """Few-step log-likelihoods, ``(B,)``, nats; NaN where an inversion did not converge."""
        return self.owner.log_prob(x, steps, cond).value

    @property
    def solver(self) -> Reference:
        """Of the reference likelihood."""
        return self.owner.reference

    @abstractmethod
    def velocity(self) -> Callable[..., Tensor] | None:
        """``(x, t, cond) -> v`` of the reference; ``None`` if there is none."""

    def evaluated_reference(self, values: Mapping[int, Tensor]) -> Tensor | None:
        """The reference's NLL of the first samples of the last evaluation, where the evaluation has computed it.

        Args:
            values: Few-step NLL of those samples by step count, ``(N,)``: they tell whether the samples are the same.

        Returns:
            ``(N,)``, in :attr:`unit`, NaN for those that were not compared; ``None`` if it has none of these samples.
        """
        return None

    def rows(self) -> list[dict[str, Any]] | None:
        """Rows of the last evaluation over all processes, which must all call this; ``None`` if there are none."""
        return None


class StudentSubject(Subject):
    """An :class:`~f2d2_lightning.F2D2Module`."""

    owner: F2D2Module

    @property
    def directions(self) -> Direction:
        return self.owner.average.directions

    @property
    def reference_fixed(self) -> bool:
        return self.owner.teacher is not None

    def state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return self.owner.state(batch)

    def velocity(self) -> Callable[..., Tensor] | None:
        return self.owner.teacher_velocity()

    def evaluated_reference(self, values: Mapping[int, Tensor]) -> Tensor | None:
        few, reference = self.owner.agreement_values()
        last = self.steps[-1]
        # the evaluation keeps samples with a likelihood only, in their order, and compares the first of them
        good = values[last].isfinite().nonzero().flatten()
        count = min(len(good), len(few[last]), len(reference))
        mine, theirs = values[last][good[:count]], few[last][:count].cpu().double()
        if count == 0 or not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4):
            return None
        aligned = torch.full_like(values[last], math.nan)
        aligned[good[:count]] = reference[:count].cpu().double()
        return aligned

    def rows(self) -> list[dict[str, Any]] | None:
        return self.owner.agreement_table()


class CallbackSubject(Subject):
    """Somebody else's module with an :class:`~f2d2_lightning.F2D2Callback`."""

    owner: F2D2Callback

    @property
    def title(self) -> str:
        return f"F2D2Callback({self.owner.flow_map!r})"

    @property
    def known_shape(self) -> tuple[int, ...] | None:
        return self.owner.states.shape

    @property
    def ready(self) -> bool:
        # without a checkpoint there is no head yet; the callback itself says so
        return self.owner.has_head

    @property
    def directions(self) -> Direction:
        # known before there is a head
        return Direction.BOTH if self.owner.interval is not None else self.owner.adapter.directions

    @property
    def reference_fixed(self) -> bool:
        return self.owner.teacher is not None

    def state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return self.owner.states(batch, self.module)

    def velocity(self) -> Callable[..., Tensor] | None:
        return self.owner.reference_velocity()


class TeacherSubject(Subject):
    """A :class:`~f2d2_lightning.FlowMatchingModule`: it has no jumps, and its samples are integrated."""

    owner: FlowMatchingModule
    method = "euler"
    """Solver of its flow, one with fixed steps."""

    @property
    def steps(self) -> tuple[int, ...]:
        return ()

    @property
    def directions(self) -> Direction:
        return Direction.NONE

    @property
    def samples(self) -> bool:
        return True

    def sample(self, noise: Tensor, steps: int, cond: Tensor | None) -> Tensor:
        return reference_sample(self.velocity(), noise, cond, method=self.method, steps=steps).state

    @property
    def reference_fixed(self) -> bool:
        return False

    @property
    def reference_name(self) -> str:
        return "teacher"

    def state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return self.owner.state(batch)

    def velocity(self) -> Callable[..., Tensor]:
        return self.owner.average.velocity


def _subjects(trainer: L.Trainer, module: L.LightningModule) -> tuple[list[Subject], list[CallbackSubject]]:
    """The module itself, if it is one of this package's, and what each F2D2Callback of the trainer added."""
    own: list[Subject] = []
    if isinstance(module, F2D2Module):
        own.append(StudentSubject(module, module))
    elif isinstance(module, FlowMatchingModule):
        own.append(TeacherSubject(module, module))
    callbacks = [c for c in trainer.callbacks if isinstance(c, F2D2Callback)]  # type: ignore[attr-defined]
    several = len(own) + len(callbacks) > 1
    return own, [CallbackSubject(c, module, c.flow_map if several else "") for c in callbacks]


def find_subjects(trainer: L.Trainer, module: L.LightningModule) -> list[Subject]:
    """The module itself, if it is one of this package's, and what each F2D2Callback of the trainer added.

    Raises:
        ValueError: If there is neither.
    """
    own, added = _subjects(trainer, module)
    if not (own or added):
        raise ValueError(
            f"{type(module).__name__} is neither F2D2Module nor FlowMatchingModule, and the trainer has no "
            "F2D2Callback; add one (Trainer(callbacks=[F2D2Callback(...), ...])), or take pictures and report out of "
            "the callbacks"
        )
    return [*own, *added]


def find_sampler(
    trainer: L.Trainer, module: L.LightningModule, flow_map: str | None = None, method: str = "euler"
) -> Subject:
    """The one model that samples are drawn from: the module itself, else what a callback added.

    Args:
        trainer: The Trainer, for its callbacks.
        module: Its module.
        flow_map: Which ``F2D2Callback``, by the name of its network, where there are several.
        method: Solver of a teacher's flow, one with fixed steps.

    Raises:
        ValueError: If nothing here draws samples, or several do.
    """
    own, added = _subjects(trainer, module)
    chosen = own if own and flow_map is None else [s for s in added if flow_map in (None, s.owner.flow_map)]
    if len(chosen) != 1:
        if added:
            names = ", ".join(repr(s.owner.flow_map) for s in added)
            raise ValueError(f"there are F2D2Callbacks on {names}, and flow_map={flow_map!r}; say which: flow_map=...")
        raise ValueError(
            f"{type(module).__name__} draws no samples that are known here; sample quality is of an F2D2Module, a "
            "FlowMatchingModule, or any module with an F2D2Callback in the same Trainer"
        )
    (subject,) = chosen
    if isinstance(subject, TeacherSubject):
        if method not in FIXED:
            raise ValueError(f"method is {method!r}; step counts need one with fixed steps: {', '.join(FIXED)}")
        subject.method = method
    if not subject.samples:
        raise ValueError(
            f"{subject.title} has a map of {subject.directions}, which does not go to data and draws no samples"
        )
    return subject
