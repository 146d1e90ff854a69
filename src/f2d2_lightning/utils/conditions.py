"""What states are conditioned on: a tensor, or several in a tuple or a dictionary, all with the samples first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Cond: TypeAlias = Any
"""A tensor ``(B, ...)``, or a tuple or a dictionary of them, or of such, as a sequence and its mask."""


def mapped(function: Callable[..., Any], cond: Cond | None, *others: Cond) -> Cond | None:
    """A function of each tensor of a condition, in a condition of the same form; ``None`` stays, lists become tuples.

    >>> mapped(len, {"sequence": torch.zeros(3, 5), "mask": torch.ones(3)})
    {'sequence': 3, 'mask': 3}
    """
    if isinstance(cond, Tensor):
        return function(cond, *others)
    if isinstance(cond, Mapping):
        return {key: mapped(function, value, *(other[key] for other in others)) for key, value in cond.items()}
    if isinstance(cond, (tuple, list)):
        return tuple(mapped(function, *values) for values in zip(cond, *others, strict=True))
    return None if cond is None else function(cond, *others)


def halves(batch: Any) -> tuple[Any, Cond | None]:
    """States and conditioning of a batch: it is states, or a sequence whose first items are both."""
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch, None
    # a loader's collate function makes lists of tuples
    return batch[0], mapped(lambda part: part, batch[1]) if len(batch) > 1 else None


def as_pair(answer: Any, who: str) -> tuple[Any, Cond | None]:
    """States and conditioning as somebody's ``data_to_state`` answered them; what is no pair is a ``ValueError``."""
    if isinstance(answer, (tuple, list)) and len(answer) == 2:
        return answer[0], answer[1]
    came = f"a {type(answer).__name__}" + (f" of {len(answer)}" if isinstance(answer, (tuple, list)) else "")
    raise ValueError(
        f"{who} answered {came}, and its answer is a pair (x, cond) of states and conditioning: write return x, None "
        "where there is no conditioning"
    )


def tensors(cond: Cond | None) -> Iterator[Any]:
    """The tensors of a condition, one after the other, and what stands in the place of one."""
    if isinstance(cond, (Mapping, tuple, list)):
        for part in cond.values() if isinstance(cond, Mapping) else cond:
            yield from tensors(part)
    elif cond is not None:
        yield cond


def some_of(cond: Cond | None, which: Any) -> Cond | None:
    """Those of some samples, by their places, a slice or a mask; a shared one stays so."""

    def one(part: Any) -> Any:
        if not (isinstance(part, Tensor) and part.ndim and is_shared(part)):
            return part[which]
        return part[0].expand((*torch.arange(len(part), device=part.device)[which].shape, *part.shape[1:]))

    return mapped(one, cond)


def moved(cond: Cond | None, *where: Any) -> Cond | None:
    """On another device."""
    return mapped(lambda part: part.to(*where), cond)


def joined(parts: Sequence[Cond | None]) -> Cond | None:
    """Conditions of several batches as those of one."""
    return mapped(lambda *each: torch.cat(each), *parts)


def repeated(cond: Cond | None, times: int, each: bool = False) -> Cond | None:
    """``times`` the samples in their order, or with ``each`` every sample so often in a row; a shared one stays so."""

    def one(part: Tensor) -> Tensor:
        if is_shared(part):
            return part[:1].expand(times * len(part), *part.shape[1:])
        return part.repeat_interleave(times, 0) if each else part.repeat(times, *(1 for _ in part.shape[1:]))

    return mapped(one, cond)


def dtype_beside(part: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a condition of states of a dtype is in: floating and complex numbers in their precision, others stay.

    >>> dtype_beside(torch.zeros(1, dtype=torch.complex128), torch.float32)
    torch.complex64
    """
    if part.is_complex():
        return torch.promote_types(torch.complex64, dtype)
    return dtype if part.is_floating_point() else part.dtype


def kind_of(cond: Any) -> str:
    """What it is, for messages."""
    if isinstance(cond, Tensor):
        return f"dtype {cond.dtype}, shape {tuple(cond.shape)}"
    return "none" if cond is None else f"a {type(cond).__name__}"


def is_shared(part: Tensor) -> bool:
    """Whether it is one row for all samples, expanded without a copy."""
    return len(part) > 1 and part.stride(0) == 0


def one_row(cond: Cond | None) -> Cond | None:
    """A condition that all samples share, expanded, as that of one sample, so that it is embedded once; else as it is.

    >>> one_row(torch.zeros(1, 2).expand(5, 2)).shape
    torch.Size([1, 2])
    """
    found = list(tensors(cond))
    shared = bool(found) and all(isinstance(part, Tensor) and part.ndim > 0 and is_shared(part) for part in found)
    return some_of(cond, slice(1)) if shared else cond
