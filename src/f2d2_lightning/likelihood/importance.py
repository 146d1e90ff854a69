r"""Importance weights: samples of a model whose density is known, as samples of another density.

Of samples :math:`x_i \sim q` and a density :math:`\tilde p = Z p` that is known up to its constant, the weights
:math:`w_i = \tilde p(x_i) / q(x_i)` give

.. math::
    Z \approx \frac1N \sum_i w_i, \qquad \mathbb E_p[f] \approx \frac{\sum_i w_i f(x_i)}{\sum_i w_i}.

``q`` is the density that the samples were drawn with: ``sample(..., with_log_prob=True, determinant="exact")``. A wrong
one biases both, and the effective sample size does not show it. (Owen, "Monte Carlo theory, methods and examples",
2013, chapter 9, https://artowen.su.domains/mc/Ch-var-is.pdf.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.likelihood._answers import Answer
from f2d2_lightning.likelihood._inputs import as_tensor
from f2d2_lightning.utils.checks import check_fields


class Estimate(NamedTuple):
    """An estimate and its standard error over samples, each ``(...)``, float64."""

    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True, repr=False)
class ImportanceWeights(Answer):
    """Weights of samples.

    >>> weights = ImportanceWeights(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))
    >>> float(weights.effective_sample_size)
    2.0

    Args:
        log_target: ``log`` of the density that is wanted, up to a constant, ``(N,)``, nats; ``-inf`` where it is zero.
        log_prob: The samples' own log-density, ``(N,)``, nats.

    Raises:
        ValueError: If the shapes differ or are no ``(N,)``, a value is NaN or infinite (but for targets of zero), or
            the target is zero everywhere.
    """

    log_target: Tensor
    log_prob: Tensor

    def __post_init__(self) -> None:
        check_fields(self)
        target, own = self.log_target, self.log_prob
        if target.shape != own.shape or target.ndim != 1 or len(target) == 0:
            raise ValueError(
                f"log_target has shape {tuple(target.shape)} and log_prob {tuple(own.shape)}; both are (N,), N >= 1"
            )
        if not bool((own.isfinite() & (target.isfinite() | (target == -torch.inf))).all()):
            raise ValueError("log_target or log_prob holds NaN or infinity; leave out samples without a likelihood")
        if not bool(target.isfinite().any()):
            raise ValueError("log_target is -inf for every sample: none of them has a weight")

    @property
    def log_weights(self) -> Tensor:
        """``log w``, ``(N,)``, float64."""
        return self.log_target.double() - self.log_prob.double()

    @property
    def normalized(self) -> Tensor:
        """Weights that add to 1, ``(N,)``, float64."""
        return self.log_weights.softmax(0)

    @property
    def effective_sample_size(self) -> Tensor:
        """Kish's, ``(sum w)^2 / sum w^2``, between 1 and ``N``."""
        return 1 / self.normalized.square().sum()

    @property
    def log_normalizer(self) -> Estimate:
        """``log Z``, nats; its standard error is that of ``Z`` as a share, to first order, NaN of one sample."""
        count = len(self.log_weights)
        value = self.log_weights.logsumexp(0) - math.log(count)
        share = (count / self.effective_sample_size - 1).clamp(min=0) / (count - 1)
        return Estimate(value, share.sqrt())

    def clipped(self, quantile: float = 0.999) -> ImportanceWeights:
        """The same samples, with weights above a quantile of them brought down to it.

        Fewer samples decide, at a bias: ``log Z`` only falls, by as much as the clipped one is lower than the other,
        and means lean to what has much of ``q``. (Ionides, "Truncated importance sampling", 2008,
        https://doi.org/10.1198/106186008X320456.)

        Args:
            quantile: Share of the samples whose weights stay as they are, in (0, 1].

        Raises:
            ValueError: If it is out of range.

        >>> weights = ImportanceWeights(torch.tensor([0.0, 0.0, 0.0, 9.0]), torch.zeros(4))
        >>> float(weights.clipped(0.75).effective_sample_size)
        4.0
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile={quantile}; it is a share of the samples, in (0, 1]")
        ordered = self.log_weights.sort().values
        most = ordered[max(1, round(quantile * len(ordered))) - 1]
        if most == -torch.inf:
            raise ValueError(
                f"quantile={quantile} of the weights are zero, and clipping would leave none; take a larger quantile"
            )
        return ImportanceWeights(self.log_weights.clamp(max=most) + self.log_prob.double(), self.log_prob)

    def mean(self, values: Tensor) -> Estimate:
        """Mean under the target of something that each sample has.

        Args:
            values: ``(N, ...)``, complex ones too; those of samples without weight may be NaN or infinite.

        Returns:
            Estimates ``(...)``; standard errors by the delta method, NaN of one sample.

        Raises:
            ValueError: If there are not ``N`` of them.
        """
        values = as_tensor(values, "values")
        if not values.ndim or len(values) != len(self.log_prob):
            raise ValueError(f"values have shape {tuple(values.shape)}, and there are {len(self.log_prob)} weights")
        weights = self.normalized.reshape(-1, *(1 for _ in values.shape[1:]))
        values = values.to(torch.complex128 if values.is_complex() else torch.float64)
        # an energy may be infinite where its density is zero
        values = torch.where(weights > 0, values, torch.zeros_like(values))
        mean = (weights * values).sum(0)
        variance = (weights * (values - mean)).abs().square().sum(0)
        return Estimate(mean, variance.sqrt() if len(values) > 1 else torch.full_like(variance, torch.nan))
