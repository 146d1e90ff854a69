"""Rows of numbers from a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.utils.arrays import read_numbers
from f2d2_lightning.utils.checks import positive
from f2d2_lightning.utils.seeding import mix_seed

__all__ = ["Table", "Units", "as_rows", "read_rows"]


def read_rows(path: str | Path) -> Tensor:
    """Rows of a ``.csv``, ``.npy`` or ``.npz`` file (its array ``x``), ``(N, ...)``: ``float32`` or integers.

    The first line of a ``.csv`` file may name the columns.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind, has something that is no number, or nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a .csv, .npy or .npz file of rows")
    array = _read_csv(path) if path.suffix.lower() == ".csv" else read_numbers(path, ("x",))["x"]
    if array.ndim < 2 or len(array) == 0 or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; numbers of shape (N, ...) are needed, a row a sample"
        )
    return as_rows(array)


def as_rows(array: np.ndarray) -> Tensor:
    """Numbers as ``float32``, ``uint8`` or ``int64``, shape of the array."""
    if array.dtype != np.uint8:
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
    return torch.from_numpy(array)


def _read_csv(path: Path) -> np.ndarray:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            lines = [line for line in csv.reader(file) if line]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read as text with commas: {error}") from error
    names = lines[0] if lines and not any(map(_is_number, lines[0])) else None
    rows = lines[names is not None :]
    width = len(names or (rows[0] if rows else ()))
    for number, row in enumerate(rows, start=1 + (names is not None)):
        wrong = [place for place, text in enumerate(row) if not _is_number(text)]
        if wrong or len(row) != width:
            column = names[wrong[0]] if wrong and names and wrong[0] < width else wrong[0] + 1 if wrong else None
            what = f"{len(row)} columns for {width}" if column is None else f"{row[wrong[0]]!r} in column {column}"
            raise ValueError(
                f"{path}, row {number}: {what}; every row needs the same columns of numbers. Leave out columns of "
                "words, and rows with missing values"
            )
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class Units:
    """Of rows, shape of one each: a state is what is left of a row without ``center``, in ``scale``."""

    center: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Units:
        """Mean and deviation of rows ``(N, ...)``, of a column each for itself."""
        # entries of images and the like differ in scale for other reasons
        axes = (0,) if rows.ndim == 2 else tuple(range(rows.ndim))
        found = (rows.double().mean(axes), rows.double().std(axes))
        center, deviation = (part.float().expand(rows.shape[1:]).clone() for part in found)
        # a constant stays one, and is said by the checks before training
        return cls(center, torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    @property
    def log_scale(self) -> float:
        """Logarithm of the volume, in the units of the rows, of a unit of the states."""
        return float(self.scale.double().log().sum())

    def states(self, rows: Tensor) -> Tensor:
        """Rows ``(N, ...)`` as states."""
        return (rows - self.center) / self.scale


class Table(FlowDataModule):
    """Rows of a ``.csv``, ``.npy`` or ``.npz`` file, divided at random, standardised by those to train on.

    Floating numbers are states: each column minus its mean over the training rows, by its deviation, which a checkpoint
    keeps; of states of several axes all entries by the same two. Integers ``(N, C, H, W)`` are images, dequantized to
    [-1, 1]. Log-likelihoods of a model are those of the states; in the units of the file they are less by
    :attr:`log_scale`, as ``f2d2 nll`` reports them.

    Args:
        path: The file; see :func:`read_rows`.
        standardize: Whether floating numbers are.
        levels: Of integers, 0 to ``levels - 1``; ``None`` for 256 where they are integers.
        val: Share of the rows to validate on.
        test: Share of the rows to test on.
        batch_size: Rows per training batch.
        eval_batch_size: Rows per validation and test batch.
        seed: Of split, order and noise.

    Raises:
        FileNotFoundError: When the data are first asked for, if there is no such file.
        ValueError: If the shares leave nothing to train on; if the file has something that is no number.
    """

    def __init__(
        self,
        path: str,
        standardize: bool = True,
        levels: int | None = None,
        val: float = 0.15,
        test: float = 0.15,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed=seed)
        positive(val=val, test=test)
        if val + test >= 1:
            raise ValueError(f"val={val} and test={test} of the rows leave none to train on; their sum is below 1")
        self.path, self.standardize, self.val, self.test = path, standardize, val, test
        self._said_levels = levels
        self.units: Units | None = None
        """Of floating numbers, once the data are set up or a checkpoint was read."""

    @property
    def log_scale(self) -> float:
        """What log-likelihoods of states are above those in the units of the file, nats."""
        return 0.0 if self.units is None else self.units.log_scale

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        rows = read_rows(self.path)
        count = len(rows)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(self.seed, "rows")))
        sizes = [max(1, round(share * count)) for share in (self.val, self.test)]
        if count - sum(sizes) < 1:
            raise ValueError(f"{self.path} has {count} rows; at least 3 are needed, to train, validate and test on")
        parts = order.split([count - sum(sizes), *sizes])
        self.shape = tuple(rows.shape[1:])
        if not rows.is_floating_point():
            self.quantization = Quantization(self._said_levels or 256)
        elif self.standardize:
            self.units = self.units or Units.of(rows[parts[0]])
            rows = self.units.states(rows)
        return {name: (rows[part], None) for name, part in zip(("train", "val", "test"), parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Units, for a checkpoint."""
        return {} if self.units is None else dict(vars(self.units))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the units of a checkpoint, in which a model was trained.

        Raises:
            ValueError: If the data were set up in others.
        """
        if not state_dict:
            return
        kept, mine = Units(**state_dict), self.units
        if mine is not None and not (torch.equal(mine.center, kept.center) and torch.equal(mine.scale, kept.scale)):
            raise ValueError(
                f"the rows of {self.path} have other means and deviations than those that the checkpoint's model was "
                "trained on; give the same file and seed, or ask f2d2 nll, which takes the checkpoint's"
            )
        self.units = kept
