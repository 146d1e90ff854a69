"""Checks that many places make, and what their messages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["listed", "one_of"]


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse a value that is none of the allowed ones: the ``ValueError`` says what came, and lists them."""
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(repr, allowed))}")


def listed(problems: Sequence[str], most: int = 10) -> str:
    """The first of them, and how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f" and {more} more" if more > 0 else "")
