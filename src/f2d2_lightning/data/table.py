"""Rows of a file, or pairs of parameters and conditions, as a data module, and their units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.data.rows import as_pairs, find_rows, read_pairs, rounded
from f2d2_lightning.likelihood._inputs import check_state
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.units import Units
from f2d2_lightning.utils.checks import positive
from f2d2_lightning.utils.conditions import Cond, some_of
from f2d2_lightning.utils.seeding import mix_seed


class Table(FlowDataModule):
    """Rows of a ``.csv``, ``.tsv``, ``.npy`` or ``.npz`` file, divided at random, standardised by those to train on.

    Floating numbers are states: each column minus its mean over the training rows, by its deviation, which a checkpoint
    keeps; of states of several axes all entries by the same two. Integers ``(N, C, H, W)`` are images, dequantized to
    [-1, 1]. Log-likelihoods of a model are those of the states; in the units of the file they are less by
    :attr:`log_scale`, as ``f2d2 nll`` reports them.

    Args:
        path: The file; see :func:`~f2d2_lightning.data.read_rows`.
        standardize: Whether floating numbers are.
        levels: Of integers, 0 to ``levels - 1``; ``None`` for 256 where they are images.
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
        self.said: tuple[str, ...] = ()
        """How the file was read, where that is not as it stands there, in words, once it was."""
        self.columns: list[str] | None = None
        """Names of the file's columns, where it has some."""
        self.units: Units | None = None
        """Of floating numbers, once the data are set up or a checkpoint was read; those that stay are in units of 1."""

    @property
    def log_scale(self) -> float:
        """What log-likelihoods of states are above those in the units of the file, nats."""
        return 0.0 if self.units is None else self.units.log_scale

    def read(self) -> tuple[Tensor, Cond | None]:
        """Rows as they stand there, ``(N, ...)``, and what they are conditioned on."""
        found = find_rows(self.path)
        self.said, self.columns = found.said, found.columns
        if found.labels is not None:
            self.said += ("its labels y were left out: rows are modelled without them",)
        for said in self.said:
            rank_zero_info(f"{self.path}: {said}")
        return found.values, None

    def splits(self) -> dict[str, tuple[Tensor, Cond | None]]:
        rows, conditions = self.read()
        count = len(rows)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(self.seed, "rows")))
        sizes = [max(1, round(share * count)) for share in (self.val, self.test)]
        if count - sum(sizes) < 1:
            raise ValueError(f"{self.path} has {count} rows; at least 3 are needed, to train, validate and test on")
        parts = order.split([count - sum(sizes), *sizes])
        self.shape = tuple(rows.shape[1:])
        if not rows.is_floating_point():
            if rows.ndim != 4 and self._said_levels is None:
                raise ValueError(
                    f"{self.path} holds integers of shape {self.shape} a row; images are (channels, height, width). "
                    "Counts have no density: give floating numbers, with noise added over each count's width, or say "
                    "levels= if they are levels"
                )
            self.quantization = Quantization(self._said_levels or 256)
        else:
            # before means are taken, which one NaN makes NaN for all
            check_state(rows, self.path)
            rows = rounded(rows) if self.standardize else rows.float()
            if self.units is None and self.standardize:
                self.units = Units.of(rows[parts[0]], self.columns)
            elif self.units is None:
                self.units = Units(torch.zeros(self.shape), torch.ones(self.shape), self.columns)
            rows = self.units.states(rows)
        names = ("train", "val", "test")
        return {name: (rows[part], some_of(conditions, part)) for name, part in zip(names, parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Units and names of columns, for a checkpoint."""
        return {} if self.units is None else dict(vars(self.units))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the units of a checkpoint, in which a model was trained.

        Raises:
            ValueError: If the data were set up in others, or these are no units.
        """
        if not state_dict:
            return
        kept, mine = Units.loaded(state_dict), self.units
        if mine is not None and not (torch.equal(mine.center, kept.center) and torch.equal(mine.scale, kept.scale)):
            raise ValueError(
                f"the rows of {self.path} have other means and deviations than those that the checkpoint's model was "
                "trained on; give the same file and seed, or ask f2d2 nll, which takes the checkpoint's"
            )
        self.units = kept


class Pairs(Table):
    """Parameters, and what their posterior is conditioned on: simulated pairs, divided at random.

    Parameters are standardised as the rows of a :class:`Table` are, and the checkpoint keeps their units. Conditions
    stay as they are: networks of this package standardise vectors by themselves, and embed the rest as you say.

    Args:
        parameters: Floating numbers ``(N, d)``; or an ``.npz`` file with arrays ``theta`` and ``x``, or ``theta`` and
            several ``x.NAME``, which become a dictionary.
        conditions: ``(N, ...)``, an array, or a tuple or dictionary of arrays; ``None`` where a file has them.
        standardize: Whether parameters are.
        **kwargs: Shares, batch sizes and seed, as :class:`Table`.

    Raises:
        FileNotFoundError: When the data are first asked for, if there is no such file.
        ValueError: If there are not as many of both, or the shares leave nothing to train on.

    >>> data = Pairs(torch.randn(100, 2), {"series": torch.randn(100, 9, 3), "mask": torch.ones(100, 9)})
    >>> states, conditions = next(iter(data.val_dataloader()))
    >>> states.shape, conditions["series"].shape
    (torch.Size([15, 2]), torch.Size([15, 9, 3]))
    """

    def __init__(self, parameters: Any, conditions: Any = None, standardize: bool = True, **kwargs: Any) -> None:
        file = isinstance(parameters, (str, Path))
        if file is (conditions is not None):
            raise ValueError("give parameters and conditions, or the path of an .npz file that has both")
        path = str(parameters) if file else "the pairs"
        super().__init__(path, standardize, levels=None, **kwargs)
        self._pairs = None if file else (parameters, conditions)

    def read(self) -> tuple[Tensor, Cond | None]:
        return read_pairs(self.path) if self._pairs is None else as_pairs(*self._pairs)
