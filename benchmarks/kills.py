"""Kill ``f2d2 fit`` at random moments, give the same command again, and compare with a run that was not killed.

    python benchmarks/kills.py --kills 50 --jobs 2

Each kill has a run of its own: a small student on digits that validates after each epoch, saves every third step and
integrates new trajectories in every step. It is killed (SIGKILL, or SIGTERM, by turns) at a random moment of one kind:
any time after the start; while a checkpoint is written, or put in its place; while trajectories are integrated, or
integrated again after a resume; at an epoch's end; in validation. The same command is then given until it ends, and all
weights must be the same, bit for bit. Takes about 25 seconds a kill on one core; prints a table.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KINDS = {
    "any time": 0,
    "saving": 5,
    "replacing": 10,
    "integrating": 20,
    "integrating again": 4,
    "epoch end": 14,
    "validation": 14,
}
"""Moments, and how many of each a run passes."""
CONFIGS = Path(__file__).parent.parent / "configs"
STEPS = 14


def command(folder: Path, teacher: Path, kind: str = "", count: int = 0, number: int = 0) -> list[str]:
    """The training of one student; with ``kind``, in a process that ends itself at the ``count``-th such moment."""
    options = {
        "model.init_args.teacher": teacher,
        "model.init_args.flow_map.init_args.width": 32,
        "model.init_args.objective": "TrajectoryRegression",
        "model.init_args.objective.init_args.nodes": 8,
        "model.init_args.objective.init_args.capacity": 256,
        "model.init_args.objective.init_args.refresh": 64,
        "model.init_args.objective.init_args.chunk": 64,
        "model.init_args.reference_samples": 8,
        "model.init_args.reference": "f2d2_lightning.Reference",
        "model.init_args.reference.steps": 4,
        "data.init_args.batch_size": 512,
        "trainer.max_steps": STEPS,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.callbacks": "[]",
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "trainer.logger.init_args.save_dir": folder,
        "checkpoint.every_n_train_steps": 3,
    }
    start = [sys.executable, __file__, "--child", kind or "none", str(count), str(number)]
    return [*start, "fit", f"--config={CONFIGS / 'digits_student.yaml'}", *(f"--{k}={v}" for k, v in options.items())]


def child(kind: str, count: int, number: int, arguments: list[str]) -> None:
    """``f2d2`` in this process, which ends itself at the ``count``-th moment of a kind."""
    import torch

    from f2d2_lightning import cli
    from f2d2_lightning.callbacks import last_checkpoint
    from f2d2_lightning.modules import F2D2Module
    from f2d2_lightning.objectives import _pool

    torch.set_num_threads(1)
    passed = Counter[str]()

    def moment(name: str) -> None:
        passed[name] += 1
        if name == kind and passed[name] == count:
            os.kill(os.getpid(), number)

    def before(owner: object, name: str, moment_of: str) -> None:
        original = getattr(owner, name)

        def watched(*args: object, **kwargs: object) -> object:
            moment(moment_of)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    before(torch, "save", "saving")
    before(last_checkpoint, "sync", "replacing")
    before(last_checkpoint.Path, "replace", "replacing")
    before(_pool, "integrate_both_ways", "integrating")
    before(F2D2Module, "on_validation_epoch_start", "epoch end")
    before(last_checkpoint.LastCheckpoint, "on_train_epoch_end", "epoch end")
    before(F2D2Module, "validation_step", "validation")
    before(F2D2Module, "on_validation_epoch_end", "validation")
    cli.main(arguments)


def run(arguments: list[str], log: Path, after: float | None = None, number: int = signal.SIGKILL) -> int:
    """A process to its end, or for some seconds; its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("a") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            return process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            return process.wait()


def difference(one: Path, other: Path) -> str:
    """How two checkpoints differ; empty if they hold the same weights at the same step."""
    import torch

    a, b = (torch.load(path, map_location="cpu", weights_only=True) for path in (one, other))
    if a["global_step"] != b["global_step"]:
        return f"step {b['global_step']}, not {a['global_step']}"
    names = [name for name, value in a["state_dict"].items() if not torch.equal(value, b["state_dict"][name])]
    return f"{len(names)} tensors differ, first {names[0]}" if names else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are; a temporary one by default")
    options = parser.parse_args()
    home = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    home.mkdir(parents=True, exist_ok=True)
    teacher = home / "digits/teacher/checkpoints/last.ckpt"
    small = ["--model.init_args.flow_map.init_args.width=32", "--trainer.max_steps=20", "--trainer.callbacks=[]"]
    start = [sys.executable, __file__, "--child", *("none", "0", "0"), "fit"]
    start.append(f"--config={CONFIGS / 'digits_teacher.yaml'}")
    begin = time.monotonic()
    code = run([*start, *small, f"--trainer.logger.init_args.save_dir={home}"], home / "teacher.log")
    code = code or run(command(home / "whole", teacher), home / "whole.log")
    if code:
        sys.exit(f"the run that is not killed failed ({code}); see {home}")
    length, whole = (time.monotonic() - begin) / 2, home / "whole/digits/student/checkpoints/last.ckpt"

    def one(index: int) -> tuple[str, str, int, str]:
        draw = random.Random(f"{options.seed} {index}")
        kind, number = list(KINDS)[index % len(KINDS)], (signal.SIGKILL, signal.SIGTERM)[index // len(KINDS) % 2]
        folder, log = home / f"kill-{index}", home / f"kill-{index}.log"
        if kind == "any time":
            code = run(command(folder, teacher), log, draw.uniform(0.2, 1.0) * length, number)
        else:
            if kind == "integrating again":
                run(command(folder, teacher, "replacing", draw.randint(4, 8), signal.SIGKILL), log)
            moment = kind.removesuffix(" again")
            code = run(command(folder, teacher, moment, draw.randint(1, KINDS[kind]), number), log)
        starts = 0
        while starts < 5:
            starts += 1
            if run(command(folder, teacher), log) == 0:
                break
        last = folder / "digits/student/checkpoints/last.ckpt"
        wrong = difference(whole, last) if last.exists() else "no checkpoint"
        return kind, signal.Signals(number).name, code, wrong or ("" if starts == 1 else f"{starts} starts")

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(one, range(options.kills)))
    print("| moment | signal | kills | ended by it | went on to the same bits |\n|---|---|---|---|---|")
    for kind in KINDS:
        for name in ("SIGKILL", "SIGTERM"):
            mine = [result for result in results if result[:2] == (kind, name)]
            ended = sum(code != 0 for _, _, code, _ in mine)
            if mine:
                print(f"| {kind} | {name} | {len(mine)} | {ended} | {sum(not wrong for *_, wrong in mine)} |")
    failures = [(index, *result) for index, result in enumerate(results) if result[3]]
    for failure in failures:
        print(*failure)
    print(f"{len(results) - len(failures)} of {len(results)} ended in the same bits; runs and logs in {home}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    else:
        main()
