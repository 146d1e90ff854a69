"""Files that version 0.1 made, before modules moved to folders: read with the answers of then."""

import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import f2d2_lightning as f2
from f2d2_lightning import _moved

OLD = Path(__file__).parent / "made_by_0_1"
ANSWERS = json.loads((OLD / "answers.json").read_text())


class Net(nn.Module):
    """As the script that made the files had it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.out = nn.Linear(8, 2)

    def forward(self, x, t, s):
        return self.out(self.body(torch.cat([x, t[:, None], s[:, None]], -1)))


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def teacher(x):
    module = f2.FlowMatchingModule.load_from_checkpoint(OLD / "teacher.ckpt")
    return module.reference(module.average.velocity, x).value


READERS = {
    "teacher": teacher,
    "student": lambda x: f2.F2D2Module.load_from_checkpoint(OLD / "student.ckpt").log_prob(x, 2).value,
    "pretrained": lambda x: f2.log_prob(f2.from_pretrained(OLD / "pretrained"), x, 2).value,
    "dit": lambda x: f2.log_prob(f2.from_pretrained(OLD / "dit"), x, 2).value,
    "callback": lambda x: f2.log_prob(f2.load_joint(OLD / "callback.ckpt", Net()), x, 2).value,
    "export": lambda x: f2.log_prob(f2.load_joint(OLD / "export.pt", Net()), x, 2).value,
}


@pytest.mark.parametrize("kind", READERS)
def test_files_of_version_0_1_answer_as_they_did(kind):
    x = torch.tensor(ANSWERS["images" if kind == "dit" else "x"])
    torch.testing.assert_close(READERS[kind](x), torch.tensor(ANSWERS[kind]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("f2d2_lightning.heads.DivergenceHead", f2.DivergenceHead),
        ("f2d2_lightning.nn.transformer.DiT", f2.nn.DiT),
        ("f2d2_lightning.baseline.GaussianBaseline", f2.GaussianBaseline),
        ("f2d2_lightning.Semigroup", f2.objectives.Semigroup),
        ("f2d2_lightning.image_data.CIFAR10", f2.data.CIFAR10),
        ("f2d2_lightning.image_data.cifar.CIFAR10", f2.data.CIFAR10),
        ("f2d2_lightning.loggers.RunLogger", f2.callbacks.RunLogger),
        ("f2d2_lightning.summary.JointSummary", f2.callbacks.JointSummary),
        ("f2d2_lightning.data.Digits", f2.data.Digits),
        ("f2d2_lightning.foreign_checkpoints.load_official", f2.checkpoints.foreign.load_official),
    ],
)
def test_places_of_version_0_1_go_on(old, new):
    module, _, name = old.rpartition(".")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(importlib.import_module(module), name) is new
    said = [str(warning.message) for warning in caught if warning.category is DeprecationWarning]
    assert said == [] if module == "f2d2_lightning.data" else len(said) == 1 and said[0].startswith(f"{old} is ")


def test_every_old_place_is_somewhere_and_names_that_never_were_are_nowhere():
    for old, folder in _moved._FOLDER.items():
        if old.rpartition(".")[2][0].isupper() or (old.count(".") == 1 and "load" in old):
            assert hasattr(importlib.import_module(folder), old.rpartition(".")[2])
        else:
            importlib.import_module(old)
    for name in ("f2d2_lightning.nothing", "f2d2_lightning.heads.nothing"):
        module, _, attribute = name.rpartition(".")
        with pytest.raises(AttributeError, match="nothing"):
            getattr(importlib.import_module(module), attribute)
