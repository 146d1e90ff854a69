"""Fashion-MNIST at full size: a teacher, a few-step sampler without a head, and the student, each in one stage.

Only averaged weights pass from stage to stage, at most 16 MB; a student integrates its pool again. All choices are
those of the repository's own configurations or were made on validation images; test images are looked at once, here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.callbacks import SampleQuality
from f2d2_lightning.data import FashionMNIST
from f2d2_lightning.flows import FlowMap
from f2d2_lightning.nn import PreconditionedUNet
from f2d2_lightning.plots import sample_figure
from f2d2_lightning.plots.likelihood import calibration_figure
from f2d2_lightning.utils.measuring import spread_of
from measuring import agreement, quiet_trainer
from train_features import EPOCHS, SHIFT, train

SHAPE, LEVELS, STEPS = (1, 28, 28), 256, (1, 2, 4, 8)


class Sizes:
    """What a stage computes; small ones show that it runs."""

    def __init__(self, tiny: bool, seconds: float) -> None:
        self.tiny, self.seconds = tiny, seconds
        self.width, self.blocks = (16, 1) if tiny else (64, 2)
        self.batch = 16 if tiny else 512
        self.teacher_steps = 4 if tiny else 12_000
        self.student_steps = 4 if tiny else 5_000
        self.capacity, self.nodes, self.chunk = (32, 4, 16) if tiny else (8_000, 48, 512)
        self.images, self.samples = (16, 32) if tiny else (2_000, 10_000)
        self.reference = f2.Reference(steps=4, probes=1) if tiny else f2.Reference(steps=100, probes=8, near_data=0.6)


def data(folder: Path, sizes: Sizes, **kwargs: Any) -> FashionMNIST:
    small = {"count": 200, "val": 16} if sizes.tiny else {"num_workers": 3}
    return FashionMNIST(str(folder), batch_size=sizes.batch, **small, **kwargs)


def backbone(sizes: Sizes) -> PreconditionedUNet:
    return PreconditionedUNet(
        SHAPE, levels=LEVELS, width=sizes.width, multipliers=(1, 2), blocks=sizes.blocks, patch=2, attention=(7,)
    )


def optimizer(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99))


def fit(
    module: L.LightningModule, images: FashionMNIST, steps: int, device: torch.device, sizes: Sizes
) -> tuple[float, int]:
    """Train; seconds, and steps taken."""
    trainer = quiet_trainer(
        steps,
        max_epochs=-1,
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        precision="32-true" if device.type == "cpu" else "bf16-mixed",
        callbacks=[_Rate(max(1, steps // 40))],
        profiler="simple",
        max_time=timedelta(seconds=sizes.seconds),  # the rest of a stage's nine minutes is for what is measured
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=images)
    return time.perf_counter() - start, trainer.global_step


class _Rate(L.Callback):
    """Prints loss and time now and then: a stage that is cut off shows how far it was."""

    def __init__(self, every: int) -> None:
        self.every, self.start = every, time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            loss = float(trainer.callback_metrics["train/loss"])
            print(f"step {trainer.global_step}, loss {loss:.4g}, {time.perf_counter() - self.start:.0f} s", flush=True)


def quality(
    module: L.LightningModule,
    images: FashionMNIST,
    sizes: Sizes,
    device: torch.device,
    folder: Path,
    steps: Sequence[int] = STEPS,
) -> dict[str, float]:
    """Frechet distances to the training images by step count, in features of a classifier of these images."""
    beside = images.folder / "features.pt"
    path = beside if beside.exists() else folder / "features.pt"
    if not path.exists():
        epochs = 1 if sizes.tiny else EPOCHS["fashion"]
        train(data(images.folder, sizes, labels=True), epochs, SHIFT["fashion"], 0).save(path)
    made = SampleQuality(path, steps=steps, samples=sizes.samples, cache=str(folder / "statistics"))
    accelerator = "cpu" if device.type == "cpu" else "gpu"
    trainer = quiet_trainer(-1, accelerator=accelerator, devices=1, limit_val_batches=1, callbacks=[made])
    trainer.validate(module, datamodule=images, verbose=False)
    return {str(k): float(trainer.callback_metrics[f"val/fid_{k}"]) for k in steps}


def states(images: FashionMNIST, count: int, device: torch.device) -> Tensor:
    images.setup("test")
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in images.test_dataloader()])[
        :count
    ].to(device)


@torch.no_grad()
def in_parts(call: Callable[[Tensor], Tensor], x: Tensor, size: int = 250) -> Tensor:
    return torch.cat([call(part) for part in x.split(size)])


def teach(folder: Path, images_folder: Path, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Train the teacher, write its average, and measure its samples."""
    L.seed_everything(0, verbose=False)
    images = data(images_folder, sizes)
    module = f2.FlowMatchingModule(
        backbone(sizes),
        SHAPE,
        levels=LEVELS,
        optimizer=optimizer(2e-3),
        units="velocity",
        near_data=0.5,
        ema_decay=0.998 if sizes.tiny else 0.9995,
        warmup=100,
    )
    seconds, steps = fit(module, images, sizes.teacher_steps, device, sizes)
    f2.save_pretrained(module.average, folder / "teacher", shape=SHAPE, levels=LEVELS)
    module.to(device).eval()
    start = time.perf_counter()
    made = in_parts(lambda z: f2.reference_sample(module.average, z, steps=50).state, noise(100, device))
    _save(sample_figure({"teacher, 100 evaluations": made.cpu()}), folder / "fashion_teacher.png")
    return {
        "parameters": sum(p.numel() for p in module.average.parameters()),
        "steps": steps,
        "seconds": seconds,
        "seconds of sampling": time.perf_counter() - start,
        "Frechet distance": quality(module, images, sizes, device, folder, (4 if sizes.tiny else 100,)),
    }


def noise(count: int, device: torch.device) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(7)).to(device)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=80)


def study(folder: Path, images_folder: Path, device: torch.device, sizes: Sizes, head: bool = True) -> dict[str, Any]:
    """Train a student of the saved teacher, with or without what its head learns, and measure it."""
    L.seed_everything(0, verbose=False)
    images = data(images_folder, sizes)
    teacher = f2.from_pretrained(folder / "teacher", FlowMap).to(device)
    network = f2.from_pretrained(folder / "teacher", FlowMap).requires_grad_(True)
    weight = 0.01 if head else 0.0
    objective = f2.TrajectoryRegression(
        nodes=sizes.nodes,
        near_data=0.5,
        capacity=sizes.capacity,
        chunk=sizes.chunk,
        max_mib=16_384,
        starts={"data": 0.5, "noise": 0.5},
        recompute=False,
        likelihood_of_data=True,
        weighting=f2.Weighting(divergence=weight, adaptive=0.5),
        intervals=f2.Intervals(grid=0.3, to_noise=0.5 if head else 0.0),
    )
    module = f2.F2D2Module(
        network,
        SHAPE,
        teacher=teacher,
        objective=objective,
        levels=LEVELS,
        reference_samples=0,  # its likelihoods are compared below, on more images and probes
        optimizer=optimizer(1e-3),
        ema_decay=0.998 if sizes.tiny else 0.9995,
        warmup=100,
    )
    seconds, steps = fit(module, images, sizes.student_steps, device, sizes)
    name = "student" if head else "sampler"
    f2.save_pretrained(module.average, folder / name, shape=SHAPE, levels=LEVELS)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in module.average.parameters()),
        "steps": steps,
        "seconds": seconds,
        "memory, GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "Frechet distance": quality(module, images, sizes, device, folder),
    }
    # a trainer that has ended leaves its module on the CPU
    joint, z = module.average.to(device), noise(40, device)
    with torch.no_grad():
        made = {f"{k} step{'s' if k > 1 else ''}": f2.sample(joint, z, k).state.cpu() for k in STEPS}
        made["teacher"] = f2.reference_sample(teacher, z, steps=50).state.cpu()
    _save(sample_figure(made), folder / f"fashion_{name}.png")
    if head:
        result |= _likelihoods(joint, teacher, images, sizes, device, folder)
    return result


def _likelihoods(
    joint: f2.JointFlowMap,
    teacher: FlowMap,
    images: FashionMNIST,
    sizes: Sizes,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    x = states(images, sizes.images, device)
    start = time.perf_counter()
    errors = []

    def reference(part: Tensor) -> Tensor:
        answer = sizes.reference(teacher, part)
        errors.append(answer.standard_error)
        return answer.value

    bits = lambda value: f2.bits_per_dim(value, x[0].numel(), LEVELS)  # noqa: E731
    truth = bits(in_parts(reference, x)).cpu()
    seconds = time.perf_counter() - start
    rows, values = {}, {}
    for steps in STEPS:
        start = time.perf_counter()
        value = bits(in_parts(lambda part, k=steps: f2.log_prob(joint, part, k).value, x)).cpu()
        rows[str(steps)] = agreement(value, truth) | {"seconds": time.perf_counter() - start}
        values[steps] = value
    noise_of_reference = torch.cat([e for e in errors if e is not None]) if errors[0] is not None else None
    _save(calibration_figure(values, truth, "bits/dim"), folder / "fashion_calibration.png")
    return {
        "images": len(x),
        "likelihood": rows,
        "reference, bits/dim": float(truth.mean()),
        "spread of the reference, bits/dim": spread_of(truth),
        "seconds of the reference": seconds,
        "standard error of one reference, bits/dim": None
        if noise_of_reference is None
        else float(noise_of_reference.mean() / (x[0].numel() * 0.6931471805599453)),
    }
