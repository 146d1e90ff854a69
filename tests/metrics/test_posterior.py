"""Figures of posteriors against what is known: errors of the best classifier, and ranks of a closed-form posterior."""

import math

import pytest
import torch

from f2d2_lightning.metrics import c2st, calibration
from problems import LinearGaussian


@pytest.mark.parametrize(("shift", "tolerance"), [(0.0, 0.02), (1.0, 0.02), (3.0, 0.02)])
def test_the_classifier_is_right_as_often_as_the_best_one(shift, tolerance):
    reference, samples = torch.randn(4000, 2), torch.randn(4000, 2)
    samples[:, 1] += shift
    # of two Gaussians of unit variance the best boundary lies half way
    best = 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))
    assert abs(c2st(samples, reference) - best) < tolerance
    assert c2st(samples, reference) == c2st(samples, reference)


def test_other_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"samples have shape \(3, 2\), the reference \(4, 2\)"):
        c2st(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"true parameters \(3, 1\); \(N, L, dim\) and \(N, dim\)"):
        calibration(torch.zeros(3, 5, 2), torch.zeros(3, 1))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_samples_that_are_no_numbers_are_refused(wrong):
    """A tree takes NaN for a value, and nothing is below NaN."""
    samples, truth = torch.randn(40, 9, 2), torch.randn(40, 2)
    samples[3, 4, 0] = wrong
    for ask in (lambda: calibration(samples, truth), lambda: c2st(samples[:, 4], truth)):
        with pytest.raises(ValueError, match="samples holds NaN or infinity in 1 of 40 samples"):
            ask()
    with pytest.raises(ValueError, match="reference holds NaN or infinity in 1 of 40"):
        c2st(truth, samples[:, 4])
    with pytest.raises(ValueError, match=r"samples has shape \(40, 0, 2\)"):
        calibration(samples[:, :0], truth)
    with pytest.raises(ValueError, match="at least folds=3"):
        c2st(truth[:2], truth[:2])
    with pytest.raises(ValueError, match="folds=1; it must be at least 2"):
        c2st(truth, truth, folds=1)


def test_samples_with_gradients_and_arrays_are_numbers_too():
    samples, truth = torch.randn(60, 9, 2), torch.randn(60, 2)
    told, found = c2st(samples[:, 0], truth), calibration(samples, truth)
    assert c2st(samples[:, 0].clone().requires_grad_(), truth.numpy()) == told
    assert torch.equal(calibration(samples.numpy(), truth.numpy()).ranks, found.ranks)
    assert 0 <= c2st(samples[:, 0].bfloat16(), truth.bfloat16()) <= 1


@pytest.mark.parametrize(
    ("change", "within"),
    [
        (lambda samples, mean: samples, True),
        (lambda samples, mean: mean + 0.7 * (samples - mean), False),
        (lambda samples, mean: mean + 1.4 * (samples - mean), False),
        (lambda samples, mean: samples + 0.05, False),
    ],
    ids=["right", "too narrow", "too wide", "moved"],
)
def test_ranks_tell_a_right_posterior_from_wrong_ones(change, within):
    problem = LinearGaussian()
    theta, x = problem.draw(3000)
    posterior = problem.posterior(x)
    samples = change(posterior.sample((50,)).transpose(0, 1), posterior.mean[:, None])
    found = calibration(samples, theta)
    assert found.within is within
    assert found.ranks.shape == (3000, 2)
    # both ends are ranks
    assert int(found.ranks.min()) == 0
    assert int(found.ranks.max()) == 50


def test_the_band_holds_for_few_pairs_and_many_parameters():
    outside = [not calibration(torch.randn(100, 200, 8), torch.randn(100, 8)).within for _ in range(200)]
    assert 0.005 < sum(outside) / 200 < 0.09
