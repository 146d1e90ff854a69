"""What the commands share: the device, and how a mistake ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.markup import escape

__all__ = ["find_device", "run"]


def find_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is a GPU where there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error


def run(command: Callable[[], None]) -> None:
    """A user's mistake ends with its message, not with a traceback."""
    try:
        command()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # names of files may look like markup
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
