"""Objects that remember what they were made with, so that they can be made again from plain values."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from f2d2_lightning.utils.checks import check_arguments

_KEPT = "_constructor_arguments"
OBJECT = ...
"""In the place of an argument that is no plain value; the object is an attribute of the same name."""


def public_name(cls: type) -> str:
    """Where users find a class: in the outermost package that has it. Files name this place, which goes on."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        package = ".".join(parts[:length])
        if vars(sys.modules.get(package, object)).get(cls.__qualname__) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def as_plain(value: Any) -> Any:
    """``value`` if it consists of numbers, text, lists and dictionaries, tuples as lists; else :data:`OBJECT`.

    Numbers and arrays of NumPy become Python's.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        items = [as_plain(item) for item in value]
        return OBJECT if OBJECT in items else items
    if type(value) is dict and all(type(key) is str for key in value):
        named = {key: as_plain(item) for key, item in value.items()}
        return OBJECT if OBJECT in named.values() else named
    return OBJECT


class Configured:
    """Mixin: remembers the plain arguments of the constructor; to be named after ``nn.Module``, if that is a base.

    Objects among the arguments are not kept: they are read again from the attributes of the same names when needed, so
    that what has been replaced since is seen.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        constructor = cls.__init__
        # a class of somebody else may annotate as it likes
        ours = str(getattr(constructor, "__module__", "")).startswith(f"{__name__.partition('.')[0]}.")
        try:
            signature = inspect.signature(cls.__init__)
            given = signature.bind(self, *args, **kwargs)
        except TypeError:
            # a copy is made without arguments and takes them from the original; a wrong call fails in __init__
            return self
        if ours:
            check_arguments(constructor, given.arguments)
        # defaults too: those of a later version may be others
        given.apply_defaults()
        _, *named = given.arguments.items()
        # past the attributes of nn.Module, which do not exist yet
        kept: dict[str, Any] = {}
        for name, value in named:
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                kept |= {key: as_plain(one) for key, one in value.items()}
            elif kind is not inspect.Parameter.VAR_POSITIONAL:
                kept[name] = as_plain(value)
        self.__dict__[_KEPT] = kept
        return self

    def configuration(self) -> dict[str, Any]:
        """Arguments of the constructor that would make it as it is: plain values, and objects as they are now."""
        found = {}
        for name, given in arguments_of(self).items():
            current = _attribute(self, name)
            if name == "directions":
                found[name] = current.label
            elif given is OBJECT or (given is None and isinstance(current, Configured)):
                found[name] = current
            else:
                found[name] = given
        return found


def arguments_of(module: Configured) -> Mapping[str, Any]:
    """Arguments of its constructor by name, with defaults; :data:`OBJECT` for objects."""
    return module.__dict__.get(_KEPT, {})


def _attribute(value: Any, name: str) -> Any:
    if hasattr(value, name):
        return getattr(value, name)
    # in a list, where its owner is another module
    held = getattr(value, f"_{name}", None)
    return held[0] if isinstance(held, list) and len(held) == 1 else None
