"""What draws samples in a Trainer: a student, a teacher, or somebody else's module with a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor

from f2d2_lightning.callback import F2D2Callback
from f2d2_lightning.flow_map import Direction
from f2d2_lightning.modules import F2D2Module, FlowMatchingModule, FlowModule
from f2d2_lightning.reference import FIXED, reference_sample

__all__ = ["SampledModel", "sampled_model"]


@dataclass(frozen=True)
class SampledModel:
    """A model as a sampler of states, and what its states are."""

    name: str
    """For messages."""
    sample: Callable[[Tensor, int, Tensor | None], Tensor]
    """``(noise, steps, cond)`` to states at ``t = 1``, ``(B, ...)``."""
    states: Callable[[Any], tuple[Tensor, Tensor | None]]
    """Batch of data, on the device, to states at ``t = 1`` and conditioning."""
    levels: int | None
    """Levels of discrete data."""
    low: float
    """Lower edge of the range that images fill."""
    high: float
    """Upper edge."""
    shape: tuple[int, ...] | None
    """Shape of one state; ``None`` where the data have yet to show it."""


def sampled_model(
    trainer: L.Trainer, module: L.LightningModule, flow_map: str | None = None, method: str = "euler"
) -> SampledModel:
    """The model that a Trainer's module, or a callback on it, samples from.

    Args:
        trainer: The Trainer, for its callbacks.
        module: Its module.
        flow_map: Which ``F2D2Callback``, by the name of its network, where there are several.
        method: Solver of a teacher's flow, one with fixed steps.

    Raises:
        ValueError: If nothing here draws samples, or several callbacks do.
    """
    callbacks = [c for c in trainer.callbacks if isinstance(c, F2D2Callback)]  # type: ignore[attr-defined]
    if isinstance(module, FlowModule) and flow_map is None:
        return _of_module(module, method)
    chosen = [c for c in callbacks if flow_map in (None, c.flow_map)]
    if len(chosen) == 1:
        return _of_callback(chosen[0], module)
    if callbacks:
        names = ", ".join(repr(c.flow_map) for c in callbacks)
        raise ValueError(f"there are F2D2Callbacks on {names}, and flow_map={flow_map!r}; say which: flow_map=...")
    raise ValueError(
        f"{type(module).__name__} draws no samples that are known here; sample quality is of an F2D2Module, a "
        "FlowMatchingModule, or any module with an F2D2Callback in the same Trainer"
    )


def _of_module(module: FlowModule, method: str) -> SampledModel:
    about = (module.data_to_state, module.levels, module.low, module.high, module.shape)
    if isinstance(module, F2D2Module):
        _check_direction(module.average.directions, type(module).__name__)
        student = module
        return SampledModel(type(module).__name__, lambda z, k, c: student.sample(z, k, c).state, *about)
    if not isinstance(module, FlowMatchingModule):
        raise ValueError(
            f"{type(module).__name__} is neither a student (F2D2Module) nor a teacher (FlowMatchingModule)"
        )
    if method not in FIXED:
        raise ValueError(f"method is {method!r}; step counts need one with fixed steps: {', '.join(FIXED)}")
    velocity = module.average.velocity
    return SampledModel(
        type(module).__name__, lambda z, k, c: reference_sample(velocity, z, c, method=method, steps=k).state, *about
    )


def _of_callback(callback: F2D2Callback, module: L.LightningModule) -> SampledModel:
    directions = Direction.BOTH if callback.interval is not None else callback.adapter.directions
    name = f"F2D2Callback({callback.flow_map!r})"
    _check_direction(directions, name)
    return SampledModel(
        name,
        lambda z, k, c: callback.sample(z, k, c).state,
        lambda batch: callback.states(batch, module),
        callback.levels,
        callback.low,
        callback.high,
        callback.states.shape,
    )


def _check_direction(directions: Direction, name: str) -> None:
    if Direction.TO_DATA not in directions:
        raise ValueError(f"{name} has a map of {directions}, which does not go to data and draws no samples")
