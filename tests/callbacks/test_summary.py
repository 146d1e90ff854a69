"""The model summary counts every parameter once, and names the parts of every kind of model."""

from __future__ import annotations

import pytest
from torch import nn

import f2d2_lightning as f2
from command_line import f2d2, single_precision  # noqa: F401
from f2d2_lightning.callbacks import JointSummary
from f2d2_lightning.callbacks.summary import Part, model_parts
from f2d2_lightning.nn import MLP
from foreign import MeanFlowModule, callback
from lightning_parts import CONFIGS, fit, student, teacher


def count(*modules, trained=None):
    parameters = {id(p): p for m in modules for p in m.parameters() if trained in (None, p.requires_grad)}
    return sum(p.numel() for p in parameters.values())


def by_name(parts):
    assert len({part.name for part in parts}) == len(parts)
    return {part.name: part for part in parts}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_student(frozen):
    module = student(frozen=frozen)
    parts = by_name(model_parts(module))
    assert list(parts) == ["teacher", "backbone", "head", "average"]
    network, joint = module.teacher.average, module.joint
    backbone = count(joint.flow_map)
    assert parts["teacher"] == Part("teacher", "MLP", 0, count(network), "not saved with the student", saved=False)
    assert (parts["backbone"].trainable, parts["backbone"].frozen) == ((0, backbone) if frozen else (backbone, 0))
    assert parts["head"].trainable == count(joint.head)
    assert parts["head"].kind == "DivergenceHead"
    # a frozen backbone is shared with the average, and counted once
    assert parts["average"].frozen == count(joint.head) + (0 if frozen else backbone)
    assert ("frozen" in parts["backbone"].note) is frozen
    # what is saved is what the module has
    assert sum(p.parameters for p in parts.values() if p.saved) == count(module)
    assert sum(p.trainable for p in parts.values()) == count(module, trained=True)


def test_a_student_without_a_teacher_and_through_an_adapter():
    from f2d2_lightning.adapters import MeanFlow
    from foreign import MeanNet

    flow_map = MeanFlow(directions="both")(MeanNet())
    module = f2.F2D2Module(flow_map, shape=(2,), head=f2.DivergenceHead(32), objective=f2.objectives.Semigroup())
    parts = by_name(model_parts(module))
    assert list(parts) == ["backbone", "head", "average"]
    assert parts["backbone"].kind == "MeanNet through MeanFlow"
    assert sum(p.parameters for p in parts.values()) == count(module)


def test_a_student_of_a_function():
    module = student(of=None)
    module.kept_teacher.known = f2.as_flow_map(lambda x, s, t, cond: -x)
    assert by_name(model_parts(module))["teacher"].parameters == 0


def test_a_teacher():
    module = teacher()
    parts = by_name(model_parts(module))
    assert [(p.name, p.kind, p.trainable, p.frozen) for p in parts.values()] == [
        ("backbone", "MLP", count(module.flow_map), 0),
        ("average", "MLP", 0, count(module.average)),
    ]


class Larger(MeanFlowModule):
    """With something beside its network."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(7, 3).requires_grad_(False)


def test_somebody_elses_module(tmp_path, capsys):
    module, added = Larger(), callback(teacher=MLP((2,), width=8, blocks=1))
    # before training there is no head
    assert list(by_name(model_parts(module, [added]))) == ["teacher", "backbone", "rest"]
    run = fit(tmp_path, module, JointSummary(), added, max_steps=1, limit_val_batches=0)
    parts = by_name(model_parts(module, run.callbacks))
    assert list(parts) == ["teacher", "backbone", "head", "average", "rest"]
    assert parts["backbone"].kind == "MeanNet through MeanFlow"
    assert parts["backbone"].trainable == count(module.net)
    assert parts["head"].trainable == count(added.added.live)
    assert parts["average"].frozen == count(added.added.average)
    assert (parts["rest"].trainable, parts["rest"].frozen) == (0, 24)
    out = capsys.readouterr().out
    assert out.count("Larger") == 2  # title, and the class of what is left
    assert f"{count(added.added.live):,}" in out


def test_a_module_of_unknown_kind():
    (part,) = model_parts(MeanFlowModule())
    assert (part.name, part.trainable) == ("module", count(MeanFlowModule()))


def test_two_networks_of_one_module(tmp_path):
    class Two(MeanFlowModule):
        def __init__(self):
            super().__init__()
            self.other = MeanFlowModule().net

    both = [callback(), callback(flow_map="other", frozen=True)]
    run = fit(tmp_path, Two(), *both, max_steps=1, limit_val_batches=0)
    parts = by_name(model_parts(run.lightning_module, run.callbacks))
    assert list(parts) == [f"{part} of {name}" for name in ("net", "other") for part in ("backbone", "head", "average")]
    assert "both losses" in parts["backbone of net"].note
    assert "leaves it alone" in parts["backbone of other"].note


def test_it_is_printed_once_and_instead_of_lightnings(tmp_path, capsys):
    module = student(steps=(1,), objective=f2.objectives.Semigroup())
    fit(tmp_path, module, JointSummary(), max_epochs=2, enable_model_summary=True)
    out = capsys.readouterr().out
    assert out.count("F2D2Module") == 1
    assert all(name in out for name in ("teacher", "backbone", "head", "average", "not saved"))
    assert f"{count(module.joint.flow_map):,}" in out
    assert "Non-trainable params" not in out


def test_it_can_be_named_in_a_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    f2d2("fit", "--config", CONFIGS / "mixture_teacher.yaml", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu",
         "--data.init_args.count=600", "--model.init_args.flow_map.init_args.width=16",
         "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]",
         "--trainer.callbacks+=f2d2_lightning.callbacks.JointSummary")  # fmt: skip
    out = capsys.readouterr().out
    assert "FlowMatchingModule" in out
    assert "PreconditionedMLP" in out
