"""What a caller gives, as tensors that a map can take, or an error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from f2d2_lightning.flows.maps import is_transformed
from f2d2_lightning.utils.checks import at_least, check_shape
from f2d2_lightning.utils.conditions import Cond, dtype_beside, mapped, some_of, tensors

Array: TypeAlias = Tensor | np.ndarray | Sequence[Any]
"""A tensor, or what becomes one: an array, nested lists, a list of tensors."""

Answer = TypeVar("Answer")

OTHER_SIZE = "a likelihood of another size means nothing: resize the data, or take a model for them"


def as_tensor(x: Any, what: str) -> Tensor:
    """``x`` as a tensor; a tensor as it is.

    What is neither a tensor nor an array or list of numbers is a ``TypeError``, a list of parts of several shapes a
    ``ValueError``.
    """
    if isinstance(x, Tensor):
        if x.layout != torch.strided or x.is_meta:
            raise ValueError(f"{what} has layout {x.layout} and is on {x.device}; a dense tensor is needed")
        return x
    if isinstance(x, (list, tuple)) and any(isinstance(part, (Tensor, np.ndarray)) for part in x):
        shapes = {tuple(np.shape(part)) for part in x}
        if len(shapes) > 1:
            raise ValueError(
                f"{what} is a list of parts of shapes {', '.join(map(str, sorted(shapes)))}; one is needed"
            )
        return torch.stack([as_tensor(part, what) for part in x])
    listed = isinstance(x, (list, tuple))
    try:
        if not listed and not hasattr(x, "__array__"):
            raise TypeError("it is no array")
        # a copy: a tensor of an array that is read-only warns, and of one with negative strides fails
        return torch.tensor(x) if listed else torch.from_numpy(np.array(x))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = ValueError if listed else TypeError
        raise kind(
            f"{what} is a {type(x).__name__} ({x!s:.40}); a tensor (B, ...) is expected, or an array or list of "
            f"numbers that makes one ({error})"
        ) from error


def state_shape_of(model: Any) -> tuple[int, ...] | None:
    """Shape of one state, where a map of this package says it."""
    for part in (model, getattr(model, "flow_map", None)):
        shape = getattr(part, "shape", None)
        if isinstance(part, nn.Module) and isinstance(shape, tuple):
            return shape
    return None


def as_states(x: Any, what: str, model: Any = None) -> Tensor:
    """States ``(B, ...)`` in dtype and on the device of a model's weights, where it has any.

    Errors are those of :func:`as_tensor` and :func:`check_state`; another shape than the model's is a ``ValueError``.
    """
    x = as_tensor(x, what)
    check_state(x, what)
    if (shape := state_shape_of(model)) is not None:
        check_shape(x, shape, "the network takes", OTHER_SIZE)
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    weight = next((p for p in weights if p.is_floating_point()), None)
    if weight is None:
        return x
    kept = getattr(getattr(model, "flow_map", model), "any_dtype", False)
    # log-densities in half precision are off by whole nats: autocast is for networks
    kept = kept or weight.dtype not in (torch.float32, torch.float64)
    return x.to(weight.device) if kept else x.to(weight)


def check_state(x: Tensor, what: str) -> None:
    """Refuse, as ``ValueError`` or ``TypeError``, what is no floating, finite tensor ``(B, ...)`` with ``B >= 1``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} is a {type(x).__name__} ({x!s:.40}); a tensor (B, ...) is expected")
    if not torch.is_floating_point(x):
        raise ValueError(f"{what} has dtype {x.dtype}; it must be floating (dequantize integers first: Quantization)")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}; it must be (B, ...) with B >= 1 and at least one axis more; a single "
            f"state becomes a batch by {what}[None]"
        )
    if not is_transformed(x) and not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).reshape(len(x), -1).any(-1).sum())
        raise ValueError(f"{what} holds NaN or infinity in {bad} of {len(x)} samples; remove or repair them")


def as_cond(cond: Any, states: Tensor, drawn: bool = False) -> Cond | None:
    """Conditioning as tensors, on the device of the states, floating and complex numbers in their precision.

    A list is one tensor, as everywhere; several conditions stand in a tuple or a dictionary. One with first axis 1 is
    that of all ``states``, ``(B, ...)``, without a copy. Where only their number was said, ``drawn``, conditions share
    them evenly: ``M`` of them, where ``M`` divides ``B``, have ``B / M`` states in a row each. Errors are those of
    :func:`as_tensor`.
    """

    def one(part: Any) -> Tensor:
        part = as_tensor(part, "cond")
        part = part.to(states.device, dtype_beside(part, states.dtype))
        count, own = len(states), len(part) if part.ndim else 0
        if own == 1 < count:
            return part.expand(count, *part.shape[1:])
        return part.repeat_interleave(count // own, 0) if drawn and 1 < own < count and count % own == 0 else part

    return one(cond) if isinstance(cond, list) else mapped(one, cond)


def check_cond(cond: object, count: int, model: object = None) -> None:
    """Refuse, with a ``ValueError``, conditioning of ``count`` states whose parts are no tensors ``(count, ...)``.

    So with any that the ``model``, a map whose ``conditional`` is ``False``, would ignore.
    """
    if cond is None:
        return
    for part in tensors(cond):
        if not isinstance(part, Tensor) or part.ndim < 1 or len(part) != count:
            came = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise ValueError(
                f"cond {'is' if part is cond else 'holds'} {came}; a tensor whose first axis is that of the {count} "
                "states is needed, or a tuple or dictionary of such (log_prob and sample take 1 for all of them, and "
                "sample(number) a divisor of the number). A network that takes none says so, conditional = False in "
                "its class; or leave cond out in data_to_state"
            )
    if getattr(model, "conditional", None) is False:
        raise ValueError(
            f"cond was given, but {type(model).__name__} takes none: its answer would be that without it; leave cond "
            "out, or train a conditional model"
        )


def seed_of(seed: int | None, generator: torch.Generator | None) -> int | None:
    """A seed that was said, or one drawn from a generator; ``None`` for neither, a ``ValueError`` for both."""
    if seed is not None and generator is not None:
        raise ValueError(f"seed={seed} and generator= are both given; one of them says what is drawn")
    if generator is None:
        return seed
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def in_parts(ask: Callable[[Tensor, Cond | None], Answer], x: Tensor, cond: Cond | None, size: int | None) -> Answer:
    """Answers for so many states at a time, joined along the first axis; for all at once where ``size`` is ``None``."""
    if size is None:
        return ask(x, cond)
    at_least(1, batch_size=size)
    size = max(1, min(int(size), len(x)))
    # of no states one part, which has the answer's shape
    parts = [slice(start, start + size) for start in range(0, max(1, len(x)), size)]
    return _joined([ask(x[part], some_of(cond, part)) for part in parts])


def _joined(parts: Sequence[Answer]) -> Answer:
    """Dataclasses of tensors ``(B, ...)`` as one; of numbers, such as evaluations, the largest."""
    found: dict[str, Any] = {}
    for field in fields(parts[0]):  # type: ignore[arg-type]
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            found[field.name] = torch.cat(values)
        elif values[0] is not None:
            found[field.name] = max(values)
    return replace(parts[0], **found)  # type: ignore[type-var]
