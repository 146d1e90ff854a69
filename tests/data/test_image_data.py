"""Data modules of images: what the files hold arrives exactly, in its split, cropped and resized before noise."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import f2d2_lightning as f2
from f2d2_lightning.data.dataset import LazyValues
from f2d2_lightning.data.images import celeba, cifar
from f2d2_lightning.data.images._reader import Framing
from f2d2_lightning.utils.pickles import read_arrays
from made_data import (
    ATTRIBUTES,
    COUNTS,
    edm_files,
    make_celeba,
    make_cifar,
    make_edm,
    make_imagenet_batches,
    make_imagenet_pictures,
    picture,
    python2_pickle,
    write_files,
)

CIFAR_LAYOUTS = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-10-batches-bin", "cifar-10-binary.tar.gz")
GOLDEN = bytes.fromhex(
    "80027d7101285504646174617102636e756d70792e636f72652e6d756c746961727261790a5f7265636f6e7374727563740a7103636e756d70790a"
    "6e6461727261790a71044b008555016287527105284b014b034b0586636e756d70790a64747970650a7106550275314b004b0187527107284b0355"
    "017c4e4e4e4affffffff4affffffff4b00746289550f000102030405060708090a0b0c0d0e746255066c6162656c7371085d7109284b064b094b03"
    "65550b62617463685f6c6162656c710a5515747261696e696e672062617463682031206f662035710b550966696c656e616d6573710c5d710d2855"
    "07615f302e706e67710e5507615f312e706e67710f5507615f322e706e67711065752e"
)
"""``cPickle.dumps`` of Python 2.7.18 with numpy 1.16.6, protocol 2."""
GOLDEN_VALUES = {
    "data": np.arange(15, dtype=np.uint8).reshape(3, 5),
    "labels": [6, 9, 3],
    "batch_label": "training batch 1 of 5",
    "filenames": ["a_0.png", "a_1.png", "a_2.png"],
}


def held(data, split):
    """8-bit values and labels of a split, by way of its states."""
    dataset = data.dataset(split)
    batch = dataset.__getitems__(list(range(len(dataset))))
    states, labels = batch if isinstance(batch, tuple) else (batch, None)
    assert states.shape == (len(dataset), *data.shape)
    assert -1 <= float(states.min()) <= float(states.max()) < 1
    return data.quantization.quantize(states).to(torch.uint8), labels


@pytest.mark.parametrize("content", [GOLDEN, python2_pickle(GOLDEN_VALUES)], ids=["Python 2", "made"])
def test_a_pickle_of_python_2_is_read(content):
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert "SHORT_BINSTRING" in opcodes
    assert "BINUNICODE" not in opcodes
    read = read_arrays(content, "file", "somewhere")
    assert np.array_equal(read["data"], GOLDEN_VALUES["data"])
    assert read["data"].dtype == np.uint8
    assert read["labels"] == [6, 9, 3]
    assert read["batch_label"] == b"training batch 1 of 5"


@pytest.mark.parametrize("layout", CIFAR_LAYOUTS)
def test_cifar_of_every_layout(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(cifar, "ROWS", 12)
    images, labels = make_cifar(tmp_path, layout)
    train, classes = images[:5].flatten(0, 1), labels[:5].flatten()
    for folder in (tmp_path, tmp_path / layout):
        data = f2.data.CIFAR10(str(folder), labels=True, val=7)
        expected = {
            "train": (train[:53], classes[:53]),
            "val": (train[53:], classes[53:]),
            "test": (images[5], labels[5]),
        }
        for split, (values, numbers) in expected.items():
            found = held(data, split)
            assert torch.equal(found[0], values)
            assert torch.equal(found[1], numbers)
    few = f2.data.CIFAR10(str(tmp_path), val=7, count=20, test=5)
    assert torch.equal(held(few, "train")[0], train[:20])
    assert torch.equal(held(few, "val")[0], train[53:])
    assert torch.equal(held(few, "test")[0], images[5][:5])
    assert held(few, "test")[1] is None
    assert (few.shape, few.levels) == ((3, 32, 32), 256)


def test_cifar_has_fifty_and_ten_thousand_images(tmp_path):
    """With batches of their true size: zeros, which the file system need not hold, and a mark at the end of each."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"), 1):
        with (folder / f"{name}.bin").open("wb") as file:
            file.seek(10_000 * 3073 - 1)
            file.write(bytes([200 + number]))
    data = f2.data.CIFAR10(str(tmp_path), val=5000)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [45_000, 5_000, 10_000]
    ends = [int(data.dataset("train").values[row, -1, -1, -1]) for row in (9_999, 19_999, 29_999, 39_999)]
    assert ends == [201, 202, 203, 204]
    assert int(data.dataset("val").values[-1, -1, -1, -1]) == 205
    assert int(data.dataset("test").values[-1, -1, -1, -1]) == 206


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_celeba_is_cropped_and_resized_before_noise(tmp_path, monkeypatch, zipped):
    counts = (9, 4, 3)
    monkeypatch.setattr(celeba, "COUNTS", dict(zip(celeba.COUNTS, counts, strict=True)))
    contents, splits, attributes = make_celeba(tmp_path, counts, zipped)
    for arguments, box, kind in (
        ({}, (19, 39, 159, 179), "BICUBIC"),
        ({"crop": 148, "resize": "bilinear"}, (15, 35, 163, 183), "BILINEAR"),
    ):
        pixels = []
        for content in contents:
            with Image.open(io.BytesIO(content)) as image:
                small = image.crop(box).resize((64, 64), Image.Resampling[kind])
            pixels.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        expected = torch.stack(pixels)
        data = f2.data.CelebA64(str(tmp_path), attribute="Smiling", **arguments)
        for number, split in enumerate(("train", "val", "test")):
            values, labels = held(data, split)
            assert torch.equal(values, expected[splits == number])
            assert torch.equal(labels, (attributes[splits == number, ATTRIBUTES.index("Smiling")] == 1).long())
    few = f2.data.CelebA64(str(tmp_path), count=5, val=2, test=1)
    assert [len(few.dataset(split)) for split in ("train", "val", "test")] == [5, 2, 1]
    assert held(few, "val")[1] is None


def test_resizing_averages():
    """Antialiasing: stripes of one pixel become grey, where picking every n-th pixel would keep one of them."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    for kind in ("box", "bilinear", "bicubic", "lanczos"):
        small = np.array(Framing(8, resize=kind)(Image.fromarray(stripes)))
        assert np.abs(small[:, 1:-1].astype(float) - 100).max() <= 2
    # and a crop about the centre is about the centre
    marked = np.zeros((10, 7), np.uint8)
    marked[3:7, 1:5] = np.arange(16).reshape(4, 4)
    assert np.array_equal(np.array(Framing(4, crop=4)(Image.fromarray(marked))), np.arange(16).reshape(4, 4))
    assert Framing(7, crop="square")(Image.fromarray(marked)).size == (7, 7)


def rows_of(values, among):
    """Places of images among others, all of which differ."""
    places = {bytes(image.numpy()): place for place, image in enumerate(among)}
    return [places[bytes(image.numpy())] for image in values]


@pytest.mark.parametrize("kind", ["npz", "python2", "protocol2", "protocol3", "protocol4"])
def test_imagenet_batches(tmp_path, small_imagenet, kind):
    images, labels = make_imagenet_batches(tmp_path, COUNTS, 6, kind)
    data = f2.data.ImageNet64(str(tmp_path), labels=True, val=5)
    parts = {split: held(data, split) for split in ("train", "val", "test")}
    rows = {split: rows_of(values, images) for split, (values, _) in parts.items()}
    # training images each once, in two sets that are drawn, and the official validation images in their order
    assert sorted(rows["train"] + rows["val"]) == list(range(23))
    assert len(rows["val"]) == 5
    assert rows["val"] != list(range(18, 23))
    assert rows["test"] == list(range(23, 29))
    for split, (_, numbers) in parts.items():
        assert torch.equal(numbers, labels[rows[split]])
    assert {int(labels.min()), int(labels.max())} == {0, 999}
    # nothing is in memory, and the conversion is done once
    assert isinstance(data.dataset("train").values, LazyValues)
    (array,) = (p for p in (tmp_path / "cache").iterdir() if p.name.startswith("train") and "labels" not in p.name)
    before = array.stat().st_mtime_ns
    again = f2.data.ImageNet64(str(tmp_path), val=5, seed=3)
    assert torch.equal(held(again, "train")[0], parts["train"][0])
    assert array.stat().st_mtime_ns == before
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".npy"] * 4
    assert np.load(array).shape == (23, 3, 64, 64)


def test_changed_batches_are_converted_again(tmp_path, small_imagenet):
    make_imagenet_batches(tmp_path, COUNTS, 6, "npz")
    first = held(f2.data.ImageNet64(str(tmp_path), val=5), "test")[0]
    path = tmp_path / "val_data.npz"
    size = path.stat().st_size
    with np.load(path) as arrays:
        np.savez(path, data=255 - arrays["data"], labels=arrays["labels"], mean=arrays["mean"])
    assert path.stat().st_size == size
    assert torch.equal(held(f2.data.ImageNet64(str(tmp_path), val=5), "test")[0], 255 - first)


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("cache", [None, "arrays"])
def test_imagenet_pictures(tmp_path, small_imagenet, zipped, cache):
    images = make_imagenet_pictures(tmp_path, 23, 6, zipped)
    data = f2.data.ImageNet64(str(tmp_path), "pictures", val=5, cache=cache and str(tmp_path / cache))
    rows = {split: rows_of(held(data, split)[0], images) for split in ("train", "val", "test")}
    assert sorted(rows["train"] + rows["val"]) == list(range(23))
    assert rows["test"] == list(range(23, 29))
    assert (tmp_path / "arrays").exists() is (cache is not None)
    with pytest.raises(ValueError, match="pictures of 2016 have no labels"):
        f2.data.ImageNet64(str(tmp_path), "pictures", labels=True)


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(("channels", "resolution"), [(3, 8), (1, 4)])
def test_edm(tmp_path, zipped, channels, resolution):
    images, classes = make_edm(tmp_path / "a.zip", 40, resolution, channels, zipped=zipped)
    data = f2.data.EDMZip(str(tmp_path / "a.zip"), resolution, channels, labels=True, val=6, test=5)
    rows = {}
    for split in ("train", "val", "test"):
        values, labels = held(data, split)
        rows[split] = rows_of(values, images)
        assert torch.equal(labels, classes[rows[split]])
    assert sorted(rows["train"] + rows["val"] + rows["test"]) == list(range(40))
    assert [len(r) for r in rows.values()] == [29, 6, 5]
    assert rows["val"] == sorted(rows["val"])
    # another file to test, then all others train or validate
    other = f2.data.EDMZip(
        str(tmp_path / "a.zip"), resolution, channels, test_path=str(tmp_path / "a.zip"), val=6, cache=str(tmp_path)
    )
    assert torch.equal(held(other, "test")[0], images)
    assert len(other.dataset("train")) == 34
    assert data.shape == (channels, resolution, resolution)


def test_edm_without_labels_and_deflated(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    write_files(tmp_path / "a.zip", edm_files(images, None), True, zipfile.ZIP_DEFLATED)
    data = f2.data.EDMZip(str(tmp_path / "a.zip"), 8, val=2)
    assert held(data, "train")[1] is None
    with pytest.raises(ValueError, match="there are no labels; set labels=False"):
        f2.data.EDMZip(str(tmp_path / "a.zip"), 8, labels=True, val=2).setup()


def test_edm_labels_go_by_name(tmp_path):
    """The list need not be in the order of the files, and may have Windows' slashes."""
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    files = edm_files(images, np.arange(9))
    listed = json.loads(files["dataset.json"])["labels"][::-1]
    listed[3][0] = listed[3][0].replace("/", "\\")
    files["dataset.json"] = json.dumps({"labels": listed}).encode()
    write_files(tmp_path / "a.zip", files, True)
    data = f2.data.EDMZip(str(tmp_path / "a.zip"), 8, labels=True, val=2)
    for split in ("train", "val", "test"):
        values, labels = held(data, split)
        assert rows_of(values.permute(0, 2, 3, 1).contiguous(), torch.from_numpy(images)) == labels.tolist()


def test_image_folder(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), np.uint8)
    files = {f"{('dog', 'cat', 'emu')[n % 3]}/{n:02d}.png": picture(a) for n, a in enumerate(arrays)}
    write_files(tmp_path / "all", files, False)
    arguments = {"size": 4, "crop": "square", "resize": "box", "val": 3, "test": 2}
    data = f2.data.ImageFolder(str(tmp_path / "all"), labels=True, **arguments)
    expected = torch.stack(
        [torch.from_numpy(np.array(Framing(4, "square", "box")(Image.fromarray(a)))) for a in arrays]
    )
    by_hand = Image.fromarray(arrays[0][1:8]).resize((4, 4), Image.Resampling.BOX)
    assert np.array_equal(expected[0].numpy(), np.array(by_hand))
    rows = {}
    for split in ("train", "val", "test"):
        values, labels = held(data, split)
        rows[split] = rows_of(values.permute(0, 2, 3, 1).contiguous(), expected)
        assert labels.tolist() == [(1, 0, 2)[row % 3] for row in rows[split]]  # cat, dog, emu
    assert sorted(rows["train"] + rows["val"] + rows["test"]) == list(range(12))
    assert [len(r) for r in rows.values()] == [7, 3, 2]
    # the same from a zip file, and with an array
    write_files(tmp_path / "all.zip", files, True)
    for path, cache in (("all.zip", None), ("all", str(tmp_path / "arrays"))):
        other = f2.data.ImageFolder(str(tmp_path / path), cache=cache, **arguments)
        assert torch.equal(held(other, "train")[0], held(data, "train")[0])


def test_image_folder_with_folders_for_the_splits(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (12, 4, 4), np.uint8)
    for split, part in {"train": range(6), "val": range(6, 10), "test": range(10, 12)}.items():
        write_files(tmp_path / split, {f"{'ba'[n % 2]}/{n:02d}.png": picture(arrays[n]) for n in part}, False)
    data = f2.data.ImageFolder(
        str(tmp_path / "train"),
        4,
        1,
        labels=True,
        val_folder=str(tmp_path / "val"),
        test_folder=str(tmp_path / "test"),
        val=3,
    )
    among = torch.from_numpy(arrays)[:, None]
    rows = {split: rows_of(held(data, split)[0], among) for split in ("train", "val", "test")}
    assert sorted(rows["train"]) == [0, 1, 2, 3, 4, 5]
    assert len(rows["val"]) == 3
    assert {*rows["val"]} < {6, 7, 8, 9}
    assert sorted(rows["test"]) == [10, 11]
    assert held(data, "test")[1].tolist() == [1 - row % 2 for row in rows["test"]]


def test_grey_becomes_colour_on_request(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8)
    write_files(tmp_path / "a", {f"{n}.png": picture(a) for n, a in enumerate(arrays)}, False)
    values, _ = held(f2.data.ImageFolder(str(tmp_path / "a"), 4, convert=True, val=1, test=1), "train")
    (row,) = rows_of(values[:, 0].contiguous(), torch.from_numpy(arrays))
    assert torch.equal(values[0], torch.from_numpy(arrays[row]).expand(3, -1, -1))
    with pytest.raises(ValueError, match="mode L, but the model is for mode RGB"):
        f2.data.ImageFolder(str(tmp_path / "a"), 4, val=1, test=1).setup()
