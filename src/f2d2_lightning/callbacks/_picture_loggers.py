"""Figures to whatever logger a trainer has, known by what it offers, so that none of their packages is imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lightning.pytorch.loggers import Logger

from f2d2_lightning.plots import Figure, pixels

Send = Callable[[str, Figure, int], object]


def figure_sender(logger: Logger) -> Send | None:
    """What gives a logger a figure by its name there, such as ``"val/samples"``, and the optimiser's step of it.

    ``None`` for a logger that takes no figures, such as the CSV logger. To be called on the first process only, as the
    logger's own methods are.
    """
    log_image = getattr(logger, "log_image", None)
    if callable(log_image):  # W&B
        return lambda name, figure, step: log_image(key=name, images=[pixels(figure)], step=step)
    experiment = getattr(logger, "experiment", None)
    add_figure = getattr(experiment, "add_figure", None)
    if callable(add_figure):  # TensorBoard
        return lambda name, figure, step: add_figure(name, figure, global_step=step, close=False)
    log = getattr(experiment, "log_figure", None)
    if not callable(log):
        return None
    takes = inspect.signature(log).parameters
    if {"run_id", "artifact_file"} <= takes.keys():
        # MLflow, whose artifacts have no step but in their names, and one of the same name would be replaced
        run = getattr(logger, "run_id", None)
        return lambda name, figure, step: log(
            run_id=run, figure=figure, artifact_file=f"pictures/{name}/step_{step:08d}.png"
        )
    if {"figure_name", "figure", "step"} <= takes.keys():  # Comet
        return lambda name, figure, step: log(figure_name=name, figure=figure, step=step)
    return None
