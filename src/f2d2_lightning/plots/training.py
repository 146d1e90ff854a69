"""Losses over a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from f2d2_lightning.plots._figure import BLUE, VERMILLION, label, new_figure

COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class _PlainLabels(LogFormatter):
    """Labels where a logarithmic axis has them, but as 0.6, not as 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def training_figure(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """Losses against the optimiser's step; the axis is logarithmic where all are positive and fall far.

    Args:
        curves: Name to steps and values, of equal length.

    Raises:
        ValueError: If there is no curve with a finite value, or lengths differ.
    """
    for name, (steps, values) in curves.items():
        if len(steps) != len(values):
            raise ValueError(f"the curve {name!r} has {len(steps)} steps and {len(values)} values")
    finite = [v for _, values in curves.values() for v in values if math.isfinite(v)]
    if not finite:
        raise ValueError(f"there is no finite value in the curves {', '.join(curves) or '(none)'}")
    figure = new_figure(4.8, 3.0)
    ax = figure.subplots()
    for index, (name, (steps, values)) in enumerate(curves.items()):
        marker = "o" if len(steps) < 20 else None
        color = COLOURS[index % len(COLOURS)]
        ax.plot(steps, values, color=color, linewidth=1.0, marker=marker, markersize=3, label=name)
    if min(finite) > 0 and max(finite) > 20 * min(finite):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(_PlainLabels())
        ax.yaxis.set_minor_formatter(_PlainLabels(minor_thresholds=(1.5, 0.4)))
    label(ax, "optimiser step", "loss")
    figure.legend(loc="outside upper center", ncols=min(3, len(curves)), fontsize=8, frameon=False)
    return figure
