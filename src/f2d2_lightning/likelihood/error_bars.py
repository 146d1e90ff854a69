r"""How far a few-step log-likelihood may be off, sample by sample, where nobody can be asked any more.

Two answers of the model itself stand in for the teacher's: its log-likelihood in twice as many steps, and where the way
to noise and back ends. Where the one moves and the other misses more than they usually do, the log-likelihood is less
sure. What is usual, and how far off the answers then are, is learned from validation points whose reference is known:

.. math::
    e(x) = w \sqrt{1 + \frac{(\log p_{2K}(x) - \log p_K(x))^2}{a^2} + \frac{|x' - x|^2}{b^2}},

with root mean squares :math:`a, b` over those points and :math:`w` such that :math:`e` covers a given share of their
errors (split conformal prediction, Lei et al., 2018, https://arxiv.org/abs/1604.04173): for points like them, the
reference lies within :math:`e` with at least that probability. Of points unlike any of them nothing is promised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.utils.checks import at_least, positive

FEWEST = 16
"""Points that error bars are calibrated on at least."""


@dataclass(frozen=True)
class Disagreement:
    """Of a model with itself, about each of ``B`` samples."""

    finer: Tensor
    """Log-likelihood in twice as many steps above that in K, ``(B,)``, nats."""
    round_trip: Tensor
    """Root mean square per dimension of data to noise and back in K steps, ``(B,)``."""


@dataclass(frozen=True)
class ErrorBars:
    """Half widths of intervals about the log-likelihoods in one number of steps."""

    width: float
    """Of samples about which the model agrees with itself, nats."""
    finer: float
    """Usual size of :attr:`Disagreement.finer`, nats."""
    round_trip: float
    """Usual size of :attr:`Disagreement.round_trip`."""
    coverage: float
    """Probability with which the reference lies within."""
    count: int
    """Points that they were calibrated on."""

    def __post_init__(self) -> None:
        at_least(FEWEST, count=self.count)
        positive(width=self.width, finer=self.finer, round_trip=self.round_trip)
        _check_coverage(self.coverage, self.count)

    @classmethod
    def calibrated(cls, disagreement: Disagreement, error: Tensor, coverage: float = 0.9) -> ErrorBars:
        """Error bars that cover a share of known errors, below 1, about ``N`` points that were not trained on.

        ``error`` are their log-likelihoods minus the reference's, ``(N,)``, nats, of which those that are not finite
        are left out. Too few points for the share are a ``ValueError``.
        """
        error = error.detach().cpu().double().abs()
        finer, round_trip = (part.detach().cpu().double() for part in (disagreement.finer, disagreement.round_trip))
        good = error.isfinite() & finer.isfinite() & round_trip.isfinite()
        count = int(good.sum())
        if count < FEWEST:
            raise ValueError(
                f"error bars are calibrated on {count} points with finite log-likelihoods; {FEWEST} are needed at least"
            )
        _check_coverage(coverage, count)
        tiny = torch.finfo(torch.float32).tiny  # of a model that agrees with itself to the last digit
        usual = {
            name: max(float(part[good].square().mean().sqrt()), tiny)
            for name, part in (("finer", finer), ("round_trip", round_trip))
        }
        unit = cls(1.0, **usual, coverage=coverage, count=count)
        scores = (error / unit(Disagreement(finer, round_trip)))[good].sort().values
        return cls(max(float(scores[_rank(coverage, count) - 1]), tiny), **usual, coverage=coverage, count=count)

    def __call__(self, disagreement: Disagreement) -> Tensor:
        """Half widths, ``(B,)``, nats."""
        finer, round_trip = disagreement.finer / self.finer, disagreement.round_trip / self.round_trip
        return self.width * (1 + finer.square() + round_trip.square()).sqrt()

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> ErrorBars:
        """From plain values by name, as :func:`dataclasses.asdict` gives them; others are a ``ValueError``."""
        try:
            width, finer, round_trip, coverage = (float(kept[f.name]) for f in fields(cls)[:-1])
            return cls(width, finer, round_trip, coverage, int(kept["count"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"error bars in a file are {kept!r}, which they cannot be: {error}") from error


def kept_bars(bars: Mapping[int, ErrorBars]) -> dict[str, dict[str, Any]]:
    """Error bars by step count as plain values, for a file."""
    return {str(steps): asdict(bar) for steps, bar in bars.items()}


def read_bars(kept: Any) -> dict[int, ErrorBars]:
    """Inverse of :func:`kept_bars`; none of a file that has none, and a ``ValueError`` for other values."""
    if kept is None:
        return {}
    if not isinstance(kept, Mapping) or not all(str(steps).isdecimal() for steps in kept):
        raise ValueError(f"error bars in a file are {kept!r:.80}; values by step count are expected")
    return {int(steps): ErrorBars.from_dict(bar) for steps, bar in kept.items()}


def enough(count: int, coverage: float) -> bool:
    """Whether so many points are enough to calibrate error bars on."""
    return count >= FEWEST and _rank(coverage, count) <= count


def _rank(coverage: float, count: int) -> int:
    """Which of so many scores, from the smallest, bounds the next one with that probability."""
    return math.ceil((count + 1) * coverage)


def _check_coverage(coverage: float, count: int) -> None:
    if not 0 < coverage < 1 or _rank(coverage, count) > count:
        raise ValueError(
            f"coverage={coverage} of {count} points; it lies above 0, and at most at {count / (count + 1):.3f}: no "
            "larger share can be told from so few"
        )
