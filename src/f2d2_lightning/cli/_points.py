"""Samples for ``f2d2 nll``: what ``--data`` and ``--compare`` may name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from f2d2_lightning.checkpoints.pretrained import located, read_units
from f2d2_lightning.cli._common import class_count, imported, say, warn
from f2d2_lightning.data.dataset import DequantizedDataset
from f2d2_lightning.data.images._reader import Framing, ImageFiles, read_images
from f2d2_lightning.data.images._stores import SUFFIXES
from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.data.rows import KINDS, Rows, find_rows, holds_pairs, read_pairs
from f2d2_lightning.data.table import Table
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.units import Units
from f2d2_lightning.training.batches import check_values
from f2d2_lightning.training.loading import read_checkpoint
from f2d2_lightning.utils.class_names import agree_on_classes, guessed_labels, labels_of

_SHORT = {
    **{"digits": "Digits", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "celeba64": "CelebA64"},
    **{"imagenet64": "ImageNet64", "checkerboard": "Checkerboard", "mixture": "GaussianMixture"},
}
DATA = {name: f"f2d2_lightning.data.{cls}" for name, cls in _SHORT.items()}
"""Short names of data modules; any other goes by its class path."""

SPLITS = ("train", "val", "test")
FEW, FAR = 10, 30
"""Rows from which a column is looked at as a whole, and deviations, or a part of one, that tell other units."""
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Reading:
    """How files become states: the seed of their noise, and what is done to images before it is added."""

    seed: int = 0
    convert: bool = False
    framing: Framing | None = None
    requantize: bool = False
    """Bring 8-bit values ``v`` to the model's levels, ``floor(v * levels / 256)``."""
    units: Units | None = None
    """Of floating numbers, where the model was trained on a table."""
    units_unknown: str = ""
    """Why a table's units are not known, where none were kept with the model."""


def reading_of(checkpoint: str, given: Reading) -> Reading:
    """How the model of a checkpoint's training read files, with what was given besides."""
    if (path := located(checkpoint)).is_dir():
        units = read_units(path)
        return replace(given, units=units, units_unknown="" if units else "the folder was saved without units=")
    given = replace(given, units_unknown="the checkpoint has no units of a table")
    # a data module's state is under the name of its class, which may be one of the user's own
    for part, kept in read_checkpoint(path).items():
        names = {*kept} if isinstance(kept, Mapping) and part != "state_dict" else set()
        if {"center", "scale"} <= names and ("columns" in names or isinstance(kept["scale"], Tensor)):
            given = replace(given, units=Units.loaded(kept), units_unknown="")
        elif {"crop", "resize", "convert"} <= names:
            framing = given.framing or Framing(1, kept["crop"], kept["resize"])
            given = replace(given, convert=given.convert or bool(kept["convert"]), framing=framing)
    return given


@dataclass
class Points:
    """Samples in order, in batches as the model's ``data_to_state`` takes them."""

    source: str
    """As the user named them."""
    loader: DataLoader
    """Of them; its own order and batch size hold only where its data set cannot be indexed."""
    names: Sequence[str] | None = None
    """Of the samples, where they have any."""
    no_labels: str = "it holds none"
    """What to do where a conditional model finds no labels."""
    log_scale: float = 0.0
    """What log-likelihoods of the states are above those in the units of the source, nats."""
    module: L.LightningDataModule | None = None
    """Somebody's data module, whose hooks a batch goes through as in training."""

    @classmethod
    def of(cls, path: Any, dataset: DequantizedDataset, **kwargs: Any) -> Points:
        """Those of a data set of this package."""
        return cls(str(path), DataLoader(dataset, collate_fn=lambda batch: batch), **kwargs)

    @property
    def dequantized(self) -> bool:
        """Whether further draws of dequantization noise can be asked for."""
        return getattr(self.loader.dataset, "quantization", None) is not None

    @property
    def count(self) -> int | None:
        """Number of samples, where it is known beforehand."""
        dataset = self.loader.dataset
        return None if isinstance(dataset, IterableDataset) else len(dataset)  # type: ignore[arg-type]

    def batches(self, size: int, draw: int = 0) -> Iterator[Any]:
        """All samples, ``size`` at a time; a draw of noise is to the data set what an epoch is in training."""
        loader, count = self.loader, self.count
        if count is not None:
            rows = range(draw * count, (draw + 1) * count)
            workers, collate = loader.num_workers, loader.collate_fn
            loader = DataLoader(loader.dataset, size, sampler=rows, num_workers=workers, collate_fn=collate)
        if (module := self.module) is None:
            return iter(loader)
        return (module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0) for batch in loader)


def load_points(name: str, arguments: Mapping[str, Any] | None, module: LikelihoodModel, reading: Reading) -> Points:
    """Samples for a model by what the user named.

    One of :data:`DATA` or the class path of a data module, with its arguments and ``:train``, ``:val`` or ``:test`` (by
    default); a ``.npy`` or ``.npz`` file; an image file or a folder of them. A folder that is called as one of
    :data:`DATA` is ``./digits``.
    """
    kind, _, split = name.partition(":")
    path = Path(name)
    is_file = path.suffix.lower() in (*KINDS, *SUFFIXES) or path.exists()
    if kind in DATA or (CLASS_PATH.fullmatch(kind) and not is_file):
        return _from_data_module(name, DATA.get(kind, kind), split or "test", arguments or {}, module, reading)
    if not path.exists():
        raise FileNotFoundError(
            f"--data is {name}: neither one of {', '.join(DATA)}, nor the class path of a data module, nor a file that "
            "exists or a folder of images"
        )
    if arguments:
        raise ValueError(f"{name} is a file or a folder, which takes no arguments ({', '.join(arguments)} given)")
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        return _from_images(path, module, reading)
    if path.suffix.lower() in KINDS:
        return _from_rows(path, module, reading)
    raise ValueError(
        f"--data is {name}; .csv, .tsv, .npy and .npz files (an .npz holds its data as 'x', labels as 'y', or pairs as "
        f"'theta' and 'x') and images ({', '.join(SUFFIXES)}) can be read"
    )


def _from_data_module(
    name: str, path: str, split: str, arguments: Mapping[str, Any], module: LikelihoodModel, reading: Reading
) -> Points:
    cls = imported(path, "--data", f", and is neither a file nor one of {', '.join(DATA)}")
    if not (isinstance(cls, type) and issubclass(cls, L.LightningDataModule)):
        raise ValueError(f"--data {path} is {cls!r}; the class of a LightningDataModule is needed")
    if path in DATA.values() and module.conditional and "labels" in inspect.signature(cls).parameters:
        arguments = {"labels": True, **arguments}
    try:
        data = cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{cls.__name__} was not made ({error}); its arguments are --data_args '{{...}}'") from error
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; {cls.__name__} has {', '.join(SPLITS)}")
    no_labels = f"let {cls.__name__} give pairs (states, labels)"
    if isinstance(data, Table):
        data.units = reading.units
    if isinstance(data, FlowDataModule):
        _check_data_module(name, data, module)
        data.setup()
        _agree_on_classes(data, module)
        _check_columns(name, getattr(data, "columns", None), reading)
        dataset = data.dataset(split)
        return Points.of(name, dataset, no_labels=no_labels, log_scale=getattr(data, "log_scale", 0.0))
    data.prepare_data()
    data.setup({"train": "fit", "val": "validate", "test": "test"}[split])
    _check_data_module(name, data, module)
    _agree_on_classes(data, module)
    try:
        loader = getattr(data, f"{split}_dataloader")()
    except (NotImplementedError, MisconfigurationException) as error:
        raise ValueError(f"{cls.__name__} has no {split}_dataloader; choose another split") from error
    if not isinstance(loader, DataLoader):
        raise ValueError(f"{cls.__name__}.{split}_dataloader gives {type(loader).__name__}; one DataLoader is needed")
    return Points(name, loader, no_labels=no_labels, module=data)


def _agree_on_classes(data: L.LightningDataModule, module: LikelihoodModel) -> None:
    if not module.conditional:
        return
    if module.class_names is not None:
        agree_on_classes(data, module.class_names)
    elif names := agree_on_classes(data, None):
        warn(
            f"the checkpoint does not say its classes; their order is taken from the data: {', '.join(names[:12])}; if "
            "that is wrong, name them in the order of the model's labels: --classes NAME,NAME,..."
        )


def _check_data_module(name: str, data: L.LightningDataModule, module: LikelihoodModel) -> None:
    """Refuse data of another shape or of other levels, of somebody's data module where it says them."""
    own = isinstance(data, FlowDataModule)
    levels, shape = getattr(data, "levels", None), getattr(data, "shape", None)
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else None
    levels_differ = levels != module.levels and (own or type(levels) is int)
    if levels_differ or (shape is not None and shape != module.shape):
        raise ValueError(
            f"--data {name} has shape {shape} and levels {levels}, but the checkpoint is of a model for shape "
            f"{module.shape} and levels {module.levels}"
        )
    theirs = getattr(data, "quantization", None)
    if (own or isinstance(theirs, Quantization)) and theirs != module.quantization:
        raise ValueError(f"--data {name} has {theirs}, but the checkpoint is of a model for {module.quantization}")


def _check_columns(source: Any, columns: Sequence[str] | None, reading: Reading) -> None:
    """Refuse columns that have other names than those that the model was trained on, where both have some."""
    known = None if reading.units is None else reading.units.columns
    if columns and known and [*columns] != [*known]:
        raise ValueError(
            f"{source} has the columns {', '.join(columns)}, and the model was trained on "
            f"{', '.join(known)}; give them in that order, or leave the line with the names out"
        )


def _from_rows(path: Path, module: LikelihoodModel, reading: Reading) -> Points:
    """Rows of a file, floating ones in the units of the table that the model was trained on."""
    paired, classes = module.conditional is not False and holds_pairs(path), None
    if paired:
        theta, classes = read_pairs(path)
        found = Rows(theta)
    else:
        found = find_rows(path, levels=module.levels is not None, shape=module.shape)
    rows, labels = found.values, found.labels
    if labels is not None:
        if labels.shape != tuple(rows.shape[:1]) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{path} has labels y of shape {labels.shape} and type {labels.dtype}; integers of shape "
                f"{tuple(rows.shape[:1])} are needed"
            )
        classes = torch.from_numpy(labels.astype(np.int64))
    if tuple(rows.shape[1:]) != module.shape:
        last = (*module.shape[1:], *module.shape[:1])
        hint = "; channels come first" if len(last) == 3 and tuple(rows.shape[1:]) == last else ""
        needed = f"(N, {', '.join(map(str, module.shape))})"
        raise ValueError(f"{path} has shape {tuple(rows.shape)}; {needed} is needed{hint}")
    _check_columns(path, found.columns, reading)
    for said in found.said:
        say(f"{path}: {said}")
    log_scale = 0.0
    if not rows.is_floating_point():
        dataset = _dequantized(path, rows, classes, module, reading)
    else:
        if reading.requantize:
            raise ValueError(f"{path} holds states; --requantize is for 8-bit values (uint8): leave it out")
        if reading.units is not None:
            rows, log_scale = reading.units.states(rows), reading.units.log_scale
            if not paired and (unlike := _unlike(rows, reading.units.columns)) is not None:
                warn(
                    f"{path}: {unlike}; likelihoods are right only if its units and the order of its columns are those "
                    "of the table that the model was trained on"
                )
        elif reading.units_unknown:
            say(f"{path}: rows are taken as the model's states as they stand; {reading.units_unknown}")
        rows = rows.float()
        check_values(rows, module.quantization)
        dataset = DequantizedDataset(rows, classes)
    no_labels = "give an .npz file with labels y of shape (N,), integers, or with theta and x"
    return Points.of(path, dataset, no_labels=no_labels, log_scale=log_scale)


def _unlike(states: Tensor, columns: Sequence[str] | None) -> str | None:
    """Which column of rows ``(N, d)``, in deviations of those trained on, is of other units or another column."""
    if states.ndim != 2 or len(states) < FEW:
        return None
    away, scatter = states.median(0).values.abs(), states.std(0)
    place = int(away.argmax())
    found = f"is {float(away[place]):,.0f} deviations of the rows that were trained on away from their mean (median)"
    if float(away[place]) <= FAR:
        # a column that is held at one value is meant
        narrow = torch.where(scatter > 0, scatter, torch.inf)
        place = int(narrow.argmin())
        if FAR * float(narrow[place]) >= 1:
            return None
        found = f"scatters {float(narrow[place]):.1g} times as much as that of the rows that were trained on"
    return f"column {columns[place] if columns else place + 1} {found}"


def _from_images(path: Path, module: LikelihoodModel, reading: Reading) -> Points:
    images = read_images(path, module.shape, convert=reading.convert, framing=reading.framing)
    labels = _folder_labels(path, images, module) if module.conditional else None
    dataset = _dequantized(path, images.values, labels, module, reading, eight_bit=True)
    return Points.of(path, dataset, names=images.names)


def _folder_labels(path: Path, images: ImageFiles, module: LikelihoodModel) -> Tensor:
    """Labels of images by the names of their folders, ``(N,)``, ``int64``."""
    classes = images.classes()
    found = sorted({*classes})
    if module.class_names is not None:
        labels = labels_of(found, module.class_names, path)
    else:
        labels, said = guessed_labels(found, class_count(module), path)
        if said is not None:
            warn(said)
    number = dict(zip(found, labels, strict=True))
    return torch.tensor([number[name] for name in classes])


def _dequantized(
    path: Path,
    values: Tensor,
    labels: Tensor | None,
    module: LikelihoodModel,
    reading: Reading,
    eight_bit: bool = False,
) -> DequantizedDataset:
    """Integers as states, fixed noise; ``eight_bit`` says that 0 to 255 is their range whatever they reach."""
    if module.levels is None:
        raise ValueError(f"{path} holds integers, but the model is for continuous data; give states (floating numbers)")
    quantization = Quantization(module.levels, module.low, module.high)
    high = int(values.max())
    if reading.requantize:
        if values.dtype != torch.uint8:
            raise ValueError(f"{path} holds {values.dtype}; --requantize is for 8-bit values (uint8)")
        if module.levels > 256 or high < module.levels < 256:
            raise ValueError(
                f"{path} holds values up to {high}, which fit the model's {module.levels} levels already; leave "
                "--requantize out"
            )
        values = (values.int() * module.levels // 256).to(torch.uint8)
    elif eight_bit and high >= module.levels:
        raise ValueError(
            f"{path} holds 8-bit values up to {high}, but the model is for {module.levels} levels, 0 to "
            f"{module.levels - 1}; --requantize true brings them there by floor(v * {module.levels} / 256)"
        )
    elif not (eight_bit and module.levels == 256):
        # a picture of 8 bits may be dark, other integers that stay low are of other levels
        quantization.check_range_of(values)
    return DequantizedDataset(values, labels, quantization, reading.seed)
