"""Models in folders, as Hugging Face lays them out: ``config.json`` and ``model.safetensors``.

The configuration names classes of this package and their arguments as plain values; the weights are plain numbers. So
nothing in such a folder is run, and a folder from elsewhere can be read without trust. A network of somebody else, in
an adapter, is given by who reads it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap, Adapter
from f2d2_lightning.checkpoints.descriptions import describe_model, given_places, make_model, own_state
from f2d2_lightning.checkpoints.trust import check_extent, said, within_size
from f2d2_lightning.flows.maps import Direction, FlowMap, JointMap
from f2d2_lightning.likelihood.error_bars import ErrorBars, kept_bars, read_bars
from f2d2_lightning.likelihood.units import Units
from f2d2_lightning.nn.head import Head, JointFlowMap
from f2d2_lightning.utils.checks import checked, counts, listed
from f2d2_lightning.utils.files import whole_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = FilePath(__file__).parent / "shipped"
"""Folders of models that come with the package, by their names."""
_LAYOUT = f"a saved model is a folder with {CONFIG} and {WEIGHTS} (save_pretrained)"
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


@checked
def save_pretrained(
    model: FlowMap | JointMap,
    folder: str | FilePath,
    *,
    shape: Sequence[int] | None = None,
    levels: int | None = None,
    low: float = -1.0,
    high: float = 1.0,
    network_state: Mapping[str, Any] | None = None,
    error_bars: Mapping[int, ErrorBars] | None = None,
    units: Units | None = None,
) -> FilePath:
    """Write a flow map or a joint map to a folder, for :func:`from_pretrained`.

    For a trained module: ``save_pretrained(module.average, folder, shape=module.shape, levels=module.levels,
    low=module.low, high=module.high, error_bars=module.error_bars)``, and ``units=data.units`` of a table. Of somebody
    else's network in an adapter, the weights are written, and how it is called; who reads the folder makes the network.

    Args:
        model: Made of classes of this package. It is seen to that it can be made again before anything is written.
        folder: Folder; made if there is none. Older files of the same names are replaced, each whole or not at all.
        shape: Shape of one state; by default that of the network.
        levels: Levels of the discrete data, ``None`` for continuous.
        low: Lower edge of their range.
        high: Upper edge.
        network_state: Weights of an adapted network, where they are sharded and had to be gathered; by default its own.
        error_bars: Of a model that was validated, by step count: ``module.error_bars``.
        units: Of the rows whose states the model knows: ``units`` of the data module, a ``Table`` or ``Pairs``. The
            commands then take and give rows in these units.

    Returns:
        The folder.

    Raises:
        ValueError: If a part is of another class, or was changed in a way that its arguments do not say; if units are
            of rows of another shape.
        FileExistsError: If ``folder`` is a file.

    >>> import tempfile
    >>> from f2d2_lightning.nn import MLP
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_pretrained(MLP((2,), width=8, blocks=1), folder)
    ...     sorted(path.name for path in saved.iterdir())
    ['config.json', 'model.safetensors']
    """
    about = DataDescription(
        counts("shape", state_shape(model) if shape is None else shape),
        None if levels is None else int(levels),
        float(low),
        float(high),
        model.directions.label,
    )
    content = describe_model(model) | ({"error_bars": kept_bars(error_bars)} if error_bars else {})
    if units is not None:
        if tuple(units.scale.shape) != about.shape:
            raise ValueError(f"units are of rows of shape {tuple(units.scale.shape)}, and states have {about.shape}")
        content["units"] = units.kept()
    tensors, shared = _once(whole_state(model, network_state))
    folder = FilePath(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file, and a model is saved as a folder; give another name, or remove it")
    metadata = {"format": "pt", _FORMAT: json.dumps(asdict(about)), "shared": json.dumps(shared)}
    with whole_file(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata)
    with whole_file(folder / CONFIG) as partial:
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(about), **content}, indent=2)
        partial.write_text(text + "\n", encoding="utf-8")
    return folder


@checked
def from_pretrained(
    folder: str | FilePath,
    kind: type[Model] = JointFlowMap,  # type: ignore[assignment]
    *,
    network: Callable[..., Any] | None = None,
    adapter: Adapter | None = None,
    head_network: nn.Module | None = None,
    head: Head | None = None,
) -> Model:
    """The model that :func:`save_pretrained` wrote.

    Args:
        folder: A local folder; or the name of a model that comes with the package, ``"digits"``; or a name
            ``user/model`` on the Hugging Face hub, which is downloaded (``pip install f2d2-lightning[hub]``).
        kind: Class expected; ``FlowMap`` for a map without a head.
        network: Somebody else's network that an adapter was made for, made as it was in training; it is filled with
            the weights of the file.
        adapter: The adapter, if it is none of :mod:`f2d2_lightning.adapters`.
        head_network: The head's network, if it had one of its own.
        head: The head, if its class is none of this package's.

    Returns:
        The model in evaluation mode, on the CPU, in the dtype that it was saved in; ``network`` stays in its own.

    Raises:
        FileNotFoundError: If there is no such folder, or a file of it is missing.
        ValueError: If a file is damaged, names a class that is none of this package's, or the two do not fit.

    >>> import tempfile
    >>> from f2d2_lightning.nn import MLP
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     from_pretrained(save_pretrained(MLP((2,), width=8, blocks=1), folder), FlowMap).shape
    (2,)
    """
    content, about, folder = _read(folder)
    given = {"network": network, "adapter": adapter, "head_network": head_network, "head": head}
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(_FORMAT) != json.dumps(asdict(about)):
                raise ValueError(f"{path} and {CONFIG} are not of the same model; take both from one place")
            shared = _json(metadata.get("shared", "{}"), f"the list of shared weights in {path}")
            stored = Stored(
                {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()},  # noqa: SIM118
                {str(name): str(source) for name, source in shared.items()},
                file.get_tensor,
                "F64" in {file.get_slice(name).get_dtype() for name in file.keys()},  # noqa: SIM118
            )
            model = fill(content, given, stored, str(path))
    except ValueError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    except Exception as error:  # a file that says what is not so fails anywhere
        raise ValueError(f"{folder} holds no model that can be read ({said(error)})") from error
    if not isinstance(model, kind):
        raise ValueError(f"{folder} holds a {type(model).__name__}, and a {kind.__name__} is asked for; see kind=")
    if model.directions.label != about.directions:  # type: ignore[union-attr]
        raise ValueError(f"{CONFIG} says directions={about.directions!r}, and makes a model of other ones")
    return model


@checked
def read_description(folder: str | FilePath) -> DataDescription:
    """What a saved model was trained on, without reading its weights.

    Raises:
        FileNotFoundError: If there is no such folder, or no configuration in it.
        ValueError: If the configuration is none.
    """
    return _read(folder)[1]


def read_error_bars(folder: str | FilePath) -> dict[int, ErrorBars]:
    """Error bars of a saved model by step count, if it was saved with some; errors as :func:`read_description`."""
    return read_bars(_read(folder)[0].get("error_bars"))


def read_units(folder: str | FilePath) -> Units | None:
    """Units of the rows of a saved model, ``None`` where it was saved without; errors as :func:`read_description`."""
    content, about, _ = _read(folder)
    return Units.read(content.get("units"), about.shape)


def state_shape(model: nn.Module) -> Sequence[int]:
    """Shape of one state, from the model or from the network inside it, if that is of this package."""
    part: Any = model
    while isinstance(part, nn.Module) and not isinstance(part, AdaptedFlowMap):
        if isinstance(getattr(part, "shape", None), tuple):
            return part.shape  # type: ignore[return-value]
        part = getattr(part, "flow_map", None) or getattr(part, "network", None)
    raise ValueError(f"a {type(model).__name__} does not say the shape of its states; give shape=(...)")


# --- weights ---


class Stored(NamedTuple):
    """Weights of a file."""

    shapes: Mapping[str, tuple[int, ...]]  # by name
    shared: Mapping[str, str]  # other names of the same tensors
    read: Callable[[str], Tensor]  # a tensor by its name
    double: bool = False  # whether some are in double precision, so that the model was made in it


def plain_name(name: str) -> str:
    """Name of a weight without what wrappers put into it."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def whole_state(model: nn.Module, network_state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights and buffers of a model by name, those of an adapted network, which keeps only tensors, by plain names."""
    state = own_state(model)
    for place in given_places(model):
        own = model.get_submodule(place.removesuffix("."))
        theirs = own.state_dict() if network_state is None else network_state
        for name, value in theirs.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the network keeps a {type(value).__name__} under {name!r} in its state_dict, and files hold "
                    "tensors only; save the network with torch.save, and the head's state_dict beside it"
                )
            state[place + plain_name(name)] = value
    return state


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and names of those that are the same tensor as another one's."""
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        identity = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and identity in first:
            shared[name] = first[identity]
        else:
            first[identity] = name
    # cloned: no two of them may overlap in a file
    return {n: v.detach().cpu().contiguous().clone() for n, v in state.items() if n not in shared}, shared


def fill(content: Mapping[str, Any], given: Mapping[str, Any], stored: Stored, what: str) -> Any:
    """A described model with its weights of a file called ``what``, in evaluation mode; ``given`` are the reader's own.

    A model that does not fit its weights, or would be far larger, is a ``ValueError``.
    """
    names = {name: name for name in stored.shapes} | dict(stored.shared)
    numbers = sum(math.prod(shape) for shape in stored.shapes.values())
    with ExitStack() as after:
        # constants that are computed when a network is made are computed as they were
        after.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64 if stored.double else torch.float32)
        model = within_size(lambda: make_model(content, given), len(names), numbers, what)
    theirs = given_places(model)
    mine = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    shapes = {name: tuple(value.shape) for name, value in mine.items()}
    came = {name: stored.shapes[source] for name, source in names.items() if source in stored.shapes}
    wrong = [name for name in shapes if came.get(name, shapes[name]) != shapes[name]]
    if problems := [
        *(f"{name} is missing" for name in shapes if name not in came),
        *(f"{name} has no place" for name in names if name not in shapes),
        *(f"{name} has shape {came[name]}, and the model {shapes[name]}" for name in wrong),
    ]:
        network = type(given["network"]).__name__
        remedy = f"; it does not fit this {network}: make the network with the arguments of training" if theirs else ""
        raise ValueError(f"{what} does not fit {CONFIG}: {listed(problems)}{remedy}")
    with torch.no_grad():
        for name, value in mine.items():
            loaded = stored.read(names[name])
            if loaded.is_floating_point() != value.is_floating_point():
                raise ValueError(f"{name} in {what} is of {loaded.dtype}, and {value.dtype} is needed")
            if loaded.dtype != value.dtype and loaded.is_floating_point() and not name.startswith(theirs):
                value.data = value.data.to(loaded.dtype)
            value.copy_(loaded)
    return model.eval()


# --- the configuration ---


def _json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} is a {type(content).__name__}, and an object with names is needed")
    return content


def located(path: str | FilePath) -> FilePath:
    """A checkpoint's or folder's path as it is, and where there is none the folder of the model of that name."""
    path = FilePath(path)
    return path if path.exists() or path.suffix == ".ckpt" else _folder(path)


def _folder(name: str | FilePath) -> FilePath:
    """The folder of that name, else of the package's model of that name, else of one on the hub, downloaded."""
    if FilePath(name).is_dir():
        return FilePath(name)
    shipped = sorted(folder.name for folder in SHIPPED.iterdir())
    if str(name) in shipped:
        return SHIPPED / name
    missing = f"there is no folder {name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name)):
        raise FileNotFoundError(f"{missing}, and the package's models are {', '.join(shipped)}; {_LAYOUT}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{missing}; to download a model of the Hugging Face hub, pip install f2d2-lightning[hub]"
        ) from error
    try:
        return FilePath(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of the network, of the hub, of its cache
        raise FileNotFoundError(f"{missing}, and none can be downloaded from the hub: {said(error)}") from error


def _read(folder: str | FilePath) -> tuple[dict[str, Any], DataDescription, FilePath]:
    folder = _folder(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; {_LAYOUT}")
    path = folder / CONFIG
    content = _json(path.read_bytes(), str(path))
    check_extent(content, str(path))
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise ValueError(
            f"{path} is of format {content.get('format')!r:.40}, version {content.get('version')!r:.20}; this version "
            f"reads {_FORMAT!r}, {_VERSION}: save it with save_pretrained, or update f2d2_lightning"
        )
    return content, _about(content, path), folder


def _about(content: Mapping[str, Any], path: FilePath) -> DataDescription:
    shape, levels, low, high, unit = (content.get(name) for name in ("shape", "levels", "low", "high", "unit"))
    # an integer may have more digits than a float, and a float be none
    numbers = all(type(edge) in (int, float) and abs(edge) < 1e300 for edge in (low, high))  # type: ignore[arg-type]
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
