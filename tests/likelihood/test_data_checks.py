"""Data that cannot work, each kind planted and found; and data that are fine, without a word."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from sklearn import datasets
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.likelihood import check_data, data_checks
from f2d2_lightning.training.batches import FirstLook
from foreign import MeanFlowModule, callback
from lightning_parts import Pair, fit, student, teacher, trainer
from problems import rotation

LEVELS = f2.Quantization(17)


def normal(count=1000, dim=4):
    return torch.randn(count, dim)


def with_column(make):
    """Four independent columns and one made of them."""
    x = normal()
    return torch.cat((x, make(x)[:, None]), 1)


def at_random(value, share=0.002):
    x = normal()
    return torch.where(torch.rand(x.shape) < share, value, x)


def images(count=400):
    return LEVELS.dequantize(torch.randint(0, 17, (count, 1, 8, 8)))


# what is planted; kind, columns and a part of the message that are expected
PLANTED = {
    "no data": (lambda: torch.zeros(0, 3), "few", (), "no training data"),
    "nan": (lambda: with_column(lambda x: torch.where(x[:, 0] > 2, math.nan, x[:, 0])), "not_finite", (4,), "remove"),
    "infinity": (
        lambda: with_column(lambda x: torch.where(x[:, 0] > 2, -torch.inf, x[:, 0])),
        "not_finite",
        (4,),
        "1,000 states",
    ),
    "one point": (lambda: torch.ones(1, 2), "constant", (0, 1), "all the same"),
    "one point, often": (lambda: torch.full((500, 2), 0.1), "constant", (0, 1), "all the same"),
    "three points": (lambda: normal(3), "few", (), "3 training states of 4 dimensions"),
    "no more points than columns": (lambda: normal(40, 40), "few", (), "Give more data, or fewer columns"),
    "a constant": (lambda: with_column(lambda x: 0 * x[:, 0] + 1e6), "constant", (4,), "in column 4"),
    "a constant of few": (lambda: torch.cat((normal(40), torch.ones(40, 1)), 1), "constant", (4,), "leave them out"),
    "copies": (lambda: torch.cat((x := normal(), x[:53])), "copies", (), r"5\.0 % of 1,053"),
    "copies at zero": (
        lambda: torch.cat((normal(), torch.tensor([[0.0], [-0.0]]).repeat(10, 4))),
        "copies",
        (),
        r"1\.9 %",
    ),
    "two values": (lambda: with_column(lambda x: x[:, 0].sign()), "discrete", (4,), "4: 2 values"),
    "a grid": (lambda: with_column(lambda x: (4 * x[:, 0]).round() / 4), "discrete", (4,), r"values, 0\.25 apart"),
    "one value often": (lambda: with_column(lambda x: (x[:, 0] - 1).relu()), "discrete", (4,), r"8\d % are 0"),
    "integers": (lambda: torch.randint(0, 9, (900, 3)).double(), "discrete", (0, 1, 2), "9 values, 1 apart"),
    "images that were not dequantized": (lambda: torch.rand(90, 1, 9, 9).mul(16).round(), "discrete", (), "17 values"),
    "a copy of a column": (
        lambda: with_column(lambda x: x[:, 2]),
        "function",
        (4,),
        "4 is one of column 2:|4 is one of",
    ),
    "a sum": (
        lambda: with_column(lambda x: x[:, 0] - 2 * x[:, 3] + 5),
        "function",
        (4,),
        "column 4 is one of columns 0, 3",
    ),
    "shares of a whole": (lambda: normal(500, 3).softmax(-1), "function", (2,), "column 2 is one of columns 0, 1"),
    "a square": (lambda: with_column(lambda x: x[:, 1] ** 2), "function", (4,), "column 4 is one of column 1"),
    "a wave": (lambda: with_column(lambda x: (3 * x[:, 1]).sin()), "function", (4,), "smooth functions"),
    "grey in colour": (
        lambda: images().repeat(1, 3, 1, 1),
        "function",
        (*range(64, 192),),
        r"\(1, 0, 0\) is one of place",
    ),
    "missing ones": (lambda: at_random(-999.0), "outliers", (0, 1, 2, 3), "-999"),
    "no moments": (lambda: normal() / normal() ** 2, "outliers", (0, 1, 2, 3), "asinh"),
    "not standardised": (lambda: normal() * torch.tensor([1.0, 1.0, 1e-3, 500.0]), "units", (2, 3), "deviation"),
}
ERRORS = ("no data", "nan", "infinity", "one point", "one point, often")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found_and_nothing_else(name, dtype):
    make, kind, columns, message = PLANTED[name]
    (found,) = check_data(make().to(dtype).split(100))
    assert (found.kind, found.columns, found.error) == (kind, columns, name in ERRORS)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.message)


def test_several_at_once_are_all_said():
    x = normal(500, 5)
    x[:, 1], x[:, 3], x[:, 4] = 7.0, x[:, 0].round(), 2 * x[:, 2]
    assert [(one.kind, one.columns) for one in check_data([x])] == [
        *(("constant", (1,)), ("discrete", (3,)), ("function", (4,)))
    ]


def table(name):
    x = torch.tensor(getattr(datasets, f"load_{name}")().data)
    return (x - x.mean(0)) / x.std(0)


def digits():
    data = f2.data.Digits()
    return torch.cat([batch for batch in data.train_dataloader()])


def ring():
    data = f2.data.GaussianMixture(count=20_000)
    return data.dataset("train").values


def narrow(dim):
    """Condition number 1e8."""
    return normal(3000, dim) * torch.logspace(-4, 0, dim) @ rotation(dim, 1).T.float()


FINE = {
    "breast cancer": lambda: table("breast_cancer"),
    "wine": lambda: table("wine"),
    "diabetes without": lambda: table("diabetes")[:, [0, 2, 3, 4, 5, 6, 8, 9]],
    "digits": digits,
    "moons": lambda: torch.tensor(datasets.make_moons(10_000, noise=0.05, random_state=0)[0]),
    "checkerboard": lambda: f2.data.Checkerboard(20_000).dataset("train").values,
    "mixture": ring,
    "correlated": lambda: with_column(lambda x: x[:, 0] + 0.045 * torch.randn(len(x))),
    "narrow": lambda: narrow(2),
    "narrow, rotated": lambda: narrow(8),
    "heavy tails": lambda: torch.distributions.StudentT(3.0).sample((5000, 3)),
    "log-normal": lambda: normal().exp(),
    "a few copies": lambda: torch.cat((x := normal(), x[:5])),
    "images": lambda: images(20),
    "few images": lambda: torch.rand(40, 3, 16, 16),
    "images that are half black": lambda: LEVELS.dequantize(torch.randint(0, 17, (400, 1, 8, 8)).sub(8).clamp(min=0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FINE)
def test_data_that_are_fine_get_no_word(name, dtype):
    x = FINE[name]().to(dtype)
    assert check_data(x.split(256)) == []
    if name in ("digits", "images"):
        assert check_data(x.split(256), LEVELS) == []


def test_real_data_that_are_not_fine():
    """Diabetes has a column of two values, and one of which 29 % are the same; tables as they are have other units."""
    (found,) = check_data([table("diabetes")])
    assert (found.kind, found.columns) == ("discrete", (1, 7))
    assert "1: 2 values; 7: 29 % are" in found.message
    kinds = [one.kind for one in check_data([torch.tensor(datasets.load_breast_cancer().data)])]
    assert kinds == ["units"]
    raw = torch.tensor(datasets.load_digits().images[:, None])
    assert [(one.kind, one.columns) for one in check_data([raw])] == [("constant", (0, 32, 39)), ("discrete", ())]


def test_a_part_of_large_data_is_enough(monkeypatch):
    monkeypatch.setattr(data_checks, "MOST_BYTES", 2**20)
    seen = []

    def batches():
        for _ in range(1000):
            seen.append(torch.rand(8, 3, 64, 64))
            yield seen[-1]

    # fewer than dimensions were read, which says nothing about how many there are
    assert check_data(batch.flatten(1) for batch in batches()) == []
    assert 8 * len(seen) <= FEW_ENOUGH
    monkeypatch.setattr(data_checks, "MOST_SECONDS", 0.0)
    seen.clear()
    assert check_data(batches()) == []
    assert len(seen) == 1


FEW_ENOUGH = 24  # states of 96 KiB in 1 MiB, or 16 at least, in batches of 8


# --- in a run ---


class Broken(Pair):
    """Pairs, of which something is wrong."""

    def __init__(self, make):
        super().__init__(count=400)
        self.make = make

    def splits(self):
        return super().splits() | {"train": (self.make(super().splits()["train"][0]), None)}


WRONG = {
    "copies": (lambda x: torch.cat((x, x[:21])), "exact copies"),
    "function": (lambda x: torch.stack((x[:, 0], 2 - x[:, 0]), 1), "Leave out column 1"),
    "constant": (lambda x: torch.stack((x[:, 0], x[:, 0] * 0), 1), "in column 1"),
    "discrete": (lambda x: x.round(), "look discrete"),
    "few": (lambda x: x[:3], "3 training states of 2 dimensions"),
}
RUNS = {
    "teacher": lambda folder, data, **kwargs: fit(folder, teacher(), data=data, **kwargs),
    "student": lambda folder, data, **kwargs: fit(folder, student(), data=data, **kwargs),
    "callback": lambda folder, data, **kwargs: fit(folder, MeanFlowModule(), callback(), data=data, **kwargs),
}


def said(run, *arguments, **kwargs):
    """What a run said of its data, in all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*arguments, **kwargs)
    spoken = [str(one.message) for one in caught]
    return [one for one in spoken if "training data" in one or "training states" in one or "look discrete" in one]


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("fault", WRONG)
def test_a_run_says_once_what_is_wrong(tmp_path, kind, fault):
    make, message = WRONG[fault]
    (only,) = said(RUNS[kind], tmp_path, Broken(make), max_steps=1)
    assert message in only


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_cannot_work_stops_before_its_first_step(tmp_path, kind):
    for make, message in (
        (torch.zeros_like, "all the same"),
        (lambda x: torch.where(x > 1, torch.inf, x), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            RUNS[kind](tmp_path, Broken(make), max_steps=1)


@pytest.mark.parametrize("kind", RUNS)
def test_data_that_are_fine_get_no_word_in_a_run(tmp_path, kind):
    assert said(RUNS[kind], tmp_path, Pair(400)) == []


def test_a_resumed_run_does_not_say_it_again(tmp_path):
    data = Broken(WRONG["constant"][0])
    run = trainer(tmp_path, max_epochs=1)
    assert len(said(run.fit, teacher(), datamodule=data)) == 1
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert said(fit, tmp_path, teacher(), data=data, max_epochs=2, ckpt_path=tmp_path / "last.ckpt") == []


def test_rows_that_a_sampler_repeats_are_no_copies(tmp_path):
    x = Pair(400).splits()["train"][0]
    drawn = DataLoader(TensorDataset(x), 100, sampler=RandomSampler(x, replacement=True))

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from x

    for loader in (drawn, DataLoader(Endless(), 100)):
        assert said(trainer(tmp_path, max_steps=1).fit, teacher(), loader) == []


def test_the_look_leaves_random_numbers_as_they_were(tmp_path, monkeypatch):
    def collate(rows):
        return torch.stack(rows) + 0 * torch.rand(1)

    loader = DataLoader(Pair(400).splits()["train"][0], 100, shuffle=True, collate_fn=collate)
    states = []

    class Watched(FirstLook):
        def at_training_data(self, *arguments):
            states.append(torch.get_rng_state())
            super().at_training_data(*arguments)
            states.append(torch.get_rng_state())

    monkeypatch.setattr("f2d2_lightning.modules.base.FirstLook", Watched)
    trainer(tmp_path, max_steps=1).fit(teacher(), loader)
    assert len(states) == 2
    assert torch.equal(*states)
