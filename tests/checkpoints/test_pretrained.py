"""Models in folders: what is saved comes back, and nothing else is made of what a folder says."""

import copy
import json
import math
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import f2d2_lightning as f2
from f2d2_lightning import DivergenceHead, F2D2Module, FlowMap, GaussianBaseline, JointFlowMap, as_flow_map
from f2d2_lightning.adapters import Adapter
from f2d2_lightning.checkpoints import from_pretrained, read_description, save_pretrained
from f2d2_lightning.checkpoints.pretrained import CONFIG, WEIGHTS, read_units
from f2d2_lightning.checkpoints.trust import called
from f2d2_lightning.flows import GaussianFlow, TrigonometricPath
from f2d2_lightning.likelihood.units import Units
from f2d2_lightning.modules.ema import copy_frozen
from f2d2_lightning.nn import (
    MLP,
    AngleEmbedding,
    DiT,
    GaussianPreconditioned,
    IntervalEmbedding,
    PreconditionedMLP,
    ResNet,
    UNet,
)
from f2d2_lightning.utils.configured import OBJECT, arguments_of, as_plain
from problems import randomize

SHAPE = (2, 4, 4)


def with_own_baseline():
    baseline = GaussianBaseline(SHAPE, "diagonal")
    baseline.fit([torch.randn(50, *SHAPE) * torch.linspace(0.1, 2, 4)])
    return GaussianPreconditioned(MLP(SHAPE, 12, 1, embedding=AngleEmbedding(baseline, 8)), baseline)


NETWORKS = {
    "MLP": lambda: MLP(SHAPE, width=12, blocks=1, directions="to_data"),
    "MLP with labels": lambda: MLP(SHAPE, 12, blocks=1, classes=3),
    "PreconditionedMLP": lambda: PreconditionedMLP(SHAPE, "full", width=12, blocks=1),
    "GaussianPreconditioned": with_own_baseline,
    "ResNet": lambda: ResNet(SHAPE, 8, 1, directions="to_noise"),
    "UNet": lambda: UNet(
        SHAPE, width=8, multipliers=(1, 2), blocks=1, attention=(2,), embedding=IntervalEmbedding(6, 2)
    ),
    "DiT": lambda: DiT(SHAPE, patch=2, width=12, depth=1, heads=2),
}


def network_of(name):
    network = NETWORKS[name]()
    randomize(network)
    return network


def joint_of(name, baseline=True):
    network = network_of(name)
    fit = GaussianBaseline(SHAPE, "isotropic", TrigonometricPath()) if baseline else None
    if fit is not None:
        fit.fit([2 + 3 * torch.randn(20, *SHAPE)])
    head = DivergenceHead(network.features, hidden=6, layers=1, baseline=fit)
    randomize(head)
    head.scale.fill_(7.0)
    return JointFlowMap(network, head)


def call(model, count=3):
    torch.manual_seed(1)
    early, late = 0.5 * torch.rand(count), 0.5 + 0.5 * torch.rand(count)
    s, t = (late, early) if model.directions.label == "to_noise" else (early, late)
    inner = getattr(model, "flow_map", model)
    cond = torch.arange(count) % 3 if getattr(inner, "labels", None) is not None else None
    with torch.no_grad():
        answer = model(torch.randn(count, *SHAPE), s, t, cond)
    return answer if isinstance(answer, tuple) else (answer,)


def same(mine, theirs):
    for one, other in zip(call(mine), call(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def edit(folder, change):
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


def edit_weights(folder, change):
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata)


@pytest.fixture
def saved(tmp_path):
    """A joint map in a folder."""
    return save_pretrained(joint_of("MLP"), tmp_path / "model", levels=17, low=0.0, high=2.0)


# --- there and back ---


@pytest.mark.parametrize("name", NETWORKS)
def test_joint_maps_come_back(tmp_path, name):
    joint = joint_of(name)
    save_pretrained(copy_frozen(joint), tmp_path / "a" / "b")
    again = from_pretrained(tmp_path / "a" / "b")
    same(again, joint)
    assert type(again.flow_map) is type(joint.flow_map)
    assert again.directions == joint.directions
    assert not again.training
    assert float(again.head.scale) == 7.0
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", ["MLP with labels", "GaussianPreconditioned"])
def test_flow_maps_come_back(tmp_path, name):
    network = network_of(name)
    save_pretrained(network, tmp_path)
    same(from_pretrained(tmp_path, FlowMap), network)
    with pytest.raises(ValueError, match=f"holds a {type(network).__name__}, and a JointFlowMap is asked for"):
        from_pretrained(tmp_path)


def test_a_closed_form_comes_back(tmp_path):
    fit = GaussianBaseline(SHAPE, "full")
    fit.fit([1 + 2 * torch.randn(60, *SHAPE)])
    save_pretrained(GaussianFlow(fit), tmp_path, shape=SHAPE)
    same(from_pretrained(tmp_path, GaussianFlow), GaussianFlow(fit))


def test_a_trained_module_is_saved_by_its_average(tmp_path):
    module = F2D2Module(MLP(SHAPE, 12, blocks=1), shape=SHAPE, levels=17, low=0.0, high=2.0)
    randomize(module.average)
    save_pretrained(
        module.average, tmp_path, shape=module.shape, levels=module.levels, low=module.low, high=module.high
    )
    same(from_pretrained(tmp_path), module.average)
    about = read_description(tmp_path)
    assert (about.shape, about.levels, about.low, about.high, about.directions) == (SHAPE, 17, 0.0, 2.0, "both")
    assert about.unit == "nats per unit of time"


def test_a_frozen_backbone_stays_frozen(tmp_path):
    joint = joint_of("MLP")
    frozen = JointFlowMap(joint.flow_map, joint.head, frozen=True)
    again = from_pretrained(save_pretrained(frozen, tmp_path)).train()
    assert again.frozen
    assert not again.flow_map.training
    assert not any(parameter.requires_grad for parameter in again.flow_map.parameters())
    assert all(parameter.requires_grad for parameter in again.head.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_is_kept_and_so_is_the_default_one(tmp_path, dtype):
    joint = joint_of("MLP").to(dtype)
    again = from_pretrained(save_pretrained(joint, tmp_path))
    assert torch.get_default_dtype() == torch.float64
    for name, value in joint.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
        assert torch.equal(again.state_dict()[name], value)


def test_one_baseline_of_two_owners_is_one_again_and_saved_once(tmp_path):
    network = with_own_baseline()
    joint = JointFlowMap(network, DivergenceHead(network.features, hidden=4, baseline=network.baseline))
    randomize(joint)
    save_pretrained(joint, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.head.baseline is again.flow_map.baseline
    assert again.flow_map.network.embedding._baseline[0] is again.flow_map.baseline
    assert sum(name.endswith("variances") for name in load_file(tmp_path / WEIGHTS)) == 1
    same(again, joint)


def test_what_was_changed_since_is_saved_as_it_is(tmp_path):
    joint = joint_of("MLP")
    joint.flow_map.embedding = IntervalEmbedding(64, 3)
    joint.flow_map.directions = type(joint.directions).parse("both")
    same(from_pretrained(save_pretrained(joint, tmp_path / "argument")), joint)
    assert from_pretrained(tmp_path / "argument").directions.label == "both"
    inner = joint_of("PreconditionedMLP")
    inner.flow_map.network.embedding = IntervalEmbedding(64, 3)
    same(from_pretrained(save_pretrained(inner, tmp_path / "inside")), inner)


def test_a_change_that_no_argument_says_is_refused_and_nothing_is_written(tmp_path):
    network = network_of("MLP")
    network.outlet = torch.nn.Linear(12, 32, bias=False)
    with pytest.raises(ValueError, match=r"was changed after it was made: its weights outlet\.bias"):
        save_pretrained(network, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    preconditioned = network_of("GaussianPreconditioned")
    preconditioned.directions = type(preconditioned.directions).parse("to_data")
    with pytest.raises(ValueError, match="its directions, to_data,"):
        save_pretrained(preconditioned, tmp_path / "model")


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path, monkeypatch):
    first, second = joint_of("MLP"), joint_of("ResNet")
    save_pretrained(first, tmp_path)
    save_pretrained(second, tmp_path)
    same(from_pretrained(tmp_path), second)
    monkeypatch.setattr(
        "f2d2_lightning.checkpoints.pretrained.save_file", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(first, tmp_path)
    same(from_pretrained(tmp_path), second)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_a_network_that_reads_a_baseline_of_another_is_not_saved_without_it(tmp_path):
    network = with_own_baseline()
    with pytest.raises(ValueError, match="reads a GaussianBaseline that is no part of it"):
        save_pretrained(network.network, tmp_path / "inner")
    joint = joint_of("PreconditionedMLP")
    joint.flow_map.network = network.network
    with pytest.raises(ValueError, match=r"reads a GaussianBaseline|was changed"):
        save_pretrained(joint, tmp_path / "joint")


# --- somebody else's network ---


class Net(torch.nn.Module):
    """Takes both times, and keeps a module in a list, which is none of its parts."""

    def __init__(self, width=12):
        super().__init__()
        self.time = torch.nn.Linear(2, width)
        self.body, self.out = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh()), torch.nn.Linear(width, 2)
        self.tied = self.body[0]
        self.hidden = [torch.nn.Linear(1, 1)]

    def forward(self, x, s, t):
        return self.out(self.body(x) + self.time(torch.stack([s, t], -1)))


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, s, t, cond):
        return self.layer(torch.cat([x, s[:, None], t[:, None]], -1))


def adapted(network, head=None, adapter=None, **options):
    adapter = adapter or Adapter("net(x, s, t)", noise_time=1.0, data_time=0.0)
    joint = JointFlowMap(adapter(network, **options), head or DivergenceHead(12, 4, baseline=GaussianBaseline((2,))))
    randomize(joint)
    return joint


def answers(joint):
    with torch.no_grad():
        return joint(
            torch.linspace(-1, 1, 6).reshape(3, 2), torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.7, 0.2, 0.5])
        )


@pytest.mark.parametrize("options", [{}, {"features": "body"}, {"interval": "time"}, {"directions": "both"}])
def test_an_adapted_network_comes_back(tmp_path, options):
    torch.manual_seed(0)
    joint = adapted(Net(), **options)
    network, before = Net(), torch.get_rng_state()
    save_pretrained(joint, tmp_path, shape=(2,), levels=17)
    again = from_pretrained(tmp_path, network=network)
    # a model is made in both, and no random number of a training is drawn for it
    assert torch.equal(torch.get_rng_state(), before)
    assert again.flow_map.network is network
    assert again.directions == joint.directions
    for one, other in zip(answers(again), answers(joint), strict=True):
        assert torch.equal(one, other)
    assert read_description(tmp_path).levels == 17
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert not [name for name in load_file(tmp_path / WEIGHTS) if name.startswith("flow_map.network.tied")]


def test_what_is_somebody_elses_is_asked_for(tmp_path):
    class Mine(Adapter):
        pass

    joint = adapted(Net(), DivergenceHead(network=Residual()), Mine("net(x, s, t)"))
    save_pretrained(joint, tmp_path / "model", shape=(2,))
    given = {"network": Net(), "adapter": Mine("net(x, s, t)"), "head_network": Residual()}
    for one, other in zip(answers(from_pretrained(tmp_path / "model", **given)), answers(joint), strict=True):
        assert torch.equal(one, other)
    for name in given:
        with pytest.raises(ValueError, match=f"give it: {name}="):
            from_pretrained(tmp_path / "model", **(given | {name: None}))
    with pytest.raises(ValueError, match="does not fit this Net: make the network with the arguments of training"):
        from_pretrained(tmp_path / "model", **(given | {"network": Net(16)}))
    with pytest.raises(ValueError, match="does not say the shape"):
        save_pretrained(joint, tmp_path / "other")
    (tmp_path / "file").write_text("a")
    with pytest.raises(FileExistsError, match="saved as a folder"):
        save_pretrained(joint, tmp_path / "file", shape=(2,))


def test_a_network_keeps_its_dtype_and_wrapped_weights_their_names(tmp_path):
    joint = adapted(Net())
    state = {f"_orig_mod.{name}": value for name, value in joint.flow_map.network.state_dict().items()}
    save_pretrained(joint, tmp_path, shape=(2,), network_state=state)
    again = from_pretrained(tmp_path, network=Net().float())
    assert again.flow_map.network.out.weight.dtype == torch.float32
    assert again.head.out.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="keeps a dict under 'more'"):
        save_pretrained(joint, tmp_path, shape=(2,), network_state={"more": {}})


# --- what cannot be saved ---


class Own(FlowMap):
    def forward(self, x, s, t, cond=None):
        return x


class OwnMLP(MLP):
    pass


@pytest.mark.parametrize("network", [Own(), OwnMLP(SHAPE, 8), as_flow_map(lambda x, s, t, cond: x)])
def test_classes_of_others_are_not_saved(tmp_path, network):
    with pytest.raises(ValueError, match=r"the model is a .*(Own|_FunctionFlowMap).*use an adapter"):
        save_pretrained(network, tmp_path / "model", shape=SHAPE)
    joint = JointFlowMap(network, DivergenceHead(4))
    with pytest.raises(ValueError, match=r"flow_map of JointFlowMap is a "):
        save_pretrained(joint, tmp_path / "model", shape=SHAPE)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="does not say the shape"):
        save_pretrained(GaussianFlow(GaussianBaseline((2,))), tmp_path)


# --- folders that are not what they should be ---


def test_a_name_of_the_hub_is_downloaded(saved, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        if name == "someone/else":
            raise OSError("404")
        return str(saved)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    same(from_pretrained("someone/model-1.0"), from_pretrained(saved))
    assert read_description("someone/model-1.0").levels == 17
    assert asked == [("someone/model-1.0", {"allow_patterns": [CONFIG, WEIGHTS]})] * 2
    with pytest.raises(FileNotFoundError, match=r"no folder someone/else, and none can be downloaded.*404"):
        from_pretrained("someone/else")
    for path in ("/nowhere/model", "../a/b", "a/b/c", "model", ""):
        with pytest.raises(FileNotFoundError, match="a saved model is a folder" if path else "config"):
            from_pretrained(path)
    assert len(asked) == 3
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"no folder someone/model; .*pip install f2d2-lightning\[hub\]"):
        from_pretrained("someone/model")


@pytest.mark.parametrize(("name", "shape", "levels"), [("digits", (1, 8, 8), 17), ("fashion", (1, 28, 28), 256)])
def test_models_that_come_with_the_package(tmp_path, monkeypatch, name, shape, levels):
    """Samples are likelier than noise would be, when drawn and when asked; a folder of that name goes first."""
    monkeypatch.chdir(tmp_path)
    model = f2.load(name)
    assert (model.shape, model.levels) == (shape, levels)
    assert set(model.error_bars) == {1, 2, 4, 8}
    made = model.sample(8, steps=4, with_log_prob=True, seed=0)
    for log_prob in (made.log_prob, model.log_prob(made.state, steps=4).value):
        assert float(model.nll_of(log_prob).max()) < math.log2(levels)
    save_pretrained(MLP((3,), width=8, blocks=1), name)
    assert from_pretrained(name, FlowMap).shape == (3,)


def test_the_digits_model_is_what_readme_tells():
    images = f2.data.Digits().dataset("test").values
    assert float(f2.load("digits").nll(images, steps=4, seed=0).mean()) == pytest.approx(2.241, abs=0.003)


def test_missing_files(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        from_pretrained(saved)


def a_map(**changes):
    return lambda content: content["model"]["arguments"]["flow_map"].update(changes)


def sized(**changes):
    return lambda content: content["model"]["arguments"]["flow_map"]["arguments"].update(changes)


def about(**changes):
    return lambda content: content.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # only networks, heads, baselines, paths and adapters are made
        *(
            (a_map(**{"class": name}), r"the (configuration|file) names|from the file: (FlowMap|Adapter)")
            for name in (
                *(
                    "os.system",
                    "torch.nn.modules.linear.Linear",
                    "..nn.mlp.MLP",
                    3,
                    None,
                    "f2d2_lightning.nn.mlp._Block",
                ),
                *("f2d2_lightning.nn.mlp.Direction", "f2d2_lightning.nn.mlp.Tensor", "f2d2_lightning.nn.mlp.FlowMap"),
                *("f2d2_lightning.nn.MLP.forward", "f2d2_lightning.nn.nothing.MLP"),
                *("f2d2_lightning.checkpoints.foreign.files._Reader", "f2d2_lightning.checkpoints.export.Adapter"),
            )
        ),
        # what does not fit the weights
        (sized(width=16), r"inlet\.weight has shape \(12, 32\)"),
        (sized(blocks=2), r"blocks\.1\.\S+ is missing"),
        (sized(blocks=0), r"blocks\.0\.\S+ has no place"),
        (sized(color=1), "cannot be made from the file: MLP"),
        (sized(width=-1), "cannot be made from the file: MLP"),
        (sized(directions="both"), "says directions='to_data'"),
        (lambda c: c["model"]["arguments"].update(flow_map=None), "flow_map=None is a NoneType"),
        (lambda c: c["model"]["arguments"].update(flow_map={"same_as": 99}), "refers to object 99"),
        (lambda c: c["model"].update(arguments=[1]), "arguments of JointFlowMap are a list"),
        (lambda c: c["model"].pop("arguments"), "where an object's class and arguments are needed"),
        # what is wrong in itself
        (about(format="transformers"), "is of format 'transformers'"),
        (about(version=2), "version 2"),
        (about(shape="2"), "describes data of shape '2'"),
        (about(levels=1), "levels 1"),
        (about(low=None), r"\[None"),
        (about(unit="bits"), "divergences in 'bits'"),
        (about(directions="up"), "direction is 'up'"),
        (about(directions="both"), "not of the same model"),
        (about(levels=256), "not of the same model"),
        (about(model=3), "has 3 where"),
        (about(replaced={"flow_map.nothing": {"same_as": 0}}), "no such part"),
    ],
)
def test_configurations_that_are_wrong(saved, change, message):
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(saved)


WRONG_UNITS = [
    *(3, [], "center", {"center": [0.0]}, {"center": [0.0], "scale": 1.0}, {"center": [0.0], "scale": [0.0]}),
    *({"center": [0.0] * 3, "scale": [1.0]}, {"center": ["0"], "scale": [1.0]}, {"center": [True], "scale": [1.0]}),
    {"center": [0.0], "scale": [1.0], "columns": [3]},
    *({"center": [0.0], "scale": [-1.0]}, {"center": [10**400], "scale": [1.0]}, {"center": [[0.0]], "scale": [1.0]}),
]


def test_units_come_back_and_wrong_ones_are_refused(tmp_path):
    units = Units(torch.tensor([0.1, -3.0], dtype=torch.float32), torch.tensor([2.0, 1e-7], dtype=torch.float32))
    alike = Units(*(torch.full((3, 8, 8), value, dtype=torch.float32) for value in (0.3, 4.0)))
    far = Units(torch.tensor([1.7e9 + 63, 0.1], dtype=torch.float64), torch.tensor([1e-50, 1e300], dtype=torch.float64))
    for own, shape in ((units, (2,)), (alike, (3, 8, 8)), (far, (2,))):
        save_pretrained(MLP(shape, width=8, blocks=1), tmp_path, units=own)
        found = read_units(tmp_path)
        assert torch.equal(found.center, own.center)
        assert torch.equal(found.scale, own.scale)
    assert len((tmp_path / "config.json").read_text()) < 2000  # what all entries have is written once
    with pytest.raises(ValueError, match=r"rows of shape \(3, 8, 8\), and states have \(2,\)"):
        save_pretrained(MLP((2,), width=8, blocks=1), tmp_path, units=alike)
    save_pretrained(MLP((2,), width=8, blocks=1), tmp_path)
    assert read_units(tmp_path) is None
    for wrong in WRONG_UNITS:
        edit(tmp_path, lambda content, wrong=wrong: content.update(units=wrong))
        with pytest.raises(ValueError, match="units in a file are"):
            read_units(tmp_path)


def test_configurations_that_are_no_json(saved):
    for content in (b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000):
        (saved / CONFIG).write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.scale"), r"head\.scale is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra has no place"),
        (lambda w: w.update({"head.scale": torch.zeros(2)}), r"head\.scale has shape \(2,\), and the model \(\)"),
        (lambda w: w.update({"head.scale": torch.tensor(1)}), r"head\.scale in \S+ is of torch\.int64"),
    ],
)
def test_weights_that_do_not_fit(saved, change, message):
    edit_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(saved)


def test_damaged_weights(saved):
    content = (saved / WEIGHTS).read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"\xff" * 8 + content[8:], content[:8] + b"x" + content[9:]):
        (saved / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            from_pretrained(saved)


# --- what modules remember ---


def test_modules_remember_plain_arguments_and_copies_of_them_too():
    sizes = [2, 4, 4]
    network = MLP(sizes, 12, blocks=1, embedding=IntervalEmbedding(6))
    sizes.append(5)
    given = {"shape": [2, 4, 4], "width": 12, "blocks": 1, "embedding": OBJECT}
    defaults = {"expansion": 2, "dropout": 0.0, "classes": 0, "directions": "both", "waves": 0, "condition": 0}
    assert arguments_of(network) == given | defaults
    assert arguments_of(copy.deepcopy(network)) == given | defaults
    assert arguments_of(copy.deepcopy(network).embedding) == {"features": 6, "frequencies": 8}
    assert arguments_of(PreconditionedMLP(SHAPE, width=8))["width"] == 8


def test_files_from_before_an_argument_mean_what_it_was_then(tmp_path):
    network = PreconditionedMLP((2,), width=8, waves=0)
    save_pretrained(network, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["arguments"]["waves"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = from_pretrained(tmp_path, PreconditionedMLP)
    assert read.network.frequencies is None
    x = torch.randn(3, 2)
    assert torch.equal(read(x, 0.2, 0.9), network(x, 0.2, 0.9))


def test_a_subclass_need_not_take_an_argument_that_was_added():
    class Narrow(PreconditionedMLP):
        def __init__(self, shape):
            super().__init__(shape, width=8)

    assert called(Narrow, {"shape": [2]}, "the network").network.frequencies.shape == (2, 32)
    assert called(PreconditionedMLP, {"shape": [2]}, "the network").network.frequencies is None


def test_plain_values_are_told_from_objects():
    assert as_plain({"a": (1, [2.5, None]), "b": "c"}) == {"a": [1, [2.5, None]], "b": "c"}
    for value in (torch.zeros(1), object(), [1, object()], {"a": object()}, {1: 2}, {2}):
        assert as_plain(value) is OBJECT


def test_a_wrong_call_fails_as_it_did():
    with pytest.raises(TypeError, match="color"):
        MLP(SHAPE, color=1)
    with pytest.raises(TypeError, match="shape"):
        MLP()
