"""What two processes do in tests/test_strategies.py; the same code in one process is what they are compared with.

    python tests/support/distributed_worker.py FOLDER

Each case trains in double precision on objectives without random numbers, so that two processes with half of every
batch each must agree with one process to rounding.
"""

from __future__ import annotations

import os
import signal
import sys
import unittest
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.distributed.tensor import DTensor

import f2d2_lightning as f2
from f2d2_lightning.adapters import MeanFlow
from f2d2_lightning.callbacks import LastCheckpoint
from f2d2_lightning.flows import Point
from f2d2_lightning.nn import MLP
from f2d2_lightning.objectives import Examples
from f2d2_lightning.utils.sharding import FSDP2_FROM, shard
from foreign import ManualModule, MeanFlowModule
from launching import WITH_FSDP2, run_cases
from lightning_parts import Pair, trainer

STEPS = 6


class FromData(f2.objectives.Semigroup):
    """The midpoint rule at times and noise that are functions of the data."""

    def loss(self, student, batch):
        data, cond = batch.data, batch.cond
        s, t = (torch.frac(13 * data[:, 0]).abs(), torch.frac(7 * data[:, 1]).abs())
        x = self.path.sample(data, torch.sin(37 * data.flip(1)), s)
        point = Point(x, s, cond)
        target, anchored = self.target(student, batch.source, point, t), (batch.anchor or batch.source)(point)
        terms = [self.terms(student, Examples(x, s, end, cond, pair)) for end, pair in ((t, target), (s, anchored))]
        return type(terms[0])(*(a + b for a, b in zip(*terms, strict=True)))


class Halves(Pair):
    """The global batch is the same for any number of processes."""

    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.batch_size = 32 // replicas


class Student(f2.F2D2Module):
    """A student whose scale is not measured with random numbers."""

    def prepare(self) -> None:
        self.joint.head.scale.fill_(2.0)


class Foreign(MeanFlowModule):
    """A foreign module whose loss is a function of the data; shards its network as Lightning's manual says."""

    def loss(self, batch):
        noise, t = torch.sin(41 * batch), torch.frac(11 * batch[:, 0]).abs()
        z = (1 - t)[:, None] * batch + t[:, None] * noise
        return (self.net(z, (t, torch.zeros_like(t))) - (noise - batch)).square().mean()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.net, self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.5)


class ForeignManual(Foreign, ManualModule):
    """The same, a GAN's way."""

    training_step = ManualModule.training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.critic.parameters(), 1e-3, momentum=0.5), torch.optim.SGD(
            self.net.parameters(), 0.05, momentum=0.5
        )

    def configure_model(self) -> None:
        super().configure_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.critic, self.device_mesh["data_parallel"])


class Gradients(L.Callback):
    """Gradients of the last step, as the optimiser sees them."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.gradients = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}


class Stop(L.Callback):
    """A signal to one process, in the last of some steps of a run that was to be longer."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.steps - 1 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def whole(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.5)


def constant(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def teacher() -> f2.FlowMatchingModule:
    torch.manual_seed(1)
    made = f2.FlowMatchingModule(MLP((2,), width=16, blocks=1), shape=(2,))
    with torch.no_grad():
        for p in made.average.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def student(objective: Any = None, **kwargs: Any) -> Student:
    torch.manual_seed(2)
    settings: dict[str, Any] = {"optimizer": sgd, "lr_scheduler": constant, "ema_decay": 0.5, "steps": (1, 2)}
    reference, estimator = f2.Reference(steps=4, probes=0), f2.divergence.Exact()
    settings |= {"objective": objective or FromData(), "reference": reference, "estimator": estimator}
    return Student(teacher=teacher(), **(settings | kwargs))


def pool_objective() -> f2.TrajectoryRegression:
    # small batches, and phases: what differs between processes must not change how often the network is called
    starts = {"data": 0.3, "mixed": 0.2, "path": 0.3, "student": 0.2}
    return f2.TrajectoryRegression(nodes=4, capacity=32, refresh=6.0, chunk=8, starts=starts, unroll=0.6)


def f2d2(**kwargs: Any) -> f2.F2D2Callback:
    torch.manual_seed(4)
    settings: dict[str, Any] = {"flow_map": "net", "adapter": MeanFlow(directions="both"), "optimizer": sgd}
    settings |= {"objective": FromData(), "estimator": f2.divergence.Exact(), "steps": (1, 2), "ema_decay": 0.5}
    settings |= {"reference": f2.Reference(steps=4, probes=0), "check": False, "weight": 0.5}
    # a share of the whole batch is another draw than shares of its halves
    settings["batch_share"] = 1.0
    return f2.F2D2Callback(**(settings | kwargs))


def strategy(name: str) -> Any:
    if name.startswith("ddp"):
        # two backward passes a step, as in a GAN, need it with or without this package
        unused = name == "ddp-unused"
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=unused)
    if name.startswith("fsdp") and "fsdp" not in WITH_FSDP2:
        raise unittest.SkipTest(f"FSDP2 needs torch {FSDP2_FROM}")
    if name == "fsdp":
        return ModelParallelStrategy(
            process_group_backend="gloo",
            save_distributed_checkpoint=False,
            data_parallel_size=2,
            tensor_parallel_size=1,
        )
    if name == "fsdp-sharded":
        return ModelParallelStrategy(process_group_backend="gloo", data_parallel_size=2, tensor_parallel_size=1)
    return "auto"


def fit(
    folder: Path, name: str, module: L.LightningModule, callbacks: list[L.Callback], replicas: int, **kwargs: Any
) -> L.Trainer:
    torch.manual_seed(0)
    ckpt = kwargs.pop("ckpt_path", None)
    settings: dict[str, Any] = {"max_steps": STEPS, "max_epochs": -1, "devices": replicas, "strategy": strategy(name)}
    made = trainer(folder, callbacks=callbacks, log_every_n_steps=1, **(settings | kwargs))
    made.fit(module, datamodule=Halves(replicas), ckpt_path=ckpt)
    return made


def outcome(module: L.LightningModule, made: L.Trainer, callback: f2.F2D2Callback | None = None) -> dict[str, Any]:
    """Everything that must agree, whole."""
    state = {name: whole(p) for name, p in (*module.named_parameters(), *module.named_buffers())}
    if callback is not None:
        for kind in ("live", "average"):
            modules: nn.Module = getattr(callback.added, kind)
            state |= {f"{kind}.{name}": value.clone() for name, value in modules.state_dict().items()}
    metrics = {
        name: float(v) for name, v in made.callback_metrics.items() if name.startswith("val/") and name != "val/loss"
    }
    gradients = next(c for c in made.callbacks if isinstance(c, Gradients)).gradients
    return {"state": state, "metrics": metrics, "gradients": gradients}


def train_module(folder: Path, name: str, replicas: int, **kwargs: Any) -> dict[str, Any]:
    module = student(**kwargs)
    return outcome(module, fit(folder, name, module, [Gradients()], replicas))


def train_callback(
    folder: Path, name: str, replicas: int, kind: type[Foreign] = Foreign, trainer_options: Any = None, **kwargs: Any
) -> dict[str, Any]:
    module, callback = kind(), f2d2(**kwargs)
    used = "ddp-unused" if name == "ddp" and kind is ForeignManual else name
    made = fit(folder, used, module, [callback, Gradients()], replicas, **(trainer_options or {}))
    answer = outcome(module, made, callback)
    export = folder / f"{name}-{kwargs.get('frozen')}-{kind.__name__}.pt"
    callback.export(export)
    made.strategy.barrier()
    joint = f2.load_joint(export, Foreign().net)
    answer["exported"] = f2.log_prob(joint, torch.ones(2, 2), 2).value.detach()
    return answer


def resume(folder: Path, name: str, replicas: int, which: str) -> dict[str, Any]:
    """Stop within an epoch, or at its end, go on, and end as if nothing had happened."""

    def make() -> tuple[L.LightningModule, list[L.Callback], f2.F2D2Callback | None]:
        if which == "module":
            return student(pool_objective()), [Gradients()], None
        callback = f2d2(objective=pool_objective())
        return Foreign(), [callback, Gradients()], callback

    module, callbacks, callback = make()
    uninterrupted = outcome(module, fit(folder, name, module, callbacks, replicas), callback)
    module, callbacks, _ = make()
    keep, steps = LastCheckpoint(2, folder / f"{name}-{which}"), {"module": 2, "callback": 3}[which]
    try:
        fit(folder, name, module, [*callbacks, keep, Stop(steps)], replicas, enable_checkpointing=True)
    except SIGTERMException as stop:
        code = int(stop.code)
    module, callbacks, callback = make()
    ckpt = folder / f"{name}-{which}" / "last.ckpt"
    made = fit(folder, name, module, callbacks, replicas, ckpt_path=ckpt)
    objective: Any = module.objective if isinstance(module, Student) else callback.objective  # type: ignore[union-attr]
    answer = {"uninterrupted": uninterrupted, "resumed": outcome(module, made, callback), "is_folder": ckpt.is_dir()}
    answer |= {"code": code, "older": (ckpt.parent / "previous.ckpt").exists()}
    return answer | {"first_trajectory": objective.state_dict()["pool"]["entries"][0]["x"]}


class Odd(Pair):
    """As many samples as no two processes can share evenly: one is repeated, alone in its batch of 8."""

    def splits(self):
        return {name: (values[:49], labels) for name, (values, labels) in super().splits().items()}


class FirstAlone(Odd):
    """Samples that the first process has alone."""

    def val_dataloader(self) -> Any:
        x = self.splits()["val"][0]
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return torch.utils.data.DataLoader(Streamed(x if rank == 0 else x[:0]), batch_size=64)

    test_dataloader = val_dataloader


class Streamed(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Rows of a tensor, which nothing deals to the processes."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __iter__(self) -> Any:
        return iter(self.x)


FEW_STEPS = f2.Reference(steps=4)


def evaluate(
    folder: Path,
    name: str,
    replicas: int,
    who: str,
    reference: f2.Reference = FEW_STEPS,
    data: Pair | None = None,
    batch: int = 16,
) -> dict[str, Any]:
    """Figures of validation and test, with random probes and a reference of some samples."""
    data, added = data or Odd(), []
    data.eval_batch_size = batch // replicas
    if who == "teacher":
        module: L.LightningModule = teacher()
        module.reference, module.validate_nll = reference, True
    elif who == "student":
        module = student(reference=reference, reference_samples=13)
    else:
        module, added = Foreign(), [f2d2(reference=reference, reference_samples=13)]
    metrics: dict[str, float] = {}
    if added:
        fit(folder, name, module, added, replicas, max_steps=1)
    for stage in ("validate", "test"):
        made = trainer(folder, devices=replicas, strategy=strategy(name), callbacks=added)
        getattr(made, stage)(module, datamodule=data, verbose=False)
        kept = (n for n in made.callback_metrics if who != "callback" or "f2d2" in n)
        metrics |= {n: float(made.callback_metrics[n]) for n in kept}
    model = added[0] if added else module
    if model.steps:
        row = model.agreement_table()[-1]
        metrics |= {f"table {name}": row[name] for name in ("nll", "nll_standard_error")}
    choice = model.reference_choice
    return metrics if choice is None else metrics | {"steps": choice.reference.steps, "seconds": choice.seconds}


def cases(replicas: int) -> dict[str, Any]:
    """Name to function of a folder. One process does those that two are compared with."""
    names = ("ddp", "fsdp") if replicas == 2 else ("one",)
    made: dict[str, Any] = {}
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    for name in names:
        made[f"{name} module"] = lambda folder, n=name: train_module(folder, n, replicas)
        made[f"{name} module frozen"] = lambda folder, n=name: train_module(folder, n, replicas, frozen=True)
        made[f"{name} callback"] = lambda folder, n=name: train_callback(folder, n, replicas)
        made[f"{name} callback frozen"] = lambda folder, n=name: train_callback(folder, n, replicas, frozen=True)
        made[f"{name} callback manual"] = lambda folder, n=name: train_callback(folder, n, replicas, ForeignManual)
        made[f"{name} callback accumulating"] = lambda folder, n=name: train_callback(
            folder, n, replicas, trainer_options=options
        )
    for who in ("teacher", "student", "callback"):
        made[f"evaluation {who}"] = lambda folder, w=who: evaluate(folder, names[0], replicas, w)
    if replicas == 2:
        for name, who in (("ddp", "teacher"), ("ddp", "student"), ("fsdp", "callback")):
            made[f"chosen {who}"] = lambda folder, n=name, w=who: evaluate(folder, n, 2, w, f2.Reference(), batch=64)
        for who in ("teacher", "student"):
            made[f"alone {who}"] = lambda folder, w=who: evaluate(folder, "ddp", 2, w, f2.Reference(), FirstAlone())
        for name in ("ddp", "fsdp", "fsdp-sharded"):
            for which in ("module", "callback"):
                made[f"{name} resume {which}"] = lambda folder, n=name, w=which: resume(folder, n, replicas, w)
    return made


if __name__ == "__main__":
    run_cases(cases, Path(sys.argv[1]), *sys.argv[2:3])
