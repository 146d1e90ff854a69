"""``f2d2 nll``: every kind of data gives the likelihoods of the points that it stands for, or says what is wrong."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import sys

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import percentileofscore
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.cli import nll_command
from f2d2_lightning.cli._points import Reading, reading_of
from f2d2_lightning.cli._tables import Column, write_table
from f2d2_lightning.likelihood import dequantization_bounds
from f2d2_lightning.metrics import percentile_rank
from f2d2_lightning.nn import MLP
from f2d2_lightning.training.loading import load_module
from f2d2_lightning.utils.seeding import counter_uniform
from lightning_parts import trainer

parquet_only = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs the extra parquet")


class Untrained(f2.F2D2Module):
    """A student with random weights that a checkpoint can be made of, by name."""

    def __init__(self, shape: list[int], levels: int | None = None, classes: int = 0, directions: str = "both") -> None:
        torch.manual_seed(3)
        network = MLP(shape, width=12, blocks=1, classes=classes, directions=directions)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        objective, inversion = None, None
        if directions != "both":
            objective = f2.TrajectoryRegression(intervals=f2.Intervals(directions))
            inversion = f2.Inversion(max_iterations=3)
        reference = f2.Reference(steps=3, probes=1)
        super().__init__(network, shape, objective=objective, inversion=inversion, levels=levels, reference=reference)
        torch.nn.init.normal_(next(p for p in reversed(list(self.average.head.parameters())) if p.ndim > 1), std=0.3)


def checkpoint(path, **settings):
    module = Untrained(**settings)
    hyper_parameters = {"_class_path": f"{__name__}.Untrained", **settings}
    content = {"state_dict": module.state_dict(), "hyper_parameters": hyper_parameters, "f2d2": {}}
    torch.save(content | {"pytorch-lightning_version": L.__version__}, path)
    return load_module(path, f2.F2D2Module, trust=[__name__])


SMALL = {
    "grey": {"shape": [1, 4, 3], "levels": 256},
    "colour": {"shape": [3, 4, 3], "levels": 256},
    "digits": {"shape": [1, 8, 8], "levels": 17},
    "classes": {"shape": [1, 8, 8], "levels": 17, "classes": 10},
    "plane": {"shape": [2]},
    "inverted": {"shape": [2], "directions": "to_data"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield {name: (folder / f"{name}.ckpt", checkpoint(folder / f"{name}.ckpt", **s)) for name, s in SMALL.items()}
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(models, model, data, out, *options):
    arguments = ["--ckpt", models[model][0], "--trust", __name__, "--data", data, "--out", out, "--device", "cpu"]
    nll_command([*map(str, arguments), "--batch_size", "7", *map(str, options)])


def nll(models, model, data, *options, out="nll.csv"):
    """Run the command; the table by columns."""
    command(models, model, data, out, *options)
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [row[name] for row in rows] if name == "name" else np.array([float(row[name]) for row in rows])
        for name in rows[0]
    }


def images(count, channels, seed=0, levels=256):
    return np.random.default_rng(seed).integers(0, levels, (count, channels, 4, 3)).astype(np.uint8)


def save_images(folder, values, names):
    for value, name in zip(values, names, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value[0] if len(value) == 1 else value.transpose(1, 2, 0)).save(path)


def dequantized(values, seed, draw=0, levels=256):
    """Integers as states on [-1, 1], by the definition."""
    size = values[0].size
    counters = torch.arange(draw * values.size, draw * values.size + values.size).reshape(-1, size)
    uniform = counter_uniform(counters, seed).reshape(values.shape).double().numpy()
    return (2 * (values + uniform) / levels - 1).astype(np.float32)


@torch.no_grad()
def truth(models, model, states, steps=4, cond=None):
    return models[model][1].log_prob(torch.from_numpy(states), steps, cond).value.double().numpy()


@pytest.mark.parametrize("model", ["grey", "colour"])
def test_a_folder_gives_the_likelihoods_of_its_pictures_by_name(models, tmp_path, model):
    values = images(20, models[model][1].shape[0])
    names = sorted(f"{i % 3}/{i}.png" for i in range(20))
    save_images(tmp_path / "set", values, names)
    table = nll(models, model, "set", "--seed", 5, "--steps", 2)
    assert table["name"] == names
    assert table["index"].tolist() == list(range(20))
    expected = truth(models, model, dequantized(values, 5), 2)
    assert np.abs(table["log_prob"] - expected).max() < 1e-3
    dim = values[0].size
    assert np.allclose(table["bits_per_dim"], -table["log_prob"] / (dim * np.log(2)) + 7, atol=1e-6)
    # the same integers in an array are the same points
    np.savez("set.npz", x=values)
    again = nll(models, model, "set.npz", "--seed", 5, "--steps", 2, out="b.csv")
    assert np.allclose(again["log_prob"], expected, atol=1e-3)
    # and one picture is one sample; a dark one is a picture all the same
    dark = images(1, models[model][1].shape[0]) // 4
    save_images(tmp_path, dark, ["a.png"])
    table = nll(models, model, "a.png", out="c.csv")
    assert table["name"] == ["a.png"]
    assert np.allclose(table["log_prob"], truth(models, model, dequantized(dark, 0)), atol=1e-3)


def test_draws(models, tmp_path, capsys):
    values = images(9, 1)
    np.save("x.npy", values)
    each = np.stack([truth(models, "grey", dequantized(values, 0, draw)) for draw in range(5)])
    table = nll(models, "grey", "x.npy", "--draws", 5, "--reference", "true")
    assert np.allclose(table["log_prob"], each.mean(0), atol=1e-3)
    assert np.allclose(table["log_prob_sd"], each.std(0, ddof=1), atol=1e-3)
    assert (table["log_prob_sd"] > 1e-3).all()
    weighted = np.log(np.exp(each - each.max(0)).mean(0)) + each.max(0)
    assert np.allclose(table["log_prob_iw"], weighted, atol=1e-3)
    assert (table["log_prob_iw"] >= table["log_prob"]).all()
    assert np.allclose(table["bits_per_dim_iw"], -weighted / (12 * np.log(2)) + 7, atol=1e-3)
    said = capsys.readouterr().out
    assert "9 samples, 4 evaluations each, 5 draws (an upper bound" in said
    mean, error = table["log_prob"].mean(), table["log_prob"].std(ddof=1) / 3
    assert f"log_prob: {mean:.4f} ± {error:.4f} nats" in said
    # the reference's are averaged over the same draws
    module, states = models["grey"][1], [torch.from_numpy(dequantized(values, 0, draw)) for draw in range(5)]
    each = [module.reference(module.average.velocity, x).value for x in states]
    assert np.allclose(table["reference_log_prob"], torch.stack(each).mean(0).numpy(), atol=1e-3)
    assert "reference_bits_per_dim" in table


def test_a_reference_that_was_left_open_is_chosen_on_the_first_batch_and_said(models, tmp_path, monkeypatch, capsys):
    states = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", states.numpy())
    monkeypatch.setattr(Untrained, "reference", property(lambda self: f2.Reference(), lambda self, given: None), False)
    table = nll(models, "plane", "x.npy", "--reference", "true", "--batch_size", 16)
    velocity = models["plane"][1].average.velocity
    choice = f2.Reference().chosen(velocity, states[:16])
    assert choice.states == 16
    assert np.allclose(table["reference_log_prob"], choice.reference(velocity, states).value.numpy(), atol=1e-5)
    said = " ".join(capsys.readouterr().out.split())
    assert f"reference: {choice}; about" in said
    assert " for 20 samples" in said


def test_bounds_rise_to_the_probability_of_a_bin():
    # log p(x) = -x on [0, 1): the bin's probability is 1 - 1/e
    generator = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(20_000, 3, generator=generator, dtype=torch.float64)
    bounds = dequantization_bounds(log_prob)
    assert torch.allclose(bounds.mean, torch.full((3,), -0.5, dtype=torch.float64), atol=0.01)
    assert torch.allclose(bounds.importance_weighted, torch.full_like(bounds.mean, np.log(1 - np.exp(-1))), atol=0.01)
    assert torch.allclose(bounds.deviation, torch.full_like(bounds.mean, 12**-0.5), atol=0.01)
    single = dequantization_bounds(log_prob[:1])
    assert torch.equal(single.mean, single.importance_weighted)
    assert single.deviation.isnan().all()


def test_percentiles_are_mid_ranks():
    rng = np.random.default_rng(0)
    among, values = rng.integers(0, 30, 200).astype(float), rng.integers(-3, 33, 50).astype(float)
    expected = [percentileofscore(among, value, "mean") for value in values]
    among_nan = torch.from_numpy(np.append(among, np.nan))
    assert np.allclose(percentile_rank(torch.from_numpy(values), among_nan).numpy(), expected)
    assert np.allclose(percentile_rank(values, among.tolist()).numpy(), expected)
    assert percentile_rank(torch.tensor([float("nan")]), among_nan).isnan().all()
    with pytest.raises(ValueError, match="at least one number is needed"):
        percentile_rank(torch.ones(2), torch.tensor([float("nan")]))


def test_percentile_among_another_data_set(models, capsys):
    data = f2.data.Digits().dataset("test")
    values = data.values[:10].numpy()
    np.save("x.npy", values)
    table = nll(models, "digits", "x.npy", "--compare", "digits:val", "--steps", 2)
    val = f2.data.Digits().dataset("val").__getitems__(list(range(200))).numpy()
    among = truth(models, "digits", val, 2)
    expected = [percentileofscore(among, value, "mean") for value in table["log_prob"]]
    assert np.allclose(table["percentile"], expected, atol=0.51)  # one rank, where rounding swaps two
    assert ((table["percentile"] >= 0) & (table["percentile"] <= 100)).all()
    # more likely is a higher percentile
    assert np.corrcoef(table["percentile"], table["log_prob"])[0, 1] > 0.8
    assert "percentile among digits:val: median" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["digits", "arrays", "folders"])
def test_labels_reach_a_conditional_model(models, tmp_path, source):
    data = f2.data.Digits(labels=True).dataset("test")
    values, labels = data.values.numpy(), data.labels
    rows = slice(0, 300)
    if source == "arrays":
        np.savez("x.npz", x=values, y=labels.numpy().astype(np.int16))
        states = dequantized(values, 0, levels=17)
    elif source == "folders":
        names = [f"{int(label)}/{i:03}.png" for i, label in enumerate(labels)]
        order = sorted(range(300), key=names.__getitem__)[:20]
        save_images(tmp_path / "set", values[order], [names[i] for i in order])
        states, labels, rows = dequantized(values[order], 0, levels=17), labels[order], slice(0, 20)
    else:
        states = data.__getitems__(list(range(300)))[0].numpy()
    given = {"digits": "digits", "arrays": "x.npz", "folders": "set"}[source]
    table = nll(models, "classes", given)
    expected = truth(models, "classes", states, cond=labels)
    assert np.allclose(table["log_prob"], expected[rows], atol=1e-3)
    others = truth(models, "classes", states, cond=(labels + 1) % 10)
    assert np.abs(table["log_prob"] - others[rows]).min() < np.abs(table["log_prob"] - others[rows]).max()
    assert np.abs(table["log_prob"] - others[rows]).max() > 0.05


def test_requantize(models, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8)).astype(np.uint8)
    values[0, 0, 0, :3] = [0, 255, 15]
    save_images(tmp_path / "set", values, [f"{i}.png" for i in range(6)])
    coarse = np.floor(values.astype(float) * 17 / 256).astype(np.uint8)
    assert coarse[0, 0, 0, :3].tolist() == [0, 16, 0]
    expected = truth(models, "digits", dequantized(coarse, 0, levels=17))
    assert np.allclose(nll(models, "digits", "set", "--requantize", "true")["log_prob"], expected, atol=1e-3)
    # values of the model's own levels need none
    save_images(tmp_path / "fits", coarse, [f"{i}.png" for i in range(6)])
    assert np.allclose(nll(models, "digits", "fits", out="b.csv")["log_prob"], expected, atol=1e-3)


class Theirs(L.LightningDataModule):
    """Somebody's data module: pairs, shuffled where it trains."""

    def __init__(self, offset: float = 0.0, stream: bool = False) -> None:
        super().__init__()
        self.points = torch.linspace(-1, 1, 22).reshape(11, 2) + offset
        self.stream = stream

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.points, torch.arange(11)), batch_size=3, shuffle=True)

    def test_dataloader(self):
        class Stream(IterableDataset):
            def __iter__(stream):  # noqa: N805
                return iter(self.points)

        return DataLoader(Stream() if self.stream else TensorDataset(self.points), batch_size=3)


class Moved(Theirs):
    """Whose states are what a hook makes of its batches."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 0.25, *batch[1:]]


@pytest.mark.parametrize(
    ("data", "arguments", "offset"),
    [
        ("Theirs", {}, 0.0),
        ("Theirs:train", {"offset": 0.5}, 0.5),
        ("Theirs", {"stream": True}, 0.0),
        ("Moved", {"offset": 0.5}, 0.75),
    ],
)
def test_somebody_elses_data_module(models, data, arguments, offset):
    import json

    table = nll(models, "plane", f"{__name__}.{data}", "--data_args", json.dumps(arguments))
    expected = truth(models, "plane", Theirs(offset).points.numpy())
    assert np.allclose(table["log_prob"], expected, atol=1e-4)
    assert np.allclose(table["bits_per_dim"], -table["log_prob"] / (2 * np.log(2)))


def test_a_class_path_is_the_same_as_a_short_name(models):
    options = ("--data_args", '{"count": 100}')
    short = nll(models, "plane", "mixture:val", *options)
    path = nll(models, "plane", "f2d2_lightning.data.GaussianMixture:val", *options, out="b.csv")
    assert np.array_equal(short["log_prob"], path["log_prob"])
    assert len(short["log_prob"]) == 10


def test_samples_without_a_likelihood_are_counted(models, capsys):
    np.save("x.npy", 3 * np.random.default_rng(0).standard_normal((30, 2)).astype(np.float32))
    with pytest.warns(UserWarning, match="did not converge"):
        table = nll(models, "inverted", "x.npy", "--compare", "x.npy")
    missing = np.isnan(table["log_prob"])
    assert 0 < missing.sum() < 30
    assert np.array_equal(np.isnan(table["percentile"]), missing)
    said = capsys.readouterr().out
    assert f"log_prob: {missing.sum()} of 30 samples have none" in said
    assert f"log_prob: {table['log_prob'][~missing].mean():.4f} ±" in said


@parquet_only
def test_parquet_holds_the_same_numbers_with_units_and_settings(models, tmp_path):
    from pyarrow import parquet

    save_images(tmp_path / "set", images(5, 1), [f"{i}.png" for i in range(5)])
    table = nll(models, "grey", "set", "--draws", 2)
    command(models, "grey", "set", "a/nll.parquet", "--draws", 2)
    found = parquet.read_table("a/nll.parquet")
    assert found.column_names == list(table)
    assert found["name"].to_pylist() == table["name"]
    assert found["index"].to_pylist() == list(range(5))
    for name in set(table) - {"name"}:
        assert np.array_equal(np.array(found[name].to_pylist()), table[name]), name
    assert found.schema.field("log_prob").metadata == {b"unit": b"nats"}
    assert found.schema.field("bits_per_dim").metadata == {b"unit": b"bits/dim"}
    metadata = {key.decode(): value.decode() for key, value in found.schema.metadata.items()}
    assert metadata["steps"] == "4"
    assert metadata["draws"] == "2"
    assert metadata["checkpoint"].endswith("grey.ckpt")
    assert "nats" in metadata["unit"]


def test_tables_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "t.csv"
    with pytest.raises(ValueError, match="lengths must be equal"):
        write_table(path, [Column("a", [1, 2]), Column("b", [1.0])])
    with pytest.raises(RuntimeError, match="lost"):
        write_table(path, [Column("a", Lost())])
    assert list(tmp_path.rglob("t.*")) == []
    write_table(path, [Column("a, b", ['c"d', "e\nf"]), Column("b", [1.5, float("nan")])])
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["a, b", "b"], ['c"d', "1.5"], ["e\nf", "nan"]]
    with pytest.raises(FileExistsError, match="--overwrite true"):
        write_table(path, [Column("a", [1])])
    write_table(path, [Column("a", [1])], overwrite=True)
    assert path.read_text() == "a\n1\n"
    assert [p.name for p in path.parent.iterdir()] == ["t.csv"]


class Lost(list):
    """A column whose reading fails half way."""

    def __len__(self):
        return 2

    def __iter__(self):
        yield 1
        raise RuntimeError("lost")


def refused(capsys, *arguments, ckpt="none.ckpt"):
    with pytest.raises(SystemExit) as stop:
        nll_command([*map(str, ("--ckpt", ckpt, "--trust", __name__, "--device", "cpu", *arguments))])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_tables_that_cannot_be_written_are_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "sealed").mkdir()
    # whatever this process may do
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "sealed")
    for name, message in {
        "a.parquet": "pip install 'f2d2-lightning[parquet]'",
        "a.json": "ends in .csv or .parquet",
        "there.csv": "is there already",
        "folder.csv": "is a folder",
        "there.csv/in/it.csv": f"cannot be written, as {tmp_path / 'there.csv'} is a file",
        "sealed/new/a.csv": f"cannot be written, as {tmp_path / 'sealed'} may not be written to",
    }.items():
        assert message in refused(capsys, "--data", "digits", "--out", name)
    assert (tmp_path / "there.csv").read_text() == "mine"


BAD = {
    "empty folder": ("grey", ["--data", "empty"], r"empty holds no images"),
    "other files": ("grey", ["--data", "others"], r"1 file of other types \(notes\[1\].txt\)"),
    "corrupt image": ("grey", ["--data", "corrupt"], r"b.png cannot be read as an image"),
    "mixed sizes": ("grey", ["--data", "mixed"], r"b.png is 9 x 2 .*3 x 4 is expected"),
    "colour": ("grey", ["--data", "colour"], r"--convert true"),
    "levels": ("digits", ["--data", "eight"], r"8-bit values up to 255, but the model is for 17 levels.*--requantize"),
    "requantized twice": ("digits", ["--data", "five", "--requantize", "true"], r"fit the model's 17 levels already"),
    "requantized wide": ("digits", ["--data", "wide.npy", "--requantize", "true"], r"--requantize is for 8-bit values"),
    "images of no images": ("plane", ["--data", "eight"], r"image files can be read for \(C, H, W\)"),
    "classes of none": ("grey", ["--data", "five", "--classes", "a,b"], r"the model has no classes; leave --classes"),
    "no labels in the folder": ("classes", ["--data", "five"], r"is in no folder that is named by a class label"),
    "no labels in the array": ("classes", ["--data", "x.npz"], r"has no labels: give an .npz file with labels y"),
    "no labels in the module": (
        "classes", ["--data", "digits", "--data_args", '{"labels": false}'], r"let Digits give pairs"),
    "labels out of range": ("classes", ["--data", "far.npz"], r"has labels 0 to 10, but the model is for 10 classes"),
    "labels of another shape": ("classes", ["--data", "short.npz"], r"labels y of shape \(2,\).*\(3,\) are needed"),
    "channels last": ("colour", ["--data", "last.npy"], r"shape \(3, 4, 3, 3\).*channels come first"),
    "text": ("grey", ["--data", "text.npy"], r"holds <U1; integers or floating numbers are needed"),
    "integers for states": ("plane", ["--data", "integers.npy"], r"the model is for continuous data"),
    "no such class": ("plane", ["--data", "f2d2_lightning.Nothing"], r"f2d2_lightning has no Nothing"),
    "no such package": ("plane", ["--data", "nowhere.at_all.Data"], r"cannot be imported.*PYTHONPATH"),
    "no data module": ("plane", ["--data", "f2d2_lightning.Inversion"], r"class of a LightningDataModule is needed"),
    "wrong arguments": ("plane", ["--data", "mixture", "--data_args", '{"size": 3}'], r"GaussianMixture was not made"),
    "arguments of a file": ("grey", ["--data", "five", "--data_args", '{"a": 3}'], r"takes no arguments \(a given\)"),
    "arguments of nothing": ("plane", ["--data", "mixture", "--compare_args", '{"a": 3}'], r"--compare names"),
    "no such split": ("plane", ["--data", f"{__name__}.Theirs:all"], r"Theirs has train, val, test"),
    "missing split": ("plane", ["--data", f"{__name__}.Theirs:val"], r"Theirs has no val_dataloader"),
    "draws of states": ("plane", ["--data", "mixture", "--draws", "3"], r"needs data that are dequantized here"),
    "mirrored vectors": ("plane", ["--data", "mixture", "--mirrored", "true"], r"--mirrored is for images"),
    "states of other levels": ("digits", ["--data", "nan.npy", "--requantize", "true"], r"--requantize is for 8-bit"),
    "a name that nothing has": ("plane", ["--data", "mixture", "--flow_map", "net"], r"leave name='net' out"),
    "no draws": ("plane", ["--data", "mixture", "--draws", "0"], r"--draws .0.: a number >0 is expected"),
    "compare of another kind": ("digits", ["--data", "digits", "--compare", "mixture"], r"checkpoint is of a model"),
    "fashion is a short name": ("grey", ["--data", "fashion"], r"--data fashion has shape \(1, 28, 28\)"),
    "no data": ("grey", ["--data", "nothing.npy"], r"neither one of digits, .* nor a file that exists"),
    "too many levels": ("digits", ["--data", "levels.npy"], r"the data hold the values 0 to 255"),
    "out of range": ("digits", ["--data", "range.npy"], r"states lie in \[0, 255\]"),
    "NaN": ("digits", ["--data", "nan.npy"], r"holds NaN or infinity in 1 of 3"),
    "no steps": ("digits", ["--data", "digits", "--steps", "0"], r"steps=0; it must be at least 1"),
    "device": ("digits", ["--data", "digits", "--device", "warp"], r"device 'warp' cannot be used"),
    "unknown kind of file": ("grey", ["--data", "notes.txt"], r"\.npy and \.npz files"),
}  # fmt: skip


@pytest.fixture
def bad_files(tmp_path):
    for name in ("empty", "others", "corrupt"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "others" / "notes[1].txt").write_text("x")
    save_images(tmp_path / "corrupt", images(2, 1), ["a.png", "b.png"])
    (tmp_path / "corrupt" / "b.png").write_bytes((tmp_path / "corrupt" / "b.png").read_bytes()[:60])
    save_images(tmp_path / "mixed", images(1, 1), ["a.png"])
    save_images(tmp_path / "mixed", [np.zeros((1, 2, 9), np.uint8)], ["b.png"])
    save_images(tmp_path / "colour", images(1, 3), ["a.png"])
    ramp = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    save_images(tmp_path / "eight", ramp, ["a.png", "b.png", "c.png", "d.png"])
    save_images(tmp_path / "five", ramp % 17, ["a.png", "b.png", "c.png", "d.png"])
    np.save("wide.npy", ramp.astype(np.int32))
    np.savez("x.npz", x=ramp % 17)
    np.savez("far.npz", x=ramp[:3] % 17, y=np.array([0, 1, 10]))
    np.savez("short.npz", x=ramp[:3] % 17, y=np.array([0, 1]))
    np.save("last.npy", np.zeros((3, 4, 3, 3), np.uint8))
    np.save("text.npy", np.full((3, 1, 4, 3), "a"))
    np.save("integers.npy", np.zeros((3, 2), np.int64))
    np.save("levels.npy", ramp)
    np.save("range.npy", ramp.astype(np.float32))
    broken = np.zeros((3, 1, 8, 8), np.float32)
    broken[1, 0, 0, 0] = np.nan
    np.save("nan.npy", broken)


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_answered_is_refused(models, bad_files, tmp_path, case, capsys):
    model, arguments, message = BAD[case]
    said = refused(capsys, "--out", "t/out.csv", *arguments, ckpt=models[model][0])
    assert re.search(message, said), said
    assert not (tmp_path / "t").exists()


def test_mirrored_likelihoods_are_of_both_images(models):
    """``log (p(x) + p(mirror image)) / 2``, few-step and reference."""
    module = models["grey"][1]
    x = torch.rand(9, 1, 4, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1
    np.save("states.npy", x.numpy())
    table = nll(models, "grey", "states.npy", "--mirrored", "true", "--reference", "true")
    plain = nll(models, "grey", "states.npy", "--reference", "true", out="plain.csv")
    with torch.no_grad():
        here, there = (module.log_prob(state, 4).value.double() for state in (x, x.flip(-1)))
    expected = torch.logaddexp(here, there) - np.log(2)
    np.testing.assert_allclose(np.array(table["log_prob"], float), expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(np.array(plain["log_prob"], float), here.numpy(), rtol=1e-5)
    assert (expected - here).abs().max() > 0.1
    references = [np.array(t["reference_log_prob"], float) for t in (table, plain)]
    assert np.abs(references[0] - references[1]).max() > 0.1


class OwnTable(f2.data.Table):
    """A user's."""


def checkpoint_of(table, folder):
    """A student that saw a table for a step, and its checkpoint, ``last.ckpt``."""
    table.setup()
    objective = f2.TrajectoryRegression(nodes=4, capacity=40)
    module = f2.F2D2Module(MLP(table.shape, width=8, blocks=1), objective=objective, reference=f2.Reference(steps=4))
    run = trainer(folder, max_steps=1, limit_val_batches=0)
    run.fit(module, table)
    run.save_checkpoint("last.ckpt")
    return module


@pytest.mark.parametrize("data", [f2.data.Table, OwnTable])
def test_rows_are_scored_in_the_units_of_training_whatever_names_them(tmp_path, data):
    """Under the name of a class of one's own, and of a data module that would take the means of its own file."""
    rows = np.random.default_rng(0).normal(size=(40, 2)) * [1, 100] + [5, 0]
    np.save("rows.npy", rows)
    np.save("other.npy", 3 * rows + 7)
    table = data("rows.npy")
    module = checkpoint_of(table, tmp_path)
    nll_command(["--ckpt", "last.ckpt", "--data", "other.npy", "--out", "file.csv"])
    arguments = ["--data", "f2d2_lightning.data.Table:test", "--data_args", '{"path": "other.npy"}']
    nll_command(["--ckpt", "last.ckpt", *arguments, "--out", "module.csv"])
    # by hand: a density changes by the volume of the units
    center, scale = table.units.center, table.units.scale
    with torch.no_grad():
        value = module.log_prob(((torch.tensor(3 * rows + 7) - center) / scale).float(), 4).value
    expected = value.double() - scale.double().log().sum()
    found = {}
    for name in ("file", "module"):
        with open(f"{name}.csv", newline="") as file:
            found[name] = np.array([float(row["log_prob"]) for row in csv.DictReader(file)])
    np.testing.assert_allclose(found["file"], expected.numpy(), rtol=1e-4, atol=1e-3)
    assert len(found["module"]) == 6
    assert all(np.abs(found["file"] - value).min() < 1e-3 for value in found["module"])


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("saved", ["last.ckpt", "folder"])
def test_columns_in_another_order_are_refused(tmp_path, monkeypatch, capsys, standardize, saved):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(40, 3)) * [1, 5, 100]

    def write(name, order, first):
        text = "\n".join(",".join(map(repr, row)) for row in rows[:, order].tolist())
        (tmp_path / name).write_text(f"{first}\n{text}\n" if first else text)

    write("rows.csv", [0, 1, 2], "a,b,c")
    table = f2.data.Table("rows.csv", standardize=standardize)
    module = checkpoint_of(table, tmp_path)
    f2.save_pretrained(module.average, "folder", shape=(3,), units=table.units)
    write("other.csv", [2, 0, 1], "c,a,b")
    write("spaces.csv", [0, 1, 2], "a, b ,c")
    write("bare.csv", [0, 1, 2], "")
    with pytest.raises(SystemExit):
        nll_command(["--ckpt", saved, "--data", "other.csv"])
    said = " ".join(capsys.readouterr().err.split())
    assert "other.csv has the columns c, a, b, and the model was trained on a, b, c; give them in that order" in said
    same = ("rows", "spaces", "bare") if standardize else ("rows",)
    for name in same:
        nll_command(["--ckpt", saved, "--data", f"{name}.csv", "--out", f"{name}.out.csv"])
    assert len({(tmp_path / f"{name}.out.csv").read_text() for name in same}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"columns": 3},
        {"columns": [1, 2]},
        {"scale": 1.0},
        {"scale": torch.zeros(2)},
        {"center": torch.zeros(3)},
        {"center": None},
    ],
    ids=str,
)
def test_units_of_a_checkpoint_that_are_none_are_refused(tmp_path, change):
    kept = {"center": torch.zeros(2), "scale": torch.ones(2), "columns": ["a", "b"]} | change
    torch.save({"Table": kept, "state_dict": {}, "pytorch-lightning_version": "2.5.0"}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"units of a table in a checkpoint are.*a list of names or None"):
        reading_of(str(tmp_path / "last.ckpt"), Reading())
    with pytest.raises(ValueError, match="units of a table in a checkpoint"):
        f2.data.Table("rows.csv").load_state_dict(kept)


def test_rows_of_a_checkpoint_without_units_are_said_to_be_states(models, capsys):
    np.save("rows.npy", np.random.default_rng(0).normal(size=(5, 2)))
    nll(models, "plane", "rows.npy")
    assert "rows.npy: rows are taken as the model's states as they stand; the checkpoint has no units" in " ".join(
        capsys.readouterr().out.split()
    )


def test_rows_in_other_units_are_warned_of(tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(40, 2)) * [1, 100] + [5, 0]
    np.save("rows.npy", rows)
    checkpoint_of(f2.data.Table("rows.npy"), tmp_path)
    for file, change, expected in (
        ("same", lambda x: x, ""),
        ("wider", lambda x: 10 * (x - [5, 0]) + [5, 0], ""),
        ("outlier", lambda x: x + 1e6 * (np.arange(40) == 0)[:, None], ""),
        ("held", lambda x: x * [1, 0], ""),
        ("row", lambda x: 1000 * x[:1], ""),
        ("thousand", lambda x: 1000 * x, r"column 1 is 5,\d\d\d deviations of the rows that were trained on away"),
        ("thousandth", lambda x: x * [1, 1e-3], r"column 2 scatters 0.001 times as much as that"),
        ("swapped", lambda x: x[:, ::-1] + [0, 20], r"column 2 scatters 0.01 times as much as that"),
    ):
        np.save(f"{file}.npy", change(rows))
        nll_command(["--ckpt", "last.ckpt", "--data", f"{file}.npy", "--out", f"{file}.csv"])
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(expected, said) if expected else "trained on" not in said, (file, said)


def test_a_table_that_is_not_there_is_a_file(models, capsys):
    path, _ = next(iter(models.values()))
    assert "nor a file that exists" in refused(capsys, "--data", "missing.csv", ckpt=path)
