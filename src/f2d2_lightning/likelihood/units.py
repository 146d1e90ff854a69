"""Units of rows: a model's states are standardised, and its log-likelihoods are of states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """Of rows, shape of one each: a state is what is left of a row without ``center``, in ``scale``."""

    center: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Units:
        """Mean and deviation of rows ``(N, ...)``, of a column each for itself, in the rows' precision."""
        # entries of images and the like differ in scale for other reasons
        axes = (0,) if rows.ndim == 2 else tuple(range(rows.ndim))
        found = (rows.double().mean(axes), rows.double().std(axes))
        center, deviation = (part.to(rows.dtype).expand(rows.shape[1:]).clone() for part in found)
        # a constant stays one, and is said by the checks before training
        return cls(center, torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    @property
    def log_scale(self) -> float:
        """Logarithm of the volume, in the units of the rows, of a unit of the states."""
        return float(self.scale.double().log().sum())

    def states(self, rows: Tensor) -> Tensor:
        """Rows ``(N, ...)`` as states, in single precision; rows and units may have more."""
        return ((rows - self.center) / self.scale).float()

    def rows(self, states: Tensor) -> Tensor:
        """States ``(N, ...)`` as rows, in the precision of states or of units, whichever is more."""
        return states * self.scale + self.center

    def kept(self) -> dict[str, list[float]]:
        """As plain values, for a file: one where all entries of a row have the same, else all of them in order."""
        parts = {name: part.flatten() for name, part in vars(self).items()}
        return {name: (part[:1] if bool((part == part[0]).all()) else part).tolist() for name, part in parts.items()}

    @classmethod
    def read(cls, kept: Any, shape: Sequence[int]) -> Units | None:
        """Inverse of :meth:`kept` for rows of a shape; ``None`` of a file that has none.

        Raises:
            ValueError: If they are no such values.
        """
        if kept is None:
            return None
        parts = [kept.get(name) if isinstance(kept, Mapping) else None for name in ("center", "scale")]
        size = math.prod(shape)
        if not all(_numbers(part, size) for part in parts) or min(parts[1]) <= 0:  # type: ignore[arg-type]
            raise ValueError(
                f"units in a file are {kept!r:.80}; center and scale are expected, each a list of one number or of "
                f"those of a row of shape {tuple(shape)}, scales above zero"
            )
        both = torch.stack([torch.tensor(part, dtype=torch.float64).expand(size).reshape(*shape) for part in parts])
        return cls(*(both.float() if torch.equal(both, both.float().double()) else both))


def _numbers(part: Any, size: int) -> bool:
    known = isinstance(part, list) and len(part) in (1, size)
    return known and all(type(number) in (int, float) and abs(number) < 1e308 for number in part)
