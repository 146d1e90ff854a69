"""Configurations that come with the package, by their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

OPTIONS = ("--config", "-c")
SAID_OTHERWISE = (*OPTIONS, "--model", "--help", "-h", "--print_config")
"""Beginnings of what tells a command of training what to do, or asks it what it can."""


class UsageError(ValueError):
    """Of who typed a command: a line, and no traceback."""


def closest(given: str, known: Iterable[str]) -> str:
    """``"; did you mean 'fit'?"``, or nothing where nothing is near."""
    found = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def config_folder() -> Path:
    """Where they are: in the installed package, or at the top of the repository that it was installed from."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parents[1] / "configs"


def config_names() -> dict[str, Path]:
    """``"digits_teacher"``, ``"strategies/ddp"``, ... and their files."""
    folder = config_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def described_configs() -> str:
    """A line each: name, and what the first comment of the file says."""
    names = config_names()
    width = max(map(len, names), default=0)
    lines = [f"  {name:{width}}  {_first_line(path)}" for name, path in names.items()]
    return "\n".join(["configurations, for f2d2 COMMAND --config NAME [--config NAME ...]:", *lines])


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def find_config(given: str) -> str:
    """A file as it was given, else that of a name.

    Raises:
        UsageError: If there is neither.
    """
    # in a clone, configs/NAME.yaml is a file, and elsewhere the same words mean the same
    name = given.removesuffix(".yaml").removesuffix(".yml").removeprefix("./").removeprefix("configs/")
    if Path(given).is_file() or "\n" in given or given.lstrip().startswith("{"):
        return given
    names = config_names()
    if name in names:
        return str(names[name])
    raise UsageError(
        f"--config {given} is no file, and no configuration of the package has that name{closest(name, names)}; "
        "f2d2 configs lists them, f2d2 init writes one for your own data"
    )


def shown_config(path: object) -> str:
    """What ``--config`` may say for a file: its name, where it comes with the package."""
    return next((name for name, file in config_names().items() if str(file) == str(path)), str(path))


def with_configs(arguments: list[str]) -> list[str]:
    """Arguments of a command, whose configurations may be named.

    Raises:
        UsageError: If there are none, and no model either: says what to give.
    """
    if not arguments[0].startswith("-") and not any(text.startswith(SAID_OTHERWISE) for text in arguments):
        raise UsageError(
            f"f2d2 {arguments[0]} needs a configuration: --config NAME (f2d2 configs lists those of the package) or "
            "--config FILE; for your own data f2d2 init my_run --data FILE_OR_FOLDER writes one"
        )
    found = list(arguments)
    for place, text in enumerate(arguments):
        name, equals, value = text.partition("=")
        if name not in OPTIONS:
            continue
        if equals:
            found[place] = f"{name}={find_config(value)}"
        elif place + 1 < len(arguments):
            found[place + 1] = find_config(arguments[place + 1])
    return found
