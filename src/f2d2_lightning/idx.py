"""IDX files, the format of MNIST and its relatives (http://yann.lecun.com/exdb/mnist/)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_idx"]

UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> Tensor:
    """Array of unsigned bytes in an IDX file, plain or gzipped, ``uint8``, shape as the file says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not IDX, holds another type than unsigned bytes, or is truncated or corrupt.
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a truncated or corrupt gzip file ({error}); get it again") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path} does not begin as an IDX file does (it has {content[:4].hex(' ') or 'no bytes'})")
    kind, axes = content[2], content[3]
    if kind != UNSIGNED_BYTE:
        raise ValueError(f"{path} holds numbers of IDX type 0x{kind:02x}; unsigned bytes (0x08) are expected")
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(f"{path} ends within its head ({len(content)} bytes); it is truncated, get it again")
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, and holds {len(content) - start}; "
            "it is truncated or corrupt, get it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
