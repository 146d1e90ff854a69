"""The report of a test: its numbers, its pictures, no path of a machine, and nothing written over."""

from __future__ import annotations

import base64
import json
import math
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import f2d2_lightning as f2
from f2d2_lightning.callbacks import RunLogger, TestReport
from f2d2_lightning.callbacks._report_text import (
    Report,
    other_metrics,
    page,
    read_curves,
    to_json,
    without_machine_paths,
)
from f2d2_lightning.callbacks.report import print_table
from f2d2_lightning.callbacks.summary import Part
from lightning_parts import Pair, student, teacher, trainer

QUICK = {"samples": 2, "teacher_steps": 2, "grid": 4}
ROW = {"evaluations": 1, "nll": 2.0, "nll_standard_error": 0.1, "reference_nll": 2.1, "milliseconds": 3.0}
FEW = ROW | {
    "steps": 2,
    "gap": -0.1,
    "gap_standard_error": 0.01,
    "correlation": 0.9,
    "rank_correlation": 0.8,
    "absolute_error": 0.2,
    "round_trip": 0.05,
    "unconverged": 0.0,
}


@pytest.fixture(autouse=True)
def small_and_single_precision(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("f2d2_lightning.plots._figure.DPI", 40)


class SampleQualityLike(L.Callback):
    """Logs as a metric of samples does."""

    def on_test_epoch_end(self, trainer, pl_module):
        for k in (1, 2):
            pl_module.log(f"test/fid_{k}", 10.0 * k)
        pl_module.log("test/real_images", 50.0)


def made(**kwargs):
    return student(steps=(1, 2), objective=f2.objectives.Semigroup(), **kwargs)


def texts(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """The folder of a run that was trained, resumed, and tested twice."""
    torch.set_default_dtype(torch.float32)
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("f2d2_lightning.plots._figure.DPI", 40)
        patch.setattr(
            "sys.argv", ["/opt/bin/f2d2", "test", "--config", str(home / "a.yaml"), "--data=/data/secret/x.npy"]
        )
        run = home / "runs/pair/student"
        report, kept = TestReport(**QUICK), {}

        def go(epochs, ckpt=None, test=False):
            saved = ModelCheckpoint(run / "checkpoints", save_last=True)
            logger = RunLogger("runs", name="pair", version="student")
            callbacks = [saved, report, SampleQualityLike()]
            settings = {"enable_checkpointing": True, "log_every_n_steps": 1, "max_epochs": epochs}
            one = trainer(home, callbacks=callbacks, logger=logger, **settings)
            module = made()
            if test:
                one.test(module, datamodule=Pair(), ckpt_path=ckpt, verbose=False)
                kept["rows"] = module.agreement_table()
            else:
                one.fit(module, datamodule=Pair(), ckpt_path=ckpt)

        last = run / "checkpoints/last.ckpt"
        go(1)
        go(2, last)
        go(2, last, test=True)
        first = texts(run)
        go(2, last, test=True)
    return run, first, kept["rows"]


def test_the_report_says_where_it_comes_from(tested):
    run, _, _ = tested
    text = (run / "report.md").read_text()
    assert text.startswith("# Test of F2D2Module on Pair\n")
    assert "| checkpoint | `checkpoints/last.ckpt`, relative to the run's folder |" in text
    assert "| command | `f2d2 test --config a.yaml --data=x.npy` |" in text
    assert "| test samples | 50 |" in text
    assert re.search(r"\| date \| \d{4}-\d\d-\d\d \d\d:\d\d UTC \|", text)
    assert f"torch {torch.__version__.split('+')[0]}" in text
    everything = text + (run / "test_report.json").read_text()
    assert str(run.parents[2]) not in everything
    assert "/data" not in everything


def test_the_report_has_the_numbers(tested):
    run, _, rows = tested
    text = (run / "report.md").read_text()
    for row in rows[:2]:
        assert f"| {row['steps']} | {row['steps']} | {row['nll']:.3f} ± {row['nll_standard_error']:.3f} | " in text
        assert f"| {row['gap']:+.3f} ± {row['gap_standard_error']:.3f} | {row['correlation']:.3f} | " in text
        assert f"| {row['round_trip']:.3g} | " in text
    assert f"| teacher | 16 | {rows[-1]['nll']:.3f} ± " in text
    assert "NLL, nats" in text
    assert "upper bound" not in text
    assert "unconverged" not in text
    assert "| by steps | 1 | 2 |\n| --- | --- | --- |\n| error_bar |" in text
    assert "\n| fid | 10 | 20 |" in text
    assert "| real_images | 50 |" in text
    # what the table has is not told twice
    assert "absolute_error" not in text
    module = made()
    head = sum(p.numel() for p in module.joint.head.parameters())
    assert f"| head | `DivergenceHead` | {head:,} | 0 |  |" in text
    assert f"| teacher | `MLP` | 0 | {sum(p.numel() for p in teacher().average.parameters()):,} | not saved" in text


def test_the_report_says_whose_the_error_is(tested):
    run, _, _ = tested
    text, found = (run / "report.md").read_text(), json.loads((run / "test_report.json").read_text())["diagnosis"]
    section = text.split("## Where the error comes from\n\n")[1].split("\n\n##")[0]
    paragraph, table = section.split("\n\n")
    assert paragraph == found["text"]
    assert found["points"] == 32
    for row in found["rows"]:
        errors = (f"{row[name]:.3f}" for name in ("error", "targets", "probes", "head", "map"))
        assert f"| {row['steps']} | {' | '.join(errors)} |" in table
    # a semigroup has no trajectories to blame
    assert [row["targets"] + row["probes"] for row in found["rows"]] == [0, 0]


@pytest.mark.parametrize("diagnosed", [32, 5, 0])
def test_a_planted_fault_is_printed_at_the_end_of_a_test(tmp_path, capsys, diagnosed):
    """A divergence that is 5 too large in an untrained student, whose map is its teacher's."""
    module = student(steps=(1, 2), reference=f2.Reference(steps=64, probes=0))
    module.average.head.register_forward_hook(lambda head, args, answer: answer + 5.0)
    report = TestReport(folder=str(tmp_path), diagnosed=diagnosed, **QUICK)
    trainer(tmp_path, callbacks=[report]).test(module, datamodule=Pair(), verbose=False)
    out = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "test_report.json").read_text()).get("diagnosis")
    assert (found is None) == (diagnosed == 0)
    assert ("most of it is the head's, whose divergence along the teacher's path is off by 5" in out) == (diagnosed > 0)
    if found is not None:
        assert found["points"] == diagnosed
        assert [row["whose"] for row in found["rows"]] == ["head", "head"]
        # the reference that the test computed is the one that a module computes by itself
        again = module.diagnose(Pair().dataset("test").values[:diagnosed])
        assert again.rows[1].error == pytest.approx(found["rows"][1]["error"], rel=1e-4)
    with pytest.raises(ValueError, match="diagnosed=-1"):
        TestReport(diagnosed=-1)


def test_the_report_shows_its_figures(tested):
    run, _, _ = tested
    text = (run / "report.md").read_text()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)\n\n\*([^*]+)\*", text)
    assert [name for name, _ in shown] == [
        f"{n}.png" for n in ("samples", "calibration", "nll_steps", "density", "training")
    ]
    for name, caption in shown:
        assert (run / name).read_bytes()[:4] == b"\x89PNG"
        assert caption.endswith(".")
    assert all("nats" in caption for name, caption in shown if name not in ("samples.png", "training.png"))


def test_numbers_are_json_for_any_parser(tested):
    run, _, rows = tested

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((run / "test_report.json").read_text(), parse_constant=refuse)
    assert found["unit"] == "nats"
    assert [row["steps"] for row in found["rows"]] == [1, 2, None]
    assert found["rows"][1]["gap"] == pytest.approx(rows[1]["gap"], rel=1e-5)
    more = ("own_density_gap", "own_density_error", "error_bar", "error_covered")
    others = {name: value for name, value in found["metrics"].items() if not name.startswith(more)}
    assert others == {"fid_1": 10.0, "fid_2": 20.0, "real_images": 50.0}
    assert found["metrics"].keys() - others == {f"{name}_{k}" for name in more for k in (1, 2)}
    assert json.loads(to_json({"a": [math.nan, {"b": math.inf}], "c": 1})) == {"a": [None, {"b": None}], "c": 1}


class Seen(HTMLParser):
    """What a page holds: text of its cells and headings, and sources of its pictures."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.pictures, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        if tag in ("td", "h1", "h2"):
            self.inside = ""

    def handle_data(self, data):
        if self.inside is not None:
            self.inside += data

    def handle_endtag(self, tag):
        if tag in ("td", "h1", "h2"):
            self.cells.append(self.inside)
            self.inside = None


def test_samples_are_counted_once_and_those_of_all_loaders(tmp_path):
    x = Pair().splits()["test"][0]
    # what the second of two processes is dealt of five samples, one of them a second time, and another loader
    dealt = DataLoader(x[:5], 2, sampler=DistributedSampler(x[:5], 2, 1, shuffle=False))
    one = trainer(tmp_path, callbacks=[TestReport(str(tmp_path), diagnosed=0, **QUICK)])
    one.test(made(), [dealt, DataLoader(x[5:9], 4)], verbose=False)
    assert "| test samples | 6 |" in (tmp_path / "report.md").read_text()


def test_the_page_holds_the_same_numbers_and_its_pictures(tested):
    run, _, rows = tested
    seen = Seen((run / "report.html").read_text())
    assert seen.cells[0] == "Test of F2D2Module on Pair"
    for row in rows[:2]:
        assert f"{row['nll']:.3f} ± {row['nll_standard_error']:.3f}" in seen.cells
    names = re.findall(r"\]\((\w+\.png)\)", (run / "report.md").read_text())
    assert names
    held = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in seen.pictures]
    assert held == [(run / name).read_bytes() for name in names]


def test_tags_in_a_report_stay_text(tmp_path):
    seen = Seen(page("# Test of <script>a()</script>\n\n| a |\n| --- |\n| <img src=x> |\n", tmp_path))
    assert seen.cells == ["Test of <script>a()</script>", "<img src=x>"]
    assert seen.pictures == []


def test_a_second_test_writes_beside_the_first(tested):
    run, first, _ = tested
    now = texts(run)
    assert all(now[name] == content for name, content in first.items() if not name.startswith("metrics"))
    again = texts(run / "test-2")
    assert {"report.md", "report.html", "test_report.json", "samples.png"} <= set(again)
    # links are to the pictures beside it, the checkpoint is where it was
    assert b"](samples.png)" in again["report.md"]
    assert b"| checkpoint | `checkpoints/last.ckpt`, relative to the run's folder |" in again["report.md"]


def test_the_training_curve_is_of_all_sessions(tested):
    run, _, _ = tested
    assert {"metrics.csv", "metrics-1.csv", "metrics-2.csv", "metrics-3.csv"} <= set(texts(run))
    steps, values = read_curves(run)["train/loss"]
    assert steps == list(range(6))
    assert all(math.isfinite(v) for v in values)


def test_curves_of_sessions_that_overlap(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss,lr\n0,5,,1\n1,4,,1\n1,,9,\n2,3,,1\n")
    (tmp_path / "metrics-1.csv").write_text("step,train/loss,train/velocity_loss\n2,30,1\n3,20,2\n")
    (tmp_path / "metrics-10.csv").write_text("step,train/loss\n3,7\n")
    (tmp_path / "metrics-2.csv").write_text("step,test/nll_1\n3,7\n")
    (tmp_path / "metrics-old.csv").write_text("step,train/loss\n0,1\n")
    curves = read_curves(tmp_path)
    assert list(curves) == ["train/loss", "train/velocity_loss", "val/loss"]
    assert curves["train/loss"] == ([0, 1, 2, 3], [5.0, 4.0, 30.0, 7.0])
    assert curves["train/velocity_loss"] == ([2, 3], [1.0, 2.0])
    assert curves["val/loss"] == ([1], [9.0])
    assert read_curves(tmp_path / "nowhere") == {}


def test_files_of_others_and_overwriting(tmp_path):
    (tmp_path / "samples.png").write_bytes(b"mine")
    for overwrite, folder in ((False, "test-2"), (False, "test-3"), (True, ".")):
        report = TestReport(folder=str(tmp_path), overwrite=overwrite, **QUICK)
        run = trainer(tmp_path / "elsewhere", callbacks=[report])
        run.test(made(), datamodule=Pair(), verbose=False)
        assert (tmp_path / folder / "report.md").exists()
        assert ((tmp_path / "samples.png").read_bytes() == b"mine") is not overwrite
    assert "none: the weights in memory" in (tmp_path / "report.md").read_text()
    # no logger, no curve
    assert not (tmp_path / "training.png").exists()


def test_another_module_is_refused_before_the_test(tmp_path):
    with pytest.raises(ValueError, match="FlowMatchingModule has no likelihoods in few steps"):
        trainer(tmp_path, callbacks=[TestReport()]).test(teacher(), datamodule=Pair(), verbose=False)
    with pytest.raises(ValueError, match="grid=0"):
        TestReport(grid=0)


def test_a_trial_prints_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path, callbacks=[TestReport(**QUICK)], fast_dev_run=1).test(made(), datamodule=Pair(), verbose=False)
    assert "gap to teacher" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def report(**kwargs):
    settings = {
        "title": "Test",
        "run": Path("runs/a"),
        "checkpoint": Path("runs/a/checkpoints/last.ckpt"),
        "samples": 10,
        "device": "cpu",
        "unit": "bits/dim",
        "reference_name": "own velocity",
        "parts": [Part("head", "Head", 1200, 0)],
        "rows": [FEW, ROW | {"steps": None}],
        "metrics": {},
        "figures": ("ranked",),
        "ranked_by": 1,
        "command": ["f2d2", "test"],
        "date": datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc),
    }
    return Report(**(settings | kwargs)).markdown()


def test_units_names_and_bounds():
    text = report()
    assert "gap to own velocity" in text
    assert "| own velocity | 1 | 2.000 ± 0.100 |  |" in text
    assert "NLL (an upper bound: uniform dequantization)" in text
    assert "2026-01-02 03:04 UTC" in text
    assert "1 step find" in text
    assert "over all samples" not in text
    assert "own velocity's, and what is compared with it" in report(rows=[FEW | {"nll": 2.3}, ROW | {"steps": None}])
    assert "## Other metrics" not in text
    assert "## Figures" not in report(figures=())


def test_what_is_missing_is_left_out_and_what_failed_is_told():
    text = report(rows=[FEW | {"round_trip": math.nan, "gap": math.nan}, ROW | {"steps": None}])
    assert "round trip" not in text
    assert "| none ± 0.010 |" in text
    text = report(rows=[FEW | {"unconverged": 0.125}, ROW | {"steps": None}])
    assert "| 12.5 % |" in text
    assert "whose inversion failed" in text


def test_metrics_that_the_table_has_are_not_others():
    named = {"test/nll_2": 1.0, "test/round_trip_2": 1.0, "test/reference_nll": 1.0, "test/nll_3": 2.0}
    named |= {"test/fid_2": torch.tensor(7.5), "val/fid_2": 1.0, "test/unconverged_2": 0.0, "train/loss": 1.0}
    assert other_metrics(named, (2,)) == {"nll_3": 2.0, "fid_2": 7.5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--a=/home/me/x/y.yaml", "--a=x/y.yaml"),
        ("/home/me/x /etc/passwd", "x passwd"),
        ("--b=runs/a/b.ckpt ./c ../d ~/e", "--b=runs/a/b.ckpt ./c ../d ~/e"),
        ("s3://bucket/key https://host/page", "s3://bucket/key https://host/page"),
        ('{"root": "/data/deep/set", "n": 3}', '{"root": "set", "n": 3}'),
        ("--c=[/data/a.npy,/home/me/b.npy]", "--c=[a.npy,b.npy]"),
        ("1/2 a/b", "1/2 a/b"),
    ],
)
def test_no_path_of_a_machine(text, expected):
    assert without_machine_paths(text, Path("/home/me")) == expected


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("runs/a/checkpoints/x.ckpt", "checkpoints/x.ckpt"),
        ("other/x.ckpt", "other/x.ckpt"),
        ("/far/away/x.ckpt", "x.ckpt"),
    ],
)
def test_the_checkpoint_from_the_run(checkpoint, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"| checkpoint | `{said}`" in report(checkpoint=checkpoint)


def test_the_printed_table(capsys):
    print_table([FEW, ROW | {"steps": None}], "bits/dim", "own velocity")
    out = capsys.readouterr().out
    assert "gap to own velocity" in out
    assert "bits/dim" in out
    assert "2.000 ± 0.100" in out
    assert "-0.100 ± 0.010" in out
    assert "own units" not in out
    print_table([FEW], "nats", log_scale=2.5)
    assert "in the table's own units, those of f2d2 nll, it is +2.5000 nats more" in capsys.readouterr().out
    assert "it is -0.5000 nats more" in report(log_scale=-0.5)


def test_all_test_images_are_kept(tmp_path):
    from test_pictures import Images, image_student

    report = TestReport(folder=str(tmp_path), **QUICK)
    module = image_student()
    data = Images()
    trainer(tmp_path, callbacks=[report]).test(module, datamodule=data, verbose=False)
    x = data.dataset("test").__getitems__(list(range(20)))
    with torch.no_grad():
        bits = f2.bits_per_dim(module.log_prob(x, 2).value.double(), 16, 4).numpy()
    assert len(report.galleries[""].points) == 20
    assert torch.equal(report.galleries[""].points.x, x)
    text = (tmp_path / "report.md").read_text()
    assert "The test images that 2 steps find most and least likely" in text
    assert np.mean(bits) == pytest.approx(
        json.loads((tmp_path / "test_report.json").read_text())["rows"][1]["nll"], rel=1e-5
    )
