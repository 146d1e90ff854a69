"""Checks of arguments that many places make, with one form of message."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["one_of"]


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse a value that is none of the allowed ones: the ``ValueError`` says what came, and lists them."""
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(repr, allowed))}")
