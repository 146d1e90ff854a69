"""Units of rows: a model's states are standardised, and its log-likelihoods are of states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.utils.checks import check_shape


@dataclass(frozen=True)
class Units:
    """Of rows, shape of one each: a state is what is left of a row without ``center``, in ``scale``."""

    center: Tensor
    scale: Tensor
    columns: list[str] | None = None
    """Names of a row's columns, where they have some."""

    @classmethod
    def of(cls, rows: Tensor, columns: list[str] | None = None) -> Units:
        """Mean and deviation of rows ``(N, ...)``, of a column each for itself, in the rows' precision."""
        # entries of images and the like differ in scale for other reasons
        axes = (0,) if rows.ndim == 2 else tuple(range(rows.ndim))
        found = (rows.double().mean(axes), rows.double().std(axes))
        center, deviation = (part.to(rows.dtype).expand(rows.shape[1:]).clone() for part in found)
        # a constant stays one, and is said by the checks before training
        return cls(center, torch.where(deviation > 0, deviation, torch.ones_like(deviation)), columns)

    @property
    def log_scale(self) -> float:
        """Logarithm of the volume, in the units of the rows, of a unit of the states."""
        return float(self.scale.double().log().sum())

    def states(self, rows: Tensor) -> Tensor:
        """Rows ``(N, ...)`` as states, in single precision; rows and units may have more.

        Raises:
            ValueError: If rows have another shape than the units'.
        """
        check_shape(rows, self.scale.shape, "the units are of", "give rows of the columns that they were taken from")
        return ((rows - self.center) / self.scale).float()

    def rows(self, states: Tensor) -> Tensor:
        """States ``(N, ...)`` as rows, in the precision of states or of units, whichever is more."""
        return states * self.scale + self.center

    @classmethod
    def loaded(cls, state: Mapping[str, Any]) -> Units:
        """Those of a checkpoint, in which they stand as the tensors and the list that they are.

        Raises:
            ValueError: If they are no such values.
        """
        both, columns = [state.get(name) for name in ("center", "scale")], state.get("columns")
        tensors = [part for part in both if isinstance(part, Tensor) and part.is_floating_point()]
        right = len(tensors) == 2 and tensors[0].shape == tensors[1].shape and _named(columns)
        if not right or not bool(tensors[0].isfinite().all() and (tensors[1].isfinite() & (tensors[1] > 0)).all()):
            raise ValueError(
                f"units of a table in a checkpoint are {dict(state)!r:.80}; center and scale are expected, finite "
                "tensors of one shape, scales above zero, and of columns a list of names or None"
            )
        return cls(tensors[0], tensors[1], columns)

    def kept(self) -> dict[str, Any]:
        """As plain values, for a file: one where all entries of a row have the same, else all of them in order."""
        parts = {"center": self.center.flatten(), "scale": self.scale.flatten()}
        kept = {name: (part[:1] if bool((part == part[0]).all()) else part).tolist() for name, part in parts.items()}
        return kept | {"columns": self.columns}

    @classmethod
    def read(cls, kept: Any, shape: Sequence[int]) -> Units | None:
        """Inverse of :meth:`kept` for rows of a shape; ``None`` of a file that has none.

        Raises:
            ValueError: If they are no such values.
        """
        if kept is None:
            return None
        names = ("center", "scale", "columns")
        *parts, columns = (kept.get(name) if isinstance(kept, Mapping) else None for name in names)
        size = math.prod(shape)
        if not _named(columns) or not all(_numbers(part, size) for part in parts) or min(parts[1]) <= 0:  # type: ignore[arg-type]
            raise ValueError(
                f"units in a file are {kept!r:.80}; center and scale are expected, each a list of one number or of "
                f"those of a row of shape {tuple(shape)}, scales above zero, and of columns a list of names or null"
            )
        both = torch.stack([torch.tensor(part, dtype=torch.float64).expand(size).reshape(*shape) for part in parts])
        center, scale = both.float() if torch.equal(both, both.float().double()) else both
        return cls(center, scale, columns)


def _named(columns: Any) -> bool:
    return columns is None or (isinstance(columns, list) and all(type(name) is str for name in columns))


def _numbers(part: Any, size: int) -> bool:
    known = isinstance(part, list) and len(part) in (1, size)
    return known and all(type(number) in (int, float) and abs(number) < 1e308 for number in part)
