"""Models in files, of which nothing is run."""

from __future__ import annotations

from f2d2_lightning.checkpoints import foreign
from f2d2_lightning.checkpoints.export import load_joint, save_joint
from f2d2_lightning.checkpoints.pretrained import from_pretrained, read_description, save_pretrained

__all__ = ["foreign", "from_pretrained", "load_joint", "read_description", "save_joint", "save_pretrained"]
