"""Files of other people's training: plain pickles, and what ``torch.save`` writes in both of its formats.

Pickles of tensors contain the older format as bytes, one for each storage.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from f2d2_lightning.checkpoints._pickle import (
    Machine,
    RefusedPickleError,
    Storage,
    announced_storage,
)

__all__ = ["read_checkpoint"]

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
    *(ValueError, struct.error, zipfile.BadZipFile),
)


def read_checkpoint(path: str | Path, classes: Collection[str] = ()) -> Any:
    """Contents of a pickle, or of a file of ``torch.save``, as plain values; nothing in it is run.

    Tensors come as :class:`~f2d2_lightning.checkpoints._pickle.StoredTensor`, modules of ``torch.nn`` and objects of
    persistent classes as :class:`~f2d2_lightning.checkpoints._pickle.Record`; ordered and attribute-like dictionaries
    as ``dict``, NumPy numbers as Python's.

    Args:
        path: File.
        classes: Full names of further classes whose objects are read as records; they are not imported.

    Raises:
        FileNotFoundError: If there is no such file.
        RefusedPickleError: If the file asks for anything else; a ``ValueError`` that names it.
        ValueError: If the file is damaged, cut short, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; download the checkpoint, or correct the path")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; download it again")
    reader = _Reader(str(path), frozenset(classes))
    try:
        # begins with a zip's first entry; an archive with something before it is no file of torch.save
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                return reader.archive(path)
            # a map, not a file: what it reads is bounded by what is there, whatever lengths the opcodes claim
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                return reader.stream(stream)
    except (RefusedPickleError, PermissionError):
        raise
    except _DAMAGE as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, cut short, or no checkpoint ({what:.300}); download it again") from error


class _Reader:
    def __init__(self, file: str, classes: frozenset[str]) -> None:
        self.file, self.classes = file, classes
        self._read: dict[int, tuple[bytes, Any]] = {}

    def pickle(self, stream: Any, storage: Callable[[Any], Storage] | None = None) -> Any:
        """One pickle, from where the stream is to the pickle's end."""
        return Machine(self.file, self.classes, storage, self.from_bytes).run(stream)

    def stream(self, stream: Any) -> Any:
        """A plain pickle, or the older format of ``torch.save``."""
        first = self.pickle(stream)
        return self.legacy(stream) if type(first) is int and first == _LEGACY_MAGIC else first

    def from_bytes(self, data: bytes) -> Any:
        """What ``torch.save`` made of an object in its older format."""
        # the same bytes can be asked for any number of times
        if id(data) not in self._read:
            stream = io.BytesIO(data)
            if self.pickle(stream) != _LEGACY_MAGIC:
                raise ValueError("the bytes of a storage do not begin as torch.save writes them")
            self._read[id(data)] = (data, self.legacy(stream))
        return self._read[id(data)][1]

    def legacy(self, stream: BinaryIO) -> Any:
        """The rest of the older format: protocol, system, object, keys of storages, and their values."""
        protocol, system = self.pickle(stream), self.pickle(stream)
        if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
            raise ValueError("its version of torch.save is not known")
        if type(system) is not dict or system.get("little_endian") is not True:
            raise ValueError("its numbers are not in little-endian order")
        storages: dict[str, Storage] = {}

        def storage(identity: Any) -> Storage:
            if type(identity) is not tuple or len(identity) != 6 or identity[5] is not None:
                raise RefusedPickleError(f"{self.file} has a persistent identity that is no storage; nothing was run")
            return announced_storage(identity, storages)

        content, keys = self.pickle(stream, storage), self.pickle(stream)
        if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
            raise ValueError(f"{len(storages)} storages are announced, and others follow")
        for key in keys:
            announced = storages[key]
            count, data = int.from_bytes(stream.read(8), "little"), stream.read(announced.nbytes)
            if count != announced.numel or len(data) != announced.nbytes:
                raise ValueError(f"a storage of {announced.numel} elements has {count}, in {len(data)} bytes")
            announced.read = lambda data=data: data
        return content

    def archive(self, path: Path) -> Any:
        """The zip format: one pickle, and an entry for each storage, read when its tensor is asked for."""
        archive = zipfile.ZipFile(path)
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"a file of torch.save has one data.pkl, and this archive has {len(pickles)}")
        folder = pickles[0][: -len("data.pkl")]

        def entry(name: str) -> zipfile.ZipInfo:
            info = archive.getinfo(folder + name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed, which torch.save does not do")
            return info

        if folder + "byteorder" in archive.namelist() and archive.read(entry("byteorder")) != b"little":
            raise ValueError("its numbers are not in little-endian order")
        storages: dict[str, Storage] = {}

        def storage(identity: Any) -> Storage:
            if type(identity) is not tuple or len(identity) != 5:
                raise RefusedPickleError(f"{self.file} has a persistent identity that is no storage; nothing was run")
            announced = announced_storage(identity, storages)
            info = entry(f"data/{identity[2]}")
            if info.file_size != announced.nbytes:
                raise ValueError(f"{info.filename} has {info.file_size} bytes, but {announced.nbytes} are announced")
            announced.read = lambda: archive.read(info)
            return announced

        return self.pickle(io.BytesIO(archive.read(entry("data.pkl"))), storage)
