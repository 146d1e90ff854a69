"""Checkpoints of other people: files laid out as theirs, read without their code, against the formulas.

The writer makes the structure of their pickles with modules of its own; the reference evaluates the network from its
weights by their names, function by function.
"""

import argparse
import copy
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, group_norm, interpolate, silu

from f2d2_lightning import DivergenceHead, FlowMap, Inversion, JointFlowMap, log_prob, sample
from f2d2_lightning.checkpoints import from_pretrained, save_pretrained
from f2d2_lightning.checkpoints.descriptions import describe, make_part
from f2d2_lightning.checkpoints.foreign import (
    FlattenedHead,
    LogTimeEmbedding,
    MeanFlowEmbedding,
    load_official,
    load_official_joint,
    load_py_meanflow,
)
from f2d2_lightning.checkpoints.foreign.song_unet import SongLayout
from f2d2_lightning.checkpoints.foreign.weights import Weights, record_weights
from f2d2_lightning.utils.pickles import Record

SIZE, CHANNELS, WIDTH, MULTIPLIERS, BLOCKS = 4, 2, 8, (1, 2), 1


# --- weights by their names ---


def linear(inputs, outputs, bias=True):
    made = {"weight": torch.randn(outputs, inputs) * inputs**-0.5}
    return made | ({"bias": 0.3 * torch.randn(outputs)} if bias else {})


def convolution(inputs, outputs, kernel):
    weight = torch.randn(outputs, inputs, kernel, kernel) * (inputs * kernel**2) ** -0.5
    return {"weight": weight, "bias": 0.3 * torch.randn(outputs)}


def norm(channels):
    return {"weight": 1 + 0.3 * torch.randn(channels), "bias": 0.3 * torch.randn(channels)}


def block(inputs, outputs, embedding, second, attends=False, taps=None):
    filtered = {}
    if taps:
        line = torch.tensor(taps, dtype=torch.float32)
        filtered = {"resample_filter": (torch.outer(line, line) / line.sum() ** 2)[None, None]}
    parts = {
        "norm0": norm(inputs),
        "conv0": convolution(inputs, outputs, 3) | filtered,
        "affine": linear(embedding, outputs),
        "norm1": norm(outputs),
        "conv1": convolution(outputs, outputs, 3),
    }
    if second:
        parts["affine_s"] = linear(embedding, outputs)
    if inputs != outputs or taps:
        parts["skip"] = convolution(inputs, outputs, 1) | filtered
    if attends:
        parts |= {"norm2": norm(outputs), "qkv": convolution(outputs, 3 * outputs, 1)}
        parts["proj"] = convolution(outputs, outputs, 1)
    return parts


def network(second=False, head=False, inputs=WIDTH, taps=(1, 1)):
    """A tiny network of two resolutions, one block each, attention at the coarse one, as a tree of weights."""
    e, low, high = 4 * WIDTH, WIDTH, 2 * WIDTH
    tree = {"map_layer0": linear(inputs, e), "map_layer1": linear(e, e)}
    if second:
        tree |= {"map_layer0_s": linear(inputs, e), "map_layer1_s": linear(e, e)}
    tree["enc"] = {
        "4x4_conv": convolution(CHANNELS, low, 3),
        "4x4_block0": block(low, low, e, second),
        "2x2_down": block(low, low, e, second, taps=taps),
        "2x2_block0": block(low, high, e, second, attends=True),
    }
    tree["dec"] = {
        "2x2_in0": block(high, high, e, second, attends=True),
        "2x2_in1": block(high, high, e, second),
        "2x2_block0": block(high + high, high, e, second),
        "2x2_block1": block(high + low, high, e, second, attends=True),
        "4x4_up": block(high, high, e, second, taps=taps),
        "4x4_block0": block(high + low, low, e, second),
        "4x4_block1": block(low + low, low, e, second),
        "4x4_aux_norm": norm(low),
        "4x4_aux_conv": convolution(low, CHANNELS, 3),
    }
    if head:
        tree["scalar_head"] = {"1": linear(low * SIZE**2, 128), "3": linear(128, 64), "5": linear(64, 1)}
    return tree


def flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


# --- the formulas ---


def waves(value, count):
    rates = 10_000.0 ** (-torch.arange(count // 2) / (count // 2 - 1))
    return torch.cat([torch.sin(value[:, None] * rates), torch.cos(value[:, None] * rates)], 1)


class Reference:
    """Evaluates the network from its weights."""

    def __init__(self, tree, interleaved):
        self.w, self.interleaved = flat(tree), interleaved

    def layer(self, name, h):
        return h @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def conv(self, name, h):
        weight = self.w[f"{name}.weight"]
        return conv2d(h, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def normed(self, name, h):
        return group_norm(h, h.shape[1] // 4, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def embedded(self, first, second, h):
        return silu(self.layer(second, silu(self.layer(first, h))))

    def attended(self, name, h):
        b, c, rows, columns = h.shape
        qkv = self.conv(f"{name}.qkv", self.normed(f"{name}.norm2", h)).reshape(b, 3 * c, -1)
        picked = [qkv[:, i::3] if self.interleaved else qkv[:, i * c : (i + 1) * c] for i in range(3)]
        scores = torch.einsum("bcq,bck->bqk", picked[0], picked[1]) / math.sqrt(c)
        mixed = torch.einsum("bqk,bck->bcq", scores.softmax(-1), picked[2]).reshape(b, c, rows, columns)
        return (h + self.conv(f"{name}.proj", mixed)) * math.sqrt(0.5)

    def block(self, name, x, embeddings):
        def resampled(h):
            if name.endswith("_down"):
                return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
            return interpolate(h, scale_factor=2, mode="nearest") if name.endswith("_up") else h

        h = self.conv(f"{name}.conv0", resampled(silu(self.normed(f"{name}.norm0", x))))
        for affine, embedding in zip(("affine", "affine_s"), embeddings):
            h = h + self.layer(f"{name}.{affine}", embedding)[:, :, None, None]
        h = self.conv(f"{name}.conv1", silu(self.normed(f"{name}.norm1", h)))
        straight = self.conv(f"{name}.skip", resampled(x)) if f"{name}.skip.weight" in self.w else x
        h = (h + straight) * math.sqrt(0.5)
        return self.attended(name, h) if f"{name}.qkv.weight" in self.w else h

    def __call__(self, x, embeddings):
        """The answer, and the last block's output."""
        a = self.conv("enc.4x4_conv", x)
        b = self.block("enc.4x4_block0", a, embeddings)
        c = self.block("enc.2x2_down", b, embeddings)
        d = self.block("enc.2x2_block0", c, embeddings)
        h = self.block("dec.2x2_in1", self.block("dec.2x2_in0", d, embeddings), embeddings)
        h = self.block("dec.2x2_block0", torch.cat([h, d], 1), embeddings)
        h = self.block("dec.2x2_block1", torch.cat([h, c], 1), embeddings)
        h = self.block("dec.4x4_up", h, embeddings)
        h = self.block("dec.4x4_block0", torch.cat([h, b], 1), embeddings)
        h = self.block("dec.4x4_block1", torch.cat([h, a], 1), embeddings)
        return self.conv("dec.4x4_aux_conv", silu(self.normed("dec.4x4_aux_norm", h))), h

    def official(self, x, t, dt=None):
        """``(v, div / 20000)`` of the official networks at their times."""
        scaled = x / (t**2 + 0.25).sqrt()[:, None, None, None]
        first = t.log() / 4 if dt is None else (t + 1e-9).log() / 4
        embeddings = [self.embedded("map_layer0", "map_layer1", waves(first, WIDTH))]
        if dt is not None:
            embeddings.append(self.embedded("map_layer0_s", "map_layer1_s", waves(dt.log() / 4, WIDTH)))
        v, h = self(scaled, embeddings)
        if "scalar_head.1.weight" not in self.w:
            return v, None
        h = silu(self.layer("scalar_head.1", h.flatten(1)))
        return v, self.layer("scalar_head.5", silu(self.layer("scalar_head.3", h))).squeeze(1)

    def mean_flow(self, x, t, h):
        embedded = torch.cat([waves(t, 2 * WIDTH), waves(h, 2 * WIDTH)], 1)
        return self(x, [self.embedded("map_layer0", "map_layer1", embedded)])[0]


# --- files as they write them ---


class Persistent(torch.nn.Module):
    """Pickled as their persistent classes are: a function of theirs, source code, name and attributes."""

    source = ""

    def __init__(self, name, **attributes):
        super().__init__()
        self.__dict__.update(attributes, class_name=name)

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": Persistent.source, "class_name": self.class_name}
        return (
            sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj,
            (meta | {"state": self.__dict__},),
            None,
        )


def module_of(tree, name, **attributes):
    """Weights as a module like theirs; the trees ``enc`` and ``dec`` are plain containers of torch."""
    if name in ("enc", "dec"):
        return torch.nn.ModuleDict({part: module_of(value, "UNetBlock") for part, value in tree.items()})
    made = Persistent(name, _init_args=(), _init_kwargs={"init_weight": np.sqrt(0.2)}, **attributes)
    for part, value in tree.items():
        if isinstance(value, dict):
            made.add_module(part, module_of(value, part if part in ("enc", "dec") else "Linear"))
        elif part == "resample_filter":
            made.register_buffer(part, value)
        else:
            made.register_parameter(part, torch.nn.Parameter(value, requires_grad=False))
    return made


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A writer of snapshots ``(tree, student, loss, ...) -> path``."""
    names = ("torch_utils", "torch_utils.persistence", "training", "training.experimental", "dnnlib", "dnnlib.util")
    fakes = {name: types.ModuleType(name) for name in (*names, "training.experimental.networks")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)

    def global_of(module, name, bases=()):
        made = type(name, bases, {"__module__": module, "__qualname__": name})
        setattr(fakes[module], name, made)
        return made

    def reconstruct(meta):
        exec(meta["module_src"], {})
        return torch.nn.Identity()

    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    wholes = {
        name: global_of("training.experimental.networks", name, (torch.nn.Module,))
        for name in ("FM_Net", "ShortCut_Net", "Other_Net")
    }
    easy = global_of("dnnlib.util", "EasyDict", (dict,))
    canary = tmp_path / "canary"
    monkeypatch.setattr(Persistent, "source", f"open({str(canary)!r}, 'w').close()")

    def written(tree, whole="FM_Net", encoder="SongUNet", loss="FMLoss", name="network-snapshot-000001.pkl", **extra):
        net = wholes[whole]()
        net.__dict__.update({"label_dim": 0, "sigma_data": 0.5, "sigma_min": 0.002, "use_fp16": False, **extra})
        net.encoder = module_of(tree, encoder, label_dropout=0, skip_scale=np.sqrt(0.5))
        snapshot = {
            "ema": net.eval(),
            "loss_fn": None if loss is None else Persistent(loss, P_mean=-1.2, amp_dtype=torch.float16),
            "augment_pipe": None,
            "dataset_kwargs": dict(easy(path="x", inner=easy(resolution=4))),
        }
        path = tmp_path / name
        path.write_bytes(pickle.dumps(snapshot))
        return path

    def student(tree=None, loss="LikelihoodLoss"):
        return written(tree or network(second=True, head=True), "ShortCut_Net", "SongUNet_ctm_scalar", loss)

    written.canary, written.student = canary, student
    return written


def states(count=5):
    # the first in the middle, the second at noise, the last at the diagonal
    s = torch.tensor([0.3, 1e-9, 0.61, 0.9, 0.25])[:count]
    t = torch.tensor([0.8, 1.0, 0.72, 0.91, 0.25])[:count]
    return torch.randn(count, CHANNELS, SIZE, SIZE), s, t


def close(mine, theirs):
    # their rates are in single precision
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


# --- the official snapshots ---


def test_a_teacher_answers_by_the_formulas_and_its_code_is_not_run(official):
    tree = network()
    path = official(tree)
    pickle.loads(path.read_bytes())
    assert official.canary.exists()
    official.canary.unlink()
    teacher = load_official(path)
    assert not official.canary.exists()
    x, s, t = states()
    assert teacher.directions.label == "none"
    with torch.no_grad():
        close(teacher(x, s, s), Reference(tree, interleaved=True).official(x, s)[0])
        assert torch.equal(teacher(x, s, t), teacher(x, s, s))
    assert not teacher.training
    with pytest.raises(ValueError, match="instantaneous velocity"):
        teacher.jump(x, 0.0, 1.0)


def test_a_student_answers_by_the_formulas_with_its_head(official):
    tree = network(second=True, head=True)
    path = official.student(tree)
    joint = load_official_joint(path)
    x, s, t = states()
    length = torch.where(t > s, t - s, torch.tensor(1 / 1024))
    v, div = Reference(tree, interleaved=True).official(x, s, length)
    with torch.no_grad():
        u, divergence = joint(x, s, t)
    close(u, v)
    close(divergence / 20_000, div)
    assert div.abs().min() > 1e-3
    assert joint.directions.label == "to_data"
    # without its head, too, and at noise as their sampling has it
    alone = load_official(path)
    with torch.no_grad():
        assert torch.equal(alone(x, s, t), u)
        close(alone(x, 0.0, t), Reference(tree, interleaved=True).official(x, torch.full((5,), 1e-9), t)[0])
    with pytest.raises(ValueError, match="only goes to data"):
        joint(x, t[:5], s[:5])


def test_an_imported_student_samples_and_has_likelihoods_by_inversion(official):
    tree = network(second=True, head=True)
    for name, value in flat(tree).items():
        if name.startswith(("dec.4x4_aux_conv", "scalar_head.5")):
            value.mul_(1e-2)
    joint = load_official_joint(official.student(tree))
    with torch.no_grad():
        drawn = sample(joint, torch.randn(3, CHANNELS, SIZE, SIZE), 2, with_log_prob=True)
        back = log_prob(joint, drawn.state, 2, inversion=Inversion())
    torch.testing.assert_close(back.value, drawn.log_prob, rtol=1e-4, atol=1e-4)


def test_copies_read_the_features_of_their_own_network(official):
    joint = load_official_joint(official.student())
    other = copy.deepcopy(joint)
    x, s, t = states()
    with torch.no_grad():
        before = joint(x, s, t)
        for parameter in joint.flow_map.parameters():
            parameter.zero_()
        assert torch.equal(other(x, s, t).divergence, before.divergence)
        assert not torch.equal(joint(x, s, t).divergence, before.divergence)


@pytest.mark.parametrize("kind", ["official", "mean flow"])
def test_imported_maps_are_saved_and_loaded_as_ours(official, mean_flow, tmp_path, kind):
    joint = load_official_joint(official.student())
    if kind == "mean flow":
        flow_map = load_py_meanflow(mean_flow[0])
        joint = JointFlowMap(flow_map, DivergenceHead(flow_map.features, hidden=4), frozen=True).eval()
    save_pretrained(joint, tmp_path / "ours", levels=256)
    again = from_pretrained(tmp_path / "ours")
    x, s, t = states()
    with torch.no_grad():
        for mine, theirs in zip(again(x, s, t), joint(x, s, t)):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_head_that_was_never_trained_is_not_given(official):
    path = official.student(loss="ShortcutLoss")
    with pytest.raises(ValueError, match="ShortcutLoss, which does not train the head"):
        load_official_joint(path)
    assert isinstance(load_official(path), FlowMap)
    with pytest.raises(ValueError, match="no head for the divergence"):
        load_official_joint(official(network(), loss=None))


def changed(**changes):
    def change(tree):
        for name, value in changes.items():
            *path, last = name.split("__")
            owner = tree
            for part in path:
                owner = owner[part]
            if value is None:
                del owner[last]
            else:
                owner[last] = value
        return tree

    return change


MISFITS = {
    "a weight more": (changed(dec__4x4_extra=norm(8)), r"dec\.4x4_extra\.weight \(8,\) has no place"),
    "a weight less": (changed(enc__2x2_block0__proj=None), r"enc\.2x2_block0\.proj\.weight is missing"),
    "another shape": (
        changed(dec__2x2_in1__conv1={"weight": torch.zeros(16, 16, 1, 1), "bias": torch.zeros(16)}),
        r"dec\.2x2_in1\.conv1\.weight has shape \(16, 16, 1, 1\)",
    ),
    "another filter": (
        changed(enc__2x2_down__skip__resample_filter=torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])),
        "skip.resample_filter is another filter",
    ),
    "residual input": (changed(enc__2x2_aux_residual=convolution(2, 8, 3)), "2x2_aux_residual.weight"),
    "Fourier features": (changed(map_noise={"freqs": torch.zeros(4)}), "map_noise.freqs"),
    "labels": (changed(map_label=linear(10, 8)), "map_label.weight"),
    "integers": (
        changed(dec__4x4_aux_norm={"weight": torch.ones(8, dtype=torch.int64), "bias": torch.zeros(8)}),
        "int64",
    ),
    "a head more": (changed(map_layer0_s=linear(8, 32)), "map_layer0_s.weight"),
    "no first convolution": (changed(enc__4x4_conv=None), "0 first convolutions"),
    "no blocks": (changed(enc__4x4_block0=None), "no residual blocks"),
    "no embedding": (changed(map_layer0=None), "no weight 'map_layer0.weight'"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_every_weight_is_used_once_or_named(official, kind):
    change, message = MISFITS[kind]
    with pytest.raises(ValueError, match=message):
        load_official(official(change(network())))


def test_augmentation_labels_are_left_out(official):
    tree = network()
    x, s, _ = states()
    with torch.no_grad():
        plain = load_official(official(tree))(x, s, s)
        told = load_official(official(changed(map_augment=linear(9, 8, bias=False))(tree)))(x, s, s)
    assert torch.equal(plain, told)


def test_the_smoother_filter_is_recognised(official):
    for taps in ((1, 3, 3, 1), (1, 1)):
        flow_map = load_official(official(network(taps=taps)))
        assert flow_map.network.up[2].resample.taps.shape[-1] == len(taps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole": "ShortCut_Net"}, "holds a ShortCut_Net of a SongUNet"),
        ({"encoder": "DhariwalUNet"}, "holds a FM_Net of a DhariwalUNet"),
        ({"label_dim": 10}, "10 classes"),
        ({"sigma_data": None}, "sigma_data None"),
        ({"whole": "Other_Net"}, r"asks for training\.experimental\.networks\.Other_Net"),
    ],
)
def test_other_networks_are_refused(official, options, message):
    with pytest.raises(ValueError, match=message):
        load_official(official(network(), **options))


def test_other_files_are_refused(tmp_path):
    for index, content in enumerate(({"G_ema": 1}, [1], {"ema": {"weight": torch.zeros(1)}})):
        path = tmp_path / f"{index}.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="no snapshot of the official code"):
            load_official(path)
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "network-snapshot.pkl")


@pytest.mark.parametrize("size", [0, 1, 2])
def test_levels_of_no_pixels_have_an_end(size):
    blocks = [f"enc.{side}x{side}_block0.conv0.weight" for side in {size, 1, 0} if side <= size]
    weights = Weights(dict.fromkeys([f"enc.{size}x{size}_conv.weight", *blocks], torch.zeros(4, 1, 3, 3)), "a file")
    assert SongLayout.read(weights).multipliers == (1,) * len(blocks)


def test_a_module_inside_itself_is_refused():
    record = Record("Net", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    record.state["_modules"]["inner"] = record
    with pytest.raises(ValueError, match="inside itself"):
        record_weights(record)
    with pytest.raises(ValueError, match="no module"):
        record_weights(Record("Net", {"_modules": {}}))


def test_the_head_says_what_it_reads():
    head = FlattenedHead((8, 4, 4))
    assert float(head.scale) == 20_000
    with pytest.raises(ValueError, match=r"reads features of shape \(B, 8, 4, 4\), and got shape \(3, 8, 2, 2\)"):
        head(torch.zeros(3, 2, 2, 2), 0.0, 1.0, features=torch.zeros(3, 8, 2, 2))
    again = make_part(describe(head, "the head"), {})
    again.load_state_dict(head.state_dict())
    features = torch.randn(3, 8, 4, 4)
    assert torch.equal(again(features, 0.0, 1.0, features=features), head(features, 0.0, 1.0, features=features))


@pytest.mark.parametrize(
    "embedding", [LogTimeEmbedding(8, 6), LogTimeEmbedding(8, 6, interval=False), MeanFlowEmbedding(8, 6)]
)
def test_embeddings_of_shared_times_are_made_once(embedding):
    embedding = embedding.double()
    s, t = torch.tensor(0.25).expand(4), torch.tensor(0.5).expand(4)
    assert embedding(s, t).shape == (1, embedding.features)
    close(embedding(s, t).expand(4, -1), embedding(s.clone(), t.clone()))


# --- py-meanflow ---


@pytest.fixture
def mean_flow(tmp_path):
    """A checkpoint with three copies of the network, and their weights."""
    trees = {name: network(inputs=4 * WIDTH) for name in ("net", "net_ema", "net_ema1")}
    state = torch.nn.Module().state_dict()
    state["num_updates"] = torch.tensor(3)
    for name, tree in trees.items():
        state |= flat(changed(map_augment=linear(6, 4 * WIDTH, bias=False))(dict(tree)), f"{name}.")
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    saved = {
        "model": state,
        "optimizer": optimiser.state_dict(),
        "lr_schedule": {"_milestones": [10], "_schedulers": [{"last_epoch": 1}]},
        "epoch": 3,
        "args": argparse.Namespace(dropout=0.2, ema_decays=[0.9999], output_dir="./out", resume=""),
    }
    torch.save(saved, tmp_path / "checkpoint-last.pth")
    return tmp_path / "checkpoint-last.pth", trees


def test_a_mean_flow_answers_by_the_formulas(mean_flow):
    path, trees = mean_flow
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(path, weights_only=True)
    x, s, t = states()
    answers = {}
    for name, tree in trees.items():
        flow_map = load_py_meanflow(path, name)
        with torch.no_grad():
            answers[name] = flow_map(x, s, t)
            # their time is 1 at noise, and theirs is the velocity towards it
            close(answers[name], -Reference(tree, interleaved=False).mean_flow(x, 1 - s, t - s))
        assert flow_map.directions.label == "to_data"
        assert not flow_map.training
    assert torch.equal(load_py_meanflow(path)(x, s, t), answers["net_ema"])
    assert not torch.allclose(answers["net_ema"], answers["net_ema1"])


def test_one_step_of_a_mean_flow_is_noise_minus_its_answer(mean_flow):
    path, trees = mean_flow
    noise = torch.randn(3, CHANNELS, SIZE, SIZE)
    one = torch.ones(3)
    with torch.no_grad():
        made = load_py_meanflow(path).jump(noise, 0.0, 1.0)
        close(made, noise - Reference(trees["net_ema"], interleaved=False).mean_flow(noise, one, one))


def test_other_copies_and_other_files_are_refused(mean_flow, tmp_path):
    with pytest.raises(ValueError, match=r"no network 'net_ema7'; it has 'net', 'net_ema', 'net_ema1'"):
        load_py_meanflow(mean_flow[0], "net_ema7")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no checkpoint of py-meanflow"):
        load_py_meanflow(tmp_path / "other.pth")
    content = torch.load(mean_flow[0], weights_only=False)
    del content["model"]["net_ema.dec.2x2_in0.qkv.bias"]
    torch.save(content, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"net_ema\).*dec\.2x2_in0\.qkv\.bias is missing"):
        load_py_meanflow(tmp_path / "short.pth")
