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
    """The command line as a user's shell would call it."""
    before, sys.argv = sys.argv, ["f2d2", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before
