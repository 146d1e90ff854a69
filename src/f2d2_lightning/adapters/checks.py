"""Whether a network does what its adapter says: a few calls on a batch of data, before any training."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters.adapted import AdaptedFlowMap
from f2d2_lightning.adapters.adapter import Adapter, check_conditioning
from f2d2_lightning.adapters.call import ConventionError
from f2d2_lightning.adapters.variance_exploding import VarianceExploding
from f2d2_lightning.flow_map import Direction
from f2d2_lightning.held import evaluating
from f2d2_lightning.paths import LinearPath, expand_time
from f2d2_lightning.sampling import check_state

__all__ = ["ConventionError", "check_convention"]

LARGEST_BATCH = 64
FEWEST_SAMPLES = 8
"""Below this the sign and direction of time are not judged."""

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Symmetric about one half, so that mirroring time gives the same ones."""

CLEARLY_BETTER = 0.75
"""Share of the declared convention's squared error that another one must stay below."""

CERTAIN = 4.0
"""Standard errors that the difference must be away from zero."""


@torch.no_grad()
def check_convention(flow_map: AdaptedFlowMap, data: Tensor, cond: Tensor | None = None) -> None:
    """Refuse a network that is not what its adapter declares.

    It is called without training mode, some thirty times on at most 64 states. Random state, mode and gradients are
    left as they were. What cannot be told (an untrained network, too few samples) passes.

    Args:
        flow_map: An adapted network.
        data: Data at ``t = 1``, as in training, ``(B, ...)``; from 8 samples on, the sign of the velocity and the
            direction of time are checked too.
        cond: Conditioning, first axis ``B``.

    Raises:
        ConventionError: If the call does not fit the network, the answer has another shape or is not finite, the
            network ignores the end time that it is given, or its velocity is clearly that of another sign or
            direction of time. Says which argument of the adapter mends it.
        ValueError: If ``data`` are unfit, or ``flow_map`` is not an adapted one.
    """
    if not isinstance(flow_map, AdaptedFlowMap):
        raise ValueError(
            f"check_convention takes an adapted network, adapter(network), and got {type(flow_map).__name__}; flow "
            "maps in this package's own convention have f2d2_lightning.testing.FlowMapContract"
        )
    check_state(data, "data")
    check_conditioning(cond)
    with _undisturbed(flow_map, data) as device:
        x = data[:LARGEST_BATCH].detach().to(device)
        x = x.clone() if x.is_inference() else x
        labels = None if cond is None else cond[:LARGEST_BATCH].to(device)
        noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).to(device)
        _check_answers(flow_map, x, noise, labels)
        _check_second_time(flow_map, LinearPath().sample(x, noise, expand_time(0.5, x)), labels)
        _check_velocity(flow_map, x, noise, labels)


@contextlib.contextmanager
def _undisturbed(flow_map: nn.Module, data: Tensor) -> Iterator[torch.device]:
    """Evaluation mode and forked random state; gives the device that the network is on."""
    tensor = next(iter(flow_map.parameters()), next(iter(flow_map.buffers()), data))
    devices = [tensor.device] if tensor.device.type == "cuda" else []
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices), evaluating(flow_map):
        yield tensor.device


def _seed(device: torch.device) -> None:
    # only the generators that were forked: torch.manual_seed would reach every device
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(0)


def _called(flow_map: AdaptedFlowMap, function: Callable[[], Tensor], device: torch.device) -> Tensor:
    _seed(device)  # a network with random parts answers the same question alike
    try:
        return function()
    except (ConventionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        network, adapter = flow_map.network, flow_map.adapter
        raise ConventionError(
            f"{Adapter.describe(network)} was called as {adapter.call.text!r} and raised {type(error).__name__}: "
            f"{error}. It takes {_signature(flow_map)}; write the adapter's call= to fit (order and keywords, the "
            "form of the second time, time_axes=, classes= for one-hot labels, null_label=, channels_last=)"
        ) from error


def _signature(flow_map: AdaptedFlowMap) -> str:
    network, method = flow_map.network, flow_map.adapter.call.method
    name = Adapter.describe(network)
    function = network if method is None else getattr(network, method)
    if method is None and isinstance(network, nn.Module):
        function, method = network.forward, "forward"
    try:
        return f"{name}{'.' + method if method else ''}{inspect.signature(function)}"
    except (TypeError, ValueError):
        return "arguments that cannot be inspected"


def _pairs(directions: Direction) -> list[tuple[float, float]]:
    """Times that the map can be asked for, ends of the interval included."""
    pairs = [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)]
    if Direction.TO_DATA in directions:
        pairs += [(0.0, 1.0), (0.5, 0.75)]
    if Direction.TO_NOISE in directions:
        pairs += [(1.0, 0.0), (0.75, 0.5)]
    return pairs


def _check_answers(flow_map: AdaptedFlowMap, x: Tensor, noise: Tensor, cond: Tensor | None) -> None:
    for s, t in _pairs(flow_map.answerable):
        state = LinearPath().sample(x, noise, expand_time(s, x))
        u = _called(flow_map, lambda state=state, s=s, t=t: flow_map(state, s, t, cond), x.device)  # type: ignore[misc]
        if not bool(u.isfinite().all()):
            bad = int((~u.isfinite()).reshape(len(u), -1).any(-1).sum())
            raise ConventionError(
                f"{Adapter.describe(flow_map.network)} was called as {flow_map.adapter.call.text!r} with finite states "
                f"at our times s={s}, t={t} and answered NaN or infinity for {bad} of {len(u)}; a logarithm or a "
                "quotient of a time or an interval that is zero or negative does that: clamp it in the call, "
                "such as clamp(abs(t - s), 0.001, 1.0)"
            )


def _check_second_time(flow_map: AdaptedFlowMap, x: Tensor, cond: Tensor | None) -> None:
    adapter, device = flow_map.adapter, x.device
    # an added interval sees both times, whatever the network does
    if not adapter.sees_end or flow_map.interval is not None or flow_map.answerable == Direction.NONE:
        return
    x, cond = x[:FEWEST_SAMPLES], None if cond is None else cond[:FEWEST_SAMPLES]
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

    def changes() -> bool:
        for s, times in ends:
            first, *others = (_called(flow_map, lambda s=s, t=t: answer(s, t), device) for t in times)  # type: ignore[misc]
            if any(not torch.equal(first, other) for other in others):
                return True
        return False

    if changes() or _connected(lambda t: _called(flow_map, lambda: answer(ends[0][0], t), device), ends[0][1][-1], x):
        return
    with _without_zeros(flow_map.network):
        if changes():
            return
    raise ConventionError(
        f"{Adapter.describe(flow_map.network)} was called as {adapter.call.text!r}, and its answer does not depend on "
        f"the end time t in any way (it takes {_signature(flow_map)}), so it cannot tell a jump from a velocity; pass "
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


@contextlib.contextmanager
def _without_zeros(network: Callable[..., object]) -> Iterator[None]:
    """Fill parameters that are all zero for a moment: zero-initialised layers hide what is behind them."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    zeros = [p for p in parameters if not bool(p.any())]
    kept = [p.clone() for p in zeros]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in zeros:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        yield
    finally:
        for p, value in zip(zeros, kept, strict=True):
            p.copy_(value)


class _Variant(NamedTuple):
    what: str
    sign: float
    mirrored: bool


DECLARED = _Variant("as declared", 1.0, False)
VARIANTS = (
    _Variant("with the opposite sign", -1.0, False),
    _Variant("with time running the other way", 1.0, True),
    _Variant("with time running the other way and the opposite sign", -1.0, True),
)


def _check_velocity(flow_map: AdaptedFlowMap, x: Tensor, noise: Tensor, cond: Tensor | None) -> None:
    if len(x) < FEWEST_SAMPLES:
        return
    target = (x - noise).reshape(len(x), -1)
    energy = target.square().mean(-1)
    answers, linear = {}, []
    for time in TIMES:
        state = LinearPath().sample(x, noise, expand_time(time, x))
        for mirrored in (False, True):
            at = 1 - time if mirrored else time
            to = 1.0 if flow_map.endpoint_only else at
            u = _called(flow_map, lambda state=state, at=at, to=to: flow_map(state, at, to, cond), x.device)  # type: ignore[misc]
            answers[time, mirrored] = u.reshape(len(x), -1)
        flat = state.reshape(len(x), -1)
        # the best multiple of the state: what a network has learned when it has learned hardly anything
        factor = (flat * target).sum() / flat.square().sum()
        linear.append((factor * flat - target).square().mean())

    def errors(variant: _Variant) -> Tensor:
        """Mean squared error, ``(times, B)``."""
        return torch.stack(
            [(variant.sign * answers[time, variant.mirrored] - target).square().mean(-1) for time in TIMES]
        )

    declared = errors(DECLARED)
    # a map's endpoint is a draw, not a mean, so it is less close to this one's target than a velocity
    known = (2.5 if flow_map.endpoint_only else 1.25) * torch.stack(linear)
    for variant in sorted(VARIANTS, key=lambda v: float(errors(v).sum())):
        other = errors(variant)
        gain = (declared - other).mean(0)
        if (
            float(other.sum()) < CLEARLY_BETTER * float(declared.sum())
            and bool((other.mean(1) < known).all())
            and float(gain.mean()) > CERTAIN * float(gain.std() / len(gain) ** 0.5)
        ):
            share = [float(e.mean() / energy.mean()) for e in (declared, other)]
            raise ConventionError(
                f"{Adapter.describe(flow_map.network)}, called as {flow_map.adapter.call.text!r}, points the wrong "
                f"way: on {len(x)} noised data its velocity leaves {share[0]:.2f} of the mean square of data - noise "
                f"as declared, and {share[1]:.2f} {variant.what}; {_remedy(flow_map.adapter, variant)}"
            )


def _remedy(adapter: Adapter, variant: _Variant) -> str:
    if isinstance(adapter, VarianceExploding):
        return (
            "the network must take noise levels sigma and answer the clean image (not the noise, and not a velocity): "
            "check call=, precondition= and answer=, or take another adapter"
        )
    noise_time, data_time = adapter.noise_time, adapter.data_time
    scale = variant.sign * adapter.velocity_scale
    changes = []
    if variant.mirrored:
        noise_time, data_time = data_time, noise_time
        changes.append(f"noise_time={noise_time}, data_time={data_time}")
    if scale != data_time - noise_time:
        changes.append(f"velocity_scale={scale}")
    return (
        f"give the adapter {', '.join(changes) or f'velocity_scale={scale}'} (it has noise_time={adapter.noise_time}, "
        f"data_time={adapter.data_time}, velocity_scale={adapter.velocity_scale})"
    )
