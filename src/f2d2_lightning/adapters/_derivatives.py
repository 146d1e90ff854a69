"""Whether a network's derivative is that of its answers.

A likelihood is made of derivatives, and a network can lose them without a word: it detaches its input, runs itself in
inference mode, differentiates an energy inside, or writes into a tensor whose tangent another one shares. Its answers
are right then, and its divergence is a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from f2d2_lightning.adapters._asking import TIMES, seed
from f2d2_lightning.adapters.adapter import Adapter, compute_dtype
from f2d2_lightning.adapters.call import ConventionError
from f2d2_lightning.divergence._tangents import named, raised_in
from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.flows.paths import LinearPath, like
from f2d2_lightning.utils.conditions import Cond, some_of
from f2d2_lightning.utils.sharding import is_sharded

ROWS = 10  # states, each with a direction of its own; half of them must be clearly wrong
# half-widths of the finite differences: the widest in units of the noise, and the rest each a quarter of the last; the
# first that is tried is that of index FIRST, and where it agrees, as it does for most networks, no other is
WIDEST, RATIO, MOST_STEPS, FIRST = 0.3, 4.0, 12, 2
CLOSE = 0.1  # relative difference up to which two derivatives are one
CLEAR = 4.0  # how far outside of the difference of two finite differences a derivative must lie


def check_derivative(
    velocity: Callable[..., Tensor], x: Tensor, noise: Tensor, cond: Cond | None, mode: str, network: Any = None
) -> None:
    """Compare one derivative of the velocity along random directions with finite differences of it.

    A right derivative agrees with the finite difference of some step: large where the network rounds, small where it
    bends. A wrong one disagrees with all, also with two steps that agree with each other. Then, and where there is none
    in this mode, it is a :class:`ConventionError`, which names the submodule where it can.

    ``velocity`` is ``(x, t, cond) -> v`` of a network in evaluation mode; ``network``, by default the velocity itself,
    is what stands behind it, whose submodules are named. With ``mode="finite"`` there is nothing to check.
    """
    if mode == "finite":
        return
    network = getattr(velocity, "__self__", velocity) if network is None else network
    rows = torch.arange(ROWS, device=x.device)
    times = x.new_tensor(TIMES)[rows % len(TIMES)]
    states = LinearPath().sample(x[rows % len(x)], noise[rows % len(x)], times)
    labels = some_of(cond, rows % len(x))
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(states.shape, dtype=x.dtype, generator=generator).to(x.device)

    def at_times(y: Tensor) -> Tensor:
        seed(x.device)
        return velocity(y, times, labels)

    at_times(states)  # what a network says of its arguments is not about derivatives
    derivative = _derivative(network, at_times, states, directions, mode)
    epsilon = max(torch.finfo(dtype).eps for dtype in (x.dtype, compute_dtype(network, x)))
    steps = [WIDEST / RATIO**k for k in range(MOST_STEPS)]
    steps = [h for h in steps if h > 4 * epsilon]
    # processes that share a network must call it equally often
    sharded = isinstance(network, nn.Module) and is_sharded(network)
    differences: dict[int, Tensor] = {}
    agrees = torch.zeros(ROWS, dtype=torch.bool, device=x.device)
    for k in sorted(range(len(steps)), key=lambda k: (k != FIRST, k)):
        moved = [at_times(states + sign * steps[k] * directions) for sign in (1, -1)]
        differences[k] = (moved[0] - moved[1]) / (2 * steps[k])
        found = derivative(differences[k])
        agrees |= _size(found - differences[k]) <= CLOSE * torch.maximum(_size(differences[k]), _size(found))
        if int(agrees.sum()) > ROWS // 2 and not sharded:
            return
    scale = _size(at_times(states))
    wrong, best = torch.zeros_like(agrees), 0
    for k in range(len(steps) - 1):
        size = torch.minimum(_size(differences[k]), _size(differences[k + 1]))
        spread = _size(differences[k] - differences[k + 1])
        # what rounding makes of a difference, and what would be no matter in any case
        rounding = 10 * epsilon * scale / steps[k + 1] + 1e-6
        error = _size(derivative(differences[k + 1]) - differences[k + 1])
        here = ~agrees & (spread <= CLOSE * size) & (error > CLEAR * spread + rounding)
        best = k + 1 if int((wrong | here).sum()) > int(wrong.sum()) else best
        wrong |= here
    if 2 * int(wrong.sum()) >= ROWS:
        came, true = (float(_size(v)[wrong].mean()) for v in (derivative(differences[best]), differences[best]))
        place = _lost(network, at_times, states, directions) if mode == "forward" else None
        raise ConventionError(
            f"{Adapter.describe(network)} answers, but not with its derivative: along random directions it is "
            f"{came:.3g} in {mode} mode, and {true:.3g} by finite differences of step {steps[best]:.2g} (mean square "
            f"roots over {int(wrong.sum())} of {ROWS} states), so every divergence and likelihood would be wrong "
            "without a word. "
            + (f"The derivative is lost in {place}. " if place else "")
            + "detach(), inference_mode(), a gradient taken inside the forward pass and writing in place do that; "
            + _remedy(mode)
        )


def _derivative(
    network: Any, velocity: Callable[[Tensor], Tensor], states: Tensor, directions: Tensor, mode: str
) -> Callable[[Tensor], Tensor]:
    """The derivative along ``directions`` to be compared with an estimate of it, both of the states' shape.

    Reverse mode has no such thing by itself. From it comes the derivative's part along a random direction of the
    answers, and what it differs from the estimate's there stands for the whole difference.
    """
    if mode == "forward":
        product = _differentiated(
            network, lambda: jacobian_product(velocity, states, directions, checked=False)[1], mode
        )
        return lambda estimate: product

    def pulled(estimate: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = states.detach().clone().requires_grad_(True)
            value = velocity(leaf)
            if not value.requires_grad:
                return torch.zeros_like(states)
            gradient = torch.autograd.grad(value, leaf, estimate, allow_unused=True)[0]
        return torch.zeros_like(states) if gradient is None else gradient

    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(states.shape, dtype=states.dtype, generator=generator).to(states.device)
    gradient = _differentiated(network, lambda: pulled(weights), mode)
    found = _inner(gradient, directions)

    def corrected(estimate: Tensor) -> Tensor:
        missing = (found - _inner(weights, estimate)) / _inner(weights, weights)
        # in an error of n parts one direction sees one of them
        return estimate + like(missing * weights[0].numel() ** 0.5, estimate) * weights

    return corrected


def _size(value: Tensor) -> Tensor:
    """Root mean square of each row."""
    return value.reshape(len(value), -1).square().mean(-1).sqrt()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(-1)


def _remedy(mode: str) -> str:
    return (
        f"give {'the callback or module ' if mode == 'forward' else ''}estimator=Hutchinson(mode='finite') and "
        "reference=Reference(mode='finite'), and here mode='finite', or mend the network"
    )


def _differentiated(network: Any, function: Callable[[], Tensor], mode: str) -> Tensor:
    try:
        return function()
    except (ConventionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = raised_in(error, network) if isinstance(network, nn.Module) else None
        place = named(*found) if found else Adapter.describe(network)
        raise ConventionError(
            f"{Adapter.describe(network)} cannot be differentiated in {mode} mode, which the divergence needs: {place} "
            f"raised {type(error).__name__}: {error}. Some layers have no such rule (LSTM, cdist, reentrant "
            f"checkpoints, functions with a backward of their own); {_remedy(mode)}"
        ) from error


def _lost(network: Any, velocity: Callable[[Tensor], Tensor], states: Tensor, directions: Tensor) -> str | None:
    """The innermost submodule that takes a tangent in and gives none out."""
    if not isinstance(network, nn.Module):
        return None
    found: list[str] = []

    def has_tangent(values: Any) -> bool:
        tensors = (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point())
        return any(forward_ad.unpack_dual(v).tangent is not None for v in tensors)

    def note(name: str, module: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        # within inference mode all are without, and whoever entered it is to blame
        inside = torch.is_inference_mode_enabled()
        if not inside and has_tangent((arguments, keywords)) and not has_tangent(output):
            found.append(name)

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(note, name), with_kwargs=True))
        jacobian_product(velocity, states, directions, checked=False)
    return named(network, found[0]) if found else None
