"""Data sets: values in memory or read when they are asked for, and dequantized on access."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.utils.arrays import map_numbers
from f2d2_lightning.utils.checks import checked
from f2d2_lightning.utils.conditions import Cond, some_of, tensors
from f2d2_lightning.utils.seeding import counter_uniform, mix_seed


class LazyValues(Dataset[Tensor]):
    """Values ``(N, ...)`` that are read a batch at a time, indexed as a tensor is; :meth:`select` stays lazy.

    Write :meth:`__getitems__`, and set ``shape``. They are pickled for worker processes and must not carry open files
    or what they read.
    """

    shape: tuple[int, ...]
    """``(N, ...)``."""

    def __getitems__(self, rows: list[int]) -> Tensor:
        """Values of rows ``0, ..., N - 1``, in that order, ``(len(rows), ...)``."""
        raise NotImplementedError(f"{type(self).__name__} must define __getitems__()")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One value ``(...)`` of an integer, else ``(B, ...)``."""
        rows = torch.arange(len(self))[key]
        values = self.__getitems__(rows.reshape(-1).tolist())
        return values if rows.ndim else values[0]

    def select(self, rows: slice | Tensor) -> LazyValues:
        """Some of the values, in the order of ``rows``, not yet read."""
        return _Rows(self, torch.arange(len(self))[rows])


Values: TypeAlias = Tensor | LazyValues
"""Values of a data set, ``(N, ...)``, in memory or not."""


class StoredValues(LazyValues):
    """An array in a ``.npy`` file, mapped into memory by each process for itself.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no such file, is truncated, or holds Python objects.
    """

    @checked
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

    def __getitems__(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(np.array(self._map()[rows]))


class _Rows(LazyValues):
    """Some rows, or all, of lazy values, an array, or somebody's map-style data set."""

    def __init__(self, source: Any, rows: Tensor | None = None) -> None:
        self.source, self.rows = source, rows
        first = source if isinstance(source, (LazyValues, np.ndarray)) else self._read([0])
        self.shape = (len(source) if rows is None else len(rows), *first.shape[1:])

    def _read(self, rows: list[int]) -> Tensor:
        if isinstance(self.source, np.ndarray):
            return torch.from_numpy(np.array(self.source[rows]))
        together = hasattr(self.source, "__getitems__")
        found = self.source.__getitems__(rows) if together else [self.source[row] for row in rows]
        parts = isinstance(found, (list, tuple))
        return torch.stack([torch.as_tensor(value) for value in found]) if parts else torch.as_tensor(found)

    def __getitems__(self, rows: list[int]) -> Tensor:
        values = self._read(rows if self.rows is None else self.rows[rows].tolist())
        if values.shape != (len(rows), *self.shape[1:]):
            raise ValueError(
                f"{type(self.source).__name__} gave values of shape {tuple(values.shape)} for {len(rows)} rows; "
                f"{(len(rows), *self.shape[1:])} is expected, as of its first"
            )
        return values


def as_values(values: Any) -> Values:
    """A tensor or lazy values as they are; an array (``numpy.memmap`` too) or a reader as lazy values.

    A reader has ``__len__``, and ``__getitems__`` (rows to a batch or a list of values) or ``__getitem__``. To workers
    that are spawned numpy pickles a ``memmap`` as a whole: give :class:`StoredValues` of its file instead.
    """
    if not hasattr(values, "__len__") or not (hasattr(values, "__getitems__") or hasattr(values, "__getitem__")):
        needed = "a tensor, an array, or a reader with __len__ and __getitems__ is expected"
        raise ValueError(f"values are a {type(values).__name__}; {needed}")
    if len(values) == 0:
        raise ValueError("there are no values; a data set has at least one")
    return values if isinstance(values, (Tensor, LazyValues)) else _Rows(values)


def take(values: Values, rows: slice | Tensor) -> Values:
    """Some of the values, in the order of ``rows``; lazy ones are not read."""
    return values[rows] if isinstance(values, Tensor) else values.select(rows)


class DequantizedDataset(Dataset):
    """Integer data dequantized on access, or continuous data as they are.

    An index is ``epoch * len(self) + position``; plain indices are epoch 0.

    Args:
        values: Integers ``(N, ...)`` with ``quantization``, else states ``(N, ...)``; a tensor, or what
            :func:`f2d2_lightning.data.dataset.as_values` takes. Of lazy values each batch is checked as it is read.
        labels: Integers ``(N,)``, or any condition: a tensor ``(N, ...)``, a tuple or dictionary of them; or ``None``.
        quantization: Levels and range; ``None`` for continuous data.
        seed: Stream of the noise.
        flip: Mirror images left to right from epoch 1 on, each with probability 1/2 in each epoch. Plain indices
            are the images as they are.

    Raises:
        ValueError: If the values do not fit ``quantization``, the labels are not as many, or there is no image to flip.
    """

    @checked
    def __init__(
        self,
        values: Values | Any,
        labels: Cond | None = None,
        quantization: Quantization | None = None,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        values = as_values(values)
        if quantization is not None and isinstance(values, Tensor):
            quantization.check(values)
        for part in tensors(labels):
            if len(part) != len(values):
                raise ValueError(f"there are {len(values)} values and {len(part)} labels; as many are expected")
        if flip and len(values.shape) != 4:
            raise ValueError(
                f"flip=True mirrors images (N, C, H, W), and the data have shape {tuple(values.shape)}; set flip=False"
            )
        self.values, self.labels, self.quantization, self.seed, self.flip = values, labels, quantization, seed, flip
        self.dim = math.prod(values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch at once."""
        index = torch.as_tensor(indices)
        position = index % len(self)
        values = self.values[position]
        if self.flip:
            coin = counter_uniform(index, mix_seed(self.seed, "flip")) < 0.5
            mirrored = coin & (index >= len(self))
            values = torch.where(mirrored[:, None, None, None], values.flip(-1), values)
        if self.quantization is not None:
            counters = index[:, None] * self.dim + torch.arange(self.dim)
            values = self.quantization.dequantize(values, counter_uniform(counters, self.seed).reshape(values.shape))
        return values if self.labels is None else (values, some_of(self.labels, position))

    def __iter__(self) -> Iterator[Any]:
        """One epoch: indices themselves have no end, and a loop over them had none either."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        return some_of(self.__getitems__([index]), 0)
