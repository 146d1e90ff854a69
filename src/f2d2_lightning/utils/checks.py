"""Refusals of settings and shapes, each saying what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

__all__ = ["at_least", "check_shape", "listed", "one_of", "positive", "share"]


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
    """Refuse states ``(B, *shape)`` of another shape than their owner's.

    Raises:
        ValueError: Says both shapes.
    """
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"states have shape {tuple(x.shape)}, but {owner} (B, {', '.join(map(str, shape))}); {remedy}")


def listed(problems: Sequence[str], most: int = 10) -> str:
    """The first of them, and how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f" and {more} more" if more > 0 else "")
