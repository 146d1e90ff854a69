"""Integration of a teacher along a grid of times, state and log-density together, with few evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.paths import Point, expand_time
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.likelihood.time_grids import times_near_data
from f2d2_lightning.objectives.sources import VelocitySource
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.seeding import own_random_state

VERSION = 2
"""Of the numbers that :func:`integrate` makes: raised where they become others, as kept trajectories say it."""


@torch.no_grad()
def integrate(
    source: VelocitySource,
    x: Tensor,
    times: Sequence[float],
    cond: Cond | None = None,
    baseline: GaussianBaseline | None = None,
) -> tuple[Tensor, Tensor]:
    """A second-order predictor-corrector along given times, one evaluation each, with the log-density's change.

    Each step predicts with the two-step Adams-Bashforth rule, evaluates once, and corrects with the trapezoidal rule
    (Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 1993, chapter III.1); twice as many, half
    as long steps for the cost of Heun's method. With a Gaussian fit the scheme is exponential: it integrates what the
    flow does beyond the fit's own, in whitened coordinates against the fit's angles, and is exact for Gaussian data in
    one step. Divergence probes differ from one evaluation to the next so that their errors cancel.

    From ``x`` at the first of ascending or descending times it answers states ``(B, len(times), ...)`` and ``log
    p_t(x_t) - log p_{t_0}(x)``, ``(B, len(times))``, nats.
    """
    chart, source = _Plain(x) if baseline is None else _Whitened(baseline), source.along_path()
    states, change = [x], [x.new_zeros(len(x))]
    if len(times) < 2:
        return torch.stack(states, 1), torch.stack(change, 1)

    def evaluate(state: Tensor, t: float) -> tuple[Tensor, Tensor]:
        at = expand_time(t, state)
        return chart.beyond(state, at, *source(Point(state, at, cond)))

    z = chart.to_chart(x, times[0])
    slope, divergence = evaluate(x, times[0])
    before: tuple[Tensor, Tensor] | None = None  # the last step's slope and length
    for a, b in itertools.pairwise(times):
        start, end = expand_time(a, x), expand_time(b, x)
        turn, clock = chart.elapsed(start, end)
        predicted = slope
        if before is not None:
            predicted = slope + turn / before[1] / 2 * (slope - before[0])
        before = slope, turn
        next_slope, next_divergence = evaluate(chart.from_chart(z + turn * predicted, b), b)
        z = z + turn / 2 * (slope + next_slope)
        gained = chart.own_change(start, end) - clock / 2 * (divergence + next_divergence)
        slope, divergence = next_slope, next_divergence
        states.append(chart.from_chart(z, b))
        change.append(change[-1] + gained)
    return torch.stack(states, 1), torch.stack(change, 1)


def integrated_log_prob(
    source: VelocitySource,
    x: Tensor,
    times: Sequence[float],
    cond: Cond | None = None,
    baseline: GaussianBaseline | None = None,
) -> tuple[Tensor, Tensor]:
    """States of :func:`integrate` along times that go down to noise, and log p of the data ``x``, ``(B,)``, nats."""
    states, change = integrate(source, x, times, cond, baseline)
    return states, normal_log_prob(states[:, -1]) - change[:, -1]


def integrate_both_ways(
    source: VelocitySource,
    times: Sequence[float],
    baseline: GaussianBaseline | None,
    *,
    x: Tensor,
    node: int,
    cond: Cond | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`integrate`, from ``times[node]`` to both ends of ascending times; ``seed`` is that of the probes."""
    with own_random_state(x.device, seed):
        down, down_change = integrate(source, x, times[node::-1], cond, baseline)
        up, up_change = integrate(source, x, times[node:], cond, baseline)
    states = torch.cat((down.flip(1), up[:, 1:]), 1)
    change = torch.cat((down_change.flip(1), up_change[:, 1:]), 1)
    if not bool(states.isfinite().all() and change.isfinite().all()):
        raise FloatingPointError(
            "a teacher trajectory became NaN or infinite; check the teacher (its own samples), or integrate with "
            "more nodes"
        )
    return states, change


class _Plain:
    """Coordinates that are the state's own, against time."""

    def __init__(self, x: Tensor) -> None:
        self.shape = x.shape

    def to_chart(self, x: Tensor, t: float) -> Tensor:
        return x.flatten(1)

    def from_chart(self, z: Tensor, t: float) -> Tensor:
        return z.reshape(self.shape)

    def elapsed(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """How far each coordinate's clock and the mean one go, ``(B or 1, d or 1)`` and ``(B or 1,)``."""
        return (t - s)[:, None], t - s

    def own_change(self, s: Tensor, t: Tensor) -> Tensor | float:
        """Change of log-density that the coordinates account for, nats."""
        return 0.0

    def beyond(self, x: Tensor, t: Tensor, velocity: Tensor, divergence: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and divergence in these coordinates, per unit of the clocks."""
        return velocity.flatten(1), divergence


class _Whitened(_Plain):
    """Whitened coordinates of a Gaussian fit, against its angles; its own flow stands still in them."""

    def __init__(self, baseline: GaussianBaseline) -> None:
        self.baseline = baseline

    def to_chart(self, x: Tensor, t: float) -> Tensor:
        return self.baseline.whiten(x, expand_time(t, x))

    def from_chart(self, z: Tensor, t: float) -> Tensor:
        return self.baseline.unwhiten(z, expand_time(t, z))

    def elapsed(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        turn = self.baseline.angle_rate(s, t) * (t - s)[:1, None]
        return turn, turn.mean(-1)

    def own_change(self, s: Tensor, t: Tensor) -> Tensor:
        return -(t - s) * self.baseline.divergence(s, t)

    def beyond(self, x: Tensor, t: Tensor, velocity: Tensor, divergence: Tensor) -> tuple[Tensor, Tensor]:
        baseline = self.baseline
        rate = baseline.angle_rate(t, t)
        excess = baseline.to_axes(velocity - baseline.average_velocity(x, t, t))
        slope = excess / (baseline.marginal_variances(t).sqrt() * rate)
        return slope, (divergence - baseline.divergence(t, t)) / rate.mean(-1)


def trajectory_times(
    nodes: int, grids: Sequence[int], baseline: GaussianBaseline | None = None, near_data: float = 0.0
) -> list[float]:
    """Times at which trajectories are kept: the likelihood grids' own, of so many steps, and about ``nodes`` in all.

    With a Gaussian fit the others are spread by the fit's mean angle, most of which is turned near the data where
    narrow axes have their say; without, evenly. A share ``near_data`` of them lies close to the data, see
    :func:`times_near_data`.
    """
    if near_data:
        close = times_near_data(round(near_data * nodes))
        others = trajectory_times(max(1, nodes - len(close)), grids, baseline)
        return sorted({*others, *(t for t in close if min(abs(t - other) for other in others) > 1e-6)})
    coarse = math.lcm(*grids) if grids else 1
    if baseline is None:
        fine = max(1, math.ceil(nodes / coarse)) * coarse
        return [k / fine for k in range(fine + 1)]
    # narrow axes turn within their own width of the data, so the table is finer towards t = 1
    table = 1 - torch.logspace(-7, -1, 600, dtype=torch.float64)
    t = torch.cat((torch.linspace(0, 1, 400 * coarse + 1, dtype=torch.float64), table)).unique()
    fit = baseline.clock(t.to(baseline.mean)).double().cpu()
    # a share of plain time, so that wide axes are followed too
    clock = ((fit + 0.3 * t) / 1.3).numpy()
    times: list[float] = []
    for k in range(coarse):
        low, high = np.interp([k / coarse, (k + 1) / coarse], t.numpy(), clock)
        count = max(1, round((high - low) * nodes))
        inner = np.interp(low + (high - low) * np.arange(1, count) / count, clock, t.numpy())
        times.append(k / coarse)
        for value in inner.tolist():
            if value - times[-1] > 1e-6 and (k + 1) / coarse - value > 1e-6:
                times.append(value)
    return [*times, 1.0]
