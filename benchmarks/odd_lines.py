"""Command lines with one mistake each, for ``odd_command_lines.py``: each command, each kind of mistake."""

from __future__ import annotations

import inspect
import json
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import yaml

import f2d2_lightning as f2
from f2d2_lightning.nn import PreconditionedMLP

LIGHTNING = ("fit", "validate", "test", "predict")
CODE = """
import lightning as L
import torch

import f2d2_lightning as f2


class Net(torch.nn.Module):
    pass


class Fails(f2.FlowMatchingModule):
    def training_step(self, batch, index):
        raise KeyError("of my own")


class Shapes(f2.FlowMatchingModule):
    def training_step(self, batch, index):
        return torch.zeros(2) @ torch.zeros(3)


class Broken(f2.FlowMatchingModule):
    def __init__(self, flow_map: f2.FlowMap):
        super().__init__(flow_map)
        raise RuntimeError("of my own")


class Level(L.Callback):
    def __init__(self, level: int = 3):
        if level < 3:
            raise ValueError(f"level {level} is too low")


class Hook(L.Callback):
    def on_train_batch_end(self, *args):
        raise AttributeError("of my own")
"""
BASE: dict[str, Any] = {
    "model": {
        "class_path": "f2d2_lightning.F2D2Module",
        "init_args": {
            "teacher": "teacher.ckpt",
            "flow_map": {
                "class_path": "f2d2_lightning.nn.PreconditionedMLP",
                "init_args": {"shape": [1, 8, 8], "width": 16, "blocks": 1},
            },
            "reference": {"class_path": "f2d2_lightning.Reference", "init_args": {"steps": 2}},
            "objective": {"class_path": "TrajectoryRegression", "init_args": {"capacity": 64, "nodes": 4}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {"class_path": "f2d2_lightning.data.Digits", "init_args": {"batch_size": 64, "eval_batch_size": 8}},
    "trainer": {"max_steps": 1, "fast_dev_run": 1, "accelerator": "cpu", "enable_progress_bar": False},
}
NETWORK, OPTIMIZER = "model.init_args.flow_map.init_args", "model.init_args.optimizer.init_args"
OBJECTIVE = "model.init_args.objective.init_args"

MISSPELLED = (
    *("trainer.max_step", "trainr.max_steps", "max_steps", "trainer.acelerator", "dta", "modl.init_args", "seed_all"),
    *("model.init_args.ema_dekay", "model.init_arg.ema_decay", f"{NETWORK}.widht", "data.init_args.bath_size"),
    *(f"{OBJECTIVE}.node", f"{OPTIMIZER}.learning_rate", "ckpt_pth", "checkpoint.every_n_steps"),
)
TYPES = {
    "trainer.max_steps": ("x", [1], 1.5),
    "trainer.fast_dev_run": ("maybe",),
    "trainer.accelerator": (7, "foo"),
    "trainer.callbacks": ("nothing", 3),
    "model.init_args.ema_decay": ("x", [0.1], {"a": 1}),
    "model.init_args.steps": ("x", ["a"], [1.5]),
    f"{NETWORK}.width": ("wide", 1.5),
    f"{NETWORK}.shape": ("round", ["a"], 8.5),
    f"{OBJECTIVE}.nodes": ("x", [1]),
    f"{OPTIMIZER}.lr": ("fast",),
    "data.init_args.batch_size": ("x", 1.5, [2], None),
    "seed_everything": ("x", [1]),
}
RANGES = {
    "trainer.max_steps": (-5,),
    "trainer.devices": (0, -3, "x"),
    "trainer.precision": (13,),
    "trainer.strategy": ("foo",),
    "trainer.limit_val_batches": (2.5, -1),
    "trainer.accumulate_grad_batches": (0,),
    "trainer.gradient_clip_algorithm": ("clip",),
    "trainer.profiler": ("foo",),
    "model.init_args.ema_decay": (2, -1),
    "model.init_args.steps": ([0], []),
    "model.init_args.warmup": (-1,),
    f"{NETWORK}.width": (0, -4),
    f"{NETWORK}.shape": ([], [0, 8, 8], [3, 8, 8]),
    f"{NETWORK}.dropout": (2,),
    f"{NETWORK}.directions": ("up",),
    f"{OBJECTIVE}.nodes": (0,),
    f"{OBJECTIVE}.capacity": (0,),
    f"{OPTIMIZER}.lr": (-1,),
    "model.init_args.reference.init_args.steps": (0,),
    "model.init_args.reference.init_args.method": ("leapfrog",),
    "data.init_args.batch_size": (0, -1),
    "data.init_args.levels": (0,),
    "seed_everything": (-1,),
}
CLASSES = {
    "model": ("F2D2Modul", "f2d2_lightning.F2D2Modul", "nowhere.Model", "f2d2_lightning.data.Digits", "mine.Net"),
    "data": ("Digts", "f2d2_lightning.data.Digts", "f2d2_lightnin.data.Digits", "f2d2_lightning.F2D2Module", "7"),
    "model.init_args.flow_map": ("PreconditionedMPL", "f2d2_lightning.nn.MPL", "torch.nn.Linear", "mine.Ne"),
    "model.init_args.objective": ("TrajectoryRegresion", "f2d2_lightning.nn.MLP", "Eulerain"),
    "model.init_args.optimizer": ("Adan", "torch.optim.AdamV", "torch.nn.Linear"),
    "trainer.callbacks": ("NoCallback", "mine.Leve", "f2d2_lightning.nn.MLP"),
    "trainer.logger": ("Loger", "f2d2_lightning.callbacks.RunLoger"),
}
TEXTS = {
    "empty": "", "comment": "# nothing\n", "list": "- 1\n- 2\n", "word": "hello", "number": "3",
    "tab": "trainer:\n\ta: 1\n", "bracket": "trainer: {max_steps: [1\n", "quote": "trainer: 'a\n",
    "colon": "trainer: a: b\n", "indent": "a: 1\n  b: 2\n", "anchor": "trainer: *none\n",
    "documents": "a: 1\n---\nb: 2\n",
}  # fmt: skip
OWN = {
    "model": ("mine.Fails", "mine.Shapes", "mine.Broken"),
    "trainer.callbacks": ("mine.Hook",),
}
TOOLS: dict[str, dict[str, Any]] = {
    "sample": {"ckpt": "student.ckpt", "out": "new.png", "num": 2, "steps": 1},
    "nll": {"ckpt": "student.ckpt", "data": "few.npy", "out": "new.csv", "steps": 1},
    "init": {"data": "rows.csv"},
}
FILES = (
    *("nowhere", "digts", "words.csv", "cut.npy", "empty.npy", "folder", "empty.csv", "binary.csv", "object.npy"),
    *("nan.npy", ""),
)
NETWORKS = ("nowhere.Net", "mine.Nt", "Net")
ODD: dict[str, dict[str, tuple[object, ...]]] = {
    "sample": {
        "steps": ("x", 0, -1, 1.5), "num": ("x", 0, -2), "seed": ("x", 1.5), "batch_size": (0, "x"),
        "label": ("cat", 3), "guidance_scale": ("x", "nan"), "guidance_method": ("newton",),
        "device": ("gpu9", "cuda:77"), "out": ("a.txt", "a", "folder", "there.png", ""), "overwrite": ("maybe",),
        "network": NETWORKS, "network_args": ("x", "[1]"), "flow_map": ("net",), "trust": ("nothing",),
    },
    "nll": {
        "steps": ("x", 0, 1.5), "draws": (0, "x"), "batch_size": (0, "x"), "seed": ("x",), "device": ("gpu9",),
        "data": (*FILES, "nowhere.npy", "a.Data", "digits:trian", "wide.npy", "binary.png"),
        "data_args": ("x", '{"bath": 1}'), "compare": ("digts", "nowhere.npy"), "compare_args": ('{"a": 1}',),
        "classes": ("a,a",), "out": ("a.txt", "folder", "there.csv"), "convert": ("maybe",), "reference": ("3",),
    },
    "init": {
        "data": (*FILES, "notes.txt"), "size": ("x", 1.5), "network": NETWORKS, "network_args": ("x",),
        "overwrite": ("maybe",),
    },
}  # fmt: skip
CHECKPOINTS = ("nowhere.ckpt", "empty.ckpt", "cut.ckpt", "binary.ckpt", "text.ckpt", "list.ckpt", "folder", "few.npy")


@dataclass
class Line:
    """A command line with one mistake."""

    command: str
    kind: str
    arguments: list[str]
    names: tuple[str, ...]
    """Of which the error names one: the key, or the value."""
    files: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    own: bool = False
    """Whether it is the user's own code that fails."""


def small(**more: Any) -> list[str]:
    return [*("--config", "base.yaml"), *(text for key, value in more.items() for text in (f"--{key}", str(value)))]


def nested(key: str, value: Any) -> str:
    """A configuration of one key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return yaml.safe_dump(value)


def of_lightning(command: str) -> Iterator[Line]:
    """Lines of a command that Lightning runs."""
    start = [command, *small(**({} if command == "fit" else {"ckpt_path": "student.ckpt"}))]

    def both(kind: str, key: str, value: Any, *names: str, own: bool = False) -> Iterator[Line]:
        text = value if isinstance(value, str) else json.dumps(value)
        last = key.rpartition(".")[2]
        yield Line(command, f"{kind}, option", [*start, f"--{key}={text}"], (last, *names), own=own)
        in_file = {"odd.yaml": nested(key, value)}
        yield Line(command, f"{kind}, file", [*start, "--config", "odd.yaml"], (last, *names), in_file, own=own)

    for key in MISSPELLED:
        yield from both("misspelled", key, 3)
    for key in ("dta", "trainer.max_step"):
        for value in ({}, None):
            yield Line(
                command, "nothing in it", [*start, "--config", "odd.yaml"], (key,), {"odd.yaml": nested(key, value)}
            )
    for kind, table in (("type", TYPES), ("range", RANGES)):
        for key, values in table.items():
            for value in values:
                yield from both(kind, key, value)
    for key, values in CLASSES.items():
        for value in values:
            yield from both("class", key, value, value)
            if key != "trainer.callbacks":
                yield from both("class path", f"{key}.class_path", value, value)
    for name, text in TEXTS.items():
        yield Line(command, "yaml", [*start, "--config", f"{name}.yaml"], (f"{name}.yaml",), {f"{name}.yaml": text})
    for path in ("nowhere.yaml", "bse.yaml", "digits_techer", "folder", "binary.ckpt", "few.npy", ""):
        yield Line(command, "config", [command, "--config", path], (path or "''",))
    for path in CHECKPOINTS:
        yield Line(command, "checkpoint", [command, *small(ckpt_path=path)], (path,))
        yield from both("teacher", "model.init_args.teacher", path, path)
    for extra in (["extra"], ["--foo"], ["--foo=3"], ["-x"], ["--trainer.max_steps"], ["--config"], ["---"], ["--=3"]):
        yield Line(command, "option", [*start, *extra], (extra[0].partition("=")[0], extra[0]))
    yield Line(command, "nothing given", [command], ("model",))
    for key in ("trainer.max_step", "model.ema_dekay", "dta"):
        name = f"F2D2_{command}__{key.replace('.', '__')}".upper()
        yield Line(command, "variable", start, (key.rpartition(".")[2],), variables={name: "3"})
    name = f"F2D2_{command}__TRAINER__MAX_STEPS".upper()
    yield Line(command, "variable", start, (name,), variables={name: "x"})
    if command == "fit":
        for value in OWN["model"]:
            model = {"class_path": value, "init_args": {"flow_map": BASE["model"]["init_args"]["flow_map"]}}
            files = {"odd.yaml": yaml.safe_dump({**BASE, "model": model})}
            yield Line(command, "own code", [command, "--config", "odd.yaml"], ("mine.py",), files, own=True)
        for value in OWN["trainer.callbacks"]:
            files = {"odd.yaml": nested("trainer.callbacks", [{"class_path": value}])}
            yield Line(command, "own code", [*start, "--config", "odd.yaml"], ("mine.py",), files, own=True)
        refused = [{"class_path": "mine.Level", "init_args": {"level": 1}}]
        yield from both("own refusal", "trainer.callbacks", refused, "level")


def of_a_tool(command: str) -> Iterator[Line]:
    """Lines of ``sample``, ``nll`` and ``init``."""
    good = TOOLS[command]

    def line(kind: str, changed: dict[str, Any], names: tuple[str, ...], *more: str) -> Line:
        options = [f"--{key}={value}" for key, value in {**good, **changed}.items() if value is not None]
        return Line(command, kind, [command, *(["new"] if command == "init" else []), *options, *more], names)

    for key, values in ODD[command].items():
        for value in values:
            # a part of the value is wrong: a split, an argument
            parts = [part for part in re.split(r"\W+", str(value)) if len(part) > 2]
            yield line("value", {key: value}, (key, *parts, *([str(value)] if value != "" else [])))
    for key in ODD[command]:
        for wrong in (key[:-1], f"{key}s", key[1:]):
            if wrong:
                yield line("misspelled", {}, (f"--{wrong}",), f"--{wrong}=1")
        yield line("without value", {}, (key,), f"--{key}")
    for key in good:
        if key in ("ckpt", "data"):
            yield line("missing", {key: None}, (key,))
    for more in ("extra", "--foo", "-x", "--config=base.yaml"):
        yield line("option", {}, (more.partition("=")[0],), more)
    for path in CHECKPOINTS if "ckpt" in good else ():
        yield line("checkpoint", {"ckpt": path}, (path,))
    if "ckpt" in good:
        yield line("checkpoint", {"ckpt": "teacher.ckpt"}, ("teacher.ckpt",))
    bad = line("variable", {}, ("F2D2", "SEEDS", "seeds"))
    bad.variables = {f"F2D2_{command}__SEEDS".upper(): "x"}
    yield bad


def lines() -> Iterator[Line]:
    """All of them."""
    for command in LIGHTNING:
        yield from of_lightning(command)
    for command in TOOLS:
        yield from of_a_tool(command)
    for arguments in (
        ["ft"],
        ["Fit"],
        ["trian"],
        ["fit2"],
        ["--foo"],
        ["-x"],
        ["configs", "x"],
        ["configs", "--foo"],
        [""],
    ):
        yield Line("f2d2", "command", arguments, (arguments[-1],))


TAKEN = {
    "trainer": L.Trainer,
    "model.init_args": f2.F2D2Module,
    NETWORK: PreconditionedMLP,
    OBJECTIVE: f2.TrajectoryRegression,
    OPTIMIZER: torch.optim.AdamW,
    "model.init_args.reference.init_args": f2.Reference,
    "data.init_args": f2.data.Digits,
}
"""What a configuration's arguments are those of."""
WAITING = ("devices", "num_nodes", "strategy", "plugins", "kwargs")
"""Arguments under which a run waits for other processes."""


def drawn(draw: random.Random) -> Line:
    """A line with a value, of whatever type, for one option of whatever command."""
    command = draw.choice((*LIGHTNING, *TOOLS))
    value = _value(draw)
    text = value if isinstance(value, str) else json.dumps(value)
    if command in TOOLS:
        key = draw.choice((*TOOLS[command], *ODD[command]))
        options = [f"--{name}={text if name == key else of}" for name, of in ({key: None} | TOOLS[command]).items()]
        return Line(command, "drawn", [command, *(["new"] if command == "init" else []), *options], _names(key, text))
    place = draw.choice((*TAKEN,))
    arguments = [name for name in inspect.signature(TAKEN[place]).parameters if name not in WAITING]
    key = f"{place}.{draw.choice(arguments)}"
    start = [command, *small(**({} if command == "fit" else {"ckpt_path": "student.ckpt"}))]
    if draw.random() < 0.5:
        return Line(command, "drawn, option", [*start, f"--{key}={text}"], _names(key, text))
    in_file = {"odd.yaml": nested(key, value)}
    return Line(command, "drawn, file", [*start, "--config", "odd.yaml"], _names(key, text), in_file)


def _names(key: str, text: str) -> tuple[str, ...]:
    parts = [part for part in re.split(r"\W+", text) if len(part) > 2]
    return (key.rpartition(".")[2], *parts, *([text] if text else []))


def _value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 2 else 6)
    if kind < 5:
        word = "".join(draw.choices(string.printable.strip() + " é", k=draw.randrange(6)))
        number = draw.choice((draw.uniform(-2, 2), 10.0 ** draw.randrange(-9, 9), float("nan"), float("inf")))
        return (None, draw.random() < 0.5, draw.randint(-3, 20), number, word)[kind]
    if kind == 5:
        return draw.choice(
            ("none", "nowhere.Net", "torch.nn.Linear", "few.npy", "folder", "student.ckpt", "1e-3", "[1")
        )
    many = [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return many if kind < 8 else {str(i) if draw.random() < 0.5 else "class_path": v for i, v in enumerate(many)}
