"""Time and memory of this package's training steps beside the official recipe's, per regression target.

The official step (``official/step.py``) makes two targets of each of its ``--batch`` images; every recipe here makes
one of each of twice as many, so both sides regress the same network on the same number of targets with the same
optimiser. Times are medians taken in turn, and ratios are within one run. Memory is the most that a step holds beyond
what is held between steps; what is held between them (weights, average, teacher, optimiser, a full pool) has its own
column. The official recipe is float32, or the ``--official-dtype``; all other options are for this package's.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --network unet --batch 256 --dtype bf16 --channels-last --compile
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.modules._compile import compile_network
from f2d2_lightning.modules.ema import copy_frozen, update_average
from f2d2_lightning.objectives import TrajectoryRegression
from measuring import NETWORKS, dtype_of, make_joint, markdown, medians, peak_mib, resident_mib, wake
from official.step import OfficialRecipe

FULL, PATH = "trajectory regression, full pool", "trajectory regression, a whole path"
GOALS = "Goals: time at most 0.50, memory at most 0.60; on a GPU, Conditional with bf16 at most 0.25 of the time"


@dataclass(frozen=True)
class Setting:
    """What is measured on."""

    network: str = "resnet"
    batch: int = 32
    resolution: int = 28
    channels: int = 1
    width: int = 32
    nodes: int = 16
    device: str = "cpu"
    dtype: str = "float32"
    official_dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        told: dict[str, dict[str, Any]] = {
            "network": {"choices": NETWORKS},
            "batch": {"help": "images of an official step, two targets each"},
            "nodes": {"help": "of a trajectory"},
            "dtype": {"choices": ("float32", "bf16"), "help": "autocast of our recipes"},
            "official_dtype": {"choices": ("float32", "bf16", "fp16"), "help": "autocast of the official recipe"},
            "channels_last": {"help": "memory format of our networks"},
            "compile": {"help": "our networks"},
        }
        for field in fields(cls):
            kind: dict[str, Any] = {"action": "store_true"}
            if not isinstance(field.default, bool):
                kind = {"type": type(field.default), "default": field.default}
            parser.add_argument(f"--{field.name.replace('_', '-')}", **kind, **told.get(field.name, {}))

    def make_networks(self) -> tuple[f2.JointFlowMap, f2.FlowMap]:
        """Student and teacher with the same random weights at every call."""
        torch.manual_seed(0)
        student, teacher = (make_joint(self.network, self.resolution, self.channels, self.width) for _ in range(2))
        for module in (student, teacher):
            wake(module)
            module.to(self.device)
        return student.train(), teacher.flow_map.eval().requires_grad_(False)

    def data(self, official: bool = False) -> Tensor:
        """A batch: half as many images for the official recipe, which makes two targets of each."""
        shape = self.make_networks()[0].head.baseline.shape  # type: ignore[union-attr]
        return torch.randn((1 if official else 2) * self.batch, *shape, device=self.device)


class OfficialStep:
    """The official recipe's step, under autocast where that is asked for."""

    def __init__(self, setting: Setting) -> None:
        self.recipe = OfficialRecipe(*setting.make_networks())
        self.device, self.dtype = torch.device(setting.device), dtype_of(setting.official_dtype)

    def step(self, data: Tensor) -> None:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            self.recipe.step(data)

    def held_mib(self) -> float:
        recipe = self.recipe
        return resident_mib(recipe.student, recipe.average, recipe.teacher, optimizer=recipe.optimizer)


class OurStep:
    """One of this package's training steps as the module takes it, without Lightning around it."""

    def __init__(
        self, setting: Setting, objective: f2.objectives.Objective, estimator: f2.divergence.DivergenceEstimator
    ) -> None:
        self.joint, self.teacher = setting.make_networks()
        for network in (self.joint.flow_map, self.teacher):
            if setting.channels_last:
                network.to(memory_format=torch.channels_last)
            if setting.compile:
                compile_network(network)
        self.objective, self.dtype = objective, dtype_of(setting.dtype)
        self.average = copy_frozen(self.joint)
        self.source = f2.objectives.TeacherSource(self.teacher, estimator)
        self.optimizer = torch.optim.RAdam(self.joint.parameters(), lr=1e-4)
        if isinstance(objective, TrajectoryRegression):
            self.fill(setting.data())

    def fill(self, data: Tensor) -> None:
        """Add trajectories that end at data to the pool."""
        assert isinstance(self.objective, TrajectoryRegression)
        with torch.autocast(data.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            self.objective.pool(self.joint).add(self.source, data, -1)

    def step(self, data: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(data.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            terms = self.objective.loss(self.joint, f2.objectives.Batch(data, self.source))
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.joint.parameters(), 1.0)
        self.optimizer.step()
        update_average(self.average, self.joint, 0.9999)

    def held_mib(self, capacity: int) -> float:
        pool, objective = 0, self.objective
        if isinstance(objective, TrajectoryRegression):
            shape = self.joint.head.baseline.shape  # type: ignore[union-attr]
            per_trajectory = 4 * len(objective.pool(self.joint).times) * (torch.Size(shape).numel() + 1)
            pool = min(capacity * per_trajectory, int(objective.max_mib * 2**20))
        return resident_mib(self.joint, self.average, self.teacher, optimizer=self.optimizer, more=pool)


class WholePaths(TrajectoryRegression):
    """Only the steps that regress whole paths, which are every other one towards the end of training.

    Paths of 1, 2, 4 and 8 jumps come in turn, and training draws one of them: a step costs their mean.
    """

    turn = 0

    def loss(self, student: f2.JointMap, batch: f2.objectives.Batch) -> f2.objectives.Terms:
        self.turn += 1
        steps = self.intervals.steps[self.turn % len(self.intervals.steps)]
        return self.whole_paths(student, max(1, len(batch.data) // 2), steps)


def _trajectories(kind: type[TrajectoryRegression], setting: Setting) -> OurStep:
    # a pool that holds one batch costs a step what a large one does, and is filled sooner
    targets = 2 * setting.batch
    return OurStep(setting, kind(nodes=setting.nodes, capacity=targets, chunk=targets, unroll=0.0), f2.Hutchinson())


RECIPES: dict[str, Callable[[Setting], OurStep]] = {
    FULL: lambda setting: _trajectories(TrajectoryRegression, setting),
    PATH: lambda setting: _trajectories(WholePaths, setting),
    "semigroup, Hutchinson forward": lambda setting: OurStep(setting, f2.objectives.Semigroup(), f2.Hutchinson()),
    "semigroup, Conditional": lambda setting: OurStep(setting, f2.objectives.Semigroup(), f2.divergence.Conditional()),
    "Lagrangian, Hutchinson forward": lambda setting: OurStep(setting, f2.objectives.Lagrangian(), f2.Hutchinson()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Setting.add_arguments(parser)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--capacity", type=int, default=12_000, help="trajectories of a full pool, its memory and cost")
    parser.add_argument("--steps", type=int, default=20_000, help="of training, over which filling the pool is spread")
    options = parser.parse_args()
    setting = Setting(**{field.name: getattr(options, field.name) for field in fields(Setting)})
    device, targets = torch.device(setting.device), 2 * setting.batch

    official, ours = OfficialStep(setting), {name: RECIPES[name](setting) for name in options.recipes}
    half, whole = setting.data(official=True), setting.data()
    steps: list[Callable[[], object]] = [lambda: official.step(half)]
    counts = [4 if name == PATH else 1 for name in ours]
    steps += [
        lambda mine=mine, count=count: [mine.step(whole) for _ in range(count)]
        for mine, count in zip(ours.values(), counts, strict=True)
    ]
    times = medians(steps, options.repeats, device)
    times = [seconds / count for seconds, count in zip(times, (1, *counts), strict=True)]
    peaks = [peak_mib(step, device) for step in steps]
    held = [official.held_mib(), *(mine.held_mib(options.capacity) for mine in ours.values())]

    def row(name: str, seconds: float, peak: float | None = None, between: float | None = None) -> list[str]:
        start = [name, f"{1e3 * seconds:.1f}", f"{seconds / times[0]:.2f}"]
        if peak is None or between is None:
            return [*start, "", "", ""]
        return [*start, f"{peak:.1f}", f"{peak / peaks[0]:.2f}", f"{between:.1f}"]

    alone = OurStep(setting, f2.objectives.Semigroup(), f2.Hutchinson())

    def regress() -> None:
        s, t = torch.rand(2, targets, device=device)
        with torch.autocast(device.type, dtype=alone.dtype, enabled=alone.dtype is not None):
            u, divergence = alone.joint(whole, s, t)
        (u.square().mean() + divergence.square().mean()).backward()
        alone.optimizer.step()
        alone.optimizer.zero_grad(set_to_none=True)

    (least,) = medians([regress], options.repeats, device)
    rows = [row(*values) for values in zip(("official recipe", *ours), times, peaks, held, strict=True)]
    spent = dict(zip(ours, times[1:], strict=True))
    if FULL in spent and PATH in spent:
        (fill,) = medians([lambda: ours[FULL].fill(whole)], 3, device, warm=1)
        # a quarter of training regresses whole paths every other step
        mean = 0.875 * spent[FULL] + 0.125 * spent[PATH] + fill / targets * options.capacity / options.steps
        rows.insert(3, row("trajectory regression, mean over training", mean))

    rows.append(row("regression alone, targets for nothing", least))
    student = official.recipe.student
    extras = [name.replace("_", " ") for name in ("channels_last", "compile") if getattr(setting, name)]
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; {setting.network}, images of shape "
        f"{tuple(whole.shape[1:])}, {sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters, {targets} "
        f"targets a step; official: {setting.official_dtype}; ours: "
        f"{', '.join([setting.dtype, *extras])}\n"
    )
    print(markdown(["step", "ms", "ratio", "peak MiB", "ratio", "held MiB"], rows))
    print(
        f"\nMean over training: a quarter of it regresses whole paths every other step, and {options.capacity} "
        f"trajectories of {setting.nodes} nodes are integrated once in {options.steps} steps. {GOALS}."
    )


if __name__ == "__main__":
    main()
