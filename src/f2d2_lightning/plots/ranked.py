"""The images that a model finds most and least likely."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from f2d2_lightning.plots._figure import column, new_figure, number
from f2d2_lightning.plots.samples import as_colors


def ranked_figure(
    images: Tensor,
    values: Tensor,
    unit: str,
    *,
    name: str = "few-step",
    reference: Tensor | None = None,
    reference_name: str = "teacher",
    count: int = 8,
    low: float = -1.0,
    high: float = 1.0,
) -> Figure:
    """A row of the most likely images and one of the least likely, each image's negative log-likelihood beneath it.

    Args:
        images: States ``(N, 1 or 3, H, W)``.
        values: Negative log-likelihood of each, ``(N,)``, in the unit named; images with NaN are left out.
        unit: Name of the unit: ``"nats"``, ``"bits/dim"``.
        name: What gave the values, such as ``"4 steps"``.
        reference: The reference's of each, ``(N,)``, written below; ``None`` for none.
        reference_name: What the reference is called.
        count: Images in each row, at most.
        low: Value shown as black.
        high: Value shown as white.

    Raises:
        ValueError: If shapes are unfit, or no image has a value.
    """
    value = column(values, "values")
    other = None if reference is None else column(reference, "the reference")
    if count < 1 or len(value) != len(images) or (other is not None and len(other) != len(images)):
        raise ValueError(
            f"there are {len(images)} images, {len(value)} values"
            + ("" if other is None else f" and {len(other)} of the reference")
            + f", and count={count}; there are as many of each, and count is at least 1"
        )
    colors = as_colors(images, low, high)
    known = (~value.isnan()).nonzero().flatten()
    order = known[value[known].argsort(stable=True)]
    if len(order) == 0:
        raise ValueError("no image has a likelihood (all values are NaN); there is no order to show")
    most = order[: min(count, (len(order) + 1) // 2)]
    least = order[len(most) :].flip(0)[: len(most)]
    rows = [most, least] if len(least) else [most]
    # wide enough for the line at the foot, also where there are few images
    figure = new_figure(max(4.0, 0.9 * len(most) + 0.3), len(rows) * (1.1 if other is None else 1.2) + 0.3)
    axes = figure.subplots(len(rows), len(most), squeeze=False)
    for row, title, chosen in zip(axes, ("most likely", "least likely"), rows, strict=False):
        row[0].set_ylabel(f"{title}\nof {len(order):,}", fontsize=8)
        for ax in row[len(chosen) :]:
            ax.set_axis_off()
        for ax, index in zip(row, chosen.tolist(), strict=False):
            ax.imshow(colors[index].numpy(), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            beneath = [number(float(value[index]))] + ([] if other is None else [number(float(other[index]))])
            ax.set_xlabel("\n".join(beneath), fontsize=7, labelpad=2)
    below = "" if other is None else f"; below it, {reference_name}"
    figure.supxlabel(f"beneath each image: NLL in {unit}, {name}{below}", fontsize=8)
    return figure
