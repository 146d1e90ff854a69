"""What is measured of a student: likelihoods beside the teacher's, its way round, its samples, and what is at fault.

All likelihoods are negative, in the problem's unit: nats for points, bits per dimension for images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import f2d2_lightning as f2
from calibration_study.problems import Problem
from calibration_study.recipes import Query, own
from f2d2_lightning.divergence import Hutchinson
from f2d2_lightning.flows import Direction
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives import TeacherSource
from f2d2_lightning.objectives.integrator import integrate, trajectory_times
from measuring import log_determinant

__all__ = ["PARTS", "Fault", "TruePath", "choose_grid", "faults", "judge", "likelihoods", "true_path"]


def likelihoods(
    problem: Problem, joint: f2.JointFlowMap, query: Query, steps: int, grid: int | Sequence[float]
) -> dict[str, float]:
    """Agreement with the teacher on test points, on training points, and the way there and back.

    Args:
        problem: Gives points and reference.
        joint: The student.
        query: How it is asked.
        steps: Of the way back.
        grid: Of the way to noise.
    """
    result: dict[str, float] = {}
    for split, suffix in (("test", ""), ("train", "_train")):
        x, reference = problem.points[split], problem.reference[split]
        answer = query(joint, x, grid)
        good = answer.value.isfinite()
        value, truth = problem.in_unit(answer.value)[good], problem.in_unit(reference["value"])[good]
        error = (value - truth).double()
        result |= {
            f"gap{suffix}": float(error.mean()),
            f"error{suffix}": float(error.abs().mean()),
            f"r{suffix}": float(torch.corrcoef(torch.stack((value, truth)).double())[0, 1]),
        }
        if split == "train":
            continue
        noise = answer.noise[good] - reference["noise"][good]
        result |= {
            "gap_error": float(error.std() / len(error) ** 0.5),
            "share": float(good.float().mean()),
            "evaluations": float(answer.evaluations),
            "noise_error": float(noise.square().mean().sqrt()),
        }
        if Direction.TO_DATA in joint.directions and bool(good.any()):
            back = f2.sample(joint, answer.noise[good], steps).state
            result["round_trip"] = float((back - x[good]).square().mean().sqrt() / x.std())
    return result


def judge(problem: Problem, joint: f2.JointFlowMap, steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """Distance of samples to data, and to what the teacher makes of the same noise (root mean square)."""
    result = {"teacher": {"distance": problem.distance(problem.teacher_samples)}}
    for k in steps:
        made = torch.cat([f2.sample(joint, z, k).state for z in problem.noise.split(1000)])
        apart = (made - problem.teacher_samples).square().mean().sqrt()
        result[str(k)] = {"distance": problem.distance(made), "apart": float(apart)}
    return result


def choose_grid(problem: Problem, joint: f2.JointFlowMap, steps: int) -> list[float]:
    """The times on which this student's likelihoods of training points are closest to the teacher's.

    Inner times are moved one after another over multiples of 1/16, twice, from the uniform grid.
    """
    x, truth = (v[:500] for v in (problem.points["train"], problem.reference["train"]["value"]))

    def error(grid: Sequence[float]) -> float:
        off: Tensor = own(joint, x, grid).value - truth
        return float(off.square().mean())

    grid = [1 - k / steps for k in range(steps + 1)]
    best = error(grid)
    for _, place in itertools.product(range(2), range(1, steps)):
        for sixteenths in range(1, 16):
            time = sixteenths / 16
            if not grid[place + 1] < time < grid[place - 1] or time == grid[place]:
                continue
            tried = [*grid[:place], time, *grid[place + 1 :]]
            if (now := error(tried)) < best:
                grid, best = tried, now
    return grid


class Fault(NamedTuple):
    """Negative log-likelihood, in the problem's unit, over points."""

    mean: float
    deviation: float


PARTS = {
    "all": "student minus teacher",
    "path": "head, asked along the teacher's path",
    "off path": "head, moved from the teacher's path to the student's",
    "prior": "prior, where the student lands",
    "own": "head minus log-determinants of the student's own jumps",
    "map": "student's exact density, by determinants, minus teacher",
    "fine": "32 steps in place of these",
    "targets": "trajectories like those of its training",
}
"""What :func:`faults` separates. ``path + off path + prior = all`` and ``own + map = all``."""


class TruePath(NamedTuple):
    """The teacher's trajectories from test points, as those that a student is trained on."""

    times: Sequence[float]
    """Descending, from 1 to 0, ``N``."""
    states: Tensor
    """``(B, N, ...)``."""
    change: Tensor
    """Of the log-density since the data, ``(B, N)``, nats."""

    def at(self, t: float) -> Tensor:
        """States at the kept time nearest to ``t``."""
        return self.states[:, min(range(len(self.times)), key=lambda i: abs(self.times[i] - t))]


@torch.no_grad()
def true_path(problem: Problem, joint: f2.JointFlowMap, count: int, nodes: int | None = None) -> TruePath:
    """The way of the first ``count`` test points to noise, in the problem's number of nodes or in ``nodes``."""
    arguments, baseline = problem.trajectories, joint.head.baseline
    nodes = nodes or arguments["nodes"]
    times = trajectory_times(nodes, (1, 2, 4, 8), baseline, arguments.get("near_data", 0.0))[::-1]
    source = TeacherSource(
        problem.teacher.average.velocity, f2.divergence.Exact() if problem.dim <= 8 else Hutchinson(1)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        states, change = integrate(source, problem.points["test"][:count], times, None, baseline)
    return TruePath(times, states, change)


@torch.no_grad()
def faults(
    problem: Problem, joint: f2.JointFlowMap, steps: int, path: TruePath, determinants: int | None = None
) -> dict[str, Fault]:
    r"""Whose the error is, by putting one part of the truth in at a time; test points.

    With ``X`` the student's map, ``D`` its head, and the teacher's own path and log-density beside them:

    - ``all``: the student's log-likelihood minus the teacher's, what users see. It is the sum of the next three:
    - ``path``: :math:`-\sum D\,\Delta t` asked along the teacher's states, minus the teacher's change;
    - ``off path``: the same along the student's own states, minus that along the teacher's;
    - ``prior``: the prior's log-density where the student lands, minus that where the teacher does;
    - ``own``: the head along the student's states, minus the log-determinant of the student's jumps there; none for
      a head that is consistent with its map;
    - ``map``: the student's exact log-density by change of variables, minus the teacher's: what a perfect head leaves;
    - ``fine``: as ``all``, in 32 steps: what is left is not the grid's;
    - ``targets``: the log-likelihood that the trajectories give, minus the fine reference's.

    Args:
        problem: Gives points, teacher and reference.
        joint: A student that goes to noise.
        steps: Of the uniform grid.
        path: The teacher's own, from :func:`true_path`.
        determinants: Of them, for ``own`` and ``map``; all by default.
    """
    x = path.states[:, 0]
    some = len(x) if determinants is None else min(determinants, len(x))
    truth = {name: value[: len(x)] for name, value in problem.reference["test"].items()}
    on_path, own_change, volume, state = torch.zeros(len(x)), torch.zeros(len(x)), torch.zeros(some), x
    for s, t in itertools.pairwise(time_grid(steps, to_noise=True)):
        on_path = on_path - joint.jump(path.at(s), s, t, None).log_prob_change
        after, delta = joint.jump(state, s, t, None)
        own_change = own_change - delta
        volume = volume + log_determinant(lambda y, s=s, t=t: joint.jump(y, s, t, None).state, state[:some])  # type: ignore[misc]
        state = after
    prior, true_prior = normal_log_prob(state), normal_log_prob(truth["noise"])
    parts = {
        "all": prior + own_change - truth["value"],
        "path": on_path - (truth["value"] - true_prior),
        "off path": own_change - on_path,
        "prior": prior - true_prior,
        "own": own_change[:some] - volume,
        "map": (prior - truth["value"])[:some] + volume,
        "fine": own(joint, x, 32).value - truth["value"],
        "targets": normal_log_prob(path.states[:, -1]) - path.change[:, -1] - truth["value"],
    }
    scale = 1.0 if problem.levels is None else 1 / (problem.dim * math.log(2))
    return {name: Fault(-float(v.mean()) * scale, float(v.std(correction=0)) * scale) for name, v in parts.items()}
