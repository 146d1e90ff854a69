"""The contract of a flow map, on maps that keep it and on maps that break one thing each."""

import copy

import pytest
import torch
from torch import nn

from f2d2_lightning import DivergenceHead, FlowMap, JointFlowMap, as_flow_map
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


class FewFeatures(Honest):
    def forward_features(self, x, s, t, cond=None):
        return self(x, s, t, cond), x.flatten(1)[:2]


class RestlessFeatures(Honest):
    def forward_features(self, x, s, t, cond=None):
        return self(x, s, t, cond), torch.randn(len(x), 4)


class OtherVelocityBesideFeatures(Honest):
    def forward_features(self, x, s, t, cond=None):
        return self(x, t, s, cond), x.flatten(1)


class NarrowAnswer(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, s, t)[:, :1]


class SingleAnswer(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, s, t).float()


class NanAtTheEnd(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, s, t) + 0 * torch.log(expand_time(s, x))[:, None, None, None]


class OneTimeForAll(Honest):
    def forward(self, x, s, t, cond=None):
        s, t = expand_time(s, x), expand_time(t, x)
        return super().forward(x, s[:1].expand(len(x)), t[:1].expand(len(x)))


class NumbersOnly(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, float(s), float(t))


class MovesAtRest(Honest):
    def jump(self, x, s, t, cond=None):
        return super().jump(x, s, t, cond) + 1e-3


class JumpsBack(Honest):
    def jump(self, x, s, t, cond=None):
        return 2 * x - super().jump(x, s, t, cond)


class OtherVelocity(Honest):
    def velocity(self, x, t, cond=None):
        return -self(x, t, t, cond)


class NoRefusal(Honest):
    def __init__(self):
        super().__init__()
        self.directions = FlowMap.directions.parse("to_data")

    def jump(self, x, s, t, cond=None):
        s, t = expand_time(s, x), expand_time(t, x)
        return x + like(t - s, x) * self(x, s, t)


class AllRefused(Honest):
    def jump(self, x, s, t, cond=None):
        if bool((torch.as_tensor(t) < torch.as_tensor(s)).any()):
            raise ValueError("only to data")
        return super().jump(x, s, t, cond)


class BatchNormed(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, s, t) - 0.1 * x.mean(0)


class Restless(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, s, t) + 1e-3 * torch.randn_like(x)


class EndIgnored(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, s, s)


class HalfDetached(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, s, t) + x.detach().sin() - x.sin()


class NoInference(Honest):
    def forward(self, x, s, t, cond=None):
        if torch.is_inference_mode_enabled():
            return torch.zeros_like(x)
        return super().forward(x, s, t)


class CopyOfItself(Honest):
    def __deepcopy__(self, memo):
        return self


class StaleCache(Honest):
    kept = None

    def forward(self, x, s, t, cond=None):
        if self.kept is None:
            self.kept = float(self.gain.detach())
        return super().forward(x, s, t) / self.gain * self.kept

    def load_state_dict(self, *arguments, **keywords):
        self.kept = 1.5
        return super().load_state_dict(*arguments, **keywords)


class Flipped(Honest):
    def forward(self, x, s, t, cond=None):
        return -super().forward(x, s, t)


class Swapped(Honest):
    def forward(self, x, s, t, cond=None):
        return super().forward(x, t, s)


class Mirrored(Honest):
    def forward(self, x, s, t, cond=None):
        return -super().forward(x, 1 - s, 1 - t)


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


BROKEN = [
    (FewFeatures, "test_features"),
    (RestlessFeatures, "test_features"),
    (OtherVelocityBesideFeatures, "test_features"),
    (NarrowAnswer, "test_shape_and_dtype"),
    (SingleAnswer, "test_shape_and_dtype"),
    (NanAtTheEnd, "test_shape_and_dtype"),
    (OneTimeForAll, "test_times_of_either_shape"),
    (NumbersOnly, "test_times_of_either_shape"),
    (MovesAtRest, "test_no_time_no_move"),
    (JumpsBack, "test_jump_is_average_velocity"),
    (OtherVelocity, "test_jump_is_average_velocity"),
    (NoRefusal, "test_directions"),
    (AllRefused, "test_directions"),
    (BatchNormed, "test_samples_are_independent"),
    (Restless, "test_samples_are_independent"),
    (EndIgnored, "test_second_time_matters"),
    (HalfDetached, "test_derivatives"),
    (NoInference, "test_inference_mode"),
    (CopyOfItself, "test_copies"),
    (StaleCache, "test_copies"),
    (Flipped, "test_exact_answers"),
    (Swapped, "test_exact_answers"),
    (Mirrored, "test_exact_answers"),
]


def test_an_honest_map_passes():
    assert failures(honest()) == set()


@pytest.mark.parametrize(("broken", "check"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_map_fails_its_check(broken, check):
    assert check in failures(honest(make_flow_map=lambda self: broken()))


def test_every_check_can_fail():
    assert set(CHECKS) == {check for _, check in BROKEN} | {"test_joint"}


@pytest.mark.parametrize("broken", [WideDivergence, FlippedLogProb])
def test_a_broken_joint_map_fails(broken):
    assert failures(honest(make_joint=lambda self: broken(Closed.problem.baseline))) == {"test_joint"}


def test_a_joint_map_of_another_backbone_fails():
    case = honest(make_joint=lambda self: JointFlowMap(Flipped(), DivergenceHead(8)))
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
