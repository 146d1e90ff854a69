"""The contract of a flow map, on maps that keep it and on maps that break one thing each."""

import copy

import pytest
import torch
from torch import nn

from f2d2_lightning import Direction, DivergenceHead, FlowMap, JointFlowMap, as_flow_map
from f2d2_lightning.adapters import Adapter, Consistency, MeanFlow, TorchCFM
from f2d2_lightning.divergence import Exact
from f2d2_lightning.flows import GaussianFlow, Jump, Point
from f2d2_lightning.flows.paths import expand_time, like
from f2d2_lightning.testing import FlowMapContract
from problems import PROBLEMS, randomize


class Conv(nn.Module):
    """A small class-conditional network that takes images and two times."""

    def __init__(self):
        super().__init__()
        self.times = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 8))
        self.labels = nn.Embedding(4, 8)
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, s, t, y=None):
        embedded = self.times(torch.stack((s, t), -1)) + (0 if y is None else self.labels(y))
        return self.last(torch.tanh(self.first(x) + embedded[:, :, None, None]))


def conv():
    torch.manual_seed(1)
    return randomize(Conv())


class Closed(FlowMapContract):
    """A rotated Gaussian whose velocity, divergence and jumps are known."""

    problem = PROBLEMS["gaussian-image-linear"]()

    def make_flow_map(self):
        return as_flow_map(lambda x, s, t, cond: self.problem.baseline.average_velocity(x, s, t))

    def make_states(self):
        return torch.randn(3, *self.problem.shape, generator=torch.Generator().manual_seed(0))

    def make_joint(self):
        return GaussianFlow(self.problem.baseline)

    def exact_velocity(self, x, t, cond):
        return self.problem.velocity(x, t)

    def exact_jump(self, x, s, t, cond):
        return self.problem.jump(x, s, t)[0]


class TestClosedForm(Closed):
    pass


class TestToNoiseOnly(Closed):
    def make_flow_map(self):
        return as_flow_map(lambda x, s, t, cond: self.problem.baseline.average_velocity(x, s, t), "to_noise")


class TestAdaptedImages(FlowMapContract):
    has_features = True

    def make_flow_map(self):
        return MeanFlow("net(x, s, t, cond)", directions="both")(conv())

    def make_states(self):
        return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def make_conditioning(self):
        return torch.tensor([2, 0, 1])

    def make_joint(self):
        return JointFlowMap(self.make_flow_map(), randomize(DivergenceHead(8)))


class TestAddedInterval(TestAdaptedImages):
    def make_flow_map(self):
        flow_map = MeanFlow("net(x, s, s, cond)")(conv(), interval="times")
        randomize(flow_map.interval, seed=2)
        return flow_map


class TestTeacher(Closed):
    make_joint = FlowMapContract.make_joint

    def make_flow_map(self):
        return TorchCFM()(lambda t, x, y: self.problem.velocity(x, t))


class TestConsistencyModel(Closed):
    grid = (0.0, 1.0)
    exact_tolerance = 1e-5
    make_joint = FlowMapContract.make_joint

    def make_flow_map(self):
        def endpoint(x, sigma):
            tau = 1 / (1 + sigma)
            return self.problem.jump(like(tau, x) * x, tau, torch.ones_like(tau))[0]

        return Consistency("net(x, s)", sigma_min=1e-9, sigma_max=1e9)(endpoint)

    def exact_velocity(self, x, t, cond):
        return None


CHECKS = [name for name in dir(FlowMapContract) if name.startswith("test_")]


def failures(contract):
    failed = set()
    for name in CHECKS:
        try:
            getattr(contract, name)()
        except Exception:
            failed.add(name)
    return failed


class Honest(FlowMap):
    """Keeps the contract, with weights and features."""

    def __init__(self):
        super().__init__()
        self.baseline = copy.deepcopy(Closed.problem.baseline)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, s, t, cond=None):
        return self.gain * self.baseline.average_velocity(x, expand_time(s, x), expand_time(t, x))

    def forward_features(self, x, s, t, cond=None):
        return self(x, s, t, cond), torch.tanh(x.flatten(1))


def u(honest, x, s, t):
    """What an honest map answers."""
    return Honest.forward(honest, x, s, t)


def jump(honest, x, s, t):
    return Honest.jump(honest, x, s, t)


def ignoring_directions(honest, x, s, t):
    s, t = expand_time(s, x), expand_time(t, x)
    return x + like(t - s, x) * u(honest, x, s, t)


def to_data_alone(honest, x, s, t):
    if bool((torch.as_tensor(t) < torch.as_tensor(s)).any()):
        raise ValueError("only to data")
    return jump(honest, x, s, t)


def first_times(honest, x, s, t):
    return u(honest, x, *(expand_time(time, x)[:1].expand(len(x)) for time in (s, t)))


def nan_at_the_end(honest, x, s, t):
    return u(honest, x, s, t) + 0 * torch.log(expand_time(s, x))[:, None, None, None]


def zero_in_inference(honest, x, s, t):
    return torch.zeros_like(x) if torch.is_inference_mode_enabled() else u(honest, x, s, t)


def by_a_kept_gain(honest, x, s, t):
    kept = honest.__dict__.setdefault("kept", float(honest.gain.detach()))
    return u(honest, x, s, t) / honest.gain * kept


def kept_on_loading(honest, state):
    honest.kept = 1.5
    return Honest.load_state_dict(honest, state)


# which check each is caught by, and what is wrong
BROKEN = {
    "few features": ("features", {"forward_features": lambda m, x, s, t: (u(m, x, s, t), x.flatten(1)[:2])}),
    "restless features": ("features", {"forward_features": lambda m, x, s, t: (u(m, x, s, t), torch.randn(len(x), 4))}),
    "another u beside": ("features", {"forward_features": lambda m, x, s, t: (u(m, x, t, s), x.flatten(1))}),
    "narrow": ("shape_and_dtype", {"forward": lambda m, x, s, t: u(m, x, s, t)[:, :1]}),
    "single": ("shape_and_dtype", {"forward": lambda m, x, s, t: u(m, x, s, t).float()}),
    "nan at the end": ("shape_and_dtype", {"forward": nan_at_the_end}),
    "one time for all": ("times_of_either_shape", {"forward": first_times}),
    "numbers only": ("times_of_either_shape", {"forward": lambda m, x, s, t: u(m, x, float(s), float(t))}),
    "moves at rest": ("no_time_no_move", {"jump": lambda m, x, s, t: jump(m, x, s, t) + 1e-3}),
    "jumps back": ("jump_is_average_velocity", {"jump": lambda m, x, s, t: 2 * x - jump(m, x, s, t)}),
    "another velocity": ("jump_is_average_velocity", {"velocity": lambda m, x, t, _: -u(m, x, t, t)}),
    "no refusal": ("directions", {"jump": ignoring_directions, "directions": Direction.TO_DATA}),
    "all refused": ("directions", {"jump": to_data_alone}),
    "batch normed": ("samples_are_independent", {"forward": lambda m, x, s, t: u(m, x, s, t) - 0.1 * x.mean(0)}),
    "restless": ("samples_are_independent", {"forward": lambda m, x, s, t: u(m, x, s, t) + torch.randn_like(x)}),
    "end ignored": ("second_time_matters", {"forward": lambda m, x, s, t: u(m, x, s, s)}),
    "half detached": ("derivatives", {"forward": lambda m, x, s, t: u(m, x, s, t) + x.detach().sin() - x.sin()}),
    "no inference": ("inference_mode", {"forward": zero_in_inference}),
    "copy of itself": ("copies", {"__deepcopy__": lambda m, memo: m}),
    "stale cache": ("copies", {"forward": by_a_kept_gain, "load_state_dict": kept_on_loading}),
    "flipped": ("exact_answers", {"forward": lambda m, x, s, t: -u(m, x, s, t)}),
    "swapped": ("exact_answers", {"forward": lambda m, x, s, t: u(m, x, t, s)}),
    "mirrored": ("exact_answers", {"forward": lambda m, x, s, t: -u(m, x, 1 - s, 1 - t)}),
}


def broken(name):
    """An honest map with some methods in place of its own, which are called without conditioning."""
    _, changes = BROKEN[name]
    methods = {
        key: (lambda m, *a, cond=None, change=change: change(m, *a[:3])) if callable(change) else change
        for key, change in changes.items()
    }
    return type("Broken", (Honest,), methods)()


class WideDivergence(GaussianFlow):
    def joint(self, x, s, t, cond):
        answer = super().joint(x, s, t, cond)
        return answer._replace(divergence=answer.divergence[:, None])


class FlippedLogProb(GaussianFlow):
    def jump(self, x, s, t, cond=None):
        state, change = super().jump(x, s, t, cond)
        return Jump(state, -change)


def honest(**changes):
    members = {"make_flow_map": lambda self: Honest()} | changes
    return type("Case", (Closed,), members)()


def test_an_honest_map_passes():
    assert failures(honest()) == set()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_map_fails_its_check(name):
    assert f"test_{BROKEN[name][0]}" in failures(honest(make_flow_map=lambda self: broken(name)))


def test_every_check_can_fail():
    assert set(CHECKS) == {f"test_{check}" for check, _ in BROKEN.values()} | {"test_joint"}


@pytest.mark.parametrize("kind", [WideDivergence, FlippedLogProb])
def test_a_broken_joint_map_fails(kind):
    assert failures(honest(make_joint=lambda self: kind(Closed.problem.baseline))) == {"test_joint"}


def test_a_joint_map_of_another_backbone_fails():
    case = honest(make_joint=lambda self: JointFlowMap(broken("flipped"), DivergenceHead(8)))
    assert failures(case) == {"test_joint"}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_divergence_is_checked(sign):
    def divergence(self, x, t, cond):
        return sign * Exact()(lambda y, r, c: self.problem.velocity(y, r), Point(x, t)).divergence

    assert failures(honest(exact_divergence=divergence)) == (set() if sign == 1 else {"test_exact_answers"})


def test_what_is_missing_is_named():
    class Bare(FlowMapContract):
        def make_states(self):
            return torch.randn(2, 3)

    with pytest.raises(NotImplementedError, match="Bare must define make_flow_map"):
        Bare().test_shape_and_dtype()
    case = honest(make_states=lambda self: torch.randn(1, 2, 2, 2))
    with pytest.raises(AssertionError, match="at least two states"):
        case.test_derivatives()


def test_a_function_without_features_is_not_asked_for_them():
    case = honest(make_flow_map=lambda self: Adapter()(lambda x, s, t, cond: Honest()(x, s, t)))
    assert failures(case) == set()
