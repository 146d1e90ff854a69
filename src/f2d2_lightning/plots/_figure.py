"""What all figures share: size, panels, limits, numbers, and files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from f2d2_lightning.utils.files import whole_file

# of Okabe and Ito's palette, which can be told apart with any kind of colour vision
BLUE, VERMILLION, GRAY = "#0072B2", "#D55E00", "0.6"
DPI = 150
EDGE = 0.06  # inches kept free on all sides


class _NotebookFigure(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, whose parts make room for one another."""
    # panels of fixed aspect are moved together, which may take a few pixels more than the layout reckons with
    inside = (EDGE / width, EDGE / height, 1 - 2 * EDGE / width, 1 - 2 * EDGE / height)
    layout = ConstrainedLayoutEngine(compress=True, rect=inside)
    figure = _NotebookFigure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panels(titles: Sequence[str], width: float, height: float, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """Titled axes of ``width`` by ``height`` inches, in rows of at most five, about equal; ``ValueError`` for none."""
    if not titles:
        raise ValueError("there is nothing to show: give at least one entry")
    down = math.ceil(len(titles) / 5)
    across = math.ceil(len(titles) / down)
    # room for titles of several lines
    height += 0.16 * max(title.count("\n") for title in titles)
    figure = new_figure(width * across, height * down)
    axes = figure.subplots(down, across, squeeze=False, **kwargs).flatten().tolist()
    for empty in range(len(titles), down * across):
        # the one above is now the lowest of its column
        axes[empty - across].tick_params(labelbottom=True)
        axes[empty].remove()
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, fontsize=8)
    return figure, axes[: len(titles)]


def limits(values: Tensor) -> tuple[float, float]:
    """An interval that shows all finite values ``(...)``, but for those so far out that the others would be a spot.

    They may lie outside of the middle 96 % by as much as the range of these, on either side.
    """
    finite = values[values.isfinite()].flatten().double()
    if len(finite) == 0:
        return -1.0, 1.0
    inner, outer = (float(finite.quantile(q)) for q in (0.02, 0.98))
    margin = outer - inner
    kept = finite[(finite >= inner - margin) & (finite <= outer + margin)]
    low, high = float(kept.min()), float(kept.max())
    # a single value, or many that are alike, get an interval as well
    margin = 0.05 * (high - low) if high - low > 1e-6 * max(1.0, abs(low)) else 0.05 * max(1.0, abs(low))
    return low - margin, high + margin


def number(value: float, sign: bool = False) -> str:
    """A value with as many digits as can be read in a small figure; ``none`` for NaN."""
    if math.isnan(value):
        return "none"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def plural(count: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def column(values: Tensor, what: str) -> Tensor:
    """A column of values ``(N,)`` as float64 on the CPU; ``ValueError`` if it has another shape."""
    if not isinstance(values, Tensor) or values.ndim != 1:
        came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"type {type(values).__name__}"
        raise ValueError(f"{what} has {came}; one value a sample, (N,), is expected")
    return values.detach().cpu().double()


def label(ax: Axes, x: str, y: str, size: int = 9) -> None:
    """Names of the axes, and the sizes of what is written along them."""
    ax.set_xlabel(x, fontsize=size)
    ax.set_ylabel(y, fontsize=size)
    ax.tick_params(which="both", labelsize=size - 1)


def settle(figure: Figure) -> Figure:
    """Arrange the parts of a figure for good: every logger and file then gets the same picture, and sooner."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The figure as an image, ``(H, W, 3)``, ``uint8``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (or what the suffix says), making the folder; returns the path.

    The file appears whole or not at all. One that is there already is replaced: whoever calls this has asked.
    """
    path = Path(path)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=DPI, format=path.suffix[1:] or "png")
    return path
