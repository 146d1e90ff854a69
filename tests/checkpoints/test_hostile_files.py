"""Files that say what is to be run, read or filled: nothing of it happens, and the error says what is wrong.

What would have happened is watched from outside: by Python's own audit events, by files that would have been written,
and by the memory of this process.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import random
import resource
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.core.saving import _load_from_checkpoint
from torch import nn

import f2d2_lightning as f2
from command_line import f2d2, single_precision  # noqa: F401
from f2d2_lightning.adapters import AdaptedFlowMap, Adapter
from f2d2_lightning.checkpoints import from_pretrained, load_joint, read_description, save_pretrained
from f2d2_lightning.checkpoints.pretrained import CONFIG
from f2d2_lightning.checkpoints.trust import build, find_class, takes, within_size
from f2d2_lightning.nn import MLP, JointFlowMap
from f2d2_lightning.training.loading import load_module, read_checkpoint
from lightning_parts import CONFIGS, Pair, trainer

MIB = 2**20
VERSION = "pytorch-lightning_version"
QUICK = [
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]",
    "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0",
]  # fmt: skip

# --- what a file may do, seen from outside ---

_events: list[tuple[str, str]] | None = None
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "os.remove")


def _hook(event, arguments):
    if _events is not None and (event in _STARTS or event in ("import", "open")):
        _events.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(_hook)


@contextmanager
def nothing_runs(folder):
    """No process, no module of ``TRAPS``, no file of ``folder/trap``, no new file beside."""
    global _events
    before = files_of(folder)
    _events = seen = []
    try:
        yield
    finally:
        _events = None
    started = [event for event in seen if event[0] in _STARTS]
    imported = [name for kind, name in seen if kind == "import" and name.partition(".")[0] in TRAPS]
    opened = [name for kind, name in seen if kind == "open" and str(folder / "trap") in os.path.abspath(name)]
    assert not started + imported + opened
    assert files_of(folder) == before
    assert not any(name in sys.modules for name in TRAPS)


def files_of(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


TRAPS = ("this", "antigravity", "trapmodule")  # modules whose import would show


@pytest.fixture(autouse=True)
def trapped(tmp_path, monkeypatch):
    """A module that writes a file when it is imported, a file that is not to be opened, and no memory to fill."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trapmodule.py").write_text(
        "from pathlib import Path\nfrom f2d2_lightning.nn import MLP\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\nclass Net(MLP): pass\ndef run(*a, **k): raise RuntimeError('ran')\n"
    )
    (tmp_path / "trap.yaml").write_text(yaml.safe_dump(adapted("subprocess.call", SHELL)))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in TRAPS:
        sys.modules.pop(name, None)


@contextmanager
def little(memory=200 * MIB, seconds=20.0):
    """Not much memory, and not for long; what would take all of it gets an error instead."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limits = resource.getrlimit(resource.RLIMIT_AS)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (here + 3 * 2**30, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < memory
    assert time.monotonic() - start < seconds


# --- files ---


def part(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}


def adapted(network, call, **more):
    return part("f2d2_lightning.adapters.AdaptedFlowMap", network=network,
                adapter=part("f2d2_lightning.adapters.Adapter", call=call, **more))  # fmt: skip


# a forward pass to the grammar, and a command to ``subprocess.call``
SHELL = "net('echo > ran', shell=True, close_fds=(x, s, t))"
MAP = part("f2d2_lightning.nn.MLP", shape=[2], width=8, blocks=1)
HEAD = part("f2d2_lightning.DivergenceHead", features=8, hidden=8, layers=1)
IDENTITY = part("torch.nn.Identity")
OWN_HEAD = part("f2d2_lightning.DivergenceHead", network=IDENTITY)
GOOD = {
    "_class_path": "f2d2_lightning.F2D2Module",
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
    **{"shape": [2], "flow_map": MAP, "head": HEAD, "trust": []},
}
SCALES = {"joint.head.scale": torch.ones(()), "average.head.scale": torch.ones(())}


def honest():
    torch.manual_seed(5)
    return f2.F2D2Module(MLP((2,), 8, 1), shape=(2,), head=f2.DivergenceHead(8, 8, 1))


def write(path, changes, state=None, **more):
    """A checkpoint of the good student, but for what it says."""
    state = honest().state_dict() if state is None else state
    content = {"state_dict": state, "hyper_parameters": GOOD | changes, "f2d2": {}, VERSION: "2.6.0"} | more
    torch.save(content, path)
    return path


def sampled(path, *options):
    out = path.with_suffix(".npz")
    f2d2("sample", "--ckpt", path, "--out", out, "--num", 2, "--steps", 1, "--device", "cpu", *options)


def table(path, points, *options):
    out = path.with_suffix(".csv")
    where = ["--ckpt", path, "--data", points, "--out", out]
    f2d2("nll", *where, "--steps", 2, "--device", "cpu", "--overwrite", "true", *options)
    with out.open(newline="") as file:
        return torch.tensor([float(row["log_prob"]) for row in csv.DictReader(file)])


def loaders(path):
    return (lambda: load_module(path, f2.F2D2Module), lambda: f2.F2D2Module.load_from_checkpoint(path))


def refused_by_commands(path, capsys, *says, lines=1):
    """``f2d2 sample`` and ``f2d2 nll`` end with a message, not with a traceback."""
    for command in (lambda: sampled(path), lambda: table(path, "mixture")):
        with pytest.raises(SystemExit) as stop:
            command()
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert lines is None or said.count("\n") == lines, said
        for what in says:
            assert what in said


# --- text that would be code ---

UNTRUSTED = "no code outside of f2d2_lightning, torch.nn, torch.optim is run because a file says so"
TEXT = "text from a file never becomes an object or a function"
CLASS = "the file names"


def headed(network):
    return {"head": part("f2d2_lightning.DivergenceHead", network=network)}


def mapped(name="MLP", **arguments):
    return {"flow_map": part(f"f2d2_lightning.nn.{name}", **{"shape": [2], **arguments})}


def called(call, network=IDENTITY, **more):
    return {"flow_map": adapted(network, call, **more), "head": OWN_HEAD}


def network_of(class_path, **arguments):
    return called("net(x, t)", part(class_path, **arguments))


def named(name):
    return {"flow_map": part(name)}


def scheduled(class_path, **arguments):
    return {"lr_scheduler": part(class_path, **arguments)}


def each(says, make, *values):
    """Files that are refused in the same words, by what differs in them."""
    return {f"{says:.20}: {value!r:.60}": (make(value), says) for value in values}


STUDENT = "f2d2_lightning.F2D2Module"
HOSTILE = {
    # the report: a function of the standard library as a network, a command as its call
    "a function and a command": (called(SHELL, "subprocess.call"), TEXT, "subprocess.call"),
    "a class that starts a process": (
        network_of("subprocess.Popen", args=["touch", "ran"]), UNTRUSTED, "trust=['subprocess']"),
    "a module that runs when imported": (named("trapmodule.Net"), UNTRUSTED, "trapmodule.Net"),
    "a backbone in it": (network_of("trapmodule.Net", shape=[2]), UNTRUSTED, "--trust trapmodule"),
    **each(UNTRUSTED, network_of, "subprocess.call", "builtins.eval", "torch.hub.load"),
    **each(UNTRUSTED, lambda name: {"_class_path": name}, "this.s", "antigravity.Module"),
    **each(CLASS, lambda name: {"_class_path": name}, ["os"], "f2d2_lightning.cli.main"),
    **each("but a F2D2Module is needed here", lambda name: {"_class_path": name},
           "f2d2_lightning.cli.F2D2CLI", "f2d2_lightning.FlowMatchingModule"),
    # names of classes, by what is said of them; some walk to what an allowed module has imported
    **each("FlowMap is needed there", named, "f2d2_lightning.cli.F2D2CLI", "torch.optim.SGD", "torch.nn.Identity"),
    **each("is no class", named, "f2d2_lightning.checkpoints.trust.importlib", "torch.nn.functional.relu"),
    **each("cannot be imported", named,
           "f2d2_lightning.training.loading.torch.hub", "torch.nn.Linear.__init__", "torch.nn.L\u0456near"),
    **each(UNTRUSTED, named,
           "torch.nn.modules.module.OrderedDict", "f2d2_lightning.training.loading.Path", "torch.load",
           "torch.nnx.Linear", "__main__.Net", "f2d2_lightning.__main__.Net", "torch.nn.__class__"),
    **each("a dotted path", named, "..os.system", "Linear", "torch.nn.Linear\n", "torch.nn:Linear",
           "\uff54orch.nn.Linear", "torch.nn.\x1b[2J", None, "torch.nn." + "a" * 10**6),
    # classes that are allowed, in places that they are not for
    **each("Module is needed there", network_of, "torch.optim.SGD", "torch.nn.Parameter"),
    "a cache as a network": (
        network_of("f2d2_lightning.objectives.trajectory_cache.TrajectoryCache", folder="trap"),
        "Module is needed there"),
    "data as a network": (network_of("f2d2_lightning.data.ImageFolder", folder="trap"), "Module is needed there"),
    "a student as a network": (network_of(STUDENT, shape=[2], flow_map=MAP, head=HEAD), "a whole and no part"),
    "a student as a head": (headed(part(STUDENT, shape=[2], flow_map=MAP)), "a whole and no part"),
    "a map as a teacher": ({"teacher": MAP}, "FlowMatchingModule is needed there"),
    **each("Optimizer is needed there", lambda value: {"optimizer": value},
           IDENTITY, part("torch.optim.lr_scheduler.StepLR", step_size=1)),
    "a process as the optimiser": ({"optimizer": part("subprocess.Popen", args=["touch", "ran"])}, UNTRUSTED),
    "a process as a schedule": (scheduled("subprocess.Popen", args=["ls"]), UNTRUSTED),
    **each(TEXT, lambda value: scheduled("torch.optim.lr_scheduler.LambdaLR", lr_lambda=value),
           "os.system", ["os.system"]),
    # text where objects are needed: jsonargparse reads a file of that name, or imports it
    **each(TEXT, lambda name: {name: "trap.yaml"}, "flow_map", "head", "objective", "estimator", "optimizer"),
    "a class as the map": ({"flow_map": "trapmodule.Net"}, TEXT, "trapmodule.Net"),
    "a file as a path": ({"objective": part("f2d2_lightning.TrajectoryRegression", path="trap.yaml")}, TEXT),
    "a file as an embedding": (mapped(embedding="trap.yaml"), TEXT),
    "a file in a list": ({"shape": ["trap.yaml"]}, TEXT),
    "text as a flag": ({"frozen": "trap.yaml"}, TEXT),
    "other keywords": (
        {"flow_map": MAP | {"dict_kwargs": {"embedding": part("os.system")}}}, UNTRUSTED, "os.system"),
    "keywords that are none": ({"flow_map": MAP | {"dict_kwargs": "trap.yaml"}}, "is no description"),
    "more than a description": ({"flow_map": MAP | {"\x1b[2J__reduce__": 1}}, "under names that are no printable text"),
    "a stranger in a description": ({"flow_map": MAP | {"__reduce__": ["os.system"]}}, "is no description"),
    "an argument of its own": ({"payload": part("os.system")}, "has no argument 'payload'"),
    # calls
    **each("defines no method", lambda method: called(f"net.{method}(x, t)"),
           "load_state_dict", "__init__", "_apply", "training", "nothing"),
    **each("does not call net", called, "net.forward.__globals__(x, t)", "__import__('os').system('x')"),
    **each("not understood", called, "net(x, t, x.__class__)", "net(x, t, lambda: x)", "net(x, t, eval('1'))"),
    **each("calculates with", called, "net(x, t, [0] * 3000000000)", "net(x, t, 3000000000 * 'a')"),
    **each("cannot be", called, "net(x, t) # \x00"),
    **each("the call", called, "net(x, t, " + 300 * "-(" + "x" + 300 * ")" + ")"),
    **each("nested too deeply", called, "net(x, t, " + 1500 * "-" + "x)"),
    **each("up to 2000 characters", called, "net(x, t, " + 10**6 * "-" + "x)"),
    "a call that is no text": (called(["net(x, t)"]), "Adapter"),
    "a student's loader as the call": (
        called("net.load_from_checkpoint('trap.ckpt', trust=['subprocess'], low=x, high=t)",
               part(STUDENT, shape=[2], flow_map=MAP)), "a whole and no part"),
    "a student's teacher as the call": (
        called("net.teacher(x, t)",
               part(STUDENT, shape=[2], flow_map=MAP, trust=["subprocess"], teacher="trap.ckpt")),
        "a whole and no part"),
    # numbers that are none
    "no network": ({"flow_map": None, "shape": None}, "flow_map is needed"),
    "a number as a shape": ({"shape": 3}, "does not fit F2D2Module", "shape=3 is a int"),
    **each("shape=[", lambda side: {"shape": [side]}, 2.5, -2, True, float("nan"), float("inf")),
    **each("does not fit F2D2Module", lambda value: {"flow_map": value}, 5, {"a": 1}),
    "no rate": ({"ema_decay": float("nan")}, "ema_decay=nan"),
    "one step": ({"steps": 1}, "steps=1 is a int"),
    **each("cannot be made from the file: MLP", lambda width: mapped(width=width),
           -1, float("nan"), float("inf"), [8], torch.ones(8)),
    **each("cannot be made from the file: MLP", lambda blocks: mapped(blocks=blocks), float("nan"), {"a": 1}),
    "compiled by somebody": ({"compile": "trapmodule"}, "compile is 'trapmodule'"),
    "parallel": (
        network_of("torch.nn.parallel.DistributedDataParallel", module=IDENTITY), "cannot be made from the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(HOSTILE))
def test_what_a_file_says_is_not_run(tmp_path, case, capsys):
    changes, *says = HOSTILE[case]
    path = write(tmp_path / "a.ckpt", changes)
    trap(tmp_path)
    with nothing_runs(tmp_path), little():
        for load in loaders(path):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                load()
            assert all(what in str(error.value) for what in says), str(error.value)
            assert len(str(error.value)) < 2000
        refused_by_commands(path, capsys, *says)
    if "flow_map" not in changes:
        return
    # the same as a teacher, which a student's configuration names
    content = {"_class_path": "f2d2_lightning.FlowMatchingModule", "shape": [2], "flow_map": changes["flow_map"]}
    torch.save({"state_dict": {}, "hyper_parameters": content}, tmp_path / "teacher.ckpt")
    student = f2.F2D2Module(MLP((2,), 8, 1), (2,), teacher=str(tmp_path / "teacher.ckpt"))
    with nothing_runs(tmp_path):
        for load in (
            lambda: f2.FlowMatchingModule.load_from_checkpoint(tmp_path / "teacher.ckpt"),
            lambda: student.teacher,
        ):
            with pytest.raises(ValueError):  # noqa: PT011
                load()


def trap(folder, name="trap.ckpt"):
    """A second file, which runs a process where its classes are trusted."""
    network = part("subprocess.Popen", args=["touch", str(folder / "ran")])
    content = {"shape": [2], "flow_map": adapted(network, "net(x)")}
    torch.save({"state_dict": {}, "hyper_parameters": content}, folder / name)
    return str(folder / name)


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_would_run(tmp_path):
    """Lightning's own way with the same files, so that the tests above are about something."""
    ran = tmp_path / "ran"
    for case in (
        "a function and a command",
        "a module that runs when imported",
        "a backbone in it",
        "a class as the map",
    ):
        path = write(tmp_path / "a.ckpt", HOSTILE[case][0] | {"head": OWN_HEAD}, SCALES)
        assert not ran.exists()
        # one runs when the module is made, one when it is called; what comes after is an error
        with contextlib.suppress(Exception):
            _load_from_checkpoint(f2.F2D2Module, path, weights_only=True, strict=False).sample(2, 1)
        assert ran.exists(), case
        ran.unlink()
        sys.modules.pop("trapmodule", None)
    # and the watch sees it
    with pytest.raises(AssertionError), nothing_runs(tmp_path):
        import trapmodule  # noqa: F401
    with pytest.raises(AssertionError), nothing_runs(tmp_path):
        os.system("true")
    with pytest.raises(AssertionError), nothing_runs(tmp_path):
        Path("trap.yaml").read_text()


def test_a_call_reaches_no_more_than_the_forward_pass(tmp_path):
    """Objects of the user's own, and a call from a file: what libraries add to networks is out of its reach."""

    class Library(nn.Module):  # as diffusers' ModelMixin and transformers' PreTrainedModel
        def save_pretrained(self, path, x, t):
            Path(path).write_text("written")

    Library.__module__ = "library.mixins"

    class Net(Library):
        kind = nn.Linear

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t):
            return self.layer(x)

        @property
        def asked(self):
            raise RuntimeError("asked")

        @classmethod
        def make(cls, x, t):
            return x

        def _private(self, x, t):
            return x

    class Derived(Net):
        def again(self, x, t):
            return self(x, t)

    for call in ("net.forward(x, t)", "net.again(x, t)", "net.layer(x)"):
        Adapter(call)(Derived())
    for network, methods in (
        (Derived(), ("save_pretrained", "asked", "make", "_private", "kind", "half")),
        (honest(), ("load_from_checkpoint", "teacher", "setup", "teacher_velocity", "to_torchscript", "prepare")),
    ):
        for method in methods:
            with pytest.raises(ValueError, match=f"{type(network).__name__} defines no method '{method}'"):
                Adapter(f"net.{method}('written', x, t)")(network)
    # the same from a folder
    net = Net()
    joint = JointFlowMap(Adapter("net(x, t)")(net), f2.DivergenceHead(2, 4, 1))
    saved = save_pretrained(joint, tmp_path / "joint", shape=(2,))
    for call in ("net.save_pretrained('written', x, t)", "net.to('cuda', x, t)"):
        edited(saved, set_in("model", "arguments", "flow_map", "arguments", "adapter", "arguments", "call", call))
        with nothing_runs(tmp_path), pytest.raises(ValueError, match="Net defines no method"):
            load_joint(saved, net)


# --- files that name other files ---


def test_a_teacher_is_not_opened_by_the_commands(tmp_path, monkeypatch):
    points = tmp_path / "points.npy"
    np.save(points, np.zeros((3, 2), np.float32))
    trap(tmp_path)
    os.mkfifo(tmp_path / "trap.fifo")  # to open it is to wait for ever
    objective = part("f2d2_lightning.TrajectoryRegression", cache=str(tmp_path / "trap.cache"))
    for teacher in ("trap.ckpt", "trap.fifo", "trap.missing", "/proc/self/mem", "https://example.com/a.ckpt", "\x00"):
        for more in ({}, {"objective": objective, "trust": ["subprocess"]}):
            path = write(tmp_path / "a.ckpt", {"teacher": teacher, **more})
            expected = honest()
            global _events
            _events = seen = []
            try:
                sampled(path, "--overwrite", "true")
                value = table(path, points)
            finally:
                _events = None
            named = [event for event in seen if "trap" in event[1] or "/mem" in event[1] or event[0] in _STARTS]
            assert not [event for event in named if event[0] != "os.remove"]
            assert not (tmp_path / "trap.cache").exists()
            with torch.no_grad():
                torch.testing.assert_close(value, expected.log_prob(torch.zeros(3, 2), 2).value, atol=1e-4, rtol=1e-4)


class Forwarding(f2.F2D2Module):
    """Takes whatever the base class takes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize("name", ["f2d2_lightning.F2D2Module", None])
def test_what_is_trusted_is_not_for_the_file_to_say(tmp_path, name):
    """Where a trainer would open the teacher of a student from a file."""
    changes = {"teacher": trap(tmp_path, "second.ckpt"), "trust": ["subprocess", "trapmodule"], "_class_path": name}
    path = write(tmp_path / "a.ckpt", changes)
    kind = Forwarding if name is None else f2.F2D2Module
    module = kind.load_from_checkpoint(path)
    assert not {"subprocess", "trapmodule"} & set(module.trust)
    for run in ("test", "fit"):
        with nothing_runs(tmp_path), pytest.raises(ValueError, match=r"subprocess.Popen.*trust=\['subprocess'\]"):
            getattr(trainer(tmp_path, max_steps=1), run)(module, datamodule=Pair())


# --- files that are larger than they are ---


def laughs(times, wide=10):
    value = [0] * wide
    for _ in range(times):
        value = [value] * wide
    return value


def nest(depth):
    value: object = MAP
    for _ in range(depth):
        value = part("f2d2_lightning.flows._held.HeldFlowMap", flow_map=value)
    return value


def endless():
    value: list = []
    value.append(value)
    return value


def stack(layers, layer=None):
    layer = layer or part("torch.nn.TransformerEncoderLayer", d_model=2, nhead=1, dim_feedforward=2)
    return part("torch.nn.TransformerEncoder", encoder_layer=layer, num_layers=layers)


LARGE = "far more than"
BOMBS = {
    # numbers, arrays and modules that are counted, each in its own way, and what is known before anything is made
    "a number beyond all": (mapped(width=10**40), LARGE),
    "blocks": (mapped(blocks=100_000), LARGE),
    "width": (mapped(width=10**6), LARGE),
    "waves": (mapped("PreconditionedMLP", shape=[1, 4096, 4096]), LARGE),
    "a preconditioner": (mapped("PreconditionedMLP", shape=[4_000], covariance="full"), LARGE),
    "places": (mapped("DiT", shape=[1, 10**5, 10**5], patch=1, width=12, heads=2), LARGE),
    "multipliers": (mapped("UNet", shape=[1, 8, 8], width=8, multipliers=[10**6], blocks=10**9), LARGE),
    "a default head": ({"shape": [10**9], "head": None, "flow_map": MAP}, LARGE),
    "a linear layer on a device": (
        headed(part("torch.nn.Linear", in_features=10**5, out_features=10**5, device="cpu")), LARGE),
    "an embedding of torch": (headed(part("torch.nn.Embedding", num_embeddings=10**6, embedding_dim=10**4)), LARGE),
    "recurrence": (headed(part("torch.nn.LSTM", input_size=1, hidden_size=1, num_layers=10**9)), LARGE),
    "a stack": (headed(stack(10**9)), LARGE),
    "a transformer": (headed(part("torch.nn.Transformer", d_model=2, nhead=1, num_encoder_layers=10**8)), LARGE),
    "a stack of stacks": (headed(stack(1000, stack(1000, stack(1000)))), "TransformerEncoderLayer is needed there"),
    "a list of modules": (headed(part("torch.nn.ModuleList", modules=[stack(500)] * 1000)), LARGE),
    "modules in modules": ({"flow_map": nest(200)}, "without end"),
    "lists in lists": ({"steps": laughs(12)}, "without end"),
    "a list in itself": ({"steps": endless()}, "without end"),
    "a large state": (called("net(x, t)") | {"shape": [500_000_000]}, "is for states of shape (500000000,)"),
    "a state beyond all": (called("net(x, t)") | {"shape": [10**20, 10**20]}, "is for states of shape"),
    "axes of time": (called("net(x, t)", time_axes=10**9), "time_axes=1,000,000,000"),
    "classes of an adapter": (called("net(x, t, cond)", classes=10**9), "classes=1000000000"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BOMBS))
def test_what_a_file_describes_is_no_larger_than_the_file(tmp_path, case, capsys):
    changes, *says = BOMBS[case]
    # what a module holds in the end does not help: it is refused on the way
    path = write(tmp_path / "a.ckpt", changes)
    with little(), pytest.raises(ValueError) as error:  # noqa: PT011
        load_module(path, f2.F2D2Module)
    assert all(what in str(error.value) for what in says), str(error.value)
    if case in ("blocks", "lists in lists"):
        refused_by_commands(path, capsys, *says)


@pytest.mark.parametrize("form", ["of no device", "sparse", "none"])
def test_weights_that_say_that_they_are_more_than_they_are(tmp_path, form):
    size = (10**14,)
    value = {"of no device": torch.empty(size, device="meta"), "none": None}.get(
        form, torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), size)
    )
    path = write(tmp_path / "a.ckpt", mapped(width=20_000), honest().state_dict() | {"more": value})
    with little(), pytest.raises(ValueError, match="under 'more' that is no plain tensor on the CPU"):
        load_module(path, f2.F2D2Module)


def test_one_number_that_stands_for_many_and_many_names_for_one(tmp_path):
    same = torch.zeros(10**5)
    for more in ({"more": torch.zeros(1).expand(10**10)}, {f"w{n}": same for n in range(1000)}):
        path = write(tmp_path / "a.ckpt", mapped(width=20_000), honest().state_dict() | more)
        assert path.stat().st_size < MIB
        with little(), pytest.raises(ValueError, match=LARGE):
            load_module(path, f2.F2D2Module)


def test_an_archive_that_grows(tmp_path):
    path = write(tmp_path / "a.ckpt", {}, honest().state_dict() | {"more": torch.zeros(10**7)})
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info))
    for load in (
        lambda: load_module(tmp_path / "b.ckpt", f2.F2D2Module),
        lambda: load_joint(tmp_path / "b.ckpt", nn.Identity()),
    ):
        with little(20 * MIB), pytest.raises(ValueError, match=r"is compressed, as .* never writes"):
            load()


def test_a_stack_of_layers_of_a_sensible_size_is_made():
    made = within_size(lambda: build(stack(3), nn.Module), 100, 1000, "a file")
    assert len(made.layers) == 3


# --- files that are something else ---


class Evil:
    """What a pickle would run."""

    def __reduce__(self):
        return os.system, ("touch ran",)


CONTENTS = {
    "hyper-parameters that are text": {"state_dict": {}, "hyper_parameters": "trap.yaml"},
    "hyper-parameters that are a tensor": {"state_dict": {}, "hyper_parameters": torch.ones(3)},
    "no weights": {"hyper_parameters": GOOD},
    "a tensor": torch.ones(3),
    "names that are numbers": {"state_dict": {3: torch.ones(1)}, "hyper_parameters": GOOD},
    "names that a terminal obeys": {"state_dict": {"\x1b[2J": torch.ones(1)}, "hyper_parameters": GOOD},
    "other weights": {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": GOOD},
    "progress that is a number": {"state_dict": {}, "hyper_parameters": GOOD, "loops": 3},
    "a seed that is a number": {"state_dict": {}, "hyper_parameters": GOOD, "f2d2": 3},
    "an objective that is a number": {"state_dict": {}, "hyper_parameters": GOOD, "f2d2": {"objective": 3}},
}


@pytest.mark.parametrize("case", list(CONTENTS))
def test_other_contents(tmp_path, case, capsys):
    path = tmp_path / "a.ckpt"
    torch.save(CONTENTS[case], path)
    for load in loaders(path):
        with pytest.raises(ValueError, match=r"a\.ckpt|the checkpoint is of|hyper-parameters") as error:
            load()
        assert "\x1b" not in str(error.value)
    refused_by_commands(path, capsys, lines=None)


@pytest.mark.parametrize("where", ["whole", "hyper-parameters", "weights", "beside"])
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_pickles_that_run(tmp_path, where, form, capsys):
    content = {"state_dict": {}, "hyper_parameters": dict(GOOD), "more": 1}
    if where == "hyper-parameters":
        content["hyper_parameters"]["flow_map"] = Evil()
    content = {
        "whole": Evil(),
        "weights": content | {"state_dict": {"a": Evil()}},
        "beside": content | {"more": Evil()},
    }.get(where, content)
    path = tmp_path / "a.ckpt"
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    net = MLP((2,), 8, 1)
    with nothing_runs(tmp_path):
        for load in (
            *loaders(path),
            lambda: f2.F2D2Module(net, (2,), teacher=str(path)).teacher,
            lambda: load_joint(path, net),
        ):
            with pytest.raises(ValueError, match="plain values"):
                load()
        refused_by_commands(path, capsys, "plain values", lines=None)
    with pytest.raises(ValueError, match="weights_only=False"):
        f2.F2D2Module.load_from_checkpoint(path, weights_only=False)
    if where == "whole" and form == "pickle":
        pickle.loads(path.read_bytes())
        assert (tmp_path / "ran").exists()


def test_a_pickle_with_any_byte_changed(tmp_path):
    """Whatever torch's reader of pickles makes of it is a ValueError."""
    path = write(tmp_path / "a.ckpt", {})
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    dice = random.Random(0)
    with nothing_runs(tmp_path), little(500 * MIB, 60):
        for _ in range(300):
            content = bytearray(members[name])
            for _ in range(dice.choice((1, 1, 2, 5))):
                content[dice.randrange(len(content))] = dice.randrange(256)
            with zipfile.ZipFile(path, "w") as archive:
                for member, data in members.items():
                    archive.writestr(member, bytes(content) if member == name else data)
            try:
                load_module(path, f2.F2D2Module)
            except ValueError:
                continue


# --- exports and folders ---


@pytest.fixture
def exported(tmp_path):
    """A file as version 0.1 wrote it."""
    torch.manual_seed(0)
    net = MLP((2,), 8, 1)
    adapter = Adapter("net(x, s, t)")
    head = f2.DivergenceHead(8, 4, 1)
    AdaptedFlowMap(net, adapter, features="norm")
    content = {"version": 1, "shape": [2], "adapter": adapter.config(), "features": "norm", "interval": None,
               "interval_state": None, "directions": "BOTH", "head": a_head(hidden=4), "head_state": head.state_dict(),
               "network_state": net.state_dict()}  # fmt: skip
    torch.save(content, tmp_path / "joint.pt")
    return tmp_path / "joint.pt", net


def a_head(**changes):
    return {"features": 8, "hidden": 8, "layers": 1, "per_axis": False, "network": None, "baseline": None} | changes


EXPORTS = {
    "adapter": [None, {}, {"class": "os.system"}, {"class": "Adapter", "call": "net.load_state_dict(x, t)"},
                {"class": "adapter_from_config"}, {"class": "AdaptedFlowMap", "network": "os.system"},
                {"class": "Adapter", "call": "net(x, t)", "time_axes": 10**10}],
    "head": [None, {"features": 8}, a_head(hidden=10**6, layers=5), a_head(layers=10**9),
             a_head(baseline={"shape": [100_000], "covariance": "full", "path": "LinearPath"}),
             a_head(baseline={"shape": [2], "covariance": "full", "path": "os.system"}), a_head(network="os.system")],
    "head_state": [None, {"scale": 3}, {"scale": torch.empty(10**14, device="meta")}, {3: torch.ones(())}],
    "network_state": [3, {"a": torch.ones(1)}, {"a": "b"}],
    "directions": [3, "sideways"],
    "features": [3, "nowhere"],
    "interval": ["nowhere", "norm"],
}  # fmt: skip


@pytest.mark.parametrize("place", list(EXPORTS))
def test_exports(tmp_path, exported, place):
    path, net = exported
    content = torch.load(path, weights_only=True)
    for value in EXPORTS[place]:
        torch.save(content | {place: value}, path)
        with nothing_runs(tmp_path), little(), pytest.raises(ValueError):  # noqa: PT011
            load_joint(path, net)
        torch.save({"f2d2_joint": {"net": content | {place: value}}, "state_dict": content["network_state"]}, path)
        with nothing_runs(tmp_path), little(), pytest.raises(ValueError):  # noqa: PT011
            load_joint(path, net)
    for joints in (3, [1], {"net": 3}, {"net": None}, {"a": content, "b": content}):
        torch.save({"f2d2_joint": joints, "state_dict": {}}, path)
        with pytest.raises(ValueError):  # noqa: PT011
            load_joint(path, net)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return save_pretrained(JointFlowMap(MLP((2,), 8, 1), f2.DivergenceHead(8, 4, 1)), tmp_path / "model", shape=(2,))


def edited(folder, change):
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


def set_in(*names):
    *path, last, value = names

    def change(content):
        for name in path:
            content = content[name]
        content[last] = value

    return change


A_MAP = ("model", "arguments", "flow_map")
FOLDERS = {
    "a number beyond all": (set_in(*A_MAP, "arguments", "width", 10**40), LARGE),
    "blocks": (set_in(*A_MAP, "arguments", "blocks", 100_000), LARGE),
    "width": (set_in(*A_MAP, "arguments", "width", 10**6), LARGE),
    "a covariance": (set_in("model", "arguments", "head", "arguments", "baseline", {
        "class": "f2d2_lightning.flows.GaussianBaseline", "number": 9,
        "arguments": {"shape": [4_000], "covariance": "full"}}), LARGE),
    "a part in place": (set_in("replaced", {"head": {
        "class": "f2d2_lightning.nn.DivergenceHead", "number": "x",
        "arguments": {"features": 8, "hidden": 10**6, "layers": 9}}}), LARGE),
    "infinity": (set_in(*A_MAP, "arguments", "width", float("inf")), "made from the file: MLP"),
    "a class of torch": (set_in(*A_MAP, "class", "torch.nn.Linear"), "names the class 'torch.nn.Linear'"),
    "a function": (set_in(*A_MAP, "class", "f2d2_lightning.checkpoints.trust.importlib"), "is no class"),
    "the command line": (set_in(*A_MAP, "class", "f2d2_lightning.cli.F2D2CLI"), "names the class"),
    "a module that runs": (set_in(*A_MAP, "class", "trapmodule.Net"), "names the class 'trapmodule.Net'"),
    "a number of an object that is a list": (set_in(*A_MAP, "number", [1]), "no model that can be read"),
    "the same as a list": (set_in(*A_MAP, {"same_as": [1]}), "refers to object [1]"),
    "arguments that are none": (set_in(*A_MAP, "arguments", "blocks", {"class": 3}), "object's class and arguments"),
    "a network that is not given": (set_in(*A_MAP, {"given": "network", "class": "a.B"}), "give it: network="),
    "given by a list": (set_in(*A_MAP, {"given": [1], "class": [2]}), "give it: [1]="),
    "a call that runs": (set_in(*A_MAP, {"class": "f2d2_lightning.adapters.Adapter", "number": 9,
        "arguments": {"call": "__import__('os').system('touch ran')"}}), "made from the file: Adapter"),
    "depth": (lambda content: content.update(model=deep(200)), "without end"),
    "a long list": (set_in(*A_MAP, "arguments", "blocks", [0] * 200_000), "without end"),
    "an edge beyond all": (set_in("low", 10**400), "describes data of shape"),
    "an edge that is none": (set_in("low", float("nan")), "describes data of shape"),
    "a name that a terminal obeys": (set_in("\x1b[2J", 1), "no printable text"),
}  # fmt: skip


def deep(depth):
    value: object = {"class": "f2d2_lightning.nn.MLP", "number": 0, "arguments": {}}
    for _ in range(depth):
        value = {"class": "f2d2_lightning.nn.JointFlowMap", "number": 0, "arguments": {"flow_map": value}}
    return value


@pytest.mark.parametrize("case", list(FOLDERS))
def test_folders(tmp_path, folder, case):
    change, says = FOLDERS[case]
    edited(folder, change)
    with nothing_runs(tmp_path), little(100 * MIB, 5):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            from_pretrained(folder)
        assert says in str(error.value)
        # the model itself is none of its business
        with contextlib.suppress(ValueError):
            read_description(folder)
    assert "trapmodule" not in sys.modules


# --- and what is right loads ---

PACKAGE = '''
import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import f2d2_lightning as f2
from f2d2_lightning.nn import MLP


class Mode(enum.Enum):
    SOFT = "soft"
    HARD = "hard"


@dataclass
class Gain:
    factor: float = 1.0
    limits: tuple[float, float] = (0.0, 10.0)


@dataclass
class Config:
    depth: int = 1
    gain: Gain = field(default_factory=Gain)
    modes: list[Mode] = field(default_factory=lambda: [Mode.SOFT])


class Backbone(f2.FlowMap):
    """Arguments of all kinds."""

    def __init__(
        self,
        shape: tuple[int, ...],
        config: Config,
        kind: tuple[str, int] = ("a", 1),
        mode: Mode = Mode.SOFT,
        inner: nn.Module | None = None,
        layers: list[nn.Module] | None = None,
        names: set[str] | None = None,
        makes: Callable[[int], nn.Module] | None = None,
        activation: type[nn.Module] = nn.SiLU,
        function: Callable = torch.nn.functional.silu,
    ) -> None:
        super().__init__()
        for value, expected in ((shape, tuple), (config, Config), (config.gain, Gain), (mode, Mode), (kind, tuple),
                                (config.gain.limits, tuple), (names, set), (kind[0], str), (config.modes[0], Mode)):
            assert isinstance(value, expected), (value, expected)
        self.shape, self.config, self.kind, self.mode, self.names = shape, config, kind, mode, names
        self.act, self.function = activation(), function
        self.net = MLP(shape, width=8, blocks=config.depth)
        self.inner = inner
        self.made = makes(2)
        self.layers = nn.ModuleList(layers)
        self.features, self.directions = 8, self.net.directions

    def forward(self, x, s, t, cond=None):
        return self.forward_features(x, s, t, cond)[0]

    def forward_features(self, x, s, t, cond=None):
        u, h = self.net.forward_features(x, s, t)
        return self.config.gain.factor * u + 0.1 * self.act(self.made(self.inner(x))), h


class Opt(torch.optim.Adam):
    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Student(f2.F2D2Module):
    def __init__(self, extra: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        self.extra = extra
'''

OWN = part(
    "my_backbones.Backbone", shape=[2], kind=["b", 3], mode="HARD", names=["q"],
    config={"depth": 2, "gain": {"factor": 2.0, "limits": [0, 1]}, "modes": ["HARD", "SOFT"]},
    inner=part("torch.nn.Linear", in_features=2, out_features=2), layers=[IDENTITY, part("torch.nn.Tanh")],
    makes=part("torch.nn.Linear", out_features=2),
)  # fmt: skip


def fit(folder, model, version, **arguments):
    """The module that the command line trained for two steps, and its checkpoint."""
    logger = part("f2d2_lightning.callbacks.RunLogger", save_dir="runs", name="own", version=version)
    content = {
        "model": {"class_path": model, "init_args": arguments},
        "data": part("f2d2_lightning.data.GaussianMixture", batch_size=64, count=300),
        "trainer": {"max_steps": 2, "num_sanity_val_steps": 0, "logger": logger},
    }
    (folder / f"{version}.yaml").write_text(yaml.safe_dump(content))
    module = trained("--config", folder / f"{version}.yaml")
    return module, folder / f"runs/own/{version}/checkpoints/last.ckpt"


def trained(*options):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (f2.F2D2Module, f2.FlowMatchingModule):
            patch.setattr(kind, "on_train_end", lambda module: seen.append(module))
        f2d2("fit", *options, *QUICK)
    return seen[-1].eval()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of the user's own, and a teacher and a student of it, from the command line."""
    (tmp_path / "my_backbones").mkdir()
    (tmp_path / "my_backbones" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_backbones", None)
    _, teacher = fit(tmp_path, "f2d2_lightning.FlowMatchingModule", "teacher", shape=[2], flow_map=OWN)
    settings = {
        "shape": [2], "flow_map": OWN, "teacher": str(teacher), "extra": 3,
        "optimizer": part("my_backbones.Opt", lr=0.01),
        "lr_scheduler": part("torch.optim.lr_scheduler.StepLR", step_size=2),
        "objective": part("f2d2_lightning.objectives.Semigroup",
                          weighting=part("f2d2_lightning.Weighting", divergence=0.5),
                          intervals=part("f2d2_lightning.Intervals", grid=0.2, steps=[1, 2])),
        "reference": part("f2d2_lightning.Reference", steps=4, probes=0),
        "estimator": part("f2d2_lightning.divergence.Exact"),
    }  # fmt: skip
    yield fit(tmp_path, "my_backbones.Student", "student", **settings)
    sys.modules.pop("my_backbones", None)


def test_a_backbone_of_ones_own(tmp_path, own, capsys):
    module, path = own
    points = tmp_path / "points.npy"
    x = torch.randn(5, 2)
    np.save(points, x.numpy())
    capsys.readouterr()
    refused_by_commands(path, capsys, "names the class my_backbones.Student", "--trust my_backbones")
    for load in loaders(path):
        with pytest.raises(ValueError, match=r"my_backbones.*trust=\['my_backbones'\]"):
            load()
    with torch.no_grad():
        expected = module.log_prob(x, 2).value
        noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
        samples = module.sample(noise, 1).state
    before = torch.get_rng_state()
    again = load_module(path, f2.F2D2Module, trust=["my_backbones"])
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(again.log_prob(x, 2).value, expected)
    assert again.extra == 3
    backbone = again.joint.flow_map
    assert (backbone.kind, backbone.mode.name, backbone.names) == (("b", 3), "HARD", {"q"})
    assert [mode.name for mode in backbone.config.modes] == ["HARD", "SOFT"]
    assert backbone.function is nn.functional.silu
    assert again.objective.weighting == f2.Weighting(divergence=0.5)
    assert again.objective.intervals.steps == (1, 2)
    assert again.reference == f2.Reference(steps=4, probes=0)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = again.optimizer([parameter])
    assert type(optimizer).__name__ == "Opt"
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert isinstance(again.lr_scheduler(optimizer), torch.optim.lr_scheduler.StepLR)
    # its class says whose it is
    student = sys.modules["my_backbones"].Student
    with torch.no_grad():
        assert torch.equal(student.load_from_checkpoint(path).eval().log_prob(x, 2).value, expected)
    # the teacher is of the same package, and opened where it is compared with
    with torch.no_grad():
        assert again.teacher.average.config.depth == 2
    sampled(path, "--trust", "my_backbones")
    assert np.allclose(np.load(path.with_suffix(".npz"))["x"], samples.numpy(), atol=1e-5)
    torch.testing.assert_close(table(path, points, "--trust", "my_backbones"), expected, rtol=1e-4, atol=1e-4)


def test_an_own_class_cannot_be_turned_against_its_owner(tmp_path, own):
    """What a trusted package asks for is still no function by its name, and other packages stay untrusted."""
    _, path = own
    content = torch.load(path, weights_only=True)
    plain = content["hyper_parameters"]["flow_map"]["init_args"]
    for name, value, says in (
        ("function", "os.system", TEXT),
        ("activation", "subprocess.Popen", UNTRUSTED),
        ("inner", part("os.system"), UNTRUSTED),
        ("makes", "os.system", TEXT),
        ("layers", [IDENTITY, "os.system"], TEXT),
        ("config", part("subprocess.Popen", args=["ls"]), UNTRUSTED),
    ):
        content["hyper_parameters"]["flow_map"]["init_args"] = plain | {name: value}
        torch.save(content, path)
        with nothing_runs(tmp_path), pytest.raises(ValueError, match=says):
            load_module(path, f2.F2D2Module, trust=["my_backbones"])


class MyStudent(f2.F2D2Module):
    """A subclass of a script's own."""

    def __init__(self, width=8, head=None, objective=None):
        super().__init__(MLP((2,), width, 1), (2,), head=head, objective=objective)
        self.save_hyperparameters("width")


def test_a_scripts_subclass_needs_no_trust(tmp_path):
    module = MyStudent(width=12, head=f2.DivergenceHead(12, 4, 1), objective=f2.objectives.Semigroup())
    script = trainer(tmp_path, max_steps=2)
    script.fit(module, datamodule=Pair())
    script.save_checkpoint(tmp_path / "a.ckpt")
    given = {"head": f2.DivergenceHead(12, 4, 1), "objective": f2.objectives.Semigroup()}
    again = MyStudent.load_from_checkpoint(tmp_path / "a.ckpt", **given)
    x = torch.randn(4, 2)
    assert torch.equal(again.eval().log_prob(x).value, module.eval().log_prob(x).value)
    # and one of a plain class, whose objects the checkpoint describes, or are given again
    plain = f2.F2D2Module(MLP((2,), 12, 1), (2,), head=f2.DivergenceHead(12, 4, 1), warmup=3, optimizer=torch.optim.SGD)
    script.strategy.connect(plain)
    script.save_checkpoint(tmp_path / "b.ckpt")
    told = f2.F2D2Module.load_from_checkpoint(tmp_path / "b.ckpt")
    assert torch.equal(told.eval().log_prob(x).value, plain.eval().log_prob(x).value)
    again = f2.F2D2Module.load_from_checkpoint(
        tmp_path / "b.ckpt", flow_map=MLP((2,), 12, 1), head=f2.DivergenceHead(12, 4, 1)
    )
    assert again.warmup == 3
    assert torch.equal(again.eval().log_prob(x).value, plain.eval().log_prob(x).value)


class Judge(f2.F2D2Module):
    """Needs a network that its checkpoints do not hold."""

    def __init__(self, width=8):
        super().__init__(MLP((2,), width, 1), (2,), head=f2.DivergenceHead(width, 4, 1))
        self.save_hyperparameters()
        self.judge = [nn.Linear(2000, 2000)]


def test_what_a_class_of_ones_own_makes_besides_is_its_own_business(tmp_path):
    script = trainer(tmp_path)
    script.strategy.connect(Judge())
    script.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < MIB
    assert isinstance(Judge.load_from_checkpoint(tmp_path / "a.ckpt"), Judge)


def test_a_shipped_configuration_comes_back(tmp_path):
    tiny = ["--model.init_args.flow_map.init_args.width=16", "--model.init_args.flow_map.init_args.blocks=1"]
    objective = ["--model.init_args.objective=TrajectoryRegression", "--model.init_args.optimizer=torch.optim.AdamW"]
    pool = ["--model.init_args.objective.init_args.capacity=64", "--model.init_args.objective.init_args.nodes=8"]
    place = "runs/digits/{}/checkpoints/last.ckpt"
    module = trained("--config", CONFIGS / "digits_teacher.yaml", *tiny, "--trainer.max_steps=2")
    again = load_module(place.format("teacher"), f2.FlowMatchingModule)
    x = torch.randn(4, *module.shape)
    with torch.no_grad():
        assert torch.equal(again(x, 0.5), module(x, 0.5))
    teacher = f"--model.init_args.teacher={place.format('teacher')}"
    config = CONFIGS / "digits_student.yaml"
    module = trained("--config", config, *tiny, *objective, *pool, teacher, "--trainer.max_steps=2")
    before = torch.get_rng_state()
    again = load_module(place.format("student"), f2.F2D2Module)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(again.log_prob(x, 4).value, module.log_prob(x, 4).value)
    mine, theirs = again.objective, module.objective
    assert type(mine) is type(theirs)
    assert type(mine.path) is type(theirs.path)
    assert vars(mine.intervals) == vars(theirs.intervals)
    assert (mine.weighting, mine.quantization) == (theirs.weighting, theirs.quantization)
    assert again.reference == module.reference
    assert type(again.estimator) is type(module.estimator)
    parameter = [nn.Parameter(torch.ones(1))]
    assert again.optimizer(parameter).defaults == module.optimizer(parameter).defaults


# --- the parts ---


def test_arguments_are_those_of_the_base_classes_as_well():
    class Own(f2.F2D2Module):
        def __init__(self, extra: int = 1, **kwargs):
            super().__init__(**kwargs)

    found = takes(Own)
    assert found.hints["extra"] is int
    assert "objective" in found.hints
    assert not found.others
    assert takes(nn.Identity).others


def test_a_class_is_found_where_it_may_be():
    assert find_class("torch.nn.Linear") is nn.Linear
    assert find_class("f2d2_lightning.nn.MLP") is MLP
    assert find_class("collections.OrderedDict", ["collections"]).__name__ == "OrderedDict"
    with pytest.raises(ValueError, match="trust"):
        find_class("collections.OrderedDict", ["collections.abc", "collection", ""])


def test_what_reads_a_checkpoint_does_not_change_it(tmp_path):
    path = write(tmp_path / "a.ckpt", {})
    content = read_checkpoint(path)
    first = io.BytesIO()
    torch.save(content, first)
    load_module(path, f2.F2D2Module)
    again = io.BytesIO()
    torch.save(read_checkpoint(path), again)
    assert first.getvalue() == again.getvalue()


def test_a_class_may_be_asked_for_by_the_same_rule():
    assert build("torch.nn.GELU", type[nn.Module] | None) is nn.GELU
    for name in ("subprocess.Popen", "torch.optim.AdamW", "torch.nn.functional.silu", "silu"):
        with pytest.raises(ValueError, match=name):
            build(name, type[nn.Module])
    with pytest.raises(ValueError, match="text from a file never becomes"):
        build("torch.nn.GELU", Callable[..., Any])
