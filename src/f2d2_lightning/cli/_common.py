"""What the commands share: the model, the device, and how a mistake ends."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap
from f2d2_lightning.cli._configs import closest
from f2d2_lightning.likelihood.model import JointModel, LikelihoodModel
from f2d2_lightning.modules import F2D2Module
from f2d2_lightning.modules.loading import load
from f2d2_lightning.utils.conditions import Cond, kind_of


def model_parser(command: str, description: str) -> ArgumentParser:
    """Of a command, with the options that :func:`load_model` reads."""
    parser = ArgumentParser(prog=f"f2d2 {command}", exit_on_error=False, description=description)
    checkpoint = (
        "checkpoint of an F2D2Module or of a module with an F2D2Callback; a folder that export wrote; a name on "
        "the Hugging Face hub; or digits, a model that comes with the package"
    )
    parser.add_argument("--ckpt", "--ckpt_path", type=str, required=True, help=checkpoint)
    network = "class path of the network that an F2D2Callback was on, if it is needed"
    parser.add_argument("--network", type=str, default=None, help=network)
    parser.add_argument("--network_args", type=dict, default=None, help="arguments of that network, as JSON")
    parser.add_argument("--flow_map", type=str, default=None, help="name of the network, where several were trained")
    trust = "packages whose classes the checkpoint may name, such as your own backbone's; others run nothing"
    parser.add_argument("--trust", type=str, nargs="*", default=[], help=trust)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def load_model(options: Any) -> LikelihoodModel:
    """The model of a checkpoint, on the device that was asked for."""
    device = find_device(options.device)
    network = None if options.network is None else _network(options.network, options.network_args)
    # files of one's own that are trusted, as fit found them
    with working_directory():
        model = load(options.ckpt, network, name=options.flow_map, trust=options.trust)
    if not isinstance(model, (F2D2Module, JointModel)):
        raise ValueError(
            f"{options.ckpt} is a checkpoint of {type(model).__name__}, but a F2D2Module is needed here: the teacher "
            "has no likelihoods in few steps (f2d2 test ... gives its own)"
        )
    return model.to(device)


def imported(path: str, option: str, needed: str = "") -> Any:
    """What a dotted path names, for the option that named it; else an error, which says what was ``needed``.

    The working directory is looked in last.
    """
    package, _, attribute = path.rpartition(".")
    try:
        with working_directory():
            module = importlib.import_module(package)
            return getattr(module, attribute)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{option} {path} cannot be imported ({error}){needed}; its package must be installed, on PYTHONPATH, or "
            "in the working directory"
        ) from error
    except AttributeError as error:
        raise ValueError(f"{option} {path}: {package} has no {attribute}{closest(attribute, dir(module))}") from error


@contextmanager
def working_directory() -> Iterator[None]:
    """Let modules of the working directory be imported, for a while, where no other has their name."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _network(class_path: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A network by the path of its class or of a function that makes it, named by the user and not by a file."""
    make = imported(class_path, "--network")
    try:
        made = make(**(arguments or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the network {class_path} cannot be made with {dict(arguments or {})}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{class_path} makes a {type(made).__name__}; a torch.nn.Module is needed")
    return made


def find_device(name: str) -> torch.device:
    """The device called ``name``, ``"auto"`` being a GPU where there is one; ``ValueError`` if it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error


def class_count(module: LikelihoodModel) -> int | None:
    """Number of classes of a model; ``None`` if its network does not say."""
    for part in module.joint_map.modules():
        table = getattr(part, "labels", None)
        if isinstance(table, nn.Embedding):
            # the last one may stand for no class
            return table.num_embeddings - int(getattr(part, "null_label", False) is True)
        if isinstance(part, AdaptedFlowMap) and part.adapter.classes is not None:
            return part.adapter.classes
    return None


def check_labels(module: LikelihoodModel, cond: Cond, source: str) -> None:
    """Refuse labels of a batch, from ``source``, that are none of the model's classes: integers ``(B,)`` in range."""
    count = class_count(module)
    adapters = [part.adapter for part in module.joint_map.modules() if isinstance(part, AdaptedFlowMap)]
    if count is None and all(adapter.null_label is None for adapter in adapters):
        return  # conditioning of another kind
    if not isinstance(cond, Tensor) or torch.is_floating_point(cond) or cond.ndim != 1:
        raise ValueError(
            f"{source} has labels of {kind_of(cond)}; the model takes class labels: integers, one a sample"
        )
    low, high = int(cond.min()), int(cond.max())
    if low < 0 or (count is not None and high >= count):
        expected = "labels count from 0" if count is None else f"the model is for {count} classes, 0 to {count - 1}"
        raise ValueError(f"{source} has labels {low} to {high}, but {expected}")


def say(message: str) -> None:
    """A line of text, whose names of files may look like markup and are none."""
    Console().print(Text(message), highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Something that the user should look at, where it does not end in a file of results."""
    Console(stderr=True).print("[bold yellow]warning:[/]", Text(message), highlight=False, soft_wrap=True)
