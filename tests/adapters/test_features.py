"""Features of networks that were not written to give any, and a second time for those that take none."""

import copy

import pytest
import torch
from torch import nn

from f2d2_lightning import Direction, DivergenceHead, JointFlowMap
from f2d2_lightning.adapters import Adapter, AddedInterval, Consistency, FeatureTap, Shortcut, TorchCFM
from problems import randomize


class Times(nn.Module):
    def __init__(self, width, form="flat"):
        super().__init__()
        self.form = form
        self.layers = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, s):
        out = self.layers(s[:, None])
        return {"flat": out, "token": out[:, None], "map": out[:, :, None, None]}[self.form]


class UNet(nn.Module):
    """Images ``(B, C, H, W)``; a convolution is last."""

    def __init__(self, width=6, channels=2):
        super().__init__()
        self.times = Times(width, "map")
        self.inner = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.unused = nn.Linear(3, 3)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, s, t=None, y=None):
        return self.out(torch.tanh(self.norm(self.inner(x) + self.times(s))))


class Transformer(nn.Module):
    """Tokens ``(B, N, F)`` in the middle, of 2 x 2 patches of one channel; a linear layer is last."""

    def __init__(self, width=6):
        super().__init__()
        self.times = Times(width, "token")
        self.patch = nn.Linear(4, width)
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.unpatch = nn.Linear(width, 4)

    def forward(self, x, s, t=None, y=None):
        b, _, h, w = x.shape
        patches = x.reshape(b, h // 2, 2, w // 2, 2).permute(0, 1, 3, 2, 4).reshape(b, -1, 4)
        out = self.unpatch(self.block(self.patch(patches) + self.times(s)))
        return out.reshape(b, h // 2, w // 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(x.shape)


class ChannelsLast(nn.Module):
    """Images ``(B, H, W, C)``."""

    def __init__(self, width=6):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, width), nn.Tanh())
        self.act = nn.Tanh()
        self.out = nn.Linear(width, 2)

    def forward(self, x, s, t=None, y=None):
        return self.out(self.act(self.inner(x))) * s[:, None, None, None]


class Mlp(nn.Module):
    """Vectors; time and length of the step are embedded apart, as in shortcut models."""

    def __init__(self, width=8):
        super().__init__()
        self.times, self.lengths = Times(width), Times(width)
        self.inner = nn.Linear(3, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x, s, length, y=None):
        return self.out(torch.tanh(self.inner(x) + self.times(s) + self.lengths(length)))


PLAIN = Adapter("net(x, s, t, cond)")
CASES = {
    "convolution": (UNet, PLAIN, (2, 4, 4), None, "out", (6, 4, 4)),
    "tokens": (Transformer, PLAIN, (1, 4, 8), None, "unpatch", (6, 8)),
    "channels last": (ChannelsLast, Adapter(channels_last=True), (2, 4, 6), None, "out", (6, 4, 6)),
    "linear": (Mlp, Shortcut(), (3,), None, "out", (8,)),
    "named convolution": (UNet, PLAIN, (2, 4, 4), "inner", "inner", (6, 4, 4)),
    "named norm": (UNet, PLAIN, (2, 4, 4), "norm", "norm", (6, 4, 4)),
    "named embedding": (UNet, PLAIN, (2, 4, 4), "times.layers.0", "times.layers.0", (6,)),
    "named block of tokens": (Transformer, PLAIN, (1, 4, 8), "block", "block", (6, 8)),
    "named norm of tokens": (Transformer, PLAIN, (1, 4, 8), "block.0", "block.0", (6, 8)),
    "named block, channels last": (ChannelsLast, Adapter(channels_last=True), (2, 4, 6), "inner", "inner", (6, 4, 6)),
    "no weights, channels last": (ChannelsLast, Adapter(channels_last=True), (2, 4, 6), "act", "act", (6, 4, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_features(name):
    network, adapter, shape, features, layer, expected = CASES[name]
    network = network()
    flow_map = adapter(network, features=features)
    x = torch.randn(5, *shape)
    caught = []
    module = network.get_submodule(layer)
    hook = (
        module.register_forward_hook(lambda m, i, o: caught.append(o))
        if features
        else module.register_forward_pre_hook(lambda m, i: caught.append(i[0]))
    )
    plain = flow_map(x, 0.2, 0.6)
    u, h = flow_map.forward_features(x, 0.2, 0.6)
    hook.remove()
    assert flow_map.tap.layer == layer
    assert h.shape == (5, *expected)
    assert torch.equal(u, plain)
    # every feature vector is one that flowed through the layer, whole
    raw = caught[-1]
    turned = raw.shape != h.shape
    assert torch.equal(h, raw.movedim(-1, 1) if turned else raw)
    assert flow_map.features == expected[0]
    again = flow_map.forward_features(x, 0.2, 0.6)
    assert torch.equal(again[1], h)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("name", ["convolution", "tokens"])
def test_any_resolution(name):
    network, adapter, _, _, _, expected = CASES[name]
    flow_map = adapter(network())
    joint = JointFlowMap(flow_map, randomize(DivergenceHead(expected[0])))
    for size in (4, 8):
        x = torch.randn(3, 1 if name == "tokens" else 2, size, size)
        assert joint(x, 0.2, 0.6).divergence.shape == (3,)


def test_the_last_layer_is_found_in_one_call():
    network = UNet()
    calls = []
    network.register_forward_pre_hook(lambda m, i: calls.append(1))
    Adapter()(network).forward_features(torch.randn(2, 2, 4, 4), 0.2, 0.6)
    assert len(calls) == 1


def test_the_last_call_of_a_shared_layer_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, s, t, y=None):
            return self.shared(torch.tanh(self.other(self.shared(x))))

    network = Twice()
    flow_map = Adapter()(network)
    x = torch.randn(2, 3)
    _, h = flow_map.forward_features(x, 0.2, 0.6)
    assert flow_map.tap.layer == "shared"
    assert torch.equal(h, torch.tanh(network.other(network.shared(x))))


def test_probe_leaves_the_network_as_it_was():
    network = UNet()
    network.norm = nn.BatchNorm2d(6)
    network.inner.eval()
    flow_map = Adapter()(network)
    with pytest.raises(ValueError, match="probe"):
        _ = flow_map.features
    before = copy.deepcopy(network.state_dict())
    assert flow_map.probe(torch.randn(2, 2, 4, 4)) == 6
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.norm.training
    assert not network.inner.training
    for directions in ("to_noise", "none"):
        assert Adapter(directions=directions)(network).probe(torch.randn(2, 2, 4, 4)) == 6
    assert TorchCFM("net(x, s)")(network).probe(torch.randn(2, 2, 4, 4)) == 6


def test_errors():
    network = UNet()
    x = torch.randn(3, 2, 4, 4)
    with pytest.raises(ValueError, match=r"no submodule 'iner'.*'inner'"):
        Adapter()(network, features="iner")
    with pytest.raises(ValueError, match=r"did not run 'unused'.*features="):
        Adapter()(network, features="unused").forward_features(x, 0.2, 0.6)
    with pytest.raises(ValueError, match="no submodules at all"):
        FeatureTap(nn.Identity(), "layer")

    class Odd(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer, self.layer = answer, nn.Identity()

        def forward(self, x, s, t, y=None):
            self.layer(self.answer)
            return x

    for answer, words in (
        (torch.zeros(2, 5), r"shape \(2, 5\), but there are 3 states"),
        (torch.zeros(3), r"shape \(3,\)"),
        ("text", "a str"),
    ):
        with pytest.raises(ValueError, match=words):
            Adapter()(Odd(answer), features="layer").forward_features(x, 0.2, 0.6)
    _, h = Adapter()(Odd((torch.zeros(3, 5), 1)), features="layer").forward_features(x, 0.2, 0.6)
    assert h.shape == (3, 5)  # of several answers the first
    with pytest.raises(ValueError, match=r"ran no linear layer or convolution.*features="):
        Adapter()(Odd(x)).forward_features(x, 0.2, 0.6)
    with pytest.raises(ValueError, match="is a function and gives no features"):
        Adapter()(lambda x, s, t, cond: x).forward_features(x, 0.2, 0.6)
    with pytest.raises(ValueError, match="name submodules"):
        Adapter()(lambda x, s, t, cond: x, features="inner")


def test_a_method_is_called():
    class Methods(UNet):
        def predict(self, x, s):
            return -self(x, s)

    network = Methods()
    x = torch.randn(2, 2, 4, 4)
    flow_map = Adapter("net.predict(x, s)", directions="none")(network)
    assert torch.equal(flow_map.velocity(x, 0.3), -network(x, torch.full((2,), 0.3)))


# --- networks with several answers, and layers of other people's classes ---


class OwnLinear(nn.Module):
    """As NVlabs/edm writes it, ``(out, in)``; ``transposed`` as others do, and ``said`` with its width as attribute."""

    def __init__(self, inputs, outputs, transposed=False, said=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((inputs, outputs) if transposed else (outputs, inputs)))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.transposed = transposed
        if said:
            self.out_features = outputs

    def forward(self, x):
        return (x @ (self.weight if self.transposed else self.weight.t())).add_(self.bias)


class Official(nn.Module):
    """As the official F2D2 network: ``net(x, t, dt, class_labels) -> (u, D)``, whose scalar head runs last."""

    def __init__(self, width=6, transposed=False, said=False):
        super().__init__()
        self.map_layer0, self.map_layer0_s = OwnLinear(1, 4), OwnLinear(1, 4)
        self.map_layer1 = OwnLinear(4, width, transposed, said)
        self.map_layer1_s = OwnLinear(4, width, transposed, said)
        self.inner = nn.Conv2d(2, width, 3, padding=1)
        self.aux_conv = nn.Conv2d(width, 2, 3, padding=1)
        self.scalar_head = nn.Sequential(nn.Flatten(), nn.Linear(width * 16, 5), nn.SiLU(), nn.Linear(5, 1))
        self.calls = 0

    def forward(self, x, t, dt, class_labels=None):
        self.calls += 1
        time = self.map_layer1(torch.tanh(self.map_layer0(t[:, None])))
        time = time + self.map_layer1_s(torch.tanh(self.map_layer0_s(dt[:, None].log())))
        h = torch.tanh(self.inner(x) + time[:, :, None, None])
        return self.aux_conv(h), self.scalar_head(h)[:, 0] / 20000


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_last_layer_of_the_answer_that_counts_is_read(frozen, mode):
    network = Official().requires_grad_(not frozen)
    flow_map = Shortcut("length", output=0)(network)
    kept = copy.deepcopy(network.state_dict())
    with mode():
        x = torch.randn(3, 2, 4, 4)
        u, h = flow_map.forward_features(x, 0.2, 0.6)
        assert torch.equal(u, flow_map(x, 0.2, 0.6))
        assert torch.equal(network.aux_conv(h), u)
    assert flow_map.tap.layer == "aux_conv"
    calls = network.calls
    flow_map.forward_features(x.clone(), 0.2, 0.6)
    assert network.calls == calls + 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(torch.equal(value, kept[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_a_second_answer_of_the_same_shape_is_told_apart():
    class Both(nn.Module):  # a velocity beside the average one, as MeanFlow networks have
        def __init__(self):
            super().__init__()
            self.inner, self.u, self.v = nn.Linear(3, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x, s, t, y=None):
            h = torch.tanh(self.inner(x))
            u = self.u(h)
            return {"u": u, "v": self.v(torch.sin(h))}

    for output, layer in (("u", "u"), ("v", "v")):
        flow_map = Adapter(output=output)(Both())
        flow_map.probe(torch.randn(4, 3))
        assert flow_map.tap.layer == layer


def test_the_width_of_other_layers():
    x = torch.randn(3, 2, 4, 4)
    flow_map = Shortcut("length", output=0)(Official(transposed=True), interval="map_layer1")
    with pytest.raises(ValueError, match=r"shape \(3, 6\).*its 4 channels.*'map_layer1' keeps.*out_features"):
        flow_map(x, 0.2, 0.6)
    flow_map = Shortcut("length", output=0)(Official(transposed=True, said=True), interval="map_layer1")
    assert flow_map.interval.width == 6
    assert flow_map(x, 0.2, 0.6).shape == x.shape
    assert Shortcut("length", output=0)(Official(), interval="map_layer1").interval.width == 6
    for layer, width in (
        (nn.ConvTranspose2d(3, 5, 2), 5),
        (nn.Conv2d(3, 7, 1), 7),
        (nn.Sequential(OwnLinear(2, 9)), 9),
    ):
        assert AddedInterval.for_submodule(nn.ModuleDict({"time": layer}), "time").width == width


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_channels_of_other_linear_layers(axis, transposed):
    class Contraction(OwnLinear):
        def forward(self, h):
            weight = self.weight.t() if self.transposed else self.weight
            return torch.einsum("bnc,oc->bno" if axis == -1 else "bcn,oc->bon", h, weight)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(3, 6), Contraction(6, 3, transposed)

        def forward(self, x, s, t, y=None):
            h = torch.tanh(self.inner(x))
            return self.out(h) if axis == -1 else self.out(h.mT).mT

    network = Tokens()
    x = torch.randn(4, 5, 3)
    _, h = Adapter()(network).forward_features(x, 0.2, 0.6)
    assert torch.equal(h, torch.tanh(network.inner(x)).mT)


# --- compiled networks ---


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_networks(how):
    network = UNet()
    x = torch.randn(2, 2, 4, 4)
    plain = Adapter()(copy.deepcopy(network), features="norm")
    expected, features = plain.forward_features(x, 0.2, 0.6)
    if how == "wrapped":
        network = torch.compile(network, backend="eager")
    elif how == "in place":
        network.compile(backend="eager")
    else:
        network.norm = torch.compile(network.norm, backend="eager")
    network(x, torch.full((2,), 0.2))  # compiled by now
    flow_map = Adapter()(network, features="norm", interval="times")
    u, h = flow_map.forward_features(x, 0.2, 0.6)
    assert torch.equal(u, expected)
    assert torch.equal(h, features)
    randomize(flow_map.interval)
    assert not torch.allclose(flow_map(x, 0.2, 0.6), flow_map(x, 0.2, 0.9))
    _, product = torch.func.jvp(lambda y: flow_map(y, 0.2, 0.6), (x,), (torch.ones_like(x),))
    h = 1e-5
    with torch.no_grad():
        finite = (flow_map(x + h, 0.2, 0.6) - flow_map(x - h, 0.2, 0.6)) / (2 * h)
    assert torch.allclose(product, finite, atol=1e-7)
    torch._dynamo.reset()


# --- an added interval ---


@pytest.mark.parametrize("form", ["flat", "token", "map"])
def test_an_added_interval_starts_as_no_change(form):
    width = 8
    x = torch.randn(4, 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.times = Times(width, form)
            self.out = nn.Linear(width, 3)

        def forward(self, x, s, y=None):
            return x + self.out(self.times(s).reshape(len(x), width))

    network = Net()
    plain = Adapter("net(x, s)", directions="none")(network)
    flow_map = Adapter("net(x, s)")(network, interval="times")
    assert flow_map.directions == Direction.BOTH
    for s, t in ((0.2, 0.7), (0.7, 0.2), (0.5, 0.5)):
        assert torch.equal(flow_map(x, s, t), plain(x, s, s))
    randomize(flow_map.interval)
    s, t = torch.rand(4), torch.rand(4)
    u = flow_map(x, s, t)
    added = flow_map.interval(s, t)
    expected = x + network.out(network.times(s).reshape(4, width) + added)
    assert torch.allclose(u, expected, rtol=0, atol=1e-14)
    # shared times are embedded once, and answer as each alone
    assert torch.allclose(flow_map(x, 0.3, 0.1), flow_map(x, torch.full((4,), 0.3), torch.full((4,), 0.1)))
    assert not network.times._forward_hooks
    assert torch.equal(plain(x, s, s), network(x, s))  # the network itself is left alone
    assert {name.split(".")[0] for name in flow_map.state_dict()} == {"network", "interval"}


def test_an_added_interval_has_the_networks_precision():
    flow_map = TorchCFM("net(x, s)")(UNet().float(), interval="times")
    assert {p.dtype for p in flow_map.interval.parameters()} == {torch.float32}
    assert flow_map(torch.randn(2, 2, 4, 4), 0.2, 0.6).dtype == torch.float64


def test_errors_of_an_added_interval():
    x = torch.randn(4, 2, 4, 4)
    with pytest.raises(ValueError, match=r"no time embedding 'time'.*'times'"):
        Adapter()(UNet(), interval="time")
    with pytest.raises(ValueError, match="has no linear layer"):
        Adapter()(UNet(), interval="times.layers.1")
    with pytest.raises(ValueError, match=r"did not run 'unused'.*interval="):
        Adapter()(UNet(), interval="unused")(x, 0.2, 0.6)
    flow_map = Adapter()(UNet(), interval="times")
    flow_map.interval = AddedInterval(7)
    with pytest.raises(ValueError, match=r"shape \(4, 6, 1, 1\).*7 channels"):
        flow_map(x, 0.2, 0.6)


def test_an_added_interval_learns_the_other_direction():
    # the step's length has no sign: u(x, s, t) and u(x, s, 2s - t) are one answer before training
    network = Mlp(16)
    flow_map = Shortcut("length")(network, interval="times", directions="both")
    x = torch.randn(64, 3)
    assert torch.equal(flow_map(x, 0.5, 0.75), flow_map(x, 0.5, 0.25))
    optimizer = torch.optim.Adam(flow_map.parameters(), 1e-2)
    for _ in range(80):
        s, t = torch.full((64,), 0.5), torch.rand(64)
        target = torch.where(t > s, 1.0, -1.0)[:, None].expand(64, 3)
        loss = (flow_map(x, s, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert float(flow_map(x, 0.5, 0.75).mean()) > 0.5
        assert float(flow_map(x, 0.5, 0.25).mean()) < -0.5


def test_a_consistency_model_with_an_interval_has_a_velocity():
    flow_map = Consistency("net(x, s)")(UNet(), interval="times")
    x = torch.randn(2, 2, 4, 4)
    assert flow_map.velocity(x, 0.4).shape == x.shape
    randomize(flow_map.interval)
    assert not torch.allclose(flow_map(x, 0.4, 0.5), flow_map(x, 0.4, 1.0))
    assert not torch.allclose(flow_map(x, 0.4, 0.5), flow_map(x, 0.4, 0.3))
