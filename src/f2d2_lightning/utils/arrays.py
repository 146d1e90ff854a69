"""NumPy's files of plain numbers, and sizes of archives: read in no more memory than a file accounts for. No Lightning.

A few bytes can say that they are an array of any size, and deflated zeros grow a thousandfold. Files come from
anywhere, and whoever reads one should be told what is wrong with it, and not run out of memory.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

GROWTH = 100
"""Most by which large files may grow: pictures do twofold, those of a few grey levels tenfold."""
HARMLESS = 64 * 2**20
"""Bytes up to which files may grow as they can: small arrays of zeros are ordinary, and do no harm."""
MARGIN = 2**20
"""Bytes that the members of an archive that is not compressed may seem to have beyond its own."""

HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""By version of ``.npy``; the third is for names of fields, which plain numbers do not have."""
HEAD = 2**14
"""Bytes that hold any head that numpy reads, which stops at 10,000."""
KINDS = "biufc"
"""NumPy's letters of truth values, integers, floating and complex numbers."""
AGAIN = "write it again with numpy.save or numpy.savez, not savez_compressed"


def read_numbers(path: str | Path, names: Sequence[str] = (), remedy: str = AGAIN) -> dict[str, np.ndarray]:
    """Arrays of numbers in a ``.npy`` or ``.npz`` file, by name; what the file is, its beginning says.

    Of an ``.npz`` file the first of the ``names`` is read, and those of the others that are there, or all by default;
    the array of a ``.npy`` file gets the first name. A file that is damaged, of another kind, or would take far more
    memory than it has bytes is a ``ValueError``, which says the ``remedy``.
    """
    path = Path(path)
    with _named(path, remedy), path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            return _members(file, names)
        return {"".join(names[:1]): _array(file, path.stat().st_size)}


def map_numbers(path: str | Path, remedy: str = AGAIN) -> np.ndarray:
    """The array of numbers in a ``.npy`` file, mapped into memory; arguments and errors as :func:`read_numbers`."""
    path = Path(path)
    with _named(path, remedy), path.open("rb") as file:
        _check_head(file, path.stat().st_size)
        return np.load(path, mmap_mode="r", allow_pickle=False)


def check_growth(packed: int, size: int) -> None:
    """Refuse to unpack bytes that would grow as only zeros do: more than a hundredfold, and to more than 64 MiB."""
    if size > max(HARMLESS, GROWTH * packed):
        raise ValueError(
            f"its {packed:,} bytes would become {size:,}, {size // max(packed, 1):,} times as many; up to {GROWTH} "
            f"times, or {HARMLESS:,} bytes, are unpacked"
        )


def check_stored_archive(path: Path) -> None:
    """Refuse a zip file that would grow when it is read, as ``torch.load`` would let it; other files pass."""
    if not zipfile.is_zipfile(path):
        return
    with _named(path, "get it again", "a zip file"), zipfile.ZipFile(path) as archive:
        total = sum(info.file_size for info in archive.infolist())
    size = path.stat().st_size
    if total > size + MARGIN:
        raise ValueError(
            f"{path} is compressed, as torch.save never writes (it has {size:,} bytes that would become {total:,}); "
            "load it where it is trusted, and save it again with torch.save"
        )


@contextmanager
def _named(path: Path, remedy: str, kind: str = "a NumPy file of plain numbers") -> Iterator[None]:
    """Say which file it was, and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    # numpy and zipfile name many errors for a damaged file, depending on where the damage is
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}; {remedy}") from error


def _members(file: IO[bytes], names: Sequence[str]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        members = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(members) < len(infos):
            raise ValueError("it holds two arrays of one name")
        if names and names[0] not in members:
            raise ValueError(f"it holds {', '.join(members) or 'nothing'}; an array {names[0]!r} is expected")
        packed = file.seek(0, os.SEEK_END)
        if sum(info.compress_size for info in infos) > packed:
            raise ValueError("its members overlap")
        check_growth(packed, sum(info.file_size for info in infos))
        found = {}
        for name, info in ((name, members[name]) for name in names or members if name in members):
            # zipfile unpacks the other methods without a bound; numpy writes none of them
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                method = info.compress_type
                raise ValueError(f"{info.filename} is compressed by method {method}, which numpy never writes")
            with archive.open(info) as member:
                found[name] = _array(member, info.file_size)
        return found


def _array(file: IO[bytes], size: int) -> np.ndarray:
    _check_head(file, size)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _check_head(file: IO[bytes], size: int) -> None:
    """Refuse a ``.npy`` file of ``size`` bytes, of which nothing but the head is read, if it holds something else."""
    # in memory, where a length of 4 GiB gives no more than there is
    file.seek(0)
    start = io.BytesIO(file.read(HEAD))
    version = np.lib.format.read_magic(start)
    if version not in HEADS:
        raise ValueError(f"its version is {version}; {' or '.join(map(str, HEADS))} is expected")
    shape, _, dtype = HEADS[version](start)
    if dtype.kind not in KINDS:
        raise ValueError(f"it holds {dtype}; integers or floating numbers are needed")
    # in Python's integers, which do not overflow
    claimed, there = math.prod(shape) * dtype.itemsize, size - start.tell()
    if min(shape, default=0) < 0 or claimed != there:
        raise ValueError(f"its head says {dtype} {shape}, which is {claimed:,} bytes, and {there:,} follow")
