"""Likelihood metrics against NumPy and SciPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from f2d2_lightning import Quantization
from f2d2_lightning.metrics import LikelihoodAgreement, MeanLikelihood, agreement


@pytest.fixture
def values():
    generator = np.random.default_rng(0)
    reference = generator.normal(-100, 20, 57)
    return reference + generator.normal(1.5, 4, 57), reference


@pytest.mark.parametrize("levels", [None, 17])
def test_equals_numpy(values, levels):
    few, reference = values
    dim = 64
    metric = LikelihoodAgreement(dim, levels and Quantization(levels))
    for part in (slice(0, 20), slice(20, 21), slice(21, None)):
        metric.update(torch.from_numpy(few[part]), torch.from_numpy(reference[part]))
    result = metric.compute()
    to_unit = lambda v: -v if levels is None else (-v - dim * np.log(2 / levels)) / (dim * np.log(2))  # noqa: E731
    a, b = to_unit(few), to_unit(reference)
    expected = {
        "nll": a.mean(),
        "nll_standard_error": a.std(ddof=1) / math.sqrt(57),
        "reference_nll": b.mean(),
        "gap": (a - b).mean(),
        "gap_standard_error": (a - b).std(ddof=1) / math.sqrt(57),
        "absolute_error": np.abs(a - b).mean(),
        "correlation": np.corrcoef(a, b)[0, 1],
        "rank_correlation": scipy.stats.spearmanr(a, b).statistic,
    }
    for name, value in expected.items():
        assert float(getattr(result, name)) == pytest.approx(value, rel=1e-7), name
    assert float(agreement(few, reference.tolist()).gap) == pytest.approx((reference - few).mean())


@pytest.mark.parametrize("levels", [None, 17])
def test_mean_equals_numpy(values, levels):
    few, _ = values
    # far from zero, where sums of squares cancel
    few = few - 3000.0
    metric, both = (kind(64, levels and Quantization(levels)) for kind in (MeanLikelihood, LikelihoodAgreement))
    for part in (slice(0, 20), slice(20, 21), slice(21, 21), slice(21, None)):
        metric.update(torch.from_numpy(few[part]))
    bits = -few if levels is None else (-few - 64 * np.log(2 / levels)) / (64 * np.log(2))
    mean, error, count = (float(v) for v in metric.compute())
    assert count == 57
    assert mean == pytest.approx(bits.mean(), rel=1e-12)
    assert error == pytest.approx(bits.std(ddof=1) / math.sqrt(57), rel=1e-7)
    both.update(torch.from_numpy(few), torch.from_numpy(few))
    assert mean == pytest.approx(float(both.compute().nll), rel=1e-12)


def test_mean_of_one_and_of_none():
    metric = MeanLikelihood(4)
    metric.update(torch.zeros(0))
    assert all(math.isnan(float(v)) for v in metric.compute()[:2])
    metric.update(torch.tensor([-3.0]))
    mean, error, count = metric.compute()
    assert (float(mean), float(count)) == (3.0, 1.0)
    assert math.isnan(float(error))


def test_sign_of_the_gap_and_one_sample():
    # a student that finds every sample less likely than the teacher has a positive gap in NLL
    reference = torch.tensor([-1.0, -2.0, -5.0])
    assert float(agreement(reference - 3.0, reference).gap) == pytest.approx(3.0)
    result = agreement(torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert float(result.gap) == pytest.approx(-1.0)
    assert math.isnan(float(result.correlation))
    assert math.isnan(float(result.nll_standard_error))


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_refuses_unpaired_values(shapes):
    with pytest.raises(ValueError, match="both are"):
        agreement(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("values", [[1.0, math.nan, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0]])
def test_what_has_no_correlation_has_none_of_ranks(values):
    for pair in ((values, [1.0, 2.0, 3.0, 5.0]), ([1.0, 2.0, 3.0, 5.0], values)):
        found = agreement(*map(torch.tensor, pair))
        assert math.isnan(found.correlation)
        assert math.isnan(found.rank_correlation)
        assert math.isnan(scipy.stats.spearmanr(*pair).statistic)


def test_ranks_of_ties_are_those_of_scipy():
    pair = torch.randint(5, (2, 300)).double()
    expected = scipy.stats.spearmanr(*pair.numpy()).statistic
    assert float(agreement(*pair).rank_correlation) == pytest.approx(expected, abs=1e-5)
