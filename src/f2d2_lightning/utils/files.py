"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write what is to be at ``path``: it is moved there once written, over an older one; makes the folder.

    An interrupted or failed write leaves what was there before, and nothing beside it. Of several writers at once each
    has a name of its own, and the last to end has the place. A process that is killed leaves ``NAME.part-...``. A file
    may be read by whom any new file of this process may be, whatever its writer made of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # all that is random is in the last suffix: torch.save writes what is before it into the file
    partial = path.with_name(f"{path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
    partial.touch()
    mode = partial.stat().st_mode
    partial.unlink()
    try:
        yield partial
        if partial.is_file():
            # safetensors keeps what it writes from everyone else
            partial.chmod(mode)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def held(path: Path) -> IO[bytes] | None:
    """A file of this process alone until it is closed, by whatever end of the process too; says who has it.

    ``None`` where the file system knows no such thing; :class:`BlockingIOError`, with what the file says, if another
    process has it. Makes the folder.
    """
    if sys.platform == "win32":
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # without a buffer, which a full disk would let fail once more when it is closed
        file = path.open("a+b", buffering=0)
    except OSError:
        return None
    try:
        # forked processes, such as a loader's workers, do not have it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        said = file.read().decode(errors="replace")
        file.close()
        raise BlockingIOError(said) from error
    except OSError:
        file.close()
        return None
    return file


def released(file: IO[bytes] | None) -> None:
    """Give up what :func:`held` gave, and its folder if nothing else is in it."""
    if file is not None:
        path = Path(file.name)
        with suppress(OSError):
            path.unlink()
        file.close()
        with suppress(OSError):
            path.parent.rmdir()


def sync(path: Path) -> None:
    """Bring a file's content to the disk: without, a crash of the machine could leave a new name with nothing in it."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def remove_partial(path: Path) -> None:
    """Remove what killed processes left of a file; only for who alone may write it now."""
    for left in path.parent.iterdir():
        if left.name.startswith(f"{path.name}.part-"):
            left.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool) -> None:
    """An ``OSError`` where no file can be written, or one is that was not given up: to be asked before the work."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; choose another --out, or say --overwrite true")
    folder = next(above for above in path.absolute().parents if above.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written, as {folder} is a file; choose another --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written, as {folder} may not be written to; choose another --out")
