"""What ``f2d2 test`` leaves behind for a student: a table, figures, the numbers as JSON, and a report of them all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table

from f2d2_lightning.callbacks._gallery import Gallery, Measured, Points
from f2d2_lightning.callbacks._models import find_models
from f2d2_lightning.callbacks._report_text import Report, other_metrics, read_curves, to_json
from f2d2_lightning.callbacks.summary import model_parts
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.plots import save_figure, training_figure
from f2d2_lightning.plots._figure import settle
from f2d2_lightning.training.folders import run_folder, unused
from f2d2_lightning.utils.files import whole_file

__all__ = ["TestReport", "print_table"]


class TestReport(L.Callback):
    """After ``test`` of an :class:`~f2d2_lightning.F2D2Module`: a printed table, ``report.md``, figures, JSON.

    The report names the model's parts, versions and command, and shows likelihoods, whatever else was logged as
    ``test/...`` (sample quality, for one), the training curve of a CSV logger, and the pictures that the data allow:
    samples, calibration, NLL against steps, most and least likely images, densities in the plane. It refers to its
    pictures by name, so that the folder can be moved.

    Files that are there are not written over: the report of a second test goes to the folder ``test-2``, the next one
    to ``test-3``.

    Args:
        folder: Where to write; ``None`` for the logger's folder.
        samples: Samples per step count in the picture (twenty times as many points in the plane).
        teacher_steps: Heun steps of the teacher's samples in the picture.
        images: Test samples, the first ones, for calibration and ranked images.
        grid: Cells of a density map along each axis.
        overwrite: Write over the files of an earlier report.

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
    ) -> None:
        if min(samples, teacher_steps, images, grid) < 1:
            raise ValueError(
                f"samples={samples}, teacher_steps={teacher_steps}, images={images} and grid={grid} are at least 1"
            )
        self.folder, self.samples, self.teacher_steps = folder, samples, teacher_steps
        self.images, self.grid, self.overwrite = images, grid, overwrite
        self._points: dict[str, Points] = {}
        self._count = 0

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
        """Start afresh."""
        self._points, self._count = {}, 0

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first samples."""
        if dataloader_idx != 0:
            return
        for model in self._models(trainer, pl_module):
            with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
                x, cond = model.state(batch)
            self._points.setdefault(model.name, Points(self.images)).add(x, cond)
        self._count += len(x)

    @torch.no_grad()
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure on all processes, write on the first. All metrics have been logged by now."""
        run = run_folder(trainer)
        count = trainer.strategy.reduce(torch.tensor(float(self._count), device=pl_module.device), reduce_op="sum")
        for model in self._models(trainer, pl_module):
            gallery = Gallery.of(trainer, model, self.samples, self.teacher_steps, self.grid)
            points = trainer.strategy.broadcast(self._points.get(model.name, Points(self.images)))
            with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
                measured = gallery.measure(points)
            rows = measured.rows or model.agreement_table()
            if trainer.is_global_zero and rows:
                self._write(trainer, pl_module, gallery, measured, rows, run, int(count))

    def _write(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        gallery: Gallery,
        measured: Measured,
        rows: list[dict[str, Any]],
        run: Path,
        count: int,
    ) -> None:
        model = gallery.model
        print_table(rows, model.unit, model.reference_name)
        if getattr(trainer, "fast_dev_run", False):
            return
        figures = gallery.figures(measured)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and (curves := read_curves(Path(logger.log_dir))):
                figures["training"] = settle(training_figure(curves))
        report = self._report(trainer, module, gallery, rows, tuple(figures), run, count)
        numbers = {"unit": model.unit, "rows": rows, "metrics": report.metrics}
        texts = {"test_report.json": to_json(numbers), "report.md": report.markdown()}
        pictures = {f"{name}.png": figure for name, figure in figures.items()}
        wanted = (run if self.folder is None else Path(self.folder)) / model.name
        folder = self._free(wanted, (*texts, *pictures))
        written = [save_figure(figure, folder / name) for name, figure in pictures.items()]
        written += [_write(folder / name, text) for name, text in texts.items()]
        for path in written:
            Console().print(f"wrote {path}", soft_wrap=True, markup=False, highlight=False)

    @staticmethod
    def _report(
        trainer: L.Trainer,
        module: L.LightningModule,
        gallery: Gallery,
        rows: list[dict[str, Any]],
        figures: tuple[str, ...],
        run: Path,
        samples: int,
    ) -> Report:
        model, data = gallery.model, getattr(trainer, "datamodule", None)
        return Report(
            title=f"Test of {model.title}" + ("" if data is None else f" on {type(data).__name__}"),
            run=run,
            checkpoint=trainer.ckpt_path,
            samples=samples,
            device=str(module.device),
            unit=model.unit,
            reference_name=model.reference_name,
            parts=model_parts(module, trainer.callbacks),  # type: ignore[attr-defined]
            rows=rows,
            metrics=other_metrics(trainer.callback_metrics, model.steps),
            figures=figures,
            ranked_by=gallery.ranked_by(),
            quantized=model.unit != "nats",
        )

    def _free(self, folder: Path, names: Iterable[str]) -> Path:
        taken = any((folder / name).exists() for name in names)
        return unused(folder / "test", first=2) if taken and not self.overwrite else folder


def _write(path: Path, text: str) -> Path:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


@rank_zero_only
def print_table(rows: list[dict[str, Any]], unit: str, reference_name: str = "teacher") -> None:
    """Print the agreement table of :meth:`~f2d2_lightning.F2D2Module.agreement_table`."""
    table = Table(title=f"log-likelihood of the test set, {unit} (± standard error)")
    for name in ("steps", "evaluations", "NLL", f"gap to {reference_name}", "r", "rank r", "|error|", "ms per sample"):
        table.add_column(name, justify="right", no_wrap=True)
    doubts = [f"{row['steps']} steps: {row['doubt']}" for row in rows if row.get("doubt")]
    if doubts:
        table.add_column("doubtful")
    for row in rows:
        reference = row["steps"] is None
        table.add_row(
            reference_name if reference else str(row["steps"]),
            f"{row['evaluations']:,}",
            f"{row['nll']:.3f} ± {row['nll_standard_error']:.3f}",
            "" if reference else f"{row['gap']:+.3f} ± {row['gap_standard_error']:.3f}",
            "" if reference else f"{row['correlation']:.3f}",
            "" if reference else f"{row['rank_correlation']:.3f}",
            "" if reference else f"{row['absolute_error']:.3f}",
            f"{row['milliseconds']:.3g}",
            *(["yes" if row.get("doubt") else ""] if doubts else []),
        )
    console = Console()
    # a pipe or a file has no width, and rich would fold the columns into 80
    console = console if console.is_terminal else Console(width=110)
    console.print(table)
    for text in doubts:
        console.print(f"doubtful in {text}", markup=False, highlight=False)
