"""Likelihoods gathered over a data set, failures and comparison included."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import f2d2_lightning as f2
from f2d2_lightning.metrics import LikelihoodEvaluation
from f2d2_lightning.metrics.evaluation import draw_again


@pytest.mark.parametrize("levels", [None, 17])
def test_results_are_those_of_numpy_like_sums(levels):
    values = {1: torch.randn(30) - 5, 4: torch.randn(30) - 7}
    values[4][[2, 11]] = torch.nan
    reference = torch.randn(30) - 6
    evaluation = LikelihoodEvaluation((1, 4), 8, levels and f2.Quantization(levels), torch.device("cpu"))
    for start in (0, 10, 20):
        batch = {k: v[start : start + 10] for k, v in values.items()}
        left = min(10, max(0, 14 - start))
        evaluation.update(batch, reference[start : start + left] if left else None)
    assert len(evaluation.compared_values()[1]) == 12
    result = evaluation.results()
    unit, offset = (1.0, 0.0) if levels is None else (8 * math.log(2), -math.log2(2 / 17))
    for k, value in values.items():
        good = value.isfinite()
        nll = -value[good] / unit + offset
        both = good[:14]
        gap = (reference[:14] - value[:14])[both] / unit
        expected = {
            f"nll_{k}": nll.mean(),
            f"nll_standard_error_{k}": nll.std() / len(nll) ** 0.5,
            f"gap_{k}": gap.mean(),
            f"absolute_error_{k}": gap.abs().mean(),
            f"reference_nll_{k}": (-reference[:14][both] / unit + offset).mean(),
            f"correlation_{k}": torch.corrcoef(torch.stack((value[:14][both], reference[:14][both])))[0, 1],
            f"rank_correlation_{k}": scipy.stats.spearmanr(value[:14][both], reference[:14][both]).statistic,
            f"unconverged_{k}": torch.tensor(0.0 if k == 1 else 2 / 30),
        }
        for name, number in expected.items():
            torch.testing.assert_close(result[name], torch.as_tensor(number).float(), msg=name, rtol=1e-5, atol=1e-6)


def test_sums_are_of_double_precision():
    """Deviation 1 around 10,000: the mean of squares has no digits left for it in single precision."""
    torch.set_default_dtype(torch.float32)
    evaluation = LikelihoodEvaluation((1,), 8, None, torch.device("cpu"))
    x = 1e4 + torch.randn(400, 8)
    joint = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(torch.zeros(8), torch.eye(8)))
    for part in x.split(20):
        missed = lambda z, k, cond: f2.likelihood.Samples(z + 0.7, z, 1)  # noqa: E731
        evaluation.evaluate(lambda y, k, cond: f2.log_prob(joint, y, k), missed, part, None, None)
    (row,) = evaluation.rows()
    assert f"their standard deviation is {float(x.double().std()):.3g}" in row["doubt"]


def test_what_no_sample_has_is_left_out():
    evaluation = LikelihoodEvaluation((2,), 8, None, torch.device("cpu"))
    evaluation.update({2: torch.full((5,), torch.nan)}, torch.zeros(3))
    assert evaluation.results() == {"unconverged_2": torch.tensor(1.0)}
    alone = LikelihoodEvaluation((2,), 8, None, torch.device("cpu"))
    alone.update({2: torch.zeros(5)}, None)
    assert set(alone.results()) == {"nll_2", "nll_standard_error_2", "unconverged_2"}


def test_a_batch_of_repeated_samples_alone_adds_nothing():
    evaluation = LikelihoodEvaluation((1,), 2, None, torch.device("cpu"))
    joint = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(torch.zeros(2), torch.eye(2)))
    for counted in (True, False):
        ask = lambda y, k, cond: f2.log_prob(joint, y, k)  # noqa: E731
        evaluation.evaluate(ask, None, torch.zeros(3, 2), None, None, counted=torch.full((3,), counted))
    (row,) = evaluation.rows()
    assert row["nll"] == pytest.approx(math.log(2 * math.pi), abs=1e-6)


class Biased(f2.JointMap):
    """A Gaussian map whose way to noise misses by a known factor."""

    def __init__(self, flow, factor):
        super().__init__()
        self.flow, self.factor = flow, factor

    def joint(self, x, s, t, cond):
        u, divergence = self.flow.joint(x, s, t, cond)
        return f2.flows.Joint(torch.where((t < s)[:, None], u * self.factor, u), divergence)


def gaussian(d=3):
    a = torch.randn(d, d)
    return f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(torch.randn(d), a @ a.T + 0.1 * torch.eye(d)))


def test_round_trip_and_draws_against_numpy():
    torch.manual_seed(0)
    levels, quantization = 17, f2.Quantization(17)
    joint = Biased(gaussian(), 0.9)
    x = quantization.dequantize(torch.randint(17, (21, 3)))
    evaluation = LikelihoodEvaluation((1, 2), 3, levels and f2.Quantization(levels), torch.device("cpu"), draws=3)
    for part in x.split(8):
        reference = f2.log_prob(joint.flow, part, 1).value[:5]
        evaluation.evaluate(
            lambda x, k, cond: f2.log_prob(joint, x, k),
            lambda z, k, cond: f2.sample(joint, z, k),
            part,
            None,
            reference,
        )
    result = evaluation.results()
    again = [x, *(draw_again(x, quantization, draw) for draw in (1, 2))]
    for k in (1, 2):
        bits = torch.stack([f2.bits_per_dim(f2.log_prob(joint, y, k).value, 3, levels) for y in again]).numpy()
        mean = bits.mean(0)
        assert float(result[f"nll_{k}"]) == pytest.approx(mean.mean(), rel=1e-6)
        assert float(result[f"nll_standard_error_{k}"]) == pytest.approx(mean.std(ddof=1) / 21**0.5, rel=1e-6)
        back = f2.sample(joint, f2.log_prob(joint, x, k).noise, k).state
        rms = np.sqrt(((back - x).numpy() ** 2).mean())
        assert float(result[f"round_trip_{k}"]) == pytest.approx(rms, rel=1e-6)
        assert rms > 1e-3
        # compared on the data's own draw, and on the first five of each batch only
        rows = np.r_[0:5, 8:13, 16:21]
        other = f2.bits_per_dim(f2.log_prob(joint.flow, x, 1).value, 3, levels).numpy()
        assert float(result[f"gap_{k}"]) == pytest.approx((bits[0] - other)[rows].mean(), rel=1e-5)
    (first, _) = evaluation.rows()
    assert first["steps"] == first["evaluations"] == 1
    assert first["nll"] == pytest.approx(float(result["nll_1"]), rel=1e-6)
    assert first["gap"] == pytest.approx(float(result["gap_1"]), rel=1e-6)


def test_an_exact_map_comes_back():
    joint, x = gaussian(), torch.randn(9, 3)
    evaluation = LikelihoodEvaluation((4,), 3, None, torch.device("cpu"))
    evaluation.evaluate(lambda x, k, _: f2.log_prob(joint, x, k), lambda z, k, _: f2.sample(joint, z, k), x, None, None)
    assert float(evaluation.results()["round_trip_4"]) < 1e-9
    (row,) = evaluation.rows()
    assert math.isnan(row["gap"])
    assert math.isfinite(row["nll"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_draw_is_of_the_same_data_and_of_each_sample_alone(dtype):
    quantization = f2.Quantization(256)
    k = torch.randint(256, (4000, 5))
    x = quantization.dequantize(k).to(dtype)
    again = draw_again(x, quantization, 1)
    assert again.dtype == dtype
    assert torch.equal(quantization.quantize(again), k)
    assert torch.equal(draw_again(x[7:9], quantization, 1), again[7:9])
    uniform = [(y.double() + 1) / quantization.width - k for y in (x, again, draw_again(x, quantization, 2))]
    for u in uniform[1:]:
        assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.stack((uniform[i].flatten(), uniform[j].flatten())))[0, 1])) < 0.03
    # dimensions of one sample are independent too
    assert float((torch.corrcoef(uniform[1].T) - torch.eye(5)).abs().max()) < 0.06


@pytest.mark.parametrize(("draws", "levels"), [(0, 17), (2, None)])
def test_draws_that_cannot_be(draws, levels):
    with pytest.raises(ValueError, match="draws"):
        LikelihoodEvaluation((1,), 3, levels and f2.Quantization(levels), torch.device("cpu"), draws)
