"""Weights of a foreign network by name, every one of which is to be used exactly once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.utils.pickles import Record

__all__ = ["Weights", "fill", "record_weights", "tensors_of"]


def record_weights(record: Any, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a module that was read as a record, by their names in its ``state_dict``.

    Raises:
        ValueError: If the record is no module, or contains itself.
    """
    found: dict[str, Tensor] = {}
    _collect(record, prefix, found, ())
    return found


def _collect(record: Any, prefix: str, found: dict[str, Tensor], above: tuple[int, ...]) -> None:
    parts = [
        record.state.get(n) if isinstance(record, Record) else None for n in ("_parameters", "_buffers", "_modules")
    ]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{prefix or 'the network'} is no module: it has no parameters, buffers and modules")
    if id(record) in above or len(above) > 32:
        raise ValueError(f"{prefix} is a module inside itself")
    parameters, buffers, modules = parts
    for name, value in [*parameters.items(), *buffers.items()]:  # type: ignore[union-attr]
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
    for name, module in modules.items():  # type: ignore[union-attr]
        if module is not None:
            _collect(module, f"{prefix}{name}.", found, (*above, id(record)))


def tensors_of(values: Any, prefix: str) -> dict[str, Tensor]:
    """Those entries of a ``state_dict`` whose names begin with ``prefix``, without it."""
    if not isinstance(values, dict):
        return {}
    named = {name: value for name, value in values.items() if isinstance(name, str) and name.startswith(prefix)}
    return {name[len(prefix) :]: value for name, value in named.items() if isinstance(value, Tensor)}


class Weights:
    """Weights of a file that are taken one by one; at the end none is left.

    Args:
        stored: Weights by name.
        source: What they are of, for errors.
    """

    def __init__(self, stored: Mapping[str, Tensor], source: str) -> None:
        self.source = source
        self._left = dict(stored)
        self._problems: list[str] = []

    def names(self) -> list[str]:
        """Names of those that are left."""
        return list(self._left)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one, without taking it.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self._left:
            raise ValueError(f"{self.source} has no weight {name!r}; it is of another architecture")
        return tuple(self._left[name].shape)

    def take(self, name: str) -> Tensor | None:
        """One of them in its dtype and in memory of its own, or ``None``: it is listed as missing in the end."""
        if name not in self._left:
            self._problems.append(f"{name} is missing")
            return None
        return self._left.pop(name).clone(memory_format=torch.contiguous_format)

    def drop(self, ending: str) -> None:
        """Give up those whose names end so, because they do not bear on the answer."""
        self._left = {name: value for name, value in self._left.items() if not name.endswith(ending)}

    def complain(self, problem: str) -> None:
        """Note what does not fit."""
        self._problems.append(problem)

    def finish(self) -> None:
        """See that nothing is missing and nothing left.

        Raises:
            ValueError: Lists what did not fit.
        """
        problems = [*self._problems, *(f"{name} {tuple(self._left[name].shape)} has no place" for name in self._left)]
        if problems:
            more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise ValueError(
                f"{self.source} does not fit, it is of another architecture: {'; '.join(problems[:12])}{more}"
            )


@torch.no_grad()
def fill(module: nn.Module, name: str, value: Tensor | None, weights: Weights, theirs: str) -> None:
    """Put ``value`` in the place of a parameter or buffer of ``module``, in the value's dtype, or note why not."""
    owner = module.get_submodule(name.rpartition(".")[0])
    last = name.rpartition(".")[2]
    mine = getattr(owner, last)
    if value is None:
        return
    if value.shape != mine.shape or not value.is_floating_point():
        weights.complain(
            f"{theirs} has shape {tuple(value.shape)} ({value.dtype}), and {tuple(mine.shape)} of floats is needed"
        )
        return
    mine.data = value.contiguous().to(torch.promote_types(value.dtype, torch.float32))
