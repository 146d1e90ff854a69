"""Embedding of a pair of times that is smooth and takes negative intervals."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.paths import distinct
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.configured import Configured

__all__ = ["IntervalEmbedding", "SlowWaves"]


class SlowWaves(nn.Module, Configured):
    """Times and slow sinusoids of them through two layers.

    Periods of 2 or longer down to ``2 / frequencies``: objectives differentiate with respect to time, and fast ones,
    usual in diffusion, make that derivative large and noisy.

    Args:
        features: Width of the output.
        frequencies: Sinusoids per time.
        times: Number of times.
    """

    rates: Tensor

    def __init__(self, features: int, frequencies: int, times: int) -> None:
        super().__init__()
        at_least(1, features=features, frequencies=frequencies)
        self.features = features
        self.register_buffer("rates", math.pi * torch.arange(1, frequencies + 1) / 2, persistent=False)
        self.start = nn.Linear((2 * frequencies + 1) * times, features)
        self.project = nn.Linear(features, features)

    def embed(self, times: Tensor) -> Tensor:
        """``(B, times) -> (B, features)``."""
        angles = times[..., None] * self.rates.to(times.dtype)
        waves = torch.cat((angles.sin(), angles.cos()), -1).flatten(1)
        return self.project(nn.functional.silu(self.start(torch.cat((times, waves), -1))))


class IntervalEmbedding(SlowWaves):
    """Embedding of the time ``s`` and the signed interval ``t - s``, by slow sinusoids.

    Args:
        features: Width of the output.
        frequencies: Sinusoids per time.
    """

    def __init__(self, features: int, frequencies: int = 8) -> None:
        super().__init__(features, frequencies, times=2)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """``(B,), (B,) -> (B, features)``, or ``(1, features)`` where all samples share both times."""
        s, t = distinct(s, t)
        return self.embed(torch.stack((s, t - s), -1))
