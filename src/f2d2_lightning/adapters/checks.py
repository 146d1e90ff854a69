"""Whether a network does what its adapter says: a few calls on a batch of data, before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters._asking import called, signature, undisturbed, without_zeros
from f2d2_lightning.adapters._derivatives import check_derivative
from f2d2_lightning.adapters._velocities import FEWEST_SAMPLES, check_velocity
from f2d2_lightning.adapters.adapter import AdaptedFlowMap, Adapter, check_conditioning
from f2d2_lightning.adapters.call import ConventionError
from f2d2_lightning.divergence.estimators import check_mode, instantaneous
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.flows.paths import LinearPath, expand_time
from f2d2_lightning.likelihood._inputs import check_state
from f2d2_lightning.utils.conditions import Cond, moved, some_of

LARGEST_BATCH = 64


@torch.no_grad()
def check_convention(flow_map: AdaptedFlowMap, data: Tensor, cond: Cond | None = None, mode: str = "forward") -> None:
    """Refuse a network that is not what its adapter declares.

    It is called without training mode, some forty times, mostly on at most 64 states. Random state, mode and gradients
    are left as they were. What cannot be told (an untrained network, too few samples) passes. See docs/CONVENTIONS.md.

    Args:
        flow_map: An adapted network.
        data: Data at ``t = 1``, as in training, ``(B, ...)``; from 8 samples on, sign and scale of the velocity and
            direction, scale and form of the times are checked too.
        cond: Conditioning, first axis ``B``.
        mode: How divergences will be found, as of :class:`~f2d2_lightning.Hutchinson`: ``"forward"`` and
            ``"reverse"`` compare the network's derivative in that mode with finite differences of its answers;
            ``"finite"`` needs no derivative.

    Raises:
        ConventionError: If the call does not fit the network, the answer has another shape or is not finite, the
            network ignores the end time that it is given, its derivative is not that of its answers, or its velocity
            is clearly that of another sign, direction or scale of time. Says which argument mends it.
        ValueError: If ``data``, ``cond`` or ``mode`` are unfit, or ``flow_map`` is not an adapted one.
    """
    check_mode(mode)
    if not isinstance(flow_map, AdaptedFlowMap):
        raise ValueError(
            f"check_convention takes an adapted network, adapter(network), and got {type(flow_map).__name__}; flow "
            "maps in this package's own convention have f2d2_lightning.testing.FlowMapContract"
        )
    check_state(data, "data")
    check_conditioning(cond)
    with undisturbed(flow_map, data) as device:
        x, noise, labels = _drawn(data, cond, device)
        _check_answers(flow_map, x, noise, labels)
        _check_second_time(flow_map, LinearPath().sample(x, noise, expand_time(0.5, x)), labels)
        # a consistency model has no velocity, and its jump to data is differentiated
        to_data = flow_map.endpoint_only
        velocity = (lambda y, t, c: flow_map(y, t, 1.0, c)) if to_data else flow_map.velocity
        check_derivative(velocity, x, noise, labels, mode, flow_map.network)
        check_velocity(flow_map, x, noise, labels)


@torch.no_grad()
def check_differentiable(
    velocity: Callable[..., Tensor], data: Tensor, cond: Cond | None = None, mode: str = "forward"
) -> None:
    """Refuse a velocity whose derivative is not that of its answers: its divergence would be wrong without a word.

    ``velocity`` is a module, a method of one, or a function ``(x, t, cond) -> v``; the rest as
    :func:`check_convention`.

    Raises:
        ConventionError: Says what the derivative is, what it should be, and which argument mends it.
    """
    check_mode(mode)
    velocity = instantaneous(velocity)
    owner = getattr(velocity, "__self__", velocity)
    with undisturbed(owner if isinstance(owner, nn.Module) else nn.Module(), data) as device:
        check_derivative(velocity, *_drawn(data, cond, device), mode)


def _drawn(data: Tensor, cond: Cond | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first data, noise for them, the same each time, and their conditioning."""
    # a copy: what was made in inference mode takes no part in differentiation
    x = data[:LARGEST_BATCH].detach().clone().to(device)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).to(device)
    return x, noise, moved(some_of(cond, slice(LARGEST_BATCH)), device)


def _check_answers(flow_map: AdaptedFlowMap, x: Tensor, noise: Tensor, cond: Cond | None) -> None:
    # times that the map can be asked for, ends of the interval included
    pairs = [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)]
    pairs += [(0.0, 1.0), (0.5, 0.75)] if Direction.TO_DATA in flow_map.answerable else []
    pairs += [(1.0, 0.0), (0.75, 0.5)] if Direction.TO_NOISE in flow_map.answerable else []
    for s, t in pairs:
        state = LinearPath().sample(x, noise, expand_time(s, x))
        u = called(flow_map, partial(flow_map, state, s, t, cond), x.device)
        if not bool(u.isfinite().all()):
            bad = int((~u.isfinite()).reshape(len(u), -1).any(-1).sum())
            raise ConventionError(
                f"{Adapter.describe(flow_map.network)} was called as {flow_map.adapter.call.text!r} with finite states "
                f"at our times s={s}, t={t} and answered NaN or infinity for {bad} of {len(u)}; a logarithm or a "
                "quotient of a time or an interval that is zero or negative does that: clamp it in the call, "
                "such as clamp(abs(t - s), 0.001, 1.0)"
            )


def _check_second_time(flow_map: AdaptedFlowMap, x: Tensor, cond: Cond | None) -> None:
    adapter, device = flow_map.adapter, x.device
    # an added interval sees both times, whatever the network does
    if not adapter.sees_end or flow_map.interval is not None or flow_map.answerable == Direction.NONE:
        return
    x, cond = x[:FEWEST_SAMPLES], some_of(cond, slice(FEWEST_SAMPLES))
    ends = []
    if Direction.TO_DATA in flow_map.directions:
        # far apart, for indices of the interval's octave
        ends += [(0.0, (1 / 128, 0.25, 1.0)), (0.5, (0.5 + 1 / 128, 0.75, 1.0))]
    if Direction.TO_NOISE in flow_map.directions:
        ends += [(1.0, (1 - 1 / 128, 0.75, 0.0)), (0.5, (0.5 - 1 / 128, 0.25, 0.0))]

    def answer(s: float, t: Tensor | float) -> Tensor:
        # the network's own answer: what the adapter makes of a state depends on the end time by itself
        with flow_map.eager():
            return adapter.ask(flow_map.network, adapter.prior_std * x, expand_time(s, x), expand_time(t, x), cond)

    def answers(s: float, times: Iterable[Tensor | float]) -> list[Tensor]:
        return [called(flow_map, partial(answer, s, t), device) for t in times]

    def changes() -> bool:
        for end in ends:
            first, *others = answers(*end)
            if any(not torch.equal(first, other) for other in others):
                return True
        return False

    if changes() or _connected(lambda t: answers(ends[0][0], [t])[0], ends[0][1][-1], x):
        return
    with without_zeros(flow_map.network):
        if changes():
            return
    raise ConventionError(
        f"{Adapter.describe(flow_map.network)} was called as {adapter.call.text!r}, and its answer does not depend on "
        f"the end time t in any way (it takes {signature(flow_map)}), so it cannot tell a jump from a velocity; pass "
        "t where the network reads it, or, if it has no second time, leave t out of the call and give interval='name "
        "of the time embedding' (to fine-tune it), or directions='none' (as a teacher)"
    )


def _connected(function: Callable[[Tensor], Tensor], end: float, x: Tensor) -> bool:
    """Whether the answer is a function of the end time as far as autograd sees."""
    with torch.enable_grad():
        leaf = x.new_full((len(x),), end).requires_grad_(True)
        try:
            value = function(leaf.clone())  # a network may change its times in place, which a leaf does not bear
            return value.requires_grad and torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] is not None
        except (ConventionError, RuntimeError):
            return True  # it ran without gradients, so this says nothing about the call
