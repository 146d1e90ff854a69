"""Where a value stands among others."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["percentile_rank"]


def percentile_rank(values: Tensor, among: Tensor) -> Tensor:
    """Percentage of ``among`` that lies below each value; what equals it counts half (mid-rank).

    Args:
        values: ``(N,)``; NaN has no rank and stays NaN.
        among: What to compare with, ``(M,)``; NaN is left out.

    Returns:
        float64, ``(N,)``, in [0, 100].

    Raises:
        ValueError: If there is nothing to compare with.

    >>> percentile_rank(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [0.0, 37.5, 100.0]
    """
    sorted_ = among[~among.isnan()].double().sort().values
    if values.ndim != 1 or among.ndim != 1 or len(sorted_) == 0:
        raise ValueError(
            f"values have shape {tuple(values.shape)} and what they are compared with {tuple(among.shape)}, of which "
            f"{len(sorted_)} are numbers; both are one-dimensional, and at least one number is needed"
        )
    values = values.double()
    below = torch.searchsorted(sorted_, values, right=False)
    not_above = torch.searchsorted(sorted_, values, right=True)
    rank = 50.0 * (below + not_above).double() / len(sorted_)
    return torch.where(values.isnan(), values, rank)
