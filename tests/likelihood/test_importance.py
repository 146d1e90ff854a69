"""Importance weights against closed forms of Gaussians, and their errors against repetitions."""

import math

import pytest
import torch

from f2d2_lightning.likelihood import ImportanceWeights

WIDE, NARROW = (torch.distributions.Normal(*torch.tensor(own, dtype=torch.float64)) for own in ((0.0, 1.5), (0.3, 1.0)))


def drawn(count):
    x = WIDE.sample((count,))
    return x, ImportanceWeights(NARROW.log_prob(x) + 2.0, WIDE.log_prob(x))


def test_estimates_and_their_errors_are_those_of_many_repetitions():
    """Normaliser, a mean, a share and the effective sample size, ``E_q[w]^2 / E_q[w^2]``."""
    exact = {"z": 2.0, "mean": 0.3, "share": float(0.5 * math.erfc(-0.3 / 2**0.5))}
    found, errors, sizes = {name: [] for name in exact}, {name: [] for name in exact}, []
    for _ in range(400):
        x, weights = drawn(500)
        both = weights.mean(torch.stack((x, (x > 0).double()), 1))
        for name, value, error in zip(
            exact,
            (weights.log_normalizer.value, *both.value),
            (weights.log_normalizer.standard_error, *both.standard_error),
            strict=True,
        ):
            found[name].append(float(value))
            errors[name].append(float(error))
        sizes.append(float(weights.effective_sample_size))
    for name, truth in exact.items():
        values = torch.tensor(found[name])
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 20
        assert float(torch.tensor(errors[name]).mean()) == pytest.approx(float(values.std()), rel=0.12)
    grid = torch.linspace(-15, 15, 20_001)
    square = torch.trapezoid((2 * NARROW.log_prob(grid) - WIDE.log_prob(grid)).exp(), grid)
    assert float(torch.tensor(sizes).mean()) == pytest.approx(500 / float(square), rel=0.01)


def test_weights_of_any_size_and_targets_of_zero():
    x, weights = drawn(50)
    shifted = ImportanceWeights(weights.log_target - 5000, weights.log_prob)
    torch.testing.assert_close(shifted.normalized, weights.normalized, rtol=1e-9, atol=0)
    torch.testing.assert_close(shifted.log_normalizer.value, weights.log_normalizer.value - 5000)
    cut = ImportanceWeights(torch.where(x > 0, weights.log_target, -torch.inf), weights.log_prob)
    assert bool((cut.normalized[x <= 0] == 0).all())
    assert float(cut.mean(x > 0).value) == pytest.approx(1)
    assert float(cut.mean(x > 0).standard_error) == pytest.approx(0, abs=1e-12)


def test_values_without_weight_do_not_count_and_complex_ones_are_whole():
    x, weights = drawn(20_000)
    cut = ImportanceWeights(torch.where(x > 0, weights.log_target, -torch.inf), weights.log_prob)
    logs = torch.where(x > 0, x.log(), torch.inf)
    kept = ImportanceWeights(weights.log_target[x > 0], weights.log_prob[x > 0]).mean(logs[x > 0])
    torch.testing.assert_close(cut.mean(logs).value, kept.value)
    torch.testing.assert_close(cut.mean(logs).standard_error, kept.standard_error)
    # E exp(iwx) of a normal density
    wave = weights.mean(torch.exp(1j * 2.0 * x))
    exact = torch.exp(2j * NARROW.mean - 2.0 * NARROW.variance)
    assert float((wave.value - exact).abs()) < 4 * float(wave.standard_error)
    assert abs(complex(exact).imag) > 5 * float(wave.standard_error)
    assert ImportanceWeights(torch.zeros(2), torch.zeros(2)).mean([1, 2]).value == 1.5
    with pytest.raises(ValueError, match=r"values have shape \(\), and there are 2 weights"):
        ImportanceWeights(torch.zeros(2), torch.zeros(2)).mean(torch.tensor(1.0))


def test_clipped_weights_are_those_below_a_quantile_and_biased_as_quadrature_says():
    grid = torch.linspace(-15, 15, 20_001, dtype=torch.float64)
    w = (NARROW.log_prob(grid) - WIDE.log_prob(grid)).exp() * math.exp(2.0)
    order = w.argsort()
    cells = WIDE.log_prob(grid).exp()[order] * (grid[1] - grid[0])
    most = w[order][int((cells.cumsum(0) < 0.7).sum())]
    biased = float((w.clamp(max=most) * WIDE.log_prob(grid).exp()).sum() * (grid[1] - grid[0]))
    weights = drawn(200_000)[1]
    clipped = weights.clipped(0.7)
    assert float(clipped.log_normalizer.value) == pytest.approx(math.log(biased), abs=0.005)
    assert float(weights.log_normalizer.value) - math.log(biased) > 0.025
    assert float(clipped.effective_sample_size) > float(weights.effective_sample_size)
    assert float((clipped.log_weights < weights.log_weights - 1e-9).double().mean()) == pytest.approx(0.3, abs=1e-5)
    torch.testing.assert_close(weights.clipped(1.0).log_weights, weights.log_weights)
    torch.testing.assert_close(clipped.log_prob, weights.log_prob)


@pytest.mark.parametrize("quantile", [0.0, 1.5, -1])
def test_a_quantile_out_of_range_is_refused(quantile):
    with pytest.raises(ValueError, match="share of the samples"):
        drawn(9)[1].clipped(quantile)
    nothing = ImportanceWeights(torch.tensor([-torch.inf] * 9 + [0.0]), torch.zeros(10))
    with pytest.raises(ValueError, match="larger quantile"):
        nothing.clipped(0.5)


def test_equal_weights_are_as_many_as_there_are():
    weights = ImportanceWeights(torch.zeros(7), torch.zeros(7))
    assert float(weights.effective_sample_size) == pytest.approx(7)
    assert float(weights.log_normalizer.standard_error) == 0


def test_one_sample_says_nothing_of_its_error():
    weights = ImportanceWeights(torch.ones(1), torch.zeros(1))
    for estimate in (weights.log_normalizer, weights.mean(torch.full((1,), 3.0))):
        assert estimate.value.isfinite().all()
        assert estimate.standard_error.isnan().all()


@pytest.mark.parametrize(
    ("target", "own", "match"),
    [
        (torch.zeros(3), torch.zeros(4), "shape"),
        (torch.zeros(0), torch.zeros(0), "shape"),
        (torch.zeros(3, 1), torch.zeros(3, 1), "shape"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), "NaN"),
        (torch.zeros(2), torch.tensor([0.0, -torch.inf]), "infinity"),
        (torch.tensor([0.0, torch.inf]), torch.zeros(2), "infinity"),
        (torch.full((2,), -torch.inf), torch.zeros(2), "every sample"),
    ],
)
def test_what_has_no_weight(target, own, match):
    with pytest.raises(ValueError, match=match):
        ImportanceWeights(target, own)


def test_values_of_other_samples():
    with pytest.raises(ValueError, match=r"shape \(3,\), and there are 2 weights"):
        ImportanceWeights(torch.zeros(2), torch.zeros(2)).mean(torch.zeros(3))
