"""Data modules: what they hold, that noise and order are functions of seed, epoch and sample."""

from __future__ import annotations

import math

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.data.dataset import DequantizedDataset
from f2d2_lightning.utils.seeding import counter_uniform


def test_counter_uniform_is_uniform_and_uncorrelated():
    u = counter_uniform(torch.arange(200_000), seed=3).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    # 5 standard errors of mean, variance and lag-one correlation
    assert float(u.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / len(u)))
    assert float(u.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / len(u)))
    for other in (u.roll(1), counter_uniform(torch.arange(200_000), seed=4).double()):
        assert abs(float(torch.corrcoef(torch.stack((u, other)))[0, 1])) < 5 / math.sqrt(len(u))
    histogram = torch.histc(u, 50, 0, 1)
    assert float(((histogram - 4000) ** 2 / 4000).sum()) < 49 + 5 * math.sqrt(2 * 49)


@pytest.fixture(scope="module")
def digits():
    return f2.data.Digits()


def test_digits_are_the_scans(digits):
    from sklearn.datasets import load_digits

    parts = [digits.dataset(split) for split in ("train", "val", "test")]
    assert [len(p) for p in parts] == [1297, 200, 300]
    stored = torch.cat([p.values.flatten(1) for p in parts])
    scans = torch.from_numpy(load_digits().data).to(torch.uint8)
    # the split is a permutation: the same rows, each once
    assert sorted(map(bytes, stored.numpy())) == sorted(map(bytes, scans.numpy()))
    assert digits.levels == 17


def test_dequantized_digits_fall_back_to_their_levels(digits):
    data = digits.dataset("train")
    x = data.__getitems__(list(range(100)))
    assert x.dtype == torch.float32
    assert torch.equal(digits.quantization.quantize(x), data.values[:100].long())
    assert float(x.min()) >= -1
    assert float(x.max()) < 1


def test_noise_is_fresh_each_epoch_and_fixed_in_test(digits):
    data = digits.dataset("train")
    first, again, later = (data.__getitems__(rows) for rows in ([5, 6], [6, 5], [5 + len(data), 6 + len(data)]))
    assert torch.equal(first, again.flip(0))  # whatever the batch
    assert not torch.equal(first, later)
    assert torch.equal(data.quantization.quantize(first), data.quantization.quantize(later))
    runs = [torch.cat(list(f2.data.Digits(eval_batch_size=size).test_dataloader())) for size in (7, 300)]
    assert torch.equal(*runs)
    other = torch.cat(list(f2.data.Digits(seed=1).test_dataloader()))
    assert not torch.equal(runs[0], other)
    assert torch.equal(digits.quantization.quantize(runs[0]), digits.quantization.quantize(other))


def test_labels_belong_to_their_scans():
    x, labels = next(iter(f2.data.Digits(labels=True).test_dataloader()))
    means = torch.stack([x[labels == c].mean(0) for c in range(10)])
    nearest = (x[:, None] - means).flatten(2).square().sum(-1).argmin(-1)
    assert float((nearest == labels).float().mean()) > 0.8


def test_checkerboard_is_uniform_on_dark_squares():
    x = f2.data.Checkerboard(count=20_000).dataset("train").values
    assert bool(f2.data.Checkerboard.log_prob(x).isfinite().all())
    counts = torch.unique(x.floor(), dim=0, return_counts=True)[1]
    assert len(counts) == 8
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 7 + 5 * math.sqrt(14)
    # the density integrates to one
    grid = torch.cartesian_prod(*[torch.linspace(-3, 3, 241)[:-1] + 0.0125] * 2)
    assert float(f2.data.Checkerboard.log_prob(grid).exp().mean() * 36) == pytest.approx(1.0, abs=1e-6)


def test_mixture_density_integrates_to_one_and_fits_its_draws():
    data = f2.data.GaussianMixture(count=20_000)
    edge = torch.linspace(-6, 6, 401)[:-1] + 0.015
    grid = torch.cartesian_prod(edge, edge)
    density = data.log_prob(grid).exp()
    assert float(density.mean() * 144) == pytest.approx(1.0, abs=1e-4)
    entropy = -float((density * data.log_prob(grid)).mean() * 144)
    log_p = data.log_prob(data.dataset("train").values)
    assert -float(log_p.mean()) == pytest.approx(entropy, abs=5 * float(log_p.std()) / math.sqrt(20_000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: f2.data.Digits(levels=16).setup(), "values 0 to 16, but levels=16"),
        (lambda: f2.data.Digits(levels=256).setup(), "set levels=17"),
        (lambda: f2.data.Digits(batch_size=0), "at least 1"),
        (lambda: f2.data.Digits().dataset("training"), "has train, val, test"),
        (lambda: DequantizedDataset(torch.zeros(3, 2), quantization=f2.Quantization(4)), "integers 0 to 3"),
        (lambda: f2.data.FlowDataModule().setup(), "must define splits"),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make()


def test_a_loop_over_a_data_set_ends():
    data = f2.data.Digits().dataset("val")
    samples = list(data)
    assert len(samples) == 200
    assert torch.equal(torch.stack(samples), data.__getitems__(list(range(200))))


class Kept(f2.data.Digits):
    """Digits whose arguments are in the checkpoint."""

    def __init__(self, batch_size: int = 8, quantization: f2.Quantization | None = None) -> None:
        super().__init__(batch_size=batch_size)
        self.save_hyperparameters()


def test_a_data_module_in_a_checkpoint_runs_nothing(tmp_path):
    path, content = tmp_path / "data.ckpt", {"state_dict": {}}
    torch.save(content | {"datamodule_hyper_parameters": {"batch_size": 5}}, path)
    assert Kept.load_from_checkpoint(path).batch_size == 5
    assert Kept.load_from_checkpoint(path, batch_size=6).batch_size == 6
    for name in ("subprocess.Popen", "f2d2_lightning.cli.F2D2CLI"):
        value = {"class_path": name, "init_args": {"args": ["touch", str(tmp_path / "there")]}}
        torch.save(content | {"datamodule_hyper_parameters": {"quantization": value}}, path)
        with pytest.raises(ValueError, match=name.rpartition(".")[2]):
            Kept.load_from_checkpoint(path)
    assert not (tmp_path / "there").exists()
