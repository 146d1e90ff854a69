"""Pictures of what a model does: sample grids, calibration, densities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["calibration_figure", "sample_figure", "save_figure"]


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (or what the suffix says), making the folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return path


def _grid(images: Tensor, columns: int) -> Tensor:
    """Images ``(N, C, H, W)`` in [0, 1] side by side with a thin gap, ``(rows * H, columns * W, C)``."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = torch.ones(rows * (height + 1) + 1, columns * (width + 1) + 1, channels)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return canvas


def sample_figure(samples: Mapping[str, Tensor], low: float = -1.0, high: float = 1.0, columns: int = 10) -> Figure:
    """Samples by the name of what made them: image grids for ``(N, C, H, W)``, scatter plots for ``(N, 2)``.

    Args:
        samples: Title to samples; use the same noise for all, so that they can be compared.
        low: Value shown as black.
        high: Value shown as white.
        columns: Images per row of a grid.

    Raises:
        ValueError: If the samples are neither images of one or three channels nor points in the plane.
    """
    figure = Figure(figsize=(2.6 * len(samples), 3.0), layout="constrained")
    axes = figure.subplots(1, len(samples), squeeze=False)[0]
    for ax, (title, x) in zip(axes, samples.items(), strict=True):
        x = x.detach().cpu().float()
        ax.set_title(title, fontsize=9)
        if x.ndim == 4 and x.shape[1] in (1, 3):
            picture = _grid(((x - low) / (high - low)).clamp(0, 1), columns)
            ax.imshow(picture.squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
        elif x.ndim == 2 and x.shape[1] == 2:
            ax.scatter(x[:, 0], x[:, 1], s=1, alpha=0.4, linewidths=0)
            ax.set_aspect("equal")
        else:
            raise ValueError(
                f"samples have shape {tuple(x.shape)}; images (N, 1 or 3, H, W) or points (N, 2) can be shown"
            )
    return figure


def calibration_figure(
    values: Mapping[int, Tensor], reference: Tensor, unit: str, reference_name: str = "teacher"
) -> Figure:
    """Few-step negative log-likelihood against the reference's, one panel per step count.

    Args:
        values: Step count to negative log-likelihoods ``(N,)``, in the unit named.
        reference: The reference's on the same points, ``(N,)``.
        unit: Name of the unit, for the labels.
        reference_name: Whose the reference is.
    """
    figure = Figure(figsize=(2.6 * len(values), 2.9), layout="constrained")
    axes = figure.subplots(1, len(values), squeeze=False, sharex=True, sharey=True)[0]
    x = reference.cpu().double()
    both = torch.cat([x, *(v.cpu().double() for v in values.values())])
    low, high = float(both.quantile(0.002)), float(both.quantile(0.998))
    margin = 0.05 * (high - low)
    ends = [low - margin, high + margin]
    for ax, (steps, value) in zip(axes, values.items(), strict=True):
        y = value.cpu().double()
        ax.plot(ends, ends, color="0.6", linewidth=0.8)
        ax.scatter(x, y, s=6, alpha=0.5, linewidths=0)
        correlation = float(torch.corrcoef(torch.stack((x, y)))[0, 1])
        plural = "s" if steps > 1 else ""
        ax.set_title(
            f"{steps} step{plural}: gap {float((y - x).mean()):+.3f}, r = {correlation:.3f}",
            fontsize=8,
        )
        ax.set_xlim(ends)
        ax.set_ylim(ends)
        ax.set_aspect("equal")
        ax.tick_params(labelsize=7)
    axes[0].set_ylabel(f"few-step, {unit}", fontsize=8)
    figure.supxlabel(f"{reference_name}, {unit}", fontsize=8)
    return figure
