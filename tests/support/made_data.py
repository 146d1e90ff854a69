"""Small files in the format of data sets that cannot be fetched."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import torch
from PIL import Image


def idx(values):
    """Bytes of an IDX file of unsigned bytes."""
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return head + values.to(torch.uint8).numpy().tobytes()


def make_fashion(folder, train=300, test=40, zipped=True):
    """The four files of Fashion-MNIST with that many images; returns the training images and labels."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for part, count in {"train": train, "t10k": test}.items():
        images = torch.randint(256, (count, 28, 28), generator=generator)
        labels = torch.arange(count) % 10
        made[part] = (images, labels)
        for name, values in {"images-idx3": images, "labels-idx1": labels}.items():
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    return made


class _Python2(pickle._Pickler):
    """Writes strings as Python 2 did, whose text was bytes."""

    def text(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write((b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: text, bytes: text}


def python2_pickle(values):
    """Bytes like those that Python 2 and its numpy write for a dictionary, protocol 2."""
    made = io.BytesIO()
    _Python2(made, 2).dump(values)
    return made.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def tar_gz(files):
    """Bytes of a gzipped tar file."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


CIFAR_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def cifar(rows=12, seed=0):
    """Images ``(6, rows, 3, 32, 32)`` and labels ``(6, rows)`` of the batches."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (6, rows, 3, 32, 32), np.uint8)
    return images, generator.integers(0, 10, (6, rows))


def cifar_files(images, labels, version):
    """Contents by name of a version's folder, ``python`` or ``binary``."""
    files = {}
    for name, pixels, classes in zip(CIFAR_BATCHES, images, labels, strict=True):
        flat = pixels.reshape(len(pixels), -1)
        if version == "binary":
            files[f"{name}.bin"] = np.concatenate((classes[:, None].astype(np.uint8), flat), 1).tobytes()
            continue
        number = f"training batch {name[-1]} of 5" if name != "test_batch" else "testing batch 1 of 1"
        names = [f"image_s_{row:06d}.png" for row in range(len(pixels))]
        files[name] = python2_pickle(
            {"batch_label": number, "labels": classes.tolist(), "data": flat, "filenames": names}
        )
    if version == "python":
        files["batches.meta"] = python2_pickle({"label_names": ["airplane", "automobile"], "num_vis": 3072})
    files["readme.html"] = b"<html></html>"
    return files


def make_cifar(folder, layout, rows=12, seed=0):
    """CIFAR-10 in one of its four layouts, each batch with ``rows`` images; returns images and labels."""
    images, labels = cifar(rows, seed)
    version = "python" if layout in ("cifar-10-batches-py", "cifar-10-python.tar.gz") else "binary"
    files = cifar_files(images, labels, version)
    write_cifar(folder, layout, files)
    return torch.from_numpy(images), torch.from_numpy(labels)


def write_cifar(folder, layout, files):
    """Files of one version as a folder or an archive."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout.endswith(".tar.gz"):
        inner = "cifar-10-batches-py" if "python" in layout else "cifar-10-batches-bin"
        (folder / layout).write_bytes(tar_gz({f"{inner}/{name}": content for name, content in files.items()}))
        return
    (folder / layout).mkdir()
    for name, content in files.items():
        (folder / layout / name).write_bytes(content)


def picture(array, kind="png", **options):
    """Bytes of an image file of ``(H, W)`` or ``(H, W, 3)`` values."""
    made = io.BytesIO()
    Image.fromarray(array).save(made, kind, **options)
    return made.getvalue()


def write_files(path, files, zipped, method=zipfile.ZIP_STORED):
    """Contents by name as a folder, or as a zip file."""
    if zipped:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def listing(folder):
    """Every file below a folder, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


ATTRIBUTES = ("5_o_Clock_Shadow", "Smiling", "Young")


def make_celeba(folder, counts, zipped):
    """CelebA as torchvision keeps it: JPEG files of 178 x 218, lists; returns pictures, splits, attributes."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    splits = np.repeat(np.arange(3), counts)
    attributes = generator.choice([-1, 1], (len(splits), 3))
    names = [f"{number:06d}.jpg" for number in range(1, len(splits) + 1)]
    # smooth pictures: blocks of ten pixels, which JPEG keeps nearly
    blocks = generator.integers(0, 256, (len(splits), 22, 18, 3), np.uint8)
    contents = [picture(b.repeat(10, 0).repeat(10, 1)[:218, :178], "jpeg", quality=95) for b in blocks]
    if zipped:
        files = {f"img_align_celeba/{name}": content for name, content in zip(names, contents, strict=True)}
        write_files(folder / "img_align_celeba.zip", files, True)
    else:
        write_files(folder / "img_align_celeba", dict(zip(names, contents, strict=True)), False)
    lines = [f"{name} {split}" for name, split in zip(names, splits, strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    table = [f"{name}  " + " ".join(f"{v:2d}" for v in row) for name, row in zip(names, attributes, strict=True)]
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\n{' '.join(ATTRIBUTES)} \n" + "\n".join(table) + "\n")
    return contents, torch.from_numpy(splits), torch.from_numpy(attributes)


def imagenet_batch(images, labels, kind):
    """One batch of downsampled ImageNet with labels from 1: ``npz``, or a pickle of Python 2 or 3."""
    flat, mean = images.reshape(len(images), -1), np.zeros(12288)
    if kind == "npz":
        made = io.BytesIO()
        np.savez(made, data=flat, labels=labels, mean=mean)
        return made.getvalue()
    if kind == "python2":
        return python2_pickle({"data": flat, "labels": labels.tolist()})
    protocol = int(kind.removeprefix("protocol"))
    made = pickle.dumps({"data": flat, "labels": labels.tolist(), "mean": mean}, protocol)
    # numpy's name of the time
    return made.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n") if protocol < 4 else made


COUNTS = (3, 2, 2, 2, 2, 2, 2, 2, 2, 4)
"""Images of each training batch."""


def make_imagenet_batches(folder, counts, valid, kind):
    """Ten training batches and the validation batch; returns images and labels from 0."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(counts) + valid
    images = generator.integers(0, 256, (total, 3, 64, 64), np.uint8)
    labels = generator.integers(1, 1001, total)
    labels[:2] = 1, 1000
    start, names = 0, [*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data"]
    for name, count in zip(names, [*counts, valid], strict=True):
        rows = slice(start, start + count)
        path = folder / (f"{name}.npz" if kind == "npz" else name)
        path.write_bytes(imagenet_batch(images[rows], labels[rows], kind))
        start += count
    return torch.from_numpy(images), torch.from_numpy(labels) - 1


def make_imagenet_pictures(folder, train, valid, zipped):
    """Folders, or zip files, of PNG files; returns images."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (train + valid, 64, 64, 3), np.uint8)
    contents = [picture(image) for image in images]
    for name, part in {"train_64x64": contents[:train], "valid_64x64": contents[train:]}.items():
        files = {f"{number:07d}.png": content for number, content in enumerate(part, 1)}
        if zipped:
            write_files(
                folder / f"{name}.zip", {f"{name}/{n}": c for n, c in files.items()}, True, zipfile.ZIP_DEFLATED
            )
        else:
            write_files(folder / name, files, False)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def edm_files(images, labels):
    """Contents by name of a data set of EDM: uncompressed PNG files, and ``dataset.json`` at the end."""
    names = [f"{row // 1000:05d}/img{row:08d}.png" for row in range(len(images))]
    files = {n: picture(i, compress_level=0, optimize=False) for n, i in zip(names, images, strict=True)}
    listed = None if labels is None else [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    return {**files, "dataset.json": json.dumps({"labels": listed}).encode()}


def make_edm(path, count=40, resolution=8, channels=3, labels=True, zipped=True):
    """A data set of EDM; returns images ``(N, C, H, W)`` and labels."""
    generator = np.random.default_rng(1)
    shape = (count, resolution, resolution) + ((3,) if channels == 3 else ())
    images, classes = generator.integers(0, 256, shape, np.uint8), generator.integers(0, 5, count)
    write_files(path, edm_files(images, classes if labels else None), zipped)
    values = torch.from_numpy(images)
    return values.permute(0, 3, 1, 2) if channels == 3 else values[:, None], torch.from_numpy(classes)
