"""The choices: each changes one thing of the recipe before the study, and says for which problems it is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import f2d2_lightning as f2
from calibration_study.problems import first_states
from calibration_study.recipes import Query, Recipe, inverted, official, own
from calibration_study.variants import (
    AveragedTargets,
    Cycle,
    Mixture,
    OwnNetwork,
    OwnPath,
    Phases,
    UncertaintyWeighting,
)
from official.module import DyadicIntervals

__all__ = ["CHOICES", "Choice"]

ALL = ("checkerboard", "digits", "fashion")
SMALL = ("checkerboard", "digits")


@dataclass(frozen=True)
class Choice:
    """One row of the table, or several that share a training run.

    Args:
        group: What is varied.
        name: How.
        change: Makes the recipe from the one that the study starts from.
        problems: Where it is tried.
        queries: Ways to ask for the likelihood, by what is added to the name.
        grids: Whether other time grids are tried on this student.
        after: Name of the choice whose backbone it starts from.
    """

    group: str
    name: str
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe
    problems: Sequence[str] = SMALL
    queries: Mapping[str, Query] = field(default_factory=lambda: {"": own})
    grids: bool = False
    after: str | None = None


def _trajectories(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.but(trajectories=recipe.trajectories | changes)


def _objective(make: Callable[[Recipe], f2.objectives.Objective]) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.but(make_objective=make)


def _capacity(factor: float) -> Callable[[Recipe], Recipe]:
    return lambda recipe: _trajectories(capacity=int(factor * recipe.trajectories["capacity"]))(recipe)


def _nodes(factor: float) -> Callable[[Recipe], Recipe]:
    return lambda recipe: _trajectories(nodes=round(factor * recipe.trajectories["nodes"]))(recipe)


def _starts(**shares: float) -> Callable[[Recipe], Recipe]:
    return _trajectories(starts=shares)


def _head(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.but(head=recipe.head | changes)


def _scalar_head(covariance: str | None) -> Callable[[Recipe], Recipe]:
    """One number in place of one per axis, which needs no baseline."""
    return lambda recipe: recipe.but(head={"hidden": 128, "layers": 2}, covariance=covariance)


def _own_network(recipe: Recipe) -> Recipe:
    return recipe.but(head={"network": OwnNetwork(recipe.problem.shape, recipe.problem.features // 2)})


def _weighting(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.but(weighting=replace(recipe.weighting, **changes))


def _uncertainty(recipe: Recipe) -> Recipe:
    return recipe.but(weighting=UncertaintyWeighting(adaptive=recipe.weighting.adaptive))


def _official(recipe: Recipe) -> Recipe:
    """All of the official recipe: midpoint rule to data, raw head, its weight of the divergence at the same scale."""
    # its loss divides errors of D by 20,000 at 3,072 dimensions, where the velocity's is a mean over dimensions
    weight = recipe.problem.dim * (3072 / 20_000 / recipe.problem.dim) ** 2
    weighting = f2.Weighting(units="velocity", divergence=weight)
    return recipe.but(
        make_objective=lambda r: f2.objectives.Semigroup("midpoint", DyadicIntervals(), weighting),
        directions="to_data",
        head={"hidden": 128, "layers": 2},
        covariance=None,
        estimator=f2.Hutchinson(1),
    )


def _to_data(recipe: Recipe) -> Recipe:
    return recipe.but(directions="to_data", trajectories=recipe.trajectories | {"likelihood_of_data": False})


def _midpoint(estimator: Callable[[Recipe], f2.divergence.DivergenceEstimator]) -> Callable[[Recipe], Recipe]:
    """The midpoint rule with another estimator; pools have their own rows."""
    return lambda recipe: recipe.but(make_objective=_semigroup, estimator=estimator(recipe))


def _semigroup(recipe: Recipe) -> f2.objectives.Objective:
    return recipe.bootstrap(f2.objectives.Semigroup)


def _with_control(recipe: Recipe) -> f2.divergence.DivergenceEstimator:
    fit = f2.GaussianBaseline(recipe.problem.shape, recipe.covariance or "full")
    fit.fit([first_states(recipe.problem.data(1000).dataset("train"), 5000)])
    return f2.Hutchinson(1, control=fit)


def _whole_steps(recipe: Recipe) -> f2.objectives.Objective:
    """The last quarter on the cached log-determinants of the likelihood grids' whole steps, and nothing else."""
    last = recipe.make_intervals(diagonal=0.0, grid=1.0, to_noise=1.0)
    first = recipe.regression(unroll=0.0)
    return _sharing(Phases((0.0, 0.75), first, recipe.regression(unroll=0.0, intervals=last)))


def _sharing(composed: Phases | Mixture) -> Phases | Mixture:
    """Trajectory parts of one composed objective draw from one pool."""
    regressions = [part for part in composed.parts if isinstance(part, f2.TrajectoryRegression)]
    first = regressions[0]
    for other in regressions[1:]:
        other.pool = first.pool  # type: ignore[method-assign]
    return composed


def _squared_at_the_end(recipe: Recipe) -> f2.objectives.Objective:
    """Adaptive errors, then squared ones in the last half."""
    adaptive = replace(recipe.weighting, adaptive=0.5)
    plain = replace(recipe.weighting, adaptive=0.0)
    first = recipe.regression(weighting=adaptive, unroll=0.0)
    return _sharing(Phases((0.0, 0.5), first, recipe.regression(weighting=plain, unroll=0.5)))


def _together(*changes: Callable[[Recipe], Recipe]) -> Callable[[Recipe], Recipe]:
    """Several changes at once."""

    def change(recipe: Recipe) -> Recipe:
        for each in changes:
            recipe = each(recipe)
        return recipe

    return change


def _intervals(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.but(intervals=recipe.intervals | changes)


MORE = (_starts(perturbed=0.5, noise=0.5), _capacity(3), _nodes(2))
"""Perturbed starts, three times the trajectories, twice the evaluations."""
LIGHT = (*MORE, _weighting(divergence=0.01))
EVEN = (*LIGHT, _intervals(grid=0.3, to_noise=0.5))

CHOICES: tuple[Choice, ...] = (
    Choice("starting point", "starting point", problems=ALL, grids=True),
    Choice("official", "official recipe", _official, ALL, {", its query": official, ", inverted": inverted}),
    Choice("joint or frozen", "no head (samples only)", _weighting(divergence=0.0), ALL, {}),
    # --- direction ---
    Choice("direction", "to data only", _to_data, SMALL, {", official query": official, ", inverted": inverted}),
    # --- objective ---
    Choice("objective", "semigroup, midpoint", _objective(_semigroup), ALL),
    Choice("objective", "semigroup, random split",
           _objective(lambda r: r.bootstrap(f2.objectives.Semigroup, split="random"))),
    Choice("objective", "Lagrangian", _objective(lambda r: r.bootstrap(f2.objectives.Lagrangian))),
    Choice("objective", "Eulerian", _objective(lambda r: r.bootstrap(f2.objectives.Eulerian))),
    Choice(
        "objective", "trajectories and midpoint, half and half",
        _objective(lambda r: Mixture((0.5, 0.5), r.regression(), r.bootstrap(f2.objectives.Semigroup))),
    ),
    Choice(
        "objective", "midpoint, then trajectories",
        _objective(lambda r: Phases((0.0, 0.5), r.bootstrap(f2.objectives.Semigroup), r.regression(unroll=0.5))),
    ),
    Choice(
        "objective", "trajectories, then midpoint",
        _objective(lambda r: Phases((0.0, 0.75), r.regression(unroll=0.0), r.bootstrap(f2.objectives.Semigroup))),
    ),
    # --- whole paths ---
    Choice("whole paths", "never", _trajectories(unroll=0.0), ALL),
    Choice("whole paths", "in the last half", _trajectories(unroll=0.5)),
    Choice("whole paths", "always", _trajectories(unroll=1.0)),
    # --- pool ---
    Choice("pool", "a quarter of the trajectories", _capacity(0.25)),
    Choice("pool", "three times the trajectories", _capacity(3)),
    Choice("pool", "half the evaluations per trajectory", _nodes(0.5)),
    Choice("pool", "twice the evaluations per trajectory", _nodes(2)),
    Choice("pool", "refreshed, 8 trajectories a step", _trajectories(refresh=8.0)),
    Choice("starts", "data only", _starts(data=1.0)),
    Choice("starts", "data and noise", _starts(data=0.5, noise=0.5)),
    Choice("starts", "noise only", _starts(noise=1.0)),
    Choice("starts", "perturbed data and noise", _starts(perturbed=0.5, noise=0.5)),
    Choice("starts", "likelihood from data's trajectories alone", _trajectories(likelihood_of_data=True)),
    Choice("starts", "likelihood from all trajectories", _trajectories(likelihood_of_data=False), ("fashion",)),
    # --- divergence target ---
    Choice("divergence target", "trajectories, exact", lambda r: r.but(estimator=f2.divergence.Exact()), ("digits",)),
    Choice("divergence target", "trajectories, 1 probe", lambda r: r.but(estimator=f2.Hutchinson(1)), SMALL[:1]),
    Choice("divergence target", "trajectories, 4 probes", lambda r: r.but(estimator=f2.Hutchinson(4))),
    Choice(
        "divergence target", "trajectories, 1 probe, Gaussian control variate",
        lambda r: r.but(estimator=_with_control(r)),
    ),
    Choice("divergence target", "midpoint, exact", _midpoint(lambda r: f2.divergence.Exact()), SMALL[:1]),
    Choice("divergence target", "midpoint, 4 probes", _midpoint(lambda r: f2.Hutchinson(4))),
    Choice("divergence target", "midpoint, 1 probe, Gaussian control variate", _midpoint(_with_control)),
    Choice("divergence target", "midpoint, conditional", _midpoint(lambda r: f2.divergence.Conditional(handover=0.97))),
    Choice("divergence target", "midpoint, conditional, then Hutchinson",
           _midpoint(lambda r: f2.divergence.Conditional())),
    Choice("divergence target", "midpoint, targets of the weight average",
           _objective(lambda r: r.bootstrap(AveragedTargets))),
    # --- head ---
    Choice("head", "one number, no baseline", _scalar_head(None)),
    Choice("head", "one number, isotropic baseline", _scalar_head("isotropic")),
    Choice("head", "one number, full baseline", _scalar_head("full")),
    Choice("head", "per axis, isotropic baseline", lambda r: r.but(covariance="isotropic")),
    Choice("head", "per axis, full baseline", lambda r: r.but(covariance="full"), ("digits",)),
    Choice("head", "no hidden layer", _head(layers=0), SMALL[:1]),
    Choice("head", "two hidden layers", _head(layers=2), ("digits",)),
    Choice("head", "features without gradient", lambda r: r.but(detached=True)),
    Choice("head", "its own network", _own_network),
    # --- intervals ---
    Choice("intervals", "uniform", _intervals(grid=0.0), ALL, grids=True),
    Choice("intervals", "grid's own steps, .9", _intervals(grid=0.9)),
    Choice("intervals", "half of the grid's to data", _intervals(to_noise=0.5)),
    Choice(
        "intervals", "from the student's own way to noise",
        lambda r: r.but(
            make_objective=lambda q: q.regression(OwnPath, refresh=8.0),
            trajectories=r.trajectories | {"starts": r.trajectories["starts"] | {"student": 0.3}},
        ),
    ),
    Choice("intervals", "last quarter: whole steps alone", _objective(_whole_steps)),
    # --- loss ---
    Choice("loss", "with a cycle loss", _objective(lambda r: Cycle(r.regression(), 0.3))),
    Choice("loss", "divergence weight .01", _weighting(divergence=0.01), ALL),
    Choice("loss", "divergence weight 1", _weighting(divergence=1.0)),
    Choice("loss", "learned uncertainty", _uncertainty),
    Choice("loss", "adaptive errors", _weighting(adaptive=0.5)),
    Choice("loss", "squared errors", _weighting(adaptive=0.0), ("fashion",)),
    Choice("loss", "adaptive errors, squared in the last half", _objective(_squared_at_the_end)),
    Choice("loss", "velocity's units", _weighting(units="velocity")),
    # --- the rest ---
    Choice("joint or frozen", "frozen backbone", lambda r: r.but(frozen=True), after="no head (samples only)"),
    Choice("weight average", "none", lambda r: r.but(ema_decay=0.0)),
    # longer ones than .985 are alike at this budget: a young average forgets faster
    Choice("weight average", ".9", lambda r: r.but(ema_decay=0.9)),
    Choice("weight average", ".97", lambda r: r.but(ema_decay=0.97)),
    Choice("together", "perturbed starts, 3 x trajectories, 2 x evaluations", _together(*MORE)),
    Choice("together", "the same, divergence weight .01", _together(*LIGHT)),
    Choice("together", "the same, half of the intervals to data, grid .3", _together(*EVEN)),
    Choice("together", "the same, full baseline", _together(*EVEN, lambda r: r.but(covariance="full")), ("digits",)),
    Choice("together", "the same, full baseline, one number", _together(*EVEN, _scalar_head("full"))),
    Choice("precision", "bf16 network, float32 loss", lambda r: r.but(precision="bf16-mixed")),
    Choice("precision", "float64", lambda r: r.but(precision="64-true"), ("checkerboard",)),
)  # fmt: skip
