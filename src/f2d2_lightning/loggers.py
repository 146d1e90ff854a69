"""A CSV logger that keeps what earlier sessions of a run wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

__all__ = ["RunLogger"]


class RunLogger(CSVLogger):
    """Lightning's CSV logger, for runs that are resumed and tested in the same folder.

    Lightning's writes ``metrics.csv`` anew whenever a folder is used again, and a resumed run, or its test, wipes out
    what training logged. This one goes on in ``metrics-1.csv``, ``metrics-2.csv`` and so on. Arguments are
    :class:`lightning.pytorch.loggers.CSVLogger`'s.
    """

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer, on a file of its own."""
        fresh = self._experiment is None
        with warnings.catch_warnings():
            # true of Lightning's logger, not of this one
            warnings.filterwarnings("ignore", ".*Previous log files in this directory will be deleted.*")
            writer = super().experiment
        if fresh and isinstance(writer, ExperimentWriter):
            folder, number = Path(writer.log_dir), 0
            path = folder / "metrics.csv"
            while path.exists():
                number += 1
                path = folder / f"metrics-{number}.csv"
            writer.metrics_file_path = str(path)
        return writer
