"""Models in folders, as Hugging Face lays them out: ``config.json`` and ``model.safetensors``.

The configuration names classes of this package and their arguments as plain values; the weights are plain numbers. So
nothing in such a folder is run, and a folder from elsewhere can be read without trust.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from f2d2_lightning.checkpoints.trust import check_extent, check_sizes, find_class, said, within_size
from f2d2_lightning.flows.maps import Direction, FlowMap, JointMap
from f2d2_lightning.flows.paths import Path
from f2d2_lightning.nn.head import JointFlowMap
from f2d2_lightning.utils.configured import OBJECT, Configured, arguments_of, as_plain, public_name
from f2d2_lightning.utils.files import whole_file

__all__ = ["CONFIG", "WEIGHTS", "DataDescription", "from_pretrained", "read_description", "save_pretrained"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORMAT, _VERSION, _UNIT = "f2d2_lightning", 1, "nats per unit of time"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class DataDescription:
    """What a model was trained on, as far as using it needs to know."""

    shape: tuple[int, ...]
    """Of one state."""
    levels: int | None
    """Levels of the discrete data, for bits per dimension; ``None`` for continuous data."""
    low: float
    """Lower edge of the range that the levels fill."""
    high: float
    """Upper edge."""
    directions: str
    """Orders of time that the model was trained for, a name of :class:`~f2d2_lightning.Direction`."""
    unit: str = _UNIT
    """Of the divergence."""


def save_pretrained(
    model: FlowMap | JointMap,
    folder: str | FilePath,
    *,
    shape: Sequence[int] | None = None,
    levels: int | None = None,
    low: float = -1.0,
    high: float = 1.0,
) -> FilePath:
    """Write a flow map or a joint map to a folder, for :func:`from_pretrained`.

    For a trained module: ``save_pretrained(module.average, folder, shape=module.shape, levels=module.levels,
    low=module.low, high=module.high)``.

    Args:
        model: Made of classes of this package. It is seen to that it can be made again before anything is written.
        folder: Folder; made if there is none. Older files of the same names are replaced, each whole or not at all.
        shape: Shape of one state; by default that of the network.
        levels: Levels of the discrete data, ``None`` for continuous.
        low: Lower edge of their range.
        high: Upper edge.

    Returns:
        The folder.

    Raises:
        ValueError: If a part is of another class, or was changed in a way that its arguments do not say.
    """
    about = DataDescription(
        tuple(_shape(model) if shape is None else shape), levels, float(low), float(high), model.directions.label
    )
    content = {"model": _describe(model, "the model", {})}
    state = model.state_dict()
    content["replaced"] = _replaced(content, model)
    _check_again(content, model, state)
    tensors, shared = _once(state)
    folder = FilePath(folder)
    metadata = {"format": "pt", _FORMAT: json.dumps(asdict(about)), "shared": json.dumps(shared)}
    with whole_file(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata)
    with whole_file(folder / CONFIG) as partial:
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(about), **content}, indent=2)
        partial.write_text(text + "\n", encoding="utf-8")
    return folder


def from_pretrained(folder: str | FilePath, kind: type[Model] = JointFlowMap) -> Model:  # type: ignore[assignment]
    """The model that :func:`save_pretrained` wrote.

    Args:
        folder: A local folder.
        kind: Class expected; ``FlowMap`` for a map without a head.

    Returns:
        The model in evaluation mode, on the CPU, in the dtype that it was saved in.

    Raises:
        FileNotFoundError: If there is no such folder, or a file of it is missing.
        ValueError: If a file is damaged, names a class that is none of this package's, or the two do not fit.
    """
    content, about = _read(folder)
    path = FilePath(folder) / WEIGHTS
    try:
        # initial weights that are written over are no reason to draw other numbers afterwards
        with safe_open(path, framework="pt") as file, torch.random.fork_rng(devices=[]):
            return _filled(content, about, file, path, kind)
    except ValueError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    except Exception as error:  # a file that says what is not so fails anywhere
        raise ValueError(f"{folder} holds no model that can be read ({said(error)})") from error


def read_description(folder: str | FilePath) -> DataDescription:
    """What a saved model was trained on, without reading its weights.

    Raises:
        FileNotFoundError: If there is no such folder, or no configuration in it.
        ValueError: If the configuration is none.
    """
    return _read(folder)[1]


# --- what a model is made of ---


def _describe(value: Any, place: str, numbers: dict[int, int]) -> dict[str, Any]:
    """Class and arguments of an object; a second mention of the same object refers to the first."""
    if id(value) in numbers:
        return {"same_as": numbers[id(value)]}
    cls = type(value)
    name = public_name(cls)
    ours = name.startswith(f"{_FORMAT}.") and not cls.__name__.startswith("_")
    if not isinstance(value, (Configured, Path)) or not ours:
        raise ValueError(
            f"{place} is a {name}; only classes of f2d2_lightning can be made again from plain values. For a network "
            "of your own use an adapter and f2d2_lightning.checkpoints.save_joint, or keep the checkpoint"
        )
    arguments = {}
    for argument, given in arguments_of(value).items() if isinstance(value, Configured) else ():
        current = _attribute(value, argument)
        if argument == "directions":
            arguments[argument] = current.label
        elif given not in (OBJECT, None):
            arguments[argument] = given
        elif isinstance(current, (nn.Module, Path)):
            arguments[argument] = _describe(current, f"{argument} of {cls.__name__}", numbers)
        elif given is OBJECT and as_plain(current) is OBJECT:
            raise ValueError(f"{argument} of {cls.__name__} ({place}) is a {type(current).__name__}, no plain value")
        else:
            arguments[argument] = as_plain(current) if given is OBJECT else None
    numbers[id(value)] = len(numbers)
    return {"class": name, "number": numbers[id(value)], "arguments": arguments}


def _shape(model: nn.Module) -> Sequence[int]:
    """Shape of one state, from the model or from the network inside it."""
    part: Any = model
    while part is not None:
        if isinstance(getattr(part, "shape", None), tuple):
            return part.shape
        part = getattr(part, "flow_map", None) or getattr(part, "network", None)
    raise ValueError(f"a {type(model).__name__} does not say the shape of its states; give shape=(...)")


def _attribute(value: Any, name: str) -> Any:
    if hasattr(value, name):
        return getattr(value, name)
    # in a list, where its owner is another module
    held = getattr(value, f"_{name}", None)
    return held[0] if isinstance(held, list) and len(held) == 1 else None


def _make(description: Any, made: dict[int, Any]) -> Any:
    """Inverse of :func:`_describe`."""
    if isinstance(description, dict) and set(description) == {"same_as"}:
        if not isinstance(description["same_as"], (int, str)) or description["same_as"] not in made:
            raise ValueError(f"the configuration refers to object {description['same_as']!r:.20}, which comes later")
        return made[description["same_as"]]
    if not isinstance(description, dict) or set(description) != {"class", "number", "arguments"}:
        raise ValueError(f"the configuration has {description!r:.80} where an object's class and arguments are needed")
    cls, arguments = _class(description["class"]), description["arguments"]
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {cls.__name__} are a {type(arguments).__name__}")
    values = {
        name: _make(value, made) if isinstance(value, dict) and ("class" in value or "same_as" in value) else value
        for name, value in arguments.items()
    }
    check_sizes(cls, values)
    try:
        value = cls(**values)
    except Exception as error:  # whatever a constructor says of arguments that are not its own
        raise ValueError(f"the configuration's arguments do not fit {cls.__name__}: {said(error)}") from error
    made[description["number"]] = value
    return value


def _class(name: Any) -> type:
    try:
        cls = find_class(name) if str(name).startswith(f"{_FORMAT}.") else None
    except ValueError as error:
        raise ValueError(f"the configuration names what is not here, or no class: {said(error)}") from error
    if cls is None or not issubclass(cls, (Configured, Path)) or cls.__name__.startswith("_"):
        raise ValueError(
            f"the configuration names the class {name!r:.120}; only networks, heads, baselines and paths of "
            "f2d2_lightning are made from a configuration"
        )
    return cls


def _model(content: Mapping[str, Any]) -> Any:
    made: dict[int, Any] = {}
    model = _make(content.get("model"), made)
    replaced = content.get("replaced") or {}
    known = isinstance(model, (FlowMap, JointMap)) and isinstance(getattr(model, "directions", None), Direction)
    if not known or not isinstance(replaced, dict):
        raise ValueError("the configuration describes no flow map or joint map")
    for name, description in replaced.items():
        part = _make(description, made)
        try:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.get_submodule(name.rpartition(".")[2])
        except AttributeError as error:
            raise ValueError(f"the configuration replaces {name!r:.80}, and the model has no such part") from error
        setattr(owner, name.rpartition(".")[2], part)
    return model


def _replaced(content: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Parts that were put into the model after it was made."""
    plain = dict(_model(content).named_modules(remove_duplicate=False))
    changed: dict[str, Any] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{done}.") for done in changed)
        if not inside and name in plain and type(part) is not type(plain[name]):
            changed[name] = _describe(part, name, {})
            # numbers of their own, which nothing else refers to
            changed[name] = _renumbered(changed[name], f"{name}:")
    return changed


def _renumbered(description: Any, prefix: str) -> Any:
    if not isinstance(description, dict):
        return description
    return {
        key: f"{prefix}{value}" if key in ("number", "same_as") else _renumbered(value, prefix)
        for key, value in description.items()
    }


def _check_again(content: Mapping[str, Any], model: FlowMap | JointMap, state: Mapping[str, Tensor]) -> None:
    again = _model(content)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    others = {name: tuple(value.shape) for name, value in again.state_dict().items()}
    wrong = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if wrong or again.directions != model.directions:
        what = f"its weights {', '.join(wrong[:6])}" if wrong else f"its directions, {model.directions.label},"
        raise ValueError(
            f"the model was changed after it was made: {what} do not come back from the arguments of its classes; "
            "make it anew in its present form and load its state_dict"
        )
    parts = set(again.modules())
    for part in parts:
        for held in vars(part).values():
            if isinstance(held, list) and len(held) == 1 and isinstance(held[0], nn.Module) and held[0] not in parts:
                raise ValueError(
                    f"a {type(part).__name__} of the model reads a {type(held[0]).__name__} that is no part of it and "
                    "would not be saved; save the whole that has both"
                )


# --- weights ---


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and names of those that are the same tensor as another one's."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        identity = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and identity in first:
            shared[name] = first[identity]
            continue
        first[identity] = name
        # cloned: no two of them may overlap in a file
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, shared


def _filled(content: Mapping[str, Any], about: DataDescription, file: Any, path: FilePath, kind: type[Model]) -> Model:
    metadata = file.metadata() or {}
    if metadata.get(_FORMAT) != json.dumps(asdict(about)):
        raise ValueError(f"{path} and {CONFIG} are not of the same model; take both from one place")
    shared = _json(metadata.get("shared", "{}"), f"the list of shared weights in {path}")
    stored = set(file.keys())
    names = {name: name for name in stored} | {str(name): str(source) for name, source in shared.items()}
    dtypes = {file.get_slice(name).get_dtype() for name in stored}
    with _default_dtype(torch.float64 if "F64" in dtypes else torch.float32):
        numbers = sum(math.prod(file.get_slice(name).get_shape()) for name in stored)
        model = within_size(lambda: _model(content), len(names), numbers, str(path.parent))
    if not isinstance(model, kind):
        raise ValueError(f"{path.parent} holds a {type(model).__name__}, and a {kind.__name__} is asked for; see kind=")
    if model.directions.label != about.directions:  # type: ignore[union-attr]
        raise ValueError(f"{CONFIG} says directions={about.directions!r}, and makes a model of other ones")
    mine = model.state_dict(keep_vars=True)
    problems = [f"{name} is missing" for name in mine if names.get(name) not in stored]
    problems += [f"{name} has no place" for name in names if name not in mine]
    for name, value in mine.items():
        came = tuple(file.get_slice(names[name]).get_shape()) if names.get(name) in stored else tuple(value.shape)
        if came != tuple(value.shape):
            problems.append(f"{name} has shape {came}, and the model {tuple(value.shape)}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{path} does not fit {CONFIG}: {'; '.join(problems[:10])}{more}")
    with torch.no_grad():
        for name, value in mine.items():
            loaded = file.get_tensor(names[name])
            if loaded.is_floating_point() != value.is_floating_point():
                raise ValueError(f"{name} in {path} is of {loaded.dtype}, and {value.dtype} is needed")
            if loaded.dtype != value.dtype and loaded.is_floating_point():
                value.data = value.data.to(loaded.dtype)
            value.copy_(loaded)
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Constants that are computed when a network is made are computed as they were."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- the configuration ---


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} is a {type(content).__name__}, and an object with names is needed")
    return content


def _read(folder: str | FilePath) -> tuple[dict[str, Any], DataDescription]:
    folder = FilePath(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; a model of a hub is downloaded first: "
            f'folder = huggingface_hub.snapshot_download("{folder}"), then from_pretrained(folder)'
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; a saved model is {CONFIG} and {WEIGHTS} (save_pretrained)"
            )
    path = folder / CONFIG
    try:
        content = _json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    check_extent(content, str(path))
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise ValueError(
            f"{path} is of format {content.get('format')!r:.40}, version {content.get('version')!r:.20}; this version "
            f"reads {_FORMAT!r}, {_VERSION}: save it with save_pretrained, or update f2d2_lightning"
        )
    return content, _about(content, path)


def _about(content: Mapping[str, Any], path: FilePath) -> DataDescription:
    shape, levels, unit = content.get("shape"), content.get("levels"), content.get("unit")
    low, high = content.get("low"), content.get("high")
    # an integer may have more digits than a float, and a float be none
    edges = [edge for edge in (low, high) if isinstance(edge, (int, float)) and not isinstance(edge, bool)]
    numbers = len(edges) == 2 and all(abs(edge) < 1e300 for edge in edges)
    sides = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not numbers or not sides or not (levels is None or (type(levels) is int and levels > 1)) or unit != _UNIT:
        raise ValueError(
            f"{path} describes data of shape {shape!r:.60}, levels {levels!r:.20} in [{low!r:.20}, {high!r:.20}] and "
            f"divergences in {unit!r:.40}; a list of sizes, a number above 1 or null, two numbers and {_UNIT!r} are "
            "needed"
        )
    directions = Direction.parse(str(content.get("directions"))).label
    assert isinstance(shape, list) and low is not None and high is not None  # noqa: PT018
    return DataDescription(tuple(shape), levels, float(low), float(high), directions)
