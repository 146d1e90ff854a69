"""How far a run is, and Lightning's counts of epochs and batches where it goes on.

From a checkpoint that was written at the end of an epoch Lightning 2.6 trains one batch too many where no validation is
due there, and it takes an epoch that ``max_steps`` cut short for a whole one. What is counted is therefore put right
before Lightning reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def planned_steps(trainer: L.Trainer) -> float:
    """Steps of one optimiser in the whole run; infinite where neither settings nor data give it an end.

    Lightning's own estimate is -1 for data without a length, and takes the accumulation of now for that of all epochs.
    """
    most = math.inf if trainer.max_steps == -1 else trainer.max_steps
    epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
    if epochs == -1 or math.isinf(batches):
        return most
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            steps = (math.ceil(batches / callback.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
            return min(most, sum(steps))
    return min(most, math.ceil(batches / trainer.accumulate_grad_batches) * epochs)


def share_done(trainer: L.Trainer, batch_index: int) -> float:
    """Share of the run that is done before a batch, in [0, 1], by its steps or its epochs, whichever end it first.

    0 where neither has an end. By epochs batches are counted, not steps: of several optimisers each takes its own.
    """
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
    if math.isinf(batches):
        # within an epoch nothing says how far it is
        batches, batch_index = 1, 0
    done = trainer.current_epoch * batches + batch_index
    by_epochs = done / (epochs * max(1, batches)) if epochs > 0 else 0.0
    return min(1.0, max(by_steps, by_epochs))


class Place(NamedTuple):
    """The next batch to be trained on."""

    epoch: int
    batch: int


def place_of(trainer: L.Trainer) -> Place:
    """Where training is. ``trainer.current_epoch`` grows too late to tell the end of an epoch from its beginning."""
    loop = trainer.fit_loop
    return _place(loop.epoch_progress.state_dict(), loop.epoch_loop.batch_progress.state_dict())


def _place(epochs: Mapping[str, Any], batches: Mapping[str, Any]) -> Place:
    epoch, batch = epochs["current"], batches["current"]
    if batch["processed"] == 0:
        return Place(epoch["started"] - (epoch["processed"] < epoch["started"]), 0)
    if batches["is_last_batch"] and batch["processed"] == batch["ready"]:
        return Place(epoch["started"], 0)
    return Place(epoch["started"] - 1, batch["processed"])


def mend_progress(checkpoint: Mapping[str, Any]) -> None:
    """Put the counts of a checkpoint right, in place; a second time changes nothing.

    A validation that was cut off is run again; what was saved at the end of one stays as it is.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    names = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    if not all(name in loop for name in names):
        return
    epochs, batches, validation = (loop[name] for name in names)
    current, total = batches["current"], batches["total"]
    if current["processed"] < current["ready"]:
        # a batch that had begun is begun again
        for counts in (current, total):
            counts.update(dict.fromkeys(counts, counts["completed"]))
        batches["is_last_batch"] = False
        return
    validated = validation["total"]["ready"] > 0 and total["completed"] == total["processed"]
    if validated and (
        not validation["is_last_batch"] or validation["total"]["completed"] < validation["total"]["ready"]
    ):
        # as Lightning knows a validation that it goes back into, which then begins with its first batch
        begun = validation["total"]["ready"]
        validation["total"].update(ready=begun, started=begun, processed=begun - 1, completed=begun - 1)
        validation["current"].update(dict.fromkeys(validation["current"], 0))
        validation["is_last_batch"] = False
        return
    ended = epochs["current"]["processed"] >= epochs["current"]["started"] > 0
    if not ended and (validated or not batches["is_last_batch"]):
        return
    cut_short = int(not batches["is_last_batch"] and current["processed"] > 0)
    for counts in epochs.values():
        counts.update(processed=counts["started"] - cut_short, completed=counts["started"] - cut_short)
    if total["completed"] < total["processed"]:
        # counted by Lightning after the hooks at the end of a batch
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        total["completed"] = total["processed"]
    if not cut_short:
        for counts in (current, *(validation[part] for part in ("total", "current"))):
            counts.update(dict.fromkeys(counts, 0))
        batches["is_last_batch"] = validation["is_last_batch"] = False


def begin_epoch(trainer: L.Trainer) -> None:
    """Let a run that goes on at the beginning of an epoch begin it as any other. To be called when training starts."""
    if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
        trainer.fit_loop.restarting = False
