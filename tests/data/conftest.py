"""Data sets whose sizes are those of the files that tests make."""

import pytest

from f2d2_lightning.data.images import imagenet


@pytest.fixture
def small_imagenet(monkeypatch):
    """23 training and 6 validation images are all there are."""
    for name in ("BATCH_COUNTS", "PICTURE_COUNTS"):
        monkeypatch.setattr(imagenet, name, {"train": 23, "valid": 6})
