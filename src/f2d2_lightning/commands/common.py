"""What the commands share: the model, the device, and how a mistake ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.markup import escape

from f2d2_lightning.checkpoints import load_module
from f2d2_lightning.modules import F2D2Module

__all__ = ["add_student", "find_device", "load_student", "run"]


def add_student(parser: ArgumentParser) -> None:
    """The options that :func:`load_student` reads."""
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of an F2D2Module")
    parser.add_argument(
        "--trust",
        type=str,
        nargs="*",
        default=[],
        help="packages whose classes the checkpoint may name, such as your own backbone's; others run nothing",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")


def load_student(options: Any) -> F2D2Module:
    """The model of a checkpoint, on the device that was asked for."""
    return load_module(options.ckpt, F2D2Module, trust=options.trust).to(find_device(options.device))


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
