"""How much probes of the divergence scatter log p along a trajectory: drawn independently, and as they cancel.

    python benchmarks/recipe.py --validate --seeds 0    # trains the teachers
    python benchmarks/probes.py                         # a minute a set

For each teacher that is there, the root mean square over 200 validation points of what is left beside the exact
divergence on the same 24 nodes, in spreads of log p.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from f2d2_lightning.divergence import Exact, Hutchinson
from f2d2_lightning.divergence.estimators import DivergenceEstimator
from f2d2_lightning.objectives.targets import target_log_prob
from f2d2_lightning.utils.measuring import spread_of
from measuring import markdown
from recipe import STEPS, Run
from recipe_data import SETS

NODES, POINTS, PROBES = 24, 200, (1, 2, 4)


class Independent(Hutchinson):
    """Draws anew at each point, whatever was drawn before."""

    def along_path(self) -> Hutchinson:
        return self


def scatter(run: Run) -> list[str]:
    """Cells of one set."""
    x, flow = run.points("val")[:POINTS], run.teacher.average
    fit = flow.baseline
    near_data = 0.0 if run.data.levels is None else 0.5

    def answer(estimator: DivergenceEstimator) -> Tensor:
        return target_log_prob(flow.velocity, estimator, x, None, NODES, near_data, fit, STEPS, seed=1)

    exact = answer(Exact())
    spread = spread_of(exact)

    def off(estimator: DivergenceEstimator) -> str:
        return f"{float((answer(estimator) - exact).square().mean().sqrt()) / spread:.3f}"

    kinds = (Independent, Hutchinson)
    return [run.name, str(run.dim), *(" / ".join(off(kind(count, control=fit)) for count in PROBES) for kind in kinds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/recipe"), help="that of benchmarks/recipe.py")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [Run(name, SETS[name], 0, options.folder) for name in options.sets]
    there = [run for run in runs if (run.home / "teacher" / "last.ckpt").exists()]
    counts = " / ".join(map(str, PROBES))
    columns = ["set", "dimensions", f"independent, {counts} probes", f"cancelling, {counts} probes"]
    print(markdown(columns, [scatter(run) for run in there]))


if __name__ == "__main__":
    main()
