"""Entry point of ``f2d2``: what must answer at once. Commands are imported when they are given, and torch with them."""

from __future__ import annotations

import importlib
import os
import sys

from f2d2_lightning.cli._completion import completion
from f2d2_lightning.cli._configs import UsageError, closest, described_configs, with_configs
from f2d2_lightning.cli._given import with_variables

USAGE = """usage: f2d2 COMMAND ...

commands:
  init       write configurations for your own data:  f2d2 init my_run --data images/
  fit        train a teacher or a student:  f2d2 fit --config my_run/teacher.yaml
             the same command goes on with a run that was interrupted
  test       likelihoods beside the teacher's, a table, pictures:  f2d2 test --config ... --ckpt_path last
  validate   the same of validation data, without a report
  predict    log-likelihoods of a run's own test data, in a table:  f2d2 predict --config ... --ckpt_path last
  nll        log-likelihood of every sample of any data:  f2d2 nll --ckpt ... --data digits --steps 4 --out nll.csv
  sample     draw samples:  f2d2 sample --ckpt ... --steps 2 --num 64 --out grid.png
  configs    list the configurations that come with the package:  f2d2 fit --config digits_teacher
  completion teach bash or zsh to complete all this:  eval "$(f2d2 completion bash)"

f2d2 COMMAND --help shows the options of a command, f2d2 fit --print_config a whole configuration.
Hyphens will do for underscores. Variables stand for options: F2D2_FIT__TRAINER__MAX_STEPS=3 f2d2 fit --config ...
Errors are a line; --debug, or F2D2_DEBUG=1, shows where they come from. f2d2 --version."""

_LIGHTNING = ("fit", "validate", "test", "predict")
_OTHERS = ("init", "nll", "sample")
_COMMANDS = (*_LIGHTNING, *_OTHERS, "configs", "completion")


def _underscored(text: str) -> str:
    """An option whose words may be joined by hyphens, ``--batch-size=8``, as it is called."""
    name, equals, value = text.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name[2:3].isalpha() and name.startswith("--") else text


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``f2d2``."""
    given = [_underscored(text) for text in (sys.argv[1:] if arguments is None else arguments)]
    if "--debug" in given:
        given.remove("--debug")
        os.environ["F2D2_DEBUG"] = "1"
    command, rest = (given[0], given[1:]) if given else ("--help", [])
    try:
        if command in ("-h", "--help", "help"):
            print(USAGE)
        elif command in ("-V", "--version"):
            from f2d2_lightning import __version__

            print(f"f2d2 {__version__}")
        elif command == "configs":
            if rest:
                raise UsageError(f"f2d2 configs takes no arguments, and {rest[0]!r} was given")
            print(described_configs())
        elif command == "completion":
            print(completion(" ".join(rest) or "bash", _COMMANDS))
        elif command in _OTHERS:
            rest = with_variables(command, rest)
            module = importlib.import_module(f"f2d2_lightning.cli.{command}")
            getattr(module, f"{command}_command")(rest)
        elif named := [text for text in (given if command.startswith("-") else [command]) if text in _LIGHTNING]:
            place = given.index(named[0]) + 1
            given = with_configs([*given[:place], *with_variables(named[0], given[place:])])
            from f2d2_lightning.cli._main import lightning_command

            lightning_command(named[0], given)
        elif command.startswith("-"):
            raise UsageError(f"{command} belongs to a command, such as f2d2 fit {command}; f2d2 --help lists them")
        else:
            raise UsageError(f"there is no command {command!r}{closest(command, _COMMANDS)}; f2d2 --help lists them")
    except UsageError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
