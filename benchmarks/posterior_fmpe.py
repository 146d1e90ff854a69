"""The posterior estimator FMPE of the package sbi on the tasks of ``examples/posterior.py``, for comparison.

Needs ``pip install sbi``. The same pairs (the same seed), as many numbers in the network, sbi's own defaults otherwise:
its learning rate, batch, time embedding, early stopping on a tenth of the pairs. C2ST of its samples for the same
observations, the log-posterior of the true parameters, and how many of those it gives a second.

    python benchmarks/posterior_fmpe.py --task slcp
"""

from __future__ import annotations

import argparse
import runpy
import time
from pathlib import Path

import torch

from f2d2_lightning.metrics import c2st

EXAMPLE = Path(__file__).parent.parent / "examples" / "posterior.py"


def main() -> None:
    example = runpy.run_path(str(EXAMPLE))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=example["TASKS"], default="two_moons")
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2**31 - 1, help="at most")
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--scored", type=int, default=1000, help="parameters of one observation whose log p is timed")
    options = parser.parse_args()
    from sbi.inference import FMPE
    from sbi.neural_nets import posterior_flow_nn
    from sbi.utils import BoxUniform

    task = example["TASKS"][options.task]
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
    told = []
    for one in seen[: options.observations]:
        made = posterior.sample((options.samples,), x=one, show_progress_bars=False)
        told.append(c2st(made, task.reference(one, options.samples)))
    print(f"C2ST {sum(told) / len(told):.3f} (worst {max(told):.3f})")
    made = made[: options.scored]
    begin = time.perf_counter()
    with torch.no_grad():
        value = posterior.log_prob(made, x=seen[options.observations - 1])
    print(f"{options.scored / (time.perf_counter() - begin):,.1f} log-probs a second, mean {float(value.mean()):.3f}")


if __name__ == "__main__":
    main()
