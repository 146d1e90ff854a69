"""Values of data sets too large for memory: read when they are asked for, indexed as a tensor is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.utils.arrays import map_numbers

__all__ = ["LazyValues", "StoredValues", "Values", "as_values", "take"]


class LazyValues(ABC):
    """Values ``(N, ...)`` that are read a batch at a time. Indexing gives tensors; :meth:`select` stays lazy.

    They are pickled for worker processes and must not carry open files or what they read.
    """

    shape: tuple[int, ...]
    """``(N, ...)``."""

    @abstractmethod
    def read(self, rows: list[int]) -> Tensor:
        """Values of rows ``0, ..., N - 1``, in that order, ``(len(rows), ...)``."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One value ``(...)`` of an integer, else ``(B, ...)``."""
        if isinstance(key, int):
            return self.read(self._rows([key]))[0]
        if isinstance(key, slice):
            return self.read(list(range(*key.indices(len(self)))))
        return self.read(self._rows(key.tolist() if isinstance(key, Tensor) else list(key)))

    def _rows(self, rows: list[int]) -> list[int]:
        count = len(self)
        if rows and not (min(rows) >= -count and max(rows) < count):
            raise IndexError(f"rows {min(rows)} to {max(rows)} are asked for; there are {count}")
        return [row % count for row in rows]

    def select(self, rows: slice | Tensor) -> LazyValues:
        """Some of the values, in the order of ``rows``, not yet read."""
        return _Selected(self, torch.arange(len(self))[rows])


Values: TypeAlias = Tensor | LazyValues
"""Values of a data set, ``(N, ...)``, in memory or not."""


class _Selected(LazyValues):
    """Some rows of other values."""

    def __init__(self, values: LazyValues, rows: Tensor) -> None:
        self.values, self.rows = values, rows
        self.shape = (len(rows), *values.shape[1:])

    def read(self, rows: list[int]) -> Tensor:
        return self.values.read(self.rows[rows].tolist())


class StoredValues(LazyValues):
    """An array in a ``.npy`` file, mapped into memory by each process for itself.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no such file, is truncated, or holds Python objects.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._array: np.ndarray | None = None
        self.shape = self._map().shape

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}

    def _map(self) -> np.ndarray:
        if self._array is None:
            array = map_numbers(self.path, "remove it, and make it again")
            if array.ndim < 1:
                raise ValueError(f"{self.path} is no .npy file of an array (N, ...); remove it, and make it again")
            self._array = array
        return self._array

    def read(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(np.array(self._map()[rows]))


class _Array(LazyValues):
    """A numpy array, possibly mapped into memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def read(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(np.array(self.array[rows]))


class _Reader(LazyValues):
    """Somebody's map-style data set of tensors or arrays."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.shape = (len(reader), *self._read([0]).shape[1:])

    def _read(self, rows: list[int]) -> Tensor:
        if hasattr(self.reader, "__getitems__"):
            found = self.reader.__getitems__(rows)
        else:
            found = [self.reader[row] for row in rows]
        if isinstance(found, (list, tuple)):
            return torch.stack([torch.as_tensor(value) for value in found])
        return torch.as_tensor(found)

    def read(self, rows: list[int]) -> Tensor:
        values = self._read(rows)
        if values.shape != (len(rows), *self.shape[1:]):
            raise ValueError(
                f"{type(self.reader).__name__} gave values of shape {tuple(values.shape)} for {len(rows)} rows; "
                f"{(len(rows), *self.shape[1:])} is expected, as of its first"
            )
        return values


def as_values(values: Any) -> Values:
    """A tensor as it is; an array (``numpy.memmap`` too) or a reader as lazy values.

    Args:
        values: A tensor, lazy values, a numpy array, or anything with ``__len__`` and ``__getitems__`` (rows to a batch
            or a list of values) or ``__getitem__``. Where workers are spawned, numpy pickles a ``memmap`` as a whole:
            give :class:`StoredValues` of its file instead.

    Raises:
        ValueError: If it is none of these, or empty.
    """
    if isinstance(values, (Tensor, LazyValues)):
        found: Any = values
    elif isinstance(values, np.ndarray):
        found = _Array(values)
    elif hasattr(values, "__len__") and (hasattr(values, "__getitems__") or hasattr(values, "__getitem__")):
        found = _Reader(values) if len(values) > 0 else values
    else:
        raise ValueError(
            f"values are a {type(values).__name__}; a tensor, an array, or a reader with __len__ and __getitems__ is "
            "expected"
        )
    if len(found) == 0:
        raise ValueError("there are no values; a data set has at least one")
    return found


def take(values: Values, rows: slice | Tensor) -> Values:
    """Some of the values, in the order of ``rows``; lazy ones are not read."""
    return values[rows] if isinstance(values, Tensor) else values.select(rows)
