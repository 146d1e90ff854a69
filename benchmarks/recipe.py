"""One recipe for all data: how close few-step likelihoods come to the teacher's with the package's defaults alone.

Every set of :mod:`recipe_data` goes through the same lines: ``FlowMatchingModule(network, shape, levels)``, then
``F2D2Module(teacher=teacher)``. What a user must say, the network and the training's length, follows from dimension and
count by :func:`network`, :func:`batch_size` and :func:`lengths`; nothing is set for one data set.

    python benchmarks/recipe.py --validate                     # on validation points, to choose by: hours on a CPU
    python benchmarks/recipe.py --validate --sets digits --seeds 0 --name try
    python benchmarks/recipe.py                                # on test points, once there is nothing left to choose
    python benchmarks/recipe.py --validate --report_only       # the table of what is there
    python benchmarks/recipe.py --way callback --name callback # the same by F2D2Callback on a module of its own
    python benchmarks/recipe.py --validate --fixed             # each automatic choice against its fixed value
    python benchmarks/recipe.py --tiny --sets wine             # seconds: whether it runs

Under ``FOLDER/SET/seedN`` are the teacher, its reference likelihoods (which do not depend on the recipe and are made
once) and a folder for each ``--name`` of a recipe. What is there is not made again, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.callbacks.last_checkpoint import LastCheckpoint
from f2d2_lightning.checkpoints.export import load_joint
from f2d2_lightning.cli import init
from f2d2_lightning.cli.init import FEW, MEDIUM, SMALL, batch_size, lengths
from f2d2_lightning.data import FlowDataModule
from f2d2_lightning.metrics.likelihood import agreement
from f2d2_lightning.objectives import TrajectoryRegression, Weighting
from f2d2_lightning.objectives.trajectories import CAPACITY
from f2d2_lightning.training.loading import read_checkpoint
from f2d2_lightning.utils.files import whole_file
from f2d2_lightning.utils.measuring import spread_of
from measuring import kept, markdown, quiet_trainer
from recipe_data import SETS, DataSet, Splits

Module = TypeVar("Module", bound=L.LightningModule)
STEPS = (1, 2, 4, 8)
WAYS = ("module", "callback", "alone")
"""How a student is made: ``F2D2Module(teacher=teacher)``; flow matching that goes on from the teacher's weights with
``F2D2Callback(..., teacher=teacher)``; the same without a teacher, learning from its own velocity, which is then its
reference."""
FIXED: dict[str, tuple[str, Callable[[], TrajectoryRegression]]] = {
    "targets": ("16 nodes, one probe, 12,000 trajectories", lambda: TrajectoryRegression(nodes=16)),
    "trajectories": ("12,000 trajectories", lambda: TrajectoryRegression(capacity=CAPACITY)),
    "starts": ("half data, half noise", lambda: TrajectoryRegression(starts={"data": 0.5, "noise": 0.5})),
    "errors": ("squared errors", lambda: TrajectoryRegression(weighting=Weighting(None))),
    "weight": ("weight .1 of the divergence", lambda: TrajectoryRegression(weighting=Weighting(0.1, adaptive=0.5))),
}
"""What the package chooses by itself: a fixed value of each, in words, and the objective that has it."""
TINY = {"train": 192, "val": 48, "test": 48}


# --- the rule for what a user must say ---


def network(shape: Sequence[int], count: int, levels: int | None) -> f2.FlowMap:
    """The backbone that ``f2d2 init`` would write."""
    name, sizes = init.network(shape, count, levels)
    return getattr(f2.nn, name)(**sizes)


def tested(dim: int) -> int:
    """Most points that likelihoods are compared on."""
    return 1_000 if dim <= SMALL else 512 if dim <= MEDIUM else 128


# --- the goals ---


@dataclass(frozen=True)
class Goals:
    """Largest error per point and gap, smallest correlation; in units of the spread of log p, or nats."""

    error: float
    gap: float
    r: float | None

    @classmethod
    def of(cls, constant: bool, count: int) -> Goals:
        """For ``constant`` densities in nats; wider ones below :data:`FEW` training points."""
        if constant:
            return cls(0.05, 0.02, None)
        return cls(0.10, 0.05, 0.99) if count < FEW else cls(0.05, 0.02, 0.998)

    def missed(self, row: dict[str, float]) -> list[str]:
        """Names of those that a row of results does not meet; what is NaN does not."""
        wrong = [] if row["error"] <= self.error else ["error"]
        wrong += [] if self.r is None or row["r"] >= self.r else ["r"]
        return wrong + ([] if abs(row["gap"]) <= self.gap else ["gap"])


# --- the reference ---


@torch.no_grad()
def reference(velocity: Callable[..., Tensor], x: Tensor, constant: bool) -> dict[str, Any]:
    """The teacher's log-likelihood by the solver that the package chooses, its own error far below the goals."""
    start = time.process_time()
    choice = f2.Reference().chosen(velocity, x)
    how, answer = choice.reference, choice.reference(velocity, x)
    unit = 1.0 if constant else spread_of(answer.value)
    noise = 0.0 if answer.standard_error is None else float(answer.standard_error.mean())
    return {
        "value": answer.value, "unit": unit, "steps": how.steps, "probes": how.probes, "near_data": how.near_data,
        "error": math.hypot(choice.moved, noise) / unit, "seconds": time.process_time() - start,
    }  # fmt: skip


# --- runs ---


class Seconds(L.Callback):
    """Seconds of the processor before the first step, where all that is chosen is chosen, and in all.

    They go on from where they were when a run does.
    """

    def __init__(self) -> None:
        self.before = self.total = 0.0
        self._since = time.process_time()

    def _pass(self) -> float:
        passed, self._since = time.process_time() - self._since, time.process_time()
        self.total += passed
        return passed

    def state_dict(self) -> dict[str, float]:
        return {"before": self.before, "total": self.total}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.before, self.total = state["before"], state["total"]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        passed = self._pass()
        if trainer.global_step == 0:
            self.before += passed

    def on_train_batch_end(self, *args: Any) -> None:
        self._pass()


@dataclass
class Run:
    """One data set and one seed, in a folder of its own."""

    name: str
    set: DataSet
    seed: int
    folder: Path
    tiny: bool = False

    @property
    def home(self) -> Path:
        return self.folder / self.name.replace(" ", "-") / f"seed{self.seed}"

    @cached_property
    def data(self) -> FlowDataModule:
        data = self.set.data()
        if self.tiny:
            parts = {name: data.dataset(name).values[:count] for name, count in TINY.items()}
            data = Splits(parts, data.levels)  # type: ignore[arg-type]
        data.batch_size = batch_size(math.prod(data.shape))
        return data

    @property
    def count(self) -> int:
        return len(self.data.dataset("train"))

    @property
    def dim(self) -> int:
        return math.prod(self.data.shape)

    @property
    def lengths(self) -> tuple[int, int]:
        return (6, 6) if self.tiny else lengths(self.dim, self.count)

    def points(self, split: str) -> Tensor:
        """The first states of a split, dequantized from one seed."""
        dataset = self.data.dataset(split)
        return dataset.__getitems__(list(range(min(tested(self.dim), len(dataset)))))

    def fitted(
        self, make: Callable[[], Module], steps: int, folder: Path, callbacks: Sequence[L.Callback] = ()
    ) -> Module:
        """A module trained for so many steps, whose checkpoint is kept; one that is there goes on to its end."""
        last = folder / "last.ckpt"
        if not last.exists() or read_checkpoint(last)["global_step"] < steps:
            L.seed_everything(self.seed, verbose=False)
            keep = LastCheckpoint(max(1, steps // 4), folder)
            # as a user's own: nothing clipped, nothing else set
            own = {"gradient_clip_val": None, "enable_checkpointing": True, "callbacks": [Seconds(), *callbacks, keep]}
            begun = last if last.exists() else None
            quiet_trainer(steps, **own).fit(make(), self.data, ckpt_path=begun, weights_only=True)
        module, checkpoint = make(), read_checkpoint(last)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module.eval()

    @cached_property
    def teacher(self) -> f2.FlowMatchingModule:
        shape, levels = self.data.shape, self.data.levels
        module = self.fitted(
            lambda: f2.FlowMatchingModule(network(shape, self.count, levels), shape, levels),
            self.lengths[0],
            self.home / "teacher",
        )
        return module.requires_grad_(False)

    def seconds(self, part: str) -> dict[str, float]:
        """Of the teacher's training, or of a recipe's."""
        return read_checkpoint(self.home / part / "last.ckpt")["callbacks"]["Seconds"]

    def attached(self, name: str, taught: bool) -> f2.JointFlowMap:
        """A student that an ``F2D2Callback`` makes of a module that trains flow matching on from the teacher's weights.

        Args:
            name: Of the recipe: its folder.
            taught: Whether the callback is given the teacher.
        """
        teacher, levels = self.teacher.average, self.data.levels
        callback = f2.F2D2Callback("flow_map", teacher=teacher if taught else None)
        host = self.fitted(
            lambda: f2.FlowMatchingModule(copy.deepcopy(teacher).requires_grad_(True), self.data.shape, levels),
            self.lengths[1],
            self.home / name,
            [callback],
        )
        return load_joint(self.home / name / "last.ckpt", host.flow_map, "flow_map").eval()

    def reference(self, split: str, velocity: Callable[..., Tensor], folder: str) -> dict[str, Any]:
        return kept(
            self.home / folder / f"{split}.pt", lambda: reference(velocity, self.points(split), self.set.constant)
        )

    def measure(
        self,
        split: str,
        name: str = "defaults",
        way: str = "module",
        make: Callable[..., f2.F2D2Module] = f2.F2D2Module,
    ) -> dict[str, Any]:
        """Everything the table shows, from the file where it is kept.

        Args:
            split: ``"val"`` to choose by, ``"test"`` for the table.
            name: Of the recipe: its folder.
            way: One of :data:`WAYS`.
            make: Makes the student of the first way, ``make(teacher=...)``; anything but the default is an experiment.
        """
        file = self.home / name / f"{split}.json"
        if file.exists():
            return json.loads(file.read_text())
        teacher = self.teacher
        if way == "module":
            student = self.fitted(lambda: make(teacher=teacher), self.lengths[1], self.home / name).average
        else:
            student = self.attached(name, taught=way == "callback")
        judge, folder = (teacher.average, "teacher") if way != "alone" else (student.flow_map, name)
        seconds, answer, x = self.seconds(name), self.reference(split, judge.velocity, folder), self.points(split)
        truth = None if self.set.log_prob is None else self.set.log_prob(x.double())
        result = {
            "set": self.name, "seed": self.seed, "split": split, "name": name, "way": way, "count": self.count,
            "dim": self.dim, "points": len(x), "lengths": self.lengths, "levels": self.data.levels,
            "constant": self.set.constant,
            "spread": spread_of(answer["value"]), "nll": -float(answer["value"].mean()),
            "truth": None if truth is None else -float(truth.mean()),
            "reference": {key: value for key, value in answer.items() if key != "value"},
            "seconds": {"choosing": seconds["before"], "training": seconds["total"] - seconds["before"],
                        "teacher": self.seconds("teacher")["total"]},
            "steps": {k: compare(student, x, answer["value"], answer["unit"], k) for k in STEPS},
        }  # fmt: skip
        with whole_file(file) as unfinished:
            unfinished.write_text(json.dumps(result, indent=1) + "\n")
        return json.loads(file.read_text())


@torch.no_grad()
def compare(joint: f2.JointFlowMap, x: Tensor, reference: Tensor, unit: float, steps: int) -> dict[str, float]:
    """Of a student in so many steps: gap and error in ``unit``, correlations, and the way to noise and back.

    ``gap`` is positive where the student finds data less likely than the reference does; ``round_trip`` is the root
    mean square over states and dimensions in deviations of the data.
    """
    answer = f2.log_prob(joint, x, steps)
    back = f2.sample(joint, answer.noise, steps).state
    found = agreement(answer.value, reference)
    return {
        "gap": float(found.gap) / unit, "gap_error": float(found.gap_standard_error) / unit,
        "error": float(found.absolute_error) / unit, "r": float(found.correlation),
        "rank_r": float(found.rank_correlation), "round_trip": float((back - x).square().mean().sqrt() / x.std()),
    }  # fmt: skip


# --- the table ---


def mean(results: Sequence[dict[str, Any]], *keys: str) -> float:
    """Over seeds, of a number that the keys lead to."""
    values = []
    for value in results:
        for key in keys:
            value = value[key]
        values.append(value)
    return statistics.fmean(values)


def about(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of what a set is and costs."""
    first = runs[0]
    how = first["reference"]
    probes = f"{how['probes']} probes" if how["probes"] else "exact"
    return [
        first["set"],
        *(str(first[key]) for key in ("dim", "count", "points")),
        " / ".join(f"{steps:,}" for steps in first["lengths"]),
        f"{mean(runs, 'spread'):.3g}",
        "" if first["truth"] is None else f"{mean(runs, 'nll') - mean(runs, 'truth'):+.3f}",
        f"{how['steps']} steps, {probes}",
        f"{mean(runs, 'reference', 'error'):.4f}",
        *(f"{mean(runs, 'seconds', part):.0f}" for part in ("choosing", "training", "teacher")),
        f"{mean(runs, 'reference', 'seconds'):.0f}",
        str(len(runs)),
    ]


def found(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of what was found on a set; goals are met where every seed meets them."""
    first = runs[0]
    goals = Goals.of(first["constant"], first["count"])
    keys = [str(k) for k in STEPS]
    missed = [(k, [word for run in runs for word in goals.missed(run["steps"][k])]) for k in keys]

    def cell(key: str, form: str) -> str:
        return " / ".join(format(mean(runs, "steps", k, key), form) for k in keys)

    largest = max(run["steps"][k]["error"] for run in runs for k in keys)
    uncertain = max(mean(runs, "steps", k, "gap_error") for k in keys)
    return [
        first["set"],
        cell("error", ".3f") + (f" ({largest:.3f})" if len(runs) > 1 else ""),
        f"{cell('gap', '+.3f')} (± {uncertain:.3f})",
        *("" if goals.r is None else cell(key, ".4f") for key in ("r", "rank_r")),
        cell("round_trip", ".3f"),
        f"{goals.error:.2f}, {goals.gap:.2f}" + ("" if goals.r is None else f", {goals.r}"),
        "; ".join(f"{k}: {', '.join(dict.fromkeys(words))}" for k, words in missed if words) or "none",
    ]


def report(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each set, then one of what it is and costs."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_set.setdefault(result["set"], []).append(result)
    columns = ["set", "error per point", "gap", "r", "rank r", "round trip", "goals: error, gap, r", "missed"]
    more = [
        *("set", "dimensions", "training points", "points compared", "steps of teacher / student", "spread, nats"),
        *("teacher's NLL minus the truth's, nats", "reference", "its own error", "choosing, s", "training, s"),
        *("teacher, s", "reference, s", "seeds"),
    ]
    said = (
        f"At {' / '.join(map(str, STEPS))} steps. Error per point, gap (its largest standard error over points) and "
        "the reference's own error are in units of the spread of log p (interquartile range / 1.35), of a nat for the "
        "checkerboard; the round trip in deviations of the data. Means over seeds, in brackets the largest error of "
        "one; a goal is missed where a seed misses it."
    )
    tables = ((columns, found), (more, about))
    return f"\n\n{said}\n\n".join(markdown(head, [row(runs) for runs in by_set.values()]) for head, row in tables)


def ablations(results: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
    """Markdown: of each choice and set errors per point and seconds as chosen, then with the fixed value."""

    def cells(result: dict[str, Any]) -> tuple[str, str]:
        errors = " / ".join(f"{result['steps'][str(k)]['error']:.3f}" for k in STEPS)
        return errors, f"{sum(result['seconds'][part] for part in ('choosing', 'training')):.0f}"

    rows = [
        [FIXED[name][0], chosen["set"], *(text for pair in zip(cells(chosen), cells(fixed)) for text in pair)]
        for name, chosen, fixed in results
    ]
    steps = " / ".join(map(str, STEPS))
    return markdown(["fixed", "set", f"error at {steps}, chosen", "fixed", "seconds, chosen", "fixed"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", help="three by default, one for Fashion-MNIST")
    parser.add_argument("--folder", type=Path, default=Path("runs/recipe"), help="where everything is kept")
    parser.add_argument("--name", default="defaults", help="of the recipe: another one is trained anew")
    parser.add_argument("--way", choices=WAYS, default=WAYS[0], help="how students are made; give it a --name")
    parser.add_argument("--validate", action="store_true", help="compare on validation points")
    parser.add_argument(
        "--fixed", nargs="*", choices=list(FIXED), help="compare these choices, or all, with fixed values instead"
    )
    parser.add_argument("--tiny", action="store_true", help="few points and steps, for a test of the command")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report_only", action="store_true", help="make nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    split, results, compared = "val" if options.validate else "test", [], []
    fixed = None if options.fixed is None else options.fixed or list(FIXED)
    for name in options.sets:
        for seed in options.seeds or SETS[name].seeds:
            run = Run(name, SETS[name], seed, options.folder / "tiny" if options.tiny else options.folder, options.tiny)
            if options.report_only and not (run.home / options.name / f"{split}.json").exists():
                continue
            results.append(run.measure(split, options.name, options.way))
            print(f"{time.strftime('%H:%M:%S')} {name} {seed}", file=sys.stderr, flush=True)
            for choice in fixed or ():
                if options.report_only and not (run.home / f"fixed-{choice}" / f"{split}.json").exists():
                    continue
                made = FIXED[choice][1]
                make = lambda teacher, made=made: f2.F2D2Module(teacher=teacher, objective=made())  # noqa: E731
                compared.append((choice, results[-1], run.measure(split, f"fixed-{choice}", make=make)))
    print(report(results) if fixed is None else ablations(sorted(compared, key=lambda row: fixed.index(row[0]))))


if __name__ == "__main__":
    main()
