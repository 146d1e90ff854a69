"""How good posteriors are: a classifier against reference samples, and ranks of the true parameters among samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.likelihood._inputs import as_tensor, check_state
from f2d2_lightning.utils.checks import at_least


def c2st(samples: Tensor, reference: Tensor, folds: int = 3) -> float:
    """How often a classifier tells samples from those of a reference, ``(N, ...)`` each: .5 where it cannot, up to 1.

    Boosted trees of scikit-learn's defaults, on samples that they were not trained on. Friedman, "On multivariate
    goodness-of-fit and two-sample testing", 2003; Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", 2017,
    https://arxiv.org/abs/1610.06545

    Args:
        samples: As many as of the reference.
        reference: Samples of what they should be from.
        folds: Parts, each of which is told by a classifier that was trained on the others.

    Raises:
        ValueError: If shapes differ, there are fewer samples than parts, or one is NaN or infinite.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import cross_val_score

    at_least(2, folds=folds)
    samples, reference = _numbers(samples=samples, reference=reference)
    if samples.shape != reference.shape or samples.ndim < 2 or len(samples) < folds:
        raise ValueError(
            f"samples have shape {tuple(samples.shape)}, the reference {tuple(reference.shape)}; as many of one shape "
            f"(N, ...) are needed, or guessing would be right more often than not, and at least folds={folds}"
        )
    x = torch.cat((samples, reference)).flatten(1).cpu()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    classifier = HistGradientBoostingClassifier(random_state=0)
    return float(cross_val_score(classifier, x[order].numpy(), (order < len(samples)).numpy(), cv=folds).mean())


def _numbers(**parts: Tensor) -> list[Tensor]:
    """In double precision; NaN, which trees take for a value and ranks for one above all, is refused."""
    found = {name: as_tensor(part, name).detach().double() for name, part in parts.items()}
    for name, part in found.items():
        check_state(part, name)
    return [*found.values()]


class Calibration(NamedTuple):
    """Ranks of true parameters among samples of their posteriors, beside uniform ones."""

    ranks: Tensor
    """How many of the samples are smaller, ``(N, dim)``."""
    distance: Tensor
    """Largest difference of the cumulated shares of ranks from uniform ones, ``(dim,)``."""
    band: float
    """What all parameters' distances stay below with a probability of .95, where posteriors are right."""

    @property
    def within(self) -> bool:
        """Whether no parameter's ranks are further from uniform than chance makes them."""
        return bool((self.distance <= self.band).all())


def calibration(samples: Tensor, truth: Tensor) -> Calibration:
    """Simulation-based calibration: are true parameters anywhere among samples of their posterior, equally often?

    Talts et al., "Validating Bayesian Inference Algorithms with Simulation-Based Calibration", 2018,
    https://arxiv.org/abs/1804.06788

    Args:
        samples: Of the posterior of each pair, ``(N, L, dim)``.
        truth: Parameters that the pair was simulated with, ``(N, dim)``, drawn from the prior.

    Raises:
        ValueError: If shapes do not fit, or something is NaN or infinite.

    >>> calibration(torch.tensor([[[0.0], [2.0]], [[1.0], [3.0]]]), torch.tensor([[1.0], [4.0]])).ranks
    tensor([[1],
            [2]])
    """
    samples, truth = _numbers(samples=samples, truth=truth)
    if samples.ndim != 3 or samples[:, 0].shape != truth.shape:
        raise ValueError(
            f"samples have shape {tuple(samples.shape)}, true parameters {tuple(truth.shape)}; (N, L, dim) and "
            "(N, dim) are needed"
        )
    ranks = (samples < truth[:, None]).sum(1)
    count, possible = len(ranks), samples.shape[1] + 1
    below = torch.nn.functional.one_hot(ranks, possible).double().mean(0).cumsum(-1)
    uniform = torch.arange(1, possible + 1, device=below.device) / possible
    # the tails of Kolmogorov's distribution, for the parameters together
    band = math.sqrt(math.log(2 * truth.shape[1] / 0.05) / (2 * count))
    return Calibration(ranks, (below - uniform).abs().amax(-1), band)
