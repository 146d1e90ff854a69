"""Importance weights for a target of known energy: what a Boltzmann generator needs the likelihood of its samples for.

Samples of a double well train a flow and its few-step student, but from both wells alike: how much of each there is,
they do not say. Samples of the student come with their log-likelihood ``log q`` at no further evaluation. Weights
``exp(-U) / q`` put the populations right, and their mean is the partition function ``Z`` (Noé et al., "Boltzmann
generators", 2019, https://doi.org/10.1126/science.aaw1147). Here everything is known by quadrature.

``log q`` of a few-step student is what its head has learned the teacher's density to be, not the density of its own
jumps. The effective sample size (ESS) does not notice a wrong ``q``; ``log Z`` does. So the head goes on, with the map
as it is, until it answers that density, and every line has weights by both heads and by the exact determinants,
which few dimensions allow. Takes about four minutes on one core; ``--steps 20`` shows that it runs.

    python examples/double_well.py
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.likelihood import ImportanceWeights
from f2d2_lightning.nn import PreconditionedMLP


class DoubleWell(f2.data.FlowDataModule):
    """``U(x, y) = (x^2 - 3)^2 / 2 + x / 5 + 4 (y - x^2 / 4)^2``, in units of ``kT``, and exact samples of each well.

    Two curved wells around ``x = -1.7`` and ``x = 1.7``, a barrier of 4.5 between them, the left one deeper. Samples
    are from each well half of the time, as simulations that never cross the barrier would be: the flow learns the
    shapes of the wells, and only the weights know how much of each there is.
    """

    shape = (2,)

    def __init__(self, count: int = 50_000, batch_size: int = 512) -> None:
        super().__init__(batch_size)
        self.count = count
        # cells of a grid outside of which exp(-U) is below 1e-15 of its maximum
        x, y = torch.linspace(-3.5, 3.5, 1001, dtype=torch.float64), torch.linspace(-3, 6, 1001, dtype=torch.float64)
        self.centers = torch.cartesian_prod((x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2)
        self.cell = torch.stack((x[1] - x[0], y[1] - y[0]))
        self.density = (-self.energy(self.centers)).exp()
        self.in_left = self.centers[:, 0] < 0
        self.log_z = float((self.density.sum() * self.cell.prod()).log())
        self.left = float(self.density[self.in_left].sum() / self.density.sum())

    @staticmethod
    def energy(x: Tensor) -> Tensor:
        """``(B, 2) -> (B,)``."""
        x, y = x.unbind(-1)
        return (x.square() - 3).square() / 2 + x / 5 + 4 * (y - x.square() / 4).square()

    @property
    def attainable_ess(self) -> float:
        """Effective sample size of a flow that is exactly as its training samples are, as a share."""
        return 0.5 / (self.left**2 + (1 - self.left) ** 2)

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """A well, a cell of it by probability, a uniform point in the cell."""
        generator = torch.Generator().manual_seed(self.seed)
        share = torch.where(self.in_left, 1 / self.left, 1 / (1 - self.left))
        cumulative = (self.density * share).cumsum(0)

        def draw(count: int) -> Tensor:
            uniform = cumulative[-1] * torch.rand(count, generator=generator, dtype=torch.float64)
            cells = torch.searchsorted(cumulative, uniform).clamp_max(len(cumulative) - 1)
            inside = torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5
            return (self.centers[cells] + inside * self.cell).float()

        return {name: (draw(count), None) for name, count in {"train": self.count, "val": 1000, "test": 1000}.items()}


def train(module: f2.modules.FlowModule, data: DoubleWell, steps: int) -> None:
    """Train quietly."""
    trainer = L.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)


def main() -> None:
    """Train teacher and student, reweigh their samples, and compare with quadrature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="training steps, of teacher and of student")
    parser.add_argument("--count", type=int, default=10_000, help="samples that are reweighed")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    data = DoubleWell()
    # samples are what counts here, so the map goes one way
    backbone = PreconditionedMLP((2,), width=96, blocks=2, expansion=2, directions="to_data")
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99))  # noqa: E731
    settings = {"optimizer": adam, "ema_decay": 0.998}
    teacher = f2.FlowMatchingModule(backbone, **settings)
    train(teacher, data, options.steps)
    student = f2.F2D2Module(teacher=teacher, **settings)
    train(student, data, options.steps)
    # the same samples; the head goes on, from the teacher's density to that of the jumps themselves
    volume = f2.objectives.VolumeRegression(capacity=50_000, chunk=2048)
    own = f2.F2D2Module(student.average, frozen=True, objective=volume, **settings)
    train(own, data, options.steps // 2)

    def say(name: str, x: Tensor, log_densities: dict[str, Tensor]) -> None:
        in_left = x[:, 0] < 0
        text = f"log p {float(next(iter(log_densities.values())).mean()):.3f}"
        text += f", left well unweighted {float(in_left.double().mean()):.3f}"
        for source, log_q in log_densities.items():
            weights = ImportanceWeights(-data.energy(x.double()), log_q)
            log_z, log_z_error = weights.log_normalizer
            text += f"; by the {source} {float(weights.mean(in_left).value):.3f}"
            text += f", ESS {float(weights.effective_sample_size) / len(x):.3f}"
            text += f", log Z error {float(log_z) - data.log_z:+.4f} ± {float(log_z_error):.4f}"
        print(f"{name}: {text}")

    noise = torch.randn(options.count, 2, generator=torch.Generator().manual_seed(1))
    print(f"by quadrature: log Z {data.log_z:.4f}, left well {data.left:.3f}, attainable ESS {data.attainable_ess:.3f}")
    with torch.no_grad():
        made = f2.reference_sample(teacher.average.velocity, noise, steps=25)
        log_q = f2.reference_log_prob(teacher.average.velocity, made.state, steps=25).value
        say("teacher, 100 evaluations", made.state, {"ODE": log_q})
        for steps in (1, 2, 4, 8):
            few, told = (module.sample(noise, steps, with_log_prob=True) for module in (student, own))
            exact = student.sample(noise, steps, with_log_prob=True, determinant="exact").log_prob
            name = f"{steps} step{'s' if steps > 1 else ''}"
            say(name, few.state, {"head": few.log_prob, "own head": told.log_prob, "determinants": exact})


if __name__ == "__main__":
    main()
