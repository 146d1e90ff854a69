"""The official recipe's query is wrong on a Gaussian whose map is exact; its intervals are what its code draws."""

import math
from pathlib import Path

import pytest
import torch
import yaml

import f2d2_lightning as f2
from command_line import f2d2
from f2d2_lightning.likelihood.sampling import normal_log_prob
from official.module import DyadicIntervals, official_log_prob

CONFIG = Path(__file__).parents[2] / "benchmarks" / "official" / "digits.yaml"


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_official_query_is_off_where_the_map_is_exact(steps):
    dim, deviation = 16, 0.1
    flow = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(torch.zeros(dim), deviation**2 * torch.eye(dim)))
    x = deviation * torch.randn(50, dim)
    truth = torch.distributions.Normal(0.0, deviation).log_prob(x).sum(-1)
    assert torch.allclose(f2.log_prob(flow, x, steps).value, truth)
    official = official_log_prob(flow, x, steps).value
    assert abs(float((official - truth).mean())) / (dim * math.log(2)) > 0.2
    # one step on [1, 2] by hand: where the closed form lands, and what it says of the density
    if steps == 1:
        ratio = torch.tensor((1 + 4 * deviation**2) / deviation**2).sqrt()
        assert torch.allclose(official, normal_log_prob(x - (ratio - 1) * x) - dim * ratio.log())


def test_official_intervals():
    s, t = DyadicIntervals().sample(40_000)
    on = s == t
    assert float(on.double().mean()) == pytest.approx(0.5, abs=1e-4)
    assert torch.equal((s[on] * 1024).round(), s[on] * 1024)
    length = (t - s)[~on]
    lengths, counts = length.unique(return_counts=True)
    assert lengths.tolist() == [2.0**-i for i in range(6, -1, -1)]
    assert float((counts / counts.sum() - 1 / 7).abs().max()) < 5 * math.sqrt(1 / 7 * 6 / 7 / 20_000)
    # aligned: a start is a multiple of its length, and the end lies within [0, 1]
    assert torch.equal((s[~on] / length).round(), s[~on] / length)
    assert float(t.max()) <= 1


def test_its_configuration_is_one(capsys):
    with pytest.raises(SystemExit):
        f2d2("fit", "--config", CONFIG, "--print_config")
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert model["objective"]["init_args"]["intervals"]["class_path"] == "official.module.DyadicIntervals"
    assert model["objective"]["init_args"]["intervals"]["init_args"] == {"finest": 6}
