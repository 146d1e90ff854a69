"""Data in the plane whose density is known: a checkerboard and a Gaussian mixture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.flows.mixture import MixtureFlow
from f2d2_lightning.utils.checks import checked
from f2d2_lightning.utils.seeding import mix_seed


def _parts(count: int) -> dict[str, int]:
    """A tenth each for validation and test."""
    return {name: max(1, size) for name, size in (("train", count), ("val", count // 10), ("test", count // 10))}


class Checkerboard(FlowDataModule):
    """Uniform on the dark squares of a 4 x 4 board on [-2, 2]^2.

    Args:
        count: Training points; a tenth each for validation and test.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        seed: Of the draws and of the order.
    """

    shape = (2,)

    @checked
    def __init__(self, count: int = 50_000, batch_size: int = 1024, eval_batch_size: int = 4096, seed: int = 0) -> None:
        super().__init__(batch_size, eval_batch_size, seed=seed)
        self.count = count

    @staticmethod
    def log_prob(x: Tensor) -> Tensor:
        """Exact log-density, ``(B, 2) -> (B,)``, nats: ``-log 8`` on dark squares, ``-inf`` elsewhere."""
        cell = x.floor()
        dark = (cell.sum(-1) % 2 == 0) & (x.abs() < 2).all(-1)
        return torch.where(dark, -math.log(8.0), -math.inf)

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "checkerboard"))

        def draw(count: int) -> Tensor:
            column = torch.randint(-2, 2, (count,), generator=generator)
            half = torch.randint(0, 2, (count,), generator=generator)
            row = 2 * half - 2 + column % 2
            return torch.stack((column, row), -1) + torch.rand(count, 2, generator=generator)

        return {name: (draw(count), None) for name, count in _parts(self.count).items()}


class GaussianMixture(FlowDataModule):
    """A ring of rotated anisotropic Gaussians in the plane, with exact density and velocity (:attr:`flow`).

    Args:
        components: Number of Gaussians.
        radius: Of the ring.
        spread: Standard deviations along and across each Gaussian's long axis.
        count: Training points; a tenth each for validation and test.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        seed: Of the draws and of the order.
    """

    shape = (2,)

    @checked
    def __init__(
        self,
        components: int = 5,
        radius: float = 2.0,
        spread: tuple[float, float] = (0.6, 0.2),
        count: int = 50_000,
        batch_size: int = 1024,
        eval_batch_size: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed=seed)
        self.count = count
        angle = torch.arange(components) * (2 * math.pi / components)
        tilt = angle + math.pi / 4
        rotation = torch.stack((tilt.cos(), -tilt.sin(), tilt.sin(), tilt.cos()), -1).reshape(-1, 2, 2)
        axes = rotation * torch.tensor(spread)
        means = radius * torch.stack((angle.cos(), angle.sin()), -1)
        self.flow = MixtureFlow(torch.ones(components), means, axes @ axes.transpose(1, 2))

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density, ``(B, 2) -> (B,)``, nats."""
        return self.flow.log_prob(x)

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "mixture"))
        return {name: (self.flow.sample(count, generator), None) for name, count in _parts(self.count).items()}
