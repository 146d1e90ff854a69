"""What F2D2Callback adds to a training step of somebody else's LightningModule, as a ratio to the bare step.

Ratios within one run, bare, frozen and joint in turn, on the MeanFlow module of ``examples/`` (digits, batch 256): mean
time per step between two points of training past the initial fill of the trajectory pool, so that refreshing it, every
so many steps, is counted at its rate. The head's own cost and that of each objective are seen by themselves.

    python benchmarks/callback_overhead.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

import f2d2_lightning as f2
from f2d2_lightning.adapters import MeanFlow
from measuring import StepTimes, quiet_trainer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def semigroup() -> f2.objectives.Objective:
    return f2.objectives.Semigroup()


def step_seconds(make: Callable[[], list[L.Callback]], start: int, steps: int) -> float:
    from callback_on_existing_module import MeanFlowLightning

    L.seed_everything(0, verbose=False)
    data = f2.data.Digits(batch_size=256)
    batches = torch.cat(list(data.train_dataloader()))
    module = MeanFlowLightning(batches.mean(0), batches.std(0), start + steps)
    clock = StepTimes(start, time.perf_counter)
    quiet_trainer(start + steps, callbacks=[*make(), clock]).fit(module, datamodule=data)
    return clock.seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=64, help="steps timed per round; the pool is refreshed every 32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def callback(**kwargs: Any) -> Callable[[], list[L.Callback]]:
        return lambda: [f2.F2D2Callback("net", MeanFlow(directions="both"), **kwargs)]

    kinds: dict[str, Callable[[], list[L.Callback]]] = {
        "bare": list,
        "frozen, trajectory regression (the default)": callback(frozen=True),
        "joint, trajectory regression (the default)": callback(),
        "frozen, semigroup": lambda: callback(frozen=True, objective=semigroup())(),
        "joint, semigroup": lambda: callback(objective=semigroup())(),
    }
    start = 2048 // 256 + 4
    rounds = [{name: step_seconds(make, start, options.steps) for name, make in kinds.items()}
              for _ in range(options.rounds)]  # fmt: skip
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds")
    for name in kinds:
        ratios = [r[name] / r["bare"] for r in rounds]
        milliseconds = 1e3 * statistics.median(r[name] for r in rounds)
        print(f"  {name}: {milliseconds:.1f} ms a step, {statistics.median(ratios):.2f} times the bare one")


if __name__ == "__main__":
    main()
