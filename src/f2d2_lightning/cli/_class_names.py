"""Classes by their names: what a type takes, and what may be called so."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from f2d2_lightning.checkpoints.trust import takes
from f2d2_lightning.cli._configs import closest

LISTED = 8
"""Names that a message gives where none is near."""


def imported(path: str) -> Any:
    """What a dotted path names, ``None`` if nothing."""
    package, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError):
        return None


def hints_of(class_path: str) -> Mapping[str, Any]:
    """Types of the arguments of a class or function by name; none of what cannot be imported."""
    made = imported(class_path)
    if inspect.isclass(made):
        return takes(made).hints
    return {} if made is None else dict.fromkeys(inspect.signature(made).parameters) | typing.get_type_hints(made)


def classes(hint: Any) -> list[type]:
    """Classes within a type."""
    own = [hint] if inspect.isclass(hint) and hint.__module__ not in ("builtins", "collections.abc") else []
    return list(dict.fromkeys([*own, *(one for argument in typing.get_args(hint) for one in classes(argument))]))


def no_class(value: str, of: list[type]) -> str:
    """That a path is none of these classes, and which is near it."""
    needed = " or ".join(dict.fromkeys(kind.__name__ for kind in of)) or "class"
    bases = {kind.__name__ for kind in of}
    every = {path.rpartition(".")[2]: path for kind in of for path in subclasses(kind)}
    known = {name: path for name, path in every.items() if name not in bases} or every
    found = f"there is no {needed} of this name" if imported(value) is None else f"this is no {needed}"
    if imported(value) is None and (near := closest(value.rpartition(".")[2], known)):
        return found + near.replace(name := near.split("'")[1], known[name])
    listed = ", ".join(list(known.values())[:LISTED])
    return f"{found}; {f'there are {listed}, and your own by their paths' if listed else 'its path must be importable'}"


def subclasses(kind: type) -> Iterator[str]:
    """Paths of a class and of all that are derived from it, which are public and can be made."""
    path = public_path(kind)
    if path is not None and not inspect.isabstract(kind):
        yield path
    derived: list[type] = type.__subclasses__(kind)
    for one in derived:
        yield from subclasses(one)


def public_path(cls: type) -> str | None:
    """The shortest path by which a class is public, ``None`` if there is none."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        # a module may be gone, and its classes still there
        listed = getattr(sys.modules.get(module), "__all__", ())
        if cls.__name__ in listed and not any(part.startswith("_") for part in parts[:end]):
            return f"{module}.{cls.__name__}"
    private = any(part.startswith("_") for part in (*parts, cls.__name__)) or parts[0] == __name__.partition(".")[0]
    return None if private or "<locals>" in cls.__qualname__ else f"{cls.__module__}.{cls.__qualname__}"
