"""An interrupted run goes on to the same numbers, wherever it was stopped."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.callbacks import LastCheckpoint
from f2d2_lightning.cli._resuming import is_finished
from lightning_parts import Pair, same, student
from lightning_parts import fit as train


class Batches(L.Callback):
    """What was trained on, in order, and when Lightning said it was."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.places: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.places.append((trainer.current_epoch, batch_idx, trainer.global_step, logged))
        self.seen.append((batch[0] if isinstance(batch, (tuple, list)) else batch).clone())


class Save(L.Callback):
    """A checkpoint from one hook at one step."""

    def __init__(self, folder, hook: str, step: int) -> None:
        self.path, self.step, self.saved = folder / "saved.ckpt", step, False
        setattr(self, hook, self._save)

    def _save(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step and not self.saved and not trainer.sanity_checking:
            self.saved = True
            trainer.save_checkpoint(self.path)


class Images(f2.data.Digits):
    """A few digits that are mirrored, read lazily."""

    def __init__(self, **kwargs) -> None:
        super().__init__(batch_size=32, **kwargs)
        self.flip = True

    def splits(self):
        return {name: (values[:96].numpy(), labels) for name, (values, labels) in super().splits().items()}


def small_teacher(data):
    torch.manual_seed(0)
    network = f2.nn.MLP(data.shape, width=4, blocks=1)
    return f2.FlowMatchingModule(network, shape=data.shape, levels=data().levels, warmup=2)


def fit(folder, module, *callbacks, **kwargs):
    folder.mkdir(exist_ok=True)
    return train(folder, module, *callbacks, **({"max_epochs": 3} | kwargs))


def check_the_rest(whole, parts, seen, rest, step):
    """Whether the batches of the second part are those that the first part had not seen, and the weights the same."""
    expected = seen.seen[step:]
    assert len(rest.seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(rest.seen, expected, strict=True))
    assert rest.places == seen.places[step:]
    assert same(whole, parts)


def check_resumed(folder, make, data, save, *more, again=(), **settings):
    """A run from a checkpoint beside the one that was not interrupted."""
    whole, parts, seen, rest = make(), make(), Batches(), Batches()
    fit(folder, whole, seen, save, *more, data=data(), **settings)
    assert save.saved
    run = fit(folder, parts, rest, *again, data=data(), ckpt_path=save.path, **settings)
    assert run.global_step == len(seen.seen)
    check_the_rest(whole, parts, seen, rest, save.step)


PLACES = (1, 3, 4, 6, 8)
"""Within an epoch of three steps and at its end, in the first, the next and the last one."""
CASES = [
    *[(0, "on_train_batch_end", step, {}) for step in PLACES],
    *[(0, "on_train_batch_end", step, {"limit_train_batches": 2}) for step in (1, 2, 3, 4)],
    *[(2, "on_train_batch_end", step, {}) for step in (2, 3, 6)],
    *[(w, hook, step, {}) for w in (0, 2) for hook in ("on_train_epoch_end", "on_validation_end") for step in (3, 6)],
    *[(0, "on_validation_batch_end", step, {}) for step in (3, 6)],
    (0, "on_train_epoch_end", 2, {"limit_train_batches": 2}),
    (0, "on_train_end", 9, {}),
    *[(w, "on_train_batch_end", step, {"check_val_every_n_epoch": 2}) for w in (0, 2) for step in (3, 4, 6)],
    *[(w, "on_train_epoch_end", step, {"check_val_every_n_epoch": 2}) for w in (0, 2) for step in (3, 6)],
    *[(0, "on_train_batch_end", step, {"limit_val_batches": 0}) for step in PLACES],
    *[(w, "on_train_epoch_end", step, {"limit_val_batches": 0}) for w in (0, 2) for step in (3, 6)],
    *[(0, "on_train_batch_end", step, {"val_check_interval": 1}) for step in PLACES],
    *[(0, "on_validation_end", step, {"val_check_interval": 1}) for step in PLACES],
    *[(0, "on_train_batch_end", s, {"val_check_interval": 2, "check_val_every_n_epoch": None}) for s in range(1, 7)],
    *[(0, "on_train_epoch_end", s, {"val_check_interval": 2, "check_val_every_n_epoch": None}) for s in (3, 6)],
    *[(0, "on_train_batch_start", step, {}) for step in (0, *PLACES)],
    *[(0, "on_train_epoch_start", step, {}) for step in (3, 6)],
]


@pytest.mark.parametrize(("workers", "hook", "step", "settings"), CASES)
def test_the_batches_after_a_resume_are_the_next_ones(tmp_path, workers, hook, step, settings):
    data = lambda: Pair(num_workers=workers)  # noqa: E731
    check_resumed(tmp_path, lambda: small_teacher(Pair), data, Save(tmp_path, hook, step), **settings)


@pytest.mark.parametrize(("hook", "step"), [("on_train_batch_end", 5), ("on_train_epoch_end", 6)])
@pytest.mark.parametrize("objective", ["trajectory", "semigroup", "lagrangian"])
def test_a_students_objective_goes_on_too(tmp_path, objective, hook, step):
    """Pools of trajectories, random intervals and the head's average, which are in no batch."""
    own = {"semigroup": f2.objectives.Semigroup, "lagrangian": f2.objectives.Lagrangian}
    make = lambda: student(**({} if objective == "trajectory" else {"objective": own[objective]()}))  # noqa: E731
    check_resumed(tmp_path, make, Pair, Save(tmp_path, hook, step))


class Validations(L.Callback):
    """Steps at which validation ended, and what it found."""

    def __init__(self) -> None:
        self.found: list[tuple[int, float]] = []

    def on_validation_end(self, trainer, pl_module):
        self.found.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


@pytest.mark.parametrize(
    ("step", "settings"), [(6, {}), (5, {"val_check_interval": 2}), (6, {"val_check_interval": 1})]
)
@pytest.mark.parametrize("after", [1, 2])
def test_a_validation_that_was_cut_off_is_run_again(tmp_path, step, settings, after):
    save, passed, validated, again = Save(tmp_path, "on_validation_batch_end", step), [], Validations(), Validations()

    def at_a_batch(trainer, *args, original=save._save, **kwargs):
        if trainer.global_step == step:
            passed.append(1)
            if len(passed) == after:
                original(trainer)

    save.on_validation_batch_end = at_a_batch
    make = lambda: small_teacher(Pair)  # noqa: E731
    check_resumed(tmp_path, make, Pair, save, validated, again=[again], **(settings | {"max_epochs": 4}))
    assert again.found == [found for found in validated.found if found[0] >= step]


@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 3), ("on_train_batch_end", 4), ("on_train_epoch_end", 6)]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_mirrored_lazy_images_go_on_too(tmp_path, workers, hook, step):
    data = lambda: Images(num_workers=workers)  # noqa: E731
    check_resumed(tmp_path, lambda: small_teacher(Images), data, Save(tmp_path, hook, step))


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_steps": 4}, {"max_steps": 6}, {"max_steps": 2}])
def test_a_finished_run_can_be_trained_on(tmp_path, end):
    schedule = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)}
    make = lambda: f2.FlowMatchingModule(f2.nn.MLP((2,), width=4, blocks=1), (2,), warmup=0, **schedule)  # noqa: E731
    torch.manual_seed(0)
    whole, seen = make(), Batches()
    fit(tmp_path / "whole", whole, seen, enable_checkpointing=True)
    torch.manual_seed(0)
    first, parts, rest = make(), make(), Batches()
    end = {"max_epochs": -1, "enable_checkpointing": True} | end
    run = fit(tmp_path / "parts", first, LastCheckpoint(), **end)
    last = tmp_path / "parts/checkpoints/last.ckpt"
    assert is_finished(last)
    fit(tmp_path / "parts", parts, rest, ckpt_path=last)
    # after max_steps Lightning is one ahead in the steps that loggers see
    rest.places = [(*place[:3], seen.places[place[2]][3]) for place in rest.places]
    check_the_rest(whole, parts, seen, rest, run.global_step)
