"""What ``f2d2 test`` leaves behind for a student: a table, its figures, and the numbers as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from f2d2_lightning.modules import F2D2Module, FlowMatchingModule
from f2d2_lightning.plots import calibration_figure, sample_figure, save_figure
from f2d2_lightning.reference import reference_sample
from f2d2_lightning.sampling import sample

__all__ = ["TestReport"]


class TestReport(L.Callback):
    """After ``test`` of an :class:`~f2d2_lightning.F2D2Module`: table, ``samples.png``, ``calibration.png``, JSON.

    Args:
        folder: Where to write; ``None`` for the logger's folder.
        samples: Samples per step count in the picture (twenty times as many points in the plane).
        teacher_steps: Heun steps of the teacher's samples in the picture.
    """

    __test__ = False  # pytest collects classes by this name

    def __init__(self, folder: str | None = None, samples: int = 49, teacher_steps: int = 100) -> None:
        if samples < 1 or teacher_steps < 1:
            raise ValueError(f"samples={samples} and teacher_steps={teacher_steps} are at least 1")
        self.folder, self.samples, self.teacher_steps = folder, samples, teacher_steps

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or trainer.log_dir or trainer.default_root_dir)

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather on all processes, write on the first."""
        if not isinstance(pl_module, F2D2Module):
            raise ValueError(f"TestReport is for F2D2Module, not {type(pl_module).__name__}; take it out of callbacks")
        rows = pl_module.agreement_table()
        if trainer.is_global_zero:
            self._write(trainer, pl_module, rows)

    def _write(self, trainer: L.Trainer, module: F2D2Module, rows: list[dict[str, Any]]) -> None:
        folder = self._folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        print_table(rows, module.unit)
        (folder / "test_report.json").write_text(json.dumps({"unit": module.unit, "rows": rows}, indent=2) + "\n")
        values, reference = module.agreement_values()
        written = [
            save_figure(calibration_figure(values, reference, f"NLL, {module.unit}"), folder / "calibration.png")
        ]
        if len(module.shape) == 3 or module.shape == (2,):
            count = self.samples if len(module.shape) == 3 else 20 * self.samples
            noise = torch.randn(count, *module.shape, generator=torch.Generator().manual_seed(0)).to(module.device)
            pictures = {
                f"{k} step{'s' if k > 1 else ''}": sample(module.average.flow_map, noise, k).state for k in module.steps
            }
            if isinstance(module.teacher, FlowMatchingModule):
                made = reference_sample(module.teacher_velocity(), noise, steps=self.teacher_steps)
                pictures[f"teacher, {made.evaluations} evaluations"] = made.state
            figure = sample_figure(pictures, module.low, module.high, math.ceil(math.sqrt(self.samples)))
            written.append(save_figure(figure, folder / "samples.png"))
        for path in written:
            Console().print(f"wrote {path}", soft_wrap=True)


@rank_zero_only
def print_table(rows: list[dict[str, Any]], unit: str) -> None:
    """Print the agreement table."""
    table = Table(title=f"log-likelihood of the test set, {unit} (± standard error)")
    for name in ("steps", "evaluations", "NLL", "gap to teacher", "r", "rank r", "|error|", "ms per sample"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        reference = row["steps"] is None
        table.add_row(
            "teacher" if reference else str(row["steps"]),
            f"{row['evaluations']:,}",
            f"{row['nll']:.3f} ± {row['nll_standard_error']:.3f}",
            "" if reference else f"{row['gap']:+.3f} ± {row['gap_standard_error']:.3f}",
            "" if reference else f"{row['correlation']:.3f}",
            "" if reference else f"{row['rank_correlation']:.3f}",
            "" if reference else f"{row['absolute_error']:.3f}",
            f"{row['milliseconds']:.3g}",
        )
    console = Console()
    # a pipe or a file has no width, and rich would fold the columns into 80
    (console if console.is_terminal else Console(width=110)).print(table)
