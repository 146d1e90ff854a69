"""A user's mistakes end with a line, whatever found them; mistakes of a program with its traceback."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.text import Text

from f2d2_lightning.cli._configs import closest

KINDS = (
    *(ArgumentError, ValueError, TypeError, OSError, ImportError, FloatingPointError),
    MisconfigurationException,
)
OURS = Path(__file__).parents[1]
_NOISE = re.compile(r"^(Does not validate against any|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>)")
_LONGEST = 400
"""Characters of a value that a message repeats."""


@contextmanager
def in_a_line() -> Iterator[None]:
    """Let an error of a user end the process with 2 and its message, unless ``--debug`` was given."""
    try:
        yield
    except KINDS as error:
        if os.environ.get("F2D2_DEBUG") or not _is_a_users(error):
            raise
        Console(stderr=True).print("[bold red]error:[/]", Text(message_of(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


def _is_a_users(error: BaseException) -> bool:
    """Whether this package, or what reads arguments and configurations, found it."""
    if isinstance(error, (ArgumentError, MisconfigurationException, FileNotFoundError, PermissionError)):
        return True
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return OURS in raised.parents or "jsonargparse" in raised.parts or isinstance(error, ModuleNotFoundError)


def message_of(error: BaseException) -> str:
    """What is wrong, in a line."""
    if not isinstance(error, ArgumentError):
        return " ".join(str(error).split()) or type(error).__name__
    lines = [line.strip() for line in str(error).splitlines()]
    parts: list[str] = []
    for line in lines:
        if not line or _NOISE.match(line):
            continue
        text = line.removeprefix("- ")
        text = re.sub(r'^Parser key "([^"]*)":$', r"\1:", text)
        text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
        text = re.sub(r"^Problem with given class_path '([^']*)':$", r"\1:", text)
        parts.append(text[:_LONGEST])
    return " ".join(parts) + _suggestion(str(error))


def _suggestion(text: str) -> str:
    """What was probably meant."""
    if found := re.search(r"has no attribute '(\w+)'", text):
        module = re.search(r"module '([\w.]+)' has no attribute", text)
        return closest(found[1], dir(importlib.import_module(module[1]))) if module else ""
    if found := re.search(r"Option '(\w+)' is not accepted", text):
        # the innermost class is the last one before it
        path = re.findall(r"given class_path '([\w.]+)'", text[: found.start()])
        return closest(found[1], _arguments_of(path[-1])) if path else ""
    return ""


def _arguments_of(class_path: str) -> list[str]:
    package, _, name = class_path.rpartition(".")
    made: Callable = getattr(importlib.import_module(package), name)
    classes = inspect.getmro(made) if inspect.isclass(made) else (made,)
    return [parameter for part in classes for parameter in inspect.signature(part).parameters]


def parsed(parser: ArgumentParser, arguments: list[str]) -> Any:
    """Options of a command; an unknown one's error says what was probably meant."""
    with suggesting(parser):
        return parser.parse_args(arguments)


@contextmanager
def suggesting(*parsers: ArgumentParser) -> Iterator[None]:
    """Add to the error of an unknown option which one it resembles."""
    try:
        yield
    except ArgumentError as error:
        found = re.search(r"nrecognized arguments: --?([\w.\-]+)|Key '([\w.]+)' is not expected", str(error))
        if found is None:
            raise
        options = [option.lstrip("-") for parser in parsers for a in parser._actions for option in a.option_strings]
        raise ArgumentError(None, f"{error}{closest(found[1] or found[2], options)}") from error
