r"""Where the error of few-step likelihoods comes from, and what to do next.

A student learns from trajectories of its teacher. Beside the reference's log-likelihood of a point, there is what those
trajectories say it is, and what the head says of it along their states; so, point by point and without a rest,

.. math::
    \log p_{\text{few}} - \log p_{\text{ref}} =
    \underbrace{\log p_{\text{taught}} - \log p_{\text{ref}}}_{\text{targets}} +
    \underbrace{\log p_{\text{head on path}} - \log p_{\text{taught}}}_{\text{head}} +
    \underbrace{\log p_{\text{few}} - \log p_{\text{head on path}}}_{\text{map}} .

"Taught" are the objective's own nodes with an exact divergence: an error of the nodes is learned in full. The scatter
of the divergence's probes is not, a student averages over trajectories; see :data:`KEPT`. "Head on path" takes ``D`` at
the states of the taught path in place of those that the student's own jumps lead to. Where more steps would take away
most of an error, it is the grid's.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import Exact, StillProbe
from f2d2_lightning.flows.gaussian import GaussianBaseline, baseline_of
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.ode import EXACT_UP_TO
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives.integrator import integrated_log_prob
from f2d2_lightning.objectives.sources import TeacherSource, VelocitySource
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.measuring import clock, spread_of
from f2d2_lightning.utils.seeding import own_random_state

POINTS = 32
"""Points that are looked at, unless others are given: names the largest part, and costs less than their reference."""
GOAL = 0.05
"""Share of the spread of log p, or nats, whichever is larger, up to which an error is none that needs a cause."""
KEPT = 0.2
"""Share of its targets' scatter that a student keeps. On a mixture of three Gaussians in 7 dimensions (32 nodes) one
probe scattered log p of a trajectory by .46 nats. Heads that learned from 8,192 of them in 400 steps were off by .185,
from exact divergences by .170: .16 of the scatter was kept. Of 1,024 in 600 steps it was .35 (.224 and .155)."""
SHARP_UP_TO = 16
"""Dimensions up to which nodes are judged with the exact divergence; above, with one probe that a point keeps."""
FINER = 3
"""Times as many nodes has the solution that the trajectories' are judged by, and so a ninth of the error."""
LEAST_NODES = 64
"""At least so many it has."""
MANY = 32
"""Steps that tell whether more of them would help, of a map to noise."""


class Taught(NamedTuple):
    """How a student's targets are made."""

    source: VelocitySource
    """Of velocities and divergences."""
    times: Sequence[float]
    """Of the trajectories that it is regressed on, from 0 to 1; of no account for other objectives."""
    nodes: int | None = None
    """That were asked for; ``None`` for an objective without trajectories."""
    near_data: float = 0.0
    """Share of them close to the data."""
    baseline: GaussianBaseline | None = None
    """Gaussian fit that integrates, or ``None``."""
    frozen: bool = False
    """Whether the backbone stays as it is."""


class TaughtPath(NamedTuple):
    """Trajectories from given points to noise, as a student is taught them."""

    times: Sequence[float]
    """Descending, from 1 to 0, ``N``."""
    states: Tensor
    """``(B, N, ...)``."""
    off: Tensor
    """Error of their log-likelihood by their nodes, ``(B,)``, nats."""
    scatter: Tensor
    """Error of one trajectory's by its random probes, ``(B,)``, nats; zero where nothing is random."""
    fine: Tensor | None
    """The log-likelihood in many nodes, ``(B,)``, nats; ``None`` if its divergence was not exact."""

    def at(self, t: float) -> Tensor:
        """States at the kept time nearest to ``t``."""
        return self.states[:, min(range(len(self.times)), key=lambda i: abs(self.times[i] - t))]


def taught_path(
    taught: Taught, x: Tensor, steps: Sequence[int] = (), cond: Cond | None = None, reference: Tensor | None = None
) -> TaughtPath:
    """Integrate a student's targets from points, and find what is wrong with them. Draws from the global generator.

    Points are data ``x``, ``(B, ...)``; the times of grids of so many ``steps`` are added to those of the trajectories.
    Log-likelihoods by the ``reference``, ``(B,)``, nats, judge a student's own diagonal; more nodes judge a teacher's.
    """
    source, times = taught.source, set(taught.times)
    for t in itertools.chain.from_iterable(map(time_grid, steps)):
        if min(abs(t - own) for own in times) > 1e-6:
            times.add(t)
    down = sorted(times, reverse=True)

    def integrated(of: VelocitySource, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        return integrated_log_prob(of, x, times, cond, taught.baseline)

    if not isinstance(source, TeacherSource):
        states, value = integrated(source, down)
        off = torch.zeros_like(value) if reference is None else value - reference
        return TaughtPath(down, states, off, torch.zeros_like(value), None)
    estimator = source.estimator
    exact = x[0].numel() <= SHARP_UP_TO
    mode, step = estimator.mode, getattr(estimator, "step", 1e-2)
    still = Exact(mode=mode, step=step) if exact else StillProbe(x, taught.baseline, mode, step)
    sharp = TeacherSource(source.velocity, still)
    parts = max(FINER, -(-LEAST_NODES // (len(down) - 1)))
    between = [a + (b - a) * k / parts for a, b in itertools.pairwise(down) for k in range(parts)]
    states, value = integrated(sharp, down)
    nothing = torch.zeros_like(value)
    if taught.nodes is None and not exact:
        return TaughtPath(down, states, nothing, nothing, None)
    fine = integrated(sharp, [*between, down[-1]])[1]
    off, scatter = nothing if taught.nodes is None else value - fine, nothing
    if taught.nodes is not None and not isinstance(estimator, Exact):
        one, other = (integrated(source, down)[1] for _ in range(2))
        scatter = (one - other) / math.sqrt(2)
    return TaughtPath(down, states, off, scatter, fine if exact else None)


def faults(
    model: LikelihoodModel, path: TaughtPath, reference: Tensor, steps: int, cond: Cond | None = None
) -> dict[str, Tensor]:
    """Parts of the error of a model's likelihoods, in a number of steps, of the points that a path begins at.

    ``targets + head + map = all`` (this module's docstring), ``(B,)`` each, in ``model.unit`` of negative
    log-likelihoods, as the points' by the ``reference``, ``(B,)``; NaN where an inversion did not converge.
    """
    joint = model.joint_map
    to_noise, change = Direction.TO_NOISE in joint.directions, torch.zeros_like(path.off)
    with model.evaluating():
        for s, t in itertools.pairwise(time_grid(steps, to_noise=True)):
            if to_noise:
                change = change + joint.jump(path.at(s), s, t, cond).log_prob_change
            else:
                change = change - joint.jump(path.at(t), t, s, cond).log_prob_change
    few = model.nll_of(model.log_prob(path.states[:, 0], steps, cond).value)
    on_path = model.nll_of(normal_log_prob(path.states[:, -1]) - change)
    targets = _difference(model, path.off)
    return {"all": few - reference, "targets": targets, "head": on_path - reference - targets, "map": few - on_path}


def _difference(model: LikelihoodModel, off: Tensor) -> Tensor:
    """A difference of log-likelihoods, nats, as one of negative log-likelihoods in the model's unit."""
    return model.nll_of(off) - model.nll_of(torch.zeros_like(off))


def _size(off: Tensor) -> float:
    return float(off.abs().mean())


@dataclass(frozen=True)
class Faults:
    """Mean sizes of the parts of an error, in the diagnosis' unit."""

    steps: int
    error: float
    """Mean absolute error per point."""
    gap: float
    """Mean error per point."""
    targets: float
    """Of the targets, by their nodes (by the student's own diagonal, where that teaches)."""
    probes: float
    """Of the head, by the scatter of its targets; at most what the head is off by."""
    head: float
    """Of the head beyond that."""
    map: float
    """By where jumps land."""
    whose: str
    """The largest, of the four; or ``"grid"``, ``"reference"``, ``"nothing"``."""


@dataclass(frozen=True)
class Diagnosis:
    """Where the error of a model's few-step likelihoods comes from; ``str`` of it is a paragraph."""

    unit: str
    """Of every number: ``"nats"`` or ``"bits/dim"``."""
    points: int
    """That were looked at."""
    spread: float
    """Interquartile range / 1.35 of the reference's log-likelihoods."""
    scatter: float
    """Mean size of one trajectory's error by its probes."""
    reference_error: float
    """Mean size of the reference's own error, as far as it is known; NaN if it is not."""
    best: int
    """Steps with the least error."""
    least: float
    """That error."""
    rows: tuple[Faults, ...]
    """One per step count in which two points or more have a likelihood."""
    remedies: Mapping[str, str]
    """What to do, by :attr:`Faults.whose`."""
    reference_name: str
    seconds: float
    """That this took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"text": str(self)}

    def __str__(self) -> str:
        groups: dict[str, list[Faults]] = {}
        for row in self.rows:
            groups.setdefault(row.whose, []).append(row)
        said = [self._said(whose, rows) for whose, rows in groups.items()]
        return " ".join([*said, f"({self.points} points, {self.seconds:.1f} s.)"])

    def _said(self, whose: str, rows: Sequence[Faults]) -> str:
        def each(name: str) -> str:
            return " / ".join(f"{getattr(row, name):.3g}" for row in rows)

        share = 100 * max(row.error for row in rows) / self.spread if self.spread > 0 else math.inf
        of_spread = f", at most {share:.0f} % of the spread of log p" if share < 1000 else ""
        causes = {
            "targets": f"most of it is in the targets, which are off by {each('targets')}",
            "probes": f"most of it is noise of the targets: probes scatter one trajectory's by {self.scatter:.3g}, and "
            "a student keeps about a fifth of that",
            "head": f"most of it is the head's, whose divergence along the {self.reference_name}'s path is off by "
            f"{each('head')}",
            "map": f"most of it is the map's, whose jumps land elsewhere, which makes {each('map')}",
            "grid": f"most of it is the grid's: {self.best} steps are off by {self.least:.3g}",
            "reference": f"the reference itself may be off by {self.reference_error:.3g}, so whose that is cannot be "
            "told",
            "nothing": "that is within the goal",
        }
        noun = "step" if each("steps") == "1" else "steps"
        off = f"In {each('steps')} {noun} log p is off by {each('error')} {self.unit} a point{of_spread}"
        remedy = f" Next: {self.remedies[whose]}." if whose in self.remedies else ""
        return f"{off}; {causes[whose]}.{remedy}"


def diagnose(
    model: LikelihoodModel,
    taught: Taught,
    x: Tensor,
    reference: Tensor,
    cond: Cond | None = None,
    *,
    steps: Sequence[int] = (),
    reference_error: float = math.nan,
) -> Diagnosis:
    """Find the largest part of the error of a model's likelihoods, for each step count.

    Points are integrated six times over the trajectories' nodes (four times with all derivatives up to
    :data:`SHARP_UP_TO` dimensions), and take some fifty steps of the student. Random numbers are its own.

    Args:
        model: The model.
        taught: How its targets were made.
        x: Data at ``t = 1``, ``(B, ...)``; :data:`POINTS` are enough.
        reference: Their negative log-likelihoods, ``(B,)``, in ``model.unit``; NaN for points to leave out.
        cond: Conditioning.
        steps: Step counts; the model's by default.
        reference_error: Mean size of the reference's own error, in ``model.unit``, where it is known.

    Raises:
        ValueError: If fewer than two points have a likelihood, in whatever step count.
    """
    start, steps, reference = clock(x.device), steps or model.steps, reference.cpu().double()
    nat = _difference(model, -torch.ones(1))
    nats = (model.nll_of(torch.zeros(1)) - reference) / nat
    with torch.no_grad(), own_random_state(x.device, 0), model.evaluating(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "inversion did not converge")
        path = taught_path(taught, x, steps, cond, nats.to(x))
        found = {k: faults(model, path, reference, k, cond) for k in steps}
        errors = {k: parts["all"] for k, parts in found.items()}
        if Direction.TO_NOISE in model.joint_map.directions:
            errors[MANY] = model.nll_of(model.log_prob(x, MANY, cond).value) - reference
    good = {k: value.isfinite() for k, value in errors.items()}
    known = reference.isfinite()
    most = max(int(good[k].sum()) for k in steps)
    if most < 2:
        raise ValueError(
            f"{most} of {len(x)} points have a likelihood and a reference; a diagnosis needs two or more, and {POINTS} "
            "to be of use"
        )
    if path.fine is not None:
        reference_error = max(_size((model.nll_of(path.fine) - reference)[known]), reference_error)
    scatter = _size(_difference(model, path.scatter))
    spread = spread_of(reference[known])
    goal = GOAL * max(spread, float(nat))
    sizes = {k: _size(value[good[k]]) for k, value in errors.items() if int(good[k].sum()) > 1}
    best = min(sizes, key=lambda k: sizes[k])
    rows = []
    for k in (k for k in found if k in sizes):
        parts = found[k]
        targets, head, map_ = (_size(parts[name][good[k]]) for name in ("targets", "head", "map"))
        probes = min(KEPT * scatter, head)
        named = {"targets": targets, "probes": probes, "head": math.sqrt(head**2 - probes**2), "map": map_}
        whose = max(named, key=lambda name: named[name])
        if sizes[k] <= goal:
            whose = "nothing"
        elif reference_error**2 > sizes[k] ** 2 / 2:
            whose = "reference"
        elif best > k and sizes[best] <= sizes[k] / 2:
            whose = "grid"
        rows.append(Faults(k, sizes[k], float(parts["all"][good[k]].mean()), **named, whose=whose))
    off, head = max(row.targets for row in rows) / goal, max(row.head for row in rows)
    remedies = _remedies(model, taught, best, off, scatter > head)
    return Diagnosis(
        *(model.unit, int(known.sum()), spread, scatter, reference_error, best, sizes[best], tuple(rows), remedies),
        *(model.reference_name, clock(x.device) - start),
    )


def _remedies(model: LikelihoodModel, taught: Taught, best: int, excess: float, scattered: bool) -> dict[str, str]:
    """What to do, by whose an error is.

    ``best`` are the steps with the least error, ``excess`` is the error of the targets' nodes in multiples of the goal,
    and ``scattered`` says whether one trajectory's probes are off by more than the head.
    """
    joint, dim = model.joint_map, model.dim
    fit = baseline_of(joint)
    full = dim <= EXACT_UP_TO and fit is not None and fit.covariance != "full"
    # the integrator is of second order; the targets may have half of the goal
    factor = 2 ** min(3, max(1, math.ceil(math.log2(max(2 * excess, 1.0)) / 2)))
    targets = "train longer, or give a teacher: the student's own diagonal makes its targets"
    if taught.nodes is not None and isinstance(taught.source, TeacherSource):
        targets = f"raise nodes to {factor * taught.nodes}"
        if model.levels is not None and not taught.near_data:
            targets += ", half of them close to the data (near_data=0.5)"
    probes = "the exact divergence, estimator=Exact()"
    if dim > EXACT_UP_TO:
        now = getattr(getattr(taught.source, "estimator", None), "probes", 1)
        probes = f"more probes, estimator=Hutchinson({4 * now})"
    head = "train longer, or with a larger head" + (', and covariance="full" in head and backbone' if full else "")
    moves = "train longer, or a larger backbone, or give its jumps more of the loss (a smaller Weighting(divergence))"
    return {
        "targets": targets,
        "probes": f"{probes}, or more trajectories (capacity, refresh)",
        "head": head + (f"; its targets scatter by more than that, which takes {probes}" if scattered else ""),
        "map": "train the backbone as well (frozen=False)" if taught.frozen else moves,
        "grid": f"take {best} steps, or train longer",
        "reference": f"a finer reference, Reference(steps=1000, probes={0 if dim <= EXACT_UP_TO else 4})",
    }
