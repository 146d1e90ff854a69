"""Whose the error of a student's likelihoods is: the map's, the head's, the trajectories' or the grid's.

One part of the truth is put in at a time, see ``faults`` in ``calibration_study/measures.py``. From the folder of the
runs:

    python benchmarks/calibration_faults.py --problem digits --ckpt runs/digits/student/checkpoints/last.ckpt

The determinant of every jump takes one derivative per dimension: 100 digits take seconds, 16 images of Fashion-MNIST
minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import f2d2_lightning as f2
from calibration_study.measures import PARTS, faults, true_path
from calibration_study.problems import PROBLEMS
from f2d2_lightning.training.loading import load_module
from measuring import markdown


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
    found = {k: faults(problem, joint, k, path, options.determinants) for k in options.steps}
    header = [f"error, {problem.unit}", *(f"{k} step{'s' if k > 1 else ''}" for k in options.steps)]
    rows = [
        [text, *(f"{found[k][name].mean:+.3f} ± {found[k][name].deviation:.3f}" for k in options.steps)]
        for name, text in PARTS.items()
    ]
    print(
        f"Mean and standard deviation over {options.points} test points ({options.determinants} with determinants).\n"
    )
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
