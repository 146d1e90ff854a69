"""The official recipe's query is wrong on a Gaussian whose map is exact; its intervals are what its code draws."""

from __future__ import annotations

import math

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.modules.official import DyadicIntervals, official_log_prob


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_official_query_is_off_where_the_map_is_exact(steps):
    torch.manual_seed(0)
    dim, deviation = 16, 0.1
    flow = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(torch.zeros(dim), deviation**2 * torch.eye(dim)))
    x = deviation * torch.randn(50, dim)
    truth = torch.distributions.Normal(0.0, deviation).log_prob(x).sum(-1)
    assert torch.allclose(f2.log_prob(flow, x, steps).value, truth)
    official = official_log_prob(flow, x, steps).value
    bits = float((official - truth).mean()) / (dim * math.log(2))
    assert abs(bits) > 0.2
    # one step on [1, 2] by hand: where the closed form lands, and what it says of the density
    if steps == 1:
        ratio = torch.tensor((1 + 4 * deviation**2) / deviation**2).sqrt()
        z = x - (ratio - 1) * x
        expected = f2.sampling.normal_log_prob(z) - dim * ratio.log()
        assert torch.allclose(official, expected)


def test_official_intervals():
    s, t = DyadicIntervals().sample(40_000)
    on = s == t
    assert float(on.float().mean()) == pytest.approx(0.5, abs=1e-4)
    assert torch.equal((s[on] * 1024).round(), s[on] * 1024)
    length = (t - s)[~on]
    lengths, counts = length.unique(return_counts=True)
    assert lengths.tolist() == [2.0**-i for i in range(6, -1, -1)]
    share = counts / counts.sum()
    assert float((share - 1 / 7).abs().max()) < 5 * math.sqrt(1 / 7 * 6 / 7 / 20_000)
    # aligned: a start is a multiple of its length, and the end lies within [0, 1]
    assert torch.equal((s[~on] / length).round(), s[~on] / length)
    assert float(t.max()) <= 1
