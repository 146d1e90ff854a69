"""Results that a person can read, and that other libraries take."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

NATS = ("value", "log_prob", "standard_error", "log_target")
"""Beginnings of the names of what is in nats."""


class Answer:
    """A dataclass of tensors ``(B, ...)``: short in print, and NumPy arrays where they are wanted."""

    def __repr__(self) -> str:
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        unit = {name: " nats" * name.startswith(NATS) for name in named}
        said = [f"{name}={_shown(value)}{unit[name]}" for name, value in named.items() if value is not None]
        return f"{type(self).__name__}({', '.join(said)})"

    def numpy(self) -> dict[str, Any]:
        """What there is by name: tensors as NumPy arrays without gradients, numbers as they are.

        ``pandas.Series(answer.numpy()["value"])`` is a column of a table.
        """
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: as_numpy(value) for name, value in named.items() if value is not None}


def _shown(value: Any) -> str:
    """A tensor by its shape and what it holds: mean and standard deviation, or how many are true."""
    if not isinstance(value, Tensor):
        return repr(value)
    shape = str(tuple(value.shape))
    if value.dtype == torch.bool:
        return f"{shape} {int(value.sum())} true"
    known = value.detach().double()
    known = known[known.isfinite()]
    missing = "" if len(known) == value.numel() else f", {value.numel() - len(known)} not finite"
    if not len(known):
        return shape + missing
    spread = f"±{float(known.std()):.3g}" if len(known) > 1 else ""
    return f"{shape} {float(known.mean()):.4g}{spread}{missing}"


def as_numpy(value: Any) -> np.ndarray | Any:
    """A tensor as an array; NumPy has no bfloat16."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
