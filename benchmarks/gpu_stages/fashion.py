"""Fashion-MNIST at full size: a teacher, and few-step students of it, each in one stage.

What a student learns differs by stage alone (:data:`STUDENTS`); all else is what the package chooses. Only averaged
weights and the teacher's likelihoods pass from stage to stage, at most 16 MB; a student integrates its pool again.
"""

from __future__ import annotations

import math
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
from measuring import StepTimes, agreement, quiet_trainer
from train_features import EPOCHS, SHIFT, train

SHAPE, LEVELS, STEPS = (1, 28, 28), 256, (1, 2, 4, 8)
STUDENTS: dict[str, dict[str, Any]] = {
    # to data alone, without a head
    "sampler": {"intervals": f2.Intervals("to_data"), "weighting": f2.Weighting(divergence=0.0, adaptive=0.5)},
    # both ways, without a head: what the way to noise costs
    "sampler-both": {"weighting": f2.Weighting(divergence=0.0, adaptive=0.5)},
    "sampler-velocity": {
        "intervals": f2.Intervals("to_data"),
        "weighting": f2.Weighting(divergence=0.0, adaptive=0.5, units="velocity"),
    },
    "student": {},
    "student-no-paths": {"unroll": 0.0},
    "student-ways": {"likelihood_of_data": True},
}
"""Stages, and what each gives the objective."""


class Sizes:
    """What a stage computes; small ones show that it runs."""

    def __init__(self, tiny: bool, seconds: float, seed: int = 0) -> None:
        self.tiny, self.seconds, self.seed = tiny, seconds, seed
        self.width, self.blocks = (16, 1) if tiny else (56, 2)
        self.batch = 16 if tiny else 512
        self.teacher_steps = 4 if tiny else 12_000
        self.student_steps = 4 if tiny else 4_000
        self.pool = {"capacity": 32, "nodes": 4, "chunk": 16} if tiny else {"capacity": 12_000, "chunk": 2_048}
        self.images, self.samples = (16, 32) if tiny else (1_000, 10_000)
        # in pictures, samples and the teacher's steps; of the jumps' own density, images and step counts
        self.shown, self.fine = (4, 2) if tiny else (40, 50)
        self.few, self.own = (2, STEPS[:2]) if tiny else (64, STEPS)
        self.reference = f2.Reference(steps=4, probes=1) if tiny else f2.Reference()


def data(folder: Path, sizes: Sizes, **kwargs: Any) -> FashionMNIST:
    small = {"count": 200, "val": 16} if sizes.tiny else {"num_workers": 1}
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


def steps_within(
    make: Callable[[], L.LightningModule], images: FashionMNIST, most: int, device: torch.device, sizes: Sizes
) -> int:
    """Steps that fit into the seconds of a training, by the time of a few: the learning rate shall reach zero."""
    if sizes.tiny:
        return most

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    skipped, counted = 10, 50
    pace = StepTimes(skipped, clock)
    trainer = quiet_trainer(
        skipped + counted, accelerator="auto", devices=1, precision="bf16-mixed", max_epochs=-1, callbacks=[pace]
    )
    trainer.fit(make(), datamodule=images)
    return min(most, int(0.9 * sizes.seconds * counted / pace.seconds))


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
    L.seed_everything(sizes.seed, verbose=False)
    images = data(images_folder, sizes)

    def make() -> f2.FlowMatchingModule:
        return f2.FlowMatchingModule(
            backbone(sizes),
            SHAPE,
            levels=LEVELS,
            optimizer=optimizer(2e-3),
            units="velocity",
            near_data=0.5,
            ema_decay=0.998 if sizes.tiny else 0.9995,
            warmup=100,
        )

    most = steps_within(make, images, sizes.teacher_steps, device, sizes)
    L.seed_everything(sizes.seed, verbose=False)
    module = make()
    seconds, steps = fit(module, images, most, device, sizes)
    f2.save_pretrained(module.average, folder / "teacher", shape=SHAPE, levels=LEVELS)
    module.to(device).eval()
    start = time.perf_counter()
    made = in_parts(
        lambda z: f2.reference_sample(module.average, z, steps=sizes.fine).state, noise(sizes.shown, device)
    )
    _save(sample_figure({f"teacher, {2 * sizes.fine} evaluations": made.cpu()}), folder / "fashion_teacher.png")
    result = {
        "parameters": sum(p.numel() for p in module.average.parameters()),
        "steps": steps,
        "seconds": seconds,
        "seconds of sampling": time.perf_counter() - start,
        "Frechet distance": quality(module, images, sizes, device, folder, (4 if sizes.tiny else 100,)),
    }
    return result | _reference(module.average.to(device), images, sizes, device, folder)


def _reference(
    teacher: FlowMap, images: FashionMNIST, sizes: Sizes, device: torch.device, folder: Path
) -> dict[str, Any]:
    """The teacher's log-likelihoods of test images, kept for its students, and what was chosen to compute them."""
    x = states(images, sizes.images, device)
    start = time.perf_counter()
    choice = sizes.reference.chosen(teacher, x[:64])
    answers = [choice.reference(teacher, part) for part in x.split(250)]
    value = f2.bits_per_dim(torch.cat([a.value for a in answers]), x[0].numel(), LEVELS).cpu()
    torch.save(value, folder / "teacher" / "reference.pt")
    noise = [a.standard_error for a in answers if a.standard_error is not None]
    return {
        "reference": str(choice),
        "reference, bits/dim": float(value.mean()),
        "spread of the reference, bits/dim": spread_of(value),
        "seconds of the reference": time.perf_counter() - start,
        "standard error of one reference, bits/dim": float(torch.cat(noise).mean()) / (x[0].numel() * math.log(2))
        if noise
        else None,
    }


def noise(count: int, device: torch.device) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(7)).to(device)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")


def study(stage: str, folder: Path, images_folder: Path, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Train a student of the saved teacher as its stage says, and measure it."""
    L.seed_everything(sizes.seed, verbose=False)
    images = data(images_folder, sizes)
    teacher = f2.from_pretrained(folder / "teacher", FlowMap).to(device)
    network = f2.from_pretrained(folder / "teacher", FlowMap).requires_grad_(True)
    objective = f2.TrajectoryRegression(**sizes.pool, max_mib=16_384, recompute=False, **STUDENTS[stage])
    network.directions = objective.directions
    module = f2.F2D2Module(
        network,
        SHAPE,
        teacher=teacher,
        objective=objective,
        levels=LEVELS,
        steps=(1,),  # its likelihoods are compared below, on more images
        reference_samples=0,
        optimizer=optimizer(1e-3),
        ema_decay=0.998 if sizes.tiny else 0.9995,
        warmup=100,
    )
    seconds, steps = fit(module, images, sizes.student_steps, device, sizes)
    f2.save_pretrained(module.average, folder / stage, shape=SHAPE, levels=LEVELS)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in module.average.parameters()),
        "steps": steps,
        "seconds": seconds,
        "targets": str(objective.choice),
        "memory, GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "Frechet distance": quality(module, images, sizes, device, folder),
    }
    # a trainer that has ended leaves its module on the CPU
    joint, z = module.average.to(device), noise(sizes.shown, device)
    with torch.no_grad():
        made = {f"{k} step{'s' if k > 1 else ''}": f2.sample(joint, z, k).state.cpu() for k in STEPS}
        made["teacher"] = f2.reference_sample(teacher, z, steps=sizes.fine).state.cpu()
    _save(sample_figure(made), folder / f"fashion_{stage}.png")
    if objective.weighting.of_divergence(1):
        result |= _likelihoods(joint, images, sizes, device, folder, stage)
    return result


def _likelihoods(
    joint: f2.JointFlowMap, images: FashionMNIST, sizes: Sizes, device: torch.device, folder: Path, stage: str
) -> dict[str, Any]:
    truth = torch.load(folder / "teacher" / "reference.pt", weights_only=True)
    x = states(images, len(truth), device)
    rows, values = {}, {}
    for steps in STEPS:
        start = time.perf_counter()
        log_p = in_parts(lambda part, k=steps: f2.log_prob(joint, part, k).value, x)
        values[steps] = f2.bits_per_dim(log_p, x[0].numel(), LEVELS).cpu()
        rows[str(steps)] = agreement(values[steps], truth) | {"seconds": time.perf_counter() - start}
    _save(calibration_figure(values, truth, "bits/dim"), folder / f"fashion_{stage}_calibration.png")
    # each jump's own change of volume beside the head's, on a few
    own, few = {}, x[: sizes.few]
    for steps in sizes.own:
        with torch.no_grad():
            answer = f2.log_prob(joint, few, steps, determinant="estimate").value
        own[str(steps)] = agreement(values[steps][: len(few)], f2.bits_per_dim(answer, x[0].numel(), LEVELS).cpu())
    return {"images": len(x), "likelihood": rows, "own density": own}
