"""Likelihood metrics: how good the likelihoods are, and how close to the teacher's, per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from f2d2_lightning.likelihood._inputs import Array, as_tensor
from f2d2_lightning.likelihood.quantization import Quantization

MOST_NEGATIVE = 0.01
"""Share of samples below 0 bits that is still chance: one draw of noise within a bin may be likelier than all of it."""
MOST_ASTRAY = 0.5
"""Share of the data's standard deviation that the way to noise and back may miss them by."""


class Agreement(NamedTuple):
    """A few-step likelihood beside its reference, over a data set. All are 0-dimensional."""

    nll: Tensor
    """Mean negative log-likelihood, in the unit asked for."""
    nll_standard_error: Tensor
    """Of ``nll`` over the samples."""
    reference_nll: Tensor
    """The same of the reference."""
    gap: Tensor
    """``nll - reference_nll``."""
    gap_standard_error: Tensor
    """Of ``gap`` over the samples, which are paired."""
    absolute_error: Tensor
    """Mean absolute difference per sample."""
    correlation: Tensor
    """Pearson's, of log p per sample; NaN below two samples, and where all are the same."""
    rank_correlation: Tensor
    """Spearman's, likewise."""
    reference_deviation: Tensor
    """Standard deviation of the reference over the samples; NaN below two."""


def agreement(log_prob: Array, reference: Array, unit: float = 1.0, offset: float = 0.0) -> Agreement:
    """Compare log-likelihoods with a reference, sample by sample.

    Args:
        log_prob: Few-step log-likelihoods, ``(N,)``, nats.
        reference: The reference's on the same points, ``(N,)``, nats.
        unit: Nats per unit of the result: 1, or ``d * log(2)`` for bits per dimension.
        offset: Added to each negative log-likelihood after division (the log-width of quantization bins).

    Raises:
        ValueError: If the shapes differ or there are no samples.
    """
    log_prob, reference = as_tensor(log_prob, "log_prob"), as_tensor(reference, "reference")
    if log_prob.shape != reference.shape or log_prob.ndim != 1 or len(log_prob) == 0:
        raise ValueError(
            f"log_prob has shape {tuple(log_prob.shape)} and reference {tuple(reference.shape)}; both are (N,), N >= 1"
        )
    values, references = -log_prob.double() / unit + offset, -reference.double() / unit + offset
    difference = values - references
    count = len(values)

    def standard_error(x: Tensor) -> Tensor:
        return x.std() / math.sqrt(count) if count > 1 else x.new_tensor(math.nan)

    undefined = values.new_tensor(math.nan)
    correlation = pearson_corrcoef(values, references) if count > 1 else undefined
    # torchmetrics gives NaN a rank, and values that are all the same a correlation of 0
    ranked = undefined if bool(correlation.isnan()) else spearman_corrcoef(values, references)
    return Agreement(
        values.mean(),
        standard_error(values),
        references.mean(),
        difference.mean(),
        standard_error(difference),
        difference.abs().mean(),
        correlation,
        ranked,
        references.std() if count > 1 else undefined,
    )


def doubt(row: Mapping[str, float], quantized: bool, data_deviation: float = math.nan) -> str:
    """Why a likelihood cannot be, or says nothing; empty if nothing is wrong that can be seen.

    Judged are ``nll``, ``negative`` (share of samples with ``nll < 0``), ``gap``, ``reference_nll``,
    ``reference_deviation`` and ``round_trip``, as far as a row has them; with ``quantized`` they are bits per dimension
    of discrete data, whose standard deviation in units of the state is ``data_deviation``.
    """
    reasons = []
    if quantized:
        negative = row.get("negative", 0.0)
        codes = [f"{100 * negative:.3g} % of the samples are below 0 bits/dim"] if negative > MOST_NEGATIVE else []
        for name, whose in (("nll", "it is"), ("reference_nll", "the reference is")):
            codes += [f"{whose} {row[name]:.4g} bits/dim"] if row.get(name, math.nan) < 0 else []
        if codes:
            reasons.append(
                f"{', '.join(codes)}, and discrete data have no code of negative length (check levels, range and "
                "dequantization, of the data and of the model's training)"
            )
    gap, spread = abs(row.get("gap", math.nan)), row.get("reference_deviation", math.nan)
    if gap > spread:
        reasons.append(f"it is {gap:.3g} from the reference, more than samples differ among each other ({spread:.3g})")
    trip = row.get("round_trip", math.nan)
    if trip > MOST_ASTRAY * data_deviation:
        reasons.append(
            f"the way to noise and back misses the data by {trip:.3g}, and their standard deviation is "
            f"{data_deviation:.3g}"
        )
    return "; ".join(reasons)


def said_of_bits(bits: Tensor, name: str, quantization: Quantization | None) -> str | None:
    """What to say of bits per dimension of discrete data, any shape, that are below 0; ``None`` if they are not.

    Those that are not finite are left out. Densities of continuous data, without quantization, have no bound.
    """
    known = bits[bits.isfinite()]
    if quantization is None or len(known) == 0:
        return None
    mean, below = float(known.mean()), int((known < 0).sum())
    if mean >= 0 and below <= MOST_NEGATIVE * len(known):
        return None
    return (
        f"{name} cannot be right: mean {mean:.4f}, {below} of {len(known)} below 0 bits/dim, and no code of discrete "
        f"data is shorter than that; check levels ({quantization.levels}), range ([{quantization.low:g}, "
        f"{quantization.high:g}]) and dequantization, of the data and of the model's training"
    )


def said_of_values(values: Tensor, name: str, inverted: bool = False) -> str | None:
    """What to say of log-likelihoods, nats, that are NaN or infinite; ``None`` if none is.

    Where maps are ``inverted`` NaN is left out: an inversion did not converge, which is said elsewhere.
    """
    wrong = values.isinf() if inverted else ~values.isfinite()
    if not bool(wrong.any()):
        return None
    return (
        f"{name} cannot be right: {int(wrong.sum())} of {values.numel()} are NaN or infinite; check that the data are "
        "in the range of training (levels, range, dequantization), and that the model has not diverged"
    )


def percentile_rank(values: Array, among: Array) -> Tensor:
    """Percentage of ``among`` that lies below each value; what equals it counts half (mid-rank).

    Args:
        values: ``(N,)``; NaN has no rank and stays NaN.
        among: What to compare with, ``(M,)``; NaN is left out.

    Returns:
        float64, ``(N,)``, in [0, 100].

    Raises:
        ValueError: If there is nothing to compare with.

    >>> percentile_rank(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [0.0, 37.5, 100.0]
    """
    values, among = as_tensor(values, "values"), as_tensor(among, "among")
    sorted_ = among[~among.isnan()].double().sort().values
    if values.ndim != 1 or among.ndim != 1 or len(sorted_) == 0:
        raise ValueError(
            f"values have shape {tuple(values.shape)} and what they are compared with {tuple(among.shape)}, of which "
            f"{len(sorted_)} are numbers; both are one-dimensional, and at least one number is needed"
        )
    values = values.double()
    below = torch.searchsorted(sorted_, values, right=False)
    not_above = torch.searchsorted(sorted_, values, right=True)
    rank = 50.0 * (below + not_above).double() / len(sorted_)
    return torch.where(values.isnan(), values, rank)


class LikelihoodMetric(Metric):
    """Gathers log-likelihoods, and answers in bits per dimension or nats.

    Args:
        dim: Number of dimensions of one sample.
        quantization: Of discrete data: results are in bits per dimension; ``None``: in nats.
    """

    full_state_update = False
    higher_is_better: bool | None = None

    def __init__(self, dim: int, quantization: Quantization | None = None) -> None:
        super().__init__()
        self.unit, self.offset = 1.0, 0.0
        if quantization is not None:
            self.unit, self.offset = dim * math.log(2), -math.log2(quantization.width)

    def nll(self, log_prob: Tensor) -> Tensor:
        """Negative log-likelihoods in the metric's unit from log-likelihoods in nats, any shape."""
        return self.offset - log_prob / self.unit


class LikelihoodAgreement(LikelihoodMetric):
    """:func:`agreement` over a data set, gathered across processes; arguments as :class:`LikelihoodMetric`."""

    log_prob: list[Tensor]
    reference: list[Tensor]

    def __init__(self, dim: int, quantization: Quantization | None = None) -> None:
        super().__init__(dim, quantization)
        for name in ("log_prob", "reference"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, log_prob: Tensor, reference: Tensor) -> None:
        """Add a batch, ``(B,)`` each, nats."""
        self.log_prob.append(log_prob.detach())
        self.reference.append(reference.detach())

    def compute(self) -> Agreement:
        """Over everything added."""
        return agreement(*self.gathered(), self.unit, self.offset)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Log-likelihoods and the reference's, ``(N,)`` each, nats: this process's, or all while synchronised."""
        return dim_zero_cat(self.log_prob), dim_zero_cat(self.reference)


class MeanLikelihood(LikelihoodMetric):
    """Mean negative log-likelihood and its standard error, over a data set and all processes, by float64 sums.

    Arguments as :class:`LikelihoodMetric`.
    """

    higher_is_better = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, dim: int, quantization: Quantization | None = None) -> None:
        super().__init__(dim, quantization)
        for name in ("count", "total", "squares"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor) -> None:
        """Add a batch, ``(B,)``, nats."""
        value = self.nll(log_prob.detach().double())
        self.count += len(value)
        self.total += value.sum()
        self.squares += value.square().sum()

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, its standard error (NaN below two samples) and the number of samples; NaN without any."""
        mean = self.total / self.count
        variance = (self.squares - self.count * mean.square()).clamp(min=0) / (self.count - 1)
        error = (variance / self.count).sqrt() if bool(self.count > 1) else torch.full_like(mean, math.nan)
        return mean, error, self.count


class RoundTripError(MeanMetric):
    """Root mean square per dimension of data to noise to data, over a data set and all processes, by float64 sums.

    In units of the state; ``update`` takes the mean squared error per dimension of each sample, ``(B,)``, and
    ``compute`` is NaN if there was none. A map whose way back misses the data has no valid likelihood.
    """

    higher_is_better = False  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)

    def compute(self) -> Tensor:
        return super().compute().sqrt()
