"""Sample quality in two processes, for the test of the callback; the same code in one is what it is compared with.

    python tests/support/quality_worker.py FOLDER

In double precision, with a number of samples and of images that two processes cannot share evenly.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import f2d2_lightning as f2
from distributed_worker import strategy
from f2d2_lightning.callbacks import SampleQuality
from f2d2_lightning.nn import MLP
from launching import run_cases
from lightning_parts import trainer

SHAPE = (1, 6, 6)
LEVELS = 17
SAMPLES = 45
STEPS = (1, 3)
FIGURES = tuple(f"test/{name}_" for name in ("fid", "kid", "precision", "recall"))


class Pictures(f2.data.FlowDataModule):
    """Grey images of a bright spot whose place depends on the class."""

    shape = SHAPE

    def __init__(self, count: int = 91, labels: bool = False, **kwargs: Any) -> None:
        super().__init__(batch_size=32, eval_batch_size=16, quantization=f2.Quantization(LEVELS), **kwargs)
        self.count, self.with_labels = count, labels

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> tuple[Tensor, Tensor | None]:
            classes = torch.arange(count) % 3
            center = classes.double() + 1 + torch.rand(count, generator=generator, dtype=torch.float64)
            axis = torch.arange(6, dtype=torch.float64)
            line = torch.exp(-((axis - center[:, None]) ** 2))
            spot = line[:, None, :, None] * line[:, None, None, :]
            noise = torch.rand(spot.shape, generator=generator, dtype=torch.float64)
            return (16 * (0.3 * spot + 0.7 * noise)).round().long(), classes if self.with_labels else None

        return {"train": draw(self.count), "val": draw(20), "test": draw(20)}


class Augmented(Dataset):
    """Somebody's data set: images one at a time, with transforms that are random in three ways."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        image = self.data[index] * random.choice((0.6, 0.9)) * float(np.random.uniform(0.8, 1.0))
        return image.flip(-1) if torch.rand(()) < 0.5 else image


class Transformed(Pictures):
    """Augmented training data, and workers that load them."""

    def __init__(self, workers: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.workers = workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Augmented(self.dataset("train")), batch_size=7, num_workers=self.workers)


class Streamed(Pictures):
    """A stream that is not divided between processes."""

    class Stream(IterableDataset):
        def __init__(self, data: Any) -> None:
            self.data = data

        def __iter__(self) -> Any:
            return iter(self.data)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.Stream(self.dataset("train")), batch_size=7)


class Projection(nn.Module):
    """Features that are smooth functions of random projections of the pixels; its weights are always the same."""

    num_features = 5

    def __init__(self, pixels: int = 36, features: int = 5) -> None:
        super().__init__()
        weight = torch.randn(pixels, features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.weight = nn.Parameter(weight / pixels**0.5)
        self.num_features = features

    def forward(self, images: Tensor) -> Tensor:
        return torch.sin((images.flatten(1).double() / 64) @ self.weight)


class Answer(nn.Module):
    """Answers what a function makes of images."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.function(images)


def fidelity_fid(a, b):
    from torch_fidelity import metric_fid

    statistics = [metric_fid.fid_features_to_statistics(f.double()) for f in (a, b)]
    return metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]


def fidelity_kid(a, b, size):
    from torch_fidelity import metric_kid

    found = metric_kid.kid_features_to_metric(
        a.double(), b.double(), kid_subsets=100, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]


class InDouble(f2.modules.FlowModule):
    """Dequantized data are single precision."""

    def data_to_state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x, cond = super().data_to_state(batch)
        return x.to(next(self.parameters()).dtype), cond


class Teacher(InDouble, f2.FlowMatchingModule):
    """A teacher in the default precision."""


class Student(InDouble, f2.F2D2Module):
    """A student whose samples in one step are NaN where a pixel's noise is above a threshold."""

    spoiled = (0, float("inf"))

    def sample(self, noise: Any, *args: Any, **kwargs: Any) -> f2.likelihood.Samples:
        made = super().sample(noise, *args, **kwargs)
        if made.evaluations == 1:
            pixel, threshold = self.spoiled
            made.state[made.noise.flatten(1)[:, pixel] > threshold] = float("nan")
        return made


def perturbed(module: Any) -> Any:
    with torch.no_grad():
        for p in module.average.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def teacher(**kwargs: Any) -> Teacher:
    torch.manual_seed(1)
    reference = f2.Reference(steps=2, probes=1)
    network = MLP(SHAPE, width=16, blocks=1, classes=kwargs.pop("classes", 0))
    return perturbed(Teacher(network, SHAPE, levels=LEVELS, warmup=2, reference=reference, **kwargs))


def student(**kwargs: Any) -> Student:
    torch.manual_seed(2)
    settings: dict[str, Any] = {
        "objective": f2.TrajectoryRegression(nodes=4, capacity=32, refresh=8.0, chunk=16),
        "reference": f2.Reference(steps=2, probes=1),
        "reference_samples": 1,
        "steps": (1,),
        "warmup": 2,
    }
    return perturbed(Student(teacher=teacher(classes=kwargs.pop("classes", 0)), **(settings | kwargs)))


def quality(folder: Path, **kwargs: Any) -> SampleQuality:
    settings: dict[str, Any] = {"features": Projection(), "steps": STEPS, "samples": SAMPLES, "batch_size": 16}
    return SampleQuality(**(settings | {"cache": str(folder / "cache")} | kwargs))


def measure(
    folder: Path, replicas: int, name: str, module: L.LightningModule, data: Pictures, **kwargs: Any
) -> dict[str, Any]:
    """Figures of a test, and the statistics of the real images."""
    callback = quality(folder / f"{replicas}-{name}", kid=True, precision_recall=True, **kwargs)
    made = trainer(folder, callbacks=[callback], devices=replicas, strategy=strategy(name))
    made.test(module, datamodule=data, verbose=False)
    logged = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith(FIGURES)}
    real = callback.real
    assert real is not None
    return {"results": callback.results, "logged": logged, "real": real}


def spoiled(folder: Path, replicas: int, name: str) -> dict[str, Any]:
    """One sample, of the last process, is NaN: all refuse."""
    module = student()
    noise = quality(folder).noise(range(SAMPLES), SHAPE).flatten(1)
    pixel = int((noise.argmax(0) > SAMPLES // 2).nonzero()[0])
    module.spoiled = (pixel, float(noise[:, pixel].sort().values[-2]))
    try:
        measure(folder, replicas, name, module, Pictures())
    except ValueError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def cases(replicas: int) -> dict[str, Any]:
    """Name to function of a folder."""
    name = "ddp" if replicas == 2 else "one"
    made: dict[str, Any] = {
        "plain": lambda folder: measure(folder, replicas, name, student(), Pictures()),
        "conditional": lambda folder: measure(folder, replicas, name, student(classes=3), Pictures(labels=True)),
        "augmented": lambda folder: measure(folder, replicas, name, student(), Transformed()),
        "streamed": lambda folder: measure(folder / "stream", replicas, name, student(), Streamed(), real_samples=41),
        "spoiled": lambda folder: spoiled(folder, replicas, name),
    }
    if replicas == 2:
        # 5 samples in threes and twos, two at a time: the second process has run out when the first goes on
        sizes = {"samples": 5, "batch_size": 2}
        made["sharded"] = lambda folder: measure(folder, 2, "fsdp", student(), Pictures(), **sizes)
    else:
        made["sharded"] = lambda folder: measure(folder / "few", 1, "one", student(), Pictures(), samples=5)
    return made


if __name__ == "__main__":
    run_cases(cases, Path(sys.argv[1]))
