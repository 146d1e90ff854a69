"""Times of a path between noise and data."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from torch import Tensor

from f2d2_lightning.utils.checks import at_least

MOST_STEPS = 2**20
"""Uniform steps: more are a mistake, and their times would fill the memory."""
PLACINGS = (0.0, 0.5)
"""Shares of times near the data that are tried where they are chosen."""


def time_grid(steps: int | Sequence[float], to_noise: bool = False) -> list[float]:
    """Times of a few-step path, ascending from 0 to 1, or descending if ``to_noise``; a ``ValueError`` if they do not.

    From a number of uniform steps, or from the times themselves in either order, 0 and 1 included.

    >>> time_grid(2, to_noise=True)
    [1.0, 0.5, 0.0]
    """
    if isinstance(steps, Tensor):
        steps = steps.tolist()
    if isinstance(steps, str):
        raise ValueError(f"steps is {steps!r}; a whole number of steps, or the times themselves")
    if isinstance(steps, Sequence) or hasattr(steps, "__iter__"):
        grid = sorted(float(t) for t in steps)
        if len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or any(b <= a for a, b in itertools.pairwise(grid)):
            raise ValueError(f"the time grid is {list(steps)}; it needs distinct times that include 0 and 1")
    else:
        try:
            steps = operator.index(steps)
        except TypeError:
            raise ValueError(f"steps is {steps!r}; a whole number of steps, or the times themselves") from None
        at_least(1, steps=steps)
        if steps > MOST_STEPS:
            raise ValueError(f"steps={steps}; up to {MOST_STEPS:,} are taken")
        grid = [k / steps for k in range(steps + 1)]
    return grid[::-1] if to_noise else grid


def times_near_data(count: int) -> list[float]:
    """Ascending times between .9 and .9995, evenly spread in ``log(1 - t)``: down to well below a level of 8 bits.

    Data with point masses (black or white pixels, dequantized) flow there at a steady rate per unit of that logarithm.
    """
    return [1 - 0.1 * (1 / 200) ** ((k + 0.5) / count) for k in range(count)]
