"""Flips and noise are functions of seed, epoch and sample: lazy or not, resumed or not, in any workers and ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.data.dataset import DequantizedDataset, StoredValues, as_values, take
from lightning_parts import trainer
from made_data import make_edm

COUNT, SIZE = 40, 8


class Pictures(f2.data.FlowDataModule):
    """Given values, 8-bit."""

    shape = (3, SIZE, SIZE)

    def __init__(self, values, **kwargs):
        settings = {"batch_size": 6, "eval_batch_size": 5, "quantization": f2.Quantization(256), "flip": True}
        super().__init__(**(settings | kwargs))
        self.given = values

    def splits(self):
        labels = torch.arange(COUNT)
        return {name: (self.given, labels) for name in ("train", "val", "test")}


@pytest.fixture
def values():
    return torch.randint(256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class Epoch:
    """Where a trainer is, for a data module that asks."""

    def __init__(self, epoch, rank=0, replicas=1):
        counts = {"started": epoch, "processed": epoch}
        batches = SimpleNamespace(state_dict=lambda: {"current": {"processed": 0, "ready": 0}, "is_last_batch": False})
        epochs = SimpleNamespace(state_dict=lambda: {"current": counts})
        self.fit_loop = SimpleNamespace(epoch_progress=epochs, epoch_loop=SimpleNamespace(batch_progress=batches))
        self.distributed_sampler_kwargs = {"num_replicas": replicas, "rank": rank}


def epoch(data, number, **kwargs):
    """States, labels of an epoch of training, and the loader."""
    data.trainer = Epoch(number, **kwargs)
    batches = list(data.train_dataloader())
    data.trainer = None
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def flipped(states, labels, values):
    """Which states hold the mirror image of the value of their label; each must hold one or the other."""
    found = f2.Quantization(256).quantize(states).to(torch.uint8)
    plain = (found == values[labels]).flatten(1).all(1)
    mirrored = (found == values[labels].flip(-1)).flatten(1).all(1)
    assert bool((plain ^ mirrored).all())
    return mirrored


def by_label(mirrored, labels):
    whole = torch.zeros(COUNT, dtype=torch.bool)
    whole[labels] = mirrored
    return whole


def test_flips_are_of_training_only_and_fresh_each_epoch(values):
    data = Pictures(values, batch_size=COUNT)
    sides = []
    for number in range(3):
        states, labels = epoch(data, number)
        assert sorted(labels.tolist()) == list(range(COUNT))
        sides.append(by_label(flipped(states, labels, values), labels))
        # whatever the batch size, of which the last incomplete batch is dropped
        again, same = epoch(Pictures(values, batch_size=7), number)
        assert len(again) == 35
        assert torch.equal(again, states[:35])
        assert torch.equal(same, labels[:35])
    assert not any(torch.equal(sides[i], sides[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for states, labels in loader:
            assert not bool(flipped(states, labels, values).any())
    # what is looked at, and not trained on, is as it is: f2d2 nll with several draws, statistics of the data
    plain = data.dataset("train").__getitems__(list(range(3 * COUNT)))
    assert not bool(flipped(*plain, values).any())
    loader_set = data.train_dataloader().dataset
    assert not bool(flipped(*loader_set.__getitems__(list(range(COUNT))), values).any())
    states, labels = epoch(Pictures(values, flip=False), 1)
    assert not bool(flipped(states, labels, values).any())
    other = epoch(Pictures(values, batch_size=COUNT, seed=1), 0)
    assert not torch.equal(by_label(flipped(*other, values), other[1]), sides[0])


def test_flips_are_fair_and_independent(values):
    data = DequantizedDataset(values, quantization=f2.Quantization(256), flip=True, seed=5)
    epochs = 250
    index = torch.arange(COUNT, (epochs + 1) * COUNT)
    states = data.__getitems__(index.tolist())
    coin = flipped(states, index % COUNT, values).double().reshape(epochs, COUNT)
    n = coin.numel()
    assert float(coin.mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(n))
    for shifted in (coin.roll(1, 0), coin.roll(1, 1)):
        together = float(((coin - 0.5) * (shifted - 0.5)).mean())
        assert abs(together) < 5 * 0.25 / math.sqrt(n)
    # and of the noise: the coin does not say whether a state is high or low in its bin
    position = (states.double() + 1) * 128 % 1
    difference = (position.flatten(1).mean(1) * (2 * coin.flatten() - 1)).mean()
    assert abs(float(difference)) < 5 * 0.5 / math.sqrt(n)
    # nor is it one of the numbers that the noise of another sample is made of
    noise = (data.__getitems__(list(range(COUNT))).double() + 1) * 128 % 1
    low = (noise.flatten()[COUNT : COUNT + n] < 0.5).double()
    same = float((low == coin.flatten()[: len(low)]).double().mean())
    assert same == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(len(low)))


def lazy_kinds(values, folder):
    np.save(folder / "values.npy", values.numpy())
    array = np.load(folder / "values.npy", mmap_mode="r")

    class Reader:
        def __len__(self):
            return COUNT

        def __getitems__(self, rows):
            return values[rows]

    class Single:
        def __len__(self):
            return COUNT

        def __getitem__(self, row):
            return values[row]

    shuffled = torch.randperm(COUNT)
    return {
        "stored": StoredValues(folder / "values.npy"),
        "memmap": array,
        "reader": Reader(),
        "single": Single(),
        "selected": StoredValues(folder / "values.npy").select(shuffled).select(shuffled.argsort()),
    }


@pytest.mark.parametrize("kind", ["stored", "memmap", "reader", "single", "selected"])
def test_lazy_values_give_what_values_in_memory_give(values, tmp_path, kind):
    lazy = lazy_kinds(values, tmp_path)[kind]
    expected, found = Pictures(values), Pictures(lazy)
    for number in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(epoch(expected, number), epoch(found, number), strict=True))
    for name in ("val_dataloader", "test_dataloader"):
        for a, b in zip(getattr(expected, name)(), getattr(found, name)(), strict=True):
            assert torch.equal(a[0], b[0])
    assert found.dataset("train").dim == 3 * SIZE * SIZE


def test_lazy_values_are_indexed_as_tensors_are(values, tmp_path):
    lazy = lazy_kinds(values, tmp_path)["stored"]
    rows = torch.tensor([3, 3, -1, 0])
    for key in (5, -2, slice(2, 30, 7), slice(-3, None), rows, slice(0, 0)):
        assert torch.equal(lazy[key], values[key])
        if not isinstance(key, int):
            chosen = take(lazy, key)
            assert chosen.shape == values[key].shape
            if len(chosen):
                assert torch.equal(chosen[:], values[key])
    assert torch.equal(lazy[[1, 2]], values[[1, 2]])
    assert take(values, slice(2)).data_ptr() == values.data_ptr()
    assert as_values(values) is values
    for key in (COUNT, -COUNT - 1, [0, COUNT]):
        with pytest.raises(IndexError, match=f"size {COUNT}"):
            lazy[key]


class Counting:
    """How much is read."""

    def __init__(self, values):
        self.values, self.read = values, 0

    def __len__(self):
        return 100_000

    def __getitems__(self, rows):
        self.read += len(rows)
        return self.values[torch.tensor(rows) % COUNT]


def test_large_data_are_not_read_to_be_checked(values):
    reader = Counting(values)

    class Large(Pictures):
        def splits(self):
            return {"train": (reader, None), "val": (values, None), "test": (values, None)}

    data = Large(None)
    data.setup()
    assert 2 <= reader.read <= 100
    values, reader = values % 10, Counting(values % 10)
    with pytest.raises(ValueError, match="values up to 9"):
        Large(None).setup()
    values = values * 20
    # what was not read then is refused when it is
    small = DequantizedDataset(Counting(values), quantization=f2.Quantization(100))
    with pytest.raises(ValueError, match="but levels=100"):
        small.__getitems__([0, 1, 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_values(3), "values are a int"),
        (lambda: as_values(np.zeros((0, 2))), "there are no values"),
        (lambda: DequantizedDataset(torch.zeros(5, 2), torch.zeros(4)), "5 values and 4 labels"),
        (lambda: as_values([torch.zeros(2), torch.zeros(3)])[:], "equal size"),
        (lambda: DequantizedDataset(torch.zeros(5, 2), flip=True), r"flip=True mirrors images .* shape \(5, 2\)"),
    ],
)
def test_what_is_no_data(make, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def test_readers_of_changing_shape_are_refused():
    class Bad(list):
        def __getitems__(self, rows):
            return torch.zeros(len(rows), 2 if 0 in rows else 3)

    with pytest.raises(ValueError, match=r"Bad gave values of shape \(2, 3\) for 2 rows"):
        as_values(Bad([1, 2, 3]))[1:]


@pytest.fixture
def edm(tmp_path):
    make_edm(tmp_path / "a.zip", COUNT, SIZE)

    def make(**kwargs):
        settings = {"labels": True, "val": 6, "test": 5, "batch_size": 5, "eval_batch_size": 4, "flip": True}
        return f2.data.EDMZip(str(tmp_path / "a.zip"), SIZE, **(settings | kwargs))

    return make


def test_two_workers_give_the_batches_of_none(edm, tmp_path):
    alone = edm()
    for helped in (edm(num_workers=2), edm(num_workers=2, cache=str(tmp_path))):
        for a, b in zip(epoch(alone, 1), epoch(helped, 1), strict=True):
            assert torch.equal(a, b)
        for (a, _), (b, _) in zip(alone.test_dataloader(), helped.test_dataloader(), strict=True):
            assert torch.equal(a, b)


def test_data_sets_are_small_when_pickled_for_workers(edm, tmp_path):
    """Where workers are spawned they get a copy: no pixels, and no open file."""
    import pickle

    for data in (edm(), edm(cache=str(tmp_path))):
        dataset = data.dataset("train")
        before = dataset.__getitems__([1, 2])
        copy = pickle.loads(pickle.dumps(dataset))
        assert len(pickle.dumps(dataset)) < 20_000
        assert torch.equal(copy.__getitems__([1, 2])[0], before[0])


def test_two_ranks_divide_an_epoch(edm):
    data = edm()
    whole = epoch(data, 2)
    parts = [epoch(data, 2, rank=rank, replicas=2) for rank in (0, 1)]
    assert len(data.dataset("train")) == 29
    # batches of five: two of each rank's fourteen images, five of the twenty-nine of one
    assert [len(states) for states, _ in (whole, *parts)] == [25, 10, 10]
    sampled = edm(batch_size=1)
    singles = [epoch(sampled, 2, rank=rank, replicas=2)[0] for rank in (0, 1)]
    everything = {bytes(state.numpy()) for state in epoch(sampled, 2)[0]}
    seen = [bytes(state.numpy()) for states in singles for state in states]
    # every rank as many, none twice, and each with the noise and the side it has on one process
    assert [len(s) for s in singles] == [14, 14]
    assert len({*seen}) == 28
    assert {*seen} < everything


class Recorder(L.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, index):
        self.optimizers().step()
        self.seen.append(batch[0].clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_epoch_goes_on_with_the_same_batches(edm, tmp_path, workers):
    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def run(ckpt=None):
        module, made = Recorder(), trainer(tmp_path, max_epochs=3, callbacks=[Keep()], limit_val_batches=0)
        made.fit(module, edm(num_workers=workers), ckpt_path=ckpt, weights_only=False if ckpt else None)
        return module.seen

    whole = run()
    rest = run(ckpt=tmp_path / "half.ckpt")
    assert (len(whole), len(rest)) == (15, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole[7:], rest, strict=True))
    # with flips, of which there are some in each part
    values = edm(flip=False, labels=False)
    plain = {bytes(values.quantization.quantize(x).numpy()) for x in values.dataset("train")}
    for part in (whole[:7], rest):
        states = torch.cat(part)
        mirrored = [bytes(values.quantization.quantize(x).numpy()) not in plain for x in states]
        assert 0 < sum(mirrored) < len(states)
