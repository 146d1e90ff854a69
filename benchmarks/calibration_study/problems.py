"""The three problems: data, teacher, student, and how samples are judged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning.likelihood import state_images
from f2d2_lightning.metrics import SmallFeatures
from f2d2_lightning.metrics.image import ImageDistance
from f2d2_lightning.metrics.networks import extract_features
from f2d2_lightning.nn import PreconditionedMLP, PreconditionedUNet
from f2d2_lightning.training.loading import load_module
from f2d2_lightning.utils.files import whole_file

__all__ = ["PROBLEMS", "Problem", "energy_distance", "first_states", "held"]


def held(path: Path, make: Callable[[], Any]) -> Any:
    """A result on disk, made and written where it is not there."""
    if not path.exists():
        with whole_file(path) as partial:
            torch.save(make(), partial)
    return torch.load(path, weights_only=True)


@dataclass
class Problem:
    """One data set with its teacher, and the recipe that its student starts from: the one before this study.

    Args:
        name: As in ``configs/NAME_teacher.yaml``.
        shape: Of a state.
        levels: Of discrete data.
        data: Makes the data module from a batch size.
        network: Makes the backbone; ``directions`` is passed.
        features: Feature channels of the backbone.
        head: Arguments of the head.
        covariance: Of the head's baseline.
        trajectories: Arguments of :class:`TrajectoryRegression`.
        weighting: Arguments of :class:`Weighting`.
        near_data: Share of reference steps close to the data.
        budget: Training steps.
        batch: Samples per step.
        rate: Learning rate.
        tested: Test points that are compared with the reference.
        drawn: Samples that are judged.
        reference_steps: Of Heun's method.
        estimator: Divergence estimator of the targets.
        exact: Whether the exact divergence can be paid for.
    """

    name: str
    shape: tuple[int, ...]
    levels: int | None
    data: Callable[[int], f2.data.FlowDataModule]
    network: Callable[..., f2.FlowMap]
    features: int
    head: dict[str, Any]
    covariance: str
    trajectories: dict[str, Any]
    budget: int
    batch: int
    rate: float
    tested: int
    drawn: int
    reference_steps: int
    weighting: dict[str, Any] = field(default_factory=dict)
    near_data: float = 0.0
    estimator: Callable[[], f2.divergence.DivergenceEstimator] = f2.Hutchinson
    exact: bool = True
    folder: Path = Path("runs")

    @property
    def dim(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def unit(self) -> str:
        return "nats" if self.levels is None else "bits/dim"

    def in_unit(self, log_prob: Tensor) -> Tensor:
        """Negative log-likelihood: nats for points, bits per dimension for images."""
        return -log_prob if self.levels is None else f2.bits_per_dim(log_prob, self.dim, self.levels)

    @property
    def teacher_path(self) -> Path:
        return self.folder / self.name / "teacher" / "checkpoints" / "last.ckpt"

    def train_teacher(self) -> None:
        """By the shipped configuration, unless its checkpoint is there."""
        if self.teacher_path.exists():
            return
        config = Path(__file__).parents[2] / "configs" / f"{self.name}_teacher.yaml"
        logger = f"--trainer.logger.init_args.save_dir={self.folder}"
        start = "from f2d2_lightning.cli._main import main; main()"
        command = [sys.executable, "-c", start, "fit", "--config", str(config), logger]
        subprocess.run(command, check=True, stdout=sys.stderr)

    @cached_property
    def teacher(self) -> f2.FlowMatchingModule:
        module: f2.FlowMatchingModule = load_module(self.teacher_path, f2.FlowMatchingModule)
        return module.eval().requires_grad_(False)

    @cached_property
    def settings(self) -> f2.Reference:
        return f2.Reference(steps=self.reference_steps, probes=1 if self.dim > 8 else 0, near_data=self.near_data)

    @cached_property
    def points(self) -> dict[str, Tensor]:
        """Test points and as many training points, ``(N, *shape)``."""
        data = self.data(self.batch)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return {split: first_states(data.dataset(split), self.tested) for split in ("test", "train")}

    @cached_property
    def reference(self) -> dict[str, dict[str, Tensor]]:
        """The teacher's log-likelihood and noise of :attr:`points`."""

        def solve(x: Tensor) -> dict[str, Tensor]:
            answers = [self.settings(self.teacher.average.velocity, part) for part in x.split(1000)]
            return {"value": torch.cat([a.value for a in answers]), "noise": torch.cat([a.noise for a in answers])}

        path = self.folder / self.name / "calibration" / "reference.pt"
        result: dict[str, dict[str, Tensor]] = held(path, lambda: {k: solve(x) for k, x in self.points.items()})
        return result

    # --- samples ---

    @cached_property
    def noise(self) -> Tensor:
        return torch.randn(self.drawn, *self.shape, generator=torch.Generator().manual_seed(1))

    @cached_property
    def teacher_samples(self) -> Tensor:
        def draw() -> Tensor:
            made = [
                f2.reference_sample(self.teacher.average.velocity, z, steps=50, near_data=self.near_data).state
                for z in self.noise.split(1000)
            ]
            return torch.cat(made)

        drawn: Tensor = held(self.folder / self.name / "calibration" / "samples.pt", draw)
        return drawn

    @cached_property
    def _network(self) -> SmallFeatures:
        from train_features import EPOCHS, SHIFT, train

        path = self.folder / self.name / "features.pt"
        if not path.exists():
            data = f2.data.Digits(labels=True) if self.name == "digits" else f2.data.FashionMNIST(labels=True)
            with torch.enable_grad(), torch.random.fork_rng():
                network = train(data, EPOCHS[self.name], SHIFT[self.name], 0)
            network.save(path)
        return SmallFeatures.load(path)

    @cached_property
    def _real(self) -> Any:
        data = self.data(self.batch)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            real = first_states(data.dataset("train"), 5000)
        return self._features(real) if self.levels is not None else real[: self.drawn]

    def _features(self, states: Tensor) -> Tensor:
        parts = state_images(states, self.levels).split(256)
        return torch.cat([extract_features(self._network, images) for images in parts])

    def distance(self, samples: Tensor) -> float:
        """Of samples to training data: Frechet's of features for images, the energy distance for points (times 1,000).

        Energy distance: Szekely and Rizzo, 2013, https://doi.org/10.1016/j.jspi.2013.03.018
        """
        if self.levels is not None:
            distance = ImageDistance(self._network.num_features)
            distance.update(self._real, real=True)
            distance.update(self._features(samples), real=False)
            return distance.compute()["fid"]
        return 1e3 * energy_distance(samples, self._real)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|`` of two sets of points ``(N, d)``, ``(M, d)``, without bias."""

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def first_states(dataset: Any, count: int) -> Tensor:
    """The first states of a data set, without labels, at most ``count``."""
    batch = dataset.__getitems__(list(range(min(count, len(dataset)))))
    states: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
    return states


def _digits_network(directions: str = "both") -> nn.Module:
    return PreconditionedMLP((1, 8, 8), "diagonal", width=512, blocks=2, directions=directions)


def _board_network(directions: str = "both") -> nn.Module:
    return PreconditionedMLP((2,), "full", width=128, blocks=3, expansion=2, directions=directions)


def _fashion_network(directions: str = "both") -> nn.Module:
    return PreconditionedUNet(
        (1, 28, 28), levels=256, width=32, multipliers=(1, 2), blocks=1, patch=2, directions=directions
    )


def _problems() -> Sequence[Problem]:
    return (
        Problem(
            "checkerboard", (2,), None, lambda batch: f2.data.Checkerboard(batch_size=batch), _board_network, 128,
            {"hidden": 64, "layers": 2, "per_axis": True}, "full",
            {"nodes": 32, "capacity": 6000, "chunk": 512,
             "starts": {"data": 0.4, "perturbed": 0.2, "path": 0.2, "noise": 0.2}},
            budget=600, batch=256, rate=2e-3, tested=2000, drawn=2000, reference_steps=200,
            estimator=f2.divergence.Exact,
        ),
        Problem(
            "digits", (1, 8, 8), 17, lambda batch: f2.data.Digits(batch_size=batch, eval_batch_size=300),
            _digits_network, 512, {"hidden": 128, "layers": 0, "per_axis": True}, "diagonal",
            {"nodes": 20, "capacity": 4000, "chunk": 256, "unroll": 0.25, "quantization": f2.Quantization(17),
             "starts": {"data": 0.1, "perturbed": 0.1, "mixed": 0.25, "path": 0.05, "noise": 0.5}},
            budget=600, batch=256, rate=1e-3, tested=300, drawn=2000, reference_steps=500,
        ),
        Problem(
            "fashion", (1, 28, 28), 256, lambda batch: f2.data.FashionMNIST(batch_size=batch), _fashion_network, 32,
            {"hidden": 64, "layers": 1, "per_axis": True, "patch": 2}, "diagonal",
            {"nodes": 32, "capacity": 1000, "chunk": 128, "unroll": 0.25, "quantization": f2.Quantization(256),
             "near_data": 0.5, "starts": {"data": 0.6, "path": 0.1, "noise": 0.3}, "recompute": False,
             "likelihood_of_data": True},
            budget=200, batch=64, rate=2e-3, tested=64, drawn=400, reference_steps=100, near_data=0.6,
            weighting={"adaptive": 0.5}, exact=False,
        ),
    )  # fmt: skip


PROBLEMS = {problem.name: problem for problem in _problems()}
