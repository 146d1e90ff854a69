"""``f2d2``: the command line."""

from __future__ import annotations

from f2d2_lightning.cli._main import F2D2CLI, main
from f2d2_lightning.cli.nll import nll_command
from f2d2_lightning.cli.sample import sample_command

__all__ = ["F2D2CLI", "main", "nll_command", "sample_command"]
