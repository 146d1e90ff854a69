"""Small trainers, modules and configurations for the tests of the Lightning side."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.nn import MLP

CONFIGS = Path(__file__).parents[2] / "configs"


class Pair(f2.data.FlowDataModule):
    """A few points of a rotated Gaussian."""

    shape = (2,)

    def __init__(self, count: int = 96, **kwargs: Any) -> None:
        super().__init__(batch_size=32, eval_batch_size=40, **kwargs)
        self.count = count

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(0)
        mix = torch.tensor([[1.0, 0.0], [0.8, 0.3]])
        draw = lambda n: torch.randn(n, 2, generator=generator) @ mix.T + torch.tensor([0.5, -1.0])  # noqa: E731
        return {"train": (draw(self.count), None), "val": (draw(50), None), "test": (draw(50), None)}


def trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*in eval mode.*|.*smaller than the logging.*")
    return L.Trainer(**(settings | kwargs))


def fit(folder: Path, module: L.LightningModule, *callbacks: L.Callback, data: Any = None, **kwargs: Any) -> L.Trainer:
    """Train as long as ``kwargs`` of the trainer say, one epoch by default; returns the trainer."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    run = trainer(folder, callbacks=list(callbacks), **({"max_epochs": 1} | kwargs))
    run.fit(module, datamodule=Pair() if data is None else data, ckpt_path=ckpt_path)
    return run


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of its weights and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    """Whether two modules, or copies of their weights, are equal bit for bit."""
    one, other = (value if isinstance(value, dict) else value.state_dict() for value in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def teacher(**kwargs: Any) -> f2.FlowMatchingModule:
    """An untrained teacher for :class:`Pair`."""
    torch.manual_seed(1)
    return f2.FlowMatchingModule(MLP((2,), width=16, blocks=1), warmup=2, **kwargs)


def student(of: Any = None, **kwargs: Any) -> f2.F2D2Module:
    """A student for :class:`Pair` with a small pool and a cheap reference."""
    settings: dict[str, Any] = {
        "objective": f2.TrajectoryRegression(nodes=8, capacity=64, refresh=8.0, chunk=16),
        "reference": f2.Reference(steps=8, probes=0),
        "warmup": 2,
    }
    torch.manual_seed(2)
    return f2.F2D2Module(teacher=of or teacher(), **(settings | kwargs))
