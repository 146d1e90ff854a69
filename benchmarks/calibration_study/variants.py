"""Objectives and weightings that are only tried here, not offered by the package."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning.flows import FlowMap, Joint, JointMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives import Batch, Examples
from f2d2_lightning.objectives._starts import Starts
from f2d2_lightning.objectives.base import baseline_of, unit_baseline
from f2d2_lightning.objectives.intervals import pick

__all__ = [
    "AveragedTargets",
    "Cycle",
    "Mixture",
    "OwnNetwork",
    "OwnPath",
    "Phases",
    "UncertaintyWeighting",
    "WithoutGradient",
    "log_snr_grid",
]


class _Composed(f2.objectives.Objective):
    """An objective made of others; they share intervals' directions."""

    def __init__(self, *parts: f2.objectives.Objective) -> None:
        super().__init__(parts[0].intervals, parts[0].weighting, parts[0].path)
        if len({part.directions for part in parts}) != 1:
            raise ValueError(f"the parts train different directions: {[part.directions for part in parts]}")
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Any) -> None:
        for part, mine in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(mine)


class Mixture(_Composed):
    """Each step trains on one of several objectives, drawn with given shares."""

    def __init__(self, shares: tuple[float, ...], *parts: f2.objectives.Objective) -> None:
        super().__init__(*parts)
        self.shares = torch.tensor(shares)

    def loss(self, student: JointMap, batch: Batch) -> f2.objectives.Terms:
        return self.parts[int(torch.multinomial(self.shares, 1, generator=self.structure))].loss(student, batch)


class Phases(_Composed):
    """One objective after another; each sees its own progress from 0 to 1."""

    def __init__(self, starts: tuple[float, ...], *parts: f2.objectives.Objective) -> None:
        super().__init__(*parts)
        self.edges = (*starts, 1.0)

    def loss(self, student: JointMap, batch: Batch) -> f2.objectives.Terms:
        progress = batch.progress
        now = max(i for i, start in enumerate(self.edges[:-1]) if progress >= start)
        begin, end = self.edges[now], self.edges[now + 1]
        return self.parts[now].loss(student, replace(batch, progress=(progress - begin) / (end - begin)))


class Cycle(_Composed):
    """Adds the squared error of the student's own way from data to noise and back, in standard deviations of the fit.

    Args:
        part: The objective that it is added to.
        weight: Of the error, summed over dimensions.
        share: Share of the batch that goes round.
    """

    def __init__(self, part: f2.objectives.Objective, weight: float, share: float = 0.25) -> None:
        super().__init__(part)
        self.weight, self.share = weight, share

    def loss(self, student: JointMap, batch: Batch) -> f2.objectives.Terms:
        terms, data, cond = self.parts[0].loss(student, batch), batch.data, batch.cond
        x = data[: max(1, int(self.share * len(data)))]
        steps = self.intervals.steps[int(torch.randint(len(self.intervals.steps), (), generator=self.structure))]
        state = x
        for grid in (time_grid(steps, to_noise=True), time_grid(steps)):
            for s, t in itertools.pairwise(grid):
                state = student.jump(state, s, t, cond).state
        fit = baseline_of(student) or unit_baseline(x)
        error = self.weight * fit.deviations(state - x, expand_time(1.0, x)).square().sum(-1).mean()
        return terms._replace(loss=terms.loss + error, velocity_loss=terms.velocity_loss + error)


class UncertaintyWeighting(f2.Weighting):
    """Each part of the loss divided by its own running mean.

    That is where learned log-variances of the two parts settle (Kendall et al., 2018,
    https://arxiv.org/abs/1705.07115): ``exp(-s) L + s`` is least at ``s = log L``.
    """

    def __call__(
        self, predicted: Joint, examples: Examples, baseline: f2.GaussianBaseline | None = None
    ) -> f2.objectives.Terms:
        terms = super().__call__(predicted, examples, baseline)
        means = getattr(self, "means", None)
        now = torch.stack((terms.velocity_loss, terms.divergence_loss)).detach()
        means = now if means is None else means.lerp(now, 0.02)
        object.__setattr__(self, "means", means)
        velocity, divergence = terms.velocity_loss / means[0], terms.divergence_loss / means[1]
        return terms._replace(loss=velocity + divergence, velocity_loss=velocity, divergence_loss=divergence)


class AveragedTargets(f2.objectives.Semigroup):
    """The midpoint rule whose two short steps are the weight average's, as in shortcut models' released code."""

    average: JointMap | None = None

    def target(self, student: JointMap, *args: Any, **kwargs: Any) -> Joint:
        assert self.average is not None
        return super().target(self.average, *args, **kwargs)


class _OwnStarts(Starts):
    def _start(
        self, kind: str, student: JointMap, x: Tensor, cond: Tensor | None, times: Sequence[float]
    ) -> tuple[Tensor, int]:
        if kind != "student":
            return super()._start(kind, student, x, cond, times)
        steps = pick([k for k in self.steps if k > 1], self.structure)
        stop = pick(range(1, steps), self.structure)
        grid = time_grid(steps, to_noise=True)[: stop + 1]
        with torch.no_grad():
            for s, t in itertools.pairwise(grid):
                x = student.jump(x, s, t, cond).state
        return x, min(range(len(times)), key=lambda i: abs(times[i] - grid[-1]))


class OwnPath(f2.TrajectoryRegression):
    """Some trajectories start where the student's own steps from data to noise have led."""

    def _starts(self) -> Starts:
        return _OwnStarts(**vars(super()._starts()))


class WithoutGradient(FlowMap):
    """A backbone whose features are read, but not changed, by the divergence head."""

    def __init__(self, network: FlowMap) -> None:
        super().__init__()
        self.network = network
        self.directions = network.directions
        self.features = network.features

    def forward_features(self, x: Tensor, s: Any, t: Any, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, features = self.network.forward_features(x, s, t, cond)
        return u, features.detach()

    def forward(self, x: Tensor, s: Any, t: Any, cond: Tensor | None = None) -> Tensor:
        return self.network(x, s, t, cond)


class OwnNetwork(nn.Module):
    """A divergence network that shares nothing with the backbone: a perceptron on the state and both times."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.body = f2.nn.MLP(shape, width=width, blocks=2)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        _, features = self.body.forward_features(x, s, t, cond)
        return self.out(features).squeeze(-1)


def log_snr_grid(steps: int, edge: float = 0.02) -> list[float]:
    """Times from 1 to 0, the inner ones evenly spread in ``log(t / (1 - t))`` between ``edge`` and ``1 - edge``."""
    if steps == 1:
        return [1.0, 0.0]
    top = torch.tensor(edge, dtype=torch.float64).logit().neg()
    inner = torch.linspace(float(top), -float(top), steps + 1, dtype=torch.float64).sigmoid()
    return [1.0, *inner[1:-1].tolist(), 0.0]
