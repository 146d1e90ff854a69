"""A run's metrics survive its being resumed and tested."""

from __future__ import annotations

import csv

from f2d2_lightning.loggers import RunLogger


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
