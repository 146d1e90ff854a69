"""What was computed is kept: starting values, checkpoints on a full disk, signals, and weights that are numbers."""

from __future__ import annotations

import copy
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import lightning as L
import pytest
import torch

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.callbacks import LastCheckpoint, last_checkpoint
from f2d2_lightning.nn import MLP
from f2d2_lightning.training.batches import FirstLook
from f2d2_lightning.training.loading import load_module, read_checkpoint
from launching import ended, output_of, start
from lightning_parts import Pair, fit, same, student, teacher, trainer, weights

# --- a model that was trained is not started anew ---


class NoRate(torch.optim.SGD):
    """An optimiser that changes nothing."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher and its trained student."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_default_dtype(torch.float32)
    of = teacher()
    fit(folder, of, max_epochs=2)
    module = student(of, optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-2))
    fit(folder, module, max_epochs=40)
    return of, module


@pytest.mark.parametrize("way", ["checkpoint", "weights", "state_dict", "the same object"])
def test_fit_of_a_trained_student_goes_on_from_it(tmp_path, trained, way):
    of, module = trained[0], copy.deepcopy(trained[1])
    run = trainer(tmp_path, max_epochs=1)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "trained.ckpt", weights_only=way == "weights")
    if way == "the same object":
        again = module
    elif way == "state_dict":
        again = student(of)
        again.load_state_dict(read_checkpoint(tmp_path / "trained.ckpt")["state_dict"])
    else:
        flow_map, head = student(of).joint.flow_map, student(of).joint.head
        again = load_module(tmp_path / "trained.ckpt", f2.F2D2Module, flow_map=flow_map, head=head, teacher=of,
                            objective=f2.TrajectoryRegression(nodes=8, capacity=64, chunk=16))  # fmt: skip
    x = torch.randn(20, 2)
    before = module.log_prob(x, 2).value.clone()
    again.optimizer, again.ema_decay = NoRate, 0.999
    fit(tmp_path, again.train(), max_steps=1, max_epochs=-1)
    # the average moves towards the live weights, which it has not reached
    assert torch.allclose(again.log_prob(x, 2).value, before, atol=0.02)
    started_anew = student(of, optimizer=NoRate)
    fit(tmp_path, started_anew, max_steps=1, max_epochs=-1)
    assert (started_anew.log_prob(x, 2).value - before).abs().mean() > 0.1


@pytest.mark.parametrize("loaded", [True, False])
def test_an_average_without_memory_does_not_hide_that_a_student_was_trained(tmp_path, trained, loaded):
    """It never leaves the weights; what a student loads by hand is not replaced by its teacher's."""
    of, module = trained
    again = student(of, ema_decay=0.0, optimizer=NoRate)
    if loaded:
        again.joint.load_state_dict(module.average.state_dict())
        again.load_state_dict({**again.state_dict(), **again.joint.state_dict(prefix="average.")})
    before = weights(again)
    fit(tmp_path, again, max_steps=1, max_epochs=-1)
    assert same(before, again) == loaded


def test_a_student_that_is_made_without_memory_has_its_scale_from_the_data(tmp_path):
    def make():
        return f2.F2D2Module(MLP((2,), width=8, blocks=1), ema_decay=0.0)

    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu").load_state_dict(make().state_dict())
    fit(tmp_path, module, max_steps=1, max_epochs=-1)
    assert float(module.joint.head.scale) != 1


def test_fit_of_a_trained_teacher_keeps_its_average(tmp_path):
    of = teacher()
    fit(tmp_path, of, max_epochs=3)
    average = [p.clone() for p in of.average.parameters()]
    of.optimizer, of.ema_decay = NoRate, 0.9
    fit(tmp_path, of, max_steps=1, max_epochs=-1)
    for before, after, live in zip(average, of.average.parameters(), of.flow_map.parameters(), strict=True):
        assert torch.allclose(after, 0.55 * before + 0.45 * live, atol=1e-6)


# --- weights that are numbers ---


class Poisoned(Pair):
    """One sample that is NaN, seen in the second epoch's second batch or so."""

    def splits(self):
        parts = super().splits()
        parts["train"][0][-1] = float("nan")
        return parts


SELF_MADE = [f2.objectives.Semigroup, f2.objectives.Lagrangian, f2.objectives.Eulerian]


@pytest.mark.parametrize("kind", ["teacher", *SELF_MADE])
def test_one_nan_sample_stops_the_run_before_it_spoils_anything(tmp_path, kind, monkeypatch):
    module = teacher() if kind == "teacher" else student(objective=kind(), warm_start=False)
    keep = LastCheckpoint(every_n_train_steps=1)

    class Healthy(L.Callback):
        """The weights before each step."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    healthy = Healthy()
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 96"):
        fit(tmp_path, module, data=Poisoned())
    # of large data not all are looked at before the first step
    monkeypatch.setattr(FirstLook, "at_training_data", lambda *_: None)
    if kind != "teacher":
        # starting values are set from all of the data, which would be refused there
        module.prepare = module.fit_baselines = lambda: None
    said = r"before optimiser step \d.*batch \d.*NaN or infinite in \d+ parameters"
    with pytest.raises(FloatingPointError, match=said):
        fit(tmp_path, module, healthy, keep, data=Poisoned(), max_epochs=3, enable_checkpointing=True)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in healthy.before.items())
    last = tmp_path / "checkpoints/last.ckpt"
    if last.exists():
        assert all(value.isfinite().all() for value in read_checkpoint(last)["state_dict"].values())


def test_a_nan_gradient_is_told_from_nan_data(tmp_path):
    module = teacher()
    last = list(module.flow_map.parameters())[-1]
    last.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="the batch is finite: lower the learning rate"):
        fit(tmp_path, module)
    assert all(p.isfinite().all() for p in module.parameters())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    module, keep = teacher(), LastCheckpoint(every_n_train_steps=1)

    class Spoil(L.Callback):
        """As a learning rate that overflows would."""

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                next(pl_module.flow_map.parameters()).data.fill_(float("inf"))

    with pytest.raises(FloatingPointError, match=r"nothing was saved: .* first flow_map"):
        fit(tmp_path, module, Spoil(), keep, enable_checkpointing=True)
    assert read_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == 1


# --- the newest state on disk ---


def kept(folder):
    return {path.name: read_checkpoint(path)["global_step"] for path in sorted((folder / "checkpoints").glob("*.ckpt"))}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 5, "max_epochs": -1}, {"last.ckpt": 5, "previous.ckpt": 4}),
        ({"max_steps": 6, "max_epochs": -1, "check_val_every_n_epoch": 100}, {"last.ckpt": 6, "previous.ckpt": 4}),
        ({"max_epochs": 2, "limit_val_batches": 0}, {"last.ckpt": 6, "previous.ckpt": 4}),
        ({"max_epochs": 1}, {"last.ckpt": 3, "previous.ckpt": 2}),
    ],
)
def test_the_end_is_saved_whether_validation_runs_or_not(tmp_path, settings, expected):
    keep = LastCheckpoint(every_n_train_steps=2)
    fit(tmp_path, teacher(), keep, enable_checkpointing=True, **settings)
    assert kept(tmp_path) == expected
    assert not list(tmp_path.rglob("*.part*")) + list(tmp_path.rglob(".saving"))


def test_a_full_disk_costs_no_more_than_a_save(tmp_path, monkeypatch):
    """The system's temporary folder is not used; a save that fails leaves what was there, and the run goes on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    original, calls = last_checkpoint.sync, []

    def full(path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")
        original(path)

    monkeypatch.setattr(last_checkpoint, "sync", full)
    keep = LastCheckpoint(every_n_train_steps=1)
    with pytest.warns(UserWarning, match=r"step 2 could not be saved.*No space left.*saved at step 1 is still there"):
        fit(tmp_path, teacher(), keep, max_steps=2, max_epochs=-1, enable_checkpointing=True)
    # the end, two saves later
    assert kept(tmp_path) == {"last.ckpt": 2, "previous.ckpt": 1}


def test_a_run_whose_end_cannot_be_saved_fails(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(last_checkpoint, "sync", full)
    with pytest.warns(UserWarning, match="could not be saved"), pytest.raises(OSError, match="could not be saved in"):
        fit(tmp_path, teacher(), LastCheckpoint(), max_steps=2, max_epochs=-1, enable_checkpointing=True)


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    """The kernel's own refusal, in the middle of Lightning's writing."""
    keep = LastCheckpoint(every_n_train_steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(L.Callback):
        """The disk is full from the second step on."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            if trainer.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        with pytest.warns(UserWarning, match="step 2 could not be saved"):
            fit(tmp_path, teacher(), Limit(), keep, max_steps=3, max_epochs=-1, enable_checkpointing=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept(tmp_path)["last.ckpt"] == 3


def test_a_second_fit_with_the_same_callback_saves_too(tmp_path):
    keep = LastCheckpoint(every_n_train_steps=2)
    for name, steps in (("first", 6), ("second", 3)):
        keep.dirpath = tmp_path / name / "checkpoints"
        fit(tmp_path, teacher(), keep, max_steps=steps, max_epochs=-1, enable_checkpointing=True)
    assert kept(tmp_path / "first") == {"last.ckpt": 6, "previous.ckpt": 4}
    assert kept(tmp_path / "second") == {"last.ckpt": 3, "previous.ckpt": 2}


OTHER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("7 on another", file=file, flush=True)
print("ready", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_write_over_each_other(tmp_path):
    """Whoever is killed has it no more."""
    place = tmp_path / "checkpoints" / ".running"
    place.parent.mkdir()
    settings = {"max_steps": 1, "max_epochs": -1, "enable_checkpointing": True}
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=r"process 7 on another\s+trains in .*checkpoints, and two runs would"):
            fit(tmp_path, teacher(), LastCheckpoint(), **settings)
        other.kill()
    fit(tmp_path, teacher(), LastCheckpoint(), **settings)
    assert kept(tmp_path) == {"last.ckpt": 1}
    assert not place.exists()


# --- signals ---

SCRIPT = """
import sys, time, pathlib, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
import lightning as L
from f2d2_lightning.callbacks import LastCheckpoint
from lightning_parts import Pair, teacher, trainer

class Slow(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and {where!r} == "training":
            pathlib.Path("there").touch()
            time.sleep({pause})
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if {where!r} == "validation" and trainer.global_step == 3:
            pathlib.Path("there").touch()
            time.sleep({pause})

fit = trainer(pathlib.Path("."), max_epochs=3, callbacks=[Slow(), LastCheckpoint()], enable_checkpointing=True)
last = pathlib.Path("checkpoints/last.ckpt")
fit.fit(teacher(), datamodule=Pair(), ckpt_path=last if last.exists() else None)
print("finished", fit.global_step)
"""


def written(tmp_path, where, pause):
    """A script to be run."""
    (tmp_path / "there").unlink(missing_ok=True)
    script = SCRIPT.format(tests=str(Path(__file__).parents[1] / "support"), where=where, pause=pause)
    (tmp_path / "run.py").write_text(textwrap.dedent(script))
    return ["run.py"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights of the script's run."""
    folder = tmp_path_factory.mktemp("whole")
    assert "finished 9" in output_of(written(folder, "nowhere", 0), folder)
    return read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]


@pytest.mark.parametrize(
    ("where", "number"), [("training", signal.SIGTERM), ("training", signal.SIGINT), ("validation", signal.SIGTERM)]
)
def test_a_signal_saves_and_is_told_by_the_exit_code(tmp_path, uninterrupted, where, number):
    process = start(written(tmp_path, where, 1.0), tmp_path, tmp_path / "printed", os.environ)
    deadline = time.monotonic() + 120
    while not (tmp_path / "there").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert ended([process], 60) == [128 + number]
    assert kept(tmp_path) == {"last.ckpt": 3}
    assert "finished 9" in output_of(written(tmp_path, "nowhere", 0), tmp_path)
    assert same(read_checkpoint(tmp_path / "checkpoints/last.ckpt")["state_dict"], uninterrupted)


class Accumulated(L.Callback):
    """A signal in the middle of a step that is made of several batches."""

    def __init__(self, batch: int) -> None:
        self.batch, self.count = batch, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_signal_waits_for_all_batches_of_a_step(tmp_path, batch):
    settings = {"max_epochs": 3, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    whole, parts, rest = teacher(), teacher(), teacher()
    fit(tmp_path / "whole", whole, LastCheckpoint(), **settings)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "parts", parts, LastCheckpoint(), Accumulated(batch), **settings)
    assert stop.value.code == 143
    last = tmp_path / "parts/checkpoints/last.ckpt"
    assert fit(tmp_path / "parts", rest, LastCheckpoint(), ckpt_path=last, **settings).global_step == 6
    assert same(whole, rest)
