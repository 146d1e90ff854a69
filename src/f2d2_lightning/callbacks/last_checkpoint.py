"""The newest state of a run on disk, whole, whatever happens: every few steps, at the end, when the run is stopped."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint import CheckpointException

from f2d2_lightning.training.folders import run_folder
from f2d2_lightning.training.progress import begin_epoch, mend_progress
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.files import held, released, sync

FOLDER, NAMES = "checkpoints", ("last.ckpt", "previous.ckpt")
"""Of the run's folder, and in it."""

_ASIDE, _HELD = ".saving", ".running"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` and the one before it, ``previous.ckpt``, in the run's folder.

    It saves every ``every_n_train_steps`` optimiser steps, whether validation runs or not, at the end of training, and
    when the run is told to stop (SIGTERM, or Ctrl-C once), after the batch at hand; the process then ends with 128 plus
    the signal's number, so that ``f2d2 fit && f2d2 test`` does not go on. A second Ctrl-C stops at once, unsaved.

    A checkpoint is written aside, in the same folder, and takes its place when it is whole: a full disk or a kill in
    between leaves the one before. A save that fails is a warning, and the next one is tried; the last one of a run must
    succeed. ``ModelCheckpoint`` may stand beside it, for the best by some metric.

    Args:
        every_n_train_steps: Optimiser steps between two saves. A run that is killed loses at most these.
        dirpath: Folder of the two files; by default ``checkpoints`` in the first logger's folder, else the trainer's.

    Raises:
        ValueError: If ``every_n_train_steps`` is below 1; when training begins, if another process trains there.
        OSError: If the last checkpoint of a run cannot be written.
    """

    def __init__(self, every_n_train_steps: int = 500, dirpath: str | Path | None = None) -> None:
        at_least(1, every_n_train_steps=every_n_train_steps)
        self.every_n_train_steps, self.dirpath = every_n_train_steps, dirpath
        self._step = self._seen = self._signal = self._requeue = 0
        self._finished = False
        self._handlers: dict[int, Any] = {}
        self._held: IO[bytes] | None = None

    def folder(self, trainer: L.Trainer) -> Path:
        """Where the files are. All processes must ask."""
        return run_folder(trainer) / FOLDER if self.dirpath is None else Path(self.dirpath)

    def state_dict(self) -> dict[str, Any]:
        """Whether training was complete, for :func:`f2d2_lightning.cli._resuming.is_finished`."""
        return {"finished": self._finished}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        mend_progress(checkpoint)

    # --- when ---

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let no other run write over the checkpoints of this one."""
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        folder = self.folder(trainer)
        if not trainer.is_global_zero or self._held is not None:
            return
        try:
            self._held = held(folder / _HELD)
        except BlockingIOError as other:
            raise ValueError(
                f"process {other} trains in {folder}, and two runs would write over each other's checkpoints: wait for "
                "its end, after which the same command goes on, or choose another folder "
                "(--trainer.logger.init_args.version NAME)"
            ) from other

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals in place of Lightning, whose handler ends the process with 0 and saves nothing."""
        begin_epoch(trainer)
        self._step = self._seen = trainer.global_step
        self._signal, self._finished = signal.SIGTERM if trainer.received_sigterm else 0, False
        if threading.current_thread() is threading.main_thread():
            numbers = [*_SIGNALS, *_slurm_signals()]
            self._handlers = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: Any) -> None:
        if number not in _SIGNALS:
            self._requeue = number
        elif number == signal.SIGINT and self._signal:
            raise KeyboardInterrupt
        else:
            self._signal = number

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            # a handler that is not Python's own cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        released(self._held)
        self._held = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save, unless the epoch ends here: validation and the hooks at its end come before."""
        # gradients that wait for more batches of a step are in no checkpoint
        stepped, self._seen = trainer.global_step > self._seen, trainer.global_step
        if not trainer.is_last_batch and (stepped or trainer.accumulate_grad_batches == 1):
            self._stop_if_told(trainer)
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_told(trainer)
        self._save_if_due(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """A signal need not wait for the end of a long validation."""
        # processes may have unequal numbers of batches here, and could not agree
        if not trainer.sanity_checking and trainer.state.fn == "fit" and trainer.world_size == 1:
            self._stop_if_told(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finished = True
        if not self._save(trainer):
            raise OSError(f"the trained model could not be saved in {self.folder(trainer)}; see the warning above")

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        if len(self._handlers) > len(_SIGNALS) and _any_process(trainer, bool(self._requeue)):
            # SLURM's warning: Lightning would save and requeue in the middle of whatever is being done
            number = self._requeue or next(number for number in self._handlers if number not in _SIGNALS)
            self._requeue = 0
            self._handlers[number](number, None)
        if _any_process(trainer, bool(self._signal)):
            self._save(trainer)
            raise SIGTERMException(128 + (self._signal or signal.SIGTERM))

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if trainer.global_step // self.every_n_train_steps > self._step // self.every_n_train_steps:
            self._save(trainer)

    # --- how ---

    def _save(self, trainer: L.Trainer) -> bool:
        """Write a checkpoint; whether that succeeded."""
        if getattr(trainer, "fast_dev_run", False):
            return True
        before, self._step = self._step, trainer.global_step
        folder = self.folder(trainer)
        aside = folder / _ASIDE
        failure: BaseException | None = None
        try:
            with _temporary_files_in(aside, trainer.is_global_zero):
                trainer.save_checkpoint(aside / NAMES[0], weights_only=False)
        except (OSError, CheckpointException) as error:  # the second is of sharded checkpoints
            failure = error
            # the other processes wait for this one, which has not come so far
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if trainer.is_global_zero and failure is None:
            try:
                _put(aside / NAMES[0], folder, keep=before != self._step)
            except OSError as error:
                failure = error
        if trainer.is_global_zero:
            shutil.rmtree(aside, ignore_errors=True)
        failed = _any_process(trainer, failure is not None)
        if failure is not None:
            warnings.warn(
                f"the state at step {trainer.global_step} could not be saved in {folder} ({failure}); "
                f"{f'what was saved at step {before} is still there' if before else 'nothing was saved before'}",
                stacklevel=2,
            )
        if failed:
            self._step = before
        return not failed


def _any_process(trainer: L.Trainer, told: bool) -> bool:
    """Whether it is so on any process; all of them must ask."""
    return told if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(told, all=False)


def _slurm_signals() -> list[int]:
    """Signals that Lightning answers by saving and requeueing the job, wherever training happens to be."""
    others = signal.valid_signals() - {*_SIGNALS, signal.SIGKILL, signal.SIGSTOP}
    return [number for number in others if type(signal.getsignal(number)).__name__ == "_HandlersCompose"]


def _put(new: Path, folder: Path, keep: bool) -> None:
    """A whole new checkpoint in the place of the last one, and that, to ``keep`` it, in the place of the one before."""
    last, previous = (folder / name for name in NAMES)
    sync(new)
    if last.exists() and (keep or last.is_dir()):
        if previous.is_dir():
            shutil.rmtree(previous)
        last.replace(previous)
    # a kill here leaves the one before, and nothing that is half written
    new.replace(last)


@contextmanager
def _temporary_files_in(folder: Path, make: bool) -> Iterator[None]:
    """Lightning writes a checkpoint to the system's temporary folder first, and moves it: across file systems that is a
    copy, which can stop half-way, and the temporary folder may be small."""
    if make:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder) if make else tempfile.tempdir
    try:
        yield
    finally:
        tempfile.tempdir = before
