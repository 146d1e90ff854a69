"""Fashion-MNIST from small files of its format, and what is said of files that are not."""

from __future__ import annotations

import gzip

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.data.images.fashion import read_idx
from made_data import idx, make_fashion


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("labels", [False, True])
def test_images_labels_and_splits(tmp_path, zipped, labels):
    made = make_fashion(tmp_path, 30, 12, zipped)
    data = f2.data.FashionMNIST(str(tmp_path), labels=labels, val=10, test=5)
    parts = {"train": ("train", slice(20)), "val": ("train", slice(20, 30)), "test": ("t10k", slice(5))}
    for split, (part, rows) in parts.items():
        images, classes = (values[rows] for values in made[part])
        batch = data.dataset(split).__getitems__(list(range(len(images))))
        states, numbers = batch if labels else (batch, classes)
        assert states.shape == (len(images), 1, 28, 28)
        assert torch.equal(data.quantization.quantize(states)[:, 0], images)
        assert torch.equal(numbers, classes)
    assert (data.shape, data.levels) == ((1, 28, 28), 256)
    assert len(f2.data.FashionMNIST(str(tmp_path), val=10, count=7).dataset("train")) == 7


def test_the_environment_says_where(tmp_path, monkeypatch):
    make_fashion(tmp_path, 30, 12)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    assert len(f2.data.FashionMNIST(val=10).dataset("train")) == 20


@pytest.mark.parametrize("numbers", [{"val": 30}, {"val": 0}, {"val": 5, "count": 26}, {"val": 5, "test": 13}])
def test_more_than_there_is(tmp_path, numbers):
    make_fashion(tmp_path, 30, 12)
    with pytest.raises(ValueError, match="do not fit 30 training and 12 test"):
        f2.data.FashionMNIST(str(tmp_path), **numbers).setup()


def test_other_files_of_the_format_are_refused(tmp_path):
    make_fashion(tmp_path, 30, 12)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(30, 32, 32))))
    with pytest.raises(ValueError, match="not the files of Fashion-MNIST"):
        f2.data.FashionMNIST(str(tmp_path), val=10).setup()


GOOD = idx(torch.arange(24).reshape(2, 3, 4))
BAD = {
    "cut short": (GOOD[:-5], "truncated or corrupt"),
    "too long": (GOOD + b"x", "truncated or corrupt"),
    "head cut short": (GOOD[:7], "ends within its head"),
    "another format": (b"\x89PNG\r\n", "does not begin as an IDX file"),
    "floats": (b"\0\0\x0d" + GOOD[3:], "type 0x0d"),
    "gzip cut short": (gzip.compress(GOOD)[:-9], "gzip"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_files(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)
