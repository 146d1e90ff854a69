"""Log-densities in the plane as maps beside each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from f2d2_lightning.plots._figure import label, panels

Extent = tuple[float, float, float, float]


def plane_grid(extent: Extent, count: int) -> Tensor:
    """Centres of ``count`` by ``count`` cells, ``(count ** 2, 2)``: along ``x_1`` first, from the lowest ``x_2`` up.

    Args:
        extent: ``(low, high)`` of ``x_1``, then of ``x_2``.
        count: Cells along each axis.
    """
    centers = (torch.arange(count) + 0.5) / count
    first = extent[0] + (extent[1] - extent[0]) * centers
    second = extent[2] + (extent[3] - extent[2]) * centers
    down, across = torch.meshgrid(second, first, indexing="ij")
    return torch.stack((across, down), -1).reshape(-1, 2)


def density_figure(densities: Mapping[str, Tensor], extent: Extent, span: float = 8.0) -> Figure:
    """Maps of log-densities, all in one colour scale.

    The scale ends at the highest density of any map (its 99.9 % quantile, so that one wild cell does not decide) and
    begins ``span`` nats below; what is lower, ``-inf`` included, has the lowest colour, and NaN is white.

    Args:
        densities: Title to log-densities ``(rows, columns)``, nats, from the lowest ``x_2`` up, as
            :func:`plane_grid` has them: ``log_prob(plane_grid(extent, n)).reshape(n, n)``.
        extent: ``(low, high)`` of ``x_1``, then of ``x_2``.
        span: Nats from the lowest to the highest colour.

    Raises:
        ValueError: If there is no map, shapes are unfit, or the extent or span is empty.
    """
    if not (extent[0] < extent[1] and extent[2] < extent[3] and span > 0):
        raise ValueError(f"extent={extent} is (low, high, low, high) and span={span} is positive")
    maps = {title: value.detach().cpu().double() for title, value in densities.items()}
    for title, value in maps.items():
        if value.ndim != 2 or value.numel() == 0:
            raise ValueError(f"the density {title!r} has shape {tuple(value.shape)}; (rows, columns) is expected")
    missing = {title: int(value.isnan().sum()) for title, value in maps.items()}
    notes = [
        f"{title}\n{n} of {maps[title].numel()} cells without a value" if n else title for title, n in missing.items()
    ]
    ratio = (extent[3] - extent[2]) / (extent[1] - extent[0])
    figure, axes = panels(notes, 2.5, 0.55 + 2.0 * min(2.0, max(0.5, ratio)), sharex=True, sharey=True)
    peaks = [float(v[v.isfinite()].quantile(0.999)) for v in maps.values() if bool(v.isfinite().any())]
    high = max(peaks, default=0.0)
    low = high - span
    colors = colormaps["viridis"].with_extremes(bad="white")
    below = above = False
    for ax, value in zip(axes, maps.values(), strict=True):
        below, above = below or bool((value < low).any()), above or bool((value > high).any())
        # matplotlib takes infinite values for missing ones
        shown = value.masked_fill(value == -torch.inf, low - 1).masked_fill(value == torch.inf, high + 1)
        image = ax.imshow(
            shown.numpy(), origin="lower", extent=extent, vmin=low, vmax=high, cmap=colors, interpolation="nearest"
        )
        place = ax.get_subplotspec()
        assert place is not None
        # on the outer panels only
        lowest = ax.xaxis.get_tick_params()["labelbottom"]
        label(ax, "$x_1$" if lowest else "", "$x_2$" if place.is_first_col() else "", 8)
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    bar = figure.colorbar(image, ax=axes, extend=ends[below, above], shrink=0.85, pad=0.02)
    bar.set_label("log-density, nats", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
