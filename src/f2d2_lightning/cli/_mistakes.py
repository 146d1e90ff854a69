"""How a command that fails ends: with a line, whatever found the mistake, and whoever's it is."""

from __future__ import annotations

import functools
import os
import re
import site
import sys
import sysconfig
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console
from rich.text import Text

from f2d2_lightning.cli._configs import UsageError
from f2d2_lightning.cli._given import Given, all_given, find
from f2d2_lightning.cli._parser_text import classes, imported, said

KINDS = (
    *(ArgumentError, ValueError, TypeError, OSError, ImportError, FloatingPointError, NotImplementedError),
    MisconfigurationException,
)
OURS = Path(__file__).parents[1]
LIBRARIES = tuple({*site.getsitepackages(), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))})
DEBUG = "--debug shows the traceback"
_TORCH = re.compile(r"In PyTorch 2\.6, we changed .*?(?:your use case: |$)")
"""Advice that nobody should follow."""
_within = ContextVar("within", default=False)
_LONGEST = 900
"""Characters of a message."""


class Refused(BaseException):
    """A class was not to be made of what it was given.

    No :class:`Exception`: the parser, which tries one type of a union after the other, would make a text of it.
    """

    def __init__(self, owner: str, names: Sequence[str], error: Exception, key: str) -> None:
        super().__init__(str(error))
        self.owner, self.names, self.error, self.key = owner, names, error, key


@contextmanager
def refusals(owner: str, arguments: Mapping[str, Any], key: str) -> Iterator[None]:
    """Say of an error where the arguments of a class stand: within :func:`in_a_line` it becomes a :class:`Refused`."""
    try:
        yield
    except Exception as error:
        if not _within.get() or isinstance(error, SIGTERMException):
            raise
        raise Refused(owner, list(arguments), error, key) from error


class Parser(LightningArgumentParser):
    """Lightning's, whose errors say where the arguments stand."""

    configuration: Mapping[str, Any] | None = None
    """What is being made."""

    def add_instantiator(self, instantiator: Callable, class_type: type, *args: Any, **kwargs: Any) -> None:
        @functools.wraps(instantiator)
        def make(cls: type, *values: Any, **named: Any) -> Any:
            arguments = {name: value for name, value in named.items() if name != "applied_instantiation_links"}
            with refusals(cls.__name__, arguments, _key_of(cls, arguments, self.configuration or {})):
                return instantiator(cls, *values, **named)

        super().add_instantiator(make, class_type, *args, **kwargs)


def _key_of(cls: type, arguments: Mapping[str, Any], configuration: Mapping[str, Any]) -> str:
    """Key of the class that is made, of several the one whose arguments are the same."""
    found: list[tuple[int, str]] = []

    def look(key: str, content: Any) -> None:
        if isinstance(content, list):
            for place, value in enumerate(content):
                look(f"{key}[{place}]", value)
        if not isinstance(content, Mapping):
            return
        path = content.get("class_path")
        inside = content if path is None else content.get("init_args") or {}
        if key and (set(content) == set(arguments) if path is None else imported(path) is cls):
            alike = sum(name in inside and inside[name] == value for name, value in arguments.items())
            found.append((alike, key if path is None else f"{key}.init_args"))
        for name, value in content.items():
            look(f"{key}.{name}" if key else name, value)

    look("", configuration)
    return max(found, key=lambda pair: pair[0], default=(0, ""))[1]


@contextmanager
def in_a_line(command: str = "", arguments: Sequence[str] = ()) -> Iterator[None]:
    """Let an error end the process with a line, unless ``--debug`` was given: with 2 if it is the user's."""
    token = _within.set(True)
    try:
        yield
    except (Exception, Refused) as error:
        if isinstance(error, (UsageError, SIGTERMException)):
            raise
        if os.environ.get("F2D2_DEBUG"):
            if isinstance(error, Refused):
                raise error.error from None
            raise
        code, line = _ending(error, command, arguments)
        Console(stderr=True).print("[bold red]error:[/]", Text(line), highlight=False, soft_wrap=True)
        sys.exit(code)
    finally:
        _within.reset(token)


def _ending(error: BaseException, command: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Status of the process, and what is wrong."""
    if isinstance(error, Refused):
        theirs = isinstance(error.error, KINDS) or _culprit(error.error)[0] != "user"
        line = _refusal(error, list(all_given(command, arguments)))
        return 2 if theirs else 1, line
    if isinstance(error, torch.OutOfMemoryError):
        return 1, f"memory is not enough: take a smaller batch_size ({message_of(error)})"
    return (2, message_of(error)) if _is_a_users(error) else (1, _unexpected(error))


def _refusal(refused: Refused, everything: Sequence[Given]) -> str:
    if not isinstance(refused.error, KINDS) and _culprit(refused.error)[0] == "user":
        return f"{refused.key or refused.owner} ({refused.owner}): {_unexpected(refused.error)}"
    message = message_of(refused.error)
    if not isinstance(refused.error, (ValueError, MisconfigurationException)):
        message = f"{type(refused.error).__name__}: {message}"
    keys = {name: f"{refused.key}.{name}".lstrip(".") for name in refused.names}
    given = {name: found for name, key in keys.items() if (found := find(key, None, everything)) is not None}
    # what the message names, else whose value it says; what was given before defaults
    named = [name for said in ("{}=", "{}") for name in (*given, *keys) if _says(message, name, said)]
    named += [name for name, of in given.items() if not named and _says(message, str(of.value))]
    if named and named[0] in given:
        return f"{keys[named[0]]}={given[named[0]].shown} ({given[named[0]].where}): {message}"
    if named:
        return f"{keys[named[0]]} ({refused.owner}): {message}"
    plain = [f"{name}={of.shown}" for name, of in given.items() if not isinstance(of.value, Mapping)]
    return f"{refused.key or refused.owner} ({refused.owner} of {', '.join(plain) or 'what it is given'}): {message}"


def _says(message: str, word: str, said: str = "{}") -> bool:
    """Whether a word is one of a message's."""
    return re.search(rf"(?<![\w.]){said.format(re.escape(word))}(?:(?<=\W)|(?!\w))", message) is not None


def _is_a_users(error: BaseException) -> bool:
    """Whether this package, or what reads arguments and configurations, found it, or the system refused a file."""
    if isinstance(error, (ArgumentError, MisconfigurationException, FileNotFoundError, PermissionError)):
        return True
    if isinstance(error, OSError) and error.filename is not None and _culprit(error)[0] != "user":
        return True
    if not isinstance(error, KINDS):
        return False
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return OURS in raised.parents or "jsonargparse" in raised.parts or isinstance(error, ModuleNotFoundError)


def _culprit(error: BaseException) -> tuple[str, str]:
    """Whose an unexpected error is, ``"user"``, ``"package"`` or ``"library"``, and the file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*LIBRARIES, "<"))]
    if not own:
        return "library", f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "no file"
    last = own[-1]
    path = Path(last.filename)
    if OURS not in path.parents:
        return "user", f"{os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path}:{last.lineno}"
    if path.parent == OURS / "cli" and frames[-1] is not last:
        return "library", f"{frames[-1].filename}:{frames[-1].lineno}"
    return "package", f"{path.relative_to(OURS.parent)}:{last.lineno}"


def _unexpected(error: BaseException) -> str:
    whose, place = _culprit(error)
    what = f"{type(error).__name__}: {message_of(error)}"
    if whose == "package":
        return f"{what} ({place}): a bug in f2d2_lightning, please report it; {DEBUG}"
    return f"{what} ({place}); {DEBUG}"


def message_of(error: BaseException) -> str:
    """What an error says, in a line."""
    text = _TORCH.sub("", " ".join(str(error).split()))
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...") or type(error).__name__


def parsed(parser: ArgumentParser, arguments: list[str]) -> Any:
    """Options of a command; an error says what was probably meant."""
    parser.allow_abbrev = False
    with suggesting(parser, (parser.prog or "").rpartition(" ")[2], arguments):
        options = parser.parse_args(arguments)
        # of a variable of a shell that was not set; as a path it would be the working directory
        for name in ("ckpt", "data", "out", "folder"):
            if options.get(name) == "":
                option = name if name == "folder" else f"--{name}"
                raise ArgumentError(None, f"argument {option}: expected a path or a name")
    return options


@contextmanager
def suggesting(parser: ArgumentParser, command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Say of the parser's errors where the mistake is, and what was probably meant."""
    everything = list(all_given(command, arguments))
    options = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    try:
        for given in everything:
            # the parser lets a key pass that it does not know, if there is nothing in it
            groups = any(option == given.key or option.startswith(f"{given.key}.") for option in options)
            if given.value in ({}, None) and not groups and not classes(hints.get(given.key.partition(".")[0])):
                raise ArgumentError(None, f"Option '{given.key}' is not accepted")
        yield
    except ArgumentError as error:
        raise ArgumentError(None, said(str(error), options, everything, hints)) from error
