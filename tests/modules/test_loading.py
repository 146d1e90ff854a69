"""Models from whatever holds one: modules, what callbacks added, folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import f2d2_lightning as f2
from f2d2_lightning.cli import nll_command, sample_command
from f2d2_lightning.likelihood.error_bars import ErrorBars
from f2d2_lightning.nn import MLP
from foreign import MeanFlowModule, callback
from lightning_parts import fit, student


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module of somebody else's with what a callback added, its checkpoint and its export."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    module, added = MeanFlowModule(), callback()
    run = fit(folder, module, added)
    run.save_checkpoint(folder / "run.ckpt")
    added.export(folder / "export")
    return module, added, folder


@pytest.mark.parametrize("file", ["run.ckpt", "export"])
def test_what_a_callback_added(trained, file):
    _, added, folder = trained
    model = f2.load(folder / file, MeanFlowModule().net)
    x = torch.randn(5, *model.shape)
    assert model.shape == added.shape
    assert torch.allclose(model.log_prob(x, 2).value, added.log_prob(x, 2).value)
    assert torch.allclose(model.sample(x, 2).state, added.sample(x, 2).state)
    assert model.directions == added.directions
    velocity = model.reference_velocity()
    assert torch.allclose(velocity(x, 0.5), added.reference_velocity()(x, 0.5))


def test_the_commands_take_it(trained, tmp_path, monkeypatch):
    _, added, folder = trained
    monkeypatch.chdir(tmp_path)
    x = torch.randn(6, *added.shape)
    np.save("x.npy", x.numpy())
    network = ["--network", f"{__name__}.make_net", "--device", "cpu"]
    nll_command(["--ckpt", str(folder / "run.ckpt"), *network, "--data", "x.npy", "--steps", "2", "--out", "nll.csv"])
    rows = np.genfromtxt("nll.csv", delimiter=",", names=True, comments="#")
    assert np.allclose(rows["log_prob"], added.log_prob(x, 2).value.detach(), atol=1e-4)
    sample_command(["--ckpt", str(folder / "export"), *network, "--num", "3", "--steps", "2", "--out", "x.npz"])
    drawn = np.load("x.npz")
    with torch.no_grad():
        state = added.sample(torch.from_numpy(drawn["noise"]), 2).state
    assert np.allclose(drawn["x"], state, atol=1e-4)


def make_net():
    return MeanFlowModule().net


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the network"),
        (["--network", "nowhere.Net"], "cannot be imported"),
        (["--network", "collections.OrderedDict"], "torch.nn.Module is needed"),
        (["--flow_map", "other"], "say which"),
    ],
)
def test_without_its_network_it_says_what_is_needed(trained, capsys, tmp_path, arguments, message):
    command = ["--ckpt", str(trained[2] / "run.ckpt"), "--data", "x.npy", "--out", str(tmp_path / "nll.csv")]
    with pytest.raises(SystemExit):
        nll_command([*command, "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_a_module_and_a_folder(tmp_path):
    module = student()
    nn.init.normal_(module.average.head.out.weight, std=0.1)
    fit(tmp_path, module, max_steps=1).save_checkpoint(tmp_path / "student.ckpt")
    x = torch.randn(4, 2)
    assert torch.equal(f2.load(tmp_path / "student.ckpt").log_prob(x, 2).value, module.log_prob(x, 2).value)

    class Own(MLP):
        """A network of this script."""

    fit(tmp_path, student(flow_map=Own((2,), width=16, blocks=1)), max_steps=1).save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"pass the missing objects|flow_map is needed"):
        f2.load(tmp_path / "own.ckpt")
    bars = {4: ErrorBars(0.5, 0.1, 0.2, coverage=0.9, count=64)}
    f2.save_pretrained(
        module.average, tmp_path / "saved", shape=module.shape, levels=17, low=-1.0, high=1.0, error_bars=bars
    )
    assert f2.load(tmp_path / "saved").error_bars == bars
    expected = module.log_prob(x, 2).value
    saved = f2.load(tmp_path / "saved")
    assert torch.allclose(saved.log_prob(x, 2).value, expected)
    assert (saved.levels, saved.low, saved.high) == (17, -1.0, 1.0)
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match="config"):
        f2.load(tmp_path / "saved")


def test_what_the_command_line_trained():
    old = Path(__file__).parents[1] / "checkpoints" / "made_by_0_1"
    model = f2.load(old / "student.ckpt")
    assert isinstance(model, f2.F2D2Module)
    teacher = f2.load(old / "teacher.ckpt").double()
    assert isinstance(teacher, f2.FlowMatchingModule)
    x = torch.randn(3, 2)
    assert torch.allclose(teacher.log_prob(x).value, teacher.reference(teacher.average.velocity, x).value)
    assert teacher.sample(2, 4).state.shape == (2, 2)
    with pytest.raises(ValueError, match="distil it"):
        teacher.sample(2, 4, with_log_prob=True)
