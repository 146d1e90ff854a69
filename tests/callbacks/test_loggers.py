"""A run's metrics survive its being resumed and tested."""

from __future__ import annotations

import csv
import os

import pytest

from f2d2_lightning.callbacks import RunLogger
from f2d2_lightning.callbacks import logger as loggers


def test_every_session_has_its_own_file(tmp_path):
    for session in range(3):
        logger = RunLogger(tmp_path, name="run", version="a")
        for step in range(4):
            logger.log_metrics({"loss": 10.0 * session + step}, step)
            logger.save()
        logger.finalize("success")
    for session, name in enumerate(("metrics.csv", "metrics-1.csv", "metrics-2.csv")):
        with (tmp_path / "run" / "a" / name).open() as file:
            assert [float(row["loss"]) for row in csv.DictReader(file)] == [10.0 * session + s for s in range(4)]


def rows(path):
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_full_disk_costs_no_training_and_no_metrics(tmp_path, monkeypatch):
    logger, path = RunLogger(tmp_path, name="run", version="a"), tmp_path / "run/a/metrics.csv"
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    writer, original = logger.experiment, loggers.ExperimentWriter.save

    def full(self):
        with path.open("a") as file:
            file.write("2.0,")
        raise OSError(28, "No space left on device")

    logger.log_metrics({"loss": 2.0}, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers.ExperimentWriter, "save", full)
        with pytest.warns(UserWarning, match="cannot be written .*No space left"):
            writer.save()
    logger.log_metrics({"loss": 3.0, "other": 4.0}, 2)
    original(writer)
    assert [row["loss"] for row in rows(path)] == [1.0, 2.0, 3.0]
    assert rows(path)[2]["other"] == 4.0


def test_a_kill_while_a_new_metric_is_added_leaves_the_old_ones(tmp_path, monkeypatch):
    logger, path = RunLogger(tmp_path, name="run", version="a"), tmp_path / "run/a/metrics.csv"
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    logger.log_metrics({"loss": 2.0, "other": 4.0}, 1)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.save()
    assert rows(path) == [{"loss": 1.0, "step": 0.0}]
