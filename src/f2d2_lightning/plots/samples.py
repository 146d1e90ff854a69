"""Samples beside each other: grids of images, points in the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from f2d2_lightning.plots._figure import BLUE, VERMILLION, label, limits, panels, plural


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether one state is an image, ``(1 or 3, H, W)``."""
    return len(shape) == 3 and shape[0] in (1, 3)


def is_plane(shape: tuple[int, ...]) -> bool:
    """Whether one state is a point in the plane, ``(2,)``."""
    return shape == (2,)


def is_shown(shape: tuple[int, ...]) -> bool:
    """Whether states of a shape can be drawn: images, or points in the plane."""
    return is_image(shape) or is_plane(shape)


def as_colors(images: Tensor, low: float, high: float) -> Tensor:
    """Images ``(N, 1 or 3, H, W)`` as ``(N, H, W, 3)`` in [0, 1], black at ``low`` and below, white at ``high``.

    Pixels that are not finite are vermillion.
    """
    if images.ndim != 4 or not is_image(tuple(images.shape[1:])):
        raise ValueError(f"images have shape {tuple(images.shape)}; (N, 1 or 3, H, W) can be shown")
    if not high > low:
        raise ValueError(f"low={low} is shown as black and high={high} as white; high must be greater")
    colors = ((images.detach().cpu().float() - low) / (high - low)).clamp(0, 1).expand(-1, 3, -1, -1)
    colors = colors.permute(0, 2, 3, 1)
    broken = ~colors.isfinite().all(-1, keepdim=True)
    return torch.where(broken, torch.tensor(to_rgb(VERMILLION), dtype=colors.dtype), colors)


def _grid(colors: Tensor, columns: int) -> Tensor:
    """Images ``(N, H, W, 3)`` in rows with a thin gap, ``(H', W', 3)``."""
    count, height, width, _ = colors.shape
    canvas = torch.ones(math.ceil(count / columns) * (height + 1) + 1, columns * (width + 1) + 1, 3)
    for index, image in enumerate(colors):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    return canvas


def sample_figure(samples: Mapping[str, Tensor], low: float = -1.0, high: float = 1.0, columns: int = 10) -> Figure:
    """Samples by the name of what made them: image grids for ``(N, C, H, W)``, scatter plots for ``(N, 2)``.

    Samples that are not finite are counted in the title; their pixels are vermillion.

    Args:
        samples: Title to samples; use the same noise for all, so that they can be compared.
        low: Value shown as black.
        high: Value shown as white.
        columns: Images per row of a grid.

    Raises:
        ValueError: If the samples are neither images of one or three channels nor points in the plane.
    """
    for title, x in samples.items():
        shape = tuple(x.shape[1:])
        if len(x) == 0 or not is_shown(shape):
            raise ValueError(
                f"samples {title!r} have shape {tuple(x.shape)}; at least one image (N, 1 or 3, H, W) or point (N, 2) "
                "can be shown"
            )
    shown = {title: x.detach().cpu() for title, x in samples.items()}
    plane = [x for x in shown.values() if x.ndim == 2]
    window = [limits(torch.cat(plane)[:, axis]) for axis in (0, 1)] if plane else []
    figure, axes = panels([_title(title, x, window) for title, x in shown.items()], 2.6, 2.85)
    for ax, x in zip(axes, shown.values(), strict=True):
        if x.ndim == 4:
            ax.imshow(_grid(as_colors(x, low, high), min(columns, len(x))).numpy(), interpolation="nearest")
            ax.set_axis_off()
        else:
            _scatter(ax, x, window)
    return figure


def _title(title: str, x: Tensor, window: list[tuple[float, float]]) -> str:
    good = x.flatten(1).isfinite().all(1)
    notes = [title]
    if broken := int((~good).sum()):
        notes.append(f"{broken} of {len(x)} not finite")
    if x.ndim == 2:
        low, high = (torch.tensor([side[i] for side in window], dtype=x.dtype) for i in (0, 1))
        if outside := int(((x < low) | (x > high)).any(1)[good].sum()):
            notes.append(f"{plural(outside, 'point')} outside")
    return "\n".join(notes)


def _scatter(ax: Axes, x: Tensor, window: list[tuple[float, float]]) -> None:
    first, second = x.numpy().T
    ax.scatter(first, second, s=4 if len(x) <= 2000 else 1, alpha=0.4, linewidths=0, color=BLUE)
    ax.set_xlim(*window[0])
    ax.set_ylim(*window[1])
    ax.set_aspect("equal", adjustable="box")
    label(ax, "$x_1$", "$x_2$", 8)
