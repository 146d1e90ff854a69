"""Whatever is given to the names at the door: a right answer, or an error of the package's own."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import f2d2_lightning as f2
import odd_calls
from f2d2_lightning.likelihood import Determinant
from f2d2_lightning.nn import PreconditionedMLP
from f2d2_lightning.utils.checks import ArgumentError, check_arguments
from f2d2_lightning.utils.seeding import mix_seed
from foreign import MeanFlowModule, callback
from lightning_parts import Pair, teacher, trainer

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
    assert torch.equal(digits.sample(kind(2), 1, seed=3).state, answers[0][1])


def test_a_compiled_model_is_told_how_to_be_compiled():
    digits = f2.load("digits")
    with pytest.raises(ArgumentError, match=r"in place, by model\.compile"):
        f2.log_prob(torch.compile(digits.joint_map, backend="eager"), torch.zeros(1, 1, 8, 8))


class Levels(Pair):
    """Levels of a range that NumPy's numbers say."""

    def __init__(self):
        super().__init__(quantization=f2.Quantization(np.int64(17), np.float64(-2), np.float64(3)))

    def splits(self):
        return {name: (torch.randint(17, (64, 2)), None) for name in ("train", "val", "test")}


def numpy_teacher(i, f):
    network = PreconditionedMLP((i(2),), width=i(8), blocks=i(1))
    reference = f2.Reference(steps=i(4), probes=i(0))
    return f2.FlowMatchingModule(network, np.array([2]), low=f(-1), near_data=f(0.1), reference=reference)


def numpy_student(i, f):
    parts = {"objective": f2.TrajectoryRegression(nodes=i(4)), "estimator": f2.Hutchinson(probes=i(1))}
    parts |= {"inversion": f2.Inversion(max_iterations=i(7)), "reference": f2.Reference(steps=i(4), probes=i(0))}
    settings = {"levels": i(17), "low": f(-2), "high": f(3), "warmup": i(1), "draws": i(1), "reference_samples": i(8)}
    return f2.F2D2Module(numpy_teacher(i, f).flow_map, steps=np.array([1, 2]), **settings, **parts)


@pytest.mark.parametrize("make", [numpy_teacher, numpy_student])
def test_numbers_of_numpy_come_back_from_a_file(tmp_path, make):
    module = make(np.int64, np.float64)
    data = (
        Levels() if module.levels else f2.data.GaussianMixture(np.int64(3), count=np.int64(96), batch_size=np.int64(32))
    )
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    read, x = f2.load(tmp_path / "last.ckpt"), torch.randn(3, 2)
    assert torch.equal(read.log_prob(x).value, module.log_prob(x).value)
    assert (read.levels, read.low, read.high, read.steps) == (module.levels, module.low, module.high, module.steps)
    on = trainer(tmp_path, max_epochs=2)
    on.fit(make(int, float), data, ckpt_path=tmp_path / "last.ckpt")
    assert on.global_step > run.global_step
    folder = f2.save_pretrained(module.average, tmp_path / "model", shape=np.array([2]))
    again = f2.from_pretrained(folder, type(module.average))
    assert all(map(torch.equal, again.state_dict().values(), module.average.state_dict().values()))


@pytest.mark.parametrize("added", [False, True])
def test_a_fit_without_batches_is_an_error(tmp_path, added):
    empty = torch.utils.data.DataLoader(torch.zeros(3, 2), batch_size=8, drop_last=True)
    run = trainer(tmp_path, callbacks=[callback()] if added else [])
    with pytest.raises(ValueError, match="no training data"):
        run.fit(MeanFlowModule() if added else teacher(), empty)
    refused = pytest.raises(ValueError, match=r"no batch .* in the place of a generator")
    said = pytest.warns(UserWarning, match=r"a generator.* not trained on")
    with refused if added else contextlib.nullcontext(), said:
        run.fit(MeanFlowModule() if added else teacher(), (batch for batch in torch.randn(4, 8, 2)))
    none = trainer(tmp_path, limit_train_batches=0)
    none.fit(teacher(), empty)
    assert none.global_step == 0
