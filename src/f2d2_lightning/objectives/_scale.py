"""The scale of a divergence head's answers, measured on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from f2d2_lightning.flows.paths import Path
from f2d2_lightning.nn.head import Head
from f2d2_lightning.objectives.sources import VelocitySource
from f2d2_lightning.utils.conditions import Cond


@torch.no_grad()
def measure_scale(
    head: Head,
    source: VelocitySource,
    batches: Iterable[tuple[Tensor, Cond | None]],
    path: Path,
    count: int = 1024,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Root mean square of what a head has to add to its fitted baseline, in the head's own units.

    ``batches`` are data at ``t = 1``, ``(B, ...)``, with conditioning, of which about ``count`` samples are looked at;
    ``reduce`` sums a tensor over processes, where each of them sees a part of the data.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for x, cond in batches:
        noise, t = torch.randn_like(x), torch.rand(len(x), dtype=x.dtype, device=x.device)
        divergence = source(path.point(x, noise, t, cond)).divergence
        if head.baseline is not None:
            divergence = divergence - head.baseline.divergence(t, t)
        if head.per_axis and head.baseline is not None:
            # in units of what independent answers of order one would add up to
            divergence = divergence / head.baseline.angle_rate(t, t).mean(-1) / math.sqrt(head.baseline.dim)
        sums += torch.tensor([float(divergence.square().sum()), len(x)], dtype=torch.float64)
        if sums[1] >= count:
            break
    if reduce is not None:
        sums = reduce(sums)
    return max(1e-3, math.sqrt(float(sums[0] / sums[1])))
