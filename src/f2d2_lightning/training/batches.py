"""States at ``t = 1`` from the batches of somebody else's data."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from f2d2_lightning.likelihood._inputs import check_cond, check_state
from f2d2_lightning.likelihood.data_checks import MOST_STATES, check_data, find_discrete
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.utils.conditions import Cond, as_pair, halves
from f2d2_lightning.utils.processes import gather_states

FIT_SAMPLES = 2**17
"""Samples that are looked at of training data without an end."""
HALF = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")
"""Precisions of a Trainer in which weights and states are of half precision."""


def check_precision(trainer: L.Trainer) -> None:
    """Refuse a Trainer whose weights and states are of half precision."""
    if str(trainer.precision) in HALF:
        raise ValueError(
            f"precision={trainer.precision!r} keeps states and weights in half precision, in which a log-likelihood of "
            "thousands of nats is off by whole ones; use 'bf16-mixed', '16-mixed', '32-true' or '64-true'"
        )


def check_values(x: Tensor, quantization: Quantization | None) -> None:
    """Refuse first states of a run, ``(B, ...)``, that are not what ``levels``, ``low`` and ``high`` say.

    Continuous data that look discrete get a warning.
    """
    check_state(x, "the batch of states")
    if quantization is None:
        for found in find_discrete(x):
            warnings.warn(found.message, stacklevel=2)
    else:
        quantization.check_states(x)


class FirstLook:
    """Looks at the first states of each stage of a run, and at the training data before it."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, x: Tensor, quantization: Quantization | None, trainer: L.Trainer | None) -> None:
        """See :func:`check_values`; states that are no floating numbers are refused at any time."""
        stage = "" if trainer is None else str(trainer.state.stage)
        if stage != self._stage or not x.is_floating_point():
            if quantization is None and trainer is not None and trainer.state.fn == "fit":
                # whether they are discrete is seen of the training data, before the first step
                check_state(x, "the batch of states")
            else:
                check_values(x, quantization)
            self._stage = stage

    def at_training_data(
        self, states: Callable[[Any], tuple[Tensor, Cond | None]], quantization: Quantization | None, trainer: L.Trainer
    ) -> None:
        """Say what is wrong with the training data, see :func:`f2d2_lightning.likelihood.check_data`.

        Every process must call it, and the first one speaks. The random state is afterwards what it was. Data of which
        no density can be learned are a ``ValueError``, all else is a warning.
        """
        stored = has_rows(trainer.train_dataloader)
        if any(isinstance(loader, Iterator) for loader in tree_leaves(trainer.train_dataloader)):
            rank_zero_warn(
                "the training data are a generator, which begins only once: batches that are looked at before the "
                "first step are not trained on; give a DataLoader, or another iterable that begins anew"
            )
        with isolate_rng():
            batches = training_batches(trainer, MOST_STATES)
            found = check_data((states(batch)[0] for batch in batches), quantization, copies=stored)
        # of data without an index each process sees its own
        found = list(dict.fromkeys(one for process in gather_states(found) for one in process))
        if errors := [one.message for one in found if one.error]:
            raise ValueError("; ".join(errors))
        for one in found:
            rank_zero_warn(one.message)


class BatchStates:
    """States of a batch, and its conditioning if it is ``conditional``.

    ``convert`` is ``batch -> (x, cond)``, or the name of a method of the module that does so; by default a batch is a
    tensor, or a sequence of which the first two items are taken.
    """

    def __init__(
        self, convert: Callable[[Any], tuple[Tensor, Cond | None]] | str | None = None, conditional: bool = True
    ) -> None:
        self.convert, self.conditional = convert, conditional
        self.shape: tuple[int, ...] | None = None

    def __call__(self, batch: Any, module: L.LightningModule) -> tuple[Tensor, Cond | None]:
        """``(B, ...)`` and conditioning or ``None``; the first batch decides the shape, and others are refused."""
        x, cond = self._convert(batch, module)
        check_state(x, "the batch of states")
        # half precision is for networks: differences of states and log-densities need more
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        self.shape = self.shape or tuple(x.shape[1:])
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"states have shape {tuple(x.shape[1:])}, and the head was made for {self.shape}; give it the data of "
                "its training, or train another head"
            )
        if not self.conditional:
            return x, None
        check_cond(cond, len(x))
        return x, cond

    def _convert(self, batch: Any, module: L.LightningModule) -> tuple[Tensor, Cond | None]:
        convert = self.convert
        if isinstance(convert, str):
            method = getattr(module, convert, None)
            if not callable(method):
                raise ValueError(f"data_to_state={convert!r}, and {type(module).__name__} has no such method")
            return as_pair(method(batch), f"{type(module).__name__}.{convert}")
        if convert is not None:
            return as_pair(convert(batch), "data_to_state")
        x, cond = halves(batch)
        if isinstance(x, Tensor):
            return x, cond
        keys = f" with {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
        raise ValueError(
            f"a batch is a {type(batch).__name__}{keys}; say where its states are: "
            "F2D2Callback(data_to_state=lambda batch: (batch['image'], None))"
        )


def transferred(trainer: L.Trainer, batch: Any) -> Any:
    """A batch of a loader as ``training_step`` would get it: through the hooks around its way to the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch)


def all_training_batches(trainer: L.Trainer) -> Iterable[Any]:
    """One pass over the training data, as ``training_step`` gets them; of data without an end 131,072 samples."""
    loaders, most = _loaders(trainer), None
    try:
        for loader in tree_leaves(loaders):
            len(loader)
    except (TypeError, NotImplementedError, AttributeError):
        most = max(1, FIT_SAMPLES // rows_of_batches(loader))
        rank_zero_info(f"the training data have no length: what is set from them comes from {most} batches at most")
    return (transferred(trainer, batch) for batch in itertools.islice(_together(trainer, loaders), most))


def _loaders(trainer: L.Trainer) -> Any:
    """The training data's loader, or a list or dictionary of several."""
    if trainer.train_dataloader is None:
        raise RuntimeError("there are no training data yet; call this from on_train_start or later")
    return trainer.train_dataloader


def _together(trainer: L.Trainer, loaders: Any) -> Iterator[Any]:
    """Batches of a loader, or of several as the trainer takes them; a ``ValueError`` where there is none."""
    batch: Any = None
    batches = loaders
    if isinstance(loaders, (list, tuple, dict)):
        combined = trainer.fit_loop._combined_loader
        assert combined is not None
        batches = (batch for batch, _, _ in CombinedLoader(loaders, combined._mode))
    for batch in batches:
        yield batch
    if batch is None:
        raise ValueError(
            "the training data gave no batch when they were looked at before the first step; look at what the data set "
            "returns, and give a DataLoader, or another iterable that begins anew, in the place of a generator"
        )


def rows_of_batches(loader: Any) -> int:
    """How many samples a loader says that its batches hold, 1 where it says none."""
    return getattr(loader, "batch_size", None) or 1


def check_trained(trainer: L.Trainer) -> None:
    """Refuse a fit that ended after no step because its training data hold no batch."""
    if trainer.num_training_batches == 0 and trainer.limit_train_batches not in (0, 0.0):
        raise ValueError(
            "there are no training data: the loader gives no batch, and nothing was trained; look at what the data set "
            "returns, and whether batches are larger than it (drop_last)"
        )


def has_rows(loader: Any) -> TypeGuard[DataLoader]:
    """Whether a loader makes batches of the rows of a map-style data set, each of which can be asked for."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def training_batches(trainer: L.Trainer, count: int) -> Iterator[Any]:
    """At least ``count`` training samples as ``training_step`` gets them, without touching the trainer's own iterators.

    The same ones on every process, where the data are a map-style dataset; else as many batches as are likely to hold
    them, from a new iterator.
    """
    loaders = _loaders(trainer)
    # without automatic batching a data set gives what it likes, such as whole batches
    sizes = [rows_of_batches(loader) for loader in tree_leaves(loaders) if not has_rows(loader)]
    most = -(-count // sizes[0]) if sizes else None
    for batch in itertools.islice(_together(trainer, tree_map(lambda loader: _some(loader, count), loaders)), most):
        yield transferred(trainer, batch)


def _some(loader: Any, count: int) -> Any:
    """So many rows of a loader's data set, drawn alike everywhere; the loader itself where there are none.

    A sampler of somebody's own says which rows are trained on, and one of batches which of them go together.
    """
    if not has_rows(loader):
        return loader
    if type(loader.batch_sampler) is not BatchSampler:
        batches: list[list[int]] = []
        for batch in loader.batch_sampler:  # type: ignore[union-attr]
            batches.append(list(batch))
            if sum(map(len, batches)) >= count:
                break
        return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
    sampler = loader.sampler
    # Lightning deals out a sampler of somebody's own by one whose data set are its answers
    whole = getattr(sampler, "dataset", loader.dataset) is loader.dataset
    if whole and isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        sampler = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[arg-type]
    generator: Any = getattr(sampler, "generator", None)
    before = None if generator is None else generator.get_state()
    rows = list(itertools.islice(sampler, count))
    if before is not None:  # training draws the same as without this look
        generator.set_state(before)
    # another loader: a second iterator of one with persistent workers would reset the first; and batches of a fixed
    # size, so that what is set from them does not depend on the number of processes
    return DataLoader(Subset(loader.dataset, rows), batch_size=min(256, len(rows)), collate_fn=loader.collate_fn)
