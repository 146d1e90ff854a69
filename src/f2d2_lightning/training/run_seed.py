"""Random numbers that a run which is interrupted draws again."""

from __future__ import annotations

import os

import lightning as L
import torch

from f2d2_lightning.utils.seeding import mix_seed


class RunSeed:
    """Seeds of steps from (seed, epoch, batch, process): a resumed run draws what the uninterrupted one would have."""

    def __init__(self) -> None:
        self.value = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))

    def begin_step(self, trainer: L.Trainer, batch_index: int) -> None:
        """Seed the global random state."""
        torch.manual_seed(mix_seed(self.value, trainer.current_epoch, batch_index, trainer.global_rank))

    def structure(self, trainer: L.Trainer, batch_index: int) -> torch.Generator | None:
        """A generator that is the same on all processes, which may share a sharded network; ``None`` for one process.

        What it decides is how often the network is called.
        """
        if trainer.world_size == 1:
            return None
        seed = mix_seed(self.value, trainer.current_epoch, batch_index, "structure")
        return torch.Generator().manual_seed(seed)
