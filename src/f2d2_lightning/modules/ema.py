"""Exponential moving average of weights, as a second copy of the model."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from f2d2_lightning.utils.sharding import reshard

Copied = TypeVar("Copied", bound=nn.Module)


def copied(module: Copied, shared: dict[int, Any] | None = None) -> Copied:
    """A deep copy of a module, but for objects in ``shared``, by ``id``.

    torch copies no tensor that was computed with gradients, such as the weight that ``torch.nn.utils.weight_norm`` and
    ``spectral_norm`` keep from the last call; the next one computes it anew.
    """
    values = [value for part in module.modules() for value in vars(part).values()]
    computed = {id(v): v.detach().clone() for v in values if isinstance(v, torch.Tensor) and not v.is_leaf}
    return copy.deepcopy(module, computed | (shared or {}))


def copy_frozen(module: Any, shared: dict[int, Any] | None = None) -> Any:
    """A copy in evaluation mode whose parameters are not trained; objects in ``shared``, by ``id``, are not copied."""
    return copied(module, shared).requires_grad_(False).eval()


def without_dropout(module: Any) -> Any:
    """A copy that drops no hidden unit: a student's targets are the same at every step, and dropout only blurs them."""
    without = copied(module)
    for part in without.modules():
        if isinstance(part, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
            part.p = 0.0
    return without


def share_weights(one: Any, other: nn.Module) -> bool:
    """Whether a module, a method of one, or a function that holds one has a parameter in common with a module."""
    own = {id(p) for p in other.parameters()}
    return any(id(p) in own for module in _modules_behind(one) for p in module.parameters())


def _modules_behind(thing: Any, depth: int = 4) -> Iterator[nn.Module]:
    """Modules that a callable is known to use."""
    if depth == 0:
        return
    parts: list[Any] = []
    if isinstance(thing, nn.Module):
        yield thing
        # kept apart on purpose, in a list or behind a function, they are no submodules
        parts = [value for module in thing.modules() for value in vars(module).values() if not isinstance(value, dict)]
    elif isinstance(thing, functools.partial):
        parts = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, (list, tuple)):
        parts = list(thing[:64])
    elif inspect.ismethod(thing):
        parts = [thing.__self__]
    elif inspect.isfunction(thing):
        cells = thing.__closure__ or ()
        parts = [*(thing.__defaults__ or ()), *(c.cell_contents for c in cells if c != types.CellType())]
    for part in parts:
        if callable(part) or isinstance(part, (list, tuple)):
            yield from _modules_behind(part, depth - 1)


def kept_apart(teacher: Any, network: nn.Module) -> Any:
    """A teacher that training ``network`` does not change: itself, or a frozen copy where it is the network.

    Of a function that uses the network there is no copy: a ``ValueError``.
    """
    if not share_weights(teacher, network):
        return teacher
    if isinstance(teacher, nn.Module):
        frozen = copy_frozen(teacher)
        if not share_weights(frozen, network):
            return frozen
    elif inspect.ismethod(teacher):
        return getattr(kept_apart(teacher.__self__, network), teacher.__name__)
    raise ValueError(
        "the teacher is a function of the student's own network, which training changes, and with it the teacher; give "
        "a function of a copy, copy.deepcopy(network), or the module itself, which is copied"
    )


def warmed_decay(decay: float, steps: int) -> float:
    """Decay after a number of steps: a young average forgets faster, so that the initial weights do not linger."""
    return min(decay, (1 + steps) / (10 + steps))


@torch.no_grad()
def update_average(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Move the average towards the live weights: ``average = decay * average + (1 - decay) * live``.

    Parameters that are not trained and buffers are copied. Modules that both share are left alone.
    """
    for module in (average, live):
        reshard(module)
    parameters = list(zip(average.parameters(), live.parameters(), strict=True))
    trained = [(mine, theirs) for mine, theirs in parameters if theirs.requires_grad and mine is not theirs]
    if trained:
        moved, towards = zip(*trained, strict=True)
        get_ema_multi_avg_fn(decay)(moved, towards, torch.tensor(0))
    fixed = [(mine, theirs) for mine, theirs in parameters if not theirs.requires_grad]
    for mine, theirs in (*fixed, *zip(average.buffers(), live.buffers(), strict=True)):
        if mine is not theirs:
            mine.copy_(theirs)
