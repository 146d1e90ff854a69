"""Configurations that come with the package, by their names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

OPTIONS = ("--config", "-c")
SAID_OTHERWISE = (*OPTIONS, "--model", "--help", "-h", "--print_config")
"""Beginnings of what tells a command of training what to do, or asks it what it can."""


class UsageError(ValueError):
    """Of who typed a command: a line, and no traceback."""


def closest(given: str, known: Iterable[str]) -> str:
    """``"; did you mean 'fit'?"``, or nothing where nothing is near."""
    found = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def config_names() -> dict[str, Path]:
    """``"digits_teacher"``, ``"strategies/ddp"``, ... and their files."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    # in the installed package, or at the top of the repository that it was installed from
    folder = inside if inside.is_dir() else package.parents[1] / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def described_configs() -> str:
    """A line each: name, and what the first comment of the file says."""
    names = config_names()
    width = max(map(len, names), default=0)
    lines = ["configurations, for f2d2 COMMAND --config NAME [--config NAME ...]:"]
    for name, path in names.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"  {name:{width}}  {first.lstrip('# ').rstrip() if first.startswith('#') else ''}")
    return "\n".join(lines)


def find_config(given: str) -> str:
    """A file as it was given, else that of a name; :class:`UsageError` if there is neither."""
    # in a clone, configs/NAME.yaml is a file, and elsewhere the same words mean the same
    name = given.removesuffix(".yaml").removesuffix(".yml").removeprefix("./").removeprefix("configs/")
    if _is_text(given) or Path(given).is_file():
        return given
    names = config_names()
    if name in names:
        return str(names[name])
    if given and Path(given).is_dir():
        inside = sorted(Path(given).glob("*.yaml"))
        raise UsageError(
            f"--config {given} is a folder; give a file{f', such as {inside[0]}' if inside else ' in YAML'}"
        )
    # an empty one, of a variable of a shell that was not set, has no folder
    beside = Path(given).parent.glob("*.y*ml") if given else ()
    near = closest(given, map(str, beside)) or closest(name, names)
    raise UsageError(
        f"--config {given or repr(given)} is no file, and no configuration of the package has that name{near}; "
        "f2d2 configs lists them, f2d2 init writes one for your own data"
    )


def shown_config(path: object) -> str:
    """What ``--config`` may say for a file: its name, where it comes with the package."""
    return next((name for name, file in config_names().items() if str(file) == str(path)), str(path))


def config_options(arguments: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Where configurations are named among the arguments of a command, and how."""
    numbered = enumerate(arguments)
    for place, text in numbered:
        name, equals, value = text.partition("=")
        if name in OPTIONS and equals:
            yield place, value
        elif name in OPTIONS:
            yield from itertools.islice(numbered, 1)


def with_configs(arguments: list[str]) -> list[str]:
    """Arguments of a command, whose configurations may be named; :class:`UsageError` without one, or a model."""
    if not arguments[0].startswith("-") and not any(text.startswith(SAID_OTHERWISE) for text in arguments):
        raise UsageError(
            f"f2d2 {arguments[0]} needs a configuration: --config NAME (f2d2 configs lists those of the package) or "
            "--config FILE; for your own data f2d2 init my_run --data FILE_OR_FOLDER writes one"
        )
    found = list(arguments)
    for place, value in config_options(arguments):
        name, equals, _ = arguments[place].partition("=")
        path = find_config(value)
        read_config(path)
        found[place] = f"{name}={path}" if equals and name in OPTIONS else path
    return found


def read_config(path: str) -> dict[str, Any]:
    """Contents of a configuration, or of its text; :class:`UsageError`, which says where, if it is none."""
    said, text = f"--config {path}", path
    if not _is_text(path):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{said} is no text (byte {error.start}); a configuration in YAML is needed") from error
        except OSError as error:
            raise UsageError(f"{said} cannot be read: {error.strerror}") from error
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        tab = "; YAML is indented by spaces, and there is a tab" if "\t" in text else ""
        where = "" if mark is None else f", line {mark.line + 1}"
        raise UsageError(f"{said}{where}: this is no YAML ({' '.join(problem.split())}){tab}") from error
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "a word"
        what = "empty" if content is None else f"{kind}, {str(content)[:60]!r}"
        raise UsageError(f"{said} is {what}; a mapping is needed, such as 'trainer: {{max_steps: 1000}}'")
    return content


def _is_text(given: str) -> bool:
    """Whether a configuration is said itself, and not its file."""
    return "\n" in given or given.lstrip().startswith("{")
