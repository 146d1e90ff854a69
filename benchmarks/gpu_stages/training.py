"""Training on the device: the same few steps as on the CPU in float32, under every strategy, and a resumed run."""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning.adapters import MeanFlow
from f2d2_lightning.callbacks import SampleQuality, TestReport
from f2d2_lightning.metrics import SmallFeatures
from f2d2_lightning.nn import PreconditionedMLP
from f2d2_lightning.utils.sharding import whole
from gpu_stages.devices import Foreign, error, same_draws
from gpu_stages.kept import Kept
from measuring import quiet_trainer

STEPS, SHAPE, LEVELS = 8, (1, 8, 8), 17
TOLERANCE = {"32-true": 2e-2, "bf16-mixed": 0.2, "bf16-true": 0.3}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    # of Adam's first steps only signs count, and small differences of gradients would show as large ones of weights
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def teacher() -> f2.FlowMatchingModule:
    torch.manual_seed(1)
    network = PreconditionedMLP(SHAPE, "diagonal", width=64, blocks=2)
    made = f2.FlowMatchingModule(network, shape=SHAPE, levels=LEVELS, optimizer=sgd, warmup=2)
    with torch.no_grad():
        for parameter in made.average.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = f2.Quantization(LEVELS).dequantize(f2.data.Digits().dataset("train").values)
    for network in (made.average, made.flow_map):
        network.baseline.fit([images])
    return made


def student(**kwargs: Any) -> f2.F2D2Module:
    torch.manual_seed(2)
    objective = f2.TrajectoryRegression(nodes=8, capacity=256, chunk=64, unroll=0.5)
    settings: dict[str, Any] = {"objective": objective, "reference": f2.Reference(steps=8, probes=0)}
    settings |= {"optimizer": sgd, "warmup": 2, "steps": (1, 4), "reference_samples": 64}
    return f2.F2D2Module(teacher=teacher(), **(settings | kwargs))


class ForeignModule(L.LightningModule):
    """Somebody's MeanFlow module on points."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Foreign(2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noise, t = torch.randn_like(batch), torch.rand(len(batch), device=batch.device)
        z = (1 - t)[:, None] * batch + t[:, None] * noise
        return (self.net(z, (t, torch.zeros_like(t))) - (noise - batch)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", batch.square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.net.parameters())


class Points(f2.data.FlowDataModule):
    """A few correlated points."""

    shape = (6,)

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(6, 6, generator=generator)
        return {n: (torch.randn(c, 6, generator=generator) @ mix, None) for n, c in (("train", 512), ("val", 64))}


def callback(**kwargs: Any) -> f2.F2D2Callback:
    torch.manual_seed(4)
    objective = f2.TrajectoryRegression(nodes=8, capacity=256, chunk=64, unroll=0.5)
    settings: dict[str, Any] = {"objective": objective, "optimizer": sgd, "steps": (1, 4), "check": False}
    settings |= {"reference": f2.Reference(steps=8, probes=0)}
    return f2.F2D2Callback("net", MeanFlow("net(x, (s, t))", directions="both"), **(settings | kwargs))


def fit(folder: str, accelerator: str, kind: str, **kwargs: Any) -> tuple[Moved, dict[str, float]]:
    """What some steps did to the weights, and what validation logged."""
    steps, resume = kwargs.pop("steps", STEPS), kwargs.pop("ckpt_path", None)
    settings: dict[str, Any] = {"max_epochs": -1, "accelerator": accelerator, "devices": 1, "default_root_dir": folder}
    settings |= {"enable_checkpointing": kwargs.pop("save", False), "limit_train_batches": 4, "limit_val_batches": 1}
    settings |= {"gradient_clip_val": None}  # FSDP1 clips in a way of its own
    module_options = kwargs.pop("module", {})
    stop = [Stop()] if kwargs.pop("stop", False) else []
    moved = Moved()
    with same_draws() if kwargs.pop("same", True) else contextlib.nullcontext():
        L.seed_everything(0, verbose=False)
        if kind == "module":
            module, added, data = student(**module_options), [], f2.data.Digits(batch_size=64, eval_batch_size=64)
        elif kind == "teacher":
            module, added, data = teacher(), [], f2.data.Digits(batch_size=64, eval_batch_size=64)
        else:
            module, added, data = ForeignModule(), [callback(**module_options)], Points(64, 64)
        made = quiet_trainer(steps, **(settings | {"callbacks": [*added, *stop, moved]} | kwargs))
        made.fit(module, datamodule=data, ckpt_path=resume)
        if made.checkpoint_callback is not None:
            made.save_checkpoint(Path(folder, "end.ckpt"))
    metrics = {name: float(value) for name, value in made.callback_metrics.items() if "/" in name}
    return moved, metrics


def runs(tiny: bool) -> dict[str, dict[str, Any]]:
    """Options of each run, by name."""
    made: dict[str, dict[str, Any]] = {
        "student": {"kind": "module"},
        "student, bf16-mixed": {"kind": "module", "precision": "bf16-mixed"},
        "teacher": {"kind": "teacher"},
        "teacher, bf16-mixed": {"kind": "teacher", "precision": "bf16-mixed"},
        "callback": {"kind": "callback"},
        "callback, bf16-mixed": {"kind": "callback", "precision": "bf16-mixed"},
        "callback, frozen": {"kind": "callback", "module": {"frozen": True}},
        "student, accumulated gradients": {"kind": "module", "accumulate_grad_batches": 2, "steps": 4},
    }
    if not tiny:
        made |= {
            "student, compiled": {"kind": "module", "module": {"compile": True}},
            "student, bf16-mixed, compiled": {
                "kind": "module",
                "precision": "bf16-mixed",
                "module": {"compile": True},
            },
            "student, DDP": {"kind": "module", "strategy": DDPStrategy()},
            "callback, DDP": {"kind": "callback", "strategy": DDPStrategy()},
            "student, FSDP1": {
                "kind": "module",
                "strategy": FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="full"),
            },
            "student, FSDP2": {"kind": "module", "strategy": ModelParallelStrategy(save_distributed_checkpoint=False)},
        }
    return made


class Moved(L.Callback):
    """How far each weight in training went; all weights and buffers, the callback's too, are where the run is."""

    def networks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[nn.Module]:
        added = [c.added for c in trainer.callbacks if isinstance(c, f2.F2D2Callback)]  # type: ignore[attr-defined]
        return [pl_module, *(part for a in added for part in (a.live, a.average))]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = self.weights(trainer, pl_module)

    def weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        named = {id(p): p for network in self.networks(trainer, pl_module) for p in network.parameters()}
        return torch.cat([whole(p.detach()).double().cpu().flatten() for p in named.values()])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for network in self.networks(trainer, pl_module):
            for name, value in (*network.named_parameters(), *network.named_buffers()):
                if value.device.type != pl_module.device.type:
                    raise RuntimeError(f"{name} of {type(network).__name__} stayed on {value.device}")
        self.after = self.weights(trainer, pl_module)
        self.moved = self.after - self.before


class Stop(L.Callback):
    """Ends a run after its first epoch, which is half of it."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


def resumed(folder: str, accelerator: str, kind: str) -> float:
    """Largest difference of weights between a run and the same in two halves."""
    straight, _ = fit(folder, accelerator, kind, same=False)
    fit(folder, accelerator, kind, same=False, save=True, stop=True)
    again, _ = fit(folder, accelerator, kind, same=False, ckpt_path=str(Path(folder, "end.ckpt")))
    return float((straight.after - again.after).abs().max())


def tested(folder: str, accelerator: str) -> dict[str, float]:
    """``Trainer.test`` with everything that looks at a run."""
    quality = SampleQuality(SmallFeatures(), samples=64, steps=(1, 4), kid=True, cache=folder, data="test")
    options: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "default_root_dir": folder}
    made = quiet_trainer(-1, limit_test_batches=1, callbacks=[quality, TestReport()], **options)
    (figures,) = made.test(student(), datamodule=f2.data.Digits(batch_size=64, eval_batch_size=64), verbose=False)
    return dict(figures)


def run(device: torch.device, tiny: bool, kept: Kept) -> None:
    """Rows of the table, and what failed."""
    accelerator = "cpu" if device.type == "cpu" else "gpu"
    rows, failures = kept.part("rows"), kept.part("failures")

    def attempt(name: str, call: Callable[[], dict[str, Any]]) -> None:
        if name in rows:
            return
        failures.pop(name, None)
        start = time.perf_counter()
        try:
            rows[name] = call() | {"seconds": time.perf_counter() - start}
        except Exception as raised:  # a table of what works shows what does not
            failures[name] = f"{type(raised).__name__}: {str(raised)[:500]}"
            traceback.print_exc()
        kept.save()
        print(name, rows.get(name, failures.get(name)), flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def compared(options: dict[str, Any]) -> dict[str, Any]:
        plain = {k: v for k, v in options.items() if k not in ("precision", "strategy")}
        plain["module"] = {k: v for k, v in options.get("module", {}).items() if k != "compile"}
        with tempfile.TemporaryDirectory() as folder:
            truth, expected = fit(folder, "cpu", **plain)
        with tempfile.TemporaryDirectory() as folder:
            answer, metrics = fit(folder, accelerator, **options)
        off = error([answer.moved], [truth.moved])
        allowed = TOLERANCE[options.get("precision", "32-true")]
        missing = expected.keys() - metrics.keys()
        if not off <= allowed or missing:
            raise RuntimeError(f"weights are {off:.2g} off those of the CPU, {allowed} allowed; not logged: {missing}")
        return {"error": off, "figures": metrics, "figures on the CPU": expected}

    for name, options in runs(tiny).items():
        attempt(name, lambda options=options: compared(options))
    for kind in ("module", "callback"):
        with tempfile.TemporaryDirectory() as folder:
            attempt(f"{kind}, resumed", lambda k=kind, f=folder: {"error": resumed(f, accelerator, k)})
    with tempfile.TemporaryDirectory() as folder:
        attempt("test with report and sample quality", lambda: {"figures": tested(folder, accelerator)})
