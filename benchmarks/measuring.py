"""What benchmarks share: networks of random weights, times in turn, peak memory, agreement, kept results, tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from f2d2_lightning import DivergenceHead, FlowMap, GaussianBaseline, JointFlowMap
from f2d2_lightning.nn import DiT, PreconditionedMLP, ResNet, UNet
from f2d2_lightning.utils.files import whole_file

NETWORKS = ("digits", "resnet", "unet", "dit")
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_joint(name: str, resolution: int = 28, channels: int = 1, width: int = 32) -> JointFlowMap:
    """A joint map with random weights; time does not depend on them.

    Args:
        name: ``"digits"`` (the multilayer perceptron of the digits configuration, 8 x 8), ``"resnet"``,
            ``"unet"`` or ``"dit"`` (12 blocks: DiT-B at a width of 768).
        resolution: Side of the images, for all but the first.
        channels: Channels of the images, likewise.
        width: Channels of the network at full resolution, likewise.
    """
    if name == "digits":
        shape = (1, 8, 8)
        backbone: FlowMap = PreconditionedMLP(shape, "diagonal", width=512, blocks=2)
        return JointFlowMap(
            backbone, DivergenceHead(512, layers=0, per_axis=True, baseline=GaussianBaseline(shape, "diagonal"))
        )
    shape = (channels, resolution, resolution)
    if name == "resnet":
        backbone, features = ResNet(shape, width=width), width
    elif name == "unet":
        backbone = UNet(shape, width=width, multipliers=(1, 2, 2), blocks=2, attention=(resolution // 4,))
        features = backbone.features
    elif name == "dit":
        backbone = DiT(shape, width=width, depth=12 if width > 64 else 2, heads=max(1, width // 64))
        features = backbone.features
    else:
        raise ValueError(f"network is {name!r}; it is one of {', '.join(NETWORKS)}")
    return JointFlowMap(backbone, DivergenceHead(features, hidden=32, baseline=GaussianBaseline(shape, "isotropic")))


def wake(module: nn.Module) -> None:
    """Give last layers, which start at zero, random weights: a product with zeros may be cheaper."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=1e-2)


def dtype_of(name: str) -> torch.dtype | None:
    """Type of autocast by name; ``None`` for none."""
    return DTYPES[name]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, a GPU waited for before and after.

    On one CPU thread they are seconds of that thread at work, which other programs on the machine do not add to.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    watch = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = watch()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return watch() - start


def medians(calls: Sequence[Callable[[], object]], repeats: int, device: torch.device, warm: int = 2) -> list[float]:
    """Median seconds of each, taken in turn so that what else runs on the machine strikes all alike."""
    for _ in range(warm):
        for call in calls:
            call()
    rounds = [[seconds(call, device) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


class StepTimes(L.Callback):
    """Seconds spent in training steps after the first so many, by a clock of ``time``."""

    def __init__(self, skipped: int, clock: Callable[[], float] = time.process_time) -> None:
        self.skipped, self.clock, self.seconds = skipped, clock, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.started = self.clock()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > self.skipped:
            self.seconds += self.clock() - self.started


def quiet_trainer(steps: int, **options: Any) -> L.Trainer:
    """A trainer of so many steps on the CPU that says and writes nothing."""
    quiet = {
        "accelerator": "cpu", "gradient_clip_val": 1.0, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return L.Trainer(max_steps=steps, **(quiet | options))


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Most memory in tensors at any time during a call beyond what was held before it, MiB.

    On a GPU the allocator's own count. On a CPU every allocation and release that torch's profiler sees, added up in
    order: tensors and the workspaces of kernels that torch allocates, not those that oneDNN keeps for itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("torch's profiler reported no memory events, so there is no peak to report")
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def resident_mib(*modules: nn.Module, optimizer: torch.optim.Optimizer | None = None, more: int = 0) -> float:
    """Memory held between steps: weights, buffers, the optimiser's state and ``more`` bytes, MiB."""
    tensors = {id(v): v for m in modules for v in (*m.parameters(), *m.buffers())}
    total = sum(v.numel() * v.element_size() for v in tensors.values()) + more
    if optimizer is not None:
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        total += sum(v.numel() * v.element_size() for v in states)
    return total / 2**20


def agreement(value: Tensor, reference: Tensor) -> dict[str, float]:
    """Mean, gap to the reference with its standard error, error per point, correlation; of points that have a value.

    Args:
        value: Negative log-likelihoods ``(B,)``; not finite where there is none.
        reference: The same, of the reference.
    """
    good = value.isfinite()
    share = float(good.double().mean())
    if int(good.sum()) < 3:
        return {"share": share} | dict.fromkeys(("nll", "gap", "gap_error", "error", "r"), math.nan)
    value, reference = value[good].double(), reference[good].double()
    off = value - reference
    return {
        "share": share,
        "nll": float(value.mean()),
        "gap": float(off.mean()),
        "gap_error": float(off.std() / len(off) ** 0.5),
        "error": float(off.abs().mean()),
        "r": float(torch.corrcoef(torch.stack((value, reference)))[0, 1]),
    }


def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|`` of two sets of points ``(N, d)``, ``(M, d)``, without bias.

    Szekely and Rizzo, 2013, https://doi.org/10.1016/j.jspi.2013.03.018
    """

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``torch.save`` wrote to ``path``, made and written first if it is not there."""
    if not path.exists():
        with torch.enable_grad():
            value = make()
        with whole_file(path) as partial:
            torch.save(value, partial)
    return torch.load(path, weights_only=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
