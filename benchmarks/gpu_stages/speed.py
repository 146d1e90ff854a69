"""Times and memory: this repository's own benchmarks at the sizes of a GPU, and where the time of a step goes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from gpu_stages.kept import Kept
from training_step import FULL, RECIPES, OurStep, Setting

HERE = Path(__file__).parent.parent
UNET = {"network": "unet", "resolution": "32", "channels": "3", "width": "128", "batch": "64"}
DIT = {"network": "dit", "resolution": "32", "channels": "4", "width": "768", "batch": "64"}
SIZES = {"U-Net, 32 x 32": UNET, "DiT-B/2, latents": DIT}
TINY = {"network": "unet", "resolution": "8", "channels": "1", "width": "8", "batch": "2"}


def _command(script: str, *options: str) -> str:
    """What one of the benchmarks prints; its error where it fails."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *options], capture_output=True, text=True, check=False, timeout=400
    )
    print(done.stdout, done.stderr[-2000:] if done.returncode else "", flush=True)
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr[-1500:]}"


def _profile(setting: Setting, recipe: str) -> str:
    """The operations that a step spends most time in."""
    step: OurStep = RECIPES[recipe](setting)
    data = setting.data()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(3):
        step.step(data)
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(3):
            step.step(data)
    order = "self_cuda_time_total" if setting.device == "cuda" else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))


def run(device: torch.device, tiny: bool, kept: Kept, seconds: float) -> None:
    """Text of each table, and a profile; no new table is begun after so many seconds, the next call goes on."""
    start = time.perf_counter()
    for name, (script, *options) in _tables(device, tiny).items():
        if name in kept.part("tables"):
            continue
        if time.perf_counter() - start > seconds:
            raise SystemExit(f"speed: {seconds:.0f} s are over, and {name!r} is not measured; call again")
        kept.part("tables")[name] = _command(script, *options)
        kept.save()
    first = (
        Setting(network="unet", batch=2, resolution=8, width=8, nodes=4)
        if tiny
        else Setting("unet", 64, resolution=32, channels=3, width=128, device=device.type, dtype="bf16")
    )
    kept.part("profile")[FULL] = _profile(first, FULL)


def _tables(device: torch.device, tiny: bool) -> dict[str, tuple[str, ...]]:
    """Commands by name, the most telling first."""
    variants: dict[str, dict[str, str | None]] = {
        "both in float32": {},
        "ours in bf16, compiled, channels last": {"dtype": "bf16", "compile": None, "channels-last": None},
        "both in bf16": {"dtype": "bf16", "official-dtype": "bf16"},
    }
    shared: dict[str, str | None] = {"device": device.type, "repeats": "2" if tiny else "5"}
    sizes = {"tiny": TINY} if tiny else SIZES
    made = {}
    for variant, more in list(variants.items())[: 1 if tiny else None]:
        for size, options in sizes.items():
            extra = {"nodes": "4"} if tiny else {}
            made[f"{size}, {variant}"] = _words("training_step.py", shared | options | extra | more)
    for size, options in sizes.items():
        rest = {name: value for name, value in options.items() if name != "network"}
        precision = {} if tiny else {"dtype": "bf16"}
        options = shared | {"networks": options["network"], "measured": "4"} | rest | precision
        made[f"{size}, likelihoods"] = _words("nll_throughput.py", options)
    return made


def _words(script: str, options: Mapping[str, str | None]) -> tuple[str, ...]:
    return (script, *(w for name, value in options.items() for w in (f"--{name}", value) if w is not None))
