"""Small files in the format of data sets that cannot be fetched."""

import gzip
import struct

import torch


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
