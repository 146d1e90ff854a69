"""Posteriors of simulators in one to eight evaluations: flow matching on simulated pairs, distilled.

The tasks are those of ``posterior_tasks.py``. For ten observations: how often a classifier tells samples within the
prior from the reference's (C2ST, .5 is best). Over fresh pairs: log p of the true parameters, how far it is from the
teacher's, and how far their ranks among samples are from uniform, beside how far chance brings them (simulation-based
calibration). Last the mode for the first observation, by gradients through the steps: its log p by the teacher. Minutes
on one core; ``--steps 20`` shows that it runs.

    python examples/posterior.py --task slcp
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from posterior_tasks import TASKS, within
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.flows import FlowMap
from f2d2_lightning.metrics import c2st, calibration
from f2d2_lightning.nn import PreconditionedMLP

STEPS = (1, 2, 4, 8)


def train(module: f2.modules.FlowModule, data: f2.data.Pairs, steps: int) -> None:
    """Train quietly."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, num_sanity_val_steps=0, **off)
    trainer.fit(module, datamodule=data)


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Of teacher and student."""
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99))


def posterior(network: FlowMap, data: f2.data.Pairs, steps: int) -> f2.FlowMatchingModule:
    """The teacher: flow matching on pairs."""
    teacher = f2.FlowMatchingModule(network, optimizer=adam, ema_decay=0.998)
    teacher.method = "heun2"
    train(teacher, data, steps)
    return teacher


def distilled(teacher: Any, data: f2.data.Pairs, steps: int, network: FlowMap | None = None) -> f2.F2D2Module:
    """Its few-step student, by default of the same network."""
    student = f2.F2D2Module(network, teacher=teacher, estimator=f2.divergence.Exact(), optimizer=adam, ema_decay=0.998)
    train(student, data, steps)
    return student


def samples(
    model: Any, x: Tensor, steps: int, count: int, bound: float, rows: Callable[[Tensor], Tensor] = lambda state: state
) -> Tensor:
    """Of the posterior of ``x``, ``(1, numbers)``, within the prior."""
    return within(bound, count, lambda: rows(model.sample(count, steps, x).state.detach()))


def mode(student: f2.F2D2Module, x: Tensor, steps: int, rounds: int) -> Tensor:
    """The most likely state ``(1, dim)`` given an observation ``(1, numbers)``, uphill from fifty samples."""
    state = student.sample(50, steps, x, seed=4).state.requires_grad_(True)
    optimizer = torch.optim.Adam([state], lr=0.02)
    for _ in range(rounds):
        (gradient,) = torch.autograd.grad(-student.log_prob(state, steps, x).value.sum(), state)
        state.grad = gradient
        optimizer.step()
    value = student.log_prob(state.detach(), steps, x).value
    return state.detach()[value.argmax()][None]


def main() -> None:
    """Train, and compare with references."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="two_moons")
    parser.add_argument("--steps", type=int, default=8000, help="training steps, of teacher and of student")
    parser.add_argument("--pairs", type=int, default=50_000, help="simulations to train on")
    parser.add_argument("--width", type=int, default=128, help="of the network")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    task, short = TASKS[options.task], options.steps < 100
    data = f2.data.Pairs(*task.draw(options.pairs), val=0.01, test=0.01, batch_size=512)
    network = PreconditionedMLP((task.dim,), width=options.width, blocks=3, condition=data.read()[1].shape[1])
    teacher = posterior(network, data, options.steps)
    student = distilled(teacher, data, options.steps)
    torch.manual_seed(1)
    count, (theta, x) = 200 if short else 10_000, task.draw(20 if short else 1000)
    observed, states = x[: 1 if short else 10], data.units.states(theta)
    references = [task.reference(one, count) for one in observed]
    truth = teacher.log_prob(states, cond=x).value
    for name, model, steps in (*((f"{k} step{'s' * (k > 1)}", student, k) for k in STEPS), ("teacher", teacher, 50)):
        made = (samples(model, one[None], steps, count, task.bound, data.units.rows) for one in observed)
        told = [c2st(part, of) for part, of in zip(made, references, strict=True)]
        drawn = model.sample(100 * len(x), steps, x, seed=3, batch_size=10_000).state.unflatten(0, (len(x), 100))
        ranks = calibration(drawn, states)
        text = f"{name}: C2ST {sum(told) / len(told):.3f} (worst {max(told):.3f}), "
        text += f"ranks off by {float(ranks.distance.max()):.3f} of {ranks.band:.3f}, log p "
        begin = time.perf_counter()
        value = truth if model is teacher else student.log_prob(states, steps, x).value.detach()
        rate, error = len(x) / (time.perf_counter() - begin), float((value - truth).abs().mean())
        text += f"{float(value.mean()) - data.log_scale:.3f}"
        if model is student:
            best = teacher.log_prob(mode(student, observed[:1], steps, 5 if short else 100), cond=observed[:1]).value
            text += f", off by {error:.4f} ({error / float(truth.std()):.3f} of its spread), {rate:,.0f} a second"
            text += f", of the mode {float(best) - data.log_scale:.3f}"
        print(text, flush=True)


if __name__ == "__main__":
    main()
