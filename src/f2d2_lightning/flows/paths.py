r"""Probability paths between noise and data, and the one time convention of this package.

Time runs from ``t = 0`` (noise, :math:`\mathcal N(0, I)`) to ``t = 1`` (data). A path mixes the two,

.. math:: x_t = \sigma(t)\,\epsilon + \alpha(t)\,x_1,

and its conditional velocity is :math:`\dot\sigma(t)\,\epsilon + \dot\alpha(t)\,x_1`. Every other
convention (time downwards, variance exploding, indices) is converted to this one in an adapter.

Besides the coefficients a path gives their *divided differences*, ``(f(t) - f(s)) / (t - s)``, in a form
that has no division: they stay exact as ``t -> s``, which the closed-form Gaussian map needs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from f2d2_lightning.utils.conditions import Cond, some_of
from f2d2_lightning.utils.configured import Configured

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def of_time(method: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Decorates arithmetic on times and constants, a good half of a small network's operations.

    None of them has a tangent where states have one, so the rules for tangents
    (:mod:`f2d2_lightning.divergence._tangents`), which cost as much as an operation, need not be asked. A time that has
    one goes by torch's own rules.
    """

    @functools.wraps(method)
    def plain(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        with contextlib.nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return plain


def expand_time(t: Tensor | float, x: Tensor) -> Tensor:
    """A time, ``()``, ``(B,)`` or a number, as one value per state of ``x``, ``(B,)``, in its dtype and on its device.

    A scalar is expanded without a copy, and :func:`distinct` undoes it: on a likelihood grid all samples share their
    times, and what depends on time alone is then computed once. Other shapes are a ``ValueError``.
    """
    if not isinstance(t, Tensor):
        return x.new_full((1,), float(t)).expand(x.shape[0])
    t = t.to(dtype=x.dtype, device=x.device)
    if t.ndim == 0 or t.shape == (x.shape[0],):
        return t.expand(x.shape[0])
    raise ValueError(
        f"a time has shape {tuple(t.shape)}, but a batch of {x.shape[0]} states needs () or ({x.shape[0]},); "
        "flatten it, or index the time that belongs to each sample"
    )


def distinct(*times: Tensor) -> tuple[Tensor, ...]:
    """Times ``(B,)`` as they are, or each ``(1,)`` where all of them are expanded scalars.

    >>> x = torch.zeros(5, 2)
    >>> [len(t) for t in distinct(expand_time(0.0, x), expand_time(1.0, x))]
    [1, 1]
    """
    if all(t.ndim == 1 and len(t) > 1 and t.stride(0) == 0 for t in times):
        return tuple(t[:1] for t in times)
    return times


def repeat_time(t: Tensor, count: int) -> Tensor:
    """``t.repeat(count)``, without a copy where ``t`` is an expanded scalar."""
    (one,) = distinct(t)
    return one.expand(count * len(t)) if len(one) < len(t) else t.repeat(count)


def like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` of shape ``(B,)`` as ``(B, 1, ..., 1)``, to broadcast against ``x`` of shape ``(B, ...)``."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def even_rows(mask: Tensor) -> tuple[Tensor, int]:
    """Places where a mask ``(B,)`` holds, and how many they are.

    The first place is repeated until they are a multiple of an eighth of the batch: a network that is asked for another
    number of states at every step is planned, or compiled, anew each time.
    """
    rows = mask.nonzero().squeeze(-1)
    count = len(rows)
    missing = -count % max(1, len(mask) // 8)
    return torch.cat((rows, rows[:1].expand(missing))) if count and missing else rows, count


class Point:
    """A batch of states at their times, with what belongs to each.

    Args:
        x: States, ``(B, ...)``.
        t: Times, ``(B,)``, ``()`` or a number.
        cond: Conditioning, first axis ``B``, or ``None``.
        pair: ``(data, noise)`` that the states were made from, each of the shape of ``x``; ``None`` where there is no
            such pair, as on a trajectory.
    """

    def __init__(
        self, x: Tensor, t: Tensor | float, cond: Cond | None = None, pair: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.x, self.t, self.cond, self.pair = x, expand_time(t, x), cond, pair

    def __getitem__(self, rows: Tensor | slice) -> Point:
        """Some of the states, by their places."""
        cond = some_of(self.cond, rows)
        pair = None if self.pair is None else (self.pair[0][rows], self.pair[1][rows])
        return Point(self.x[rows], self.t[rows], cond, pair)


class Path(Configured, ABC):
    """Coefficients of ``x_t = sigma(t) noise + alpha(t) data``."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data at time ``t``; 0 at ``t = 0`` and 1 at ``t = 1``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise at time ``t``; 1 at ``t = 0`` and 0 at ``t = 1``."""

    @abstractmethod
    def alpha_slope(self, s: Tensor, t: Tensor) -> Tensor:
        """``(alpha(t) - alpha(s)) / (t - s)``; the derivative where ``s = t``."""

    @abstractmethod
    def sigma_slope(self, s: Tensor, t: Tensor) -> Tensor:
        """``(sigma(t) - sigma(s)) / (t - s)``; the derivative where ``s = t``."""

    def sample(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """State at time ``t``, shape of ``data``, for the pair ``(data, noise)``; ``t`` is ``(B,)``."""
        return like(self.sigma(t), data) * noise + like(self.alpha(t), data) * data

    def point(self, data: Tensor, noise: Tensor, t: Tensor, cond: Cond | None = None) -> Point:
        """:meth:`sample` with all that belongs to it."""
        return Point(self.sample(data, noise, t), t, cond, (data, noise))

    def conditional_velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``d x_t / dt`` for a fixed pair, shape of ``data``; ``t`` is ``(B,)``."""
        return like(self.sigma_slope(t, t), data) * noise + like(self.alpha_slope(t, t), data) * data


class LinearPath(Path):
    """``x_t = (1 - t) noise + t data``: rectified flow, flow matching, MeanFlow, shortcut models.

    >>> path, t = LinearPath(), torch.tensor([0.25])
    >>> path.sample(torch.tensor([[4.0]]), torch.tensor([[0.0]]), t)
    tensor([[1.]])
    """

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_slope(self, s: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_slope(self, s: Tensor, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


class TrigonometricPath(Path):
    """``x_t = cos(pi t / 2) noise + sin(pi t / 2) data``: keeps the variance of unit-variance data.

    Albergo and Vanden-Eijnden, "Building Normalizing Flows with Stochastic Interpolants", 2022,
    https://arxiv.org/abs/2209.15571
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    # sin a - sin b = 2 cos((a + b) / 2) sin((a - b) / 2), and sinc(x) = sin(pi x) / (pi x)
    def alpha_slope(self, s: Tensor, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 4 * (s + t)) * torch.sinc((t - s) / 4)

    def sigma_slope(self, s: Tensor, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 4 * (s + t)) * torch.sinc((t - s) / 4)
