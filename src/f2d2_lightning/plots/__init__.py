"""Pictures of what a model does, as matplotlib figures: no pyplot, no display, nothing global is touched."""

from __future__ import annotations

from f2d2_lightning.plots._figure import Figure, pixels, save_figure
from f2d2_lightning.plots.density import density_figure, plane_grid
from f2d2_lightning.plots.likelihood import calibration_figure, nll_steps_figure
from f2d2_lightning.plots.ranked import ranked_figure
from f2d2_lightning.plots.samples import sample_figure
from f2d2_lightning.plots.training import training_figure

__all__ = [
    "Figure",
    "calibration_figure",
    "density_figure",
    "nll_steps_figure",
    "pixels",
    "plane_grid",
    "ranked_figure",
    "sample_figure",
    "save_figure",
    "training_figure",
]
