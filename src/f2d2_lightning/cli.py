"""The command line: ``f2d2 fit | validate | test | sample | nll``.

The first three are a LightningCLI; ``f2d2 fit --print_config`` shows every option. The last two use a checkpoint that
``f2d2 fit`` wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from f2d2_lightning.data import FlowDataModule
from f2d2_lightning.modules import FlowModule

__all__ = ["F2D2CLI", "main"]

USAGE = """usage: f2d2 COMMAND ...

commands:
  fit        train a teacher or a student:  f2d2 fit --config configs/digits_teacher.yaml
  validate   run the validation loop of a checkpoint
  test       run the test loop; a student writes a table and pictures
  sample     draw samples from a student's checkpoint:  f2d2 sample --ckpt ... --steps 2 --num 64 --out grid.png
  nll        log-likelihood of every sample of a data set:  f2d2 nll --ckpt ... --data digits --steps 4 --out nll.csv

f2d2 COMMAND --help shows the options of a command, f2d2 fit --print_config a whole configuration."""


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder; a resumed run may write over its own."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.log_dir is None or stage != "fit":
            return
        path = Path(trainer.log_dir) / self.config_filename
        resuming = self.config.get("ckpt_path") is not None
        # a start that failed, for want of data or teacher, leaves its configuration and nothing else
        begun = path.exists() and any(entry.name != path.name for entry in path.parent.iterdir())
        if begun and not resuming and not getattr(trainer, "fast_dev_run", False):
            raise FileExistsError(
                f"{path} is there already: a run of that name exists. Go on with it (--ckpt_path .../last.ckpt), "
                "choose another name (--trainer.logger.init_args.version NAME), or remove its folder"
            )
        self.overwrite = resuming or not begun
        super().setup(trainer, pl_module, stage)


class F2D2CLI(LightningCLI):
    """LightningCLI for :class:`FlowModule` and :class:`FlowDataModule`, any class of either by ``class_path``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults that suit every command."""
        parser.set_defaults({"seed_everything": 0})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Fit, validate and test."""
        skip = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": skip,
            "test": skip,
        }


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``f2d2``."""
    given, arguments = arguments, sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] in ("sample", "nll"):
        from f2d2_lightning.commands import nll_command, sample_command

        {"sample": sample_command, "nll": nll_command}[arguments[0]](arguments[1:])
        return
    F2D2CLI(
        FlowModule,
        FlowDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=_SaveConfig,
        parser_kwargs={"parser_mode": "omegaconf"},
        args=given,
    )
