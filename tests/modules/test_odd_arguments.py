"""Whatever is given to the names at the door: a right answer, or an error of the package's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import f2d2_lightning as f2
import odd_calls
from f2d2_lightning.likelihood import Determinant
from f2d2_lightning.utils.checks import ArgumentError, check_arguments
from f2d2_lightning.utils.seeding import mix_seed
from foreign import MeanFlowModule, callback
from lightning_parts import teacher, trainer

PLAIN = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(), st.text(max_size=5), st.binary(max_size=3)),
    st.complex_numbers(),
    st.sampled_from([torch.zeros(2, 2), torch.zeros(3), np.zeros((2, 2)), torch.tensor(2), torch.zeros(2, 2).long()]),
)
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.dictionaries(st.text(max_size=3), PLAIN, max_size=2))


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return odd_calls.targets(tmp_path_factory.mktemp("odd"))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(choice=st.integers(0, 10**6), place=st.integers(0, 100), value=VALUES)
def test_an_odd_argument_has_an_answer_or_an_error_that_says(targets, choice, place, value):
    """The last call in the stack of an error is of this package, and it names what it is about."""
    target = targets[choice % len(targets)]
    name = target.places[place % len(target.places)]
    if isinstance(value, int) and value > 1000:
        value = value % 1000
    outcome, message = odd_calls.classify(target, name, value)
    assert outcome in ("right", "clear"), f"{target.name}({name}={value!r}): {outcome} {message}"


def test_kinds_of_arguments():
    """The checker, told apart by hand."""

    def ask(number: int = 1, share: float = math.nan, text: str | None = None, many: tuple[int, ...] = ()) -> None:
        """Nothing."""

    for good in (
        {"number": np.int64(3), "share": 1, "text": None, "many": [1, 2]},
        {"share": math.nan, "many": np.array([1])},
    ):
        check_arguments(ask, good)
    for name, value in (
        *(("number", True), ("number", 1.0), ("number", "1"), ("share", "1"), ("share", math.inf), ("share", 1j)),
        *(("text", 1), ("many", 1), ("many", [1.5]), ("many", "12"), ("many", [None]), ("many", {1, 2})),
    ):
        with pytest.raises(ArgumentError, match=f"ask: {name}=") as error:
            check_arguments(ask, {name: value})
        assert repr(value) in str(error.value)
        assert isinstance(error.value, ValueError)
        assert isinstance(error.value, TypeError)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_a_seed_is_a_number_whoever_it_is_of(tmp_path, kind):
    assert mix_seed("rows", kind(3)) == mix_seed("rows", 3)
    np.save(tmp_path / "rows.npy", torch.randn(40, 2).numpy())
    digits, images = f2.load("digits"), f2.data.Digits().dataset("test").values[:2]
    answers = []
    for seed in (3, kind(3)):
        probed = digits.log_prob(images / 8.5 - 1, 1, determinant=Determinant(1, 4, seed=seed)).value
        table = f2.data.Table(tmp_path / "rows.npy", seed=int(seed) if kind is torch.tensor else seed)
        table.setup()
        rows = table.dataset("test").values
        answers.append((digits.nll(images, 1, seed=seed), digits.sample(2, 1, seed=seed).state, probed, rows))
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("added", [False, True])
def test_a_fit_without_batches_is_an_error(tmp_path, added):
    empty = torch.utils.data.DataLoader(torch.zeros(3, 2), batch_size=8, drop_last=True)
    run = trainer(tmp_path, callbacks=[callback()] if added else [])
    with pytest.raises(ValueError, match="no training data"):
        run.fit(MeanFlowModule() if added else teacher(), empty)
    none = trainer(tmp_path, limit_train_batches=0)
    none.fit(teacher(), empty)
    assert none.global_step == 0
