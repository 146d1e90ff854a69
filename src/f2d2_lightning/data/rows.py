"""Rows of numbers from a file, and which of them are images."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.data._csv import read_csv
from f2d2_lightning.likelihood._inputs import as_tensor
from f2d2_lightning.utils.arrays import read_numbers
from f2d2_lightning.utils.conditions import Cond, mapped, tensors

TEXT = (".csv", ".tsv")
KINDS = (*TEXT, ".npy", ".npz")
"""Files of rows, by the ends of their names."""
CHANNELS = (1, 3)
"""Of images whose channels come last."""
EIGHT_BIT = 255


@dataclass(frozen=True)
class Rows:
    """What a file holds."""

    values: Tensor
    """``(N, ...)``, floating numbers as precise as they stand there, or integers; images are ``(N, C, H, W)``."""
    labels: np.ndarray | None = None
    """Array ``y`` of the file, as it stands there."""
    said: tuple[str, ...] = ()
    """How it was read, where that is not as it stands there, in words."""
    columns: list[str] | None = None
    """Names of the columns, where a first line has them."""


def read_rows(path: str | Path) -> Tensor:
    """Rows of a ``.csv``, ``.tsv``, ``.npy`` or ``.npz`` file (its array ``x``), ``(N, ...)``: ``float32`` or integers.

    The first line of text may name the columns, or count them as pandas does, and commas, semicolons, bars, tabs or
    spaces separate them; a first column of whole numbers whose name is empty, as pandas numbers rows, is left out.
    Integers ``(N, H, W)`` are grey images, ``(N, 1, H, W)``; channels that come last are brought to the front; images
    of floating numbers that are all whole multiples of 1/255 are their 8-bit levels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind, has something that is no number, or nothing.
    """
    return _float32(find_rows(path).values)


def find_rows(path: str | Path, levels: bool = True, shape: tuple[int, ...] | None = None) -> Rows:
    """:func:`read_rows`, and what was done to them.

    Floating numbers that are 8-bit levels become integers unless ``levels`` says otherwise, and rows that have the
    ``shape`` of the states that they are for keep their axes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a file of rows: {', '.join(KINDS)}")
    if path.suffix.lower() not in KINDS:
        raise ValueError(
            f"{path} is no {', '.join(KINDS)} file; write its rows as one, as pandas' DataFrame.to_csv does"
        )
    is_text = path.suffix.lower() in TEXT
    said: list[str] = []
    columns: list[str] | None = None
    if is_text:
        array, names = read_csv(path)
        array, labels = _without_index(array, names, said), None
        if names is not None and names[-1].strip().isdecimal():
            said.append(f"its first line counts the columns, {names[-1].strip()} being the last, and was left out")
        elif names is not None:
            columns = [name.strip() for name in names[-array.shape[1] :]]
    else:
        arrays = read_numbers(path, ("x", "y"))
        array, labels = arrays["x"], arrays.get("y")
    if array.ndim < 2 or len(array) == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; numbers of shape (N, ...) are needed, a row a sample"
        )
    if not is_text:
        if levels and array.ndim in (3, 4) and (found := _as_eight_bit(array)) is not None:
            array = found
            said.append("its numbers are whole multiples of 1/255, and so were taken as 8-bit levels, 0 to 255")
        if array.shape[1:] != shape:
            array = _as_images(array, said)
    if array.dtype != np.uint8:
        floating = np.float64 if array.dtype.itemsize > 4 else np.float32
        array = array.astype(floating if array.dtype.kind == "f" else np.int64, copy=False)
    values = torch.from_numpy(np.ascontiguousarray(array))
    return Rows(values, labels, tuple(said), columns)


def _float32(values: Tensor) -> Tensor:
    """Floating numbers as ``float32``; integers stay."""
    return values.float() if values.is_floating_point() else values


def rounded(values: Tensor) -> Tensor:
    """Floating numbers ``(N, ...)`` as ``float32``, unless that moves numbers by more than 1e-4 of their deviation.

    It does where they are far from 0: times in seconds, coordinates in metres.
    """
    single = values.float()
    if values.dtype != torch.float64:
        return single
    deviation, off = values.std(0, correction=0), (values - single).abs().amax(0)
    return values if bool(((off > 1e-4 * deviation) & (deviation > 0)).any()) else single


def holds_pairs(path: str | Path) -> bool:
    """Whether it is an ``.npz`` file that has an array ``theta``, as :func:`read_pairs` reads."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "theta.npy" in archive.namelist()


def read_pairs(path: str | Path) -> tuple[Tensor, Cond]:
    """Parameters and conditions of an ``.npz`` file: its arrays ``theta``, ``(N, ...)``, and ``x``, ``(N, ...)``.

    In the place of ``x`` there may be several, ``x.sequence`` and ``x.mask`` for one, which become a dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give an .npz file with arrays theta and x")
    arrays = read_numbers(path)
    parts = {name.removeprefix("x."): value for name, value in arrays.items() if name.startswith("x.")}
    if "theta" not in arrays or not ("x" in arrays) ^ bool(parts):
        raise ValueError(
            f"{path} holds {', '.join(arrays)}; theta and x, or theta and several x.NAME, are needed, a row a pair"
        )
    return as_pairs(arrays["theta"], parts or arrays["x"], str(path))


def as_pairs(parameters: Any, conditions: Any, what: str = "pairs") -> tuple[Tensor, Cond]:
    """Parameters as they are, conditions as ``float32`` or integers; numbers ``(N,)`` that float are vectors of one.

    Parameters are an array of floating numbers, ``(N, ...)``, conditions an array, or a tuple or dictionary of arrays,
    ``(N, ...)``; a ``TypeError`` or ``ValueError`` says if they are not, and calls them ``what``.
    """

    def one(part: Any) -> Tensor:
        part = as_tensor(part, what)
        return part[:, None] if part.is_floating_point() and part.ndim == 1 else part

    theta = one(parameters)
    x = mapped(_float32, mapped(one, conditions) if not isinstance(conditions, list) else one(conditions))
    counts = [len(part) if part.ndim else 0 for part in (theta, *tensors(x))]
    if not theta.is_floating_point() or len({*counts}) > 1 or not counts[0] or len(counts) == 1:
        raise ValueError(
            f"{what}: parameters have dtype {theta.dtype} and shape {tuple(theta.shape)}, conditions shapes "
            f"{[tuple(part.shape) for part in tensors(x)]}; floating parameters (N, ...) and as many conditions are "
            "needed"
        )
    return theta, x


def _without_index(array: np.ndarray, names: list[str] | None, said: list[str]) -> np.ndarray:
    """Rows without the numbers that pandas writes before them."""
    numbered = names is not None and len(names) > 1 and names[0].strip() in ("", "Unnamed: 0")
    if not numbered or not (array[:, 0] == array[:, 0].round()).all():
        return array
    said.append("its first column has no name and whole numbers, those of the rows, and was left out")
    return array[:, 1:]


def _as_images(array: np.ndarray, said: list[str]) -> np.ndarray:
    """An array ``(N, ...)`` whose images are ``(N, C, H, W)``, and what was done, added to ``said``."""
    if array.ndim == 3 and array.dtype.kind in "biu":
        array = array[:, None]
        said.append(f"taken as grey images, {array.shape[1:]}")
    if array.ndim == 4:
        _, first, second, last = array.shape
        if last in CHANNELS and first not in CHANNELS and min(first, second) > last:
            array = np.moveaxis(array, -1, 1)
            said.append(f"its channels come last and were brought to the front, {array.shape[1:]}")
    return array


def _as_eight_bit(array: np.ndarray) -> np.ndarray | None:
    """The levels of floating numbers in [0, 1] that are all multiples of 1/255; ``None`` for others."""
    # a few first: most floating numbers are no levels
    for part in (array.reshape(-1)[:4096], array):
        if array.dtype.kind != "f" or not (np.isfinite(part).all() and part.min() >= 0 and part.max() <= 1):
            return None
        scaled = EIGHT_BIT * part.astype(np.float32)
        found = np.rint(scaled)
        if np.abs(scaled - found).max() > (0.1 if array.dtype == np.float16 else 1e-3):
            return None
    # nothing but black and white is of two levels
    return found.astype(np.uint8) if len(np.unique(found)) > 2 else None
