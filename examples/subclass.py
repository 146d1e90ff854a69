"""Few-step likelihoods by subclassing: a student of a velocity known in closed form.

Overrides three hooks of :class:`f2d2_lightning.F2D2Module`: what validation compares with, where targets come from, and
what a batch looks like. Takes about two minutes on two cores; ``--steps 20`` shows that it runs.

    python examples/subclass.py
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.nn import PreconditionedMLP


class MixtureStudent(f2.F2D2Module):
    """A student whose teacher is the exact velocity of a Gaussian mixture."""

    def __init__(self, mixture: f2.flows.MixtureFlow, **kwargs: Any) -> None:
        backbone = PreconditionedMLP((2,), width=128, blocks=3, expansion=2)
        super().__init__(flow_map=backbone, **kwargs)
        self.mixture = mixture

    def teacher_velocity(self) -> Any:
        """What validation compares with."""
        return self.mixture.velocity

    def make_source(self) -> tuple[f2.objectives.VelocitySource, f2.objectives.VelocitySource]:
        """Targets with the exact divergence: two dimensions are few."""
        source = f2.objectives.TeacherSource(self.mixture.velocity, f2.divergence.Exact())
        return source, source

    def data_to_state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Batches are points in the plane, without labels."""
        return super().data_to_state(batch if isinstance(batch, Tensor) else batch[0])


def main() -> None:
    """Train, and compare with the exact density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    data = f2.data.GaussianMixture(batch_size=512)
    student = MixtureStudent(
        data.flow,
        objective=f2.TrajectoryRegression(nodes=40, capacity=16_000, chunk=512, starts={"data": 0.6, "noise": 0.4}),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99)),
        reference=f2.Reference(steps=100, probes=0),
    )
    trainer = L.Trainer(
        max_steps=options.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(student, datamodule=data)

    x = data.dataset("test").values
    truth = data.log_prob(x)
    print(f"{len(x)} test points, true mean log p {float(truth.mean()):.4f} nats")
    for steps in (1, 2, 4, 8):
        with torch.no_grad():
            value = student.log_prob(x, steps).value
        r = float(torch.corrcoef(torch.stack((value, truth)))[0, 1])
        mean, error = float(value.mean()), float((value - truth).mean())
        print(f"{steps} steps: log p {mean:.4f}, error {error:+.4f}, r {r:.4f}")


if __name__ == "__main__":
    main()
