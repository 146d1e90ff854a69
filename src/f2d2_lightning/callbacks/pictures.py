"""Pictures while a model trains and when it is tested: to disk, and to whatever loggers the trainer has."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from f2d2_lightning.callbacks._gallery import GalleryCallback
from f2d2_lightning.callbacks._models import find_models
from f2d2_lightning.plots import Figure, pixels, save_figure
from f2d2_lightning.training.folders import run_folder, unused
from f2d2_lightning.utils.checks import at_least, checked

FOLDER = "pictures"
Send = Callable[[str, Figure, int], object]


class Pictures(GalleryCallback):
    """Makes the pictures that model and data allow, every so many validations and in test.

    ===============  ==================================================================================
    ``samples``      samples at each step count from the same noise, and the teacher's
    ``calibration``  few-step NLL against the teacher's, one point per sample
    ``nll_steps``    NLL against the number of steps, with the teacher's line
    ``ranked``       most and least likely images, each with its NLL and the teacher's
    ``density``      maps in the plane: at each step count, the teacher's and, if the data module has
                     ``log_prob``, the true one
    ===============  ==================================================================================

    For :class:`~f2d2_lightning.F2D2Module`, for somebody else's module with an
    :class:`~f2d2_lightning.F2D2Callback`, and for the teacher, :class:`~f2d2_lightning.FlowMatchingModule` (samples
    only). Loggers get them as ``val/samples``, ``test/samples`` and so on; files are
    ``pictures/epoch_0003/samples.png`` in the run's folder. The random state is left as it was: training is the same,
    bit for bit, without the pictures.

    A run never writes over pictures of another: where ``pictures`` is taken it takes ``pictures-1``; each ``test`` has
    a folder of its own, ``test``, ``test-1`` and so on. A resumed run goes on in its folder and may replace its own
    epochs' pictures, which it makes again.

    The samples are the same ones in every validation, the first process's first; what a fixed teacher says of them is
    computed once.

    Args:
        every_n_validations: Validations from one set of pictures to the next, the first included.
        samples: Samples in a grid (twenty times as many points in the plane).
        images: Samples of the data for calibration and ranked images.
        teacher_steps: Heun steps of the teacher's samples.
        grid: Cells of a density map along each axis.
        folder: Where ``pictures`` is made; ``None`` for the first logger's folder, else the trainer's.
        to_disk: Write files.
        to_loggers: Give figures to the loggers that take them.

    Raises:
        ValueError: If numbers are out of range or the pictures would go nowhere; at the start of a run, if the model
            is none of the above, or no logger takes figures and ``to_disk`` is off.
    """

    @checked
    def __init__(
        self,
        every_n_validations: int = 1,
        samples: int = 49,
        images: int = 64,
        teacher_steps: int = 100,
        grid: int = 64,
        folder: str | None = None,
        to_disk: bool = True,
        to_loggers: bool = True,
    ) -> None:
        super().__init__(samples=samples, images=images, teacher_steps=teacher_steps, grid=grid)
        at_least(1, every_n_validations=every_n_validations)
        if not (to_disk or to_loggers):
            raise ValueError("to_disk and to_loggers are both off, and the pictures would go nowhere; turn one on")
        self.every_n_validations = every_n_validations
        self.folder, self.to_disk, self.to_loggers = folder, to_disk, to_loggers
        self._resuming = False
        self._begin()

    def _begin(self) -> None:
        self._validations = 0
        self._name: str | None = None
        self._last = ("", -1)  # epoch's folder, step

    # --- the run ---

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any work is done."""
        self.galleries, self._resuming = {}, False
        if stage == "predict":
            return
        find_models(trainer, pl_module)
        if not (self.to_disk or getattr(trainer, "fast_dev_run", False)):
            taken = trainer.is_global_zero and any(map(figure_sender, trainer.loggers))
            if not trainer.strategy.broadcast(taken):
                kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
                raise ValueError(
                    f"none of the loggers ({kinds}) takes figures, and to_disk is off: the pictures would go nowhere; "
                    "turn to_disk on, or add a logger that takes them (TensorBoard, W&B, MLflow, Comet)"
                )

    def state_dict(self) -> dict[str, Any]:
        """Validations so far, and where the pictures are, for a run that is resumed."""
        return {"validations": self._validations, "folder": self._name, "last": list(self._last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._name = int(state_dict["validations"]), state_dict["folder"]
        self._last = str(state_dict["last"][0]), int(state_dict["last"][1])
        self._resuming = True

    def _root(self, trainer: L.Trainer) -> Path:
        # asked for on all processes, also where the answer is not needed
        found = run_folder(trainer)
        return found if self.folder is None else Path(self.folder)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find a folder for the run's pictures."""
        root = self._root(trainer)
        if not self._resuming and trainer.global_step == 0:
            self._begin()
        if self._name is None:
            self._name = trainer.strategy.broadcast(unused(root / FOLDER).name)

    def _folder(self, trainer: L.Trainer, stage: str, root: Path) -> Path:
        """Where a set of pictures goes; to be asked on the first process, once for each set."""
        base = root / (self._name or FOLDER)
        if trainer.state.fn != TrainerFn.FITTING:
            return unused(base / ("test" if stage == "test" else "validate"))
        name, step = f"epoch_{trainer.current_epoch:04d}", trainer.global_step
        if self._last[0] == name and self._last[1] != step:
            # another validation of the same epoch
            return base / f"{name}_step_{step:08d}"
        self._last = name, step
        return base / name

    # --- evaluation ---

    def _due(self, trainer: L.Trainer) -> bool:
        due = trainer.testing or self._validations % self.every_n_validations == 0
        return due and not trainer.sanity_checking

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.collecting = []
        if self._due(trainer):
            self.collect(trainer, find_models(trainer, pl_module))

    on_test_epoch_start = on_validation_epoch_start
    on_validation_batch_end = GalleryCallback.on_test_batch_end

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the pictures."""
        due = self._due(trainer)
        self._validations += trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not due:
            return
        for gallery in self.collecting:
            gallery.share()
        root = self._root(trainer)
        figures: dict[str, Figure] = {}
        for name, gallery in self.galleries.items():
            with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
                measured = gallery.measure()
            if trainer.is_global_zero:
                prefix = f"{name}/" if name else ""
                figures |= {prefix + title: figure for title, figure in gallery.figures(measured).items()}
        if figures and not getattr(trainer, "fast_dev_run", False):
            self._give(trainer, "test" if trainer.testing else "val", figures, root)

    on_test_epoch_end = on_validation_epoch_end

    def _give(self, trainer: L.Trainer, stage: str, figures: dict[str, Figure], root: Path) -> None:
        if self.to_disk:
            folder = self._folder(trainer, stage, root)
            try:
                for name, figure in figures.items():
                    save_figure(figure, folder / f"{name}.png")
            except OSError as error:
                warnings.warn(f"pictures cannot be written to {folder} now ({error}); the run goes on", stacklevel=2)
        if self.to_loggers:
            for send in filter(None, map(figure_sender, trainer.loggers)):
                for name, figure in figures.items():
                    send(f"{stage}/{name}", figure, trainer.global_step)


def figure_sender(logger: Logger) -> Send | None:
    """What gives a logger a figure by its name there, such as ``"val/samples"``, and the optimiser's step of it.

    ``None`` for a logger that takes no figures, such as the CSV logger. They are known by what they offer, so that none
    of their packages is imported. To be called on the first process only, as the logger's own methods are.
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
