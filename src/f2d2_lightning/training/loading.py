"""Modules from Lightning checkpoints. Nothing that a checkpoint says is run; errors say what is wrong with it."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch

from f2d2_lightning.checkpoints.descriptions import make_model
from f2d2_lightning.checkpoints.trust import (
    build_arguments,
    called,
    check_extent,
    find_class,
    make,
    packages_of,
    said,
    stored_in,
    takes,
    within_size,
)
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.reference import Reference
from f2d2_lightning.nn.head import JointFlowMap
from f2d2_lightning.utils.arrays import check_stored_archive
from f2d2_lightning.utils.checks import ArgumentError

Module = TypeVar("Module", bound=L.LightningModule)
Described = TypeVar("Described", bound=L.LightningModule | L.LightningDataModule)

NO_CHECKPOINT = "is not a Lightning checkpoint: it has no 'state_dict'"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU, weights and plain values only: no code in it is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a Lightning checkpoint, is cut short, or holds more than plain values.
    """
    path = Path(path)
    _check_folder(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, as sharded checkpoints are; make one file of it: "
            "python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER"
        )
    checkpoint = _plain(path, path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"{path} {NO_CHECKPOINT}")
    return checkpoint


def look_into(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, of a folder of shards the part that is not sharded; weights stay on the disk.

    Errors are those of :func:`read_checkpoint`.
    """
    _check_folder(path)
    file = path / "meta.pt" if path.is_dir() else path
    content = _plain(path, file, mmap=zipfile.is_zipfile(file))
    if not isinstance(content, Mapping) or ("state_dict" not in content and path.is_file()):
        raise ValueError(f"{path} {NO_CHECKPOINT}")
    return content


def _check_folder(path: Path) -> None:
    """Refuse the folder of a run, of several, or of checkpoints, in the place of one of these."""
    inside = sorted(file for above in ("", "checkpoints/", "*/checkpoints/") for file in path.glob(f"{above}last.ckpt"))
    if inside:
        raise ValueError(f"{path} is a folder; name a checkpoint in it: {', '.join(map(str, inside[:8]))}")


def _plain(path: Path, file: Path, **kwargs: Any) -> Any:
    """What ``file`` of the checkpoint ``path`` holds, once it is seen to be whole: weights and plain values only."""
    if not (path.is_file() or path.is_dir()):
        remedy = "train one (f2d2 fit --config ...) or correct the path"
        raise FileNotFoundError(f"there is no checkpoint at {path}; {remedy}")
    what = "a checkpoint"
    try:
        _check_whole(path)
        what = "a checkpoint of plain values"
        return torch.load(file, map_location="cpu", weights_only=True, **kwargs)
    except Exception as error:  # a damaged file fails wherever its damage is
        raise ValueError(f"{path} cannot be read as {what}: {said(error)[:500]}{_older(path)}") from error


def _check_whole(path: Path) -> None:
    """Whether a checkpoint is whole; what it holds is not looked at."""
    if path.is_dir():
        # written last
        if not (path / ".metadata").is_file():
            raise ValueError("it is a folder of shards that was not finished")
        return
    if not zipfile.is_zipfile(path):
        # what torch.save wrote until 2020 has no checksums; anything else fails when it is loaded
        with path.open("rb") as file:
            start = file.read(2)
        if start in (b"", b"PK"):
            raise ValueError("it is empty or cut short")
        return
    check_stored_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, struct.error, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"it is damaged ({error})") from error
    if damaged is not None:
        raise ValueError(f"it is damaged: the checksum of {damaged} is another")


def _older(path: Path) -> str:
    """What to take in place of a damaged checkpoint."""
    others = [other for other in path.parent.glob("*.ckpt") if other != path]
    for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            _check_whole(other)
        except (ValueError, OSError):
            continue
        return f". The newest other one in its folder that is whole is {other}; use that (--ckpt_path {other})"
    return ""


def load_module(path: str | Path, kind: type[Module], *, trust: Sequence[str] = (), **kwargs: Any) -> Module:
    """A module from a checkpoint that ``f2d2 fit`` or a script wrote, in evaluation mode.

    The class is the one that the checkpoint names (``f2d2 fit`` saves it), else ``kind``, whose package is trusted.
    Only classes of this package, of ``torch.nn`` and ``torch.optim``, and of packages that you trust are made; no text
    becomes a function, and no file that the checkpoint names is opened (:mod:`f2d2_lightning.checkpoints.trust`).

    ``kwargs`` are arguments that the checkpoint does not hold, such as network objects of a script, or that replace
    its. A missing file is a ``FileNotFoundError``; one that is no checkpoint, or does not fit the class, a
    ``ValueError``.
    """
    return restore_module(read_checkpoint(path), path, kind, trust, None, kwargs).eval()


def restore_module(
    checkpoint: dict[str, Any],
    path: Any,
    kind: type[Module],
    trust: Sequence[str],
    strict: bool | None,
    given: Mapping[str, Any],
) -> Module:
    """A module from the contents of a checkpoint, as :func:`load_module`; in training mode."""
    cls, arguments, trust = described(checkpoint, path, kind, trust)
    tensors, numbers = stored_in(checkpoint["state_dict"], str(path))
    given = {**_objects(checkpoint, path, cls, {**arguments, **given}), **given}
    try:
        module = within_size(
            lambda: make(cls, build_arguments(cls, arguments, trust, given)), tensors, numbers, str(path)
        )
        _check_shape(module, numbers, path)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
    except ArgumentError as error:
        raise ValueError(f"{path} does not fit {cls.__name__}: {said(error)}") from error
    except ValueError:
        raise
    except TypeError as error:
        raise ValueError(
            f"{path} does not hold all that {cls.__name__} needs ({said(error)}); pass the missing objects, as in "
            f"{cls.__name__}.load_from_checkpoint(path, flow_map=...)"
        ) from error
    except Exception as error:  # whatever code says of values that are not its own
        raise ValueError(f"{path} does not fit {cls.__name__}: {said(error)}") from error
    return module


def _objects(checkpoint: dict[str, Any], path: Any, cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Objects that a script gave to a module, or a student took from its teacher, as the checkpoint describes them.

    Those that the class takes and that ``arguments`` lack. How a script's module was trained is not among them, and
    nothing of it is read. A network that would be looked for in another file has to be given.
    """
    accepted, teacher = takes(cls), arguments.get("teacher")
    given = arguments.get("flow_map") is not None or not (teacher is None or isinstance(teacher, (str, Path)))
    if given or not (accepted.others or "flow_map" in accepted.hints):
        # a teacher that is given has the network, and a class of one's own makes it
        return {}
    own: Any = checkpoint.get("f2d2")
    kept = own.get("objects") if isinstance(own, dict) else None
    if not isinstance(kept, dict) or "model" not in kept:
        if teacher is not None:
            raise ValueError(
                f"{path} does not describe its network, which was that of the teacher {teacher}; give it: flow_map=..."
            )
        return {}
    check_extent(kept, str(path))
    size = stored_in(checkpoint["state_dict"], str(path))
    model = within_size(lambda: make_model(kept["model"], {}), *size, str(path))
    if "_class_path" in checkpoint.get(L.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}):
        # all else is in the configuration
        return {"flow_map": model.flow_map if isinstance(model, JointFlowMap) else model}
    own.pop("objective", None)
    found = {"flow_map": model.flow_map, "head": model.head} if isinstance(model, JointFlowMap) else {"flow_map": model}
    kinds = {"reference": Reference} | ({"inversion": Inversion} if isinstance(model, JointFlowMap) else {})
    found |= {name: called(kind, kept[name], str(path)) for name, kind in kinds.items() if name in kept}
    taken = found if accepted.others else found.keys() & accepted.hints.keys()
    return {name: value for name, value in found.items() if name in taken and arguments.get(name) is None}


def described(
    checkpoint: Mapping[str, Any], path: Any, kind: type[Described], trust: Sequence[str]
) -> tuple[type[Described], dict[str, Any], tuple[str, ...]]:
    """Class of the module, or data module, of a checkpoint, its arguments as they stand there, and trust."""
    trust = (*trust, *packages_of(kind))
    arguments = checkpoint.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{path} has hyper-parameters of type {type(arguments).__name__}; a dictionary is expected")
    check_extent(arguments, str(path))
    arguments = {name: value for name, value in arguments.items() if name != "_instantiator"}
    name = arguments.pop("_class_path", None)
    cls = kind if name is None else find_class(name, trust)
    if not issubclass(cls, kind):
        raise ValueError(f"{path} is a checkpoint of {name}, but a {kind.__name__} is needed here")
    accepted = takes(cls)
    if name is None and not accepted.others:
        # whatever else a script kept among its hyper-parameters
        arguments = {key: value for key, value in arguments.items() if key in accepted.hints}
    return cls, arguments, trust


def _check_shape(module: Any, numbers: int, path: Any) -> None:
    """Refuse states that no network of the file's size is for: noise of their shape is drawn."""
    shape = getattr(module, "shape", ())
    if not all(type(side) is int and side > 0 for side in shape) or math.prod(shape) > 4 * numbers + 2**20:
        raise ValueError(f"{path} is for states of shape {shape!r:.80}, which is damaged, or meant to fill the memory")
