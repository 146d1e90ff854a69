"""The posterior estimator FMPE of the package sbi on the tasks of ``examples/posterior.py``, for comparison.

Needs ``pip install sbi``. The same pairs (the same seed), a network as wide, sbi's own defaults otherwise: its learning
rate, batch, time embedding, early stopping on a tenth of the pairs. C2ST of its samples within the prior for the same
observations, and how many log-posteriors it gives a second. Then its network, in an adapter, is the teacher of a
few-step student, whose log-posteriors are held against those of sbi's own solver.

    python benchmarks/posterior_fmpe.py --task slcp
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

import f2d2_lightning as f2
from f2d2_lightning.adapters import FlowMatching
from f2d2_lightning.metrics import c2st
from f2d2_lightning.nn import PreconditionedMLP

EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    sys.path.insert(0, str(EXAMPLES))
    import posterior as example
    from posterior_tasks import TASKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="two_moons")
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2**31 - 1, help="at most")
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--scored", type=int, default=1000, help="samples of each observation whose log p is asked for")
    parser.add_argument("--steps", type=int, default=8000, help="training steps of the student")
    options = parser.parse_args()
    from sbi.inference import FMPE
    from sbi.neural_nets import posterior_flow_nn
    from sbi.utils import BoxUniform

    task = TASKS[options.task]
    torch.manual_seed(0)
    theta, x = task.draw(options.pairs)
    prior = BoxUniform(-task.bound * torch.ones(task.dim), task.bound * torch.ones(task.dim))
    network = posterior_flow_nn("mlp", hidden_features=options.width, num_layers=options.layers)
    inference = FMPE(prior, vf_estimator=network, show_progress_bars=False)
    begin = time.process_time()
    estimator = inference.append_simulations(theta, x).train(max_num_epochs=options.epochs)
    size = sum(p.numel() for p in estimator.parameters())
    print(f"{size:,} weights, {inference.summary['epochs_trained'][-1]} epochs, {time.process_time() - begin:.0f} s")
    posterior = inference.build_posterior(estimator)
    torch.manual_seed(1)
    _, seen = task.draw(1000)
    references = [task.reference(one, options.samples) for one in seen[: options.observations]]
    told, truth, points = [], [], []
    spent = 0.0
    for one, of in zip(seen, references, strict=False):
        made = posterior.sample((options.samples,), x=one, show_progress_bars=False)
        told.append(c2st(made, of))
        points.append(made[: options.scored])
        spent -= time.perf_counter()
        with torch.no_grad():
            truth.append(posterior.log_prob(points[-1], x=one))
        spent += time.perf_counter()
    rate = len(told) * options.scored / spent
    print(f"C2ST {fmean(told):.3f} (worst {max(told):.3f}), {rate:,.1f} log-probs a second", flush=True)

    data = f2.data.Pairs(theta, x, standardize=False, val=0.01, test=0.01, batch_size=512)
    velocity = FlowMatching("net(x, cond, s)", noise_time=1.0, data_time=0.0)(estimator.eval().requires_grad_(False))
    network = PreconditionedMLP((task.dim,), width=options.width, blocks=3, condition=x.shape[1])
    student = example.distilled(velocity, data, options.steps, network)
    for steps in (1, 2, 4, 8):
        told, errors, spent = [], [], 0.0
        for one, of, point, value in zip(seen, references, points, truth, strict=False):
            told.append(c2st(example.samples(student, one[None], steps, options.samples, task.bound), of))
            spent -= time.perf_counter()
            answer = student.log_prob(point, steps, one[None]).value.detach()
            spent += time.perf_counter()
            errors.append(float((answer - value).abs().mean() / value.std()))
        rate = len(told) * options.scored / spent
        text = f"student of it, {steps} steps: C2ST {fmean(told):.3f} (worst {max(told):.3f}), log p off by "
        text += f"{fmean(errors):.3f} of the spread, {rate:,.0f} a second"
        print(text, flush=True)


if __name__ == "__main__":
    main()
