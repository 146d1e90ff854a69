"""Somebody's MeanFlow LightningModule on digits, then the same with one line more, which gives it log-likelihoods.

``MeanFlowLightning`` knows nothing of this package, and its code is the same in both runs. Takes about three minutes
on two cores; ``--steps 20`` shows that it runs.

    python examples/callback_on_existing_module.py
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from third_party_models import MeanFlowNet, meanflow_loss
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.adapters import MeanFlow


class MeanFlowLightning(L.LightningModule):
    """MeanFlow as its authors' followers train it: a network, a loss, an optimiser, a schedule."""

    def __init__(self, mean: Tensor, std: Tensor, total_steps: int) -> None:
        super().__init__()
        self.net = MeanFlowNet(mean, std, dropout=0.1)
        self.total_steps = total_steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """MeanFlow's own loss."""
        loss = meanflow_loss(self.net, batch)
        self.log("train/meanflow", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The same loss on other images."""
        self.log("val/meanflow", meanflow_loss(self.net, batch))

    def configure_optimizers(self) -> Any:
        """AdamW, one cycle."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.5, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=self.total_steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(steps: int, callbacks: list[L.Callback]) -> tuple[MeanFlowLightning, L.Trainer]:
    """Train with given callbacks."""
    L.seed_everything(0, verbose=False)
    data = f2.data.Digits(batch_size=256)
    batches = torch.cat(list(data.train_dataloader()))
    module = MeanFlowLightning(batches.mean(0), batches.std(0), steps)
    trainer = L.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


def main() -> None:
    """Train without and with the callback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="training steps of each run")
    options = parser.parse_args()

    _, plain = train(options.steps, [])

    f2d2 = f2.F2D2Callback("net", MeanFlow(directions="both"), levels=17)  # the line
    if options.steps < 100:
        f2d2.reference, f2d2.reference_samples = f2.Reference(steps=8), 4
    _, trainer = train(options.steps, [f2d2])

    losses = [float(t.callback_metrics["val/meanflow"]) for t in (plain, trainer)]
    print(f"MeanFlow's own validation loss: {losses[0]:.3f} without the callback, {losses[1]:.3f} with it")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    reference = metrics["val/f2d2_reference_nll"]
    print(f"its own velocity, integrated finely: {reference:.3f} bits/dim on validation images")
    torch.manual_seed(0)
    for steps in (1, 2, 4, 8):
        nll, gap, r = (metrics[f"val/f2d2_{name}_{steps}"] for name in ("nll", "gap", "correlation"))
        with torch.no_grad():
            samples = f2d2.sample(200, steps, with_log_prob=True)
        assert samples.log_prob is not None
        own = float(samples.log_prob.mean())
        print(f"{steps} steps: {nll:.3f} bits/dim, gap {gap:+.3f}, r {r:.3f}; samples' log p {own:.2f}")


if __name__ == "__main__":
    main()
