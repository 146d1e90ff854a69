"""Arrays of images on disk, converted once and then mapped into memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from f2d2_lightning.data.dataset import LazyValues, StoredValues
from f2d2_lightning.data.images._reader import ImageReader
from f2d2_lightning.utils.files import remove_partial, whole_file

CHUNK = 1024
"""Images that are converted at a time."""


def write_once(path: Path, write: Callable[[], None]) -> None:
    """Write a file that is not there, in one process, while others that want it wait.

    The lock is a file beside it that goes away with the last who waits; a process that dies holds it no longer, and
    what it had written is removed.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while not path.exists():
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # whoever held it before may have removed it: a lock on a file that is gone keeps nobody out
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            try:
                remove_partial(path)
                if not path.exists():
                    write()
            finally:
                lock.unlink(missing_ok=True)


def digest(*parts: object) -> str:
    """Name for what was made from these."""
    return hashlib.blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def write_array(path: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
    """A ``.npy`` file of ``uint8`` from its parts along the first axis, which must make up its shape; whole or not."""
    rows = 0
    with whole_file(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for chunk in chunks:
            if chunk.dtype != np.uint8 or chunk.shape[1:] != shape[1:]:
                raise ValueError(f"a part has {chunk.dtype} {chunk.shape}; uint8 (B, *{shape[1:]}) is expected")
            file.write(np.ascontiguousarray(chunk).data)
            rows += len(chunk)
        if rows != shape[0]:
            raise ValueError(f"{rows} rows came for {path}; {shape[0]} are expected")


def cached(values: ImageReader, folder: str | Path | None, name: str) -> LazyValues:
    """Images as an array in a folder, made if it is not there: a few minutes for a hundred thousand.

    It has one file, whose name begins with ``name``, for each choice of images, crop and resize. Without a folder they
    are decoded at each access, and the first is read: a wrong size is said now, and not in a worker.
    """
    if folder is None:
        values[:1]
        return values
    path = Path(folder).expanduser() / f"{name}-{digest(values.fingerprint())}.npy"
    chunks = (values[start : start + CHUNK].numpy() for start in range(0, len(values), CHUNK))
    write_once(path, lambda: write_array(path, values.shape, chunks))
    return StoredValues(path)
