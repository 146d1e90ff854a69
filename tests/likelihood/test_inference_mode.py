"""Derivatives in inference mode, in which Lightning tests and predicts: torch drops tangents there without a word."""

from __future__ import annotations

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.flows import Point


@pytest.mark.parametrize(
    "estimator",
    [f2.divergence.Exact(), *(f2.Hutchinson(64, mode=mode) for mode in ("forward", "reverse", "finite"))],
    ids=["exact", "forward", "reverse", "finite"],
)
def test_divergence_in_inference_mode(mixture, estimator):
    field, x = mixture.field, mixture.states(7, 0.6)
    torch.manual_seed(3)
    expected = estimator(field, Point(x, 0.6)).divergence
    with torch.inference_mode():
        torch.manual_seed(3)
        got = estimator(field, Point(x * 1.0, 0.6)).divergence
        torch.manual_seed(3)
        assert torch.allclose(got, estimator(field, Point(x * 1.0, torch.full((7,), 0.6))).divergence)
    assert float(expected.abs().min()) > 0
    assert torch.allclose(got, expected.detach())


def test_reference_in_inference_mode(mixture):
    x = mixture.states(5, 1.0)
    expected = f2.Reference(steps=20, probes=0)(mixture.field, x).value
    with torch.inference_mode():
        assert torch.allclose(f2.Reference(steps=20, probes=0)(mixture.field, x + 0.0).value, expected)
