"""Weights of a foreign network by name, every one of which is to be used exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.utils.checks import listed
from f2d2_lightning.utils.pickles import Record


def record_weights(record: Any, prefix: str = "", above: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Parameters and buffers of a module that was read as a record, by their names in its ``state_dict``.

    A record that is no module, or contains itself, is refused; ``above`` are those that it is in.
    """
    state = record.state if isinstance(record, Record) else {}
    parameters, buffers, modules = (state.get(kind) for kind in ("_parameters", "_buffers", "_modules"))
    if not (isinstance(parameters, dict) and isinstance(buffers, dict) and isinstance(modules, dict)):
        raise ValueError(f"{prefix or 'the network'} is no module: it has no parameters, buffers and modules")
    if id(record) in above or len(above) > 32:
        raise ValueError(f"{prefix} is a module inside itself")
    values = [*parameters.items(), *buffers.items()]
    found = {f"{prefix}{name}": value for name, value in values if isinstance(value, Tensor)}
    for name, module in modules.items():
        if module is not None:
            found |= record_weights(module, f"{prefix}{name}.", (*above, id(record)))
    return found


class Weights:
    """Weights of a file, by name, that are taken one by one; at the end none is left. Errors call them ``source``."""

    def __init__(self, stored: Mapping[str, Tensor], source: str) -> None:
        self.source = source
        self._left = dict(stored)
        self._problems: list[str] = []

    def names(self) -> list[str]:
        """Names of those that are left."""
        return list(self._left)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one, without taking it; a ``ValueError`` if there is none of this name."""
        if name not in self._left:
            raise ValueError(f"{self.source} has no weight {name!r}; it is of another architecture")
        return tuple(self._left[name].shape)

    def take(self, name: str) -> Tensor | None:
        """One of them in its dtype and in memory of its own, or ``None``: it is listed as missing in the end."""
        if name not in self._left:
            self.complain(f"{name} is missing")
            return None
        return self._left.pop(name).clone(memory_format=torch.contiguous_format)

    def drop(self, bears_nothing: Callable[[str], bool]) -> None:
        """Give up those of such names, because they do not bear on the answer."""
        self._left = {name: value for name, value in self._left.items() if not bears_nothing(name)}

    def complain(self, problem: str) -> None:
        """Note what does not fit."""
        self._problems.append(problem)

    @torch.no_grad()
    def fill(
        self, module: nn.Module, ours: str, theirs: str, change: Callable[[Tensor], Tensor] = lambda value: value
    ) -> None:
        """Put one, changed, in the place of a parameter or buffer of ``module``, in its dtype, or note why not."""
        value = self.take(theirs)
        if value is None:
            return
        value = change(value)
        owner, _, last = ours.rpartition(".")
        mine = getattr(module.get_submodule(owner), last)
        if value.shape == mine.shape and value.is_floating_point():
            mine.data = value.contiguous().to(torch.promote_types(value.dtype, torch.float32))
        else:
            needed = f"{tuple(mine.shape)} of floats is needed"
            self.complain(f"{theirs} has shape {tuple(value.shape)} ({value.dtype}), and {needed}")

    def fill_layers(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Fill linear layers of a module, ``{ours: theirs}``."""
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                self.fill(module, f"{ours}.{kind}", f"{theirs}.{kind}")

    def finish(self) -> None:
        """See that nothing is missing and nothing left; a ``ValueError`` lists what did not fit."""
        problems = [*self._problems, *(f"{name} {tuple(self._left[name].shape)} has no place" for name in self._left)]
        if problems:
            raise ValueError(f"{self.source} does not fit, it is of another architecture: {listed(problems)}")
