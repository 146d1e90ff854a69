"""Refusals of settings and shapes, each saying what came and what was expected.

What an argument may be is said once, by its annotation: :func:`checked` compares a call with it, and ranges are for
the functions below.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


class ArgumentError(TypeError, ValueError):
    """An argument is not what its function takes: caught as either, whichever a caller expects."""


def checked(function: Function) -> Function:
    """Decorator: refuses arguments that are not what their annotations say, before the function is called.

    Whole numbers do for floating ones, and NumPy's for Python's; a truth value is no number, and text is none either.
    Text does for :class:`~pathlib.Path` only where the annotation says so. NaN and infinity are no settings, except as
    a default. Elements of sequences and mappings are looked at as well.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        hints = _hints(function)
        check_arguments(function, dict(zip(hints, args)) | kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """What :func:`checked` does, of arguments by name, for a function that no decorator may be around.

    Lightning finds the hyper-parameters of a module in the frames of its constructors.
    """
    owner, _, called = function.__qualname__.rpartition(".")
    for name, (hint, default) in _hints(function).items():
        if hint is not Any and name in given and given[name] is not default:
            _check(f"{owner if called == '__init__' else called}: {name}", given[name], hint)


def check_fields(value: Any) -> None:
    """The same of a dataclass's fields, in ``__post_init__``."""
    hints = _field_hints(type(value))  # type: ignore[arg-type]
    for name, (hint, default) in hints.items():
        if (came := getattr(value, name)) is not default:
            _check(f"{type(value).__name__}: {name}", came, hint)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Type and default of each argument in their order."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    many = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name: (Any if p.kind in many else hints.get(p.name, Any), p.default) for p in parameters}


@functools.cache
def _field_hints(cls: Any) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], None if f.default is MISSING else f.default) for f in fields(cls)}


def _check(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        # torch.compile(network) is a class of its own around the network
        compiled = hasattr(value, "_orig_mod") and _fits(value._orig_mod, hint)
        remedy = "; compile a model in place, by model.compile(), and give the model" if compiled else ""
        raise ArgumentError(f"{name}={_shown(value)} is a {type(value).__name__}; {_said(hint)} is expected{remedy}")
    if isinstance(value, (float, np.floating)) and not math.isfinite(value):
        raise ArgumentError(f"{name}={value}; a finite number is expected")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # an array becomes a tensor, or is refused, where it is used
        return np.ndarray in arguments or any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        # which of them, the function says itself
        return isinstance(value, tuple(map(type, arguments)))
    cls = origin or hint
    if not isinstance(cls, type):
        return True
    if cls in (int, float):
        if isinstance(value, Tensor):
            return value.ndim == 0 and cls is int and not value.is_floating_point()
        number = (int, np.integer) if cls is int else (int, float, np.integer, np.floating)
        return isinstance(value, number) and not isinstance(value, bool)
    if cls is bool:
        return isinstance(value, (bool, np.bool_))
    if cls in (Sequence, list, tuple):
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            return False
        if isinstance(value, (np.ndarray, Tensor)):
            value = value.tolist()
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if cls is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return not arguments or all(_fits(one, arguments[0]) for one in value)
    if issubclass(cls, Mapping) and arguments:
        of_key, of_value = arguments
        fits = isinstance(value, cls)
        return fits and all(_fits(key, of_key) and _fits(one, of_value) for key, one in value.items())
    return callable(value) if cls is Callable else isinstance(value, cls)


def _said(hint: Any) -> str:
    """A type in words."""
    if hint in (None, type(None)):
        return "None"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_said, arguments))
    if origin is Callable:
        return "a function"
    inside = ", ".join("..." if one is Ellipsis else _said(one) for one in arguments)
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{inside}]" if inside else name


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"<{value.dtype} of shape {tuple(value.shape)}>"
    # a network's text is its layers
    text = f"<{type(value).__name__}>" if isinstance(value, nn.Module) else " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def counts(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers from 1, as a tuple; a ``ValueError`` if one is not, or there is none."""
    if not len(values) or min(values) < 1:
        raise ValueError(f"{name}={list(values)}; whole numbers from 1 are expected, and at least one of them")
    return tuple(int(value) for value in values)


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a choice that there is not, with a :class:`ValueError`."""
    if value not in (choices := tuple(choices)):
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(repr, choices))}")


def at_least(least: float, **values: float) -> None:
    """Refuse numbers below ``least``, and NaN, with a :class:`ValueError`."""
    _expect(lambda value: value >= least, values, f"at least {least}")


def positive(**values: float) -> None:
    """Refuse numbers that are not above 0, with a :class:`ValueError`."""
    _expect(lambda value: value > 0, values, "positive")


def share(**values: float) -> None:
    """Refuse numbers that are not in [0, 1], with a :class:`ValueError`."""
    _expect(lambda value: 0 <= value <= 1, values, "a share, in [0, 1]")


def _expect(fits: Callable[[float], bool], values: Mapping[str, float], what: str) -> None:
    wrong = [f"{name}={value}" for name, value in values.items() if not fits(value)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}; {'each' if len(wrong) > 1 else 'it'} must be {what}")


def check_shape(x: Tensor, shape: Sequence[int], owner: str, remedy: str) -> None:
    """Refuse states ``(B, *shape)`` of another shape than their owner's, with a :class:`ValueError` that says both."""
    if tuple(x.shape[1:]) != tuple(shape):
        if tuple(x.shape) == tuple(shape):
            remedy = "that is a single state, and x[None] makes a batch of one of it"
        elif len(shape) == 3 and tuple(x.shape[1:]) == (*shape[1:], shape[0]):
            remedy = "the channels are the last axis here, and x.permute(0, 3, 1, 2) makes them the first"
        raise ValueError(f"states have shape {tuple(x.shape)}, but {owner} (B, {', '.join(map(str, shape))}); {remedy}")


def listed(problems: Sequence[str], most: int = 10) -> str:
    """The first of them, and how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f" and {more} more" if more > 0 else "")
