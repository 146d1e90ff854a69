"""``f2d2 fit | validate | test | predict``, a LightningCLI; ``f2d2 fit --print_config`` shows every option."""

from __future__ import annotations

import functools
import logging
import signal
import sys
import warnings
from pathlib import Path
from shlex import join, quote
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from f2d2_lightning import _moved
from f2d2_lightning.callbacks import JointSummary, LastCheckpoint, RunProgress, TestReport
from f2d2_lightning.cli._common import working_directory
from f2d2_lightning.cli._configs import shown_config
from f2d2_lightning.cli._mistakes import Parser, in_a_line, refusals, suggesting
from f2d2_lightning.cli._resuming import differences, is_finished, newest_checkpoint, of_the_run
from f2d2_lightning.cli._tables import Column, write_table
from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.modules import FlowModule
from f2d2_lightning.plots.samples import is_shown
from f2d2_lightning.training.folders import run_folder
from f2d2_lightning.training.loading import look_into
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.files import whole_file

NOT_SAID = ("\U0001f4a1", "TPU available", "Trainer already configured with model summary")
"""Beginnings of what Lightning logs and nobody needs."""
CONFIG = "config.yaml"
ELSEWHERE = (
    "Choose another folder (--trainer.logger.init_args.version NAME), remove it, or go on all the same with what is "
    "given now: --ckpt_path last"
)
say = rank_zero_only(print)


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder, unless it is there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.log_dir is None or stage != "fit" or not trainer.is_global_zero:
            return
        path = Path(trainer.log_dir) / self.config_filename
        # the time of a file that stays tells which checkpoints came after it
        if not path.is_file() or read_yaml(path) != resolved(self.parser, self.config):
            with whole_file(path) as partial:
                self.parser.save(self.config, partial, skip_none=False, overwrite=True, multifile=False)


@functools.cache
def read_old_names() -> None:
    """Let configurations of version 0.1 be read by the names of today."""
    # registers the loader, on first use
    ArgumentParser(parser_mode="omegaconf").parse_string("{}")
    load = get_loader("omegaconf")
    set_loader("omegaconf", lambda text: _moved.described(load(text)), (yaml.YAMLError,))


def resolved(parser: LightningArgumentParser, config: Any) -> Any:
    """A configuration as its file says it: every option, in plain values."""
    return yaml.safe_load(parser.dump(config, skip_none=False))


def read_yaml(path: Path) -> Any:
    """Contents of a configuration, by the names of today; ``None`` if it is damaged."""
    try:
        return _moved.described(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def _is_elsewhere(path: Any) -> bool:
    """Whether a checkpoint is one that Lightning finds or fetches by itself."""
    return path in ("best", "hpc") or str(path).startswith("registry") or "://" in str(path)


class F2D2CLI(LightningCLI):
    """LightningCLI for :class:`FlowModule` and :class:`FlowDataModule`, any class of either by ``class_path``.

    A run is its folder. Where it holds a checkpoint, ``fit`` goes on with it if the configuration is the same, and
    refuses another one; a run that is complete is left alone. The model is always the configuration's: of a checkpoint
    (``--ckpt_path``) only weights and the state of training are taken, so that what is said here holds.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"seed_everything": 0})
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        theirs = LightningCLI.subcommands()
        skipped = {name: {*theirs[name], "weights_only"} for name in ("fit", "validate", "test", "predict")}
        skipped["test"].add("verbose")
        return skipped

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        given = sys.argv[1:]
        command = next((text for text in given if text in self._subcommand_parsers), "")
        with suggesting(self._subcommand_parsers.get(command, parser), command, given):
            super().parse_arguments(parser, args)

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.configuration = self.config[self.subcommand].as_dict()  # type: ignore[attr-defined]
        self.parser.add_instantiator(lambda cls, *args, **kwargs: cls(*args, **kwargs), object)

    def _parse_ckpt_path(self) -> None:
        """Lightning's puts the checkpoint's hyper-parameters in place of the configuration's."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer; what SLURM makes it save goes to the run's folder, where it is found again."""
        config = self._get(self.config_init, "trainer")
        logger = config.logger[0] if isinstance(config.logger, list) and config.logger else config.logger
        named = isinstance(getattr(logger, "_version", None), str)
        if config.default_root_dir is None and named and getattr(logger, "log_dir", None) is not None:
            kwargs["default_root_dir"] = logger.log_dir
        callbacks = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        if config.enable_checkpointing is False or any(isinstance(callback, LastCheckpoint) for callback in given):
            callbacks = [callback for callback in callbacks if not isinstance(callback, LastCheckpoint)]
        callbacks += [] if config.callbacks == [] else self._shown(config, given)
        with refusals("Trainer", {**config}, "trainer"):
            # Lightning divides by it
            at_least(1, accumulate_grad_batches=config.accumulate_grad_batches)
            return self._instantiate_trainer({**config, **kwargs}, callbacks)

    def _shown(self, config: Any, given: list[Any]) -> list[L.Callback]:
        """What a run shows of itself, unless something of the kind was given, or switched off."""
        kinds: dict[type, tuple[bool, type[L.Callback]]] = {
            ProgressBar: (config.enable_progress_bar is not False, RunProgress),
            ModelSummary: (config.enable_model_summary is not False, JointSummary),
            TestReport: (self.subcommand == "test" and bool(getattr(self.model, "steps", ())), TestReport),
        }
        return [
            make() for kind, (wanted, make) in kinds.items() if wanted and not any(isinstance(c, kind) for c in given)
        ]

    def after_fit(self) -> None:
        """Say where the model is, and what it is good for."""
        newest, config = self._newest(), self.config["fit"].get("config")
        if newest is None or getattr(self.trainer, "fast_dev_run", False):
            return
        say(f"trained: {newest}")
        if getattr(self.model, "steps", ()):
            named = " ".join(f"--config {quote(shown_config(path))}" for path in config or ()) or "--config ..."
            say(f"next: f2d2 test {named} --ckpt_path last")
            self._say_uses(newest)

    def after_test(self) -> None:
        """Say where everything is."""
        if getattr(self.model, "steps", ()):
            say(f"report, tables and pictures: {run_folder(self.trainer)}")
            self._say_uses(self.config_init["test"]["ckpt_path"])

    def before_predict(self) -> None:
        """See to it that there is something to predict, and one process to write it."""
        if not getattr(self.model, "steps", ()):
            raise ValueError("f2d2 predict is for students; a teacher's own likelihoods are those of f2d2 test")
        if self.trainer.world_size > 1:
            raise ValueError(f"devices={self.trainer.world_size}; f2d2 predict is for one: --trainer.devices 1")
        self._before_evaluation()

    def after_predict(self) -> None:
        """Write what a student predicts: log-likelihoods of each sample at each number of steps, as f2d2 nll does."""
        parts, log_scale = self.trainer.predict_loop.predictions, getattr(self.datamodule, "log_scale", 0.0)
        path = run_folder(self.trainer) / "predictions.csv"
        found = {k: (torch.cat([part[k] for part in parts]).cpu().double() - log_scale).tolist() for k in parts[0]}
        columns = [Column("index", list(range(len(next(iter(found.values()))))))]
        columns += [Column(f"log_prob_{k}", values, "nats") for k, values in found.items()]
        write_table(path, columns, overwrite=True)
        say(f"wrote {path}")

    def _say_uses(self, checkpoint: Any) -> None:
        own = self.model.hparams.get("trust") or ()
        trust, named = f" --trust {join(own)}" if own else "", quote(str(checkpoint))
        kind = "png" if is_shown(self.model.shape) else "npz"
        say(f"      f2d2 sample --ckpt {named} --steps 2 --num 64 --out samples.{kind}{trust}")
        say(f"      f2d2 nll --ckpt {named} --data DATA --steps 4 --out nll.csv{trust}")

    # --- going on ---

    def before_fit(self) -> None:
        """Start, go on, or leave a finished run alone; a run of another configuration in the folder is an error."""
        config = self.config_init["fit"]
        folder, given = run_folder(self.trainer), config["ckpt_path"]
        if _is_elsewhere(given):
            return
        if getattr(self.trainer, "fast_dev_run", False):
            if given not in (None, "last"):
                look_into(Path(given))
            return
        newest = self._newest()
        changed, begun = self._changed(folder), None
        if (folder / CONFIG).exists():
            begun = (folder / CONFIG).stat().st_mtime
            # a start that failed, for want of data or teacher, leaves its configuration and nothing else
            if changed and given is None and any(entry.name != CONFIG for entry in folder.iterdir()):
                raise FileExistsError(
                    f"{folder} holds a run of another configuration ({'; '.join(changed[:8])}"
                    f"{'; ...' if len(changed) > 8 else ''}; before -> now). {ELSEWHERE}"
                )
        elif newest is not None and given is None:
            raise FileExistsError(f"{newest} is there, and no {CONFIG} that says of what. {ELSEWHERE}")
        if given not in (None, "last"):
            # this very command was started before: its own checkpoints come after what it started from
            again = not changed and begun is not None and newest is not None and newest.stat().st_mtime > begun
            if not again or read_yaml(folder / CONFIG).get("ckpt_path") != str(given):
                newest = Path(given)
            if newest is None or not newest.exists():
                raise FileNotFoundError(f"there is no checkpoint at {given}; correct --ckpt_path, or leave it out")
        config["ckpt_path"] = None if newest is None else str(newest)
        if newest is None:
            return
        if is_finished(newest) and not changed and given in (None, "last"):
            say(
                f"{folder} is a run of this configuration that is finished: nothing to do. Test it: f2d2 test ... "
                f"--ckpt_path {quote(str(newest))}; to train another: --trainer.logger.init_args.version NAME"
            )
            sys.exit(0)
        say(f"going on from {newest}" + (f", with another configuration: {'; '.join(changed)}" if changed else ""))

    def _before_evaluation(self) -> None:
        """Take a checkpoint of the model, whose figures are wanted: without one its weights would be random."""
        config = self.config_init[self.subcommand]
        newest = self._newest()
        # empty: a variable of a shell that was not set
        if not config["ckpt_path"]:
            which = f"say which: --ckpt_path last ({newest})"
            if newest is None:
                first = "train first (f2d2 fit ...) or name one (--ckpt_path FILE)"
                which = f"{run_folder(self.trainer)} holds none either: {first}"
            of_class = f"Trainer().{self.subcommand}(model, data) in Python"
            raise ValueError(
                f"f2d2 {self.subcommand} without a checkpoint would give the figures of a model that was not trained; "
                f"{which}. For a model whose weights come with its class: {of_class}"
            )
        if config["ckpt_path"] == "last":
            if newest is None:
                raise FileNotFoundError(f"{run_folder(self.trainer)} holds no checkpoint; train first: f2d2 fit ...")
            config["ckpt_path"] = str(newest)
        if config["ckpt_path"] is not None and not _is_elsewhere(config["ckpt_path"]):
            look_into(Path(config["ckpt_path"]))

    before_validate = before_test = _before_evaluation

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # a checkpoint from anywhere is read as plain values
        given = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        if subcommand == "test":
            # the report has a table of its own
            given["verbose"] = not any(isinstance(c, TestReport) for c in getattr(self.trainer, "callbacks", ()))
        return given

    def _newest(self) -> Path | None:
        callbacks = getattr(self.trainer, "callbacks", [])
        keeper = next((c for c in callbacks if isinstance(c, LastCheckpoint)), LastCheckpoint())
        return newest_checkpoint(keeper.folder(self.trainer), Path(self.trainer.default_root_dir))

    def _changed(self, folder: Path) -> list[str]:
        """Differences of the folder's configuration to this one, the checkpoint that is started from left out."""
        path = folder / CONFIG
        if not path.is_file():
            return []
        now = resolved(self._parser("fit"), self.config["fit"])
        before = read_yaml(path)
        if not isinstance(before, dict):
            return [f"{path} cannot be read"]
        alike = {"ckpt_path": None} | ({"seed_everything": None} if self._seed_was_drawn else {})
        return list(differences(of_the_run({**before, **alike}), of_the_run({**now, **alike})))

    def _set_seed(self) -> None:
        # a run that goes on has the seed of its beginning in its checkpoint
        self._seed_was_drawn = self._get(self.config, "seed_everything") is True
        with refusals("seed", {"seed_everything": None}, ""):
            super()._set_seed()


def _be_quiet() -> None:
    """Leave out what others print that a user of these commands can do nothing about."""
    known = ".*(LeafSpec|torch.jit.script|does not have many workers|logging interval|sync_dist)"
    warnings.filterwarnings("ignore", message=known)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(NOT_SAID))


def lightning_command(command: str, arguments: list[str]) -> None:
    """``f2d2 fit | validate | test | predict``, with all arguments, the command's name among them."""
    read_old_names()
    _be_quiet()
    # Lightning takes arguments for a program's, and warns; processes that it starts get these as well
    before, sys.argv = sys.argv, [sys.argv[0], *(_moved.option(text) for text in arguments)]
    try:
        with in_a_line(command, arguments), working_directory():
            F2D2CLI(
                FlowModule,
                FlowDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=_SaveConfig,
                parser_class=Parser,
                parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False, "allow_abbrev": False},
            )
    except SIGTERMException as stop:
        # where Lightning raises it, before training began, it would end the process with 0
        sys.exit(stop.code or 128 + signal.SIGTERM)
    finally:
        sys.argv = before
