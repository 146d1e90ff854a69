"""Three simulators whose posteriors are known, for ``examples/posterior.py``.

Lueckmann et al., "Benchmarking Simulation-Based Inference", 2021, https://arxiv.org/abs/2101.04653: two moons, SLCP
(simple likelihood, complex posterior) and a mixture of two Gaussians of one mean. References are drawn exactly, those
of SLCP by annealed Markov chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Task(NamedTuple):
    """Parameters uniform on ``[-bound, bound]^dim``, a simulator ``(N, dim) -> (N, numbers)``, and a reference:
    samples of the posterior, by an observation ``(numbers,)`` and their number.
    """

    dim: int
    bound: float
    simulate: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor, int], Tensor]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Parameters from the prior, and observations."""
        return (theta := self.bound * (2 * torch.rand(count, self.dim) - 1)), self.simulate(theta)


def moon(count: int) -> Tensor:
    """Points of a crescent, ``(count, 2)``."""
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    return torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), -1)


def two_moons(theta: Tensor) -> Tensor:
    """A crescent, moved by two combinations of the parameters, one of which loses its sign."""
    a, b = theta.unbind(-1)
    return moon(len(theta)) + torch.stack((-(a + b).abs(), b - a), -1) / math.sqrt(2)


def within(bound: float, count: int, draw: Callable[[], Tensor]) -> Tensor:
    """As many of the parameters drawn as lie in the prior; those that are nothing lie nowhere."""
    found: list[Tensor] = []
    while sum(map(len, found)) < count:
        theta = draw()
        found.append(theta[(theta.abs() < bound).all(-1)])
    return torch.cat(found)[:count]


def two_moons_reference(x: Tensor, count: int) -> Tensor:
    """The move is one-to-one up to the sign: from points of the crescent back."""

    def draw() -> Tensor:
        total, difference = ((moon(4 * count) - x) * math.sqrt(2)).unbind(-1)
        total = torch.where(total > 0, total, math.nan) * (2.0 * torch.randint(2, total.shape) - 1)
        return torch.stack((total + difference, total - difference), -1) / 2

    return within(1, count, draw)


def mixture(theta: Tensor) -> Tensor:
    """Noise of deviation 1 or .1 around the parameters."""
    return theta + torch.where(torch.rand(len(theta), 1) < 0.5, 1.0, 0.1) * torch.randn_like(theta)


def mixture_reference(x: Tensor, count: int) -> Tensor:
    """The same noise, within the prior."""
    return within(10, count, lambda: mixture(x.expand(4 * count, 2)))


def slcp_moments(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviations ``(N, 1, 2)`` and correlation ``(N, 1)`` of the four points that are seen."""
    return theta[:, None, :2], theta[:, None, 2:4].square().clamp(min=1e-6), torch.tanh(theta[:, None, 4])


def slcp(theta: Tensor) -> Tensor:
    """Four points of a Gaussian in the plane."""
    mean, deviation, correlation = slcp_moments(theta)
    first, second = torch.randn(2, len(theta), 4)
    second = correlation * first + (1 - correlation.square()).sqrt() * second
    return (mean + deviation * torch.stack((first, second), -1)).flatten(1)


def slcp_reference(x: Tensor, count: int) -> Tensor:
    """Annealed from the prior; chains move by differences of others and by the signs that are lost."""

    def log_likelihood(theta: Tensor) -> Tensor:
        mean, deviation, correlation = slcp_moments(theta)
        a, b = ((x.reshape(1, 4, 2) - mean) / deviation).unbind(-1)
        left = (1 - correlation.square()).clamp(min=1e-6)
        squared = (a.square() - 2 * correlation * a * b + b.square()) / left
        return -(0.5 * squared + 0.5 * left.log() + deviation.log().sum(-1)).sum(-1)

    theta, level = 3 * (2 * torch.rand(count, 5) - 1), 0.0
    value = log_likelihood(theta)
    while level < 1:
        low, high = 0.0, 1 - level
        for _ in range(30):  # so far that half of the chains count
            step = (low + high) / 2
            enough = 1 / (step * value).softmax(0).square().sum() > count / 2
            low, high = (step, high) if enough else (low, step)
        level = min(1.0, level + high)
        kept = torch.multinomial((high * value).softmax(0), count, replacement=True)
        theta, value = theta[kept], value[kept]
        for _ in range(200 if level == 1 else 20):
            one, other = torch.randint(count, (2, count))
            size = 0.75 * torch.exp(torch.randn(count, 1))
            moved = theta + size * (theta[one] - theta[other]) + 0.01 * torch.randn_like(theta)
            moved[:, 2:4] *= 2.0 * torch.randint(2, (count, 2)) - 1
            there = log_likelihood(moved)
            accepted = ((there - value) * level > torch.rand(count).log()) & (moved.abs() < 3).all(-1)
            theta, value = torch.where(accepted[:, None], moved, theta), torch.where(accepted, there, value)
    return theta


TASKS = {
    "two_moons": Task(2, 1.0, two_moons, two_moons_reference),
    "slcp": Task(5, 3.0, slcp, slcp_reference),
    "mixture": Task(2, 10.0, mixture, mixture_reference),
}
