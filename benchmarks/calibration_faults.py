"""Whose the error of a student's likelihoods is: the map's, the head's, the trajectories' or the grid's.

One part of the truth is put in at a time, see ``faults``. From the folder of the runs:

    python benchmarks/calibration_faults.py --problem digits --ckpt runs/digits/student/checkpoints/last.ckpt

The determinant of every jump takes one derivative per dimension: 100 digits take seconds, 16 images of Fashion-MNIST
minutes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import f2d2_lightning as f2
from calibration import PROBLEMS, Problem
from f2d2_lightning.divergence import Exact
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives import TeacherSource
from f2d2_lightning.objectives.integrator import integrate, trajectory_times
from f2d2_lightning.training.loading import load_module
from measuring import log_determinant, markdown

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
    arguments, baseline = problem.recipe["trajectories"], joint.head.baseline
    nodes = nodes or arguments["nodes"]
    times = trajectory_times(nodes, (1, 2, 4, 8), baseline, arguments.get("near_data", 0.0))[::-1]
    source = TeacherSource(problem.teacher.average.velocity, Exact() if problem.dim <= 8 else f2.Hutchinson(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        states, change = integrate(source, problem.points[:count], times, None, baseline)
    return TruePath(times, states, change)


@torch.no_grad()
def faults(
    problem: Problem, joint: f2.JointFlowMap, steps: int, path: TruePath, determinants: int | None = None
) -> dict[str, Tensor]:
    r"""Parts of the student's negative log-likelihoods of test points, ``(B,)`` each, in the problem's unit.

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
        determinants: Of the first so many, for ``own`` and ``map``; of all by default.
    """
    x = path.states[:, 0]
    some = len(x) if determinants is None else min(determinants, len(x))
    truth = {name: value[: len(x)] for name, value in problem.reference.items()}
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
        "fine": f2.log_prob(joint, x, 32).value - truth["value"],
        "targets": normal_log_prob(path.states[:, -1]) - path.change[:, -1] - truth["value"],
    }
    return {name: problem.in_unit(v) - problem.in_unit(torch.zeros_like(v)) for name, v in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--ckpt", required=True, help="checkpoint of a student that goes to noise")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4, 2, 1])
    parser.add_argument("--points", type=int, default=100, help="test points")
    parser.add_argument("--nodes", type=int, help="of the teacher's trajectories, as in the student's training")
    parser.add_argument("--determinants", type=int, default=100, help="points whose determinants are computed")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the teacher is")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    problem = PROBLEMS[options.problem]
    problem.folder = options.runs
    joint = load_module(options.ckpt, f2.F2D2Module).average
    path = true_path(problem, joint, options.points, options.nodes)
    found = [faults(problem, joint, k, path, options.determinants) for k in options.steps]
    header = ["error, " + ("nats" if problem.levels is None else "bits/dim"), *(f"{k} steps" for k in options.steps)]
    rows = [
        [text, *(f"{float(f[name].mean()):+.3f} ± {float(f[name].std(correction=0)):.3f}" for f in found)]
        for name, text in PARTS.items()
    ]
    print(f"Mean and standard deviation over {len(path.states)} test points, {options.determinants} with determinants.")
    print(f"\n{markdown(header, rows)}")


if __name__ == "__main__":
    main()
