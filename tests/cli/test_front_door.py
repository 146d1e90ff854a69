"""What somebody meets first: usage, configurations by name, errors in a line, and one's own data."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import f2d2_lightning as f2
from command_line import f2d2, single_precision  # noqa: F401
from f2d2_lightning.cli import F2D2CLI, main
from f2d2_lightning.cli._configs import config_names
from f2d2_lightning.data import Table
from f2d2_lightning.data.rows import find_rows
from lightning_parts import CONFIGS

SHORT = [
    *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"),
]
NET = """
import torch


class Net(torch.nn.Module):
    def __init__(self, dim=3):
        super().__init__()
        self.inside, self.last = torch.nn.Linear(dim + 2, 16), torch.nn.Linear(16, dim)

    def forward(self, x, s, t):
        return self.last(torch.nn.functional.silu(self.inside(torch.cat((x, s[:, None], t[:, None]), 1))))
"""


def rows():
    generator = np.random.default_rng(0)
    return generator.normal(size=(300, 3)) * (1.0, 100.0, 0.01) + (0.0, 1000.0, 5.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments):
    """What a user sees of a mistake: one line, and 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed.err
    return line


def test_usage_comes_before_torch():
    code = "import sys; from f2d2_lightning.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for arguments, expected in ((["--help"], "usage: f2d2"), (["--version"], f2.__version__), (["configs"], "digits")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert expected in done.stdout


def test_every_configuration_has_a_name_and_a_line(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(config_names())
    assert {*config_names()} == {p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml")}
    assert all(len(line.split()) > 2 for line in lines)


def test_the_wheel_holds_the_configurations(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, CONFIGS.parent], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    for path in CONFIGS.rglob("*.yaml"):
        assert f"f2d2_lightning/configs/{path.relative_to(CONFIGS).as_posix()}" in names
    assert "f2d2_lightning/cli/__init__.py" in names


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fti"], "no command 'fti'; did you mean 'fit'?"),
        (["fit", "--config", "digits_techer"], "did you mean 'digits_teacher'?"),
        (["fit", "--config", "digits_teacher", "--trainer.max_sreps", "3"], "did you mean '--trainer.max_steps'?"),
        (["fit", "--config", "digits_teacher", "--trainer.max_steps", "x"], "--trainer.max_steps 'x': int is expected"),
        (["fit", "--config", "digits_teacher", "--model", "f2d2_lightning.F2D2Modul"], "'f2d2_lightning.F2D2Module'?"),
        (["fit", "--config", "digits_teacher", "--config", "bad.yaml"], "PreconditionedMLP takes no 'widht'; did you"),
        (["fit", "--config", "digits_teacher", "--config", "list.yaml"], "list.yaml is a list, '[1, 2]'; a mapping is"),
        (["nll", "--ckpt", "nowhere.ckpt", "--data", "digits"], "there is no checkpoint at nowhere.ckpt"),
        (["nll", "--ckpt", "notes.txt", "--data", "digits"], "notes.txt cannot be read as a checkpoint"),
        (["sample", "--stps", "3"], "did you mean '--steps'?"),
        (["init", "mine", "--data", "nowhere"], "--data is nowhere"),
        (["init", "mine", "--data", "row.npy"], "no such file or folder; did you mean 'rows.npy'?"),
        (["init", "mine", "--data", "pairs.npz"], "pairs.npz holds pairs, theta and x, which are trained on in Python"),
        (
            ["init", "mine", "--data", "signed.npy"],
            "integers -3 to 3; images are levels from 0 on: add 3",
        ),
        (["init", "mine", "--data", "rows.npy", "--size", "0"], "--size '0'"),
        (["init", "", "--data", "rows.npy"], "folder has no value; expected a path or a name"),
        (["init", "mine", "--data", "words.csv"], "row 2: 'red' in column b"),
        (["init", "notes.txt", "--data", "rows.npy"], "File exists: 'notes.txt'"),
        (["init", "notes.txt/mine", "--data", "rows.npy"], "Not a directory: 'notes.txt/mine'"),
        (["init", "mine", "--data", "notes.txt"], "--data is notes.txt"),
        (["init", "mine", "--data", "rows.npy", "--network", "my_net.Nett"], "did you mean 'Net'?"),
        (["fit"], "f2d2 fit needs a configuration: --config NAME (f2d2 configs"),
        (["fit", "--trainer.max_steps", "3"], "f2d2 init my_run --data"),
        (["test", "--config", "digits_teacher"], "f2d2 test without a checkpoint"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_line_with_its_remedy(arguments, expected, folder, capsys):
    (folder / "notes.txt").write_text("not a checkpoint")
    (folder / "words.csv").write_text("a,b\n1,red\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "my_net.py").write_text(NET)
    np.save(folder / "rows.npy", rows())
    np.savez(folder / "pairs.npz", theta=rows(), x=rows())
    np.save(folder / "signed.npy", np.arange(-3, 4, dtype=np.int8).reshape(7, 1, 1).repeat(4, 1).repeat(4, 2))
    net = {"class_path": "f2d2_lightning.nn.PreconditionedMLP", "init_args": {"shape": [1, 8, 8], "widht": 3}}
    bad = {"model": {"class_path": "f2d2_lightning.FlowMatchingModule", "init_args": {"flow_map": net}}}
    (folder / "bad.yaml").write_text(yaml.safe_dump(bad))
    assert expected in said(capsys, *arguments)


def pictures(folder):
    generator = np.random.default_rng(0)
    for index in range(12):
        pixels = generator.integers(0, 256, (10, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def trained(*options):
    """What ``f2d2 init`` said to do next, at a small size; the last command gives likelihoods."""
    f2d2("init", "mine", *options)
    for name in ("teacher", "student"):
        f2d2("fit", "--config", f"mine/{name}.yaml", *SHORT)
    f2d2("test", "--config", "mine/student.yaml", "--ckpt_path", "last", "--trainer.limit_test_batches=1")


def likelihoods(data, *options):
    main(["nll", "--ckpt", "mine/student/checkpoints/last.ckpt", "--data", data, "--out", "nll.csv", *options])
    with open("nll.csv", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_a_folder_of_images(folder):
    (folder / "images").mkdir()
    pictures(folder / "images")
    trained("--data", "images")
    found = likelihoods("images", "--steps", "2")
    assert len(found) == 12
    assert all(np.isfinite(float(row["bits_per_dim"])) for row in found)


def test_a_table_in_its_own_units(folder, capsys):
    header = "a,b,c"
    np.savetxt(folder / "rows.csv", rows(), delimiter=",", header=header, comments="")
    trained("--data", "rows.csv")
    student = f2.load("mine/student/checkpoints/last.ckpt")
    # rows of three numbers are no picture, which is known before they are drawn
    assert "--out samples.png" not in capsys.readouterr().out
    F2D2CLI._say_uses(SimpleNamespace(model=student), "my run/last.ckpt")
    (given,) = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if " sample " in line]
    assert given[2:4] + given[-2:] == ["--ckpt", "my run/last.ckpt", "--out", "samples.npz"]
    line = said(capsys, "sample", "--ckpt", "mine/student/checkpoints/last.ckpt")
    assert "--out is samples.png, and states of shape (3,) are neither images" in line
    assert line.endswith("--out samples.npz takes their numbers")
    got = torch.tensor([float(row["log_prob"]) for row in likelihoods("rows.csv")], dtype=torch.float64)

    data = Table("rows.csv")
    data.setup()
    x = torch.tensor(rows(), dtype=torch.float32)
    # by hand: a density changes by the volume of the units
    states = (x - data.units.center) / data.units.scale
    expected = student.log_prob(states, 4).value.double() - data.units.scale.double().log().sum()
    assert torch.allclose(got, expected, atol=1e-3)
    assert data.units.scale.tolist() == pytest.approx([1.0, 100.0, 0.01], rel=0.15)

    # a saved folder takes and gives rows in the same units, if it was told them
    about = {"shape": student.shape, "levels": student.levels, "low": student.low, "high": student.high}
    f2.save_pretrained(student.average, "told", **about, units=data.units)
    f2.save_pretrained(student.average, "untold", **about)
    scores = {}
    for model in ("mine/student/checkpoints/last.ckpt", "told", "untold"):
        main(["nll", "--ckpt", model, "--data", "rows.csv", "--out", "again.csv", "--overwrite", "true"])
        with open("again.csv", newline="") as file:
            lines = csv.DictReader(line for line in file if not line.startswith("#"))
            scores[model] = torch.tensor([float(line["log_prob"]) for line in lines], dtype=torch.float64)
        assert ("saved without units=" in "".join(capsys.readouterr())) == (model == "untold")
        main(["sample", "--ckpt", model, "--num", "50", "--out", "made.npz", "--overwrite", "true"])
        made = np.load("made.npz")
        few = student.sample(torch.from_numpy(made["noise"]), 4, with_log_prob=True)
        if model == "untold":
            assert np.allclose(made["x"], few.state.detach(), atol=1e-4)
            continue
        assert torch.allclose(scores[model], expected, atol=1e-3)
        # by hand again
        there = few.state.detach() * data.units.scale + data.units.center
        assert np.allclose(made["x"], there, rtol=1e-4, atol=1e-4)
        assert np.allclose(made["log_prob"], few.log_prob.detach() - data.units.scale.log().sum(), atol=1e-3)
    # predictions are of the test split, and as f2d2 nll has them
    f2d2("predict", "--config", "mine/student.yaml", "--ckpt-path", "last", "--trainer.accelerator=cpu")
    with open("mine/student/predictions.csv", newline="") as file:
        found = [float(line["log_prob_2"]) for line in csv.DictReader(s for s in file if not s.startswith("#"))]
    of_test = student.log_prob(data.dataset("test").values, 2).value.double() - data.log_scale
    assert found == pytest.approx(of_test.tolist(), abs=1e-3)
    # what guidance says of log p is in them as well
    guided = []
    for model in ("told", "untold"):
        given = ("--guidance_scale", "0.01", "--out", "made.npz", "--overwrite", "true")
        main(["sample", "--ckpt", model, "--num", "50", *given])
        guided.append(float(re.search(r"one-step log p (\S+)", "".join(capsys.readouterr()))[1]))
    assert guided[1] - guided[0] == pytest.approx(data.log_scale, abs=2e-3)


def test_printed_commands_can_be_given(folder, capsys):
    np.savetxt("my rows.csv", rows(), delimiter=",")
    np.savetxt("two\nlines.csv", rows(), delimiter=",")
    f2d2("init", "lines", "--data", "two\nlines.csv")
    assert yaml.safe_load(Path("lines/teacher.yaml").read_text())["data"]["init_args"]["path"] == "two\nlines.csv"
    capsys.readouterr()
    f2d2("init", "my run", "--data", "my rows.csv")
    given = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  f2d2")]
    assert [line[3] for line in given[:3]] == [f"my run/{name}.yaml" for name in ("teacher", "student", "student")]
    assert given[3][3:6] == ["my run/student/checkpoints/last.ckpt", "--data", "my rows.csv"]
    assert given[3][-1] == "my run/nll.csv"


def test_a_network_of_ones_own(folder):
    (folder / "my_net.py").write_text(NET)
    np.save(folder / "rows.npy", rows())
    try:
        trained("--data", "rows.npy", "--network", "my_net.Net")
        found = likelihoods("rows.npy", "--trust", "my_net")
    finally:
        sys.modules.pop("my_net", None)
    assert len(found) == 300


def test_predictions_are_written_and_hyphens_will_do(folder):
    f2d2("init", "mine", "--data", "digits")
    for name in ("teacher", "student"):
        f2d2("fit", "--config", f"mine/{name}.yaml", *SHORT)
    f2d2("predict", "--config", "mine/student.yaml", "--ckpt-path", "last", "--trainer.accelerator=cpu")
    with open("mine/student/predictions.csv", newline="") as file:
        found = list(csv.DictReader(line for line in file if not line.startswith("#")))
    x = f2.data.Digits().dataset("test").__getitems__(list(range(300)))
    expected = f2.load("mine/student/checkpoints/last.ckpt").log_prob(x, 2).value
    assert [float(row["log_prob_2"]) for row in found] == pytest.approx(expected.tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="for students"):
        f2d2("predict", "--config", "mine/teacher.yaml", "--ckpt_path", "last", "--trainer.accelerator=cpu")


def test_a_name(folder):
    f2d2("init", "mine", "--data", "digits")
    content = yaml.safe_load((folder / "mine/student.yaml").read_text())
    assert content["model"]["init_args"] == {"teacher": "mine/teacher/checkpoints/last.ckpt"}
    assert content["data"]["class_path"] == "f2d2_lightning.data.Digits"
    with pytest.raises(SystemExit):
        f2d2("init", "mine", "--data", "digits")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a,b\n1,2\n3\n", "row 3: 1 columns for 2"),
        ("a,b\n1,2\n3,nan\n", "row 3: 'nan' in column b"),
        ("1,2\n3,\n", "row 2: '' in column 2; a density needs every number"),
        ("a,b\n1,2\n\n3,\n", "row 4: '' in column b; .* missing values, or fill them in"),
        ("a;b\n1,5;2\n", "row 2: '1,5' in column a; write decimals with a point"),
        ("a,colour\n1,red\n2,blue\n", "row 2: 'red' in column colour; .* holds words: leave the column out"),
        ("a,b\n1,2\n2,x\n", "row 3: 'x' in column b; .* correct it, or leave out the row"),
        ("a,b\n1,2024_01_30\n2,2024_01_31\n", "row 2: '2024_01_30' in column b; .* holds words"),
        ("", "numbers of shape"),
        # in the place of a number, and so no name of a column
        ("nan,nan\n1,2\n", "row 1: 'nan' in column 1"),
        ("1,5;2,5\n1;2\n", "row 1: '1,5' in column 1; write decimals with a point"),
    ],
)
def test_tables_that_cannot_be(written, expected, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(written)
    with pytest.raises(ValueError, match=expected):
        Table(str(path)).setup()


@pytest.mark.parametrize(
    ("above", "columns"),
    [
        ("# made on Monday\na,b,c\n", ["a", "b", "c"]),
        ("# x; y: metres\n\n# by me, 1, 2\na,b,c\n", ["a", "b", "c"]),
        ("# made on Monday\n# a,b,c\n", ["a", "b", "c"]),
        ("# made on Monday\n", None),
        ("#\n", None),
    ],
)
def test_comments_above_a_table(above, columns, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(above + "\n".join(",".join(map(str, row)) for row in rows()))
    table = Table(str(path))
    table.setup()
    assert table.columns == columns
    assert np.array_equal(f2.data.read_rows(path), rows().astype(np.float32))


def test_labels_of_a_table_are_said_to_be_left_out(folder, capsys):
    np.savez("rows.npz", x=rows(), y=np.arange(len(rows())) % 3)
    f2d2("init", "mine", "--data", "rows.npz")
    assert "labels y were left out" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("comments", ["", "# "], ids=["names", "comment"])
@pytest.mark.parametrize("separator", [",", ";", "|", "\t", ", ", " "], ids=repr)
def test_separators_of_a_table(separator, comments, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    np.savetxt(path, rows(), delimiter=separator, header=separator.join(("a;b", "c", "d")), comments=comments)
    if separator == ";":
        path.write_text(path.read_text().replace("a;b", "a"))
    found = find_rows(path)
    assert torch.equal(found.values.float(), torch.tensor(rows(), dtype=torch.float32))
    assert found.columns == ["a" if separator == ";" else "a;b", "c", "d"]


def test_tables_of_other_kinds_get_a_remedy(tmp_path):
    (tmp_path / "rows.csv").write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        find_rows(tmp_path / "rows.csv")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"rows.parquet is no .csv, .tsv, .npy, .npz file; .*to_csv"):
        find_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize(("name", "kept"), [("", 2), ("Unnamed: 0", 2), ("a", 3)])
def test_the_numbers_that_pandas_gives_to_rows_are_no_column(name, kept, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"{name},b,c\n7,0.5,1\n9,0.25,2\n")
    found = find_rows(path)
    assert torch.equal(found.values, torch.tensor([[7, 0.5, 1], [9, 0.25, 2]])[:, -kept:])
    assert bool(found.said) == (kept == 2)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("0,1,2\n0.5,1.5,2.0\n-1.0,1e-3,0.25\n", [[0.5, 1.5, 2.0], [-1.0, 1e-3, 0.25]]),
        (",0,1\n0,5,6\n1,7,8\n", [[5, 6], [7, 8]]),
        ("2019;2020\n0.5;1.5\n2.5;3.5\n", [[0.5, 1.5], [2.5, 3.5]]),
        # and what may as well be a row of numbers is one
        ("0,1\n3,0.5\n", [[0, 1], [3, 0.5]]),
        ("0,2\n2.5,0.5\n", [[0, 2], [2.5, 0.5]]),
        ("0\n0.5\n", [[0], [0.5]]),
    ],
)
def test_numbers_of_columns_are_no_row(written, kept, tmp_path):
    """pandas names columns that have no names 0, 1, 2, ...: as a row they were data, and all others moved by one."""
    path = tmp_path / "rows.csv"
    path.write_text(written)
    found = find_rows(path)
    assert found.values.tolist() == kept
    assert any("counts the columns" in said for said in found.said) == (len(kept) + 1 == len(written.splitlines()))


def test_a_table_with_missing_numbers_is_refused(tmp_path):
    """Before one of them makes a column's mean, and so all of the column, NaN."""
    x = rows()
    x[7, 1], x[9, 0] = np.nan, np.inf
    np.save(tmp_path / "rows.npy", x)
    with pytest.raises(ValueError, match="holds NaN or infinity in 2 of 300 samples"):
        Table(str(tmp_path / "rows.npy")).setup()


LEVELS = np.random.default_rng(0).integers(0, 256, (60, 6, 6, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("array", "expected", "said"),
    [
        (LEVELS[..., 0], LEVELS[:, None, :, :, 0], "grey images"),
        (LEVELS, LEVELS.transpose(0, 3, 1, 2), "channels come last"),
        (LEVELS[..., :1], LEVELS[:, None, :, :, 0], "channels come last"),
        (LEVELS / 255, LEVELS.transpose(0, 3, 1, 2), "taken as 8-bit levels"),
        ((LEVELS[..., 1] / 255).astype(np.float16), LEVELS[:, None, :, :, 1], "taken as 8-bit levels"),
        (LEVELS // 16, LEVELS.transpose(0, 3, 1, 2) // 16, "16 levels"),
    ],
    ids=["grey", "last", "one", "floats", "half", "16"],
)
def test_images_in_an_array(array, expected, said, folder, capsys):
    np.savez(folder / "images.npz", x=array)
    assert np.array_equal(f2.data.read_rows("images.npz"), expected)
    f2d2("init", "mine", "--data", "images.npz")
    assert said in capsys.readouterr().out
    data = yaml.safe_load((folder / "mine/teacher.yaml").read_text())["data"]["init_args"]
    made = Table(data["path"], levels=data.get("levels"))
    assert made.dataset("train").quantization.levels == (16 if array.max() == 15 else 256)


def test_levels_that_were_divided_by_255_are_read_by_all_commands(folder):
    np.save(folder / "images.npy", LEVELS / 255)
    f2d2("init", "mine", "--data", "images.npy")
    for name in ("teacher", "student"):
        f2d2("fit", "--config", f"mine/{name}.yaml", *SHORT)
    found = likelihoods("images.npy")
    np.save(folder / "levels.npy", LEVELS)
    (folder / "nll.csv").unlink()
    assert [row["log_prob"] for row in likelihoods("levels.npy")] == [row["log_prob"] for row in found]
    assert len(found) == 60


def test_arrays_that_stay_as_they_are(tmp_path):
    generator = np.random.default_rng(0)
    for array in (generator.random((40, 3, 6, 6)), generator.integers(0, 2, (40, 1, 6, 6)).astype(float), rows()):
        np.save(tmp_path / "rows.npy", array)
        assert np.array_equal(f2.data.read_rows(tmp_path / "rows.npy"), array.astype(np.float32))


def test_splits_of_a_table_are_disjoint_and_standardised(tmp_path):
    np.save(tmp_path / "rows.npy", rows())
    data = Table(str(tmp_path / "rows.npy"), val=0.1, test=0.2)
    parts = {name: data.dataset(name).values for name in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [210, 30, 60]
    assert len(torch.cat(list(parts.values())).unique(dim=0)) == 300
    assert parts["train"].mean(0).abs().max() < 1e-4
    assert parts["train"].std(0).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    again = Table(str(tmp_path / "rows.npy"), val=0.1, test=0.2)
    again.load_state_dict(data.state_dict())
    assert torch.equal(again.dataset("test").values, parts["test"])


@pytest.mark.parametrize("standardize", [True, False])
def test_states_in_other_units_than_the_checkpoints_are_refused(tmp_path, standardize):
    np.save(tmp_path / "rows.npy", rows())
    kept, data = (Table(str(tmp_path / "rows.npy"), standardize=given) for given in (not standardize, standardize))
    kept.setup()
    data.setup()
    with pytest.raises(ValueError, match="other means and deviations"):
        data.load_state_dict(kept.state_dict())
    # and a row of one column is not one of three
    with pytest.raises(ValueError, match=r"states have shape \(5, 1\), but the units are of \(B, 3\)"):
        kept.units.states(torch.zeros(5, 1))


def test_states_of_several_axes_have_one_unit(tmp_path):
    generator = np.random.default_rng(0)
    np.save(tmp_path / "maps.npy", 5 + 3 * generator.normal(size=(200, 1, 4, 4)))
    data = Table(str(tmp_path / "maps.npy"))
    train = data.dataset("train").values
    assert train.shape[1:] == (1, 4, 4)
    assert (float(train.mean()), float(train.std())) == pytest.approx((0, 1), abs=1e-4)
    assert len({*data.units.scale.flatten().tolist()}) == 1
    assert data.log_scale == pytest.approx(16 * np.log(3), rel=0.05)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f2d2 va", {"validate"}),
        ("f2d2 fit --config digits_t", {"digits_teacher"}),
        ("f2d2 fit -c strategies/dd", {"strategies/ddp"}),
        ("f2d2 nll --ou", {"--out"}),
        ("f2d2 nll --data ro", {"rows.npy"}),
    ],
)
def test_a_shell_completes(line, expected, tmp_path, monkeypatch, capsys):
    main(["completion", "bash"])
    (tmp_path / "rows.npy").touch()
    (tmp_path / "f2d2").write_text("#!/bin/sh\necho '  --data DATA   what to read'; echo '  --out OUT'\n")
    (tmp_path / "f2d2").chmod(0o755)
    words = " ".join(f"'{word}'" for word in line.split(" "))
    ask = f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _f2d2; printf "%s\\n" "${{COMPREPLY[@]}}"'
    script = f"PATH={tmp_path}:$PATH\ncd {tmp_path}\n{capsys.readouterr().out}\n{ask}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) == expected
    assert not found.stderr


def test_completion_of_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["completion", "fish"])
    assert "'fish'; f2d2 completion bash, or zsh" in capsys.readouterr().err
