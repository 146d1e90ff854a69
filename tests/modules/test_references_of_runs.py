"""A reference that chooses its own solver, in runs: once, kept, and said."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from lightning_utilities.core import rank_zero

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from foreign import MeanFlowModule, callback
from lightning_parts import Pair, fit, student, teacher, trainer

OPEN = f2.Reference()


class Said(logging.Handler):
    """What a run says of its reference."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if record.getMessage().startswith("reference:"):
            self.lines.append(record.getMessage())


@pytest.fixture
def said():
    # of lightning and pytorch_lightning, that of the one which was imported last
    handler, logger = Said(), rank_zero.log
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture
def chosen(monkeypatch):
    """Choices that were made."""
    made, original = [], f2.Reference.chosen

    def counting(self, velocity, x, cond=None):
        made.append(original(self, velocity, x, cond))
        return made[-1]

    monkeypatch.setattr(f2.Reference, "chosen", counting)
    return made


def learning(with_callback, **kwargs):
    """A module, the model of which is evaluated, and the callbacks that it takes."""
    if not with_callback:
        module = student(reference=OPEN, **kwargs)
        return module, module, []
    added = callback(reference=OPEN, teacher=teacher().average.velocity, **kwargs)
    return MeanFlowModule(), added, [added]


@pytest.mark.parametrize("with_callback", [False, True])
def test_a_run_chooses_once_and_a_resumed_one_not_again(tmp_path, chosen, said, with_callback):
    module, model, callbacks = learning(with_callback)
    run = fit(tmp_path, module, *callbacks, max_epochs=2)
    (choice,) = chosen
    assert replace(model.reference_choice, identity=None) == choice
    assert model.reference_choice.identity is not None
    assert choice.states == 40
    assert model.reference == OPEN
    assert said == [choice.said(50)]
    assert "evaluations), exact divergence: off by" in said[0]
    assert " for 50 samples" in said[0]
    row = model.agreement_table()[-1]
    assert row["evaluations"] == choice.evaluations
    path = tmp_path / "x.ckpt"
    run.save_checkpoint(path)
    module, again, callbacks = learning(with_callback)
    fit(tmp_path, module, *callbacks, max_epochs=3, ckpt_path=path)
    assert again.reference_choice == model.reference_choice
    assert len(chosen) == len(said) == 1
    # what a configuration says now counts more than what was chosen before
    module, other, callbacks = learning(with_callback)
    other.reference = f2.Reference(method="heun3")
    fit(tmp_path, module, *callbacks, max_epochs=3, ckpt_path=path)
    assert other.reference_choice.reference.method == "heun3"
    assert len(chosen) == len(said) == 2


def test_a_velocity_that_trains_is_looked_at_in_every_evaluation(tmp_path, chosen, said):
    network = f2.nn.MLP((2,), width=16, blocks=1)
    module = f2.F2D2Module(network, (2,), steps=(1, 2), reference_samples=20, reference=OPEN)
    fit(tmp_path, module, max_epochs=3, num_sanity_val_steps=1)
    assert len(chosen) == 4
    assert module.reference_choice == chosen[-1]
    # said again where something else is taken
    changes = sum(one.reference != other.reference for one, other in itertools.pairwise(chosen))
    assert len(said) == 1 + changes
    assert " for 20 samples" in said[0]


def test_a_teacher_says_its_likelihood_by_what_was_chosen(tmp_path, chosen):
    module = teacher(reference=OPEN, validate_nll=True)
    run = fit(tmp_path, module, max_epochs=2)
    assert len(chosen) == 2
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = f2.FlowMatchingModule.load_from_checkpoint(tmp_path / "x.ckpt", flow_map=teacher().flow_map, reference=OPEN)
    x = torch.randn(5, 2)
    answer = again.log_prob(x)
    assert torch.equal(answer.value, module.log_prob(x).value)
    assert answer.evaluations == chosen[-1].evaluations
    assert len(chosen) == 2
    fresh = teacher()
    fresh.log_prob(torch.randn(20, 2)), fresh.log_prob(x)
    assert len(chosen) == 3


def test_nothing_is_chosen_where_all_is_given_or_nothing_compared(tmp_path, chosen, said):
    for settings in ({"reference": f2.Reference(steps=4)}, {"reference": OPEN, "reference_samples": 0}):
        fit(tmp_path, student(**settings))
    assert chosen == said == []


@pytest.mark.parametrize("who", ["teacher", "student", "alone", "callback"])
def test_what_was_chosen_before_training_is_not_taken_after_it(tmp_path, chosen, who):
    """Unless it is that of a teacher, which stays as it is."""
    module, callbacks = MeanFlowModule(), []
    if who == "teacher":
        model = module = teacher(reference=OPEN)
    elif who == "student":
        model = module = student(reference=OPEN, reference_samples=0)
    elif who == "alone":
        model = module = f2.F2D2Module(f2.nn.MLP((2,), 16, 1), (2,), reference=OPEN, reference_samples=0)
    else:
        model = callback(reference=OPEN, reference_samples=0)
        callbacks, velocity = [model], teacher().average.velocity
    x = torch.randn(20, 2)
    model.reference_log_prob(velocity if who == "callback" else model.reference_velocity(), x)
    assert model.reference_choice == chosen[0]
    fit(tmp_path, module, *callbacks)
    assert len(chosen) == 1
    assert model.reference_choice == (chosen[0] if who == "student" else None)


def test_a_reference_that_was_chosen_for_another_teacher_is_not_taken(tmp_path, chosen, said):
    module, path = student(reference=OPEN), tmp_path / "x.ckpt"
    fit(tmp_path, module).save_checkpoint(path)
    for scale in (1.0, 8.0):
        of = teacher()
        with torch.no_grad():
            for p in of.average.parameters():
                p.mul_(scale).add_(0.1 * (scale - 1))
        again = student(of, reference=OPEN)
        trainer(tmp_path).validate(again, Pair(), ckpt_path=path, verbose=False)
        assert len(chosen) == len(said) == (1 if scale == 1 else 2)
        # and neither by a diagnosis, or any other that asks before an evaluation
        loaded = f2.F2D2Module.load_from_checkpoint(path, teacher=of, objective=module.objective, reference=OPEN)
        solver = loaded.evaluation.settled(loaded.reference_velocity(), Pair().splits()["val"][0][:40], None)
        assert solver == again.reference_choice.reference
        chosen[1 if scale == 1 else 2 :] = []
    assert "chosen anew" in said[1]
    assert again.reference_choice.error == chosen[1].error != chosen[0].error


def test_few_states_settle_nothing_for_the_next_ones(tmp_path, chosen):
    module = teacher(reference=OPEN, validate_nll=True)
    few = Pair()
    few.eval_batch_size = 4
    assert module.log_prob(torch.randn(1, 2)).evaluations == 1000
    assert module.reference_choice is None
    trainer(tmp_path, limit_val_batches=1).validate(module, few, verbose=False)
    assert len(chosen) == 2
    assert module.reference_choice is None
    assert module.log_prob(torch.randn(20, 2)).evaluations == chosen[-1].evaluations < 1000
    assert module.reference_choice.measured


def test_a_step_does_not_go_through_the_teacher(tmp_path, monkeypatch):
    asked, original = [], f2.modules._teaching.KeptTeacher.get
    monkeypatch.setattr(
        f2.modules._teaching.KeptTeacher, "get", lambda self, *where: asked.append(where) or original(self, *where)
    )
    counts = []
    for steps in (2, 6):
        asked.clear()
        fit(tmp_path, student(reference=OPEN), max_epochs=-1, max_steps=steps, limit_val_batches=0)
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0
