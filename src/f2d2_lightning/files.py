"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["refuse_to_overwrite", "whole_file"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write what is to be at ``path``: it is moved there once written, over an older one; makes the folder.

    An interrupted or failed write leaves what was there before, and nothing beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    """Raise :class:`FileExistsError` if a file is there and was not given up."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; choose another --out, or say --overwrite true")
