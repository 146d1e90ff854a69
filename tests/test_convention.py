"""What the check before training refuses, one of each kind, beside right networks of many kinds that pass."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from f2d2_lightning.adapters import Adapter, ConventionError, check_convention


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

    with pytest.raises(ConventionError, match="lost|finite") as caught:
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
    with pytest.raises(ConventionError, match="it is 0 in reverse mode"):
        check_convention(Adapter()(Undifferentiated()), x, mode="reverse")
    with pytest.raises(ConventionError, match="in reverse mode"):
        check_convention(Adapter()(DetachedInside()), x, mode="reverse")
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
        pairs = zip(widths, widths[1:], strict=False)
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


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet, self.outlet, self.norm = nn.Linear(2, 16), nn.Linear(16, 2), nn.LayerNorm(16)
        self.mixed, self.times = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, s, t, cond=None):
        h = self.inlet(x.flatten(2).mT) + self.times(torch.cat((sinusoids(s), sinusoids(t)), 1))[:, None]
        q, k, v = self.mixed(self.norm(h)).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        h = h + (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2)
        return self.outlet(self.norm(h)).mT.reshape(x.shape)


RIGHT = {
    "kinks": (lambda: Dense(3, nn.ReLU, 2), (3,)),
    "many kinks": (lambda: Dense(3, nn.ReLU, 8), (3,)),
    "flat": (lambda: Dense(3, nn.Hardtanh, 3), (3,)),
    "smooth": (lambda: Dense(3, nn.SiLU, 3), (3,)),
    "waves of the state": (lambda: Dense(2, nn.SiLU, 3, 100.0), (2,)),
    "short waves of the state": (lambda: Dense(2, nn.SiLU, 3, 10_000.0), (2,)),
    "convolutions": (lambda: Convolutions(nn.SiLU, False), (2, 4, 4)),
    "pooled convolutions with kinks": (lambda: Convolutions(nn.ReLU, True), (2, 4, 4)),
    "attention": (Tokens, (2, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RIGHT)
def test_right_derivatives_are_never_refused(name, dtype):
    make, shape = RIGHT[name]
    for seed in range(2):
        for gain in (0.0, 0.1, 1.0, 4.0, 20.0):
            torch.manual_seed(seed)
            network = make().to(dtype)
            with torch.no_grad():
                for p in network.parameters():
                    if p.ndim > 1:
                        p.mul_(gain)
            x = torch.randn(12, *shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            flow_map = Adapter("net(x, s, s)", directions="none")(network)
            for mode in ("forward", "reverse") if gain == 1 else ("forward",):
                check_convention(flow_map, x, mode=mode)
