"""IDX files, the format of MNIST and its relatives (http://yann.lecun.com/exdb/mnist/)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08
DEFLATE = 1100
"""More than gzip can grow: 258 bytes come of 2 bits at the most, 1032-fold (RFC 1951, 3.2.5)."""


def read_idx(path: str | Path) -> Tensor:
    """Array of unsigned bytes in an IDX file, plain or gzipped, ``uint8``, shape as the file says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not IDX, holds another type than unsigned bytes, or is truncated or corrupt.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            return _read(stream, path, DEFLATE * size if packed else size)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is a truncated or corrupt gzip file ({error}); get it again") from error


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path, most: int) -> Tensor:
    """The array of a stream that cannot have more than ``most`` bytes; no more than the head says is read."""
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0":
        raise ValueError(f"{path} does not begin as an IDX file does (it has {head.hex(' ') or 'no bytes'})")
    kind, axes = head[2], head[3]
    if kind != UNSIGNED_BYTE:
        raise ValueError(f"{path} holds numbers of IDX type 0x{kind:02x}; unsigned bytes (0x08) are expected")
    sizes = stream.read(4 * axes)
    if len(sizes) < 4 * axes:
        raise ValueError(f"{path} ends within its head ({4 + len(sizes)} bytes); it is truncated, get it again")
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    count = math.prod(shape)
    # one byte more than there should be, which also brings gzip to its checksum
    content = stream.read(count + 1) if count <= most else b""
    if len(content) != count:
        came = "it cannot" if count > most else f"holds {'more' if len(content) > count else len(content)}"
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, and {came}; "
            "it is truncated or corrupt, get it again"
        )
    try:
        return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())
    except ValueError as error:
        raise ValueError(f"{path} says that its shape is {shape} ({error}); it is corrupt, get it again") from error
