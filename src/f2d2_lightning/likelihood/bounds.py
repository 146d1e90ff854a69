r"""Bounds on the log-likelihood of discrete data from several dequantization draws.

A level ``k`` has the probability of its bin, ``P(k) = width^d E_U[p(x_U)]`` with ``U`` uniform
(:mod:`f2d2_lightning.likelihood.quantization`). From ``D`` draws, both bound ``log P(k) - d log width`` from below in
expectation:

.. math::
    \frac 1 D \sum_j \log p(x_j) \;\le\; \log \frac 1 D \sum_j p(x_j) .

The left one estimates the same number whatever ``D``; the right one rises towards the truth with ``D`` (Burda, Grosse
and Salakhutdinov, "Importance Weighted Autoencoders", 2015, https://arxiv.org/abs/1509.00519).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DequantizationBounds", "dequantization_bounds"]


class DequantizationBounds(NamedTuple):
    """Per sample, ``(N,)`` each, nats."""

    mean: Tensor
    """Mean log-density over draws: the usual bound, less noisy."""
    deviation: Tensor
    """Standard deviation of the log-density over draws; NaN for a single draw."""
    importance_weighted: Tensor
    """Logarithm of the mean density over draws: the tighter bound."""


def dequantization_bounds(log_prob: Tensor) -> DequantizationBounds:
    """Bounds from log-densities of the same samples, dequantized several times.

    Args:
        log_prob: ``(D, N)``: draw by sample, nats.

    Raises:
        ValueError: If there is no draw.

    >>> bounds = dequantization_bounds(torch.tensor([[0.0], [math.log(3.0)]]))
    >>> bounds.mean, bounds.importance_weighted  # (log 1 + log 3) / 2, log((1 + 3) / 2)
    (tensor([0.5493]), tensor([0.6931]))
    """
    if log_prob.ndim != 2 or len(log_prob) < 1:
        raise ValueError(f"log_prob has shape {tuple(log_prob.shape)}; it is (draws, samples), at least one draw")
    draws = len(log_prob)
    deviation = log_prob.std(0) if draws > 1 else torch.full_like(log_prob[0], math.nan)
    return DequantizationBounds(log_prob.mean(0), deviation, log_prob.logsumexp(0) - math.log(draws))
