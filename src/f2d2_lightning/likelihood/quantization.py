r"""Discrete data as continuous states and back, and bits per dimension.

Data with ``levels`` integer values ``k = 0, ..., levels - 1`` become states by uniform dequantization,
``x = low + (k + U) * width`` with ``width = (high - low) / levels`` and ``U`` uniform on [0, 1). Then

.. math::
    -\log_2 P(k) \le E_U\!\left[-\log_2 p(x)\right] - d \log_2 \mathrm{width},

so bits per dimension from one draw of ``U`` estimate an upper bound of the discrete code length (Theis, van den Oord
and Bethge, "A note on the evaluation of generative models", 2015, https://arxiv.org/abs/1511.01844). From ``D`` draws,
both of these bound :math:`\log P(k) - d \log \mathrm{width}` from below in expectation:

.. math::
    \frac 1 D \sum_j \log p(x_j) \;\le\; \log \frac 1 D \sum_j p(x_j) .

The left one estimates the same number whatever ``D``; the right one rises towards the truth with ``D`` (Burda, Grosse
and Salakhutdinov, "Importance Weighted Autoencoders", 2015, https://arxiv.org/abs/1509.00519).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.utils.checks import at_least, check_fields, checked
from f2d2_lightning.utils.seeding import counter_uniform, mix_seed

MOST_ALIKE = 0.05
"""Share of continuous values that may be one and the same number."""


@dataclass(frozen=True)
class Quantization:
    """Levels and range of discrete data.

    Args:
        levels: Number of integer values: 256 for 8-bit images, 17 for scikit-learn's digits.
        low: Lower edge of the lowest level's bin.
        high: Upper edge of the highest level's bin.

    Raises:
        ValueError: If there are fewer than two levels or the range is empty.

    >>> Quantization(256).width
    0.0078125
    """

    levels: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.levels < 2 or not self.high > self.low:
            raise ValueError(
                f"levels={self.levels} on [{self.low}, {self.high}]; at least two levels and low < high are needed"
            )

    @property
    def width(self) -> float:
        """Width of one level's bin, in units of the state."""
        return (self.high - self.low) / self.levels

    @checked
    def check(self, k: Tensor) -> None:
        """Refuse integers that are not ``0, ..., levels - 1``, or that use only a fraction of them.

        Raises:
            ValueError: Says the values that came and the levels expected.
        """
        if torch.is_floating_point(k) or k.is_complex():
            raise ValueError(f"quantized data have dtype {k.dtype}; integers 0 to {self.levels - 1} are expected")
        if k.numel() == 0:
            raise ValueError(f"quantized data have shape {tuple(k.shape)}, and so none; give at least one sample")
        low, high = extremes(k)
        if low < 0 or high >= self.levels:
            raise ValueError(
                f"the data hold the values {low} to {high}, but levels={self.levels} means 0 to {self.levels - 1}; "
                f"set levels to at least {high + 1}, or rescale the data"
            )

    def check_range_of(self, k: Tensor) -> None:
        """As :meth:`check` for a whole data set, which should reach the highest level.

        Raises:
            ValueError: If the data use less than half of the levels: bits per dimension would be meaningless.
        """
        self.check(k)
        if (high := extremes(k)[1]) < self.levels // 2:
            raise ValueError(
                f"the data set holds values up to {high} only, but levels={self.levels}; bits per dimension would "
                f"count levels that the data do not have: set levels={high + 1}"
            )

    @checked
    def check_states(self, x: Tensor) -> None:
        """Refuse states that are not dequantized data of these levels on this range.

        A model's own samples, which lie a little outside of the range, are fine.

        Args:
            x: Some states, ``(B, ...)``; a few hundred values tell most.

        Raises:
            ValueError: If more than a twentieth of the values lie far outside of the range, if they fill another
                range, or if they are discrete. Says what came and the remedy.
        """
        values = x.detach().reshape(-1).double()
        low, high, span = self.low, self.high, self.high - self.low
        smallest, largest = float(values.min()), float(values.max())
        remedy = (
            f"give states low + (k + U) * (high - low) / levels of integers k: {self!r}.dequantize(k), or say the "
            "range that your data have: low=, high="
        )
        outside = ((values < low - 0.1 * span) | (values > high + 0.1 * span)).double().mean()
        if float(outside) > 0.05:
            raise ValueError(
                f"states lie in [{smallest:.4g}, {largest:.4g}], {100 * float(outside):.0f} % of the values outside of "
                f"[{low:g}, {high:g}], which {self.levels} levels fill here; {remedy}"
            )
        # a few pictures may be bright, or of little contrast
        if len(x) >= 16 and len(values) >= 256 and (other := self._other_range(smallest, largest)):
            raise ValueError(
                f"states lie in [{smallest:.4g}, {largest:.4g}] and so seem to fill [{other[0]:g}, {other[1]:g}], but "
                f"{self.levels} levels fill [{low:g}, {high:g}] here; {remedy}"
            )
        place = (values - low) / span
        # in units of a level, how far from bin centres, from lower edges, and from a grid that reaches both ends
        apart = (place * self.levels - 0.5, place * self.levels, place * (self.levels - 1))
        # what single precision leaves of a level's width
        near = max(1e-3, 8 * 1.2e-7 * self.levels * max(abs(low), abs(high), 1.0) / span)
        # so many values that chance does not put all of them on a grid
        enough = math.ceil(9 / -math.log10(2 * near)) if near < 0.25 else math.inf
        grid = len(values) >= enough and any(bool(((a - a.round()).abs() < near).all()) for a in apart)
        some = values[: 2**14]
        # dequantized, a level that is hit often has many values, if only as many as floats can tell apart
        different, hit = len(some.unique()), len(self.quantize(some).unique())
        if grid or (len(some) >= 4 * hit and different <= 2 * hit):
            raise ValueError(
                f"states were never dequantized: {len(some)} values are {different} different ones, on a grid. A "
                f"density at single points is no likelihood of discrete data; {remedy}"
            )
        _, counts = some.unique(return_counts=True)
        if len(some) >= 256 and float(counts.max()) > MOST_ALIKE * len(some):
            warnings.warn(
                f"{100 * float(counts.max()) / len(some):.0f} % of the values of the states are one and the same "
                "number, as of a margin or a channel that was added after dequantization: a density at single points "
                "has no bound, and no likelihood of such data means anything",
                stacklevel=2,
            )

    def _other_range(self, smallest: float, largest: float) -> tuple[float, float] | None:
        """A usual range, other than this one, that values from ``smallest`` to ``largest`` fill."""
        span = self.high - self.low
        for low, high in ((0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5), (0.0, 255.0), (0.0, self.levels - 1.0)):
            mine = abs(low - self.low) < 0.1 * span and abs(high - self.high) < 0.1 * span
            near = 0.03 * (high - low)
            if not mine and abs(smallest - low) < near and abs(largest - high) < near:
                return low, high
        return None

    @checked
    def dequantize(self, k: Tensor, uniform: Tensor | None = None) -> Tensor:
        """States ``low + (k + U) * width`` in the default floating type, shape of ``k``.

        Args:
            k: Integers, any shape.
            uniform: ``U`` in [0, 1), shape of ``k``; drawn if not given.
        """
        self.check(k)
        uniform = torch.rand(k.shape, device=k.device) if uniform is None else uniform
        if uniform.shape != k.shape or not uniform.is_floating_point():
            raise ValueError(
                f"uniform has dtype {uniform.dtype} and shape {tuple(uniform.shape)}; floating numbers in [0, 1) are "
                f"expected, in the integers' shape {tuple(k.shape)}"
            )
        x = self.low + (k + uniform) * self.width
        # rounding can lift k + U to the next level; the bins are half open
        edge = (self.low + (k.double() + 1) * self.width).to(x.dtype)
        inside = (self.low + (k.double() + 1 - 2.0**-14) * self.width).to(x.dtype)
        return torch.minimum(x, torch.minimum(inside, torch.nextafter(edge, torch.full_like(edge, self.low))))

    def draws(self, k: Tensor, count: int, seed: int) -> Iterator[Tensor]:
        """States of integers ``(B, ...)`` with noise that is a function of seed, draw and place; so often."""
        self.check(k)
        places = torch.arange(k[0].numel(), device=k.device)
        for draw in range(count):
            parts = []
            # hashes take many times the memory of the integers
            for rows in torch.arange(len(k), device=k.device).split(256):
                counters = rows[:, None] * len(places) + places
                uniform = counter_uniform(counters, mix_seed(seed, draw)).reshape(k[rows].shape)
                parts.append(self.dequantize(k[rows].long(), uniform))
            yield torch.cat(parts)

    @checked
    def quantize(self, x: Tensor) -> Tensor:
        """Level that a state lies in, clipped to the range, ``int64``, shape of ``x``."""
        return ((x.double() - self.low) / self.width).floor().clamp(0, self.levels - 1).long()


def extremes(k: Tensor) -> tuple[int, int]:
    """Lowest and highest of integers, of any type: torch knows those of 16 unsigned bits, but not their order."""
    low, high = torch.aminmax(k if k.element_size() == 1 else k.long())
    return int(low), int(high)


def _known(levels: Quantization | int | None, low: float, high: float) -> Quantization | None:
    return levels if levels is None or isinstance(levels, Quantization) else Quantization(levels, low, high)


@checked
def bits_per_dim(
    log_prob: Tensor, dim: int, levels: Quantization | int | None = None, low: float = -1.0, high: float = 1.0
) -> Tensor:
    """Bits per dimension from log-densities.

    With ``levels`` this is an upper bound on the code length of discrete data (uniform dequantization, see
    :mod:`f2d2_lightning.likelihood.quantization`); without, the differential figure, which depends on the unit of the
    state.

    Args:
        log_prob: Log-density of dequantized states, any shape, nats.
        dim: Number of dimensions of one state.
        levels: The discrete data's quantization, or the number of their levels on ``[low, high]``; ``None`` for
            continuous data.
        low: Lower edge of the range that the levels fill, where it is not said.
        high: Upper edge.

    Returns:
        Bits per dimension, shape of ``log_prob``.

    Raises:
        ValueError: If ``dim < 1`` or the levels are unfit.

    >>> bits_per_dim(torch.tensor([0.0]), dim=1, levels=256)  # uniform density on [0, 1): half of the 2^8 bins
    tensor([7.])
    """
    at_least(1, dim=dim)
    quantization = _known(levels, low, high)
    nats = log_prob if quantization is None else log_prob + dim * math.log(quantization.width)
    return -nats / (dim * math.log(2))


class DequantizationBounds(NamedTuple):
    """Per sample, ``(N,)`` each, nats."""

    mean: Tensor
    """Mean log-density over draws: the usual bound, less noisy."""
    deviation: Tensor
    """Standard deviation of the log-density over draws; NaN for a single draw."""
    importance_weighted: Tensor
    """Logarithm of the mean density over draws: the tighter bound."""


@checked
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


@checked
def state_images(x: Tensor, levels: Quantization | int | None = None, low: float = -1.0, high: float = 1.0) -> Tensor:
    """States as 8-bit images, the form in which feature networks see real data and samples alike.

    ``low`` becomes 0 and ``high`` 255, what lies outside is clipped.

    With ``levels`` states are brought to the level whose bin they lie in first, as the data were before they were
    dequantized, and the levels 0 to ``levels - 1`` are spread over 0 to 255: dequantized data become the images that
    they were made from, and samples get the same levels as the data.

    Args:
        x: States, floating ``(B, C, H, W)``.
        levels: The discrete data's quantization, or the number of their levels; ``None`` for continuous data.
        low: Lower edge of the range, where it is not said.
        high: Upper edge.

    Returns:
        ``uint8``, ``(B, C, H, W)``.

    Raises:
        ValueError: If the states are no images, are not finite, or the range is empty.

    >>> state_images(torch.tensor([[[[-1.0, 0.0, 0.999, 3.0]]]]), levels=2)
    tensor([[[[  0, 255, 255, 255]]]], dtype=torch.uint8)
    """
    if not torch.is_floating_point(x) or x.ndim != 4:
        raise ValueError(
            f"states have dtype {x.dtype} and shape {tuple(x.shape)}; images are floating (B, C, H, W). Sample quality "
            "is of images; for other data compare likelihoods"
        )
    if not high > low:
        raise ValueError(f"the range is [{low}, {high}]; low < high is needed")
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise ValueError(f"{bad} of {len(x)} states hold NaN or infinity and are no images")
    quantization = _known(levels, low, high)
    if quantization is None:
        share = (x.double() - low) / (high - low)
    else:
        share = quantization.quantize(x).double() / (quantization.levels - 1)
    return (255 * share).round().clamp(0, 255).to(torch.uint8)
