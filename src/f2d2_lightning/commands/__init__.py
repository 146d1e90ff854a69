"""``f2d2 sample`` and ``f2d2 nll``: what a trained student is for."""

from __future__ import annotations

from f2d2_lightning.commands.nll import nll_command
from f2d2_lightning.commands.sample import sample_command

__all__ = ["nll_command", "sample_command"]
