"""Posteriors of simulators in one to eight evaluations: flow matching on simulated pairs, distilled.

Three tasks of Lueckmann et al., "Benchmarking Simulation-Based Inference", 2021, https://arxiv.org/abs/2101.04653:
two moons, SLCP (simple likelihood, complex posterior) and a mixture of two Gaussians of one mean; references are drawn
exactly, those of SLCP by annealed Markov chains. For ten observations: how often a classifier tells samples from the
reference's (C2ST, .5 is best). Over fresh pairs: log p of the true parameters, how far it is from the teacher's, and
how far their ranks among samples are from uniform, beside how far chance brings them (simulation-based calibration).
Last the mode for the first observation, by gradients through the steps: its log p by the teacher. Minutes on one core;
``--steps 20`` shows that it runs.

    python examples/posterior.py --task slcp
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.metrics import c2st, calibration
from f2d2_lightning.nn import PreconditionedMLP

STEPS = (1, 2, 4, 8)


class Task(NamedTuple):
    """Parameters uniform on ``[-bound, bound]^dim``, a simulator ``(N, dim) -> (N, numbers)``, and a reference:
    samples of the posterior, by an observation ``(numbers,)`` and their number.
    """

    dim: int
    bound: float
    simulate: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor, int], Tensor]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Parameters from the prior, and observations."""
        return (theta := self.bound * (2 * torch.rand(count, self.dim) - 1)), self.simulate(theta)


def moon(count: int) -> Tensor:
    """Points of a crescent, ``(count, 2)``."""
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    return torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), -1)


def two_moons(theta: Tensor) -> Tensor:
    """A crescent, moved by two combinations of the parameters, one of which loses its sign."""
    a, b = theta.unbind(-1)
    return moon(len(theta)) + torch.stack((-(a + b).abs(), b - a), -1) / math.sqrt(2)


def two_moons_reference(x: Tensor, count: int) -> Tensor:
    """The move is one-to-one up to the sign: from points of the crescent back."""
    total, difference = ((moon(4 * count) - x) * math.sqrt(2)).unbind(-1)
    sign = 2.0 * torch.randint(2, total.shape) - 1
    theta = torch.stack((sign * total + difference, sign * total - difference), -1) / 2
    return theta[(total > 0) & (theta.abs() < 1).all(-1)][:count]


def mixture(theta: Tensor) -> Tensor:
    """Noise of deviation 1 or .1 around the parameters."""
    return theta + torch.where(torch.rand(len(theta), 1) < 0.5, 1.0, 0.1) * torch.randn_like(theta)


def mixture_reference(x: Tensor, count: int) -> Tensor:
    """The same noise, within the prior."""
    theta = mixture(x.expand(8 * count, 2))
    return theta[(theta.abs() < 10).all(-1)][:count]


def slcp_moments(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviations ``(N, 1, 2)`` and correlation ``(N, 1)`` of the four points that are seen."""
    return theta[:, None, :2], theta[:, None, 2:4].square().clamp(min=1e-6), torch.tanh(theta[:, None, 4])


def slcp(theta: Tensor) -> Tensor:
    """Four points of a Gaussian in the plane."""
    mean, deviation, correlation = slcp_moments(theta)
    first, second = torch.randn(2, len(theta), 4)
    second = correlation * first + (1 - correlation.square()).sqrt() * second
    return (mean + deviation * torch.stack((first, second), -1)).flatten(1)


def slcp_reference(x: Tensor, count: int) -> Tensor:
    """Annealed from the prior; chains move by differences of others and by the signs that are lost."""

    def log_likelihood(theta: Tensor) -> Tensor:
        mean, deviation, correlation = slcp_moments(theta)
        a, b = ((x.reshape(1, 4, 2) - mean) / deviation).unbind(-1)
        left = (1 - correlation.square()).clamp(min=1e-6)
        squared = (a.square() - 2 * correlation * a * b + b.square()) / left
        return -(0.5 * squared + 0.5 * left.log() + deviation.log().sum(-1)).sum(-1)

    theta, level = 3 * (2 * torch.rand(count, 5) - 1), 0.0
    value = log_likelihood(theta)
    while level < 1:
        low, high = 0.0, 1 - level
        for _ in range(30):  # so far that half of the chains count
            step = (low + high) / 2
            enough = 1 / (step * value).softmax(0).square().sum() > count / 2
            low, high = (step, high) if enough else (low, step)
        level = min(1.0, level + high)
        kept = torch.multinomial((high * value).softmax(0), count, replacement=True)
        theta, value = theta[kept], value[kept]
        for _ in range(200 if level == 1 else 20):
            one, other = torch.randint(count, (2, count))
            size = 0.75 * torch.exp(torch.randn(count, 1))
            moved = theta + size * (theta[one] - theta[other]) + 0.01 * torch.randn_like(theta)
            moved[:, 2:4] *= 2.0 * torch.randint(2, (count, 2)) - 1
            there = log_likelihood(moved)
            accepted = ((there - value) * level > torch.rand(count).log()) & (moved.abs() < 3).all(-1)
            theta, value = torch.where(accepted[:, None], moved, theta), torch.where(accepted, there, value)
    return theta


TASKS = {
    "two_moons": Task(2, 1.0, two_moons, two_moons_reference),
    "slcp": Task(5, 3.0, slcp, slcp_reference),
    "mixture": Task(2, 10.0, mixture, mixture_reference),
}


def train(module: f2.modules.FlowModule, data: f2.data.Pairs, steps: int) -> None:
    """Train quietly."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, num_sanity_val_steps=0, **off)
    trainer.fit(module, datamodule=data)


def learned(task: Task, data: f2.data.Pairs, steps: int, width: int) -> tuple[f2.FlowMatchingModule, f2.F2D2Module]:
    """A posterior and its few-step student."""
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99))  # noqa: E731
    network = PreconditionedMLP((task.dim,), width=width, blocks=3, condition=data.dataset("train").labels.shape[1])
    teacher = f2.FlowMatchingModule(network, optimizer=adam, ema_decay=0.998, reference=f2.Reference(steps=32))
    teacher.method = "heun2"
    train(teacher, data, steps)
    student = f2.F2D2Module(teacher=teacher, estimator=f2.divergence.Exact(), optimizer=adam, ema_decay=0.998)
    train(student, data, steps)
    return teacher, student


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
    parser.add_argument("--steps", type=int, default=4000, help="training steps, of teacher and of student")
    parser.add_argument("--pairs", type=int, default=50_000, help="simulations to train on")
    parser.add_argument("--width", type=int, default=128, help="of the network")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    task, short = TASKS[options.task], options.steps < 100
    data = f2.data.Pairs(*task.draw(options.pairs), val=0.01, test=0.01, batch_size=512)
    teacher, student = learned(task, data, options.steps, options.width)
    torch.manual_seed(1)
    count, (theta, x) = 200 if short else 10_000, task.draw(20 if short else 1000)
    observed, states = x[: 1 if short else 10], data.units.states(theta)
    references = [task.reference(one, count) for one in observed]
    truth = teacher.log_prob(states, cond=x).value
    for name, model, steps in (*((f"{k} step{'s' * (k > 1)}", student, k) for k in STEPS), ("teacher", teacher, 24)):
        made = (data.units.rows(model.sample(count, steps, one[None], seed=2).state) for one in observed)
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
