"""Official files over the network, only when asked for, whole and with their checksum."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from f2d2_lightning.data.images._cache import write_once
from f2d2_lightning.utils.files import whole_file

CHUNK = 1 << 20
TIMEOUT = 60.0
"""Seconds without a byte after which a connection is given up."""


@dataclass(frozen=True)
class Source:
    """An official file."""

    url: str
    """Where it is."""
    md5: str
    """Its checksum, as the data set's authors or torchvision give it."""


def fetch(source: Source, path: str | Path) -> None:
    """Bring a file to ``path``, if none is there. An interrupted or wrong download leaves nothing behind.

    An address that does not answer is a ``FileNotFoundError``, another checksum than expected a ``ValueError``.
    """
    path = Path(path)
    try:
        write_once(path, lambda: _fetch(source, path))
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{source.url} cannot be brought to {path} ({error}); get it by other means, with MD5 {source.md5}, and "
            "put it there"
        ) from error


def _fetch(source: Source, path: Path) -> None:
    checksum, size = hashlib.md5(usedforsecurity=False), 0
    request = urllib.request.Request(source.url, headers={"User-Agent": "f2d2-lightning"})
    with whole_file(path) as partial:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, partial.open("wb") as file:
            while chunk := answer.read(CHUNK):
                checksum.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if checksum.hexdigest() != source.md5:
            raise ValueError(
                f"{source.url} gave {size} bytes with MD5 {checksum.hexdigest()}, and {source.md5} is expected: the "
                f"connection broke, or the address gives another file now; nothing was kept. Try again, or get the "
                f"file by other means and put it at {path}"
            )
