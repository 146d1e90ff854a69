"""A CSV logger that keeps what earlier sessions of a run wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

__all__ = ["RunLogger"]


class _SessionWriter(ExperimentWriter):
    """Writes ``metrics.csv``, or the first of ``metrics-1.csv``, ``metrics-2.csv``, ... that is not there yet."""

    def __init__(self, log_dir: str) -> None:
        number, name = 0, "metrics.csv"
        while (Path(log_dir) / name).exists():
            number += 1
            name = f"metrics-{number}.csv"
        self.NAME_METRICS_FILE = name
        with warnings.catch_warnings():
            # true of Lightning's writer, not of this one
            warnings.filterwarnings("ignore", ".*Previous log files in this directory will be deleted.*")
            super().__init__(log_dir)


class RunLogger(CSVLogger):
    """Lightning's CSV logger, for runs that are resumed and tested in the same folder.

    Lightning's deletes ``metrics.csv`` whenever a folder is used again: a resumed run, or its test, wipes out what
    training logged. This one goes on in ``metrics-1.csv``, ``metrics-2.csv`` and so on. Arguments are
    :class:`lightning.pytorch.loggers.CSVLogger`'s; the folder is a local one.
    """

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer, on a file of its own."""
        if not isinstance(self._experiment, ExperimentWriter):
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _SessionWriter(self.log_dir)
        return self._experiment
