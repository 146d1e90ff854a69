r"""Embeddings of two times as the networks of other repositories have them.

All are sinusoids at rates :math:`10^{-4 i / (n - 1)}, i = 0, \dots, n - 1`, sines first, followed by two linear layers;
the rates are computed in single precision, because that is what the weights were trained with.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.paths import distinct
from f2d2_lightning.utils.configured import Configured


class _Sinusoids(nn.Module):
    rates: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 4 or channels % 2:
            raise ValueError(f"channels={channels} of sinusoids is an even number from 4 on")
        exponents = torch.arange(channels // 2, dtype=torch.float32) / (channels // 2 - 1)
        self.register_buffer("rates", torch.tensor(1e-4, dtype=torch.float32) ** exponents, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        angles = value[:, None] * self.rates.to(value.dtype)
        return torch.cat((angles.sin(), angles.cos()), -1)


def _layers(inputs: int, features: int) -> nn.Sequential:
    start, project = nn.Linear(inputs, features), nn.Linear(features, features)
    return nn.Sequential(OrderedDict(start=start, silu=nn.SiLU(), project=project))


class LogTimeEmbedding(nn.Module, Configured):
    r"""The official F2D2 network's: sinusoids of :math:`\frac14 \log s` and :math:`\frac14 \log(t - s)`.

    Each has layers of its own, and both are concatenated: a linear layer on them is the sum of two. Ai et al., 2025,
    https://arxiv.org/abs/2512.02636

    Args:
        channels: Sinusoids per time, sines and cosines counted.
        width: Width of the embedding of one time.
        interval: Whether the interval is embedded too; a teacher has only the time.
        earliest: What stands for earlier times, whose logarithm tends to minus infinity; as in their sampling.
        shortest: What stands for shorter intervals, the diagonal among them; as in their training.
    """

    def __init__(
        self, channels: int, width: int, interval: bool = True, earliest: float = 1e-9, shortest: float = 1 / 1024
    ) -> None:
        super().__init__()
        self.features = width * (2 if interval else 1)
        self.earliest, self.shortest = earliest, shortest
        self.sinusoids = _Sinusoids(channels)
        self.time = _layers(channels, width)
        self.interval = _layers(channels, width) if interval else None

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """``(B,), (B,) -> (B, features)``, or ``(1, features)`` where all samples share both times."""
        s, t = distinct(s, t)
        start = s.clamp(min=self.earliest)
        if self.interval is None:
            return self.time(self.sinusoids(start.log() / 4))
        # their networks of two times add this once more, beside the clamping of their training
        first = self.time(self.sinusoids((start + 1e-9).log() / 4))
        length = (t - s).clamp(min=self.shortest)
        return torch.cat((first, self.interval(self.sinusoids(length.log() / 4))), -1)


class MeanFlowEmbedding(nn.Module, Configured):
    """Gsunshine/py-meanflow's: sinusoids of their time, which runs down, and of the interval, concatenated.

    Geng et al., "Mean Flows for One-step Generative Modeling", 2025, https://arxiv.org/abs/2505.13447

    Args:
        channels: Sinusoids per time, sines and cosines counted.
        features: Width of the output.
    """

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.sinusoids = _Sinusoids(channels)
        self.layers = _layers(2 * channels, features)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """``(B,), (B,) -> (B, features)``, or ``(1, features)`` where all samples share both times."""
        s, t = distinct(s, t)
        return self.layers(torch.cat((self.sinusoids(1 - s), self.sinusoids(t - s)), -1))
