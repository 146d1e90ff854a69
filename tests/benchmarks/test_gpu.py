"""The stages of the run on a GPU, small and on the CPU."""

import json

import pytest
import torch

import gpu
from gpu_stages import devices, report, speed, training
from gpu_stages.kept import DONE, Kept
from made_data import make_fashion

CPU = torch.device("cpu")


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["gpu.py", *map(str, arguments), "--tiny", "--device", "cpu"])
    gpu.main()


@pytest.mark.slow
def test_fashion_from_teacher_to_report(tmp_path, monkeypatch):
    make_fashion(tmp_path / "data", train=240, test=40)
    folder = tmp_path / "results"
    options = ("--folder", folder, "--data", tmp_path / "data")
    with pytest.raises(SystemExit):
        run(monkeypatch, "student", *options)  # there is no teacher
    run(monkeypatch, "teacher", "sampler", "student", "report", *options)
    student = json.loads((folder / "student.json").read_text())
    assert set(student["likelihood"]) == set(student["Frechet distance"]) == {"1", "2", "4", "8"}
    assert set(student["own density"]) == {"1", "2"}
    assert all(row["share"] == 1 for name in ("likelihood", "own density") for row in student[name].values())
    written = (folder / "report.md").read_text()
    assert "| student (" in written
    assert "fashion_student_calibration.png" in written
    before = (folder / "student.json").stat().st_mtime_ns
    run(monkeypatch, "student", *options)
    assert (folder / "student.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", [name for name in devices.checks() if name.startswith("adapter")])
def test_every_adapter_has_numbers_to_compare(name):
    assert all(answer.isfinite().all() for answer in devices.checks()[name](devices.Setting(CPU)))


def test_devices_agree_and_wrong_ones_are_named(tmp_path, monkeypatch):
    some = {name: check for name, check in devices.checks().items() if "MLP" in name and "whole" not in name}

    def wrong(here):
        return [torch.ones(3) if here.name == "float64" else -torch.ones(3)]

    def broken(here):
        if here.name != "float64":
            raise RuntimeError("no such kernel")
        return [torch.ones(3)]

    monkeypatch.setattr(devices, "checks", lambda: some | {"wrong": wrong, "broken": broken})
    kept = Kept(tmp_path / "devices.json")
    devices.run(CPU, True, kept)
    assert set(kept.result["failures"]) == {f"{n}, {s}" for n in ("wrong", "broken") for s in ("float32", "bf16")}
    assert "no such kernel" in kept.result["failures"]["broken, bf16"]
    assert kept.result["rows"]["wrong"]["float32"] == 2
    assert json.loads(kept.path.read_text())["rows"].keys() == kept.result["rows"].keys()


def test_report_of_checks_that_raised_and_of_settings_that_not_all_have(tmp_path):
    kept = Kept(tmp_path / "devices.json")
    kept.result |= {"machine": "one", "torch": "2", "tiny": False, "failures": {"backbone b, bf16": "RuntimeError: no"}}
    kept.part("rows").update({"backbone a": {"float32": 1e-7, "bf16": 1e-2, "compiled": 2e-7}})
    kept.part("rows").update({"backbone b": {"float32": 3e-7, "bf16": None, "compiled": 1e-7}})
    kept.part("rows").update({"estimator c": {"float32": 4e-7, "bf16": 2e-2}})
    kept.save()
    report.write(tmp_path, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| backbone (2) | 3.0e-07 | 1.0e-02 | 2.0e-07 |" in text
    assert "| estimator (1) | 4.0e-07 | 2.0e-02 |  |" in text
    assert "- backbone b, bf16: RuntimeError: no" in text


def test_training_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    everything = training.runs(True)
    some = {name: everything[name] for name in ("student, bf16-mixed", "callback")}
    monkeypatch.setattr(training, "runs", lambda tiny: some)
    kept = Kept(tmp_path / "training.json")
    kept.part("rows")["callback"] = {"error": 0.5, "seconds": 1.0}
    training.run(CPU, True, kept)
    assert not kept.result["failures"]
    assert kept.result["rows"]["callback"]["error"] == 0.5  # of the call before
    assert 0 < kept.result["rows"]["student, bf16-mixed"]["error"] < 0.1
    assert kept.result["rows"]["module, resumed"]["error"] == 0


def test_speed_stops_in_time(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(speed, "_command", lambda script, *options: said.append((script, *options)) or "a table")
    monkeypatch.setattr(speed, "_profile", lambda setting, name: "where time goes")
    kept = Kept(tmp_path / "speed.json")
    with pytest.raises(SystemExit, match="not measured; call again"):
        speed.run(CPU, False, kept, seconds=0.0)
    speed.run(CPU, False, kept, seconds=60.0)
    assert len(said) == len(kept.result["tables"]) == 8
    assert DONE not in kept.result
    assert any({"--network", "dit", "--compile"} <= set(options) for options in said)
