"""From a model and some data to figures: what is measured, on all processes, and what is drawn, on the first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.reference import reference_sample
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

__all__ = ["Gallery", "Measured", "Points"]

CHUNK = 512


class Points:
    """The first samples of a data set, and their conditioning, on the CPU.

    Args:
        count: Samples kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.x: Tensor | None = None
        self.cond: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.x is None else len(self.x)

    def add(self, x: Tensor, cond: Tensor | None) -> None:
        """Keep what is still wanted of a batch ``(B, ...)``."""
        left = self.count - len(self)
        if left <= 0:
            return
        self.x = _joined(self.x, x[:left])
        if cond is not None:
            self.cond = _joined(self.cond, cond[:left])

    def classes(self, count: int) -> Tensor | None:
        """Conditioning for ``count`` samples: the labels that there are, in order, again and again.

        Conditioning that is no label is taken as it comes.
        """
        if self.cond is None:
            return None
        labels = self.cond.ndim == 1 and not torch.is_floating_point(self.cond)
        kinds = self.cond.unique() if labels else self.cond
        return kinds[torch.arange(count) % len(kinds)]


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
    """The reference's, ``(N,)``; NaN where it was not computed."""
    densities: dict[str, Tensor] = field(default_factory=dict)
    """Title to log-densities on a grid in the plane, nats."""
    extent: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)
    rows: list[dict[str, Any]] | None = None
    """Of the evaluation's table."""


class Gallery:
    """Makes the figures that a model and its data allow; keeps what does not change from one time to the next.

    Args:
        model: The model.
        samples: Samples in a picture (twenty times as many points in the plane).
        teacher_steps: Heun steps of the reference's samples.
        grid: Cells along each axis of a density map.
        true_log_prob: Exact log-density of the data, ``(B, 2) -> (B,)``, nats, if it is known.
        broadcast: Gives all processes what the first one has.
    """

    def __init__(
        self,
        model: LikelihoodModel,
        samples: int = 49,
        teacher_steps: int = 100,
        grid: int = 64,
        true_log_prob: Callable[[Tensor], Tensor] | None = None,
        broadcast: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        if min(samples, teacher_steps, grid) < 1:
            raise ValueError(f"samples={samples}, teacher_steps={teacher_steps} and grid={grid} are at least 1")
        self.model = model
        self.samples, self.teacher_steps, self.grid = samples, teacher_steps, grid
        self.true_log_prob, self.broadcast = true_log_prob, broadcast
        self._kept: dict[str, Any] = {}

    @classmethod
    def of(cls, trainer: L.Trainer, model: LikelihoodModel, samples: int, teacher_steps: int, grid: int) -> Gallery:
        """With the exact log-density that the trainer's data module may know (``log_prob``)."""
        log_prob = getattr(getattr(trainer, "datamodule", None), "log_prob", None)
        true_log_prob = log_prob if callable(log_prob) else None
        return cls(model, samples, teacher_steps, grid, true_log_prob, trainer.strategy.broadcast)

    # --- measuring: all processes ---

    @torch.no_grad()
    def measure(self, points: Points) -> Measured:
        """Everything that the figures need. All processes must call it.

        They look at the same points, the first one's, and so call a sharded network equally often.

        Args:
            points: Data; empty if there were none, and then nothing is measured.
        """
        measured = Measured()
        if len(points) == 0 or not self.model.ready:
            return measured
        assert points.x is not None
        measured.samples = self._samples(points)
        measured.rows = self.model.agreement_table()
        if not self.model.steps:
            return measured
        measured.x = points.x
        measured.values = {k: self.model.nll(self._log_prob(points, k)) for k in self.model.steps}
        measured.reference = self._reference(points, measured.values)
        if is_plane(self.model.shape) and points.cond is None:
            measured.extent = _around(points.x)
            measured.densities = self._densities(measured.extent, points.x.dtype)
        return measured

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The reference's own part, computed once where the reference stays as it is."""
        if name not in self._kept or not self.model.reference_fixed:
            self._kept[name] = compute()
        return self._kept[name]

    def _on_device(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self.model.device)

    def _samples(self, points: Points) -> dict[str, Tensor]:
        shape = self.model.shape
        if not (is_image(shape) or is_plane(shape)):
            return {}
        assert points.x is not None
        count = self.samples if is_image(shape) else 20 * self.samples
        # drawn on the CPU and from a generator of its own: the same noise whenever and wherever
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(points.x.dtype)
        noise, cond = noise.to(self.model.device), self._on_device(points.classes(count))
        made = {}
        if self.model.draws_samples:
            made = {plural(k, "step"): self.model.sample(noise, k, cond).state.cpu() for k in self.model.steps}
        velocity = self.model.reference_velocity()
        if velocity is not None:

            def integrate() -> tuple[Tensor, int]:
                found = reference_sample(velocity, noise, cond, steps=self.teacher_steps)
                return found.state.cpu(), found.evaluations

            state, evaluations = self._once("samples", integrate)
            made[f"{self.model.reference_name}, {plural(evaluations, 'evaluation')}"] = state
        return made

    def _log_prob(self, points: Points, steps: int) -> Tensor:
        assert points.x is not None
        parts = []
        for start in range(0, len(points), CHUNK):
            x, cond = (None if v is None else v[start : start + CHUNK] for v in (points.x, points.cond))
            parts.append(self.model.log_prob(self._on_device(x), steps, self._on_device(cond)).value.cpu())  # type: ignore[arg-type]
        return torch.cat(parts)

    def _integrated(self, x: Tensor, cond: Tensor | None) -> Tensor | None:
        velocity = self.model.reference_velocity()
        if velocity is None:
            return None
        return self.model.reference(velocity, self._on_device(x), self._on_device(cond)).value.cpu()  # type: ignore[arg-type]

    def _reference(self, points: Points, values: dict[int, Tensor]) -> Tensor | None:
        assert points.x is not None
        x = points.x

        def compute() -> Tensor | None:
            # what the evaluation has integrated already is not integrated again
            known = self.broadcast(self.model.evaluated_reference(values))
            if known is not None:
                return known
            found = self._integrated(x, points.cond)
            return None if found is None else self.model.nll(found)

        return self._once("reference", compute)

    def _densities(self, extent: tuple[float, float, float, float], dtype: torch.dtype) -> dict[str, Tensor]:
        grid = plane_grid(extent, self.grid).to(dtype)
        cells = Points(len(grid))
        cells.add(grid, None)
        shape = (self.grid, self.grid)
        maps = {plural(k, "step"): self._log_prob(cells, k).reshape(shape) for k in self.model.steps}
        reference = self._once("density", lambda: self._integrated(grid, None))
        if reference is not None:
            maps[self.model.reference_name] = reference.reshape(shape)
        if self.true_log_prob is not None:
            maps["true density"] = self.true_log_prob(grid).reshape(shape)
        return maps

    # --- drawing: the first process ---

    def figures(self, measured: Measured) -> dict[str, Figure]:
        """Name to figure: ``samples``, ``calibration``, ``nll_steps``, ``ranked``, ``density``, as there are."""
        model, figures = self.model, {}
        if measured.samples:
            figures["samples"] = sample_figure(
                measured.samples, model.low, model.high, math.ceil(math.sqrt(self.samples))
            )
        compared = _compared(measured)
        if compared is not None:
            values, reference = compared
            figures["calibration"] = calibration_figure(values, reference, model.unit, model.reference_name)
        if measured.values:
            figures["nll_steps"] = self._nll_steps(measured)
            shown = self.ranked_by()
            value = measured.values[shown]
            if is_image(model.shape) and measured.x is not None and not bool(value.isnan().all()):
                figures["ranked"] = ranked_figure(
                    measured.x,
                    value,
                    model.unit,
                    name=plural(shown, "step"),
                    reference=measured.reference,
                    reference_name=model.reference_name,
                    low=model.low,
                    high=model.high,
                )
        if measured.densities:
            figures["density"] = density_figure(measured.densities, measured.extent)
        return {name: settle(figure) for name, figure in figures.items()}

    def ranked_by(self) -> int:
        """The step count whose likelihoods rank images: four, or what is nearest below."""
        return max((k for k in self.model.steps if k <= 4), default=min(self.model.steps))

    def _nll_steps(self, measured: Measured) -> Figure:
        name, unit = self.model.reference_name, self.model.unit
        found = _from_rows(measured.rows) if measured.rows else _from_values(measured)
        return nll_steps_figure(unit=unit, reference_name=name, **found)


def _joined(before: Tensor | None, more: Tensor) -> Tensor:
    more = more.detach().cpu().clone()
    return more if before is None else torch.cat((before, more))


def _around(x: Tensor) -> tuple[float, float, float, float]:
    """Where the data are, and a third of their range around them."""
    (a, b), (c, d) = (limits(x[:, axis]) for axis in (0, 1))
    return a - (b - a) / 6, b + (b - a) / 6, c - (d - c) / 6, d + (d - c) / 6


def _compared(measured: Measured) -> tuple[dict[int, Tensor], Tensor] | None:
    """The first samples, up to the last one that has a reference."""
    if measured.reference is None or bool(measured.reference.isnan().all()):
        return None
    count = int((~measured.reference.isnan()).nonzero().max()) + 1
    return {k: value[:count] for k, value in measured.values.items()}, measured.reference[:count]


def _from_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Points of the curve from the evaluation's table: all samples of all processes."""
    few = {row["steps"]: row for row in rows if row["steps"] is not None}
    reference = next(row for row in rows if row["steps"] is None)
    if all(math.isnan(row["gap"]) for row in few.values()):
        values, errors = ({k: row[n] for k, row in few.items()} for n in ("nll", "nll_standard_error"))
        return {"values": values, "errors": errors}
    # over the samples that were compared, which may be fewer: only then is the line for the same ones
    values = {k: row["reference_nll"] + row["gap"] for k, row in few.items()}
    errors = {k: row["gap_standard_error"] for k, row in few.items()}
    error = reference["nll_standard_error"]
    return {"values": values, "errors": errors, "error_of": "gap"} | {
        "reference": reference["nll"],
        "reference_error": error,
    }


def _from_values(measured: Measured) -> dict[str, Any]:
    """Points of the curve from the data that were measured."""
    reference = measured.reference
    if reference is None or bool(reference.isnan().all()):
        means = {k: _mean(value) for k, value in measured.values.items()}
        values, errors = ({k: m[i] for k, m in means.items()} for i in (0, 1))
        return {"values": values, "errors": errors}
    line, band = _mean(reference)
    gaps = {k: _mean(value - reference) for k, value in measured.values.items()}
    return {
        # a sample without a value is missing from the mean, but does not move it against the line
        "values": {k: line + gap for k, (gap, _) in gaps.items()},
        "errors": {k: error for k, (_, error) in gaps.items()},
        "error_of": "gap",
        "reference": line,
        "reference_error": band,
    }


def _mean(value: Tensor) -> tuple[float, float]:
    """Mean over the finite values and its standard error; NaN if there are none, or one."""
    value = value[value.isfinite()].double()
    error = float(value.std()) / math.sqrt(len(value)) if len(value) > 1 else math.nan
    return (float(value.mean()) if len(value) else math.nan), error
