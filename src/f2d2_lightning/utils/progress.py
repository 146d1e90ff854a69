"""Work inside of a step that takes long: the code that does it says how far it is, and whoever listens shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""

_listeners: list[Listener] = []


def tell(what: str, done: int, total: int) -> None:
    """Say how far a piece of work is; nothing where nobody listens."""
    for listener in _listeners[-1:]:
        listener(what, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear what is told, in place of the one before."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
