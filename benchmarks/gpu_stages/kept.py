"""Results of a stage, on disk from the first one on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from f2d2_lightning.utils.files import whole_file

DONE = "seconds of the stage"
"""Only a stage that has ended has it."""


class Kept:
    """A dictionary in a JSON file.

    Args:
        path: The file.
        again: Begin with nothing.
    """

    def __init__(self, path: Path, again: bool = False) -> None:
        self.path = path
        self.result: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not again else {}

    def part(self, name: str) -> dict[str, Any]:
        """One of its dictionaries, empty at first."""
        found: dict[str, Any] = self.result.setdefault(name, {})
        return found

    def save(self) -> None:
        """Write the file, whole or not at all."""
        with whole_file(self.path) as partial:
            Path(partial).write_text(json.dumps(self.result, indent=1))
