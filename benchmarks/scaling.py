"""Time and memory of a training step over batch size and resolution, for the official recipe and for this package's.

Both regress two targets per image of the batch (see ``training_step.py``); medians are taken in turn, memory is the
most that a step holds beyond what is held between steps.

    python benchmarks/scaling.py --png scaling.png
    python benchmarks/scaling.py --device cuda --network unet --batches 32 128 512 --resolutions 32 64 --dtype bf16
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from measuring import markdown, medians, peak_mib
from training_step import RECIPES, Setting, pair_of_steps

DEFAULT = ("trajectory regression, full pool", "semigroup, Conditional")


def picture(results: list[dict[str, float | str]], path: Path) -> None:
    """Time and memory over the batch, a line per recipe and resolution."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, quantity, label in zip(panels, ("ms", "MiB"), ("time of a step, ms", "peak memory of a step, MiB")):
        key = lambda row: (row["step"], row["side"])  # noqa: E731
        for (step, side), rows in itertools.groupby(sorted(results, key=key), key):
            points = sorted((row["batch"], row[quantity]) for row in rows)
            axes.plot(*zip(*points), "o-" if step == "official recipe" else "s--", label=f"{step}, {side} x {side}")
        axes.set(xscale="log", yscale="log", xlabel="images (half of the targets)", ylabel=label)
    panels[0].legend(fontsize=6)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="*", type=int, default=(4, 16))
    parser.add_argument("--resolutions", nargs="*", type=int, default=(16, 32))
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--png", type=Path, help="also draw it")
    Setting.add_arguments(parser, without=("batch", "resolution"))
    options = parser.parse_args()
    device, results = torch.device(options.device), []
    for side, batch in itertools.product(options.resolutions, options.batches):
        setting = Setting.from_options(options, batch=batch, resolution=side)
        official, ours = pair_of_steps(setting, options.recipes)
        steps = {"official recipe": official.step, **{name: recipe.step for name, recipe in ours.items()}}
        inputs = {name: setting.data(official=name == "official recipe") for name in steps}
        calls = [lambda name=name: steps[name](inputs[name]) for name in steps]
        times = medians(calls, options.repeats, device, warm=1)
        for name, call, time in zip(steps, calls, times, strict=True):
            peak = peak_mib(call, device)
            results.append({"step": name, "side": side, "batch": batch, "ms": 1e3 * time, "MiB": peak})
    rows = []
    for r in results:
        base = next(
            b for b in results if b["step"] == "official recipe" and (b["side"], b["batch"]) == (r["side"], r["batch"])
        )
        rows.append([str(r["step"]), f"{r['side']}", f"{r['batch']}", f"{r['ms']:.1f}", f"{r['ms'] / base['ms']:.2f}",
                     f"{r['MiB']:.1f}", f"{r['MiB'] / base['MiB']:.2f}"])  # fmt: skip
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; {options.network}, {options.dtype}\n"
    )
    print(markdown(["step", "side", "images", "ms", "ratio", "peak MiB", "ratio"], rows))
    if options.png:
        picture(results, options.png)


if __name__ == "__main__":
    main()
