"""One run: train a student by a recipe, measure it, keep what was found."""

from __future__ import annotations

import fcntl
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import f2d2_lightning as f2
from calibration_study.choices import CHOICES, Choice
from calibration_study.measures import choose_grid, judge, likelihoods
from calibration_study.problems import Problem
from calibration_study.recipes import Recipe, StudyModule, inverted, own
from calibration_study.variants import log_snr_grid
from f2d2_lightning.utils.files import whole_file

__all__ = ["STEPS", "run", "run_folder"]

STEPS = (1, 2, 4, 8)


class StepTimes(L.Callback):
    """Seconds of this thread at work per training step, set-up and the filling of the pool left out.

    Args:
        skipped: First steps that are not counted.
    """

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.total, self.count = 0.0, 0
        self._started: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.process_time() if trainer.global_step >= self.skipped else None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._started is not None:
            self.total += time.process_time() - self._started
            self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


def run_folder(problem: Problem, choice: Choice, seed: int, steps: int) -> Path:
    """Where a run's files are."""
    name = "".join(c if c.isalnum() or c == "." else "-" for c in f"{choice.group}--{choice.name}")
    return problem.folder / problem.name / "calibration" / f"{steps}-steps" / name / f"seed{seed}"


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder to itself; the claim ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(problem: Problem, choice: Choice, seed: int, steps: int, cache: Path) -> dict[str, Any] | None:
    """Results of a run; made if they are not there. ``None`` if another process is at it, or waits for another run."""
    folder = run_folder(problem, choice, seed, steps)
    kept = folder / "result.json"
    if not kept.exists():
        with _claimed(folder) as mine:
            if not mine:
                return None
            before = None if choice.after is None else _student_file(problem, choice.after, seed, steps)
            if before is not None and not before.exists():
                return None
            if not kept.exists():
                backbone = None if before is None else _backbone(before)
                module, cost = _train(problem, choice, seed, steps, cache, folder, backbone)
                result = cost | _measure(problem, choice, module.average)
                torch.save(module.average.state_dict(), folder / "student.pt")
                with whole_file(kept) as partial:
                    partial.write_text(json.dumps(result, indent=1) + "\n")
    answer: dict[str, Any] = json.loads(kept.read_text())
    return answer


def _student_file(problem: Problem, name: str, seed: int, steps: int) -> Path:
    (choice,) = [c for c in CHOICES if c.name == name]
    return run_folder(problem, choice, seed, steps) / "student.pt"


def _backbone(file: Path) -> dict[str, torch.Tensor]:
    """Weights of a student's backbone, without its head."""
    start = "flow_map."
    state = torch.load(file, weights_only=True)
    return {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}


def _train(
    problem: Problem,
    choice: Choice,
    seed: int,
    steps: int,
    cache: Path,
    folder: Path,
    backbone: dict[str, torch.Tensor] | None,
) -> tuple[StudyModule, dict[str, Any]]:
    problem.teacher  # noqa: B018 - loading one draws random numbers
    L.seed_everything(seed, verbose=False)
    recipe = choice.change(Recipe.of(problem).but(cache=str(cache)))
    module = recipe.make_module(steps)
    module.backbone = backbone
    filling = -(-recipe.trajectories["capacity"] // problem.batch)
    times = StepTimes(min(filling + 10, steps // 2))
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=200)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision=recipe.precision,
        logger=False,
        callbacks=[times, checkpoint],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    start = time.perf_counter()
    trainer.fit(module, problem.data(problem.batch), ckpt_path=str(last) if last.exists() else None)
    seconds = time.perf_counter() - start
    last.unlink(missing_ok=True)
    return module.float().eval(), {
        "choice": f"{choice.group}: {choice.name}",
        "seed": seed,
        "steps": steps,
        "milliseconds": 1e3 * times.total / max(1, times.count),
        "seconds": seconds,
        "head_parameters": _count(module.joint.head),
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def _measure(problem: Problem, choice: Choice, joint: f2.JointFlowMap) -> dict[str, Any]:
    """Everything the table shows of one student."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unconverged inversions are counted below
        result: dict[str, Any] = {
            "samples": judge(problem, joint, STEPS),
            "queries": {
                name: {str(k): likelihoods(problem, joint, query, k, k) for k in STEPS}
                for name, query in choice.queries.items()
                if problem.exact or query is not inverted  # sixty evaluations a step
            },
        }
        if choice.grids and problem.exact:  # hundreds of evaluations of 500 points
            result["queries"][", log-SNR grid"] = {
                str(k): likelihoods(problem, joint, own, k, log_snr_grid(k)) for k in STEPS
            }
            grids = {k: choose_grid(problem, joint, k) for k in STEPS}
            result["grids"] = {str(k): grid for k, grid in grids.items()}
            result["queries"][", learned grid"] = {str(k): likelihoods(problem, joint, own, k, grids[k]) for k in STEPS}
    return result
