"""What was given to a command, and where: options, configurations, and variables of the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from f2d2_lightning.cli._configs import OPTIONS, config_options, read_config, shown_config


@dataclass(frozen=True)
class Given:
    """A value, and where it stands."""

    key: str
    """As :func:`short` has it."""
    value: Any
    where: str

    @property
    def shown(self) -> str:
        """The value, within a line."""
        text = " ".join((repr(self.value) if isinstance(self.value, str) else str(self.value)).split())
        return text if len(text) <= 80 else f"{text[:77]}..."


def short(key: str) -> str:
    """A key by what is common to all ways of writing it, without ``init_args`` and places in lists."""
    return ".".join(part.partition("[")[0] for part in key.strip("-+").split(".") if part != "init_args")


def variable(command: str, key: str) -> str:
    """Name of the variable that stands for an option."""
    return f"F2D2_{command}__{key.replace('.', '__')}".upper()


def with_variables(command: str, arguments: Sequence[str]) -> list[str]:
    """Options of a command, and those that only the environment gives, which hold over configurations."""
    start, options = variable(command, ""), []
    said = {short(text.partition("=")[0]) for text in arguments if text.startswith("-")}
    for name, value in sorted(os.environ.items()):
        key = name.removeprefix(start).lower().replace("__", ".")
        if name.startswith(start) and key and short(key) not in said:
            options.append(f"--{key}={value}")
    last = max((place + 1 for place, _ in config_options(arguments)), default=0)
    # a configuration goes before options, whichever has it
    configs = [text for text in options if text.partition("=")[0] in OPTIONS]
    return [*configs, *arguments[:last], *(text for text in options if text not in configs), *arguments[last:]]


def all_given(command: str, arguments: Sequence[str]) -> Iterator[Given]:
    """Everything that was given, in the order in which it is read."""
    configs = dict(config_options(arguments))
    for place, text in enumerate(arguments):
        name, equals, value = text.partition("=")
        if place in configs:
            content = read_config(configs[place])
            yield from _nested("", content, f"in {shown_config(configs[place])}")
        elif name.startswith("-") and name not in OPTIONS:
            following = "".join(arguments[place + 1 : place + 2])
            if not equals and not following.startswith("--"):
                value = following
            owner = variable(command, name.strip("-"))
            yield Given(short(name), value, owner if equals and os.environ.get(owner) == value else name)


def _nested(key: str, content: Any, where: str) -> Iterator[Given]:
    if key:
        yield Given(short(key), content, where)
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _nested(f"{key}.{name}" if key else str(name), value, where)
    elif isinstance(content, list):
        for value in content:
            if isinstance(value, (Mapping, list)):
                yield from _nested(f"{key}[]", value, where)


def find(key: str, value: str | None, everything: Sequence[Given]) -> Given | None:
    """What was given of a key: of several the one with this value, or the last one."""
    found = [given for given in everything if given.key == short(key)]
    named = [given for given in found if str(given.value) == value]
    return named[-1] if named else found[-1] if found else None
