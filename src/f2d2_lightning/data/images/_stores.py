"""Folders and zip files as places where files are read by number, in any process.

Of a zip file only where each member begins is kept: each batch opens the file anew and reads at positions, so that
worker processes share neither a file handle nor its place.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from f2d2_lightning.utils.arrays import check_growth

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff")

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip member: its signature, and the lengths of name and extra field (APPNOTE.TXT, 4.3.7)."""

LARGEST = 256 * 2**20
"""Bytes of a file in a zip file that are read: 80 megapixels without compression, or several million labels."""


class Store(ABC):
    """Files by number."""

    path: Path
    names: list[str]
    """With forward slashes, sorted; hidden files are left out."""

    @abstractmethod
    def opened(self) -> AbstractContextManager[Callable[[int], bytes]]:
        """A context in which files are read: gives a function from number to content."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Another one if a file was changed: names, sizes and times."""

    def where(self, row: int) -> str:
        """Full name of a file, for errors."""
        return f"{self.path}/{self.names[row]}"

    def content(self, row: int) -> bytes:
        """One file."""
        with self.opened() as read:
            return read(row)


class FolderStore(Store):
    """A folder and the folders in it, or one file."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path if path.is_dir() else path.parent
        self.names = sorted(self._walk(path, "")) if path.is_dir() else [path.name]

    @classmethod
    def _walk(cls, folder: Path, prefix: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if entry.is_symlink():
                        raise ValueError(
                            f"{entry.path} is a link to a folder; links are not followed: name the folder itself, or "
                            "copy it"
                        )
                    yield from cls._walk(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name

    @contextmanager
    def opened(self) -> Iterator[Callable[[int], bytes]]:
        yield lambda row: (self.path / self.names[row]).read_bytes()

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in self.names:
            status = (self.path / name).stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class ZipStore(Store):
    """A zip file, its members stored or deflated, and none of them encrypted."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [info for info in archive.infolist() if not info.is_dir() and _is_shown(info.filename)]
        except (zipfile.BadZipFile, struct.error, EOFError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{self.path} cannot be read as a zip file ({error}); it is truncated, corrupt or of another type: "
                "get it again"
            ) from error
        members.sort(key=lambda info: info.filename)
        for info in members:
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{self.path}/{info.filename} is encrypted or compressed by method {info.compress_type}; stored "
                    "and deflated files can be read: unpack the zip file and name the folder"
                )
        self.names = [info.filename for info in members]
        # numbers, not objects: a million of those would fill the memory of each worker
        fields = ("header_offset", "compress_size", "file_size", "CRC", "compress_type")
        self.members = np.array([[getattr(info, name) for name in fields] for info in members], np.int64)

    @contextmanager
    def opened(self) -> Iterator[Callable[[int], bytes]]:
        with self.path.open("rb") as file:
            yield lambda row: self._member(file, row)

    def _member(self, file: BinaryIO, row: int) -> bytes:
        start, packed, size, checksum, method = (int(value) for value in self.members[row])
        try:
            if max(packed, size) > LARGEST:
                raise ValueError(f"it says that it has {max(packed, size):,} bytes; images have up to {LARGEST:,}")
            check_growth(packed, size)
            file.seek(start)
            signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            if signature != b"PK\3\4":
                raise ValueError("no file begins where the directory says")
            file.seek(name + extra, os.SEEK_CUR)
            content = file.read(packed)
            if len(content) < packed:
                raise ValueError(f"it ends after {len(content)} of {packed} bytes")
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            if len(content) != size or zlib.crc32(content) != checksum:
                raise ValueError("its checksum is another")
        except (ValueError, struct.error, zlib.error) as error:
            raise ValueError(f"{self.where(row)} is damaged ({error}); get {self.path} again") from error
        return content

    def fingerprint(self) -> str:
        status = self.path.stat()
        return f"{self.path.name} {status.st_size} {status.st_mtime_ns}"


def _is_shown(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def first_of(folder: Path, *names: str) -> Path | None:
    """The first of the names that is there."""
    return next((path for name in names if (path := folder / name).exists()), None)


def open_store(path: str | Path) -> Store:
    """A folder or a zip file."""
    path = Path(path)
    if path.is_dir():
        return FolderStore(path)
    if path.is_file():
        return ZipStore(path)
    raise FileNotFoundError(f"there is neither a folder nor a zip file at {path}")


def image_rows(store: Store, others: Sequence[str] = ()) -> list[int]:
    """Numbers of the images in a store, where besides them there may be files called as ``others``, and no more."""
    rows = [row for row, name in enumerate(store.names) if name.lower().endswith(SUFFIXES)]
    if strange := [name for name in store.names if not name.lower().endswith(SUFFIXES) and name not in others]:
        listed = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise ValueError(
            f"{store.path} holds {len(strange)} file{'s' if len(strange) > 1 else ''} of other types ({listed}); "
            f"images are {', '.join(SUFFIXES)}: move the others away, or convert them"
        )
    if not rows:
        raise ValueError(f"{store.path} holds no images; images are {', '.join(SUFFIXES)}")
    return rows
