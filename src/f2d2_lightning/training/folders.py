"""Where a run keeps its files, and names beside those that are taken."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """The first logger's folder, else the trainer's. All processes must ask: the first one's answer is broadcast."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def unused(folder: Path, number: int = 0) -> Path:
    """``folder``, or the first of ``folder-1``, ``folder-2``, ... that is not there yet, or is empty.

    The first number that is tried is ``number``; 0 is ``folder`` itself.
    """
    while True:
        free = folder.with_name(f"{folder.name}-{number}") if number else folder
        if not free.exists() or (free.is_dir() and not any(free.iterdir())):
            return free
        number += 1
