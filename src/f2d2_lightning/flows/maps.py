r"""The contract of a few-step model: average velocity ``u``, average divergence ``D``, and directions.

A flow map takes a state ``x`` at time ``s`` to time ``t``, in either order of ``s`` and ``t``
(``t = 0`` is noise, ``t = 1`` is data):

.. math::
    X_{s \to t}(x) = x + (t - s)\,u(x, s, t), \qquad
    \log p_t(X) = \log p_s(x) - (t - s)\,D(x, s, t).

On the diagonal ``u(x, t, t)`` is the instantaneous velocity and ``D(x, t, t)`` its divergence.
Boffi, Albergo and Vanden-Eijnden, "How to build a consistency model", 2025,
https://arxiv.org/abs/2505.18825; the pair: Ai et al., "Joint Distillation for Fast Likelihood Evaluation
and Sampling in Flow-based Models", 2025, https://arxiv.org/abs/2512.02636.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.paths import expand_time, like
from f2d2_lightning.utils.checks import checked, one_of
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.configured import Configured

Velocity = Callable[..., Tensor]
"""Instantaneous velocity, ``(x, t, cond) -> v``, shapes ``(B, ...), (B,), any -> (B, ...)``."""


class Direction(enum.Flag):
    """Orders of ``(s, t)`` that a map was trained for.

    >>> Direction.parse("both") is Direction.BOTH
    True
    """

    TO_DATA = enum.auto()
    """``s <= t``: noise to data, what sampling needs."""
    TO_NOISE = enum.auto()
    """``s >= t``: data to noise, what the likelihood of data needs."""
    BOTH = TO_DATA | TO_NOISE
    NONE = 0
    """No jumps at all: an instantaneous velocity, which can be integrated or distilled."""

    @classmethod
    def parse(cls, direction: Direction | str) -> Direction:
        """A direction by name (``"to_data"``, ``"to_noise"``, ``"both"``, ``"none"``), or unchanged."""
        if isinstance(direction, Direction):
            return direction
        names = {"to_data": cls.TO_DATA, "to_noise": cls.TO_NOISE, "both": cls.BOTH, "none": cls.NONE}
        one_of("direction", direction, names)
        return names[direction]

    @property
    def label(self) -> str:
        """The name that :meth:`parse` takes."""
        return str(self.name).lower()


class Joint(NamedTuple):
    """What a joint flow map answers."""

    velocity: Tensor
    """``u``: average velocity from ``s`` to ``t``, shape of ``x``."""
    divergence: Tensor
    """``D``: average divergence from ``s`` to ``t``, ``(B,)``, nats per unit of time."""


class Jump(NamedTuple):
    """Where a jump lands, and what it does to the log-density."""

    state: Tensor
    """State at time ``t``, shape of ``x``."""
    log_prob_change: Tensor
    """``log p_t(state) - log p_s(x)``, ``(B,)``, nats."""


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor is inside of a transform of ``torch.func``: it then has no values, and may have a tangent."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # the one question that torch answers to nobody else


def _known_bounds(t: Tensor | float) -> tuple[float, float] | None:
    # Looking at values on a GPU waits for it, and a traced or transformed tensor has none to look at.
    if not isinstance(t, Tensor):
        return float(t), float(t)
    if t.device.type != "cpu" or t.numel() == 0 or torch.compiler.is_compiling() or is_transformed(t):
        return None
    t = t.detach()
    return float(t.min()), float(t.max())


def check_interval(s: Tensor | float, t: Tensor | float, directions: Direction, *, what: str = "this map") -> None:
    """Refuse, with a ``ValueError``, times outside [0, 1] and orders of time that a map was not trained for.

    Values are read only where that is free: numbers and CPU tensors outside compiled code.
    """
    bounds_s, bounds_t = _known_bounds(s), _known_bounds(t)
    for name, bounds in (("s", bounds_s), ("t", bounds_t)):
        # written so that NaN fails as well
        if bounds is not None and not (bounds[0] >= 0.0 and bounds[1] <= 1.0):
            raise ValueError(
                f"{name} lies in [{bounds[0]:.6g}, {bounds[1]:.6g}], but times lie in [0, 1] (0 is noise, 1 is data); "
                "convert other time scales in the adapter"
            )
    if directions == Direction.BOTH or bounds_s is None or bounds_t is None:
        return
    gap = torch.as_tensor(t, dtype=torch.float64, device="cpu") - torch.as_tensor(s, dtype=torch.float64, device="cpu")
    if directions == Direction.NONE and bool((gap != 0).any()):
        raise ValueError(
            f"asked for a jump, but {what} is an instantaneous velocity; integrate it (reference_sample, "
            "reference_log_prob), or distil it (F2D2Module(teacher=...))"
        )
    if Direction.TO_NOISE not in directions and bool((gap < 0).any()):
        raise ValueError(
            f"asked for s > t (data to noise), but {what} only goes to data; train it in both directions "
            '(directions="both"), or invert it: log_prob(..., inversion=Inversion())'
        )
    if Direction.TO_DATA not in directions and bool((gap > 0).any()):
        raise ValueError(
            f"asked for s < t (noise to data), but {what} only goes to noise; train it in both directions "
            '(directions="both")'
        )


class FlowMap(nn.Module, Configured):
    """A few-step model: average velocity ``u(x, s, t)``.

    Subclass it and write :meth:`forward`, or :meth:`forward_features` if a divergence head is to read your hidden
    features. ``directions`` says which orders of time the network was (or will be) trained for.

    >>> class Shrinking(FlowMap):
    ...     def forward(self, x, s, t, cond=None):
    ...         return -x
    >>> Shrinking().jump(torch.ones(1, 2), 0.0, 0.5)
    tensor([[0.5000, 0.5000]])
    """

    directions: Direction = Direction.BOTH
    any_dtype: bool = False
    """Whether states may be of another floating dtype than the weights, and answers are then of theirs."""

    @property
    def conditional(self) -> bool | None:
        """Whether the map needs ``cond`` (``True``), or takes none (``False``); ``None``: it takes what there is.

        By default what an attribute ``labels`` says, an embedding or ``None``, and ``None`` without one.
        """
        return self.labels is not None if hasattr(self, "labels") else None

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Average velocity from ``s`` to ``t``.

        Args:
            x: State at time ``s``, ``(B, ...)``.
            s: Time of ``x``, ``()`` or ``(B,)``.
            t: Target time, ``()`` or ``(B,)``.
            cond: Conditioning: a tensor, or a tuple or dictionary of them, each with first axis ``B``; or ``None``.

        Returns:
            ``u``, shape of ``x``; by default that of :meth:`forward_features`.
        """
        if type(self).forward_features is FlowMap.forward_features:
            raise NotImplementedError(f"{type(self).__name__} must define forward(x, s, t, cond) -> u")
        return self.forward_features(x, s, t, cond)[0]

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, with the hidden features that a divergence head reads.

        Returns:
            ``(u, h)``; ``h`` is ``(B, F)``, or ``(B, F, H, W)`` for a head that averages over pixels.
        """
        raise NotImplementedError(
            f"{type(self).__name__} gives no features; define forward_features(x, s, t, cond) -> (u, h), or give the "
            "head its own network: DivergenceHead(network=...)"
        )

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Instantaneous velocity ``u(x, t, t)``, shape of ``x``."""
        return self(x, t, t, cond)

    def jump(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """State at time ``t``, shape of ``x``.

        Raises:
            ValueError: If a time lies outside [0, 1] or the order is one the map was not trained for.
        """
        check_interval(s, t, self.directions, what=type(self).__name__)
        s, t = expand_time(s, x), expand_time(t, x)
        return x + like(t - s, x) * self(x, s, t, cond)


class _FunctionFlowMap(FlowMap):
    def __init__(self, function: Callable[..., Tensor], directions: Direction | str) -> None:
        super().__init__()
        self.function = function  # registered as a submodule where it is one
        self.directions = Direction.parse(directions)

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        return self.function(x, expand_time(s, x), expand_time(t, x), cond)


@checked
def as_flow_map(function: Callable[..., Tensor], directions: Direction | str = Direction.BOTH) -> FlowMap:
    """A flow map from any ``(x, s, t, cond) -> u``, function or module.

    >>> shrink = as_flow_map(lambda x, s, t, cond: -x)
    >>> shrink.jump(torch.ones(1, 2), 0.0, 0.5)
    tensor([[0.5000, 0.5000]])
    """
    return _FunctionFlowMap(function, directions)


class JointMap(nn.Module, Configured, ABC):
    """Anything that answers ``(u, D)``: a flow map with a head, or a closed form.

    >>> class Shrinking(JointMap):
    ...     def joint(self, x, s, t, cond):
    ...         return Joint(-x, -x[0].numel() * torch.ones(len(x)))
    >>> Shrinking().jump(torch.ones(1, 2), 0.0, 0.5).log_prob_change
    tensor([1.])
    """

    directions: Direction = Direction.BOTH

    @property
    def conditional(self) -> bool | None:
        """As :attr:`FlowMap.conditional`."""
        return None

    @abstractmethod
    def joint(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Joint:
        """The pair for checked times ``(B,)``; what a subclass defines."""

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Joint:
        """Average velocity and divergence from ``s`` to ``t``.

        Args:
            x: State at time ``s``, ``(B, ...)``.
            s: Time of ``x``, ``()`` or ``(B,)``.
            t: Target time, ``()`` or ``(B,)``.
            cond: Conditioning, or ``None``.

        Returns:
            ``u``, shape of ``x``, and ``D``, ``(B,)``, nats per unit of time.

        Raises:
            ValueError: If a time lies outside [0, 1], has another shape, or the order is not supported.
        """
        check_interval(s, t, self.directions, what=type(self).__name__)
        return self.joint(x, expand_time(s, x), expand_time(t, x), cond)

    def jump(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Jump:
        """State at time ``t`` and the change of log-density on the way, nats."""
        u, divergence = self(x, s, t, cond)
        elapsed = expand_time(t, x) - expand_time(s, x)
        return Jump(x + like(elapsed, x) * u, -elapsed * divergence)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Instantaneous velocity ``u(x, t, t)``, shape of ``x``."""
        return self(x, t, t, cond).velocity

    def divergence(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Instantaneous divergence ``D(x, t, t)``, ``(B,)``, nats per unit of time."""
        return self(x, t, t, cond).divergence
