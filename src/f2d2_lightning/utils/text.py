"""Objects in a line of text."""

from __future__ import annotations

import enum
from typing import Any


def briefly(value: Any) -> str:
    """An object by its class and its settings: public attributes that are numbers, text or settings themselves."""
    plain = (bool, int, float, str, tuple, enum.Enum)
    said = {
        name: one
        for name, one in vars(value).items()
        if not name.startswith("_") and (isinstance(one, plain) or getattr(type(one), "__dataclass_params__", None))
    }
    return f"{type(value).__name__}({', '.join(f'{name}={one!r}' for name, one in said.items())})"
