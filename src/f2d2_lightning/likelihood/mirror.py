r"""Likelihood of a model that was trained with mirrored images.

Where half of the training images were mirrored, what was learned is the density of images of which a fair coin decided
whether to mirror them, and that is symmetric: :math:`q(x) = \tfrac12 p(x) + \tfrac12 p(\bar x)` for the images' own
density :math:`p` and the mirror image :math:`\bar x`. A network is so only nearly. :func:`mirrored_log_prob` makes its
density symmetric:

.. math:: \log q(x) = \log \tfrac12 \left(e^{\log p(x)} + e^{\log p(\bar x)}\right).

Mirroring permutes the dimensions and changes no volume, so :math:`q` is a density like :math:`p`, and bits per
dimension of dequantized images bound the code length of 8-bit images as before.

Which to report:

- :math:`\log p(x)` of the images as they are, one evaluation, is what published bits per dimension are of, those of
  models that were trained with flips too. It may be compared with them.
- :math:`\log q(x)` is the density of the model whose samples are mirrored by a coin, at twice the cost. It is never
  below the mean of :math:`\log p(x)` and :math:`\log p(\bar x)` (Jensen's inequality), so that it is not worse over
  images as often mirrored as not; on one image it is above :math:`\log p(x)` where the mirror image is more likely,
  and below it by :math:`\log 2` at most. Say which one it is: the two are different models.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def mirror(x: Tensor) -> Tensor:
    """Images ``(B, ..., W)`` left to right, shape of ``x``."""
    return x.flip(-1)


def mirrored_log_prob(
    log_prob: Callable[[Tensor], Tensor], x: Tensor, transform: Callable[[Tensor], Tensor] = mirror
) -> Tensor:
    """Log-density of a model made symmetric by a fair coin, ``(B,)``, nats.

    Args:
        log_prob: Log-density, ``(B, ...) -> (B,)``, nats; called twice. Conditioning goes in beforehand, as in
            ``lambda x: module.log_prob(x, steps, cond).value``: an image and its mirror image have the same.
        x: States, ``(B, ..., W)``, dequantized if they were discrete.
        transform: The mirror; its own inverse, and of Jacobian determinant 1 or -1.

    Raises:
        ValueError: If ``x`` has no axis to mirror, or ``log_prob`` gives anything but ``(B,)``.

    >>> normal = torch.distributions.Normal(1.0, 1.0)
    >>> x = torch.tensor([[0.0, 3.0]])
    >>> q = mirrored_log_prob(lambda x: normal.log_prob(x[:, 0]), x)
    >>> round(float(q.exp()), 4)  # (N(0; 1, 1) + N(3; 1, 1)) / 2
    0.148
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; states (B, ..., W) with an axis to mirror are expected")
    values = []
    for state in (x, transform(x)):
        value = log_prob(state)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"log_prob gave {came} for states {tuple(x.shape)}; a tensor ({len(x)},) of log-densities is expected "
                "(of a LogProb that is its .value)"
            )
        values.append(value)
    return torch.logaddexp(*values) - math.log(2)
