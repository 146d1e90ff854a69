"""Files that are not what they should be: refused with their name, what came and what to do; nothing runs or stays."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.data.images import _cache as cache
from f2d2_lightning.data.images import celeba, cifar
from f2d2_lightning.data.images._reader import Framing, ImageReader
from f2d2_lightning.data.images._stores import open_store
from f2d2_lightning.utils.pickles import read_arrays
from made_data import (
    COUNTS,
    cifar_files,
    edm_files,
    imagenet_batch,
    listing,
    make_celeba,
    make_edm,
    make_imagenet_batches,
    make_imagenet_pictures,
    picture,
    python2_pickle,
    tar_gz,
    write_cifar,
    write_files,
)
from made_data import cifar as made_cifar


def read_all(data):
    for split in ("train", "val", "test"):
        list(data.dataset(split))


def refused(data, message, *names):
    """A data module refuses its files, on being set up or on being read, naming them."""
    with pytest.raises(ValueError, match=message) as error:
        read_all(data)
    for name in names:
        assert str(name) in str(error.value)


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


GOOD_PICKLE = python2_pickle({"data": np.zeros((2, 3), np.uint8), "labels": [1, 2]})
PICKLES = {
    "empty": b"",
    "without an end": GOOD_PICKLE[:-1],
    "something after the end": GOOD_PICKLE + b"x",
    "a list": pickle.dumps([1, 2], 2),
    "an array of objects": GOOD_PICKLE.replace(b"U\x02u1", b"U\x02O8"),
    "fewer bytes than the shape": GOOD_PICKLE.replace(b"K\2K\3\x86", b"K\2K\4\x86"),
    "an array without a state": b"\x80\2}(U\1acnumpy.core.multiarray\n_reconstruct\n)Ru.",
    "a module behind an array's name": b"cnumpy.core.multiarray\nos\n.",
}


@pytest.mark.parametrize("case", list(PICKLES))
def test_damaged_pickles(case):
    with pytest.raises(ValueError, match=r"(file is no pickle of a dictionary|file asks for ).*get it again from here"):
        read_arrays(PICKLES[case], "file", "here")


ROWS = 6


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(cifar, "ROWS", ROWS)


def batch(**changes):
    images, labels = made_cifar(ROWS)
    values = {"batch_label": "x", "labels": labels[0].tolist(), "data": images[0].reshape(ROWS, -1), "filenames": []}
    return python2_pickle({k: v for k, v in (values | changes).items() if v is not None})


BAD_BATCHES = {
    "too few rows": (lambda: batch(data=np.ones((5, 3072), np.uint8)), r"has 5 images and int64 \(6,\) as labels"),
    "one channel": (lambda: batch(data=np.ones((6, 1024), np.uint8)), r"uint8 \(6, 1024\) as data; uint8 \(N, 3072\)"),
    "too few labels": (lambda: batch(labels=[1, 2]), r"has 6 images and int64 \(2,\) as labels"),
    "label 10": (lambda: batch(labels=[0, 1, 2, 3, 4, 10]), "labels 0 to 10; 0 to 9 are expected"),
    "label -1": (lambda: batch(labels=[0, 1, 2, 3, 4, -1]), "labels -1 to 4"),
    "labels as text": (lambda: batch(labels=["a"] * 6), "as many whole numbers are expected"),
    "no images": (lambda: batch(data=None), "no array as data"),
    "cut short": (lambda: batch()[:-1000], "is truncated or corrupt"),
    "a program": (lambda: pickle.dumps(Runs("made"), 2), r"mkdir.*nothing of it was run"),
    "binary, cut short": (lambda: binary()[:-5], r"has 18433 bytes, no multiple of 3073"),
    "binary, a row too few": (lambda: binary()[:-3073], "has 5 images; 6 are expected"),
    "binary, label 10": (lambda: bytes([10]) + binary()[1:], "to 10; 0 to 9 are expected"),
}


def binary():
    return cifar_files(*made_cifar(ROWS), "binary")["data_batch_3.bin"]


@pytest.mark.parametrize("case", list(BAD_BATCHES))
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_bad_cifar_batches(tmp_path, monkeypatch, small_cifar, packed, case):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_BATCHES[case]
    version, short, ending = ("binary", "bin", ".bin") if case.startswith("binary") else ("python", "py", "")
    files, name = cifar_files(*made_cifar(ROWS), version), f"data_batch_3{ending}"
    files[name] = make()
    layout = f"cifar-10-{version}.tar.gz" if packed else f"cifar-10-batches-{short}"
    write_cifar(tmp_path, layout, files)
    before = listing(tmp_path)
    refused(f2.data.CIFAR10(str(tmp_path), val=5), message, tmp_path / layout, name, "get it again from https://")
    assert listing(tmp_path) == before
    assert not (tmp_path / "made").exists()


def damaged(content, place, length=2):
    return content[:place] + bytes(byte ^ 0xFF for byte in content[place : place + length]) + content[place + length :]


BAD_ARCHIVES = {
    "cut in half": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-9],
    "damaged": lambda content: damaged(content, len(content) // 3),
    "another checksum": lambda content: damaged(content, len(content) - 8),
    "not compressed": lambda content: b"no archive",
    "not a tar file": lambda content: gzip.compress(b"no tar file" * 100),
}


@pytest.mark.parametrize("case", list(BAD_ARCHIVES))
@pytest.mark.parametrize("version", ["python", "binary"])
def test_bad_cifar_archives(tmp_path, small_cifar, version, case):
    path = tmp_path / f"cifar-10-{version}.tar.gz"
    files = cifar_files(*made_cifar(ROWS), version)
    inner = {"python": "py", "binary": "bin"}[version]
    content = tar_gz({f"cifar-10-batches-{inner}/{name}": content for name, content in files.items()})
    path.write_bytes(BAD_ARCHIVES[case](content))
    refused(f2.data.CIFAR10(str(tmp_path), val=5), "truncated|corrupt", path, "get it again from https://")
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_missing_cifar_batches(tmp_path, small_cifar, layout):
    files = cifar_files(*made_cifar(ROWS), "python")
    del files["data_batch_4"]
    write_cifar(tmp_path, layout, files)
    refused(f2.data.CIFAR10(str(tmp_path), val=5), "lacks data_batch_4; it is incomplete", tmp_path / layout)


MISSING = {
    "cifar": (
        f2.data.CIFAR10,
        ("cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b"),
    ),
    "celeba": (f2.data.CelebA64, ("img_align_celeba.zip", "mmlab.ie.cuhk.edu.hk", "00d2c5bc6d35e252742224ab")),
    "imagenet": (f2.data.ImageNet64, ("train_data_batch_10", "val_data", "https://image-net.org")),
    "pictures": (lambda folder: f2.data.ImageNet64(folder, "pictures"), ("train_64x64", "image-net.org/small")),
    "edm": (lambda folder: f2.data.EDMZip(folder + "/a.zip", 8), ("github.com/NVlabs/edm", "dataset_tool.py")),
    "folder": (lambda folder: f2.data.ImageFolder(folder + "/a", 8), ("neither a folder nor a zip file",)),
    "fashion": (f2.data.FashionMNIST, ("train-images-idx3-ubyte", "dataset-fashion-mnist", "github.com/zalandores")),
}


@pytest.mark.parametrize("case", list(MISSING))
def test_missing_files_say_which_go_where(tmp_path, case):
    make, names = MISSING[case]
    with pytest.raises(FileNotFoundError) as error:
        make(str(tmp_path)).setup()
    for name in (*names, str(tmp_path)):
        assert name in str(error.value)
    assert listing(tmp_path) == []


CELEBA = (7, 2, 2)


@pytest.fixture
def faces(tmp_path, monkeypatch):
    monkeypatch.setattr(celeba, "COUNTS", dict(zip(celeba.COUNTS, CELEBA, strict=True)))
    make_celeba(tmp_path, CELEBA, zipped=True)
    return tmp_path


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


PARTITION, TABLE = "list_eval_partition.txt", "list_attr_celeba.txt"
BAD_LISTS = {
    "list cut short": (lambda f: replace_text(f / PARTITION, "000011.jpg 2\n", ""), "1 test images; 7 train", {}),
    "no such split": (lambda f: replace_text(f / PARTITION, "11.jpg 2", "11.jpg 3"), "line 11 of .*0, 1 or 2", {}),
    "list is no text": (lambda f: (f / PARTITION).write_bytes(b"\xff\xfe\x00"), "is no text", {}),
    "no such attribute": (lambda f: None, "attribute='Smile'; .* has 5_o_Clock_Shadow", {"attribute": "Smile"}),
    "missing row": (lambda f: replace_text(f / TABLE, "000011", "000099"), "lacks 1 of", {"attribute": "Young"}),
    "long row": (lambda f: replace_text(f / TABLE, "11.jpg ", "11.jpg 1 "), "line 13", {"attribute": "Young"}),
    "large crop": (lambda f: None, "crop of 200 x 200", {"crop": 200}),
    "too many": (lambda f: None, "test=3 do not fit 7 training and 2 val and 2 test images", {"test": 3}),
}


@pytest.mark.parametrize("case", list(BAD_LISTS))
def test_bad_celeba_lists(faces, case):
    change, message, arguments = BAD_LISTS[case]
    change(faces)
    refused(f2.data.CelebA64(str(faces), **arguments), message, *([] if case == "too many" else [faces]))


def rewrite(path, name, content):
    """Replace, or remove, a member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    inner = next(n for n in files if n.endswith(name))
    files[inner] = content
    write_files(path, {n: c for n, c in files.items() if c is not None}, True)


BLACK = np.zeros((218, 178, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lacks 1 of 11 images"),
        (picture(BLACK.swapaxes(0, 1), "jpeg"), "is 218 x 178 .*178 x 218 is expected"),
        (picture(BLACK[..., 0], "jpeg"), "has mode L"),
        (picture(BLACK, "jpeg")[:300], "cannot be read as an image"),
    ],
    ids=["missing", "turned", "grey", "cut short"],
)
def test_bad_celeba_images(faces, content, message):
    rewrite(faces / "img_align_celeba.zip", "000005.jpg", content)
    data = f2.data.CelebA64(str(faces), cache=str(faces / "arrays"))
    refused(data, message, faces / "img_align_celeba.zip", "000005.jpg")
    assert listing(faces) == ["img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"]


BAD_ZIPS = {
    "no zip file": (lambda content: b"<html>" * 50, "cannot be read as a zip file"),
    "without its end": (lambda content: content[:-10], "cannot be read as a zip file"),
    "a pixel changed": (lambda content: damaged(content, 120, 1), "is damaged .its checksum is another"),
    "a header changed": (lambda content: damaged(content, 1, 1), "is damaged .no file begins"),
}


@pytest.mark.parametrize("case", list(BAD_ZIPS))
def test_bad_zip_files(tmp_path, case):
    change, message = BAD_ZIPS[case]
    path = tmp_path / "a.zip"
    make_edm(path)
    path.write_bytes(change(path.read_bytes()))
    refused(f2.data.EDMZip(str(path), 8, val=5), message, path, "get")


def test_other_compressions_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    write_files(path, {"a.png": picture(np.zeros((8, 8, 3), np.uint8))}, True, zipfile.ZIP_LZMA)
    refused(f2.data.EDMZip(str(path), 8), "compressed by method 14.*unpack the zip file", path)


def images_of(count=9):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def labelled(labels):
    return json.dumps({"labels": labels}).encode()


NAMES = [f"00000/img{row:08d}.png" for row in range(9)]
BAD_EDM = {
    "no list": ({"dataset.json": None}, "has no dataset.json, so no labels; set labels=False"),
    "no json": ({"dataset.json": b"{"}, "is not .*make it again"),
    "no pairs": ({"dataset.json": labelled([1, 2])}, "is not .*make it again"),
    "a label missing": ({"dataset.json": labelled([[n, 0] for n in NAMES[1:]])}, "no label for 1 of 9 .*img00000000"),
    "a negative label": ({"dataset.json": labelled([[n, -1] for n in NAMES])}, "the label -1; whole numbers from 0"),
    "a vector": ({"dataset.json": labelled([[n, [0.5, 1.0]] for n in NAMES])}, r"the label \[0.5, 1.0\]"),
    "another size": ({NAMES[4]: picture(np.zeros((8, 9, 3), np.uint8))}, "04.png is 9 x 8 .*8 x 8 is expected"),
    "grey": ({NAMES[4]: picture(np.zeros((8, 8), np.uint8))}, "img00000004.png has mode L"),
    "cut short": ({NAMES[4]: picture(images_of()[4])[:90]}, "img00000004.png cannot be read as an image"),
    "another file": ({"model.pkl": b"x"}, "holds 1 file of other types .model.pkl"),
    "no images": (dict.fromkeys(NAMES), "holds no images"),
}


@pytest.mark.parametrize("case", list(BAD_EDM))
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_bad_edm_files(tmp_path, zipped, case):
    changes, message = BAD_EDM[case]
    files = {n: c for n, c in (edm_files(images_of(), range(9)) | changes).items() if c is not None}
    write_files(tmp_path / "a.zip", files, zipped)
    data = f2.data.EDMZip(str(tmp_path / "a.zip"), 8, labels=True, val=2, test=2, cache=str(tmp_path / "arrays"))
    before = listing(tmp_path)
    refused(data, message, tmp_path / "a.zip")
    assert listing(tmp_path) == before


def test_a_bad_file_is_named_in_a_worker_too(tmp_path):
    files = edm_files(images_of(), range(9)) | {NAMES[4]: picture(np.zeros((8, 9, 3), np.uint8))}
    write_files(tmp_path / "a.zip", files, True)
    data = f2.data.EDMZip(str(tmp_path / "a.zip"), 8, val=2, test=2, num_workers=2, batch_size=2)
    with pytest.raises(ValueError, match=r"img00000004.png is 9 x 8"):
        [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: f2.data.EDMZip(path, 16), "is 8 x 8 .*16 x 16 is expected"),
        (lambda path: f2.data.EDMZip(path, 8, 1), "mode RGB, but the model is for mode L"),
        (lambda path: f2.data.EDMZip(path, 8, 5).setup(), "channels=5; 1 .grey. or 3"),
        (lambda path: f2.data.EDMZip(path, 0), "at least 1 pixel"),
        (lambda path: f2.data.ImageFolder(path, 4), "holds 1 file of other types .dataset.json"),
        (lambda path: f2.data.ImageFolder(path, 8, crop=-3), "at least 1 pixel"),
        (lambda path: f2.data.ImageFolder(path, 8, crop="round"), "crop='round'; a number of pixels, 'square' or None"),
        (lambda path: f2.data.ImageFolder(path, 8, resize="nearest"), "resize='nearest'; box, bilinear"),
        (lambda path: f2.data.ImageNet64(path, "2016"), "version='2016'; 'batches'"),
    ],
)
def test_unfit_arguments(tmp_path, make, message):
    make_edm(tmp_path / "a.zip")
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path / "a.zip")).setup()


def test_classes_of_a_folder(tmp_path):
    image = picture(images_of()[0])
    write_files(tmp_path / "train", {"a/1.png": image, "b/2.png": image, "a/3.png": image}, False)
    write_files(tmp_path / "test", {"a/1.png": image, "c/2.png": image}, False)
    arguments = {"size": 8, "labels": True, "val": 1, "test": None}
    other = f2.data.ImageFolder(str(tmp_path / "train"), test_folder=str(tmp_path / "test"), **arguments)
    refused(other, r"test/c/2.png is in no folder of a class \(a, b\)")
    write_files(tmp_path / "train", {"4.png": image}, False)
    refused(
        f2.data.ImageFolder(str(tmp_path / "train"), **arguments), r"train/4.png is in no folder of a class \(a, b\)"
    )


def imagenet_content(kind, columns=12288, rows=2, labels=(1, 2)):
    return imagenet_batch(np.ones((rows, columns), np.uint8), np.array(labels), kind)


def npz_of_objects(path):
    made = io.BytesIO()
    np.savez(made, data=np.array([Runs(path)], object), labels=np.array([1]))
    return made.getvalue()


BAD_IMAGENET = {
    "cut short": (lambda kind, _: imagenet_content(kind)[:-500], "truncated or corrupt"),
    "text": (lambda kind, _: b"<html>404</html>", "truncated or corrupt"),
    "damaged": (lambda kind, _: damaged(imagenet_content(kind), 30, 40), "truncated or corrupt"),
    "32 pixels": (lambda kind, _: imagenet_content(kind, 3072), r"has uint8 \(2, 3072\) as data"),
    "label 0": (lambda kind, _: imagenet_content(kind, labels=(0, 1)), "labels 0 to 1; 1 to 1000 are expected"),
    "label 1001": (lambda kind, _: imagenet_content(kind, labels=(7, 1001)), "labels 7 to 1001"),
    "too few labels": (lambda kind, _: imagenet_content(kind, labels=(7,)), r"2 images and int64 \(1,\) as labels"),
    "another number": (lambda kind, _: imagenet_content(kind, rows=1, labels=(7,)), "hold 22 images; 23 are expected"),
    "a program": (
        lambda kind, path: npz_of_objects(path) if kind == "npz" else pickle.dumps(Runs(path), 2),
        "holds object; integers|nothing of it was run",
    ),
}


@pytest.mark.parametrize("case", list(BAD_IMAGENET))
@pytest.mark.parametrize("kind", ["npz", "python2"])
def test_bad_imagenet_batches(tmp_path, small_imagenet, kind, case):
    make, message = BAD_IMAGENET[case]
    make_imagenet_batches(tmp_path, COUNTS, 6, kind)
    path = tmp_path / ("train_data_batch_6.npz" if kind == "npz" else "train_data_batch_6")
    path.write_bytes(make(kind, tmp_path / "made"))
    before = listing(tmp_path)
    names = () if case == "another number" else (path,)
    refused(f2.data.ImageNet64(str(tmp_path), val=5), message, "again from https://image-net.org", *names)
    # nothing is left but the arrays of the other part, which are whole
    left = {*listing(tmp_path)} - {*before}
    assert len(left) == 2
    assert all(name.startswith("cache/valid-") and name.endswith(".npy") for name in left)
    assert not (tmp_path / "made").exists()


BAD_PICTURES = {
    "one missing": ("valid_64x64/0000003.png", None, "holds 5 images; 6 are expected"),
    "another file": ("train_64x64/notes.txt", b"x", "other types .notes.txt"),
    "another size": ("train_64x64/0000003.png", picture(BLACK[:32, :32]), "03.png is 32 x 32 .*64 x 64 is expected"),
}


@pytest.mark.parametrize("case", list(BAD_PICTURES))
def test_bad_imagenet_pictures(tmp_path, small_imagenet, case):
    name, content, message = BAD_PICTURES[case]
    make_imagenet_pictures(tmp_path, 23, 6, zipped=False)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(f2.data.ImageNet64(str(tmp_path), "pictures", val=5, cache=str(tmp_path / "arrays")), message, tmp_path)
    assert not [name for name in listing(tmp_path) if name.startswith("arrays") and "valid" not in name]


def reader(folder, count=20):
    write_files(folder, {f"{n:02d}.png": picture(i) for n, i in enumerate(images_of(count))}, False)
    store = open_store(folder)
    return ImageReader(store, range(count), 3, Framing(8))


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 4)
    values = reader(tmp_path / "images")
    read = ImageReader.__getitems__

    def interrupted(self, rows):
        if 12 in rows:
            assert [name for name in os.listdir(tmp_path / "arrays") if ".part-" in name]
            raise KeyboardInterrupt
        return read(self, rows)

    monkeypatch.setattr(ImageReader, "__getitems__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.cached(values, tmp_path / "arrays", "made")
    assert listing(tmp_path / "arrays") == []
    monkeypatch.undo()
    # what a process that was killed leaves is removed, and nothing else that may be there
    path = tmp_path / "arrays" / f"made-{cache.digest(values.fingerprint())}.npy"
    path.with_name(f"{path.name}.part-12-0a1b2c3d").write_bytes(b"half")
    other = path.with_name("other.npy.part-12-0a1b2c3d")
    other.write_bytes(b"half")
    assert torch.equal(cache.cached(values, tmp_path / "arrays", "made")[:], values[:])
    assert listing(tmp_path / "arrays") == [path.name, other.name]


def test_a_cache_is_of_its_images_and_their_framing(tmp_path):
    values = reader(tmp_path / "images")
    cache.cached(values, tmp_path / "arrays", "made")
    smaller = ImageReader(values.store, range(20), 3, Framing(4, resize="box"))
    assert cache.cached(smaller, tmp_path / "arrays", "made").shape == (20, 3, 4, 4)
    fewer = ImageReader(values.store, range(1, 20), 3, Framing(8))
    assert cache.cached(fewer, tmp_path / "arrays", "made").shape == (19, 3, 8, 8)
    (tmp_path / "images" / "03.png").write_bytes(picture(255 - images_of()[3]))
    changed = cache.cached(
        ImageReader(open_store(tmp_path / "images"), range(20), 3, Framing(8)), tmp_path / "arrays", "made"
    )
    assert torch.equal(changed[3], 255 - values[:0].new_tensor(images_of()[3]).permute(2, 0, 1))
    assert len(listing(tmp_path / "arrays")) == 4


def test_a_damaged_array_is_refused(tmp_path):
    values = reader(tmp_path / "images")
    path = cache.cached(values, tmp_path / "arrays", "made").path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="remove it, and make it again") as error:
        cache.cached(values, tmp_path / "arrays", "made")
    assert str(path) in str(error.value)


def test_parts_that_do_not_make_up_an_array(tmp_path):
    path = tmp_path / "a.npy"
    for parts, message in (
        ([np.zeros((2, 3), np.uint8)], "2 rows came"),
        ([np.zeros((4, 2), np.uint8)], r"a part has uint8 \(4, 2\)"),
        ([np.zeros((4, 3))], r"a part has float64 \(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.write_array(path, (4, 3), parts)
    assert listing(tmp_path) == []


def test_hidden_files_are_left_out(tmp_path):
    image = picture(images_of()[0])
    files = {"a.png": image, ".b.png": b"x", "__MACOSX/._a.png": b"x", ".cache/c.txt": b"x"}
    write_files(tmp_path / "a.zip", files, True)
    assert open_store(tmp_path / "a.zip").names == ["a.png"]
    write_files(tmp_path / "a", {n: c for n, c in files.items() if not n.startswith("__")}, False)
    assert open_store(tmp_path / "a").names == ["a.png"]
