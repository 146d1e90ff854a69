"""The pictures of the page of concepts: a mixture of three Gaussians on the line, whose flow is known.

python docs/concept_pictures.py
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import f2d2_lightning as f2

FOLDER = Path(__file__).parent / "concepts"
BLUE, RED, GRAY = "#0072B2", "#D55E00", "0.55"
FLOW = f2.flows.MixtureFlow(
    torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
    torch.tensor([[-1.6], [0.3], [1.7]], dtype=torch.float64),
    torch.tensor([0.03, 0.02, 0.05], dtype=torch.float64)[:, None, None],
)
TIMES = torch.linspace(0, 1, 401, dtype=torch.float64)


def picture(name: str, width: float = 5.2, height: float = 2.8, across: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure that is saved by :func:`save` under its label."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", label=name)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, across, squeeze=False)[0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def save(figure: Figure) -> None:
    """Write it."""
    figure.savefig(FOLDER / f"{figure.get_label()}.png", metadata={"Software": None})


def path(noise: Tensor) -> Tensor:
    """Ways of points ``(B, 1)`` from noise to data, ``(len(TIMES), B)``, by the midpoint rule."""
    states = [noise]
    for s, t in itertools.pairwise(TIMES):
        middle = states[-1] + (t - s) / 2 * FLOW.velocity(states[-1], s)
        states.append(states[-1] + (t - s) * FLOW.velocity(middle, (s + t) / 2))
    return torch.stack(states)[..., 0]


def density(ax: Axes) -> None:
    """Density over time, as shades."""
    x = torch.linspace(-2.9, 2.9, 291, dtype=torch.float64)[:, None]
    shades = torch.stack([FLOW.log_prob(x, t).exp() for t in TIMES[::4]], 1)
    ax.imshow(
        shades.sqrt().numpy(), origin="lower", aspect="auto", extent=(0, 1, -2.9, 2.9), cmap="Greys", vmin=0, vmax=1.4
    )
    ax.set_xlabel("time $t$", fontsize=9)
    ax.set_ylabel("state $x$", fontsize=9)
    ax.set_xticks([0, 0.5, 1], ["0\nnoise", "0.5", "1\ndata"])


def time() -> None:
    """Paths over the density."""
    figure, (ax,) = picture("time")
    density(ax)
    quantiles = torch.linspace(0.04, 0.96, 13, dtype=torch.float64)[:, None]
    noise = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    ax.plot(TIMES, path(noise), color=BLUE, linewidth=1)
    save(figure)


def direction() -> None:
    """Jumps along one path."""
    figure, (ax,) = picture("direction")
    density(ax)
    way = path(torch.tensor([[0.62]], dtype=torch.float64))[:, 0]
    ax.plot(TIMES, way, color="black", linewidth=1, linestyle=":", label="the path, many small steps")
    middle = len(way) // 2
    for i, j, color, text in (
        (0, -1, BLUE, "to data, one jump"),
        (-1, middle, RED, "to noise, two jumps"),
        (middle, 0, RED, None),
    ):
        start, end = (float(TIMES[i]), float(way[i])), (float(TIMES[j]), float(way[j]))
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, start, arrowprops=arrow)
        ax.plot([], [], color=color, label=text)
    ax.legend(fontsize=8, loc="lower left", frameon=False)
    save(figure)


def head() -> None:
    """Divergence along one path."""
    figure, (ax,) = picture("head")
    way = path(torch.tensor([[0.62]], dtype=torch.float64))[:, 0]
    x = way[:, None].requires_grad_()
    divergence = torch.autograd.grad(FLOW.velocity(x, TIMES).sum(), x)[0][:, 0].detach()

    def mean(i: int, j: int) -> float:
        return float(torch.trapezoid(divergence[i:j], TIMES[i:j]) / (TIMES[j - 1] - TIMES[i]))

    ax.axhline(0, color="0.8", linewidth=0.8)
    ax.plot(TIMES, divergence, color=GRAY, label="divergence along the path")
    middle = len(TIMES) // 2
    ax.plot([0, 1], [mean(0, len(TIMES))] * 2, color=BLUE, linewidth=1.8, label="$D$ of one jump")
    for i, j, text in ((0, middle + 1, "$D$ of each of two jumps"), (middle, len(TIMES), None)):
        ax.plot(TIMES[[i, j - 1]], [mean(i, j)] * 2, color=RED, linewidth=1.8, linestyle="--", label=text)
    ax.set_xlabel("time $t$", fontsize=9)
    ax.set_ylabel("nats per unit of time", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    save(figure)


def smooth(k: np.ndarray) -> np.ndarray:
    """A density over levels 0 to 7."""
    return 0.62 * np.exp(-((k - 2.3) ** 2) / 1.6) / 2.242 + 0.38 * np.exp(-((k - 5.4) ** 2) / 0.9) / 1.681


def dequantization() -> None:
    """Probabilities of integers, and the density of the same with noise."""
    figure, (left, right) = picture("dequantization", across=2, height=2.5)
    fine = np.linspace(0, 7, 701)
    levels = np.arange(7)
    probability = np.array([smooth(np.linspace(k, k + 1, 101)).mean() for k in levels])
    left.vlines(levels, 0, probability, color=BLUE, linewidth=4)
    left.set_title("integers: probabilities", fontsize=9)
    right.bar(levels + 0.5, probability, width=1, color=BLUE, alpha=0.3, edgecolor="white")
    right.plot(fine, smooth(fine), color=RED, label="a model's density")
    right.set_title("plus noise: a density", fontsize=9)
    right.legend(fontsize=8, frameon=False)
    for ax in (left, right):
        ax.set_ylim(0, 0.36)
        ax.set_xlabel("grey level", fontsize=9)
    save(figure)


def bound() -> None:
    """Mean of the logarithm, and logarithm of the mean, over one level."""
    figure, (ax,) = picture("bound", height=2.5)
    inside = np.linspace(3, 4, 201)
    log_density = np.log(smooth(inside))
    ax.plot(inside, log_density, color=GRAY, label="log density over one level")
    exact, lower = math.log(smooth(inside).mean()), log_density.mean()
    ax.axhline(exact, color=BLUE, label="log of its mean: the log-probability")
    ax.axhline(lower, color=RED, linestyle="--", label="mean of its log: the bound")
    ax.set_xticks([3, 3.5, 4])
    ax.set_xlabel("grey level and noise", fontsize=9)
    ax.set_ylabel("nats", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    save(figure)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (time, direction, head, dequantization, bound):
        draw()
