"""LightningModules as somebody else writes them: they know nothing of this package."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


def of_pytorch_lightning() -> types.ModuleType:
    """This file as it is written with ``import pytorch_lightning``, whose classes are others."""
    written = types.ModuleType("written")
    source = Path(__file__).read_text(encoding="utf-8")
    exec(source.replace("import lightning as L", "import pytorch_lightning as L"), vars(written))
    return written


class MeanNet(nn.Module):
    """A MeanFlow network: ``net(x, (t, h), aug_cond)``, time runs down."""

    def __init__(self, dim: int = 2, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.time = nn.Linear(2, width)
        self.inlet = nn.Linear(dim, width)
        self.middle = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.Dropout(dropout), nn.SiLU())
        self.outlet = nn.Linear(width, dim)

    def forward(self, x: Tensor, times: tuple[Tensor, Tensor], aug_cond: Tensor | None = None) -> Tensor:
        time = self.time(torch.stack(times, -1).to(x.dtype))
        return self.outlet(self.middle(self.inlet(x.flatten(1)) + time)).reshape(x.shape)


class MeanFlowModule(L.LightningModule):
    """Plain MeanFlow by finite differences: automatic optimisation, a schedule, a loss in a tensor or a dictionary."""

    def __init__(
        self,
        schedule: str | None = None,
        as_dict: bool = False,
        compiled: bool = False,
        dropout: float = 0.0,
        dim: int = 2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        self.net = MeanNet(dim, dropout=dropout)
        if compiled:
            self.net = torch.compile(self.net, backend="eager")
        self.schedule, self.as_dict = schedule, as_dict

    def loss(self, batch: Any) -> Tensor:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        noise, t = torch.randn_like(x), torch.rand(len(x)).to(x)
        z = (1 - t)[:, None] * x + t[:, None] * noise
        return (self.net(z, (t, torch.zeros_like(t))) - (noise - x)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return {"loss": loss, "other": 1.0} if self.as_dict else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedulers = torch.optim.lr_scheduler
        if self.schedule == "lambda":
            return [optimizer], [schedulers.LambdaLR(optimizer, [lambda step: 0.9**step])]
        if self.schedule == "onecycle":
            scheduler: Any = schedulers.OneCycleLR(optimizer, 1e-2, total_steps=self.hparams.get("total", 100))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        if self.schedule == "cosine":
            return [optimizer], [schedulers.CosineAnnealingLR(optimizer, 10)]
        return optimizer


class ManualModule(MeanFlowModule):
    """Two networks and two optimisers, as a GAN has: manual optimisation."""

    def __init__(self, toggle: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.critic = nn.Linear(2, 1)
        self.toggle = toggle

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic_optimizer, optimizer = self.optimizers()
        if self.toggle:
            self.toggle_optimizer(critic_optimizer)
        critic_optimizer.zero_grad()
        self.manual_backward(self.critic(batch).square().mean())
        critic_optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(critic_optimizer)
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.critic.parameters(), 1e-3), torch.optim.AdamW(self.net.parameters(), 1e-2)


def callback(**kwargs: Any) -> Any:
    """The one line, with a small objective."""
    import f2d2_lightning as f2
    from f2d2_lightning.adapters import MeanFlow

    directions = kwargs.pop("directions", "both")
    settings: dict[str, Any] = {
        "flow_map": "net",
        "adapter": MeanFlow(directions=directions),
        "objective": f2.TrajectoryRegression(
            nodes=8, capacity=64, refresh=8.0, chunk=16, intervals=f2.Intervals(directions)
        ),
        "reference": f2.Reference(steps=8, probes=0),
        "steps": (1, 2),
    }
    return f2.F2D2Callback(**(settings | kwargs))
