"""Two epochs of a student with everything on, through the command line: each metric and each picture is in the logs."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from f2d2_lightning.cli import main
from f2d2_lightning.metrics import SmallFeatures
from lightning_parts import CONFIGS

STEPS = (1, 2, 4, 8)
METRICS = ("nll", "nll_standard_error", "gap", "absolute_error", "correlation", "rank_correlation", "round_trip",
           "fid", "kid", "kid_std")  # fmt: skip
PICTURES = ("samples", "calibration", "nll_steps", "ranked")
SMALL = ["--model.init_args.flow_map.init_args.width=16", "--model.init_args.flow_map.init_args.blocks=1"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]


@pytest.fixture(scope="module", autouse=True)
def single_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        yield
    torch.set_default_dtype(before)


def f2d2(*arguments):
    main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a student that was trained for two epochs, validated in each, and tested."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("everything")
    argv, sys.argv = sys.argv, ["f2d2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        SmallFeatures(num_features=8, width=4).save(folder / "features.pt")
        f2d2("fit", "--config", CONFIGS / "digits_teacher.yaml", *QUIET, *SMALL, "--trainer.max_steps=3",
             "--trainer.callbacks=[]", "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
             "--trainer.callbacks.save_last=true")  # fmt: skip
        student = ["--config", CONFIGS / "digits_student.yaml"]
        for part in ("pictures", "quality", "tensorboard"):
            student += ["--config", CONFIGS / "evaluation" / f"{part}.yaml"]
        student += [*QUIET, *SMALL, "--model.init_args.objective=TrajectoryRegression",
                    "--model.init_args.objective.init_args.capacity=64",
                    "--model.init_args.objective.init_args.nodes=8",
                    "--model.init_args.reference=f2d2_lightning.Reference", "--model.init_args.reference.steps=4",
                    "--model.init_args.draws=2", "--model.init_args.reference_samples=50", "--trainer.max_steps=-1",
                    "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1",
                    "--trainer.callbacks.features=features.pt", "--trainer.callbacks.samples=60",
                    "--trainer.callbacks.cache=cache"]  # fmt: skip
        f2d2("fit", *student)
        last = "runs/digits/student/checkpoints/last.ckpt"
        f2d2("test", *student, "--ckpt_path", last)
    sys.argv = argv
    return folder / "runs/digits/student"


def logged(run):
    """Values by metric, in the order in which they were logged."""
    found: dict[str, list[float]] = {}
    for path in sorted(run.glob("metrics*.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value:
                        found.setdefault(name, []).append(float(value))
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_logged_each_epoch_and_in_test(run, metric):
    values = logged(run)
    for steps in STEPS:
        assert len(values[f"val/{metric}_{steps}"]) == 2
        assert len(values[f"test/{metric}_{steps}"]) == 1
        assert all(value == value for value in values[f"val/{metric}_{steps}"])


def test_the_reference_is_logged_once_for_all(run):
    values = logged(run)
    assert len(values["val/reference_nll"]) == 2
    # the teacher's, so the same in both epochs
    assert values["val/reference_nll"][0] == values["val/reference_nll"][1]


@pytest.mark.parametrize("picture", PICTURES)
def test_every_picture_is_on_disk_and_in_tensorboard(run, picture):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epoch in ("epoch_0000", "epoch_0001", "test"):
        assert (run / "pictures" / epoch / f"{picture}.png").stat().st_size > 5000
    seen = set()
    for path in run.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        seen |= set(events.Tags()["images"])
        if f"val/{picture}" in events.Tags()["images"]:
            assert len(events.Images(f"val/{picture}")) == 2
    assert {f"val/{picture}", f"test/{picture}"} <= seen


def test_no_feature_network_is_in_the_checkpoint(run):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"joint", "average"}
    assert (run / "checkpoints/last.ckpt").stat().st_size < 2**20


def test_the_report_tells_of_all_this(run):
    report = (run / "report.md").read_text()
    for name in ("| fid |", "| kid |", "| round trip |", "(samples.png)", "(calibration.png)", "(nll_steps.png)"):
        assert name in report
