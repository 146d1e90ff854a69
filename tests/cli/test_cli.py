"""The command line: every configuration runs, an interrupted run goes on, commands answer and refuse clearly."""

from __future__ import annotations

import csv
import json
import os
import re
import signal

import lightning as L
import numpy as np
import pytest
import torch

import f2d2_lightning as f2
from command_line import f2d2, single_precision  # noqa: F401
from f2d2_lightning.training.loading import load_module
from launching import WITH_FSDP2
from lightning_parts import CONFIGS
from made_data import make_fashion

QUICK = [
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]",
    "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1",
]  # fmt: skip
OBJECTIVE = "--model.init_args.objective"
STUDENTS = sorted(p.name for p in CONFIGS.glob("*.yaml") if "teacher" not in p.name)


def small(name, *, teacher=None):
    """Options that make a configuration's networks and pools tiny."""
    options = ["--model.init_args.flow_map.init_args.width=16", "--model.init_args.flow_map.init_args.blocks=1"]
    if "teacher" not in name:
        options += [f"--model.init_args.teacher={teacher}"]
        options += ["--model.init_args.reference=f2d2_lightning.Reference", "--model.init_args.reference.steps=4"]
    if name.endswith("student.yaml"):
        options += [] if "fashion" in name else [f"{OBJECTIVE}=TrajectoryRegression"]
        options += [f"{OBJECTIVE}.init_args.{sizes}" for sizes in ("capacity=64", "nodes=8")]
    if "fashion" in name:
        options += ["--data.init_args.val=40", "--data.init_args.test=30"]
    elif "digits" not in name:
        options += ["--data.init_args.count=3000"]
    return options


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a trained teacher and student for each data set."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_fashion(folder / "fashion")
        patch.setenv("FASHION_MNIST", str(folder / "fashion"))
        for name in ("digits", "checkerboard", "mixture", "fashion"):
            config = CONFIGS / f"{name}_teacher.yaml"
            f2d2("fit", "--config", config, *QUICK, *small(config.name), "--trainer.max_steps=2")
        config = CONFIGS / "digits_student.yaml"
        teacher = "runs/digits/teacher/checkpoints/last.ckpt"
        f2d2("fit", "--config", config, *QUICK, *small(config.name, teacher=teacher), "--trainer.max_steps=2")
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("FASHION_MNIST", str(home / "fashion"))
    return home


STUDENT = "runs/digits/student/checkpoints/last.ckpt"


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_configuration_runs(at_home, name):
    teacher = f"runs/{name.split('_')[0]}/teacher/checkpoints/last.ckpt"
    f2d2("fit", "--config", CONFIGS / name, *QUICK, *small(name, teacher=teacher), "--trainer.fast_dev_run=2")


@pytest.mark.parametrize("name", ["fsdp1.yaml", "multi_node.yaml"])
def test_every_strategy_configuration_is_understood(name, capsys):
    """Of those that do not run in one process."""
    strategy = CONFIGS / "strategies" / name
    with pytest.raises(SystemExit) as stop:
        f2d2("fit", "--config", CONFIGS / "mixture_teacher.yaml", "--config", strategy, "--print_config")
    assert stop.value.code == 0
    assert "class_path: lightning.pytorch.strategies." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml"][: len(WITH_FSDP2)])
def test_strategies_run_in_one_process(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config, environment = CONFIGS / "mixture_teacher.yaml", dict(os.environ)
    try:
        f2d2("fit", "--config", config, "--config", CONFIGS / "strategies" / name, *QUICK, *small(config.name),
             "--trainer.devices=1", "--trainer.strategy.init_args.process_group_backend=gloo",
             "--trainer.fast_dev_run=2")  # fmt: skip
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # the launcher leaves ranks and ports behind, for the processes that it would start
        os.environ.clear()
        os.environ.update(environment)


def test_the_configuration_is_saved_beside_the_checkpoint(at_home):
    run = at_home / "runs/digits/student"
    assert {"config.yaml", "checkpoints", "metrics.csv"} <= {p.name for p in run.iterdir()}
    assert "TrajectoryRegression" in (run / "config.yaml").read_text()


def digits_run(version, *options):
    """One run of the small digits teacher in a folder of its own."""
    config = CONFIGS / "digits_teacher.yaml"
    options = (f"--trainer.logger.init_args.version={version}", *options)
    f2d2("fit", "--config", config, *QUICK, *small(config.name), *options)


def test_a_run_of_another_configuration_is_refused(at_home):
    digits_run("mine", "--trainer.max_steps=2")
    before = (at_home / "runs/digits/mine/checkpoints/last.ckpt").read_bytes()
    named = r"another configuration \(trainer.max_steps: 2 -> 1; model.init_args.warmup: 200 -> 3;"
    with pytest.raises(FileExistsError, match=named):
        digits_run("mine", "--trainer.max_steps=1", "--model.init_args.warmup=3")
    assert (at_home / "runs/digits/mine/checkpoints/last.ckpt").read_bytes() == before


def test_what_a_run_shows_of_itself_may_change(at_home, capsys):
    digits_run("shown", "--trainer.max_steps=2")
    shown = ["--trainer.enable_model_summary=true", "--trainer.callbacks=f2d2_lightning.callbacks.JointSummary"]
    with pytest.raises(SystemExit) as stop:
        digits_run("shown", "--trainer.max_steps=2", *shown)
    assert stop.value.code == 0
    assert "finished: nothing to do" in capsys.readouterr().out


def test_a_finished_run_is_left_alone(at_home, capsys):
    digits_run("done", "--trainer.max_steps=2")
    files = {path: path.stat().st_mtime_ns for path in (at_home / "runs/digits/done").rglob("*")}
    with pytest.raises(SystemExit) as stop:
        digits_run("done", "--trainer.max_steps=2")
    assert stop.value.code == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (at_home / "runs/digits/done").rglob("*")} == files


def test_a_damaged_checkpoint_is_not_gone_on_from(at_home):
    options = ("--trainer.max_steps=3", "--checkpoint.every_n_train_steps=1")
    digits_run("cut", *options)
    last = at_home / "runs/digits/cut/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut short.*previous.ckpt; use that \(--ckpt_path .*previous.ckpt\)"):
        digits_run("cut", *options)


def test_a_damaged_checkpoint_is_not_tested(at_home):
    config, damaged = CONFIGS / "digits_teacher.yaml", at_home / "damaged.ckpt"
    content = bytearray((at_home / "runs/digits/teacher/checkpoints/last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    message = r"damaged.ckpt cannot be read as a checkpoint: .*the checksum of .* is another"
    with pytest.raises(ValueError, match=message):
        f2d2("test", "--config", config, *QUICK, *small(config.name), "--ckpt_path", damaged)


class Killed(L.Callback):
    """As a kill would end it: nothing is cleaned up."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyError("killed")


@pytest.mark.parametrize("step", [0, 2, 4])
def test_the_same_command_goes_on(at_home, monkeypatch, step):
    """Before the first checkpoint, between two, and for a student with a pool of trajectories."""
    config, name = CONFIGS / "digits_student.yaml", "digits_student.yaml"
    options = [*QUICK, *small(name, teacher="runs/digits/teacher/checkpoints/last.ckpt"), "--trainer.max_steps=5",
               "--checkpoint.every_n_train_steps=2"]  # fmt: skip
    weights = {}
    for version in (f"whole{step}", f"parts{step}"):
        again = ["fit", "--config", config, *options, f"--trainer.logger.init_args.version={version}"]
        if "parts" in version:
            with pytest.MonkeyPatch.context() as patch:
                killed = Killed(step)
                patch.setattr(f2.F2D2Module, "configure_callbacks", lambda module: [killed])  # noqa: B023
                with pytest.raises(KeyError, match="killed"):
                    f2d2(*again)
            assert (at_home / f"runs/digits/{version}/checkpoints/last.ckpt").exists() == (step > 0)
        f2d2(*again)
        weights[version] = torch.load(at_home / f"runs/digits/{version}/checkpoints/last.ckpt", weights_only=True)
    whole, parts = (content["state_dict"] for content in weights.values())
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key


def test_every_run_ends_with_what_it_trained(at_home):
    """A step that no period of saving divides, far from any validation."""
    for name in ("digits", "checkerboard", "mixture", "fashion"):
        last = torch.load(at_home / f"runs/{name}/teacher/checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] == 2


@pytest.mark.parametrize(("command", "given"), [("validate", ()), ("test", ("--ckpt_path=",))])
def test_a_model_that_was_not_trained_has_no_figures(at_home, command, given, capsys):
    config = CONFIGS / "digits_teacher.yaml"
    model = ("--config", config, *QUICK, *small(config.name))
    trained = r"not trained; say which: --ckpt_path last \(runs/digits/teacher/checkpoints/last.ckpt\)"
    with pytest.raises(ValueError, match=trained):
        f2d2(command, *model, *given)
    with pytest.raises(ValueError, match=r"digits/none holds none either: train first \(f2d2 fit"):
        f2d2(command, *model, *given, "--trainer.logger.init_args.version=none")
    assert "nll" not in capsys.readouterr().out


# what a file may hold that YAML reads as something else than its name
@pytest.mark.parametrize("content", [b"", b"class_path: f2d2_lightning.FlowMatchingModule"], ids=["empty", "mapping"])
def test_a_teacher_is_the_file_that_was_named(at_home, content):
    """A file that is empty was no teacher at all, and the student trained without one."""
    config = CONFIGS / "digits_student.yaml"
    (at_home / "named.ckpt").write_bytes(content)
    (at_home / "teacher.yaml").write_text("model: {init_args: {teacher: named.ckpt}}")
    run = ("fit", "--config", config, *QUICK, *small(config.name, teacher="none"), "--trainer.fast_dev_run=1")
    for given in (["--model.init_args.teacher=named.ckpt"], ["--config", "teacher.yaml"]):
        with pytest.raises(ValueError, match=r"named.ckpt cannot be read as a checkpoint"):
            f2d2(*run, *given)


def test_a_feature_network_is_the_file_that_was_named(at_home):
    config = CONFIGS / "digits_teacher.yaml"
    (at_home / "features.pt").write_bytes(b"inception")
    quality = (
        "--trainer.callbacks+=f2d2_lightning.callbacks.SampleQuality",
        "--trainer.callbacks.features=features.pt",
    )
    with pytest.raises(ValueError, match=r"features\.pt"):
        f2d2("fit", "--config", config, *QUICK, *small(config.name), *quality, "--trainer.fast_dev_run=1")


def test_options_of_a_test_hold_over_the_checkpoint(at_home):
    config, teacher = CONFIGS / "digits_student.yaml", "runs/digits/teacher/checkpoints/last.ckpt"
    f2d2("test", "--config", config, *QUICK, *small(config.name, teacher=teacher), "--ckpt_path=last",
         "--model.init_args.steps=[3]", "--trainer.callbacks+=f2d2_lightning.callbacks.TestReport",
         "--trainer.callbacks.samples=4", "--trainer.callbacks.teacher_steps=2",
         "--trainer.callbacks.folder=three")  # fmt: skip
    (report,) = at_home.rglob("three/test_report.json")
    assert [row["steps"] for row in json.loads(report.read_text())["rows"]] == [3, None]


def test_what_is_said_holds_over_the_checkpoint(at_home, capsys):
    """Lightning's command line takes all model arguments from a checkpoint, over the configuration's."""
    digits_run("said", "--trainer.max_steps=2")
    last = at_home / "runs/digits/said/checkpoints/last.ckpt"
    digits_run("said", "--trainer.max_steps=4", "--model.init_args.ema_decay=0.5", "--ckpt_path=last")
    assert "max_steps: 2 -> 4" in capsys.readouterr().out
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == 4
    assert content["hyper_parameters"]["ema_decay"] == 0.5
    config = CONFIGS / "digits_student.yaml"
    teacher = "runs/digits/teacher/checkpoints/last.ckpt"
    message = r"the checkpoint is of f2d2_lightning.FlowMatchingModule: none of its weights"
    with pytest.raises(ValueError, match=message):
        f2d2("fit", "--config", config, *QUICK, *small(config.name, teacher=teacher), "--ckpt_path", teacher,
             "--trainer.logger.init_args.version=wrong")  # fmt: skip


def test_a_command_with_a_checkpoint_goes_on_from_its_own(at_home):
    """Given again after a kill, it must not go back to where it started from."""
    digits_run("first", "--trainer.max_steps=2")
    first = "--ckpt_path=runs/digits/first/checkpoints/last.ckpt"
    start = ("--trainer.max_steps=6", "--checkpoint.every_n_train_steps=1", first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f2.FlowMatchingModule, "configure_callbacks", lambda module: [Killed(4)])
        with pytest.raises(KeyError, match="killed"):
            digits_run("second", *start)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f2.FlowMatchingModule, "on_train_start", lambda module: seen.append(module.trainer.global_step))
        digits_run("second", *start)
    assert seen == [4]


def test_a_requeued_job_goes_on(at_home, monkeypatch):
    """What SLURM's signal makes Lightning save is in the run's folder, and is found there when it is the newest."""
    job = {"NTASKS": "1", "JOB_NAME": "fit", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    scheduler = at_home / "bin/scontrol"
    scheduler.parent.mkdir()
    scheduler.write_text('#!/bin/sh\necho "$@" > asked\n')
    scheduler.chmod(0o755)
    monkeypatch.setenv("PATH", str(scheduler.parent), prepend=os.pathsep)

    class Warned(Killed):
        """SLURM's signal in the middle of the second step; in time, the kill."""

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    options = ("--trainer.max_steps=6", "--checkpoint.every_n_train_steps=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f2.FlowMatchingModule, "configure_callbacks", lambda module: [Warned(3)])
        with pytest.raises(KeyError, match="killed"):
            digits_run("queue", *options)
    assert (at_home / "asked").read_text() == "requeue 7\n"
    run, seen = at_home / "runs/digits/queue", []
    assert [path.name for path in run.rglob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    with pytest.MonkeyPatch.context() as patch:
        original = f2.FlowMatchingModule.on_train_start
        patch.setattr(f2.FlowMatchingModule, "on_train_start",
                      lambda module: (seen.append(module.trainer.global_step), original(module)))  # fmt: skip
        digits_run("queue", *options)
    assert seen == [2]
    digits_run("not queued", *options)
    one, other = (
        torch.load(at_home / f"runs/digits/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("queue", "not queued")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_test_writes_its_report(at_home, capsys):
    config = CONFIGS / "digits_student.yaml"
    teacher = "runs/digits/teacher/checkpoints/last.ckpt"
    f2d2("test", "--config", config, *QUICK[:2], *small(config.name, teacher=teacher),
         "--trainer.callbacks=[]", "--trainer.callbacks+=f2d2_lightning.callbacks.TestReport",
         "--trainer.callbacks.samples=20", "--trainer.callbacks.teacher_steps=4", "--ckpt_path", STUDENT)  # fmt: skip
    run = at_home / "runs/digits/student"
    report = json.loads((run / "test_report.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [1, 2, 4, 8, None]
    assert [row["evaluations"] for row in report["rows"]] == [1, 2, 4, 8, 8]
    assert report["unit"] == "bits/dim"
    assert all((run / name).stat().st_size > 5000 for name in ("samples.png", "calibration.png"))
    assert "teacher" in capsys.readouterr().out
    module, x = load_module(STUDENT, f2.F2D2Module), torch.cat(list(f2.data.Digits().test_dataloader()))
    with torch.no_grad():
        expected = f2.bits_per_dim(module.log_prob(x, 2).value, 64, 17).mean()
    assert report["rows"][1]["nll"] == pytest.approx(float(expected), rel=1e-5)


def test_sample(at_home):
    options = ("--ckpt", STUDENT, "--steps", 2, "--num", 9, "--device", "cpu")
    f2d2("sample", *options, "--out", "made/grid.png")
    f2d2("sample", *options, "--out", "made/x.npz", "--batch_size", 4)
    assert (at_home / "made/grid.png").stat().st_size > 2000
    made = np.load(at_home / "made/x.npz")
    module = load_module(STUDENT, f2.F2D2Module)
    with torch.no_grad():
        again = module.sample(torch.from_numpy(made["noise"]), 2, with_log_prob=True)
    assert torch.allclose(again.state, torch.from_numpy(made["x"]), atol=1e-5)
    assert torch.allclose(again.log_prob, torch.from_numpy(made["log_prob"]), atol=1e-3)
    with pytest.raises(SystemExit):
        f2d2("sample", *options, "--out", "made/grid.png")


def test_guided_samples(at_home, capsys):
    options = ["--ckpt", STUDENT, "--steps", 2, "--num", 9, "--device", "cpu", "--batch_size", 4]
    f2d2("sample", *options, "--out", "guided.npz", "--guidance-scale", 0.05, "--guidance-steps", 3)
    printed = capsys.readouterr().out
    # three gradients, two steps, and one evaluation that measures
    assert "9 samples, 6 evaluations and 3 backward each" in printed
    made = np.load(at_home / "guided.npz")
    module = load_module(STUDENT, f2.F2D2Module)
    noise = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = f2.SelfGuidance(0.05, 3, measure=True)(module.average, noise, 2, with_log_prob=True)
    assert np.allclose(made["x"], expected.state.detach(), atol=1e-4)
    assert np.allclose(made["noise"], expected.noise, atol=1e-4)
    before, after = (float(v.detach().mean()) for v in (expected.log_prob_before, expected.log_prob_after))
    assert after > before
    assert f"log p {before:.3f} before, {after:.3f} nats after" in printed
    with pytest.raises(SystemExit):
        f2d2("sample", *options, "--out", "labelled.npz", "--label", 3)
    assert "has no classes" in capsys.readouterr().err


def test_nll(at_home, capsys):
    options = ("--steps", 4, "--out", "nll.csv", "--device", "cpu", "--batch_size", 77)
    f2d2("nll", "--ckpt", STUDENT, "--data", "digits", *options)
    with open("nll.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(300))
    value, bits = (torch.tensor([float(row[name]) for row in rows]) for name in ("log_prob", "bits_per_dim"))
    assert torch.allclose(bits, f2.bits_per_dim(value, 64, 17), rtol=1e-4)
    x = f2.data.Digits().dataset("test").__getitems__(list(range(300)))
    with torch.no_grad():
        assert torch.allclose(value, load_module(STUDENT, f2.F2D2Module).log_prob(x, 4).value, rtol=1e-4)
    assert "300 samples, 4 evaluations each (an upper bound" in capsys.readouterr().out


BAD = {
    "none.ckpt": "there is no checkpoint at none.ckpt",
    "runs/digits/teacher/checkpoints/last.ckpt": "an? F2D2Module is needed here",
    "bad.ckpt": "cannot be read as a checkpoint",
    "runs/digits/teacher": "is a folder; name a checkpoint in it: runs/digits/teacher/checkpoints/last.ckpt",
    "runs/digits": "is a folder; name a checkpoint in it: runs/digits/.*/checkpoints/last.ckpt",
}


@pytest.mark.parametrize("ckpt", list(BAD))
def test_nll_refuses_other_checkpoints(at_home, ckpt, capsys):
    (at_home / "bad.ckpt").write_bytes((at_home / STUDENT).read_bytes()[:2000])
    with pytest.raises(SystemExit) as stop:
        f2d2("nll", "--out", "bad.csv", "--device", "cpu", "--ckpt", ckpt, "--data", "digits")
    assert stop.value.code == 2
    assert re.search(BAD[ckpt], capsys.readouterr().err)
    assert not (at_home / "bad.csv").exists()


def test_help(capsys):
    f2d2("--help")
    out = capsys.readouterr().out
    assert all(command in out for command in ("fit", "validate", "test", "sample", "nll"))
