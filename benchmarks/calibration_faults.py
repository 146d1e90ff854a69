"""Where the error of a student's likelihoods comes from, point by point: targets, head, map or grid.

The parts are those of ``F2D2Module.diagnose`` (``f2d2_lightning.metrics.diagnosis``), and those that take determinants.
From the folder of the runs:

    python benchmarks/calibration_faults.py --problem digits --ckpt runs/digits/student/checkpoints/last.ckpt

The determinant of every jump takes one derivative per dimension: 100 digits take seconds, 16 images of Fashion-MNIST
minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import f2d2_lightning as f2
from calibration import PROBLEMS, Problem
from f2d2_lightning.divergence import Exact
from f2d2_lightning.likelihood import JointModel
from f2d2_lightning.metrics.diagnosis import Taught, TaughtPath, faults, taught_path
from f2d2_lightning.objectives import TeacherSource
from f2d2_lightning.objectives.integrator import trajectory_times
from f2d2_lightning.training.loading import load_module
from measuring import markdown

PARTS = {
    "all": "student minus teacher",
    "targets": "trajectories of its training, by their nodes",
    "head": "head, asked along these",
    "map": "head and prior, moved to where the student's jumps lead",
    "probes": "one trajectory, by its probes",
    "own": "head minus log-determinants of the student's own jumps",
    "exact": "student's exact density, by determinants, minus teacher",
    "fine": "32 steps in place of these",
}
"""``targets + head + map = all`` and ``own + exact = all``; a perfect head leaves ``exact``."""
STEPS = (1, 2, 4, 8)


@torch.no_grad()
def true_path(problem: Problem, joint: f2.JointFlowMap, count: int, nodes: int | None = None) -> TaughtPath:
    """The way of the first ``count`` test points to noise, in the problem's number of nodes or in ``nodes``."""
    arguments, baseline = problem.recipe["trajectories"], joint.head.baseline
    nodes = nodes or arguments["nodes"]
    near_data = arguments.get("near_data", 0.0)
    times = trajectory_times(nodes, STEPS, baseline, near_data)
    source = TeacherSource(problem.teacher.average.velocity, Exact() if problem.dim <= 8 else f2.Hutchinson(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return taught_path(Taught(source, times, nodes, near_data, baseline), problem.points[:count])


@torch.no_grad()
def all_faults(
    problem: Problem, joint: f2.JointFlowMap, steps: int, path: TaughtPath, determinants: int | None = None
) -> dict[str, Tensor]:
    """:data:`PARTS` of the student's negative log-likelihoods of test points, ``(B,)`` each, in the problem's unit.

    Args:
        problem: Gives points, teacher and reference.
        joint: A student that goes to noise.
        steps: Of the uniform grid.
        path: The teacher's own, from :func:`true_path`.
        determinants: Of the first so many, for ``own`` and ``exact``; of all by default.
    """
    model = JointModel(joint, problem.shape, None if problem.levels is None else f2.Quantization(problem.levels))
    x = path.states[:, 0]
    truth = problem.reference["value"][: len(x)]
    some = len(x) if determinants is None else min(determinants, len(x))
    exact = f2.log_prob(joint, x[:some], steps, determinant="exact").value
    nats = {
        "probes": path.scatter,
        "own": f2.log_prob(joint, x[:some], steps).value - exact,
        "exact": exact - truth[:some],
        "fine": f2.log_prob(joint, x, 32).value - truth,
    }
    parts = faults(model, path, model.nll_of(truth), steps)
    return parts | {name: model.nll_of(v) - model.nll_of(torch.zeros_like(v)) for name, v in nats.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--ckpt", required=True, help="checkpoint of a student that goes to noise")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS[::-1])
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
    found = [all_faults(problem, joint, k, path, options.determinants) for k in options.steps]
    header = ["error, " + ("nats" if problem.levels is None else "bits/dim"), *(f"{k} steps" for k in options.steps)]
    rows = [
        [text, *(f"{float(f[name].mean()):+.3f} ± {float(f[name].std(correction=0)):.3f}" for f in found)]
        for name, text in PARTS.items()
    ]
    print(f"Mean and standard deviation over {len(path.states)} test points, {options.determinants} with determinants.")
    print(f"\n{markdown(header, rows)}")


if __name__ == "__main__":
    main()
