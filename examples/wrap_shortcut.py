"""Likelihoods of a shortcut model that was trained without any: wrap it, train it both ways, ask.

The model (``third_party_models.py``) knows nothing of this package. An adapter says how it is called, ``interval=``
gives it the sign of the step that its logarithm of a length cannot say, and a head learns the divergence. Takes about
three minutes on two cores; ``--steps 20`` shows that it runs.

    python examples/wrap_shortcut.py
"""

from __future__ import annotations

import argparse
import copy

import lightning as L
import torch
from third_party_models import train_shortcut
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.adapters import Shortcut

SHAPE, LEVELS = (1, 8, 8), 17


def main() -> None:
    """Train somebody's shortcut model, wrap it, and compare with the likelihood of its own velocity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="training steps, of the model and again of the wrapped")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    data = f2.data.Digits(batch_size=256)
    images, quantization = data.dataset("train").values, f2.Quantization(LEVELS)

    def draw() -> Tensor:
        return quantization.dequantize(images[torch.randint(len(images), (256,))])

    # somebody else's model: net(x, t, dt), dt > 0
    many = torch.cat([draw() for _ in range(40)])
    network = train_shortcut(draw, many.mean(0), many.std(0), options.steps)

    # the wrapper: the model was trained for steps of 1/128 and longer
    adapter = Shortcut(second_time="length", shortest_length=1 / 128)
    teacher = adapter(network)
    wrapped = adapter(copy.deepcopy(network).requires_grad_(True), interval="perceptron.time_embedding")
    head = f2.DivergenceHead(
        wrapped.probe(draw()[:2]), layers=0, per_axis=True, baseline=f2.GaussianBaseline(SHAPE, "diagonal")
    )
    student = f2.F2D2Module(
        wrapped,
        SHAPE,
        teacher=teacher,
        head=head,
        levels=LEVELS,
        objective=f2.TrajectoryRegression(
            nodes=20,
            capacity=6000,
            starts={"data": 0.1, "perturbed": 0.1, "mixed": 0.25, "path": 0.05, "noise": 0.5},
            quantization=quantization,
        ),
        warmup=100,
        ema_decay=0.995,
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

    x = next(iter(data.test_dataloader()))
    reference = f2.bits_per_dim(f2.Reference(steps=100, probes=1)(teacher, x).value, 64, LEVELS)
    print(f"{len(x)} test images, the model's own velocity in 200 evaluations: {float(reference.mean()):.3f} bits/dim")
    for steps in (1, 2, 4, 8):
        with torch.no_grad():
            value = f2.bits_per_dim(student.log_prob(x, steps).value, 64, LEVELS)
            made = student.sample(200, steps, with_log_prob=True)
        gap, r = float((value - reference).mean()), float(torch.corrcoef(torch.stack((value, reference)))[0, 1])
        own = float(made.log_prob.mean())
        print(f"{steps} steps: {float(value.mean()):.3f} bits/dim, gap {gap:+.3f}, r {r:.3f}; samples' log p {own:.2f}")


if __name__ == "__main__":
    main()
