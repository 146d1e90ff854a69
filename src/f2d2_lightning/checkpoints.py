"""Loading modules from Lightning checkpoints, with errors that say what is wrong."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch

__all__ = ["load_module"]

Module = TypeVar("Module", bound=L.LightningModule)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU, weights and plain values only: no code in it is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a Lightning checkpoint, is cut short, or holds more than plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}; train one (f2d2 fit --config ...) or correct the path"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain values: {error}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no 'state_dict'")
    return checkpoint


def load_module(path: str | Path, kind: type[Module], **kwargs: Any) -> Module:
    """A module from a checkpoint that ``f2d2 fit`` or a script wrote.

    The class is the one that the checkpoint names (``f2d2 fit`` saves it), else ``kind``.

    Args:
        path: Checkpoint.
        kind: Class expected; a subclass is fine.
        kwargs: Arguments that the checkpoint does not hold, such as network objects of a script.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, is of another class, or does not fit the class.
    """
    checkpoint = read_checkpoint(path)
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    name = hyper_parameters.get("_class_path")
    cls: type[Module] = kind
    if name is not None:
        package, _, attribute = str(name).rpartition(".")
        found = getattr(importlib.import_module(package), attribute)
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise ValueError(f"{path} is a checkpoint of {name}, but a {kind.__name__} is needed here")
        cls = found
    try:
        module = cls.load_from_checkpoint(path, map_location="cpu", weights_only=True, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{path} does not hold all that {cls.__name__} needs ({error}); pass the missing objects, as in "
            f"{cls.__name__}.load_from_checkpoint(path, flow_map=...)"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {cls.__name__}: {error}") from error
    return module.eval()
