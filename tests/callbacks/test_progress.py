"""The bar of a run: of all its steps, and of what takes long inside of one."""

from __future__ import annotations

import lightning as L
import pytest

import f2d2_lightning as f2
from f2d2_lightning.callbacks import RunProgress
from f2d2_lightning.utils.progress import listening, tell
from lightning_parts import Pair, fit, teacher, trainer


class Watched(RunProgress):
    """Keeps what it showed."""

    def __init__(self):
        super().__init__()
        self.told, self.bars = [], []

    def _hear(self, what, done, total):
        super()._hear(what, done, total)
        self.told.append((what, done, total))

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.bars.append((self.train_progress_bar.completed, self.train_progress_bar.total))


def test_of_the_whole_run_and_of_what_is_inside(tmp_path):
    of = teacher()
    fit(tmp_path, of)
    module = f2.F2D2Module(teacher=of, steps=(1,), reference=f2.Reference(steps=8, method="euler"))
    module.objective = f2.TrajectoryRegression(capacity=64, nodes=4)
    watched = Watched()
    run = trainer(tmp_path, max_epochs=-1, max_steps=5, callbacks=[watched], enable_progress_bar=True)
    run.fit(module, datamodule=Pair())
    assert watched.bars == [(step, 5) for step in range(1, 6)]
    trajectories = [(done, total) for what, done, total in watched.told if what == "trajectories"]
    assert trajectories[-1] == (64, 64)
    assert [done for done, _ in trajectories] == sorted(done for done, _ in trajectories)
    calls = [(done, total) for what, done, total in watched.told if what == "reference"]
    assert calls[:8] == [(call, 8) for call in range(1, 9)]
    assert "v_num" not in watched.get_metrics(run, module)
    # nobody listens any more
    before = len(watched.told)
    tell("reference", 1, 2)
    assert len(watched.told) == before


def test_epochs_are_bars_where_they_end_a_run(tmp_path):
    watched = Watched()
    run = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[watched],
        enable_model_summary=False, limit_train_batches=3, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(teacher(), datamodule=Pair())
    assert watched.bars == [(batch, 3) for batch in (1, 2, 3)]


def test_the_last_who_listens_hears():
    heard = []
    with listening(lambda *said: heard.append(("outer", *said))):
        with listening(lambda *said: heard.append(("inner", *said))):
            tell("a", 1, 2)
        tell("b", 2, 2)
    tell("c", 1, 1)
    assert heard == [("inner", "a", 1, 2), ("outer", "b", 2, 2)]
    with pytest.raises(KeyError), listening(heard.append):
        raise KeyError
