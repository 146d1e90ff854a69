"""Cheaper rules of forward mode, compiled networks, memory formats and half precision: the same answers."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import f2d2_lightning as f2
from f2d2_lightning.adapters import AdaptedFlowMap, MeanFlow
from f2d2_lightning.divergence._tangents import TangentRules
from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.modules._compile import compile_network
from f2d2_lightning.modules.ema import copy_frozen
from f2d2_lightning.nn import MLP, PreconditionedMLP, ResNet, UNet
from lightning_parts import Pair, student, teacher, trainer

IMAGE = (2, 8, 8)
NETWORKS = {
    "mlp": lambda: MLP((5,), width=16, blocks=2),
    "preconditioned": lambda: PreconditionedMLP((1, 3, 3), "full", width=16, blocks=1),
    "resnet": lambda: ResNet(IMAGE, width=8, blocks=1),
    "unet": lambda: UNet(IMAGE, width=8, multipliers=(1, 2), blocks=1, attention=(4,)),
}


def awake(network: nn.Module) -> nn.Module:
    """Random weights where a network starts with zeros."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[f2.FlowMap, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = awake(NETWORKS[name]()).to(dtype)
    shape = getattr(network, "shape", None) or network.baseline.shape
    x, (s, t) = torch.randn(3, *shape, dtype=dtype), torch.rand(2, 3, dtype=dtype)
    return network, x, s, t


def own_rules(function, x, v):
    """Torch's own derivative in forward mode."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, v)))


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_of_networks_are_those_of_torch(name):
    network, x, s, t = make(name)
    v = torch.randn_like(x)
    with torch.no_grad():
        value, expected = own_rules(lambda y: network(y, s, t), x, v)
        got_value, got = jacobian_product(lambda y: network(y, s, t), x, v)
        # and along the time, which moves every modulation
        _, expected_t = own_rules(lambda y: network(x, s, y), t, torch.ones_like(t))
        _, got_t = jacobian_product(lambda y: network(x, s, y), t, torch.ones_like(t))
    assert torch.equal(got_value, value)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got_t, expected_t, rtol=1e-11, atol=1e-12)
    assert float(expected.abs().min(0).values.max()) > 1e-3
    assert float(expected_t.abs().max()) > 1e-3


SHAPES = {1: (4, 4, 3), 2: (4, 4, 3, 3), 3: (4, 4, 3, 3, 3), 4: (4, 4), 5: (4,)}
W = {k: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
     for k, shape in SHAPES.items()}  # fmt: skip
OPERATIONS = {
    "conv1d": (lambda x: torch.conv1d(x, W[1], W[5], padding=1), (2, 4, 6)),
    "conv2d, named": (lambda x: functional.conv2d(x, weight=W[2], bias=W[5], stride=2), (2, 4, 6, 6)),
    "conv3d": (lambda x: torch.conv3d(x, W[3], W[5]), (2, 4, 3, 4, 3)),
    "transposed": (lambda x: torch.conv_transpose2d(x, W[2], W[5], stride=2), (2, 4, 3, 3)),
    "linear": (lambda x: functional.linear(x, W[4], W[5]), (3, 4)),
    "constant times": (lambda x: W[4] @ x, (4, 3)),
    "times constant": (lambda x: x @ W[4], (3, 4)),
    "square": (lambda x: x * x, (3, 4)),
    "quotients": (lambda x: x / W[5] + W[5] / (2 + x.square()), (3, 4)),
    "differences": (lambda x: (x - W[5]) * (W[5] - x) + (1 - x), (3, 4)),
    "a small tangent in a large sum": (lambda x: (x + W[4]) * (W[4] - x), (1, 4)),
    "scaled sum": (lambda x: torch.add(x, W[5], alpha=2) - torch.sub(W[5], x, alpha=3), (3, 4)),
    "rounded quotient": (lambda x: torch.div(3 * x, W[5], rounding_mode="floor") + x, (3, 4)),
    "mixed types": (lambda x: x.float() + W[5], (3, 4)),
    "group norm": (lambda x: functional.group_norm(x, 2, W[5], W[5] + 1), (2, 4, 3, 3)),
    "group norm, plain": (lambda x: functional.group_norm(x, 4, eps=0.1), (2, 4, 5)),
    "layer norm": (lambda x: functional.layer_norm(x, (4,), W[5], W[5] - 1), (2, 3, 4)),
    "layer norm of two axes": (lambda x: functional.layer_norm(x, (3, 4)), (2, 3, 4)),
    "instance norm": (lambda x: functional.instance_norm(x, weight=W[5], bias=W[5] + 1, eps=0.01), (2, 4, 3, 3)),
    "instance norm, plain": (nn.InstanceNorm1d(4), (2, 4, 5)),
    "weight with a tangent": (lambda x: functional.linear(x, x.T @ x, x[0]), (4, 4)),
    "filter with a tangent": (lambda x: torch.conv1d(x[None], x[..., None]), (4, 4)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_tangents_of_operations_are_those_of_torch(name):
    function, shape = OPERATIONS[name]
    torch.manual_seed(0)
    x, v = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        value, expected = own_rules(function, x, v)
        got_value, got = jacobian_product(function, x, v)
    assert torch.equal(got_value, value)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert float(expected.abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_tangents_in_half_precision(name):
    # torch's own rule of a linear layer refuses autocast: it mixes both types in one product
    torch.set_default_dtype(torch.float32)
    network, x, s, t = make(name, torch.float32)
    with torch.no_grad():
        _, expected = own_rules(lambda y: network(y, s, t), x, x)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x, s, t)
            value, got = jacobian_product(lambda y: network(y, s, t), x, x)
            divergence = f2.objectives.TeacherSource(network)(f2.flows.Point(x, t)).divergence
    assert torch.equal(value, half)
    assert value.dtype == got.dtype == torch.bfloat16
    assert float((got - expected).norm() / expected.norm()) < 0.05
    assert divergence.dtype == torch.float32


def multiplied(x):
    y = x.clone()
    y *= y
    return y


@pytest.mark.parametrize(
    "function",
    [multiplied, lambda x: x.clone().mul_(3.0), lambda x: (y := x + 1).mul_(y.view_as(y)),
     lambda x: (y := x * 1).addcmul_(y, y, value=0.5), lambda x: (y := x.exp()).pow_(y),
     lambda x: (y := x * 1).mul_(other=y), lambda x: (y := x * 1).lerp_(x, y),
     lambda x: (y := x.exp()).addcdiv_(x, y, value=2), lambda x: (y := x.exp()).hypot_(y)],
)  # fmt: skip
def test_what_is_written_over_itself_has_its_derivative(function):
    """Where torch's tangents are wrong, without a word: ``y *= y``."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        value, got = jacobian_product(function, x, v)
    assert torch.equal(value, function(x))
    torch.testing.assert_close(got, (function(x + 1e-6 * v) - function(x - 1e-6 * v)) / 2e-6, rtol=1e-6, atol=1e-8)


def by_two_reverse_passes(function, x, v):
    """The value, and ``v^T J v`` summed: torch's gradients of that are right, those of its tangents are not."""
    x = x.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones cannot go back twice
        value = function(x)
    (back,) = torch.autograd.grad(value, x, v, create_graph=True)
    return value, back * v


def by_a_tangent(function, x, v):
    value, moved = jacobian_product(function, x, v)
    return value, moved * v


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_are_differentiable(name):
    network, x, s, t = make(name)
    v = torch.randn_like(x)

    def slope(product):
        network.zero_grad()
        moved = x.clone().requires_grad_(True)
        value, along = product(lambda y: network(y, s, t), moved, v)
        (value.square().sum() + along.sum()).backward()
        return [moved.grad, *(parameter.grad for parameter in network.parameters())]

    for got, expected in zip(slope(by_a_tangent), slope(by_two_reverse_passes), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def attended(**settings):
    """Attention among the rows, each row query, key and value in three ways, so that no two are the same."""
    return lambda x: functional.scaled_dot_product_attention(x, x.sin(), (x + 1).square(), **settings)


MASK = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
AGAIN = {name: operation for name, operation in OPERATIONS.items() if "norm" in name} | {
    "softmax": (lambda x: functional.softmax(x, -1), (3, 4)),
    "softmax, method": (lambda x: x.softmax(0), (3, 4)),
    "softmax, named": (lambda x: torch.softmax(x, dim=1), (3, 4)),
    "softmax, of a type": (lambda x: x.softmax(1, dtype=torch.float64), (3, 4)),
    "log softmax": (lambda x: functional.log_softmax(x, dim=1), (3, 4)),
    "log of a sum": (lambda x: x * x.logsumexp(1)[:, None], (3, 4)),
    "log of a sum of two axes": (lambda x: x * torch.logsumexp(x, (0, 2), keepdim=True), (3, 4, 2)),
    "attention": (attended(), (2, 3, 4)),
    "attention of a scale": (attended(scale=0.7), (2, 3, 4)),
    "attention to what was before": (attended(is_causal=True), (2, 3, 4)),
    "attention where it is allowed": (attended(attn_mask=MASK), (2, 3, 4)),
    "attention with a bias": (attended(attn_mask=MASK.double()), (2, 3, 4)),
    "attention among constants": (lambda x: functional.scaled_dot_product_attention(W[4], W[4], x * x), (4, 3)),
    "attention of groups": (
        lambda x: functional.scaled_dot_product_attention(
            x.sin()[None].repeat(1, 2, 1, 1), x[None], (x * x)[None], enable_gqa=True
        )[0, :2],
        (2, 3, 4),
    ),
    "heads": (lambda x: HEADS(x, x.sin(), x * x, need_weights=False)[0], (2, 3, 4)),
    "heads and their weights": (lambda x: HEADS(x, x, x, attn_mask=~MASK & ~torch.eye(3).bool())[1] @ x, (2, 3, 4)),
    "a layer of a transformer": (lambda x: LAYER(x), (2, 3, 4)),
}
HEADS = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
LAYER = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu", dtype=torch.float64)


@pytest.mark.parametrize("name", AGAIN)
def test_tangents_of_operations_are_differentiable(name):
    """Where torch's own rule gives another gradient, or none."""
    function, shape = AGAIN[name]
    torch.manual_seed(0)
    x, v = torch.randn(2, *shape, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(product(function, y, v)[1].sum(), y)[0]
        for product, y in ((by_a_tangent, x.clone().requires_grad_(True)), (by_two_reverse_passes, x.clone()))
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert float(expected.abs().max()) > 1e-2


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_a_layer_multiplies_twice_and_not_three_times():
    network, x, s, t = make("resnet")
    layers = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    with torch.no_grad(), Convolutions() as seen:
        jacobian_product(lambda y: network(y, s, t), x, x)
    assert seen.counts["aten::convolution"] == 2 * layers


def test_rules_leave_other_code_alone():
    network, x, s, t = make("resnet")
    with torch.no_grad():
        expected = network(x, s, t)
        with TangentRules():
            assert torch.equal(network(x, s, t), expected)
        # torch's reverse mode inside of the rules
        with TangentRules(), torch.enable_grad():
            y = x.clone().requires_grad_(True)
            (got,) = torch.autograd.grad(network(y, s, t).sum(), y)
    with torch.enable_grad():
        y = x.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(network(y, s, t).sum(), y)
    assert torch.equal(got, expected)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["preconditioned", "resnet"])
def test_compiled_network_answers_and_is_named_as_before(name):
    network, x, s, t = make(name)
    keys = list(network.state_dict())
    (expected, features), diagonal = network.forward_features(x, s, t), network.velocity(x, 0.5)
    torch._dynamo.reset()
    before = graphs()
    compile_network(network, "eager")
    got, got_features = network.forward_features(x, s, t)
    assert graphs() > before
    assert list(network.state_dict()) == keys
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_features, features)
    torch.testing.assert_close(network(x, s, t), expected)
    torch.testing.assert_close(network.velocity(x, 0.5), diagonal)
    before = graphs()
    compile_network(network, False)
    torch.testing.assert_close(network(x[:2], s[:2], t[:2]), expected[:2])
    assert graphs() == before


def test_flow_map_without_features_is_compiled():
    flow_map = f2.as_flow_map(lambda x, s, t, cond: (t - s)[:, None] * x)
    before = graphs()
    compile_network(flow_map, "eager")
    x = torch.randn(3, 2)
    torch.testing.assert_close(flow_map.jump(x, 0.0, 0.5), 1.25 * x)
    assert graphs() > before


def test_derivatives_do_not_enter_compiled_code():
    network, x, s, t = make("resnet")
    v = torch.randn_like(x)

    def refuse(*_):
        raise RuntimeError("compiled code was called")

    with torch.no_grad():
        _, expected = jacobian_product(lambda y: network(y, s, t), x, v)
        _, expected_t = jacobian_product(lambda y: network(x, s, y), t, torch.ones_like(t))
        compile_network(network, "eager")
        network(x, s, t)
        network.forward_features._fast = refuse
        with pytest.raises(RuntimeError, match="compiled code"):
            network(x, s, t)
        _, got = jacobian_product(lambda y: network(y, s, t), x, v)
        _, got_t = jacobian_product(lambda y: network(x, s, y), t, torch.ones_like(t))
        _, along = torch.func.jvp(lambda y: network(y, s, t), (x,), (v,))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_t, expected_t)
    torch.testing.assert_close(along, expected)
    assert float(expected.abs().max()) > 1e-2


def test_copies_of_a_compiled_network_use_their_own_weights():
    network, x, s, t = make("mlp")
    compile_network(network, "eager")
    expected = network(x, s, t).detach()
    for twin in (copy.deepcopy(network), copy_frozen(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(twin(x, s, t).detach(), expected)
        with torch.no_grad():
            twin.outlet.bias.add_(1.0)
        torch.testing.assert_close(twin(x, s, t).detach(), expected + 1)
        torch.testing.assert_close(network(x, s, t).detach(), expected)


@pytest.mark.parametrize("how", ["reduce-overhead", "fast"])
def test_unfit_ways_to_compile_are_refused(how):
    with pytest.raises(ValueError, match="max-autotune-no-cudagraphs"):
        compile_network(NETWORKS["mlp"](), how)


def test_adapted_networks_are_not_compiled():
    flow_map = AdaptedFlowMap(nn.Sequential(nn.Linear(2, 2)), MeanFlow())
    with pytest.raises(ValueError, match="AdaptedFlowMap"):
        compile_network(flow_map)


class Images(Pair):
    """A few random images."""

    shape = IMAGE

    def splits(self):
        generator = torch.Generator().manual_seed(0)
        draw = lambda n: torch.randn(n, *IMAGE, generator=generator)  # noqa: E731
        return {"train": (draw(64), None), "val": (draw(8), None), "test": (draw(8), None)}


def trained(tmp_path, **kwargs):
    torch.manual_seed(0)
    of = f2.FlowMatchingModule(awake(NETWORKS["resnet"]()), shape=IMAGE, **kwargs)
    torch.manual_seed(1)
    # not one of Adam's kind: a bias before a normalisation has a gradient of rounding errors, which those blow up
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.01)  # noqa: E731
    objective = f2.objectives.Semigroup(weighting=f2.Weighting(units="velocity"))
    module = f2.F2D2Module(teacher=of, objective=objective, optimizer=optimizer, warmup=0, ema_decay=0.5, **kwargs)
    quiet = trainer(tmp_path, max_steps=2, limit_val_batches=0, gradient_clip_val=1.0)
    module.start = [value.clone() for value in module.state_dict().values()]
    quiet.fit(module, datamodule=Images())
    quiet.save_checkpoint(tmp_path / "student.ckpt")
    return module


def test_options_train_to_the_same_weights(tmp_path):
    before = graphs()
    torch._dynamo.reset()
    plain = trained(tmp_path / "plain")
    assert graphs() == before
    fast = trained(tmp_path / "fast", compile="eager", channels_last=True)
    assert graphs() > before
    assert fast.joint.flow_map.inlet.weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain.joint.flow_map.inlet.weight.is_contiguous(memory_format=torch.channels_last)
    mine, theirs = fast.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(value, start) for value, start in zip(theirs.values(), plain.start, strict=True))
    loaded = torch.load(tmp_path / "fast" / "student.ckpt", weights_only=False)
    assert list(loaded["state_dict"]) == list(theirs)
    plain.load_state_dict(loaded["state_dict"])
    x = torch.randn(3, *IMAGE)
    torch.testing.assert_close(plain.log_prob(x, 2).value, fast.log_prob(x, 2).value)


@pytest.mark.parametrize("option", [{"compile": "eager"}, {"channels_last": True}], ids=["compile", "channels last"])
def test_options_are_refused_for_sharded_networks(option):
    module = teacher(**option)
    module._trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="ModelParallelStrategy"):
        module.configure_model()


def test_half_precision_keeps_likelihoods_whole(tmp_path):
    torch.set_default_dtype(torch.float32)
    module = student(teacher(), ema_decay=0.5)
    quiet = trainer(tmp_path, max_epochs=1, precision="bf16-mixed")
    seen = []
    module.joint.head.register_forward_hook(lambda *call: seen.append(call[-1]))
    quiet.fit(module, datamodule=Pair())
    assert seen
    assert {divergence.dtype for divergence in seen} == {torch.float32}
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in module.parameters())
    x = torch.randn(6, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module.average.flow_map(x, 1.0, 0.5).dtype == torch.bfloat16
        assert module.average(x, 1.0, 0.5).divergence.dtype == torch.float32
        half = module.log_prob(x, 2).value
        drawn = module.sample(torch.randn(6, 2), 2, with_log_prob=True)
    assert half.dtype == drawn.log_prob.dtype == drawn.state.dtype == torch.float32
    torch.testing.assert_close(half, module.log_prob(x, 2).value.detach(), rtol=0.02, atol=0.02)


def test_recomputed_paths_have_the_same_loss_and_gradients():
    torch.manual_seed(0)
    network = awake(PreconditionedMLP((2,), "full", width=16, blocks=2))
    joint = f2.JointFlowMap(network, f2.DivergenceHead(16, hidden=8, baseline=f2.GaussianBaseline((2,))))
    awake(joint.head)
    source = f2.objectives.TeacherSource(lambda x, t, cond: -x.sin())
    data, calls = torch.randn(16, 2), []

    def steps(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        intervals = f2.Intervals(steps=(4,))
        objective = f2.TrajectoryRegression(nodes=4, capacity=16, unroll=1.0, intervals=intervals, recompute=recompute)
        found, whole = [], 0
        handle = joint.register_forward_hook(lambda *_: calls.append(1))
        while whole < 2:
            joint.zero_grad()
            calls.clear()
            loss = objective.loss(joint, f2.objectives.Batch(data, source, progress=1.0)).loss
            forward = len(calls)
            loss.backward()
            whole += forward == 4
            # every jump once more in the backward pass, or none
            assert len(calls) - forward == (4 if recompute and forward == 4 else 0)
            found += [loss.detach(), *(p.grad.clone() for p in joint.parameters() if p.grad is not None)]
        handle.remove()
        return found

    kept, again = steps(False), steps(True)
    assert len(kept) == len(again)
    for expected, got in zip(kept, again, strict=True):
        assert torch.equal(got, expected)
