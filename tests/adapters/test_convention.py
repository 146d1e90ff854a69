"""What the check before training refuses, one of each kind, beside right networks of many kinds that pass."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from f2d2_lightning.adapters import (
    Adapter,
    ConventionError,
    Denoiser,
    FlowMatching,
    MeanFlow,
    Shortcut,
    VariancePreserving,
    check_convention,
)
from f2d2_lightning.adapters._velocities import _Asker, _UnfitError
from f2d2_lightning.nn import DiT
from problems import randomize


class Body(nn.Module):
    """``net(x, s, t)`` of vectors, ``(B, 3)``; what stands between its layers is the tests'."""

    def __init__(self, width=16):
        super().__init__()
        self.times, self.inner, self.outer = nn.Linear(2, width), nn.Linear(3, width), nn.Linear(width, 3)

    def hidden(self, x, s, t):
        return torch.tanh(self.inner(x) + self.times(torch.stack((s, t), 1)))

    def forward(self, x, s, t, cond=None):
        return self.outer(self.hidden(x, s, t))


# --- derivatives ---


class Detached(Body):
    def forward(self, x, s, t, cond=None):
        return super().forward(x.detach(), s, t)


class DetachedInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.skip = Detached(), nn.Linear(3, 3)

    def forward(self, x, s, t, cond=None):
        return self.part(x, s, t) + 0.1 * self.skip(x)


class Inference(Body):
    def forward(self, x, s, t, cond=None):
        with torch.inference_mode():
            return super().forward(x, s, t)


class Energy(Body):
    """The gradient of an energy, as energy models take it inside."""

    def forward(self, x, s, t, cond=None):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            energy = super().forward(leaf, s, t).square().sum()
            return torch.autograd.grad(energy, leaf)[0]


class Overwritten(Body):
    def forward(self, x, s, t, cond=None):
        hidden = self.hidden(x, s, t)
        hidden.data.mul_(3)  # the tangent knows nothing of it
        return self.outer(hidden)


class OtherSlope(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(context, inputs, output):
        context.save_for_forward(inputs[0])

    @staticmethod
    def jvp(context, tangent):
        return context.saved_tensors[0] * tangent  # a factor 2 is missing


class WrongRule(Body):
    def forward(self, x, s, t, cond=None):
        return self.outer(OtherSlope.apply(self.hidden(x, s, t)))


LOST = {
    Detached: "lost in Detached",
    DetachedInside: r"lost in 'part' \(Detached\)",
    Inference: "lost in Inference",
    Energy: "lost in Energy",
    Overwritten: "in place",
    WrongRule: "finite",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", LOST)
def test_derivatives_that_are_lost_or_wrong(network, dtype):
    flow_map = Adapter()(network().to(dtype))
    x = torch.randn(16, 3, dtype=dtype)
    with pytest.raises(ConventionError, match=LOST[network]) as caught:
        check_convention(flow_map, x)
    for words in ("Hutchinson(mode='finite')", "Reference(mode='finite')", network.__name__):
        assert words in str(caught.value)
    assert not any(m._forward_hooks for m in flow_map.modules())
    check_convention(flow_map, x, mode="finite")
    check_convention(flow_map, x[:1], mode="finite")
    with pytest.raises(ConventionError, match="finite differences"):
        check_convention(flow_map, x[:1])  # one sample is enough


def test_the_message_says_both_derivatives():
    class Half(nn.Module):  # u = 2 x + t, of which the derivative sees 1 x
        def forward(self, x, s, t, cond=None):
            return x + x.detach() + t[:, None]

    with pytest.raises(ConventionError, match="finite differences") as caught:
        check_convention(Adapter()(Half()), torch.randn(16, 3))
    said = [float(caught.value.args[0].split(word)[0].split()[-1]) for word in (" in forward mode", " by finite")]
    assert said[1] == pytest.approx(2 * said[0], rel=1e-2)


class Untouched(Body):
    def forward(self, x, s, t, cond=None):
        return self.outer(torch.tanh(self.times(torch.stack((s, t), 1)))) + 0 * x.detach()


class Undifferentiated(Body):
    def forward(self, x, s, t, cond=None):
        with torch.no_grad():
            return super().forward(x, s, t)


def test_modes():
    x = torch.randn(16, 3)
    for mode in ("forward", "reverse", "finite"):
        check_convention(Adapter()(Body()), x, mode=mode)
        check_convention(Adapter()(Untouched()), x, mode=mode)  # its derivative is zero, and rightly so
    # a forward pass without gradients has tangents, and no graph
    check_convention(Adapter()(Undifferentiated()), x)
    for network in (Undifferentiated(), DetachedInside()):
        with pytest.raises(ConventionError, match="in reverse mode, and"):
            check_convention(Adapter()(network), x, mode="reverse")
    with pytest.raises(ValueError, match="'backward'; it is one of 'forward', 'reverse', 'finite'"):
        check_convention(Adapter()(Body()), x, mode="backward")


class Squared(torch.autograd.Function):
    """As EDM's attention: a backward pass of its own and no forward mode."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(context, gradient):
        return 2 * gradient * context.saved_tensors[0]


class Op(nn.Module):
    def forward(self, x):
        return Squared.apply(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 16, batch_first=True)

    def forward(self, x):
        return self.cell(x[:, None, :3])[0][:, 0]


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("part", "place"),
    [(Op, "'part.0' (Op)"), (Recurrent, "'part.0.cell' (LSTM)"), (Recomputed, "'part.0' (Recomputed)")],
)
def test_layers_without_forward_mode_are_named(part, place):
    network = Body()
    network.part = nn.Sequential(part(), nn.Tanh())
    network.float()  # in double precision torch's LSTM is made of parts that have a forward mode
    network.hidden = lambda x, s, t: network.part(Body.hidden(network, x, s, t))
    x = torch.randn(16, 3, dtype=torch.float32)
    with pytest.raises(ConventionError, match="cannot be differentiated in forward mode") as caught:
        check_convention(Adapter()(network), x)
    assert place in str(caught.value)
    assert "Hutchinson(mode='finite')" in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)
    if part is Recomputed:  # torch takes no such gradient either
        with pytest.raises(ConventionError, match="cannot be differentiated in reverse mode"):
            check_convention(Adapter()(network), x, mode="reverse")
    else:
        check_convention(Adapter()(network), x, mode="reverse")
    check_convention(Adapter()(network), x, mode="finite")


def sinusoids(t, count=4, highest=1000.0):
    waves = t[:, None] * torch.exp(torch.linspace(0, math.log(highest), count, dtype=t.dtype))
    return torch.cat((waves.sin(), waves.cos()), 1)


class Dense(nn.Module):
    def __init__(self, dim, activation, depth, highest=0.0):
        super().__init__()
        self.highest = highest
        widths = [dim * (9 if highest else 1) + 16, *[48] * depth]
        pairs = itertools.pairwise(widths)
        self.layers = nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), activation())), nn.Linear(48, dim))

    def forward(self, x, s, t, cond=None):
        states = [sinusoids(column, 4, self.highest) for column in x.unbind(1)] if self.highest else []
        return self.layers(torch.cat((x, *states, sinusoids(s), sinusoids(t)), 1))


class Convolutions(nn.Module):
    def __init__(self, activation, pooled):
        super().__init__()
        self.inlet, self.outlet = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.norm, self.times, self.activation = nn.GroupNorm(4, 16), nn.Linear(16, 16), activation()
        self.pooled = pooled

    def forward(self, x, s, t, cond=None):
        h = self.norm(self.inlet(x)) + self.times(torch.cat((sinusoids(s), sinusoids(t)), 1))[:, :, None, None]
        if self.pooled:
            h = nn.functional.interpolate(nn.functional.max_pool2d(h, 2), scale_factor=2)
        return self.outlet(self.activation(h))


RIGHT = {
    "kinks": (lambda: Dense(3, nn.ReLU, 2), (3,)),
    "many kinks": (lambda: Dense(3, nn.ReLU, 8), (3,)),
    "flat": (lambda: Dense(3, nn.Hardtanh, 3), (3,)),
    "smooth": (lambda: Dense(3, nn.SiLU, 3), (3,)),
    "waves of the state": (lambda: Dense(2, nn.SiLU, 3, 100.0), (2,)),
    "short waves of the state": (lambda: Dense(2, nn.SiLU, 3, 10_000.0), (2,)),
    "convolutions": (lambda: Convolutions(nn.SiLU, False), (2, 4, 4)),
    "pooled convolutions with kinks": (lambda: Convolutions(nn.ReLU, True), (2, 4, 4)),
    "attention": (lambda: randomize(DiT((2, 4, 4), patch=2, width=16, depth=1, heads=2)), (2, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RIGHT)
def test_right_derivatives_are_never_refused(name, dtype):
    make, shape = RIGHT[name]
    for gain in (0.0, 0.1, 1.0, 4.0, 20.0):
        network = make().to(dtype)
        with torch.no_grad():
            for p in network.parameters():
                if p.ndim > 1:
                    p.mul_(gain)
        x = torch.randn(12, *shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        flow_map = Adapter("net(x, s, s)", directions="none")(network)
        for mode in ("forward", "reverse") if gain == 1 else ("forward",):
            check_convention(flow_map, x, mode=mode)


# --- velocities of trained networks, here closed forms ---


class Truth(nn.Module):
    """Independent Gaussians, whose flow map is known: average velocities in our convention."""

    def __init__(self, shape=(3,)):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mean, self.std = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        self.std = 0.3 + self.std.abs()

    def data(self, count=64):
        return self.mean + self.std * torch.randn(count, *self.mean.shape)

    def forward(self, x, s, t):
        s, t = (time.reshape(-1, *(1 for _ in x.shape[1:])) for time in (s, t))
        at, to = (((1 - time) ** 2 + (time * self.std) ** 2).sqrt() for time in (s, t))
        # (c_t - c_s) / (t - s), which is the derivative on the diagonal
        slope = ((s + t) * (1 + self.std**2) - 2) / (at + to)
        return self.mean + slope / at * (x - s * self.mean)


class Foreign(nn.Module):
    def __init__(self, body, shape=(3,)):
        super().__init__()
        self.truth, self.body = Truth(shape), body

    def forward(self, *arguments, **keywords):
        return self.body(self.truth, *arguments, **keywords)


def exploding(u, x, sigma):
    tau = 1 / (1 + sigma)
    return (x + sigma[:, None] * u(x * tau[:, None], tau, tau)) * tau[:, None]


def preserving(u, x, time):
    """The noise, as a DDPM of a thousand times answers it, with betas from .0001 to .02."""
    sigma = torch.expm1((time + 1) * (1e-4 + 9.97e-6 * time)).sqrt()
    state = x * (1 + sigma**2).sqrt()[:, None]
    return (state - exploding(u, state, sigma)) / sigma[:, None]


WRONG = {
    # what the network is, how it is declared, what the message says, and an adapter of that
    "multiplies by a thousand itself": (
        lambda u, x, s, r: -u(x, 1 - s, 1 - r), MeanFlow("net(x, 1000 * s, 1000 * t)"),
        "call='net(x, s, t)'", MeanFlow("net(x, s, t)")),
    "times up to a thousand": (
        lambda u, x, s, t: u(x, s / 1000, t / 1000), Adapter("net(x, s, t)", directions="to_data"),
        "call='net(x, 1000 * s, 1000 * t)'", Adapter("net(x, 1000 * s, 1000 * t)", directions="to_data")),
    "interval up to a thousand": (
        lambda u, x, s, h: u(x, s / 1000, (s + h) / 1000), Shortcut(call="net(x, s, t - s)"),
        "call='net(x, 1000 * s, 1000 * (t - s))'", Shortcut(call="net(x, 1000 * s, 1000 * (t - s))")),
    "a thousand, and down": (
        lambda u, x, s: -u(x, 1 - s / 1000, 1 - s / 1000), FlowMatching("net(x, s)"),
        "call='net(x, 1000 * s)', noise_time=1.0, data_time=0.0",
        FlowMatching("net(x, 1000 * s)", noise_time=1.0, data_time=0.0)),
    "opposite": (
        lambda u, x, s: -u(x, s, s), FlowMatching(), "velocity_scale=-1.0", FlowMatching(velocity_scale=-1.0)),
    "too small": (
        lambda u, x, s: u(x, s, s) / 1000, FlowMatching(), "velocity_scale=1000.0", FlowMatching(velocity_scale=1e3)),
    "too large": (
        lambda u, x, s: 3 * u(x, s, s), FlowMatching(), "velocity_scale=0.3", FlowMatching(velocity_scale=1 / 3)),
    "half": (
        lambda u, x, s: u(x, s, s) / 2, FlowMatching(), "velocity_scale=2.0", FlowMatching(velocity_scale=2.0)),
    "noise": (lambda u, x, s: x - s[:, None] * u(x, s, s), FlowMatching(), "(x - answer) / t", None),
    "data": (lambda u, x, s: x + (1 - s)[:, None] * u(x, s, s), FlowMatching(), "(answer - x) / (1 - t)", None),
    "end for interval": (
        lambda u, x, s, h: u(x, s, s + h), Adapter("net(x, s, t)", directions="to_data"),
        "call='net(x, s, t - s)'", Shortcut(call="net(x, s, t - s)")),
    "interval for end": (
        lambda u, x, s, t: u(x, s, t), Shortcut(call="net(x, s, t - s)"),
        "call='net(x, s, t)'", Adapter("net(x, s, t)", directions="to_data")),
    "sign of the interval": (
        lambda u, x, times: -u(x, 1 - times[0], 1 - times[0] + times[1]), MeanFlow("net(x, (s, t - s))"),
        "call='net(x, (s, s - t))'", MeanFlow("net(x, (s, s - t))")),
    "end first": (
        lambda u, x, r, s: -u(x, 1 - s, 1 - r), MeanFlow("net(x, s, t)"),
        "call='net(x, t, s)'", MeanFlow("net(x, t, s)")),
    "end first, to noise": (
        lambda u, x, t, s: u(x, s, t), Adapter("net(x, s, t)", directions="to_noise"),
        "call='net(x, t, s)'", Adapter("net(x, t, s)", directions="to_noise")),
    "noise level": (exploding, Denoiser("net(x, log(s) / 4)"), "call='net(x, s)'", Denoiser("net(x, s)")),
    "denoiser": (exploding, FlowMatching("net(x, s)"), "take Denoiser('net(x, s)')", Denoiser("net(x, s)")),
    "DDPM": (
        preserving, FlowMatching("net(x, s)"), "take VariancePreserving('net(x, s)')", VariancePreserving("net(x, s)")),
    "DDPM, up to a thousand": (
        preserving, FlowMatching("net(x, 1000 * s)", noise_time=1.0, data_time=0.0),
        "take VariancePreserving('net(x, s)')", VariancePreserving("net(x, s)")),
    "DDPM's prediction": (
        preserving, VariancePreserving("net(x, s)", prediction_type="v_prediction"),
        "with prediction_type='epsilon' its answers fit", VariancePreserving("net(x, s)")),
    "DDPM's time": (
        preserving, VariancePreserving("net(x, s / 1000)"), "call='net(x, s)'", VariancePreserving("net(x, s)")),
    "velocity of a DDPM": (
        lambda u, x, s: u(x, s, s), VariancePreserving("net(x, s / 1000)"),
        "take Adapter('net(x, s)')", FlowMatching()),
    "velocity": (lambda u, x, s: u(x, s, s), Denoiser("net(x, s)"), "take Adapter('net(x, s)')", FlowMatching()),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_conventions_of_trained_networks(name):
    body, adapter, remedy, mended = WRONG[name]
    network = Foreign(body)
    x = network.truth.data()
    flow_map = adapter(network)
    with pytest.raises(ConventionError, match=r"points the wrong way|jumps to another place") as caught:
        check_convention(flow_map, x)
    assert remedy in str(caught.value)
    assert flow_map.adapter is adapter
    check_convention(flow_map, x[:7])  # too few to judge
    if mended is None:
        return
    mended = mended(network)
    check_convention(mended, x)
    at = torch.full((len(x),), 0.5)
    assert torch.allclose(mended(x, 0.5, 0.5), network.truth(x, at, at), rtol=0.1, atol=1e-9)


def test_channels_on_the_wrong_axis():
    network = Foreign(lambda u, x, s: u(x.movedim(-1, 1), s, s).movedim(1, -1), (4, 4, 4))
    x = network.truth.data()
    check_convention(FlowMatching("net(x, s)", channels_last=True)(network), x)
    with pytest.raises(ConventionError, match="give the adapter channels_last=True"):
        check_convention(FlowMatching("net(x, s)")(network), x)


def test_right_adapters_pass_at_every_age():
    truth = Truth()
    for seed in range(2):
        torch.manual_seed(seed)
        network = Dense(3, nn.SiLU, 2)
        nn.init.zeros_(network.layers[-1].weight)
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        flow_maps = {
            "jumps": Adapter(directions="to_data")(network),
            "velocity": FlowMatching("net(x, s, s)")(network),
        }
        for step in range(101):
            if step in (0, 1, 3, 10, 20, 40, 100):
                for flow_map in flow_maps.values():
                    check_convention(flow_map, truth.data())
            x, noise, s = truth.data(128), torch.randn(128, 3), torch.rand(128)
            z = (1 - s)[:, None] * noise + s[:, None] * x
            loss = (network(z, s, s) - (x - noise)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_times_that_a_network_does_not_bear_are_tried_on_a_copy():
    # where an index that is too large would stop the device for good
    seen = []

    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1001, 3)
            self.there = True

        def __deepcopy__(self, memo):
            other = Indexed()
            other.load_state_dict(self.state_dict())
            other.there = False
            return other

        def forward(self, x, s):
            if self.there:
                seen.append(float(s.max()))
            return x + self.table((s * 1000).long())

    flow_map = FlowMatching("net(x, s)")(Indexed())
    x, t = torch.randn(10, 3), torch.rand(10)
    ask = _Asker(flow_map, torch.device("cuda"))
    scaled = Adapter("net(x, 1000 * s)", directions="none")
    with pytest.raises(_UnfitError):
        ask(scaled, x, t, t, None)
    assert not seen
    assert torch.equal(ask(Adapter("net(x, s / 2)", directions="none"), x, t, t, None), flow_map(x, t / 2, t / 2))
    assert flow_map.adapter.call.text == "net(x, s)"
