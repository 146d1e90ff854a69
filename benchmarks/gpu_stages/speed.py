"""Times and memory: this repository's own benchmarks at the sizes of a GPU, and where the time of a step goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from training_step import RECIPES, OurStep, Setting

HERE = Path(__file__).parent.parent
CIFAR = ("--network", "unet", "--resolution", "32", "--channels", "3", "--width", "128", "--batch", "64")
LATENTS = ("--network", "dit", "--resolution", "32", "--channels", "4", "--width", "768", "--batch", "64")
TINY = ("--network", "unet", "--resolution", "8", "--channels", "1", "--width", "8", "--batch", "2", "--nodes", "4")


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


def run(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Text of each table."""
    on = ("--device", device.type)
    if tiny:
        sizes = {"tiny": TINY}
        variants: dict[str, tuple[str, ...]] = {"float32": ()}
        repeats = ("--repeats", "2")
    else:
        sizes = {"CIFAR-10's U-Net": CIFAR, "DiT-B/2 on latents": LATENTS}
        variants = {
            "ours in float32": (),
            "ours in bf16, compiled, channels last": ("--dtype", "bf16", "--compile", "--channels-last"),
            "both in bf16": ("--dtype", "bf16", "--official-dtype", "bf16"),
        }
        repeats = ("--repeats", "5")
    tables = {
        f"{size}: {variant}": _command("training_step.py", *on, *options, *more, *repeats)
        for size, options in sizes.items()
        for variant, more in variants.items()
    }
    for size, options in sizes.items():
        kept = {k: v for k, v in zip(options[::2], options[1::2], strict=True) if k not in ("--network", "--nodes")}
        flat = [word for pair in kept.items() for word in pair]
        compiled = () if tiny else ("--dtype", "bf16", "--compile")
        tables[f"{size}: likelihoods"] = _command(
            "nll_throughput.py", *on, "--networks", options[1], *flat, *compiled, *repeats, "--measured", "4"
        )
    first = (
        Setting(network="unet", batch=2, resolution=8, width=8, nodes=4)
        if tiny
        else Setting(network="unet", batch=64, resolution=32, channels=3, width=128, device=device.type, dtype="bf16")
    )
    profile = {name: _profile(first, name) for name in list(RECIPES)[:1]}
    return {"tables": tables, "profile": profile}
