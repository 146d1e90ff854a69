"""Two clusters of particles whose energies are known, for ``examples/boltzmann.py``.

Köhler et al., "Equivariant Flows", 2020, https://arxiv.org/abs/2006.02425: four particles in the plane with a double
well between each pair (DW4), and thirteen of Lennard and Jones in space (LJ13), held together by the harmonic potential
of Klein et al., "Equivariant flow matching", 2023, https://arxiv.org/abs/2306.15030. The centre of mass stays at zero:
states are coordinates in an orthonormal basis of what is left, six numbers and thirty-six. Samples and partition
functions are those of annealed populations (Neal, "Annealed importance sampling", 2001,
https://arxiv.org/abs/physics/9803008), resampled, that are moved by Hamiltonian Monte Carlo.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import f2d2_lightning as f2


def centered_basis(particles: int) -> Tensor:
    """Orthonormal columns ``(n, n - 1)`` that each add to zero (Helmert's)."""
    order = torch.arange(1, particles, dtype=torch.float64)
    rows = torch.tril(torch.ones(particles - 1, particles, dtype=torch.float64))
    rows[torch.arange(particles - 1), torch.arange(1, particles)] = -order
    return (rows / (order * (order + 1)).sqrt()[:, None]).T


class System(NamedTuple):
    """``n`` particles in ``axes`` dimensions, their energy in units of ``kT`` ``(N, n, axes) -> (N,)``, and ``log Z``
    over the states with its standard error, by :func:`annealed`.
    """

    particles: int
    axes: int
    pairs: Callable[[Tensor], Tensor]
    trap: float
    log_z: tuple[float, float]

    @property
    def dim(self) -> int:
        """Of states."""
        return (self.particles - 1) * self.axes

    def positions(self, x: Tensor) -> Tensor:
        """Of states ``(N, dim)``, ``(N, n, axes)``."""
        return centered_basis(self.particles).to(x) @ x.unflatten(1, (self.particles - 1, self.axes))

    def states(self, places: Tensor) -> Tensor:
        """Of positions ``(N, n, axes)``, less their mean, ``(N, dim)``."""
        return (centered_basis(self.particles).to(places).T @ places).flatten(1)

    def aligned(self, noise: Tensor, x: Tensor) -> Tensor:
        """Noise ``(N, dim)``, its particles in the order and turned as brings them near those of ``x``.

        By turns the best order (Hungarian method) and the best turn (Kabsch, 1976, reflections allowed), as Klein et
        al. do; the energy knows neither.
        """
        moving, still = self.positions(noise), self.positions(x)
        for _ in range(3):
            overlaps = (still @ moving.mT).cpu().numpy()
            order = torch.tensor(np.stack([linear_sum_assignment(-each)[1] for each in overlaps]), device=x.device)
            moving = moving.gather(1, order[:, :, None].expand_as(moving))
            left, _, right = torch.linalg.svd(moving.mT @ still)
            moving = moving @ (left @ right)
        return self.states(moving)

    def energy(self, x: Tensor) -> Tensor:
        """Of states ``(N, dim)``, ``(N,)``."""
        first, second = torch.triu_indices(self.particles, self.particles, 1)
        basis = centered_basis(self.particles).to(x)
        apart = x.unflatten(1, (self.particles - 1, self.axes)).mT @ (basis[first] - basis[second]).T
        return self.pairs(apart.square().sum(1)).sum(-1) + self.trap / 2 * x.square().sum(-1)


def double_well(squared: Tensor) -> Tensor:
    """Of a pair at a squared distance."""
    away = (squared.sqrt() - 4).square()
    return away * (0.9 * away - 4)


def lennard_jones(squared: Tensor) -> Tensor:
    """Of a pair at a squared distance: depth 2 at distance 1, as each of the two sees the other."""
    inverse = squared.reciprocal()
    attraction = inverse * inverse * inverse
    return 2 * attraction * (attraction - 2)


SYSTEMS = {
    "dw4": System(4, 2, double_well, 0.0, (29.669, 0.003)),
    "lj13": System(13, 3, lennard_jones, 1.0, (59.874, 0.014)),
}


def annealed(system: System, count: int, moves: int = 5, keep: float = 0.95) -> tuple[Tensor, float]:
    """A population that is cooled from a Gaussian to the energy, resampled after each step.

    Args:
        system: Whose energy.
        count: States.
        moves: Hamiltonian trajectories after each step, of ten leaps.
        keep: Share of the population that is still effective after a step, which decides how long it is.

    Returns:
        States ``(count, dim)``, float64, and an estimate of ``log Z``.
    """
    wide = 1.0 if system.trap else 9.0
    x = math.sqrt(wide) * torch.randn(count, system.dim, dtype=torch.float64)
    log_z, share, leap = system.dim / 2 * math.log(2 * math.pi * wide), 0.0, 0.1

    def gaussian(x: Tensor) -> Tensor:
        return x.square().sum(-1) / (2 * wide)

    while share < 1:
        change = gaussian(x) - system.energy(x)

        def effective(step: float, change: Tensor = change) -> float:
            return float((2 * torch.logsumexp(step * change, 0) - torch.logsumexp(2 * step * change, 0)).exp()) / count

        low, high = -60.0, math.log(1 - share)
        if effective(math.exp(high)) < keep:
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if effective(math.exp(middle)) > keep else (low, middle)
        step = math.exp(high)
        share = 1.0 if high >= math.log(1 - share) else share + step
        log_z += float(torch.logsumexp(step * change, 0)) - math.log(count)
        # systematic: a state as often as it weighs, up to one
        edges = (step * change).softmax(0).cumsum(0)
        edges /= edges[-1].clone()
        x = x[torch.searchsorted(edges, (torch.arange(count, dtype=torch.float64) + torch.rand(1)) / count)]
        x, leap = moved(lambda x: (1 - share) * gaussian(x) + share * system.energy(x), x, moves, leap)  # noqa: B023
    return x, log_z


def moved(energy: Callable[[Tensor], Tensor], x: Tensor, moves: int, leap: float) -> tuple[Tensor, float]:
    """States after Hamiltonian trajectories of ten leaps, and the length of a leap at which four in five are taken."""

    def with_force(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = energy(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), -gradient

    value, force = with_force(x)
    for _ in range(moves):
        # lengths of their own: of one length all would turn together
        length = leap * (0.8 + 0.4 * torch.rand(len(x), 1, dtype=x.dtype))
        momentum = torch.randn_like(x)
        before = value + momentum.square().sum(-1) / 2
        to, to_force, to_value = x, force, value
        for _ in range(10):
            momentum = momentum + length / 2 * to_force
            to = to + length * momentum
            to_value, to_force = with_force(to)
            momentum = momentum + length / 2 * to_force
        log_ratio = before - to_value - momentum.square().sum(-1) / 2
        taken = torch.rand_like(value).log() < log_ratio  # NaN, far beyond a wall, is no
        x, force = (torch.where(taken[:, None], new, old) for new, old in ((to, x), (to_force, force)))
        value = torch.where(taken, to_value, value)
        leap *= math.exp(float(taken.double().mean()) - 0.8)
    return x, leap


class Chains(f2.data.FlowDataModule):
    """States of Markov chains: a population that was cooled, and what it moved to since."""

    def __init__(self, system: System, count: int) -> None:
        super().__init__()
        self.shape, self.system, self.count = (system.dim,), system, count

    def splits(self) -> dict[str, tuple[Tensor, None]]:
        """Most of the chains to train on, some to validate, some to test."""
        chains = min(2000, self.count // 5)
        x, leap = annealed(self.system, chains, keep=0.9)[0], 0.03
        found = []
        while sum(map(len, found)) < self.count:
            x, leap = moved(self.system.energy, x, 20, leap)
            found.append(x.float())
        parts = torch.stack(found, 1).split([chains - 2 * (chains // 20), chains // 20, chains // 20])
        return {name: (part.flatten(0, 1), None) for name, part in zip(("train", "val", "test"), parts, strict=True)}

    @property
    def test(self) -> Tensor:
        """States ``(N, dim)`` of chains that nothing was trained on."""
        return self.dataset("test").values[:]
