"""``f2d2``: the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from f2d2_lightning.cli._entry import main

if TYPE_CHECKING:
    from f2d2_lightning.cli._main import F2D2CLI
    from f2d2_lightning.cli.init import init_command
    from f2d2_lightning.cli.nll import nll_command
    from f2d2_lightning.cli.sample import sample_command

__all__ = ["F2D2CLI", "init_command", "main", "nll_command", "sample_command"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = "_main" if name == "F2D2CLI" else name.removesuffix("_command")
    return getattr(importlib.import_module(f"{__name__}.{place}"), name)
