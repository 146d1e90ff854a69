"""Where a teacher's trajectories begin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import JointMap
from f2d2_lightning.flows.paths import Path, expand_time, like
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.sampling import sample
from f2d2_lightning.objectives.intervals import pick
from f2d2_lightning.utils.checks import check_fields
from f2d2_lightning.utils.conditions import Cond, joined, some_of

KINDS = ("data", "perturbed", "mixed", "path", "noise", "wide", "student")
WIDER = 0.25
"""Of ``"wide"`` noise: its deviation is the exponential of so many times the size of a normal number.

Points that a teacher of few data has not seen lie on trajectories from noise of deviation 1.07 to 1.2 on average, to
1.6 and beyond (validation points of digits and of three tables, docs/RECIPE.md); its samples never do.
"""


@dataclass(frozen=True)
class Starts:
    """Shares of each kind of start, and how they are made; the fields are those of a trajectory regression."""

    shares: Mapping[str, float]
    perturbation: tuple[float, float]
    steps: Sequence[int]
    """Step counts of the student's samples."""
    path: Path
    quantization: Quantization | None = None
    structure: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        shares, perturbation = self.shares, self.perturbation
        if set(shares) - set(KINDS) or not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ValueError(f"starts is {shares}; it maps some of {', '.join(KINDS)} to shares that are not negative")
        if not 0 < perturbation[0] <= perturbation[1]:
            raise ValueError(f"perturbation is {perturbation}; two positive numbers, the smaller first")

    def draw(
        self, student: JointMap, x: Tensor, cond: Cond | None, times: Sequence[float]
    ) -> dict[int, tuple[Tensor, Cond | None]]:
        """One start for each state of a batch of data, ``(B, ...)``: by node of ``times``, states and conditioning."""
        shares = torch.tensor([float(share) for share in self.shares.values()])
        kinds = torch.multinomial(shares, len(x), replacement=True, generator=self.structure).to(x.device)
        # starts at the same time are integrated together
        groups: dict[int, list[tuple[Tensor, Cond | None]]] = {}
        for index, kind in enumerate(self.shares):
            mine = (kinds == index).nonzero().squeeze(-1)
            if len(mine):
                cond_mine = some_of(cond, mine)
                start, node = self._start(kind, student, x[mine], cond_mine, times)
                groups.setdefault(node, []).append((start, cond_mine))
        found: dict[int, tuple[Tensor, Cond | None]] = {}
        for node, parts in groups.items():
            starts, conds = zip(*parts)
            found[node] = torch.cat(starts), joined(conds)
        return found

    @torch.no_grad()
    def _start(
        self, kind: str, student: JointMap, x: Tensor, cond: Cond | None, times: Sequence[float]
    ) -> tuple[Tensor, int]:
        """States to start from, and the node at which."""
        last = len(times) - 1
        if kind == "data":
            return x, last
        if kind == "perturbed":
            low, high = (math.log(value) for value in self.perturbation)
            size = (low + (high - low) * torch.rand(len(x), dtype=x.dtype, device=x.device)).exp()
            return self._on_levels(x + like(size, x) * torch.randn_like(x)), last
        if kind == "mixed":
            return self._on_levels(_mix_neighbors(x)), last
        noise = torch.randn_like(x)
        if kind == "path" and last > 1:
            node = pick(range(1, last), self.structure)
            return self.path.sample(x, noise, expand_time(times[node], x)), node
        if kind == "student":
            return sample(student, noise, pick(self.steps, self.structure), cond).state, last
        if kind == "wide":
            noise = noise * like((WIDER * torch.randn(len(x), dtype=x.dtype, device=x.device).abs()).exp(), x)
        return noise, 0

    def _on_levels(self, x: Tensor) -> Tensor:
        if self.quantization is None:
            return x
        return self.quantization.dequantize(self.quantization.quantize(x)).to(x.dtype)


def _mix_neighbors(x: Tensor) -> Tensor:
    """Points between each sample and one of its five nearest neighbours, shape of ``x``.

    Chawla et al., "SMOTE: Synthetic Minority Over-sampling Technique", 2002, https://doi.org/10.1613/jair.953
    """
    if len(x) < 2:
        return x
    flat = x.flatten(1)
    distance = torch.cdist(flat, flat)
    distance.fill_diagonal_(math.inf)
    nearest = distance.topk(min(5, len(x) - 1), largest=False).indices
    other = x[nearest.gather(1, torch.randint(nearest.shape[1], (len(x), 1), device=x.device)).squeeze(1)]
    share = like(torch.rand(len(x), dtype=x.dtype, device=x.device), x)
    return (1 - share) * x + share * other
