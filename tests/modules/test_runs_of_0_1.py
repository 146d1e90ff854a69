"""Runs, command lines and data modules of version 0.1, whose defaults and names were others."""

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning import _moved
from foreign import MeanFlowModule, callback
from lightning_parts import Pair, fit, student, teacher


def test_a_callback_goes_on_with_the_head_that_its_run_began_with(tmp_path):
    module = MeanFlowModule()
    width = module.net.outlet.in_features
    head = f2.DivergenceHead(width, per_axis=True, baseline=f2.GaussianBaseline((2,), "diagonal"))
    fit(tmp_path, module, callback(head=head)).save_checkpoint(tmp_path / "a.ckpt")
    again = callback()
    fit(tmp_path, MeanFlowModule(), again, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    went_on = again.added.live["head"]
    assert went_on.per_axis
    assert went_on.baseline.covariance == "diagonal"
    assert again.added.steps == 6


def of_0_1(path, then):
    """The checkpoint without what tells that a later version wrote it."""
    content = torch.load(path, weights_only=True)
    content["f2d2"].pop("version", None) if "f2d2" in content else None
    for state in content["callbacks"].values():
        state.pop("version", None)
    torch.save(content, then)
    return then


@pytest.mark.parametrize("old", [False, True])
def test_runs_of_0_1_keep_the_objective_that_was_the_default_then(tmp_path, old):
    """A callback took any velocity for one that moves, a module for one that stays."""
    velocity = teacher().average.velocity
    began = callback(objective=None, teacher=velocity)
    assert began.objective.refresh == 0
    if old:
        began.objective = type(began.objective)(capacity=2048, refresh=8.0, chunk=256, intervals=f2.Intervals("both"))
    fit(tmp_path, MeanFlowModule(), began).save_checkpoint(tmp_path / "a.ckpt")
    path = of_0_1(tmp_path / "a.ckpt", tmp_path / "b.ckpt") if old else tmp_path / "a.ckpt"
    again = callback(objective=None, teacher=velocity)
    fit(tmp_path, MeanFlowModule(), again, max_epochs=2, ckpt_path=path)
    assert again.objective.refresh == (8.0 if old else 0.0)
    assert again.objective.kept == (2048 if old else began.objective.choice.trajectories)


def test_options_and_configurations_go_by_their_old_names():
    assert _moved.option("--model.init_args.objective.init_args.quantisation.init_args.levels=9") == (
        "--model.init_args.objective.init_args.quantization.init_args.levels=9"
    )
    assert _moved.option("--data=quantisation") == "--data=quantisation"
    assert _moved.option("quantisation") == "quantisation"
    short = {"class_path": "TrajectoryRegression", "init_args": {"quantisation": {"class_path": "Quantisation"}}}
    assert _moved.described(short) == {
        "class_path": "TrajectoryRegression",
        "init_args": {"quantization": {"class_path": "Quantization"}},
    }
    foreign = {"class_path": "my.Data", "init_args": {"quantisation": 3}}
    assert _moved.described(foreign) == foreign


def test_a_data_module_may_set_its_levels_by_the_old_name():
    data = Pair()
    with pytest.warns(DeprecationWarning, match="quantization"):
        data.quantisation = f2.Quantization(8)
    assert data.quantization == data.quantisation == f2.Quantization(8)
    assert data.levels == 8


def test_what_a_module_is_made_of_may_be_set_afterwards():
    made = student()
    made.objective = f2.objectives.Semigroup()
    made.estimator = f2.divergence.Exact()
    made.reference_samples = 3
    assert isinstance(made.objective, f2.objectives.Semigroup)
    assert isinstance(made.estimator, f2.divergence.Exact)
    with pytest.raises(ValueError, match="directions of both alike"):
        made.objective = f2.objectives.Semigroup(intervals=f2.Intervals("to_data"))
    with pytest.raises(ValueError, match="validate or test first"):
        made.agreement_values()


def test_the_state_of_another_objective_is_refused():
    made = student()
    with pytest.raises(ValueError, match="another class than TrajectoryRegression"):
        made.load_objective_state([{"kept": 1}], None)
