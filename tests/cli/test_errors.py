"""What is refused, and that the message says why."""

import math

import pytest
import torch

from f2d2_lightning import (
    Direction,
    DivergenceHead,
    FlowMap,
    GaussianBaseline,
    Hutchinson,
    Intervals,
    Inversion,
    JointFlowMap,
    JointMap,
    TrajectoryRegression,
    Weighting,
    as_flow_map,
    log_prob,
    reference_log_prob,
    reference_sample,
    sample,
)
from f2d2_lightning.divergence import Conditional, Exact
from f2d2_lightning.flows import MixtureFlow, Point, TrigonometricPath
from f2d2_lightning.nn import MLP, GaussianPreconditioned, PreconditionedMLP, ResNet
from f2d2_lightning.objectives import ConditionalSource, Consistency, Eulerian, Lagrangian, Semigroup, TeacherSource
from problems import PROBLEMS

X = torch.zeros(4, 3, dtype=torch.float64)
SHRINK = lambda x, t, cond: -x  # noqa: E731


@pytest.fixture
def flow():
    return PROBLEMS["gaussian-vector-linear"]().field


def one_way(direction):
    class OneWay(JointMap):
        directions = Direction.parse(direction)

        def joint(self, x, s, t, cond):
            return PROBLEMS["gaussian-vector-linear"]().field(x, s, t)

    return OneWay()


CALLS = {
    "forward": lambda joint_map, s, t: joint_map(X, s, t),
    "jump": lambda joint_map, s, t: joint_map.jump(X, s, t),
    "flow map jump": lambda joint_map, s, t: as_flow_map(lambda *a: joint_map(*a).velocity).jump(X, s, t),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [float, torch.tensor, lambda v: torch.tensor([0.5, 0.5, v, 0.5])])
@pytest.mark.parametrize("time", [-0.01, 1.01, 1000.0, math.nan, math.inf])
def test_times_outside_the_unit_interval(flow, call, make, time):
    with pytest.raises(ValueError, match=r"^s lies in .* times lie in \[0, 1\]"):
        CALLS[call](flow, make(time), 0.5)
    with pytest.raises(ValueError, match=r"^t lies in .* times lie in \[0, 1\]"):
        CALLS[call](flow, 0.5, make(time))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 4), (5,)], ids=str)
def test_times_of_another_shape(flow, call, shape):
    with pytest.raises(ValueError, match=r"a time has shape .* needs \(\) or \(4,\)"):
        CALLS[call](flow, torch.full(shape, 0.5), 0.7)
    with pytest.raises(ValueError, match=r"a time has shape .* needs \(\) or \(4,\)"):
        CALLS[call](flow, 0.2, torch.full(shape, 0.5))


ASKED = {
    "to_data": [
        lambda m: m(X, 0.7, 0.2),
        lambda m: m.jump(X, 1.0, 0.0),
        lambda m: m.jump(X, torch.tensor([0.1, 0.2, 0.3, 0.9]), 0.5),
    ],
    "to_noise": [
        lambda m: m(X, 0.2, 0.7),
        lambda m: m.jump(X, 0.0, 1.0),
        lambda m: sample(m, X),
        lambda m: sample(m, X, with_log_prob=True),
        lambda m: log_prob(m, X, inversion=Inversion()),
    ],
}


@pytest.mark.parametrize(("direction", "index"), [(d, i) for d in ASKED for i in range(len(ASKED[d]))])
def test_direction_that_a_map_does_not_have(direction, index):
    message = {"to_data": r"asked for s > t \(data to noise\)", "to_noise": r"asked for s < t \(noise to data\)"}
    with pytest.raises(ValueError, match=message[direction] + r".*directions=\"both\""):
        ASKED[direction][index](one_way(direction))


def test_directions_that_a_map_has_are_answered():
    with pytest.raises(ValueError, match=r"pass inversion=Inversion\(\), or train the map in both directions"):
        log_prob(one_way("to_data"), X)
    one_way("to_data").jump(X, 0.2, 0.2)
    one_way("to_noise").jump(X, 0.2, 0.2)
    sample(one_way("to_data"), X, with_log_prob=True)
    log_prob(one_way("to_noise"), X)


ENTRANCES = {
    "log_prob": (lambda flow, x: log_prob(flow, x), "x"),
    "sample": (lambda flow, x: sample(flow, x), "noise"),
    "reference_log_prob": (lambda flow, x: reference_log_prob(flow, x, steps=1), "x"),
    "reference_sample": (lambda flow, x: reference_sample(flow, x, steps=1), "noise"),
}
BAD_STATES = {
    "integers": (X.long(), "has dtype torch.int64; it must be floating"),
    "NaN": (torch.where(torch.arange(4)[:, None] == 2, math.nan, X), "NaN or infinity in 1 of 4 samples"),
    "infinity": (X + math.inf, "NaN or infinity in 4 of 4 samples"),
    "no batch": (X[0], r"has shape \(3,\); it must be \(B, ...\)"),
    "empty": (X[:0], r"has shape \(0, 3\); it must be \(B, ...\)"),
}


@pytest.mark.parametrize("state", BAD_STATES)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_unfit_states(flow, entrance, state):
    call, name = ENTRANCES[entrance]
    x, message = BAD_STATES[state]
    with pytest.raises(ValueError, match=f"^{name} .*{message}"):
        call(flow, x)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "steps=0; it must be at least 1"),
        ([0.0, 0.5], "distinct times that include 0 and 1"),
        ([0.5, 1.0], "distinct times that include 0 and 1"),
        ([0.0, 0.5, 0.5, 1.0], "distinct times"),
        ([-0.5, 0.0, 1.0], "distinct times"),
        ([0.0, 1.0, 2.0], "distinct times"),
        ([], "distinct times"),
        ([0.0, math.nan, 1.0], "nan"),
        (2.5, "steps=2.5 is a float; int or Sequence"),
        (4.0, "steps=4.0 is a float; int or Sequence"),
        (None, "steps=None is a NoneType; int or Sequence"),
        ("4", "steps='4' is a str; int or Sequence"),
    ],
    ids=str,
)
@pytest.mark.parametrize("entrance", [log_prob, sample])
def test_steps(flow, entrance, steps, message):
    with pytest.raises(ValueError, match=message):
        entrance(flow, X, steps)


def test_likelihoods_need_a_divergence():
    with pytest.raises(ValueError, match=r"needs a joint map.*JointFlowMap"):
        sample(MLP((3,)), X, with_log_prob=True)
    for flow_map in (MLP((3,)), as_flow_map(lambda x, s, t, cond: x), PreconditionedMLP((3,))):
        for inversion in (None, Inversion()):
            with pytest.raises(
                ValueError, match=r"log_prob needs a joint map, and \w+ has no divergence.*JointFlowMap"
            ):
                log_prob(flow_map, X, inversion=inversion)


@pytest.mark.parametrize("entrance", [reference_log_prob, reference_sample])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "leapfrog"}, "method is 'leapfrog'; it is one of 'euler', .*'dopri5'"),
        ({"method": "euler", "steps": 0}, "steps=0; it must be at least 1"),
        ({"method": "dopri5", "steps": 10}, "chooses its own steps"),
    ],
)
def test_reference_settings(entrance, arguments, message):
    with pytest.raises(ValueError, match=message):
        entrance(SHRINK, X, **arguments)


def test_conditional_needs_the_pair(flow):
    with pytest.raises(ValueError, match=r"needs the pair \(data, noise\)"):
        Conditional()(SHRINK, Point(X, 0.5))
    with pytest.raises(ValueError, match=r"needs the pair \(data, noise\)"):
        reference_log_prob(SHRINK, X, divergence=Conditional(), steps=1)
    with pytest.raises(ValueError, match="exists only on the path of a data pair"):
        ConditionalSource(flow)(Point(X, 0.5))


@pytest.mark.parametrize("network", [MLP((3,)), ResNet((1, 2, 2))], ids=["mlp", "resnet"])
def test_states_of_another_shape(network):
    takes = ", ".join(map(str, network.shape))
    for call in (lambda x: network(x, 0.0, 1.0), lambda x: sample(network, x)):
        with pytest.raises(ValueError, match=rf"states have shape \(4, 2\), but the network takes \(B, {takes}\)"):
            call(X[:, :2])


@pytest.mark.parametrize("features", [1, 2])
def test_gaussian_of_states_of_another_shape(flow, features):
    for joint_map in (flow, GaussianPreconditioned(MLP((3,)), flow.baseline)):
        with pytest.raises(ValueError, match="shape"):
            joint_map(X[:, :1].expand(4, features), 0.0, 1.0)


@pytest.mark.parametrize("make", [lambda: MLP((3,), classes=2), lambda: ResNet((3, 2, 2), classes=2)])
def test_classes(make):
    network = make()
    x = torch.zeros(4, *network.shape)
    with pytest.raises(ValueError, match=r"has 2 classes and needs cond of shape \(B,\), integers; got none"):
        network(x, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"integers; got dtype torch.float64"):
        network(x, 0.0, 1.0, torch.zeros(4))


def test_features():
    head = DivergenceHead(features=8)
    for features, came in ((None, "none"), (torch.zeros(4, 7), r"shape \(4, 7\)"), (torch.zeros(8), r"shape \(8,\)")):
        with pytest.raises(ValueError, match=f"reads features of 8 channels.*got {came}"):
            head(X, 0.0, 1.0, features=features)
    with pytest.raises(ValueError, match="reads features of 8 channels"):
        JointFlowMap(MLP((3,), width=16), head)(X, 0.0, 1.0)
    head = DivergenceHead(features=8, layers=0, per_axis=True, baseline=GaussianBaseline((3,)))
    with pytest.raises(ValueError, match=r"per_axis=True reads features \(B, F\), got \(4, 8, 2, 2\)"):
        head(X, 0.0, 1.0, features=torch.zeros(4, 8, 2, 2))


def test_a_flow_map_without_features_says_so():
    with pytest.raises(NotImplementedError, match=r"gives no features.*DivergenceHead\(network=...\)"):
        JointFlowMap(as_flow_map(lambda x, s, t, cond: x), DivergenceHead(features=8))(X, 0.0, 1.0)
    with pytest.raises(NotImplementedError, match="must define forward"):
        FlowMap()(X, 0.0, 1.0)


def test_gaussian_fit():
    baseline = GaussianBaseline((3,))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        baseline.fit([torch.zeros(1, 3)])
    with pytest.raises(ValueError, match=r"samples of shape \(2,\), the baseline \(3,\)"):
        baseline.fit([torch.zeros(5, 2)])
    with pytest.raises(ValueError, match="NaN or infinite"):
        baseline.fit([torch.full((5, 3), math.nan)])
    with pytest.raises(ValueError, match="negative eigenvalue"):
        GaussianBaseline.from_covariance(torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])))
    assert not bool(baseline.fitted)


def test_mixture():
    with pytest.raises(ValueError, match="must be positive and as many as"):
        MixtureFlow(torch.ones(2), torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    with pytest.raises(ValueError, match="must be positive"):
        MixtureFlow(torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))


SETTINGS = {
    "chunk=0; it must be at least 1": lambda: Exact(0),
    "probes=0": lambda: Hutchinson(0),
    "distribution is 'cauchy'": lambda: Hutchinson(distribution="cauchy"),
    "mode is 'backward'": lambda: Hutchinson(mode="backward"),
    "step=0.0; it must be positive": lambda: Hutchinson(step=0.0),
    "handover is 1.5": lambda: Conditional(1.5),
    "covariance is 'banded'": lambda: GaussianBaseline((3,), "banded"),
    "direction is 'up'": lambda: Direction.parse("up"),
    r"diagonal \+ grid=1.2": lambda: Intervals(diagonal=0.6, grid=0.6),
    "diagonal=-0.1; it must be a share": lambda: Intervals(diagonal=-0.1),
    "the least of steps=0; it must be at least 1": lambda: Intervals(steps=(0, 1)),
    "length is 1": lambda: Intervals(length=1.0),
    "method is 'secant'": lambda: Inversion("secant"),
    "max_iterations=0": lambda: Inversion(max_iterations=0),
    "tolerance=0.0": lambda: Inversion(tolerance=0.0),
    "split is 'thirds'": lambda: Semigroup("thirds"),
    r"Intervals\(diagonal=...\) must be positive": lambda: Semigroup(intervals=Intervals(diagonal=0.0)),
    "consistency maps only go to data": lambda: Consistency(Intervals("both")),
    "divergence=-1": lambda: Weighting(divergence=-1.0),
    r"adaptive=2.0; it must be a share, in \[0, 1\]": lambda: Weighting(adaptive=2.0),
    "starts is": lambda: TrajectoryRegression(starts={"middle": 1.0}),
    "shares that are not negative": lambda: TrajectoryRegression(starts={"data": 1.0, "noise": -1.0}),
    "nodes=0": lambda: TrajectoryRegression(nodes=0),
    "units is 'bits'; it is one of 'natural', 'velocity'": lambda: Weighting(units="bits"),
    "diagonal=0.0; it must be positive": lambda: Weighting(diagonal=0.0),
    "to_noise=1.5": lambda: Intervals(to_noise=1.5),
    r"perturbation is \(0.3, 0.02\); two positive numbers": lambda: TrajectoryRegression(perturbation=(0.3, 0.02)),
    r"perturbation is \(0.0, 0.3\)": lambda: TrajectoryRegression(perturbation=(0.0, 0.3)),
    "unroll=1.5": lambda: TrajectoryRegression(unroll=1.5),
    r"near_data=1; it is a share of the nodes, in \[0, 1\)": lambda: TrajectoryRegression(near_data=1),
    "refresh=-1": lambda: TrajectoryRegression(refresh=-1.0),
    "chunk=0; it must": lambda: TrajectoryRegression(chunk=0),
    "per_axis=True weights features by the baseline's axes": lambda: DivergenceHead(features=3, per_axis=True),
    "give features=F and a baseline": lambda: DivergenceHead(
        network=MLP((3,)), per_axis=True, baseline=GaussianBaseline((3,))
    ),
    "Conditional holds on the linear path only, and the path is TrigonometricPath": lambda: ConditionalSource(
        PROBLEMS["gaussian-vector-trigonometric"]().field, Conditional(), TrigonometricPath()
    ),
    "either features=F": lambda: DivergenceHead(),
    "to read the backbone, or network": lambda: DivergenceHead(features=3, network=MLP((3,))),
    "layers=-1; it must be at least 0": lambda: DivergenceHead(features=3, layers=-1),
    "hidden=0; it must be at least 1": lambda: DivergenceHead(features=3, hidden=0),
    "even H and W": lambda: ResNet((1, 3, 4)),
    r"takes \(C, H, W\)": lambda: ResNet((3,)),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings(message):
    with pytest.raises(ValueError, match=message):
        SETTINGS[message]()


def test_objectives_keep_no_foreign_state():
    for objective in (Eulerian(), Lagrangian()):
        assert objective.state_dict() == {}
        objective.load_state_dict({})
        with pytest.raises(ValueError, match=r"keeps no state, and the checkpoint holds \['pool'\]"):
            objective.load_state_dict({"pool": 1})


def test_a_source_answers_detached(flow):
    with torch.enable_grad():
        v, divergence = TeacherSource(flow, Exact())(Point(X.clone().requires_grad_(True), 0.5))
    assert not v.requires_grad
    assert not divergence.requires_grad
