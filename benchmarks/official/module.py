"""The official F2D2 recipe and its likelihood query, to compare with. Not for use: the query is of the wrong interval.

Facts from the public PyTorch code of Ai et al., 2025 (https://arxiv.org/abs/2512.02636): training draws intervals to
data only, of lengths 1, 1/2, ..., 1/64 on an aligned grid, and the diagonal beside them; the target is the midpoint
rule, the divergence of the teacher comes from one Rademacher probe, there is no baseline, and the head's answer is
multiplied by a constant. Its likelihood steps from data to noise, but asks the network at time ``t`` for the interval
``[t, t + 1/K]`` in place of ``[t - 1/K, t]``; at ``t = 1`` that interval lies outside of what was trained.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.flows.paths import like
from f2d2_lightning.likelihood._inputs import check_state
from f2d2_lightning.likelihood._log_prob import LogProb
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.modules import F2D2Module
from f2d2_lightning.nn.head import JointFlowMap
from f2d2_lightning.objectives.intervals import Intervals

__all__ = ["DyadicIntervals", "OfficialF2D2Module", "official_log_prob"]


class DyadicIntervals(Intervals):
    """Half of the batch on the diagonal, half on ``[k h, (k + 1) h]`` with ``h`` one of ``1, 1/2, ..., 2^-finest``.

    Args:
        finest: Largest halving.

    Raises:
        ValueError: If it is outside of 0 to 30.
    """

    def __init__(self, finest: int = 6) -> None:
        if not 0 <= finest <= 30:
            raise ValueError(f"finest is {finest}; it is 0 to 30")
        super().__init__(Direction.TO_DATA, diagonal=0.5, grid=0.5, steps=[2**i for i in range(finest + 1)])

    def sample(
        self,
        count: int,
        device: torch.device | str | None = None,
        on_diagonal: int | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # exactly half and half, as the official loss has both terms on every image
        on_diagonal = torch.arange(count, device=device) < count // 2
        uniform = (torch.rand(count, device=device) * 1024).floor() / 1024
        k = torch.tensor(self.steps, device=device)[torch.randint(len(self.steps), (count,), device=device)]
        step = (torch.rand(count, device=device) * k).floor().clamp(max=k - 1)
        s, t = torch.where(on_diagonal, uniform, step / k), torch.where(on_diagonal, uniform, (step + 1) / k)
        return s, t


@torch.no_grad()
def official_log_prob(joint_map: JointFlowMap, x: Tensor, steps: int, cond: Tensor | None = None) -> LogProb:
    """The official script's number: every step asks for the interval on the wrong side of ``t``.

    Args:
        joint_map: A map trained to data.
        x: Data at ``t = 1``, ``(B, ...)``.
        steps: Uniform steps.
        cond: Conditioning.

    Returns:
        ``value``, ``(B,)``, called nats; it is not the logarithm of any density.
    """
    check_state(x, "x")
    grid = time_grid(steps, to_noise=True)
    state, change = x, x.new_zeros(len(x))
    for t, below in itertools.pairwise(grid):
        length = t - below
        # past the check of times on purpose: t + length exceeds 1 at the first step
        now, after = x.new_full((len(x),), t), x.new_full((len(x),), t + length)
        u, divergence = joint_map.joint(state, now, after, cond)
        state = state - like(torch.full_like(now, length), x) * u
        change = change - length * divergence
    return LogProb(normal_log_prob(state) + change, state, steps)


class OfficialF2D2Module(F2D2Module):
    """F2D2 whose reported likelihoods are the official query's."""

    def log_prob(self, x: Tensor, steps: int = 4, cond: Tensor | None = None) -> LogProb:  # type: ignore[override]
        """See :func:`official_log_prob`."""
        return official_log_prob(self.average, x, steps, cond)
