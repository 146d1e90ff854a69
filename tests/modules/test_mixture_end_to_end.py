"""A student of an exact velocity, trained briefly, against the exact density: the whole path from data to log p."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.nn import PreconditionedMLP
from lightning_parts import trainer


@pytest.mark.slow
def test_a_student_of_the_exact_velocity_knows_the_density(tmp_path):
    torch.set_default_dtype(torch.float32)
    L.seed_everything(0, verbose=False)
    data = f2.data.GaussianMixture(count=20_000, batch_size=512)
    student = f2.F2D2Module(
        PreconditionedMLP((2,), covariance="full", width=64, blocks=2, expansion=2),
        (2,),
        data.flow,
        objective=f2.TrajectoryRegression(nodes=24, capacity=4_000, chunk=512, starts={"data": 0.6, "noise": 0.4}),
        estimator=f2.divergence.Exact(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99)),
        warmup=50,
    )
    trainer(tmp_path, max_epochs=None, max_steps=1000, gradient_clip_val=1.0, limit_val_batches=0).fit(
        student, datamodule=data
    )
    x = data.dataset("test").values
    truth = data.log_prob(x)
    for steps, tolerance in {8: 0.05, 4: 0.05, 2: 0.06, 1: 0.08}.items():
        with torch.no_grad():
            value = student.log_prob(x, steps).value
            made = student.sample(2000, steps, with_log_prob=True)
        assert abs(float((value - truth).mean())) < tolerance, steps
        assert float(torch.corrcoef(torch.stack((value, truth)))[0, 1]) > 0.97, steps
        # samples lie where the density is, and their own log p says so; the few that land between the components
        # are so unlikely that means would be about them alone
        own = data.log_prob(made.state)
        assert float((made.log_prob - own).abs().median()) < 0.15, steps
        assert abs(float(own.median() - truth.median())) < 0.15, steps
