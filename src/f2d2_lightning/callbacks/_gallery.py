"""From a model and some data to figures: what is measured, on all processes, and what is drawn, on the first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.ode import reference_sample
from f2d2_lightning.plots import (
    Figure,
    calibration_figure,
    density_figure,
    nll_steps_figure,
    plane_grid,
    ranked_figure,
    sample_figure,
)
from f2d2_lightning.plots._figure import limits, plural, settle
from f2d2_lightning.plots.samples import is_image, is_plane
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import Cond, joined, mapped, moved, some_of, tensors

CHUNK = 512


class Points:
    """The first samples of a data set, at ``most`` so many, and their conditioning, on the CPU."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.x = torch.empty(0)
        self.cond: Cond | None = None

    def __len__(self) -> int:
        return len(self.x)

    def add(self, x: Tensor, cond: Cond | None) -> None:
        """Keep what is still wanted of a batch ``(B, ...)``."""
        left = self.most - len(self)
        if left <= 0:
            return
        if cond is not None:
            self.cond = _kept(self.cond, some_of(cond, slice(left)))
        self.x = _kept(self.x if len(self) else None, x[:left])

    def classes(self, count: int) -> Cond | None:
        """Conditioning for ``count`` samples: the labels in order, else what there is, again and again."""
        if self.cond is None:
            return None
        kinds = self.cond
        if isinstance(kinds, Tensor) and kinds.ndim == 1 and not kinds.is_floating_point():
            kinds = kinds.unique()
        return some_of(kinds, torch.arange(count) % len(next(tensors(kinds))))


@dataclass
class Measured:
    """What figures are drawn from."""

    samples: dict[str, Tensor] = field(default_factory=dict)
    """Title to samples from the same noise."""
    x: Tensor | None = None
    """The data, ``(N, ...)``."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """Step count to NLL of the data, ``(N,)``, in the model's unit."""
    reference: Tensor | None = None
    """The reference's, ``(N,)``, NaN where it was not computed; ``None`` if it was nowhere."""
    densities: dict[str, Tensor] = field(default_factory=dict)
    """Title to log-densities on a grid in the plane, nats."""
    extent: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the evaluation's table."""


class Gallery:
    """Makes the figures that a model and its data allow; keeps what does not change from one time to the next.

    The exact log-density of the data is known where the trainer's data module has it (``log_prob``). Sizes are those of
    :class:`~f2d2_lightning.callbacks.Pictures`.
    """

    def __init__(
        self, trainer: L.Trainer, model: LikelihoodModel, samples: int, images: int, teacher_steps: int, grid: int
    ) -> None:
        self.model, self.points = model, Points(images)
        self.samples, self.teacher_steps, self.grid = samples, teacher_steps, grid
        self.true_log_prob = getattr(getattr(trainer, "datamodule", None), "log_prob", None)
        self._broadcast = trainer.strategy.broadcast
        self._kept: dict[str, Any] = {}

    # --- measuring: all processes ---

    def share(self) -> None:
        """Let every process look at the points of the first one, and so call a sharded network equally often."""
        self.points = self._broadcast(self.points)

    @torch.no_grad()
    def measure(self) -> Measured:
        """Everything that the figures need; nothing without data. All processes must call it, with the same points."""
        measured, points, model = Measured(), self.points, self.model
        if len(points) == 0 or not model.ready:
            return measured
        measured.samples = self._samples()
        measured.rows = model.agreement_table()
        if not model.steps:
            return measured
        measured.x = points.x
        measured.values = {k: model.nll_of(self._log_prob(points.x, k, points.cond)) for k in model.steps}
        measured.reference = self._once("reference", lambda: self._reference(measured.values))
        if is_plane(model.shape) and points.cond is None:
            measured.extent = _around(points.x)
            measured.densities = self._densities(measured.extent)
        return measured

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The reference's own part, computed once where the reference stays as it is."""
        if name not in self._kept or not self.model.reference_fixed:
            self._kept[name] = compute()
        return self._kept[name]

    def _samples(self) -> dict[str, Tensor]:
        model = self.model
        if not (is_image(model.shape) or is_plane(model.shape)):
            return {}
        count = self.samples if is_image(model.shape) else 20 * self.samples
        # drawn on the CPU and from a generator of its own: the same noise whenever and wherever
        noise = torch.randn(count, *model.shape, generator=torch.Generator().manual_seed(0))
        noise, cond = noise.to(model.device, self.points.x.dtype), moved(self.points.classes(count), model.device)
        made = {}
        if model.draws_samples:
            made = {plural(k, "step"): model.sample(noise, k, cond).state.cpu() for k in model.steps}
        velocity = model.reference_velocity()
        if velocity is not None:
            found = self._once("samples", lambda: reference_sample(velocity, noise, cond, steps=self.teacher_steps))
            made[f"{model.reference_name}, {plural(found.evaluations, 'evaluation')}"] = found.state.cpu()
        return made

    def _log_prob(self, x: Tensor, steps: int, cond: Cond | None = None) -> Tensor:
        device, parts = self.model.device, []
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            parts.append(self.model.log_prob(x[part].to(device), steps, moved(some_of(cond, part), device)).value.cpu())
        return torch.cat(parts)

    def _integrated(self, x: Tensor, cond: Cond | None = None) -> Tensor | None:
        velocity, device = self.model.reference_velocity(), self.model.device
        if velocity is None:
            return None
        return self.model.reference_log_prob(velocity, x.to(device), moved(cond, device)).value.cpu()

    def _reference(self, values: dict[int, Tensor]) -> Tensor | None:
        # what the evaluation has integrated already is not integrated again
        found = self._broadcast(self.model.evaluated_reference(values))
        if found is None:
            integrated = self._integrated(self.points.x, self.points.cond)
            found = None if integrated is None else self.model.nll_of(integrated)
        return None if found is None or bool(found.isnan().all()) else found

    def _densities(self, extent: tuple[float, float, float, float]) -> dict[str, Tensor]:
        cells = plane_grid(extent, self.grid).to(self.points.x.dtype)
        maps = {plural(k, "step"): self._log_prob(cells, k) for k in self.model.steps}
        reference = self._once("density", lambda: self._integrated(cells))
        if reference is not None:
            maps[self.model.reference_name] = reference
        if self.true_log_prob is not None:
            maps["true density"] = self.true_log_prob(cells)
        return {title: density.reshape(self.grid, self.grid) for title, density in maps.items()}

    # --- drawing: the first process ---

    def figures(self, measured: Measured) -> dict[str, Figure]:
        """Name to figure: ``samples``, ``calibration``, ``nll_steps``, ``ranked``, ``density``, as there are."""
        model, figures = self.model, {}
        unit, name, values, reference = model.unit, model.reference_name, measured.values, measured.reference
        if measured.samples:
            columns = math.ceil(math.sqrt(self.samples))
            beside = dict(measured.samples)
            if measured.x is not None:
                # what samples should look like
                beside["data"] = measured.x[: len(next(iter(beside.values())))].cpu()
            figures["samples"] = sample_figure(beside, model.low, model.high, columns)
        if reference is not None:
            # the first samples, up to the last one that has a reference
            count = int((~reference.isnan()).nonzero().max()) + 1
            compared = {k: value[:count] for k, value in values.items()}
            figures["calibration"] = calibration_figure(compared, reference[:count], unit, name)
        if values:
            if measured.rows:
                figures["nll_steps"] = nll_steps_figure(unit=unit, reference_name=name, **_curve(measured.rows))
            shown = self.ranked_by()
            if is_image(model.shape) and measured.x is not None and not bool(values[shown].isnan().all()):
                figures["ranked"] = ranked_figure(
                    *(measured.x, values[shown], unit),
                    name=plural(shown, "step"),
                    reference=reference,
                    reference_name=name,
                    low=model.low,
                    high=model.high,
                )
        if measured.densities:
            figures["density"] = density_figure(measured.densities, measured.extent)
        return {title: settle(figure) for title, figure in figures.items()}

    def ranked_by(self) -> int:
        """The step count whose likelihoods rank images: four, or what is nearest below."""
        return max((k for k in self.model.steps if k <= 4), default=min(self.model.steps))


class GalleryCallback(L.Callback):
    """Keeps the first samples of the data in a gallery of each model that a trainer has."""

    def __init__(self, **sizes: int) -> None:
        at_least(1, **sizes)
        self.sizes = sizes
        self.galleries: dict[str, Gallery] = {}
        """By the model's name."""
        self.collecting: list[Gallery] = []
        """Those that still need samples."""

    def collect(self, trainer: L.Trainer, models: list[LikelihoodModel]) -> None:
        """Begin to keep samples of each model that has none yet."""
        for model in models:
            if model.name not in self.galleries:
                self.galleries[model.name] = Gallery(trainer, model, **self.sizes)
        self.collecting = [gallery for gallery in self.galleries.values() if len(gallery.points) == 0]

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanting = [one for one in self.collecting if len(one.points) < one.points.most]
        if dataloader_idx > 0 or not wanting:
            return
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            for gallery in wanting:
                if gallery.model.ready:
                    gallery.points.add(*gallery.model.state(batch))


def _kept(before: Cond | None, more: Cond) -> Cond:
    more = mapped(lambda part: part.detach().cpu().clone(), more)
    return more if before is None else joined((before, more))


def _around(x: Tensor) -> tuple[float, float, float, float]:
    """Where the data are, and a third of their range around them."""
    (a, b), (c, d) = (limits(x[:, axis]) for axis in (0, 1))
    return a - (b - a) / 6, b + (b - a) / 6, c - (d - c) / 6, d + (d - c) / 6


def _curve(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Points of the curve from the evaluation's table: all samples of all processes."""
    few = {row["steps"]: row for row in rows}
    reference = few.pop(None)
    if all(math.isnan(row["gap"]) for row in few.values()):
        values, errors = ({k: row[n] for k, row in few.items()} for n in ("nll", "nll_standard_error"))
        return {"values": values, "errors": errors}
    return {
        # over the samples that were compared, which may be fewer: only then is the line for the same ones
        "values": {k: row["reference_nll"] + row["gap"] for k, row in few.items()},
        "errors": {k: row["gap_standard_error"] for k, row in few.items()},
        "error_of": "gap",
        "reference": reference["nll"],
        "reference_error": reference["nll_standard_error"],
    }
