"""Pairs of parameters and conditions: split together, in their units, from arrays and files, and by the command."""

import csv
import re

import numpy as np
import pytest
import torch

import f2d2_lightning as f2
from command_line import f2d2, single_precision  # noqa: F401
from f2d2_lightning.cli import nll_command, sample_command
from f2d2_lightning.data import Pairs, Table
from f2d2_lightning.data.rows import find_rows
from f2d2_lightning.likelihood.units import Units
from f2d2_lightning.nn import PreconditionedMLP
from f2d2_lightning.utils.conditions import tensors
from lightning_parts import trainer
from problems import randomize

close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("single_precision")


def draw(count=200):
    """Conditions from which their parameters can be told."""
    theta = torch.randn(count, 2) * torch.tensor([3.0, 0.01]) + torch.tensor([50.0, -1.0])
    return theta, torch.cat((theta.square(), theta.sum(1, keepdim=True)), 1)


def forms(theta, x):
    return {
        "tensors": (theta, x),
        "arrays": (theta.numpy(), x.double().numpy()),
        "lists": (theta.tolist(), x.tolist()),
        "tuple": (theta, (x[:, 0], x[:, 1:].numpy())),
        "dictionary": (theta, {"a": x[:, :2], "b": {"c": x[:, 2:]}}),
    }


@pytest.mark.parametrize("form", list(forms(*draw(3))))
def test_pairs_stay_together_in_their_units(form):
    theta, x = draw()
    data = Pairs(*forms(theta, x)[form], val=0.1, test=0.2)
    data.setup()
    sizes = {name: len(data.dataset(name)) for name in ("train", "val", "test")}
    assert sizes == {"train": 140, "val": 20, "test": 40}
    seen = []
    for name in sizes:
        dataset = data.dataset(name)
        states, conditions = dataset.__getitems__(list(range(len(dataset))))
        rows = data.units.rows(states)
        close(
            torch.cat(list(tensors(conditions)), 1),
            torch.cat((rows.square(), rows.sum(1, keepdim=True)), 1),
            rtol=1e-4,
            atol=1e-4,
        )
        seen.append(rows)
        close(data.units.states(rows), states, rtol=1e-3, atol=1e-3)
    close(torch.cat(seen).sort(0).values, theta.sort(0).values, rtol=1e-5, atol=1e-5)
    train = data.units.states(seen[0])
    close(train.mean(0), torch.zeros(2), atol=1e-3, rtol=0)
    close(train.std(0), torch.ones(2), atol=1e-3, rtol=0)
    close(data.log_scale, float(seen[0].double().std(0).log().sum()), rtol=1e-3, atol=1e-3)
    batch = next(iter(data.train_dataloader()))
    assert batch[0].shape == (140, 2)


def test_files_hold_pairs(tmp_path):
    theta, x = draw(20)
    np.savez(tmp_path / "one.npz", theta=theta, x=x)
    np.savez(tmp_path / "more.npz", theta=theta, **{"x.a": x[:, :1], "x.mask": x[:, 1] > 0})
    one, more = (Pairs(str(tmp_path / f"{name}.npz"), standardize=False) for name in ("one", "more"))
    close(one.read()[1], x)
    close(more.read()[1]["a"], x[:, :1])
    assert more.read()[1]["mask"].dtype == torch.int64 or more.read()[1]["mask"].dtype == torch.bool
    one.setup()
    assert one.log_scale == 0


WRONG = {
    "no conditions": (lambda theta, x: Pairs(theta), "give parameters and conditions, or the path"),
    "both": (lambda theta, x: Pairs("a.npz", x), "give parameters and conditions, or the path"),
    "fewer": (lambda theta, x: Pairs(theta, x[1:]).setup(), "as many conditions are needed"),
    "integers": (lambda theta, x: Pairs(theta.long(), x).setup(), r"dtype torch.int64 .* floating parameters"),
    "no array": (lambda theta, x: Pairs(theta, {"a": "b"}).setup(), "pairs is a str"),
    "nothing in it": (lambda theta, x: Pairs(theta, {}).setup(), "as many conditions are needed"),
    "no file": (lambda theta, x: Pairs("nothing.npz").setup(), "there is no file nothing.npz"),
    "too many": (lambda theta, x: Pairs(theta, x, val=0.6, test=0.6), "leave none to train on"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_no_pairs_is_refused(name):
    make, said = WRONG[name]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said):
        make(*draw(20))


def test_files_without_pairs_are_refused(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"holds x; theta and x, or theta and several x\.NAME, are needed"):
        Pairs(str(tmp_path / "rows.npz")).setup()


def test_the_command_scores_pairs_in_the_units_of_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theta, x = draw(60)
    network = randomize(PreconditionedMLP((2,), width=12, blocks=2, condition=3), 0.2)
    data = Pairs(theta, x)
    student = f2.F2D2Module(
        teacher=f2.FlowMatchingModule(network, warmup=1),
        objective=f2.TrajectoryRegression(nodes=4, capacity=40),
        reference=f2.Reference(steps=4),
        warmup=1,
    )
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(student, datamodule=data)
    run.save_checkpoint("student.ckpt")
    np.savez("new.npz", theta=theta.numpy(), x=x.numpy())
    nll_command(["--ckpt", "student.ckpt", "--data", "new.npz", "--steps", "2", "--out", "new.csv"])
    found = [float(row["log_prob"]) for row in csv.DictReader((tmp_path / "new.csv").open())]
    expected = student.log_prob(data.units.states(theta), 2, x).value - data.log_scale
    close(torch.tensor(found), expected, rtol=1e-4, atol=1e-3)
    # the wrong way round they are others
    assert (
        student.log_prob(data.units.states(theta), 2, x.flip(0)).value - data.log_scale - expected
    ).abs().max() > 0.02
    np.savez("rows.npz", x=theta.numpy())
    for number, (command, arguments, said) in enumerate(
        (
            (nll_command, ["--data", "rows.npz"], r"the model is conditional.*with theta and x"),
            (sample_command, ["--label", "3"], r"conditioned on more than a class"),
            (sample_command, [], r"conditioned on more than a class"),
        )
    ):
        kind = "csv" if command is nll_command else "npz"
        with pytest.raises(SystemExit):
            command(
                [
                    "--ckpt",
                    "student.ckpt",
                    "--out",
                    f"{number}.{kind}",
                    *arguments,
                ]
            )
        out = " ".join(capsys.readouterr().err.split())
        assert re.search(said, out), out
    # and in training the checkpoint's units hold, whatever the pairs
    again = Pairs(2 * theta, x)
    again.load_state_dict(torch.load("student.ckpt", weights_only=True)["Pairs"])
    again.setup()
    close(again.units.center, data.units.center)


def test_conditions_of_another_precision_are_brought_to_the_states(tmp_path):
    """Arrays of NumPy are of double precision, and a loader's collate function keeps it."""
    theta, x = draw(64)
    loader = torch.utils.data.DataLoader(list(zip(theta.double().numpy(), x.double().numpy(), strict=True)), 32)
    teacher = f2.FlowMatchingModule(PreconditionedMLP((2,), width=8, blocks=1, condition=3), warmup=1)
    trainer(tmp_path, max_steps=2).fit(teacher, loader)
    close(teacher.average.condition.center, x.mean(0), rtol=1e-4, atol=1e-4)


CONFIGURATION = """
trainer: {max_steps: 2, accelerator: cpu, logger: false, enable_checkpointing: false, callbacks: []}
model:
  class_path: f2d2_lightning.FlowMatchingModule
  init_args:
    flow_map:
      class_path: f2d2_lightning.nn.PreconditionedMLP
      init_args: {shape: [2], width: 8, blocks: 1, condition: CONDITION}
data: {class_path: f2d2_lightning.data.Pairs, init_args: {parameters: pairs.npz, batch_size: 32}}
"""


@pytest.mark.parametrize(
    "condition", ["3", "{class_path: f2d2_lightning.nn.VectorEmbedding, init_args: {numbers: 3, features: 7}}"]
)
def test_a_configuration_trains_on_pairs(tmp_path, monkeypatch, condition):
    monkeypatch.chdir(tmp_path)
    theta, x = draw(100)
    np.savez("pairs.npz", theta=theta, x=x)
    (tmp_path / "teacher.yaml").write_text(CONFIGURATION.replace("CONDITION", condition))
    f2d2("fit", "--config", "teacher.yaml", "--trainer.default_root_dir", tmp_path)


@pytest.mark.parametrize("kind", ["npy", "csv", "pairs"])
def test_rows_far_from_zero_keep_their_digits(tmp_path, kind):
    """As seconds since 1970 do: single precision has few values there, standardised states have all."""
    rows = 1.7e9 + 63 + torch.randn(200, 2, dtype=torch.float64) * torch.tensor([1.0, 20.0])
    path = tmp_path / f"rows.{kind}"
    if kind == "npy":
        np.save(path, rows.numpy())
    elif kind == "csv":
        path.write_text("\n".join(",".join(map(repr, row)) for row in rows.tolist()))
    data = Pairs(rows, torch.zeros(200, 1)) if kind == "pairs" else Table(str(path))
    states = torch.cat([data.dataset(split).values for split in ("train", "val", "test")])
    assert states.dtype == torch.float32
    assert data.dataset("train").values.mean(0).abs().max() < 1e-5
    # from states in single precision, as samples are
    found = data.units.rows(states)
    torch.testing.assert_close(found.sort(0).values, rows.sort(0).values, rtol=0, atol=1e-4)
    assert data.log_scale == pytest.approx(float(rows.std(0).log().sum()), abs=0.2)


def test_integers_that_are_no_images_are_levels_only_where_that_is_said(tmp_path):
    path = str(tmp_path / "counts.npy")
    np.save(path, np.arange(900).reshape(300, 3) % 17)
    with pytest.raises(ValueError, match=r"integers of shape \(3,\) a row.*Counts have no density.*levels="):
        Table(path).setup()
    assert Table(path, levels=17).dataset("train").quantization.levels == 17


@pytest.mark.parametrize("kind", ["npy", "csv"])
def test_a_single_row_far_from_zero_keeps_its_digits(tmp_path, kind):
    """Rows to be scored have no spread of their own by which to tell what may be rounded: they may be one."""
    row = 1.7e9 + 63.5 + torch.tensor([[0.25, -3.0]], dtype=torch.float64)
    path = tmp_path / f"row.{kind}"
    if kind == "npy":
        np.save(path, row.numpy())
    else:
        path.write_text(",".join(map(repr, row[0].tolist())))
    units = Units(torch.full((2,), 1.7e9 + 63, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(units.states(find_rows(path).values), torch.tensor([[0.75, -2.5]]).float())
