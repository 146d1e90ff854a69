"""Which choices bring few-step likelihoods close to the teacher's: a study of students of one teacher.

Every student differs from the recipe before the study in one choice and has the same teacher, data, batch and number
of steps. From the folder of the runs, after ``f2d2 fit --config configs/NAME_teacher.yaml`` and, for images,
``train_features.py --data NAME --out runs/NAME/features.pt``:

    python benchmarks/calibration.py                                  # everything: hours on a CPU
    python benchmarks/calibration.py --problems digits --seeds 0 --groups objective direction
    python benchmarks/calibration.py --report_only                    # the table of what is there

Results are kept under ``runs/NAME/calibration`` and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.divergence import Conditional, Exact
from f2d2_lightning.likelihood import state_images
from f2d2_lightning.metrics import SmallFeatures
from f2d2_lightning.metrics.image import ImageDistance
from f2d2_lightning.metrics.networks import extract_features
from f2d2_lightning.nn import PreconditionedMLP, PreconditionedUNet
from f2d2_lightning.objectives import Eulerian, Lagrangian, Semigroup
from f2d2_lightning.training.loading import load_module
from f2d2_lightning.utils.files import whole_file
from measuring import StepTimes, agreement, energy_distance, kept, quiet_trainer
from official.module import DyadicIntervals, official_log_prob

Changes = Mapping[str, Any]
STEPS = (8, 4, 2, 1)


@dataclass
class Problem:
    """One data set with its teacher, and the recipe that its student starts from: the one before this study."""

    shape: tuple[int, ...]
    levels: int | None
    data: Callable[[int], f2.data.FlowDataModule]
    network: Callable[..., f2.FlowMap]
    features: int
    recipe: dict[str, Any]
    budget: int
    batch: int
    rate: float
    tested: int
    drawn: int
    reference_steps: int
    near_data: float = 0.0
    name: str = ""
    folder: Path = Path("runs")

    @property
    def dim(self) -> int:
        return torch.Size(self.shape).numel()

    def in_unit(self, log_prob: Tensor) -> Tensor:
        """Negative log-likelihood: nats for points, bits per dimension for images."""
        return -log_prob if self.levels is None else f2.bits_per_dim(log_prob, self.dim, self.levels)

    @cached_property
    def teacher(self) -> f2.FlowMatchingModule:
        module = load_module(self.folder / self.name / "teacher/checkpoints/last.ckpt", f2.FlowMatchingModule)
        return module.eval().requires_grad_(False)

    def states(self, split: str, count: int) -> Tensor:
        """The first states of a split, dequantized from one seed, at most ``count``."""
        dataset = self.data(self.batch).dataset(split)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return dataset.__getitems__(list(range(min(count, len(dataset)))))

    @cached_property
    def points(self) -> Tensor:
        return self.states("test", self.tested)

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """The teacher's log-likelihood and noise of :attr:`points`."""

        def solve() -> dict[str, Tensor]:
            probes = 1 if self.dim > 8 else 0
            setting = f2.Reference(steps=self.reference_steps, probes=probes, near_data=self.near_data)
            answers = [setting(self.teacher.average.velocity, part) for part in self.points.split(1000)]
            return {"value": torch.cat([a.value for a in answers]), "noise": torch.cat([a.noise for a in answers])}

        return kept(self.folder / self.name / "calibration" / "reference.pt", solve)

    @cached_property
    def distance(self) -> Callable[[Tensor], float]:
        """Of samples to training data: Frechet's of features for images, the energy distance for points (x 1,000)."""
        real = self.states("train", 5000)
        if self.levels is None:
            return lambda samples: 1e3 * energy_distance(samples, real[: self.drawn])
        network = SmallFeatures.load(self.folder / self.name / "features.pt")
        metric = ImageDistance(network.num_features)

        def add(states: Tensor, of_data: bool) -> None:
            for part in states.split(256):
                metric.update(extract_features(network, state_images(part, self.levels)), of_data)

        def distance(samples: Tensor) -> float:
            metric.reset()
            add(samples, False)
            return float(metric.compute())

        add(real, True)
        return distance


PROBLEMS = {
    "checkerboard": Problem(
        (2,), None, lambda batch: f2.data.Checkerboard(batch_size=batch),
        lambda **kw: PreconditionedMLP((2,), "full", width=128, blocks=3, expansion=2, **kw), 128,
        {"head": {"hidden": 64, "layers": 2, "per_axis": True}, "covariance": "full", "estimator": Exact(),
         "trajectories": {"nodes": 32, "capacity": 6000, "chunk": 512,
                          "starts": {"data": 0.4, "perturbed": 0.2, "path": 0.2, "noise": 0.2}}},
        budget=600, batch=256, rate=2e-3, tested=2000, drawn=2000, reference_steps=200,
    ),
    "digits": Problem(
        (1, 8, 8), 17, lambda batch: f2.data.Digits(batch_size=batch, eval_batch_size=300),
        lambda **kw: PreconditionedMLP((1, 8, 8), "diagonal", width=512, blocks=2, **kw), 512,
        {"head": {"hidden": 128, "layers": 0, "per_axis": True}, "covariance": "diagonal",
         "trajectories": {"nodes": 20, "capacity": 4000, "chunk": 256, "unroll": 0.25,
                          "quantization": f2.Quantization(17),
                          "starts": {"data": 0.1, "perturbed": 0.1, "mixed": 0.25, "path": 0.05, "noise": 0.5}}},
        budget=600, batch=256, rate=1e-3, tested=300, drawn=2000, reference_steps=500,
    ),
    "fashion": Problem(
        (1, 28, 28), 256, lambda batch: f2.data.FashionMNIST(batch_size=batch),
        lambda **kw: PreconditionedUNet((1, 28, 28), levels=256, width=32, multipliers=(1, 2), blocks=1, patch=2, **kw),
        32,
        {"head": {"hidden": 64, "layers": 1, "per_axis": True, "patch": 2}, "covariance": "diagonal",
         "weighting": {"adaptive": 0.5},
         "trajectories": {"nodes": 32, "capacity": 1000, "chunk": 128, "unroll": 0.25,
                          "quantization": f2.Quantization(256), "near_data": 0.5, "recompute": False,
                          "likelihood_of_data": True, "starts": {"data": 0.6, "path": 0.1, "noise": 0.3}}},
        budget=200, batch=64, rate=2e-3, tested=64, drawn=400, reference_steps=100, near_data=0.6,
    ),
}  # fmt: skip
for _name, _problem in PROBLEMS.items():
    _problem.name = _name


# --- ways to ask, and the choices ---


def inverted(joint: f2.JointFlowMap, x: Tensor, steps: int) -> Any:
    return f2.log_prob(joint, x, steps, inversion=f2.Inversion(max_iterations=60))


TO_DATA = {", its query": official_log_prob, ", inverted": inverted}


@dataclass(frozen=True)
class Choice:
    """One training run; ``changes`` of the recipe, or a function of the problem that gives them."""

    group: str
    name: str
    changes: Changes | Callable[[Problem], Changes] = field(default_factory=dict)
    problems: str = "checkerboard digits"
    queries: Mapping[str, Any] = field(default_factory=lambda: {"": f2.log_prob})
    after: str | None = None
    """Name of the choice whose backbone is started from."""


def pool(**changes: Any) -> Changes:
    return {"trajectories": changes}


def starts(**shares: float) -> Changes:
    return pool(starts=shares)


def times(name: str, factor: float) -> Callable[[Problem], Changes]:
    return lambda problem: pool(**{name: round(factor * problem.recipe["trajectories"][name])})


def bootstrap(kind: Any, **changes: Any) -> Changes:
    """An objective that bootstraps, half of it on the diagonal, where the teacher comes in."""
    return {"objective": kind, "intervals": {"diagonal": 0.5, "grid": 0.25}, **changes}


def scalar(covariance: str | None) -> Changes:
    """One number in place of one per axis, which needs no baseline."""
    return {"head": {"hidden": 128, "layers": 2, "per_axis": False, "patch": 0}, "covariance": covariance}


def control(problem: Problem) -> f2.Hutchinson:
    fit = f2.GaussianBaseline(problem.shape, problem.recipe["covariance"])
    fit.fit([problem.states("train", 5000)])
    return f2.Hutchinson(1, control=fit)


def official(problem: Problem) -> Changes:
    """Midpoint rule to data, raw head, the official weight of the divergence at the same scale."""
    # its loss divides errors of D by 20,000 at 3,072 dimensions, where the velocity's is a mean over dimensions
    weight = problem.dim * (3072 / 20_000 / problem.dim) ** 2
    return {
        "objective": lambda intervals, weighting: Semigroup("midpoint", DyadicIntervals(), weighting),
        "weighting": {"units": "velocity", "divergence": weight, "adaptive": 0.0},
        "directions": "to_data", "estimator": f2.Hutchinson(1), **scalar(None),
    }  # fmt: skip


def together(*changes: Any) -> Callable[[Problem], Changes]:
    def change(problem: Problem) -> Changes:
        total: dict[str, Any] = {}
        for each in changes:
            total = merged(total, each(problem) if callable(each) else each)
        return total

    return change


def merged(recipe: Changes, changes: Changes) -> dict[str, Any]:
    both = {k: {**recipe[k], **v} for k, v in changes.items() if isinstance(v, dict) and k in recipe}
    return {**recipe, **changes, **both}


MORE = together(starts(perturbed=0.5, noise=0.5), times("capacity", 3), times("nodes", 2))
LIGHT = together(MORE, {"weighting": {"divergence": 0.01}})
EVEN = together(LIGHT, {"intervals": {"grid": 0.3, "to_noise": 0.5}})
ALL = "checkerboard digits fashion"

CHOICES = (
    Choice("starting point", "starting point", problems=ALL),
    Choice("official", "official recipe", official, ALL, TO_DATA),
    Choice("joint or frozen", "no head (samples only)", {"weighting": {"divergence": 0.0}}, ALL, {}),
    Choice("direction", "to data only", {"directions": "to_data", **pool(likelihood_of_data=False)}, queries=TO_DATA),
    Choice("objective", "semigroup, midpoint", bootstrap(Semigroup), ALL),
    Choice("objective", "semigroup, random split", bootstrap(lambda i, w: Semigroup("random", i, w))),
    Choice("objective", "Lagrangian", bootstrap(Lagrangian)),
    Choice("objective", "Eulerian", bootstrap(Eulerian)),
    Choice("whole paths", "never", pool(unroll=0.0), ALL),
    Choice("whole paths", "in the last half", pool(unroll=0.5)),
    Choice("whole paths", "always", pool(unroll=1.0)),
    Choice("pool", "a quarter of the trajectories", times("capacity", 0.25)),
    Choice("pool", "three times the trajectories", times("capacity", 3)),
    Choice("pool", "half the evaluations per trajectory", times("nodes", 0.5)),
    Choice("pool", "twice the evaluations per trajectory", times("nodes", 2)),
    Choice("pool", "refreshed, 8 trajectories a step", pool(refresh=8.0)),
    Choice("starts", "data only", starts(data=1.0)),
    Choice("starts", "data and noise", starts(data=0.5, noise=0.5)),
    Choice("starts", "noise only", starts(noise=1.0)),
    Choice("starts", "perturbed data and noise", starts(perturbed=0.5, noise=0.5)),
    Choice("starts", "likelihood from data's trajectories alone", pool(likelihood_of_data=True)),
    Choice("starts", "likelihood from all trajectories", pool(likelihood_of_data=False), "fashion"),
    Choice("divergence target", "trajectories, exact", {"estimator": Exact()}, "digits"),
    Choice("divergence target", "trajectories, 1 probe", {"estimator": f2.Hutchinson(1)}, "checkerboard"),
    Choice("divergence target", "trajectories, 4 probes", {"estimator": f2.Hutchinson(4)}),
    Choice("divergence target", "trajectories, 1 probe, Gaussian control variate", lambda p: {"estimator": control(p)}),
    Choice("divergence target", "midpoint, exact", bootstrap(Semigroup, estimator=Exact()), "checkerboard"),
    Choice("divergence target", "midpoint, 4 probes", bootstrap(Semigroup, estimator=f2.Hutchinson(4))),
    Choice("divergence target", "midpoint, 1 probe, Gaussian control variate",
           lambda p: bootstrap(Semigroup, estimator=control(p))),
    Choice("divergence target", "midpoint, conditional", bootstrap(Semigroup, estimator=Conditional(handover=0.97))),
    Choice("divergence target", "midpoint, conditional, then Hutchinson",
           bootstrap(Semigroup, estimator=Conditional())),
    Choice("head", "one number, no baseline", scalar(None)),
    Choice("head", "one number, isotropic baseline", scalar("isotropic")),
    Choice("head", "one number, full baseline", scalar("full")),
    Choice("head", "per axis, isotropic baseline", {"covariance": "isotropic"}),
    Choice("head", "per axis, full baseline", {"covariance": "full"}, "digits"),
    Choice("head", "no hidden layer", {"head": {"layers": 0}}, "checkerboard"),
    Choice("head", "two hidden layers", {"head": {"layers": 2}}, "digits"),
    Choice("intervals", "uniform", {"intervals": {"grid": 0.0}}, ALL),
    Choice("intervals", "grid's own steps, .9", {"intervals": {"grid": 0.9}}),
    Choice("intervals", "half of the grid's to data", {"intervals": {"to_noise": 0.5}}),
    Choice("loss", "divergence weight .01", {"weighting": {"divergence": 0.01}}, ALL),
    Choice("loss", "divergence weight 1", {"weighting": {"divergence": 1.0}}),
    Choice("loss", "adaptive errors", {"weighting": {"adaptive": 0.5}}),
    Choice("loss", "squared errors", {"weighting": {"adaptive": 0.0}}, "fashion"),
    Choice("loss", "velocity's units", {"weighting": {"units": "velocity"}}),
    Choice("joint or frozen", "frozen backbone", {"frozen": True}, after="no head (samples only)"),
    Choice("weight average", "none", {"ema_decay": 0.0}),
    # longer ones than .985 are alike at this budget: a young average forgets faster
    Choice("weight average", ".9", {"ema_decay": 0.9}),
    Choice("weight average", ".97", {"ema_decay": 0.97}),
    Choice("together", "perturbed starts, 3 x trajectories, 2 x evaluations", MORE),
    Choice("together", "the same, divergence weight .01", LIGHT),
    Choice("together", "the same, half of the intervals to data, grid .3", EVEN),
    Choice("together", "the same, full baseline", together(EVEN, {"covariance": "full"}), "digits"),
    Choice("together", "the same, full baseline, one number", together(EVEN, scalar("full"))),
    Choice("precision", "bf16 network, float32 loss", {"precision": "bf16-mixed"}),
    Choice("precision", "float64", {"precision": "64-true"}, "checkerboard"),
)  # fmt: skip


# --- runs ---


def make_module(problem: Problem, recipe: Changes, steps: int, cache: Path | None) -> f2.F2D2Module:
    """The student of a recipe, in the random state that the caller has set."""
    network = problem.network(directions=recipe["directions"])
    baseline = recipe["covariance"] and f2.GaussianBaseline(problem.shape, recipe["covariance"])
    intervals = f2.Intervals(recipe["directions"], **recipe["intervals"])
    weighting = f2.Weighting(**recipe["weighting"])
    if recipe["objective"] is f2.TrajectoryRegression:
        folder = cache and str(cache)
        objective: Any = f2.TrajectoryRegression(
            intervals=intervals, weighting=weighting, cache=folder, **recipe["trajectories"]
        )
    elif recipe["objective"] in (Semigroup, Lagrangian, Eulerian):
        objective = recipe["objective"](intervals=intervals, weighting=weighting)
    else:
        objective = recipe["objective"](intervals, weighting)
    return f2.F2D2Module(
        network, problem.shape, problem.teacher,
        f2.DivergenceHead(problem.features, baseline=baseline, **recipe["head"]),
        objective, recipe["estimator"], recipe["frozen"], levels=problem.levels,
        optimizer=lambda groups: torch.optim.AdamW(
            groups, lr=problem.rate, weight_decay=0.01, betas=(0.9, 0.99), foreach=True
        ),
        warmup=min(100, steps // 10), ema_decay=recipe["ema_decay"],
    )  # fmt: skip


def recipe_of(problem: Problem, choice: Choice) -> dict[str, Any]:
    start = {
        "objective": f2.TrajectoryRegression, "directions": "both", "weighting": {}, "estimator": f2.Hutchinson(),
        "intervals": {"diagonal": 0.1, "grid": 0.6, "to_noise": 0.7}, "frozen": False, "ema_decay": 0.998,
        "precision": "32-true",
    }  # fmt: skip
    changes = choice.changes(problem) if callable(choice.changes) else choice.changes
    return merged(start | problem.recipe, changes)


def run_file(problem: Problem, name: str, seed: int, steps: int) -> Path:
    """Where a run's result is, and beside it the student."""
    plain = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    return problem.folder / problem.name / "calibration" / f"{steps}-steps" / plain / f"seed{seed}.json"


def run(problem: Problem, choice: Choice, seed: int, steps: int, cache: Path | None = None) -> dict[str, Any]:
    """Train a student by a recipe and measure it, unless that is kept."""
    file = run_file(problem, f"{choice.group}--{choice.name}", seed, steps)
    if file.exists():
        return json.loads(file.read_text())
    problem.teacher  # noqa: B018 - loading one draws random numbers
    L.seed_everything(seed, verbose=False)
    recipe = recipe_of(problem, choice)
    module = make_module(problem, recipe, steps, cache)
    if choice.after is not None:
        (before,) = (c for c in CHOICES if c.name == choice.after)
        run(problem, before, seed, steps, cache)
        student = run_file(problem, f"{before.group}--{before.name}", seed, steps).with_suffix(".pt")
        L.seed_everything(seed, verbose=False)
        module = make_module(problem, recipe, steps, cache)
        state = torch.load(student, weights_only=True)
        own = {n.removeprefix("flow_map."): v for n, v in state.items() if n.startswith("flow_map.")}
        module.joint.flow_map.load_state_dict(own)
        module.warm_start = False
    filling = -(-recipe["trajectories"]["capacity"] // problem.batch)
    clock = StepTimes(min(filling + 10, steps // 2))
    trainer = quiet_trainer(steps, precision=recipe["precision"], callbacks=[clock])
    trainer.fit(module, problem.data(problem.batch))
    joint = module.float().eval().average
    result = {"milliseconds": 1e3 * clock.seconds / max(1, steps - clock.skipped)} | measure(problem, choice, joint)
    with whole_file(file.with_suffix(".pt")) as partial:
        torch.save(joint.state_dict(), partial)
    with whole_file(file) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    return result


@torch.no_grad()
def measure(problem: Problem, choice: Choice, joint: f2.JointFlowMap) -> dict[str, Any]:
    """Everything the table shows of one student; negative log-likelihoods in the problem's unit."""
    x, reference = problem.points, problem.reference
    noise = torch.randn(problem.drawn, *problem.shape, generator=torch.Generator().manual_seed(1))
    result: dict[str, Any] = {"queries": {}, "samples": {}}
    for k in STEPS:
        made = torch.cat([f2.sample(joint, z, k).state for z in noise.split(1000)])
        result["samples"][str(k)] = problem.distance(made)
    for name, query in choice.queries.items():
        if query is inverted and problem.name == "fashion":  # sixty evaluations a step
            continue
        rows = result["queries"][name] = {}
        for k in STEPS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # unconverged inversions are counted
                answer = query(joint, x, k)
            rows[str(k)] = agreement(problem.in_unit(answer.value), problem.in_unit(reference["value"]))
            good = answer.value.isfinite()
            if f2.Direction.TO_DATA in joint.directions and bool(good.any()):
                back = f2.sample(joint, answer.noise[good], k).state
                rows[str(k)]["round_trip"] = float((back - x[good]).square().mean().sqrt() / x.std())
    return result


def table(problem: Problem, seeds: Sequence[int], steps: int) -> str:
    """Markdown: one line per choice, means over seeds; the spread of gaps is the largest over step counts."""
    unit = "nats" if problem.levels is None else "bits/dim"
    lines = [
        f"| | | error per point, {unit} | gap at 8 / 4 / 2 / 1 steps | ± | r at 8 / 4 / 2 / 1 | "
        "round trip at 8 / 1 | samples at 8 / 1 | step time, ms | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for choice in CHOICES:
        files = [run_file(problem, f"{choice.group}--{choice.name}", seed, steps) for seed in seeds]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        if problem.name not in choice.problems.split() or not runs:
            continue

        def over_steps(query: str, key: str, form: str, steps: Sequence[int] = STEPS, runs: Any = runs) -> str:
            means = (statistics.fmean(r["queries"][query][str(k)][key] for r in runs) for k in steps)
            return " / ".join(plain(mean, form) for mean in means)

        samples = " / ".join(f"{statistics.fmean(r['samples'][k] for r in runs):.1f}" for k in "81")
        cost = f"{statistics.fmean(r['milliseconds'] for r in runs):.0f}"
        if not runs[0]["queries"]:
            lines.append(f"| {choice.group} | {choice.name} | | | | | | {samples} | {cost} | {len(runs)} |")
        for query in runs[0]["queries"]:
            answers = [r["queries"][query] for r in runs]
            lost = max(1 - rows[k]["share"] for rows in answers for k in "8421")
            errors = [statistics.fmean(rows[k]["error"] for k in "8421") for rows in answers]
            error, spread = plain(statistics.fmean(errors), ".3f"), ""
            if len(runs) > 1:
                error += f" ± {plain(statistics.stdev(errors), '.3f')}"
                spread = plain(max(statistics.stdev(rows[k]["gap"] for rows in answers) for k in "8421"), ".3f")
            cells = (
                choice.group, choice.name + query + (f" ({lost:.0%} unconverged)" if lost else ""), error,
                over_steps(query, "gap", "+.3f"), spread, over_steps(query, "r", ".3f"),
                over_steps(query, "round_trip", ".3f", (8, 1)), samples, cost, str(len(runs)),
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plain(value: float, form: str) -> str:
    """A number without the zero before its point."""
    return format(value, form).replace("0.", ".", 1) if abs(value) < 1 else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(choice.group for choice in CHOICES))
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of each student; the problem's by default")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where teachers and students are")
    parser.add_argument("--cache", type=Path, help="folder of trajectories that students share")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report_only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.problems:
        problem = PROBLEMS[name]
        problem.folder, steps = options.runs, options.steps or problem.budget
        chosen = [c for c in CHOICES if name in c.problems.split() and c.group in options.groups]
        for seed in options.seeds:
            for choice in chosen if not options.report_only else ():
                run(problem, choice, seed, steps, options.cache or options.runs / "trajectories")
                print(f"{time.strftime('%H:%M:%S')} {name} {seed}: {choice.name}", file=sys.stderr, flush=True)
        print(f"## {name}\n\n{table(problem, options.seeds, steps)}\n")


if __name__ == "__main__":
    main()
