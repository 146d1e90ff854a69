r"""Distances of two sets of feature vectors, in double precision.

Frechet's distance is that of the Gaussians with the sets' means and covariances,

.. math::
    d^2 = \|m_1 - m_2\|^2 + \operatorname{tr} C_1 + \operatorname{tr} C_2
        - 2 \operatorname{tr} \bigl(C_1 C_2\bigr)^{1/2},

equation 6 of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017,
https://arxiv.org/abs/1706.08500. The last trace is the sum of the singular values of :math:`C_1^{1/2} C_2^{1/2}`: no
root of a matrix without symmetry, and covariances of deficient rank lose no digits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["KernelDistance", "frechet_distance", "kernel_distance", "precision_recall", "symmetric_root"]


def symmetric_root(covariance: Tensor) -> Tensor:
    """Symmetric root of a covariance ``(F, F)``, float64; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def root_distance(mean1: Tensor, root1: Tensor, mean2: Tensor, root2: Tensor) -> float:
    """:func:`frechet_distance` from the symmetric roots of the covariances."""
    shift = (mean1 - mean2).square().sum()
    overlap = torch.linalg.svdvals(root1 @ root2).sum()
    distance = shift + root1.square().sum() + root2.square().sum() - 2 * overlap
    return max(0.0, float(distance))


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Frechet's distance (squared Wasserstein-2) of two Gaussians; the FID, for Inception's features.

    Args:
        mean1: Mean of the first, ``(F,)``.
        covariance1: Covariance of the first, ``(F, F)``.
        mean2: Mean of the second, ``(F,)``.
        covariance2: Covariance of the second, ``(F, F)``.

    Raises:
        ValueError: If the shapes do not fit, or there are NaN or infinity.

    >>> frechet_distance(torch.zeros(1), torch.eye(1), 3 * torch.ones(1), 4 * torch.eye(1))  # 3^2 + (2 - 1)^2
    10.0
    """
    shapes = [tuple(v.shape) for v in (mean1, covariance1, mean2, covariance2)]
    size = mean1.shape[0] if mean1.ndim == 1 else -1
    if shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"means and covariances have shapes {shapes}; (F,), (F, F), (F,), (F, F) are expected")
    if not all(bool(v.isfinite().all()) for v in (mean1, covariance1, mean2, covariance2)):
        raise ValueError("means or covariances hold NaN or infinity; a covariance needs at least 2 samples")
    roots = symmetric_root(covariance1), symmetric_root(covariance2)
    return root_distance(mean1.double(), roots[0], mean2.double(), roots[1])


class KernelDistance(NamedTuple):
    """Kernel distance over subsets."""

    mean: float
    """Mean over subsets: an unbiased estimate, below zero now and then where the sets agree."""
    std: float
    """Standard deviation over subsets."""


def kernel_distance(
    features1: Tensor, features2: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel ``(x.y / F + 1)^3``; the KID, for Inception's features.

    Binkowski et al., "Demystifying MMD GANs", 2018, https://arxiv.org/abs/1801.01401. The unbiased estimate, over
    random subsets; subsets and seed are torch-fidelity's, so that its figures are met.

    Args:
        features1: Features of samples, ``(N, F)``.
        features2: Features of real images, ``(M, F)``.
        subsets: Number of subsets.
        size: Vectors in a subset, of either set; all, where a set has fewer.
        seed: Of the subsets.

    Raises:
        ValueError: If the shapes do not fit or a set has fewer than 2 vectors.
    """
    _check_sets(features1, features2, 2)
    size = min(size, len(features1), len(features2))
    features1, features2 = features1.double(), features2.double()
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (f[torch.from_numpy(random.choice(len(f), size, replace=False))] for f in (features1, features2))
        within = sum((k.sum() - k.diagonal().sum()) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y)))
        values.append(float(within - 2 * _kernel(x, y).mean()))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(samples: Tensor, real: Tensor, neighbors: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Share of samples that lie near real images, and share of real images that lie near samples.

    Near means within the ball around a vector of the other set that reaches that set's ``neighbours``-th nearest
    vector. Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
    https://arxiv.org/abs/1904.06991. Both depend on the sizes of the sets: give as many samples as real images.

    Args:
        samples: Features of samples, ``(N, F)``.
        real: Features of real images, ``(M, F)``.
        neighbours: Which neighbour sets a ball's radius, from 1.
        chunk: Vectors whose distances to all others are held at a time.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: If the shapes do not fit or a set has no more than ``neighbours`` vectors.
    """
    _check_sets(samples, real, neighbors + 1)
    samples, real = samples.double(), real.double()

    def covered(points: Tensor, centers: Tensor) -> float:
        # a vector is its own nearest
        radii = [torch.cdist(part, centers).kthvalue(neighbors + 1).values for part in centers.split(chunk)]
        radius = torch.cat(radii)
        inside = [(torch.cdist(part, centers) <= radius).any(1) for part in points.split(chunk)]
        return float(torch.cat(inside).double().mean())

    return covered(samples, real), covered(real, samples)


def _check_sets(features1: Tensor, features2: Tensor, least: int) -> None:
    shapes = tuple(features1.shape), tuple(features2.shape)
    if not all(len(s) == 2 and s[0] >= least for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"features have shapes {shapes[0]} and {shapes[1]}; (N, F) and (M, F) are expected, at least {least} each"
        )
