"""Which choices bring few-step likelihoods close to the teacher's: a study of students of one teacher.

Every student differs from the recipe before the study in one choice and has the same teacher, data, batch and number
of steps. Runs are kept under ``runs/NAME/calibration`` and not repeated; an interrupted one goes on from its
checkpoint, and several of these commands at a time share the work. What is there so far is put into a table and a
figure.

    python benchmarks/calibration.py                                  # everything: hours on a CPU
    python benchmarks/calibration.py --problems digits --seeds 0 --groups objective direction
    python benchmarks/calibration.py --report_only                    # the table of what is there
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from calibration_study.choices import CHOICES
from calibration_study.problems import PROBLEMS
from calibration_study.report import figure, rows_of, table
from calibration_study.running import run
from f2d2_lightning.plots import save_figure

PREFACE = """# The calibration study's tables

Printed by `python benchmarks/calibration.py`; what they say is in [CALIBRATION.md](CALIBRATION.md). Means over seeds,
and standard deviations over them where there are two or more: of the error per point, and the largest of the gaps'.
Negative log-likelihoods, student minus teacher. Round trip: root mean square over the data's standard deviation, in as
many steps back. Samples: Frechet distance of features to training images; for points the energy distance times 1,000
(unbiased, so it can be negative). Step time: of the starting point's, trajectories not counted, on one CPU thread
beside other work."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    groups = list(dict.fromkeys(choice.group for choice in CHOICES))
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of each student; the problem's by default")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where teachers and students are")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/trajectories"), help="trajectories that students share"
    )
    parser.add_argument("--threads", type=int, default=1, help="of one process")
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("calibration"), help="of OUT.md and OUT.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.problems:
        problem = PROBLEMS[name]
        problem.folder = options.runs
        if options.report_only:
            continue
        problem.train_teacher()
        for seed in options.seeds:
            for choice in CHOICES:
                if name not in choice.problems or choice.group not in options.groups:
                    continue
                start = time.perf_counter()
                result = run(problem, choice, seed, options.steps or problem.budget, options.cache)
                spent = time.perf_counter() - start
                if result is None:
                    text = "left to another process"
                else:
                    rows = result["queries"].get("") or next(iter(result["queries"].values()), None)
                    text = "" if rows is None else " / ".join(f"{rows[k]['gap']:+.3f}" for k in ("8", "4", "2", "1"))
                print(f"{time.strftime('%H:%M:%S')} {name} seed {seed}, {choice.group}: {choice.name}: {text} "
                      f"({spent:.0f} s)", file=sys.stderr, flush=True)  # fmt: skip
    found = {
        name: rows
        for name in options.problems
        if (rows := rows_of(PROBLEMS[name], options.seeds, options.steps or PROBLEMS[name].budget))
    }
    if not found:
        sys.exit(f"there are no runs under {options.runs}; leave --report_only out")
    parts = (f"## {name}\n\n{table(rows, PROBLEMS[name])}" for name, rows in found.items())
    text = "\n\n".join([PREFACE, *parts])
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text(text + "\n")
    save_figure(figure(found, lambda name: PROBLEMS[name].unit), options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
