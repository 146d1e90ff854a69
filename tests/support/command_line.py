"""The command line as tests call it."""

from __future__ import annotations

import sys

import pytest
import torch

from f2d2_lightning.cli import main


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """What a user's process starts with; for the modules that import it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    yield
    torch.set_default_dtype(before)


def f2d2(*arguments):
    """The command line as a user's shell would call it; errors of a training are raised, as ``--debug`` does."""
    debug = ["--debug"] if arguments[0] in ("fit", "validate", "test", "predict") else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["f2d2", *map(str, arguments), *debug])
        patch.setenv("F2D2_DEBUG", "")
        main()
