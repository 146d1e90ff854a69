"""Files of other people's training: plain pickles, and what ``torch.save`` writes in both of its formats.

Pickles of tensors contain the older format as bytes, one for each storage. ``torch.load`` is not asked: even with a
pickle module of one's own it makes storages of the older format as large as a file claims, unpacks what looks like a
tar file, and runs TorchScript.
"""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from f2d2_lightning.utils.pickles import Allowance, RefusedPickleError, StorageType, Unpickler

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read_checkpoint(path: str | Path, classes: Collection[str] = ()) -> Any:
    """Contents of a pickle, or of a file of ``torch.save``, as plain values; nothing in it is run.

    Tensors come on the CPU and may share memory, as they did; modules of ``torch.nn`` and objects of persistent classes
    as :class:`~f2d2_lightning.utils.pickles.Record`; ordered and attribute-like dictionaries as ``dict``, NumPy numbers
    as Python's.

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
    reader = _Reader(str(path), frozenset(classes), path.stat().st_size)
    try:
        # begins with a zip's first entry; an archive with something before it is no file of torch.save
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                return reader.archive(file)
            # a map, not a file: what it reads is bounded by what is there, whatever lengths the opcodes claim
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                return reader.stream(stream)
    except (RefusedPickleError, PermissionError):
        raise
    except Exception as error:  # what is damaged fails anywhere
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, cut short, or no checkpoint ({what:.300}); download it again") from error


class _Reader:
    """Reads files of ``size`` bytes; the storages announced in one are by their keys in ``memory``."""

    def __init__(self, file: str, classes: frozenset[str], size: int) -> None:
        self.file, self.classes, self.allowance = file, classes, Allowance(size)
        self.left = size
        self.memory: dict[str, bytearray] = {}
        self.flat: dict[str, Tensor] = {}

    def pickle(self, stream: Any, storage: Any = None) -> Any:
        """One pickle, from where the stream is to the pickle's end."""
        unpickler = Unpickler(
            *(stream, self.file, self.allowance), classes=self.classes, storage=storage, from_bytes=self.from_bytes
        )
        return unpickler.load()

    def announced(self, identity: Any, length: int) -> str:
        """Key of the storage that ``("storage", type, key, location, elements)`` speaks of; room is made for it."""
        if type(identity) is not tuple or len(identity) != length or identity[5:] not in ((), (None,)):
            raise RefusedPickleError(f"{self.file} has a persistent identity that is no storage; nothing of it was run")
        kind, of, key, _, numel = identity[:5]
        if kind != "storage" or type(of) is not StorageType or type(key) is not str or type(numel) is not int:
            raise ValueError("a persistent identity is no storage, or has no key or number of elements")
        size = numel * of.dtype.itemsize
        if key not in self.memory:
            self.left -= size
            if numel < 0 or self.left < 0:
                raise ValueError(f"storages of more bytes are announced than there are ({numel} elements)")
            self.memory[key] = bytearray(size)
            self.flat[key] = torch.frombuffer(self.memory[key], dtype=of.dtype) if size else torch.empty(0).to(of.dtype)
        if (self.flat[key].dtype, len(self.flat[key])) != (of.dtype, numel):
            raise ValueError(f"storage {key:.20} is announced twice, with different sizes")
        return key

    def stream(self, stream: Any) -> Any:
        """A plain pickle, or the older format of ``torch.save``."""
        first = self.pickle(stream)
        return self.legacy(stream) if type(first) is int and first == _LEGACY_MAGIC else first

    def from_bytes(self, data: bytes) -> Any:
        """What ``torch.save`` made of an object in its older format."""
        stream, reader = io.BytesIO(data), _Reader(self.file, self.classes, len(data))
        if reader.pickle(stream) != _LEGACY_MAGIC:
            raise ValueError("the bytes of a storage do not begin as torch.save writes them")
        return reader.legacy(stream)

    def legacy(self, stream: BinaryIO) -> Any:
        """The rest of the older format: protocol, system, object, keys of storages, and their values."""
        protocol, system = self.pickle(stream), self.pickle(stream)
        if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
            raise ValueError("its version of torch.save is not known")
        if type(system) is not dict or system.get("little_endian") is not True:
            raise ValueError("its numbers are not in little-endian order")
        content = self.pickle(stream, lambda identity: self.flat[self.announced(identity, 6)])
        keys = self.pickle(stream)
        if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(self.flat):
            raise ValueError(f"{len(self.flat)} storages are announced, and others follow")
        for key in keys:
            numel, memory = len(self.flat[key]), self.memory[key]
            count, data = int.from_bytes(stream.read(8), "little"), stream.read(len(memory))
            if count != numel or len(data) != len(memory):
                raise ValueError(f"a storage of {numel} elements has {count}, in {len(data)} bytes")
            memory[:] = data
        return content

    def archive(self, file: BinaryIO) -> Any:
        """The zip format: one pickle, and an entry for each storage."""
        archive = zipfile.ZipFile(file)
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

        def storage(identity: Any) -> Tensor:
            known = len(self.flat)
            key = self.announced(identity, 5)
            if len(self.flat) > known:
                info, memory = entry(f"data/{key}"), self.memory[key]
                if info.file_size != len(memory):
                    raise ValueError(f"{info.filename} has {info.file_size} bytes, but {len(memory)} are announced")
                memory[:] = archive.read(info)
            return self.flat[key]

        return self.pickle(io.BytesIO(archive.read(entry("data.pkl"))), storage)
