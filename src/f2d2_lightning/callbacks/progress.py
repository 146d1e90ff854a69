"""A progress bar of the whole run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import TaskID

from f2d2_lightning.utils.progress import listening


class RunProgress(RichProgressBar):
    """Lightning's bar; of the whole run, with the time that is left, where ``max_steps`` ends it and not epochs.

    A second bar shows what takes long inside of a step or of a validation: trajectories that are integrated until there
    are enough, and the reference's likelihood.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._inside: dict[str, TaskID] = {}
        self._ear = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._ear.close()
        self._ear.enter_context(listening(self._hear))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._ear.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._ear.close()

    def _hear(self, what: str, done: int, total: int) -> None:
        if self.progress is None or self.is_disabled:
            return
        if what not in self._inside or self._inside[what] not in self.progress.task_ids:
            self._inside[what] = self._add_task(total, what)
        self.progress.update(self._inside[what], total=total, completed=done, visible=done < total)

    @property
    def whole(self) -> bool:
        """Whether steps are counted and not the batches of an epoch."""
        trainer = self.trainer
        return trainer.max_steps > 0 and trainer.max_epochs in (None, -1)

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.whole else super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "training" if self.whole else super()._get_train_description(current_epoch)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        # which run it is, its folder says
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.whole or self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step - 1 if self.whole else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)
