"""What ``f2d2 test`` leaves behind for a student: a table, figures, the numbers as JSON, and a report of them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table

from f2d2_lightning.callbacks._gallery import Gallery, GalleryCallback, Measured
from f2d2_lightning.callbacks._models import find_models
from f2d2_lightning.callbacks._report_text import (
    Report,
    likelihood_table,
    other_metrics,
    page,
    read_curves,
    said_of_units,
    to_json,
)
from f2d2_lightning.callbacks.summary import model_parts
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.metrics.diagnosis import POINTS, Diagnosis
from f2d2_lightning.plots import Figure, save_figure, training_figure
from f2d2_lightning.plots._figure import settle
from f2d2_lightning.training.folders import run_folder, unused
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import some_of
from f2d2_lightning.utils.files import whole_file


class TestReport(GalleryCallback):
    """After ``test`` of an :class:`~f2d2_lightning.F2D2Module`: a printed table, ``report.md``, ``report.html``,
    figures, JSON.

    The report names the model's parts, versions and command, and shows likelihoods, whatever else was logged as
    ``test/...`` (sample quality, for one), the training curve of a CSV logger, and the pictures that the data allow:
    samples, calibration, NLL against steps, most and least likely images, densities in the plane. ``report.md`` refers
    to its pictures by name, so that the folder can be moved; ``report.html`` holds them, to be sent alone.

    The report of a second test goes to the folder ``test-2``, the next one to ``test-3``. A diagnosis says where the
    error comes from, and what to do: :meth:`~f2d2_lightning.F2D2Module.diagnose`.

    Args:
        folder: Where to write; ``None`` for the logger's folder.
        samples: Samples per step count in the picture (twenty times as many points in the plane).
        teacher_steps: Heun steps of the teacher's samples in the picture.
        images: Test samples, the first ones, for calibration and ranked images.
        grid: Cells of a density map along each axis.
        overwrite: Write over the files of an earlier report.
        diagnosed: Test samples, the first ones, that the diagnosis looks at; 0 for none. They cost less than their
            reference, which the test has computed.

    Raises:
        ValueError: If numbers are below 1; before the test, if the module is none that it can report on.
    """

    __test__ = False  # pytest collects classes by this name

    def __init__(
        self,
        folder: str | None = None,
        samples: int = 49,
        teacher_steps: int = 100,
        images: int = 2048,
        grid: int = 64,
        overwrite: bool = False,
        diagnosed: int = POINTS,
    ) -> None:
        super().__init__(samples=samples, teacher_steps=teacher_steps, images=images, grid=grid)
        at_least(0, diagnosed=diagnosed)
        self.folder, self.overwrite, self.diagnosed = folder, overwrite, diagnosed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse other modules before the test."""
        if stage == "test" and not self._models(trainer, pl_module):
            raise ValueError(
                f"TestReport is for F2D2Module, and modules with an F2D2Callback; {type(pl_module).__name__} "
                "has no likelihoods in few steps; take it out of callbacks"
            )

    @staticmethod
    def _models(trainer: L.Trainer, pl_module: L.LightningModule) -> list[LikelihoodModel]:
        return [model for model in find_models(trainer, pl_module) if model.steps]

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.galleries = {}
        self.collect(trainer, self._models(trainer, pl_module))

    @torch.no_grad()
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure on all processes, write on the first. All metrics have been logged by now."""
        run = run_folder(trainer)
        for gallery in self.galleries.values():
            model = gallery.model
            gallery.share()
            with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
                measured = gallery.measure()
                rows = measured.rows or model.agreement_table()
                diagnosis = self._diagnose(model, gallery, measured, rows)
            if not (trainer.is_global_zero and rows):
                continue
            data = getattr(trainer, "datamodule", None)
            log_scale = float(getattr(data, "log_scale", 0.0))
            print_table(rows, model.unit, model.reference_name, log_scale)
            if diagnosis is not None:
                Console().print(str(diagnosis), markup=False, highlight=False)
            if getattr(trainer, "fast_dev_run", False):
                continue
            figures = gallery.figures(measured)
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger) and (curves := read_curves(Path(logger.log_dir))):
                    figures["training"] = settle(training_figure(curves))
            report = Report(
                title=f"Test of {model.title}" + ("" if data is None else f" on {type(data).__name__}"),
                run=run,
                checkpoint=trainer.ckpt_path,
                samples=rows[0]["samples"],
                device=str(pl_module.device),
                unit=model.unit,
                reference_name=model.reference_name,
                parts=model_parts(pl_module, trainer.callbacks),  # type: ignore[attr-defined]
                rows=rows,
                metrics=other_metrics(trainer.callback_metrics, model.steps),
                figures=tuple(figures),
                ranked_by=gallery.ranked_by(),
                diagnosis=diagnosis,
                log_scale=log_scale,
            )
            self._write(report, figures, (run if self.folder is None else Path(self.folder)) / model.name)

    def _diagnose(
        self, model: LikelihoodModel, gallery: Gallery, measured: Measured, rows: Sequence[dict[str, Any]]
    ) -> Diagnosis | None:
        """Of the first test samples with a reference, on all processes; ``None`` if there are not two."""
        x, reference = measured.x, measured.reference
        if x is None or reference is None:
            return None
        first, cond = slice(0, self.diagnosed), gallery.points.cond
        enough = int(reference[first].isfinite().sum()) > 1
        error = rows[-1].get("reference_error", math.nan) if rows else math.nan
        try:
            return model.diagnose(x[first], some_of(cond, first), reference[first], error) if enough else None
        except ValueError as failure:
            rank_zero_warn(f"the test has no diagnosis: {failure}")
            return None

    def _write(self, report: Report, figures: dict[str, Figure], folder: Path) -> None:
        numbers: dict[str, Any] = {"unit": report.unit, "rows": report.rows, "metrics": report.metrics}
        if report.diagnosis is not None:
            numbers["diagnosis"] = report.diagnosis.to_dict()
        texts = {"test_report.json": to_json(numbers), "report.md": report.markdown()}
        pictures = {f"{name}.png": figure for name, figure in figures.items()}
        if not self.overwrite and any((folder / name).exists() for name in (*texts, "report.html", *pictures)):
            folder = unused(folder / "test", number=2)
        written = [save_figure(figure, folder / name) for name, figure in pictures.items()]
        texts["report.html"] = page(texts["report.md"], folder)
        for name, text in texts.items():
            with whole_file(folder / name) as partial:
                partial.write_text(text, encoding="utf-8")
            written.append(folder / name)
        for path in written:
            Console().print(f"wrote {path}", soft_wrap=True, markup=False, highlight=False)


@rank_zero_only
def print_table(
    rows: Sequence[dict[str, Any]], unit: str, reference_name: str = "teacher", log_scale: float = 0.0
) -> None:
    """Print the agreement table of :meth:`~f2d2_lightning.F2D2Module.agreement_table`.

    ``log_scale`` is that of the units of a table's rows, nats.
    """
    table = Table(title=f"log-likelihood of the test set, {unit} (± standard error)")
    head, lines = likelihood_table(rows, "NLL", reference_name)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console()
    # a pipe or a file has no width, and rich would fold the columns into 80
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    if log_scale:
        console.print(said_of_units(log_scale), markup=False, highlight=False)
    for row in rows:
        if row.get("doubt"):
            console.print(f"doubtful in {row['steps']} steps: {row['doubt']}", markup=False, highlight=False)
