"""Data sets of the recipe's table: points in the plane and in 16 dimensions of known density, tables, colour patches.

Split and draws never depend on a run's seed: what one run validates on, no other tests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.data import Checkerboard, Digits, FashionMNIST, FlowDataModule, GaussianMixture
from f2d2_lightning.flows.mixture import MixtureFlow
from f2d2_lightning.utils.seeding import mix_seed

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Of a table's rows, and of the blocks of a photograph."""
DRAWN = {"train": 50_000, "val": 5_000, "test": 5_000}
"""Points of a density, as of the toy data of the package."""
BLOCK = 64
"""Side of the squares of a photograph that are wholly of one split, pixels."""
DECIMALS = 6
ON_GRID = 0.95
"""Share of a column's values that are multiples of its resolution: a few are means of several readings."""


class Splits(FlowDataModule):
    """Data in memory, divided already: ``(N, *shape)`` for each split, integers with ``levels``."""

    def __init__(self, parts: Mapping[str, Tensor], levels: int | None = None, batch_size: int = 256) -> None:
        super().__init__(batch_size, quantization=None if levels is None else f2.Quantization(levels))
        self.shape = tuple(parts["train"].shape[1:])
        self.parts = parts

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        return {name: (values, None) for name, values in self.parts.items()}


# --- densities ---


class TwoMoons:
    """scikit-learn's two half circles, in noise of deviation ``noise``; the density is a sum over ``nodes`` angles."""

    shape = (2,)

    def __init__(self, noise: float = 0.1, nodes: int = 128) -> None:
        self.noise = noise
        # midpoints: the ends of an arc count as much as its middle
        self.curve = self.arcs((torch.arange(nodes) + 0.5) * math.pi / nodes).flatten(0, 1)

    @staticmethod
    def arcs(angle: Tensor) -> Tensor:
        """Points of both half circles, ``(N,) -> (2, N, 2)``."""
        upper = torch.stack((angle.cos(), angle.sin()), -1)
        return torch.stack((upper, torch.tensor([1.0, 0.5]) - upper))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        both = self.arcs(math.pi * torch.rand(count, generator=generator))
        which = torch.randint(0, 2, (count,), generator=generator)
        return both[which, torch.arange(count)] + self.noise * torch.randn(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B, 2) -> (B,)``, nats."""
        curve, noise = self.curve.to(x), self.noise
        exponent = -torch.cdist(x, curve).square() / (2 * noise**2)
        return exponent.logsumexp(-1) - math.log(len(curve) * 2 * math.pi * noise**2)


class Pinwheel:
    """Five arms, each a Gaussian in ``(log r, angle)`` whose angle turns with ``log r``: the density is elementary."""

    shape = (2,)

    def __init__(self, arms: int = 5, radial: float = 0.4, tangential: float = 0.12, twist: float = 0.8) -> None:
        self.arms, self.radial, self.tangential, self.twist = arms, radial, tangential, twist

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        arm = torch.randint(0, self.arms, (count,), generator=generator) * (2 * math.pi / self.arms)
        log_r, off = torch.randn(2, count, generator=generator)
        log_r = self.radial * log_r
        angle = arm + self.twist * log_r + self.tangential * off
        return log_r.exp()[:, None] * torch.stack((angle.cos(), angle.sin()), -1)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B, 2) -> (B,)``, nats."""
        log_r = x.square().sum(-1).log() / 2
        turn = 2 * math.pi / self.arms
        # all arms are alike, so the angle counts modulo one turn
        off = torch.atan2(x[:, 1], x[:, 0]) - self.twist * log_r
        off = (off + turn / 2).remainder(turn) - turn / 2
        images = off[:, None] + turn * torch.arange(-2, 3).to(x)
        across = -(images / self.tangential).square() / 2
        along = -(log_r / self.radial).square() / 2
        normaliser = math.log(self.arms * 2 * math.pi * self.radial * self.tangential)
        return across.logsumexp(-1) + along - normaliser - 2 * log_r


def rotated_mixture(dim: int = 16, components: int = 5) -> MixtureFlow:
    """Gaussians of deviations from .2 to 1 along axes of their own, means some three apart."""
    generator = torch.Generator().manual_seed(mix_seed(0, "rotated mixture"))
    rotations = torch.linalg.qr(torch.randn(components, dim, dim, generator=generator)).Q
    axes = rotations * torch.logspace(math.log10(0.2), 0, dim)
    means = 0.6 * torch.randn(components, dim, generator=generator)
    return MixtureFlow(torch.arange(1.0, components + 1), means, axes @ axes.mT)


def drawn(name: str, density: TwoMoons | Pinwheel | MixtureFlow) -> Splits:
    generator = torch.Generator().manual_seed(mix_seed(0, name))
    return Splits({split: density.sample(count, generator) for split, count in DRAWN.items()})


# --- tables ---


def resolution(column: np.ndarray) -> float:
    """The coarsest power of ten that almost all values are multiples of; 0 if there is none."""
    for decimals in range(DECIMALS + 1):
        scaled = column * 10.0**decimals
        if np.mean(np.abs(scaled - np.round(scaled)) < 1e-4) >= ON_GRID:
            return 10.0**-decimals
    return 0.0


def table(values: np.ndarray) -> Splits:
    """A table ``(N, d)`` as states: columns of two values left out, the others dequantized and standardised.

    Noise is uniform over a column's resolution. Order, mean and deviation: fixed, and of the training rows alone.
    """
    kept = np.stack([column for column in values.T if len(np.unique(column)) > 2], 1)
    generator = torch.Generator().manual_seed(mix_seed(0, "table"))
    noise = torch.rand(kept.shape, generator=generator, dtype=torch.float64) - 0.5
    x = torch.from_numpy(kept) + noise * torch.tensor([resolution(column) for column in kept.T])
    order = torch.randperm(len(x), generator=generator)
    first, second = (round(share * len(x)) for share in (SHARES["train"], SHARES["train"] + SHARES["val"]))
    train = x[order[:first]]
    x = ((x - train.mean(0)) / train.std(0)).float()
    parts = {"train": order[:first], "val": order[first:second], "test": order[second:]}
    return Splits({name: x[rows] for name, rows in parts.items()})


def breast_cancer() -> Splits:
    from sklearn.datasets import load_breast_cancer

    return table(load_breast_cancer(return_X_y=True)[0])


def diabetes() -> Splits:
    from sklearn.datasets import load_diabetes

    return table(load_diabetes(return_X_y=True, scaled=False)[0])


def wine() -> Splits:
    from sklearn.datasets import load_wine

    return table(load_wine(return_X_y=True)[0])


def heavy_tails() -> Splits:
    """6,000 rows of seven columns, Student's t, log-normal and counts, most of which depend on each other."""
    generator, rows = np.random.default_rng(7), 6000
    t = generator.standard_t(4, (rows, 3))
    positive = np.exp(0.7 * generator.standard_normal((rows, 2)) + 0.5 * t[:, :2])
    counts = np.round(generator.gamma(2.0, 3.0, rows))
    bent = 0.6 * t[:, 0] + 0.4 * np.sin(2 * t[:, 1]) + 0.2 * generator.standard_normal(rows)
    return table(np.column_stack([t, positive, counts, bent]))


# --- photographs ---


def blocks() -> dict[str, list[tuple[int, int, int]]]:
    """Picture, row and column of the first pixel of each split's squares of :data:`BLOCK` pixels; none overlap."""
    from sklearn.datasets import load_sample_images

    height, width, _ = load_sample_images().images[0].shape
    places = [
        (picture, row, column)
        for picture in range(2)
        for row in range(0, height - BLOCK + 1, BLOCK)
        for column in range(0, width - BLOCK + 1, BLOCK)
    ]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(mix_seed(0, "blocks"))).tolist()
    first, second = (round(share * len(places)) for share in (SHARES["train"], SHARES["train"] + SHARES["val"]))
    rows = {"train": order[:first], "val": order[first:second], "test": order[second:]}
    return {name: [places[i] for i in chosen] for name, chosen in rows.items()}


def patches(side: int) -> Splits:
    """Squares of scikit-learn's two sample photographs, ``(3, side, side)``, 256 levels, each inside of one block.

    Those to train overlap by three quarters; those to validate and test do not.
    """
    from sklearn.datasets import load_sample_images

    images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    parts = {}
    for name, places in blocks().items():
        squares = torch.stack([images[p, :, r : r + BLOCK, c : c + BLOCK] for p, r, c in places])
        stride = side // 4 if name == "train" else side
        cut = squares.unfold(2, side, stride).unfold(3, side, stride).permute(0, 2, 3, 1, 4, 5)
        cut = cut.reshape(-1, 3, side, side)
        # in an order that is not the photographs', of which a part may be looked at
        parts[name] = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(mix_seed(0, name)))]
    return Splits(parts, levels=256)


# --- the sets ---


@dataclass(frozen=True)
class DataSet:
    """One set of the table."""

    data: Callable[[], FlowDataModule]
    log_prob: Callable[[Tensor], Tensor] | None = None
    """Exact log-density, nats, where it is known."""
    constant: bool = False
    """Whether the density is: errors are then in nats, and there is no correlation."""
    seeds: tuple[int, ...] = (0, 1, 2)


eight = GaussianMixture(components=8, spread=(0.4, 0.2), batch_size=256)
sixteen = rotated_mixture()

SETS = {
    "two moons": DataSet(lambda: drawn("two moons", TwoMoons()), TwoMoons().log_prob),
    "eight Gaussians": DataSet(lambda: eight, eight.log_prob),
    "checkerboard": DataSet(lambda: Checkerboard(batch_size=256), Checkerboard.log_prob, constant=True),
    "pinwheel": DataSet(lambda: drawn("pinwheel", Pinwheel()), Pinwheel().log_prob),
    "breast cancer": DataSet(breast_cancer),
    "diabetes": DataSet(diabetes),
    "wine": DataSet(wine),
    "heavy tails": DataSet(heavy_tails),
    "mixture 16-d": DataSet(lambda: drawn("mixture 16-d", sixteen), sixteen.log_prob),
    "digits": DataSet(Digits),
    "patches 8x8": DataSet(lambda: patches(8)),
    "patches 16x16": DataSet(lambda: patches(16)),
    "fashion": DataSet(lambda: FashionMNIST(test=300), seeds=(0,)),
}
