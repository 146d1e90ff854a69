"""``f2d2 init --network``: a network is tried, and what is written runs, whatever way it is called."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from command_line import f2d2, single_precision  # noqa: F401
from f2d2_lightning.cli import main
from f2d2_lightning.cli._calls import likely_calls

SHORT = [
    *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"),
]
NETWORKS = """
import types

import torch
from torch import nn


def joined(*parts):
    return torch.cat([part if part.ndim == 2 else part[:, None] for part in parts], 1)


class Plain(nn.Module):
    '''No time embedding.'''

    def __init__(self, dim=3, times=1):
        super().__init__()
        self.inside, self.last = nn.Linear(dim + times, 16), nn.Linear(16, dim)

    def answer(self, *parts):
        return self.last(nn.functional.silu(self.inside(joined(*parts))))


class TwoTimes(Plain):
    def __init__(self, dim=3):
        super().__init__(dim, 2)

    def forward(self, x, s, t):
        return self.answer(x, s, t)


class Interval(TwoTimes):
    def forward(self, x, t, dt):
        return self.answer(x, t, dt)


class OneTime(nn.Module):
    def __init__(self, dim=3):
        super().__init__()
        self.first, self.last = nn.Linear(dim, 16), nn.Linear(16, dim)
        self.time_embed = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.block = nn.Linear(16, 16)

    def forward(self, x, t):
        time = self.time_embed(t[:, None])
        return self.last(torch.tanh(self.first(x) + time) * self.block(torch.tanh(time)))


class TimeFirst(OneTime):
    def forward(self, a, b, y=None):
        return super().forward(b, a)


class Columns(OneTime):
    '''Times as a column, two answers, and a label that must be there.'''

    def forward(self, x, time, y):
        assert time.ndim == 2
        return x.sum(), super().forward(x, time[:, 0])


class NoEmbedding(Plain):
    def forward(self, x, t):
        return self.answer(x, t)


class Nowhere(nn.Module):
    '''The time does nothing but scale.'''

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3)

    def forward(self, *, x, t):
        return self.last(x * torch.cos(t)[:, None])


class Sampled(nn.Module):
    '''As diffusers has it.'''

    def __init__(self, channels=3, width=8):
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        time = timestep[:, None] / 1000
        time = self.time_embedding(torch.cat((torch.sin(time), torch.cos(time)), 1))
        hidden = torch.relu(self.conv_in(sample) + time[:, :, None, None])
        answer = self.conv_out(hidden)
        return types.SimpleNamespace(sample=answer) if return_dict else (answer,)


class Recurrent(TwoTimes):
    '''No forward-mode derivative.'''

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x, s, t):
        return self.answer(x + self.cell(x[:, None])[0][:, 0], s, t)


class Wrong(Plain):
    def forward(self, x, t):
        return self.answer(x, t)[:, :2]


class Needy(OneTime):
    def __init__(self, dim, width):
        super().__init__(dim)


class Blind(OneTime):
    def forward(self, x, s, t):
        return super().forward(x, s)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(NETWORKS)
    generator = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", generator.normal(size=(200, 3)) * (1.0, 100.0, 0.01))
    np.save(tmp_path / "images.npy", generator.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8))
    yield tmp_path
    sys.modules.pop("my_nets", None)


def written(name):
    """Network and adapter of a model, as the configuration of that name says them."""
    model = yaml.safe_load(Path(f"mine/{name}.yaml").read_text())["model"]["init_args"]
    return model, model.get("flow_map", {}).get("init_args", {})


@pytest.mark.parametrize(
    ("network", "data", "call", "student"),
    [
        ("TwoTimes", "rows.npy", "net(x, s, t)", "copy"),
        ("Interval", "rows.npy", "net(x, s, t - s)", "copy"),
        ("OneTime", "rows.npy", "net(x, s)", "time_embed"),
        ("TimeFirst", "rows.npy", "net(s, x)", "time_embed"),
        ("Columns", "rows.npy", "net(x, s, None)", "time_embed"),
        ("NoEmbedding", "rows.npy", "net(x, s)", "PreconditionedMLP"),
        ("Nowhere", "rows.npy", "net(x=x, t=s)", "PreconditionedMLP"),
        ("Sampled", "images.npy", "net(x, 1000 * s)", "time_embedding"),
        ("Recurrent", "rows.npy", "net(x, s, t)", "copy"),
    ],
)
def test_a_network_is_tried_and_what_is_written_runs(network, data, call, student, folder, capsys):
    f2d2("init", "mine", "--data", data, "--network", f"my_nets.{network}")
    printed = capsys.readouterr().out.splitlines()
    command = next(line.split() for line in printed if line.startswith("  f2d2 nll"))
    adapted = written("teacher")[1]
    assert adapted["adapter"]["init_args"]["call"] == call
    model, flow_map = written("student")
    if student == "copy":
        assert "flow_map" not in model
    elif student == "PreconditionedMLP":
        assert model["flow_map"]["class_path"].endswith(student)
    else:
        assert flow_map["interval"] == student
    for name in ("teacher", "student"):
        f2d2("fit", "--config", f"mine/{name}.yaml", *SHORT)
    assert "--trust my_nets" in capsys.readouterr().out
    assert command[-2:] == ["--trust", "my_nets"]
    # as it was said, in a process that has not seen the file yet
    del sys.modules["my_nets"]
    main(command[1:])
    with open("mine/nll.csv", newline="") as file:
        found = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert len(found) == len(np.load(data))
    assert all(np.isfinite(float(row["log_prob"])) for row in found)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["Wrong"], ["net(x, s) gave", "answered shape (9, 2)", "shape (9, 3)", "--call"]),
        (["Needy"], ["cannot be made without dim, width", '{"dim": ..., "width": ...}']),
        (["OneTime", "--network_args", '{"dim": 5}'], ["net(x, s) gave RuntimeError: mat1", "--network_args"]),
        (["OneTime", "--network_args", '{"wide": 5}'], ["cannot be made with {'wide': 5}", "unexpected keyword"]),
        (["Blind", "--call", "net(x, s, t)"], ["does not depend on the end time"]),
        (["OneTime", "--call", "net(t=s)"], ["does not pass the state x"]),
        (["joined"], ["the class of a torch.nn.Module is needed"]),
    ],
    ids=lambda value: value[0],
)
def test_a_network_that_cannot_be_is_a_line(arguments, expected, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["init", "mine", "--data", "rows.npy", "--network", f"my_nets.{arguments[0]}", *arguments[1:]])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in expected), line
    assert not (folder / "mine").exists()


@pytest.mark.parametrize("arguments", [[], ["--call", "net(x, t=None, s=s)"]], ids=["found", "said"])
def test_a_second_time_that_is_not_read_is_none(arguments, folder):
    f2d2("init", "mine", "--data", "rows.npy", "--network", "my_nets.Blind", *arguments)
    adapter = written("teacher")[1]["adapter"]["init_args"]
    assert adapter["call"] == (arguments or ["", "net(x, s, None)"])[1]
    assert written("student")[1]["interval"] == "time_embed"


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ("x, t, y=None", "net(x, s)"),
        ("t, x, y=None", "net(s, x)"),
        ("x, timesteps, extra", "net(x, 1000 * s, {})"),
        ("x, r, t", "net(x, t, s)"),
        ("s, t, x", "net(s, t, x)"),
        ("x, t, y=None, r=None", "net(x, s, r=t)"),
        ("x, t, *, cond", "net(x, s, cond=None)"),
        ("z, t, step_size", "net(x, s, t - s)"),
        ("a, b, c", "net(x, s, t)"),
        ("*args", "net(x, s, t)"),
    ],
)
def test_names_of_arguments_say_the_call(arguments, call):
    made = {}
    exec(f"import torch\nclass Net(torch.nn.Module):\n    def forward(self, {arguments}): pass", made)
    assert likely_calls(made["Net"]())[0] == call
