"""Embeddings: of a pair of times, smooth and with negative intervals; of a vector that states are conditioned on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.paths import distinct
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import kind_of
from f2d2_lightning.utils.configured import Configured


class SlowWaves(nn.Module, Configured):
    """So many times, and slow sinusoids of each, through two layers to a width of ``features``.

    Periods of 2 or longer down to ``2 / frequencies``: objectives differentiate with respect to time, and fast ones,
    usual in diffusion, make that derivative large and noisy.
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


class VectorEmbedding(nn.Module, Configured):
    """Embedding of a vector that states are conditioned on, standardised, through two layers.

    Args:
        numbers: Entries of the vector.
        features: Width of the output.

    >>> VectorEmbedding(3, 8)(torch.zeros(5, 3)).shape
    torch.Size([5, 8])
    """

    center: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, numbers: int, features: int = 128) -> None:
        super().__init__()
        at_least(1, numbers=numbers, features=features)
        self.numbers, self.features = numbers, features
        self.register_buffer("center", torch.zeros(numbers))
        self.register_buffer("scale", torch.ones(numbers))
        self.register_buffer("fitted", torch.tensor(False))
        silu = nn.SiLU()
        self.layers = nn.Sequential(nn.Linear(numbers, features), silu, nn.Linear(features, features), silu)

    @torch.no_grad()
    def fit(self, vectors: Iterable[Tensor], reduce: Callable[[Tensor], Tensor] | None = None) -> VectorEmbedding:
        """Take mean and deviation of each entry from data, in one pass with float64 sums.

        Args:
            vectors: Batches ``(B, numbers)``.
            reduce: Sums a tensor over processes, where each of them sees a part of the data.

        Raises:
            ValueError: If there are none, or they have another shape, or NaN or infinite entries.
        """
        sums = torch.zeros(3, self.numbers, dtype=torch.float64)
        for vector in vectors:
            vector = self.check(vector).to("cpu", torch.float64)
            if not bool(vector.isfinite().all()):
                raise ValueError("conditions hold NaN or infinite values; remove or repair them")
            sums += torch.stack((torch.ones_like(vector), vector, vector.square())).sum(1)
        count, total, squares = sums if reduce is None else reduce(sums)
        if not bool(count.all()):
            raise ValueError("there are no conditions to standardise by")
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.center.copy_(mean)
        # a constant stays one, and is only moved to zero
        self.scale.copy_(torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.ones_like(mean)))
        self.fitted.fill_(True)
        return self

    def check(self, vector: Tensor) -> Tensor:
        """The vector ``(B, numbers)`` as it came.

        Raises:
            ValueError: If it is none.
        """
        if not isinstance(vector, Tensor) or not vector.is_floating_point() or vector.shape[1:] != (self.numbers,):
            raise ValueError(
                f"the network needs cond of shape (B, {self.numbers}), floating numbers; got {kind_of(vector)}; set "
                "condition= to how many there are, or to a network that embeds what there is"
            )
        return vector

    def standardized(self, vector: Tensor) -> Tensor:
        """The vector ``(B, numbers)``, less its mean over the data, by its deviation."""
        return (self.check(vector) - self.center) / self.scale

    def forward(self, vector: Tensor) -> Tensor:
        """``(B, numbers) -> (B, features)``."""
        return self.layers(self.standardized(vector))
