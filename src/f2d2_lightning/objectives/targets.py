r"""How good a trajectory's targets are, measured before many are integrated.

What a student regresses on is an integrator's answer: with too few nodes the log-likelihood of a trajectory is off by
the same amount each time it is asked for (its bias), and probes of the divergence scatter it (its noise). Bias is
learned with everything else; noise averages out over trajectories, at the price of more of them. Both are measured on a
few data points in seconds, and :func:`choose_targets` takes the cheapest settings that keep them small beside the
spread of log p over data, which is what a likelihood has to tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import DivergenceEstimator, Exact, StillProbe, probes_in_words, with_probes
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.likelihood.time_grids import PLACINGS
from f2d2_lightning.objectives.integrator import integrated_log_prob, trajectory_times
from f2d2_lightning.objectives.sources import TeacherSource
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.measuring import spread_of
from f2d2_lightning.utils.seeding import own_random_state

NODES = (16, 24, 32, 48, 64, 96)
"""What is tried, cheapest first."""
BIAS, NOISE = 0.005, 0.1
"""What is allowed of a trajectory's log p, in spreads: mean absolute bias, root mean square of noise."""
GAUSSIAN = 0.02
"""Difference to the Gaussian fit's log p, in spreads, below which a teacher has learned nothing."""
EXACT_UP_TO = 8
"""Dimensions up to which bias is measured with exact divergences, and above with probes that stay as they are."""
SPREAD_PROBES = 2
"""Probes of each of the two answers whose mean has the spread, where divergences are not exact."""
PASSES = 3.0
"""Cost of a derivative in forward mode, in evaluations."""


@dataclass(frozen=True)
class TargetChoice:
    """Settings of trajectories, and how good targets they make."""

    nodes: int
    near_data: float
    probes: int | None
    """Of Hutchinson's estimator with the Gaussian fit as control variate; 0 for the exact divergence, ``None`` where an
    estimator was given."""
    bias: float
    """Mean absolute value of the systematic error of log p per trajectory, in nats."""
    noise: float
    """Root mean square of its scatter over probes, in nats."""
    spread: float
    """Interquartile range of log p over the data / 1.35, in nats."""
    cost: float
    """Of a trajectory, in evaluations of the network."""
    affordable: float
    """Cost that was allowed."""
    trajectories: int | None = None
    """How many are kept by each process, where that was not said."""
    beyond_fit: float | None = None
    """Mean absolute difference of the teacher's log p to the Gaussian fit's, in spreads; ``None`` without a fit."""

    @property
    def only_fit(self) -> bool:
        """Whether the teacher is the Gaussian fit of the data that its network stands on, and nothing more."""
        return self.beyond_fit is not None and self.beyond_fit < GAUSSIAN

    @property
    def good(self) -> bool:
        """Whether bias and noise are within what is allowed."""
        return self.bias <= BIAS * self.spread and self.noise <= NOISE * self.spread

    def estimator(self, baseline: GaussianBaseline | None, mode: str = "forward") -> DivergenceEstimator:
        """The divergence estimator that was chosen."""
        return with_probes(self.probes or 0, mode, control=baseline)

    def __str__(self) -> str:
        """In words, for a log."""
        how = "the divergence's estimator as given" if self.probes is None else probes_in_words(self.probes)
        near = f", {self.near_data:.0%} of them near the data" if self.near_data else ""
        many = "" if self.trajectories is None else f"{self.trajectories:,} trajectories of "
        return (
            f"{many}{self.nodes} nodes{near}, {how}: log p of a trajectory is off by {self.bias / self.spread:.1%} of "
            f"its spread over data ({self.bias:.2g} of {self.spread:.3g} nats), and scatters by "
            f"{self.noise / self.spread:.1%}"
        )

    def remedy(self) -> str:
        """What it would take to be within what is allowed; empty if it is."""
        wanted = []
        if self.bias > BIAS * self.spread:
            wanted.append(f"nodes={2 * self.nodes}")
        if self.noise > NOISE * self.spread:
            wanted.append(f"Hutchinson(probes={2 * (self.probes or 1)}) or Exact() as estimator")
        return " and ".join(wanted)


@torch.no_grad()
def target_log_prob(
    velocity: Callable[..., Tensor],
    estimator: DivergenceEstimator,
    x: Tensor,
    cond: Cond | None,
    nodes: int,
    near_data: float,
    baseline: GaussianBaseline | None,
    grids: tuple[int, ...],
    seed: int,
) -> Tensor:
    """Log p of data ``(B, ...)`` as a trajectory of the pool has it, ``(B,)``, nats; ``seed`` is that of the probes."""
    times = trajectory_times(nodes, grids, baseline, near_data)
    with own_random_state(x.device, seed):
        return integrated_log_prob(TeacherSource(velocity, estimator), x, times[::-1], cond, baseline)[1]


def _scatter(one: Tensor, other: Tensor) -> float:
    """Root mean square of the noise of each of two answers, over the states where both are finite."""
    apart = (one - other).square()
    return math.sqrt(float(apart[apart.isfinite()].mean()) / 2)


def choose_targets(
    velocity: Callable[..., Tensor],
    x: Tensor,
    cond: Cond | None = None,
    baseline: GaussianBaseline | None = None,
    grids: tuple[int, ...] = (),
    affordable: float = math.inf,
    estimator: DivergenceEstimator | None = None,
    mode: str = "forward",
) -> TargetChoice:
    """The cheapest settings whose targets are good enough, or the best that are affordable.

    Args:
        velocity: The teacher's, ``(x, t, cond) -> v``.
        x: Data at ``t = 1``, ``(B, ...)``; 64 points say enough. Of at least three log p must be finite.
        cond: Conditioning.
        baseline: Gaussian fit that the integrator uses, or ``None``.
        grids: Step counts whose times are among the nodes.
        affordable: Most evaluations of the network per trajectory.
        estimator: The divergence's, where it is not to be chosen; its noise is then said.
        mode: How the network is differentiated.

    Returns:
        The choice; draws no random numbers from the global generator.
    """
    dim = x[0].numel()
    shared: dict[str, Any] = {"x": x, "cond": cond, "baseline": baseline, "grids": grids}

    def ask(how: DivergenceEstimator, nodes: int, near_data: float, seed: int = 7) -> Tensor:
        return target_log_prob(velocity, how, nodes=nodes, near_data=near_data, seed=seed, **shared).cpu().double()

    # with one and the same probe all along, few and many nodes differ by what the nodes make: by as much as with the
    # exact divergence, which takes as many derivatives as there are dimensions (docs/RECIPE.md)
    still: DivergenceEstimator = Exact(mode=mode) if dim <= EXACT_UP_TO else StillProbe(x, baseline, mode)
    truth = ask(still, 2 * NODES[-1], 0.25)
    value, scatter = truth, 0.0
    if dim > EXACT_UP_TO:
        # but it scatters log p from state to state, which probes that are redrawn do far less
        redrawn = with_probes(SPREAD_PROBES, mode, control=baseline)
        one, other = (ask(redrawn, NODES[-1], 0.25, seed) for seed in (7, 8))
        value, scatter = (one + other) / 2, _scatter(one, other) / 2**0.5
    good = truth.isfinite() & value.isfinite()
    if int(good.sum()) < 3:
        raise FloatingPointError(
            f"the teacher's log-likelihood is finite for {int(good.sum())} of {len(x)} points of the data; check the "
            "teacher: its own samples, and the range of the data"
        )
    # a variance of so few values is not known better than to this share: what is left of it may be too little
    seen, least = spread_of(value[good]), (2 / int(good.sum())) ** 0.25
    spread = max(math.sqrt(max(0.0, seen**2 - scatter**2)), least * seen, 1e-2)
    beyond = None
    if baseline is not None:
        fit = baseline.log_prob(x, torch.ones(len(x), dtype=x.dtype, device=x.device)).cpu().double()
        beyond = float((value - fit)[good].abs().mean()) / spread

    def noise_of(how: DivergenceEstimator, nodes: int, near_data: float) -> float:
        return _scatter(*(ask(how, nodes, near_data, seed)[good] for seed in (7, 8)))

    tried: list[tuple[float, float, int, float]] = []  # bias, cost with one probe, nodes, near_data
    for nodes in NODES:
        rows = []
        for near_data in PLACINGS:
            bias = float((ask(still, nodes, near_data) - truth)[good].abs().mean())
            rows.append((bias, PASSES * len(trajectory_times(nodes, grids, baseline, near_data)), nodes, near_data))
        within = [row for row in rows if row[1] <= affordable]
        tried += within or (rows if not tried else [])
        if not within or min(row[0] for row in within) <= BIAS * spread:
            break
    bias, cost, nodes, near_data = min(tried, key=lambda row: (max(row[0], BIAS * spread), row[1], row[0]))
    chosen = partial(TargetChoice, nodes, near_data, bias=bias, spread=spread, affordable=affordable, beyond_fit=beyond)
    if estimator is not None:
        return chosen(probes=None, noise=noise_of(estimator, nodes, near_data), cost=cost)
    # errors of a trajectory's probes cancel, so that twice as many can make a tenth of the noise: each is tried
    probes = 1
    while True:
        noise = noise_of(with_probes(probes, mode, control=baseline), nodes, near_data)
        if noise <= NOISE * spread or 2 * probes * cost > affordable or 2 * probes > dim:
            break
        probes *= 2
    if noise > NOISE * spread and dim * cost <= affordable:
        return chosen(probes=0, noise=0.0, cost=cost * dim)
    return chosen(probes=probes, noise=noise, cost=cost * probes)
