"""A CSV logger that keeps what earlier sessions of a run wrote."""

from __future__ import annotations

import csv
import itertools
import os
import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from f2d2_lightning.utils.files import whole_file


class _SessionWriter(ExperimentWriter):
    """Writes ``metrics.csv``, or the first of ``metrics-1.csv``, ``metrics-2.csv``, ... that is not there yet."""

    def __init__(self, log_dir: str) -> None:
        names = itertools.chain(["metrics.csv"], (f"metrics-{number}.csv" for number in itertools.count(1)))
        self.NAME_METRICS_FILE = next(name for name in names if not (Path(log_dir) / name).exists())
        with warnings.catch_warnings():
            # true of Lightning's writer, not of this one
            warnings.filterwarnings("ignore", ".*Previous log files in this directory will be deleted.*")
            super().__init__(log_dir)

    def save(self) -> None:
        """Append what was logged; on a full disk a warning, and the next save tries again."""
        path, keys = Path(self.metrics_file_path), list(self.metrics_keys)
        size = path.stat().st_size if path.exists() else None
        try:
            super().save()
        except OSError as error:
            self.metrics_keys = keys
            # half a line would be glued to the next one
            if size is None:
                path.unlink(missing_ok=True)
            elif path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
            warnings.warn(f"metrics cannot be written to {path} now ({error}); training goes on", stacklevel=2)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """A kill in the middle of Lightning's leaves no metrics at all."""
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with whole_file(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)


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
