"""``f2d2 init``: configurations for one's own data, by what the data are."""

from __future__ import annotations

import itertools
import math
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from f2d2_lightning.cli._common import imported, say
from f2d2_lightning.cli._configs import closest
from f2d2_lightning.cli._mistakes import in_a_line, parsed
from f2d2_lightning.cli._networks import OwnNetwork, try_network
from f2d2_lightning.cli._points import DATA
from f2d2_lightning.data.images._files import decoded
from f2d2_lightning.data.images._stores import image_rows, open_store
from f2d2_lightning.data.rows import KINDS, holds_pairs
from f2d2_lightning.data.table import Table
from f2d2_lightning.likelihood.quantization import extremes
from f2d2_lightning.utils.files import whole_file

SMALL, MEDIUM, FEW = 8, 256, 2_000
"""Dimensions up to which a small perceptron, and a perceptron at all, is the network; training points below which it
drops units."""
LOOKED_AT, LARGEST = 64, 64
"""Images that are opened to see what they are, and the side to which larger ones are resized."""
TRIED = 9
"""States that a network is tried on, at least."""


def network(shape: Sequence[int], count: int, levels: int | None) -> tuple[str, dict[str, Any]]:
    """The backbone for ``count`` states of a shape, as the name of a class of ``nn`` and its arguments.

    By dimension a small perceptron, a wide one or a U-Net; with dropout where points are few (docs/RECIPE.md).
    """
    dim, dropout = math.prod(shape), 0.3 if count < FEW else 0.0
    sizes: dict[str, Any] = {}
    if dim > MEDIUM and len(shape) == 3:
        # a side is halved by the patches and once more inside
        halves = sum(all(side % 2**k == 0 for side in shape[1:]) for k in (1, 2))
        sizes = {"levels": levels, "width": 32, "blocks": 1, "patch": 2 if halves == 2 else 1}
        sizes |= {} if halves else {"multipliers": [1]}
        return "PreconditionedUNet", {"shape": list(shape), **sizes, "dropout": dropout}
    if dim < 64:
        sizes = {"width": 128 if dim <= SMALL else 256, "blocks": 3, "expansion": 2}
    return "PreconditionedMLP", {"shape": list(shape), **sizes, "dropout": dropout}


def batch_size(dim: int) -> int:
    """States of a training batch."""
    return 256 if dim <= MEDIUM else 64


def lengths(dim: int, count: int) -> tuple[int, int]:
    """Training steps of teacher and student. A teacher of few points stops before it knows them by heart.

    So does the student of few images, whose steps cost most.
    """
    teacher, student = 3_000 if dim < 64 else 2_500, 9_000 if dim <= MEDIUM else 2_500
    few = max(500, 4 * count)
    return min(teacher, few), min(student, few) if dim > MEDIUM else student


def init_command(arguments: list[str]) -> None:
    """``f2d2 init``: look at data, and write a teacher's and a student's configuration."""
    about = "Look at data, and write the configurations of a teacher and of its student to a folder."
    parser = ArgumentParser(prog="f2d2 init", exit_on_error=False, description=about)
    parser.add_argument("folder", type=str, help="where to write teacher.yaml and student.yaml; runs go there as well")
    data = f"a folder (or zip) of images; a table: .csv, .tsv, .npy or .npz with x; or {', '.join(DATA)}"
    parser.add_argument("--data", type=str, required=True, help=data)
    parser.add_argument("--size", type=PositiveInt | None, default=None, help="side that images are brought to, pixels")
    network = (
        "class of your own network, such as my_net.Net, which answers a velocity, shape of x, of states x at time s, "
        "0 for noise and 1 for data, and if it takes two times of the time t to go to; how it is called is found by "
        "trying"
    )
    parser.add_argument("--network", type=str | None, default=None, help=network)
    call = 'how that network is called, if it is not found: "net(x, s)"'
    parser.add_argument("--call", type=str | None, default=None, help=call)
    parser.add_argument("--network_args", type=dict | None, default=None, help="arguments of that network, as JSON")
    parser.add_argument("--overwrite", type=bool, default=False, help="write over configurations that are there")
    with in_a_line():
        _init(parsed(parser, arguments))


def _init(options: Any) -> None:
    folder = Path(options.folder)
    files = {name: folder / f"{name}.yaml" for name in ("teacher", "student")}
    there = [str(path) for path in files.values() if path.exists()]
    if there and not options.overwrite:
        raise FileExistsError(f"{' and '.join(there)} are there; give another folder, or --overwrite true")
    found = _look_at(options.data, options.size)
    dim = math.prod(found.shape)
    steps = lengths(dim, found.count)
    own = None if options.network is None else _own_network(options, found)
    package = (options.network or "").partition(".")[0]
    models = _models(found, own, folder / "teacher" / "checkpoints" / "last.ckpt")
    if own is not None:
        for model in models.values():
            # of an adapted network only the data say it
            model["init_args"]["shape"] = list(found.shape)
        # the network's code is yours, which the teacher's file may name
        models["student"]["init_args"]["trust"] = [package]
    data = found.data | {"init_args": found.data["init_args"] | {"batch_size": batch_size(dim)}}
    comments = {
        "teacher": f"Flow-matching teacher on {options.data}: {found.said}.",
        "student": "Few-step student of teacher.yaml: samples and log-likelihoods in 1 to 8 evaluations.",
    }
    for (name, path), length in zip(files.items(), steps, strict=True):
        with whole_file(path) as partial:
            partial.write_text(_written(comments[name], models[name], data, length, folder, name), encoding="utf-8")
    say(f"{options.data}: {found.said}; {found.count:,} to train on")
    if own is not None:
        say(f"{options.network}: {own.said}")
    say(f"wrote {files['teacher']} and {files['student']}. Next:")
    last = folder / "student" / "checkpoints" / "last.ckpt"
    trust = [] if own is None else ["--trust", package]
    for command in (
        *(["fit", "--config", path] for path in files.values()),
        ["test", "--config", files["student"], "--ckpt_path", "last"],
        ["nll", "--ckpt", last, "--data", options.data, "--steps", 4, "--out", folder / "nll.csv", *trust],
    ):
        say(f"  {shlex.join(map(str, ('f2d2', *command)))}")


def _written(comment: str, model: dict[str, Any], data: dict[str, Any], steps: int, folder: Path, name: str) -> str:
    """A configuration."""
    content = {
        "seed_everything": 0,
        "model": model,
        "data": data,
        "trainer": {
            "max_steps": steps,
            # batches are few or many: validation comes ten times in either case
            "val_check_interval": max(1, steps // 10),
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "logger": {
                "class_path": "f2d2_lightning.callbacks.RunLogger",
                "init_args": {"save_dir": str(folder.parent), "name": folder.name, "version": name},
            },
        },
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    return f"# {' '.join(comment.split())}\n{text}"


def _own_network(options: Any, found: _Found) -> OwnNetwork:
    """A network of one's own, tried on states of the data."""
    module = imported(found.data["class_path"], "--data")(**found.data["init_args"])
    states = module.dataset("train")
    # so many that no axis of a state is as long
    count = next(number for number in itertools.count(TRIED) if number not in found.shape)
    x = states.__getitems__([row % len(states) for row in range(count)])
    with warnings.catch_warnings():
        # torch, of itself, when it first differentiates
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        return try_network(options.network, options.network_args, options.call, x)


def _models(found: _Found, own: OwnNetwork | None, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Teacher and student, as their configurations say them."""
    name, sizes = network(found.shape, found.count, found.levels)
    flow_map: dict[str, Any] = {"class_path": f"f2d2_lightning.nn.{name}", "init_args": sizes}
    teacher: dict[str, Any] = {"flow_map": flow_map if own is None else own.teacher}
    student: dict[str, Any] = {"teacher": str(checkpoint)}
    if own is not None and not own.two_times:
        if own.student is None:
            # the teacher's units may be dropped, its targets are the same at every step
            sizes["dropout"] = 0.0
            student["warm_start"] = False
        student["flow_map"] = own.student or flow_map
    if own is not None and own.mode != "forward":
        mode = {"init_args": {"mode": own.mode}}
        teacher["reference"] = {"class_path": "f2d2_lightning.Reference", **mode}
        student["estimator"] = {"class_path": "f2d2_lightning.Hutchinson", **mode}
    return {
        "teacher": {"class_path": "f2d2_lightning.FlowMatchingModule", "init_args": teacher},
        "student": {"class_path": "f2d2_lightning.F2D2Module", "init_args": student},
    }


# --- what data are, seen by looking at some of them ---


@dataclass(frozen=True)
class _Found:
    """What data are."""

    shape: tuple[int, ...]
    count: int
    """To train on."""
    levels: int | None
    data: dict[str, Any]
    """The data module, as a configuration says it."""
    said: str


def _look_at(data: str, size: int | None) -> _Found:
    """What data are, by the name of a data module, or a file or folder; ``size`` is the side that images get."""
    path = Path(data)
    if data not in DATA and not path.exists():
        raise FileNotFoundError(
            f"--data is {data}, and there is no such file or folder{closest(data, _beside(path))}; a folder of images, "
            f"a {', '.join(KINDS)} file, or one of {', '.join(DATA)} is needed"
        )
    if data in DATA and not path.exists():
        module = imported(DATA[data], "--data")()
        count = len(module.dataset("train"))
        what = {"class_path": DATA[data], "init_args": {}}
        return _Found(tuple(module.shape), count, module.levels, what, f"states of shape {tuple(module.shape)}")
    if path.is_dir() or path.suffix.lower() == ".zip":
        return _look_at_images(path, size)
    if path.suffix.lower() in KINDS:
        return _look_at_rows(path)
    raise ValueError(
        f"--data is {data}; a folder of images, a {', '.join(KINDS)} file, or one of {', '.join(DATA)} is needed"
    )


def _beside(path: Path) -> list[str]:
    """What is in the folder that a path names, as it names it."""
    return [str(other) for other in itertools.islice(path.parent.iterdir(), 1000)] if path.parent.is_dir() else []


def _look_at_rows(path: Path) -> _Found:
    if holds_pairs(path):
        raise ValueError(
            f"{path} holds pairs, theta and x, which are trained on in Python, by f2d2_lightning.data.Pairs "
            "(docs/POSTERIORS.md); for x alone, leave theta out of the file"
        )
    table = Table(str(path))
    parts = [values for values, _ in table.splits().values()]
    floating = parts[0].is_floating_point()
    lowest, highest = (0, 0) if floating else extremes(torch.cat(parts))
    if lowest < 0:
        raise ValueError(
            f"{path} holds integers {lowest} to {highest}; images are levels from 0 on: add {-lowest}, or give "
            "floating numbers, with noise added over each level's width"
        )
    count, shape = sum(map(len, parts)), table.shape
    # 8 bits, unless the numbers say otherwise
    eight_bit = floating or 128 <= highest < 256
    levels = None if floating else 256 if eight_bit else highest + 1
    arguments: dict[str, Any] = {"path": str(path)} | ({} if eight_bit else {"levels": levels})
    what = {"class_path": "f2d2_lightning.data.Table", "init_args": arguments}
    more = "standardised by those to train on" if floating else f"{levels} levels"
    said = f"{count:,} {'rows' if floating else 'images'} of shape {shape}, {more}"
    return _Found(shape, len(parts[0]), levels, what, "; ".join((said, *table.said)))


def _look_at_images(path: Path, size: int | None) -> _Found:
    store = open_store(path)
    rows = image_rows(store)
    sizes, colours = set(), False
    with store.opened() as read:
        for row in rows[:: max(1, len(rows) // LOOKED_AT)]:
            image = decoded(read(row), store.where(row), "RGB", convert=True)
            sizes.add(image.size)
            # grey images may be stored as RGB
            red, green, blue = image.split()
            colours = colours or not red.tobytes() == green.tobytes() == blue.tobytes()
    smallest = min(min(pair) for pair in sizes)
    # sides that a network can halve twice
    side = size or max(4, min(LARGEST, smallest) // 4 * 4)
    init: dict[str, Any] = {"folder": str(path), "size": side, "channels": 3 if colours else 1}
    resized = ""
    if sizes != {(side, side)}:
        init |= {"crop": "square", "resize": "bicubic"}
        resized = f", their middle brought to {side} x {side} pixels (--size says another)"
    init |= {"convert": True}
    held_out = max(1, min(1000, len(rows) // 10))
    if len(rows) < 3:
        raise ValueError(f"{path} holds {len(rows)} images; at least 3 are needed, to train, validate and test on")
    init |= {"val": held_out, "test": held_out}
    shape = (init["channels"], side, side)
    said = f"{len(rows):,} {'colour' if colours else 'grey'} images{resized}"
    what = {"class_path": "f2d2_lightning.data.ImageFolder", "init_args": init}
    return _Found(shape, len(rows) - 2 * held_out, 256, what, said)
