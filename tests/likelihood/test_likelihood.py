"""Few-step samples and likelihoods: exact for closed-form maps, forwards, backwards and by inversion."""

import warnings

import pytest
import torch

from f2d2_lightning import Direction, DivergenceHead, Inversion, JointFlowMap, JointMap, as_flow_map, log_prob, sample
from f2d2_lightning.flows import Joint
from f2d2_lightning.nn import MLP
from problems import PROBLEMS, Logistic, LogisticMap, ToData, moved, randomize

close = torch.testing.assert_close
GRIDS = [1, 2, 8, [0.0, 0.1, 0.75, 1.0], [1.0, 0.9, 0.0], torch.tensor([0.0, 0.3, 1.0])]
METHODS = ["anderson", "newton"]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
class TestClosedForm:
    def test_log_prob(self, gaussian, grid):
        x = gaussian.states(6, 1.0)
        answer = log_prob(gaussian.field, x, grid)
        close(answer.value, gaussian.log_prob(x, torch.ones(6)), rtol=1e-9, atol=1e-9)
        close(answer.noise, gaussian.jump(x, torch.ones(6), torch.zeros(6))[0], rtol=1e-9, atol=1e-9)
        assert answer.evaluations == (grid if isinstance(grid, int) else len(grid) - 1)
        assert answer.converged is None

    def test_sample(self, gaussian, grid):
        noise = torch.randn(6, *gaussian.shape)
        answer = sample(gaussian.field, noise, grid, with_log_prob=True)
        close(answer.state, gaussian.jump(noise, torch.zeros(6), torch.ones(6))[0], rtol=1e-9, atol=1e-9)
        close(answer.log_prob, gaussian.log_prob(answer.state, torch.ones(6)), rtol=1e-9, atol=1e-9)
        close(answer.log_prob, log_prob(gaussian.field, answer.state, grid).value, rtol=1e-9, atol=1e-9)
        assert answer.noise is noise
        without = sample(as_flow_map(lambda x, s, t, cond: gaussian.field(x, s, t).velocity), noise, grid)
        close(without.state, answer.state)
        assert without.log_prob is None

    def test_divergence_that_depends_on_the_state(self, grid):
        flow = Logistic()
        x = flow.data(6)
        noise, exact = flow.solve(x)
        answer = log_prob(LogisticMap(flow), x, grid)
        close(answer.value, exact, rtol=1e-9, atol=1e-9)
        close(answer.noise, noise, rtol=1e-9, atol=1e-9)
        back = sample(LogisticMap(flow), noise, grid, with_log_prob=True)
        close(back.state, x, rtol=1e-9, atol=1e-9)
        close(back.log_prob, exact, rtol=1e-9, atol=1e-9)


def bent(directions="both"):
    """A joint map that is neither exact nor consistent with itself."""
    backbone = randomize(MLP((3,), width=8, blocks=1, directions=directions), 0.1)
    return JointFlowMap(backbone, randomize(DivergenceHead(features=8, hidden=8)))


@pytest.mark.parametrize("call", ["log_prob", "sample", "inversion"])
def test_gradients_against_finite_differences(call):
    joint_map, x = bent(), torch.randn(4, 3)
    inversion = Inversion(tolerance=1e-12)
    function = {
        "log_prob": lambda: log_prob(joint_map, x, 3).value.sum(),
        "sample": lambda: sample(joint_map, x, 3, with_log_prob=True).log_prob.sum(),
        "inversion": lambda: log_prob(joint_map, x, 3, inversion=inversion).value.sum(),
    }[call]
    leaves = [joint_map.head.out.weight, joint_map.flow_map.outlet.weight, joint_map.flow_map.inlet.weight]
    gradients = torch.autograd.grad(function(), leaves)
    x.requires_grad_(True)
    (of_x,) = torch.autograd.grad(function(), x)
    x.requires_grad_(False)
    for leaf, gradient in zip([*leaves, x], [*gradients, of_x], strict=True):
        direction = torch.randn_like(leaf)
        expected = moved(function, leaf, direction, 1e-6)
        assert expected.abs() > 1e-4
        close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes(gaussian, dtype):
    x = gaussian.states(4, 1.0)
    expected = gaussian.log_prob(x, torch.ones(4))
    flow = gaussian.field.to(dtype)
    for inversion in (None, Inversion("newton")):
        answer = log_prob(flow, x.to(dtype), 4, inversion=inversion)
        assert answer.value.dtype == answer.noise.dtype == dtype
        close(answer.value.double(), expected, rtol=2e-3, atol=2e-3)
    drawn = sample(flow, torch.randn(4, *gaussian.shape, dtype=dtype), 4, with_log_prob=True)
    assert drawn.state.dtype == drawn.log_prob.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_inversion_is_the_direct_way(gaussian, method, steps):
    x = gaussian.states(5, 1.0)
    with torch.no_grad():
        answer = log_prob(ToData(gaussian.field), x, steps, inversion=Inversion(method))
    close(answer.value, gaussian.log_prob(x, torch.ones(5)), rtol=1e-6, atol=1e-6)
    close(answer.noise, gaussian.jump(x, torch.ones(5), torch.zeros(5))[0], rtol=1e-6, atol=1e-6)
    assert bool(answer.converged.all())


@pytest.mark.parametrize("method", METHODS)
def test_inversion_counts_its_evaluations(gaussian, method):
    calls = 0
    x = gaussian.states(5, 1.0)

    class Counting(ToData):
        def joint(self, y, s, t, cond):
            nonlocal calls
            calls += len(y) / len(x)
            return super().joint(y, s, t, cond)

    with torch.no_grad():
        answer = log_prob(Counting(gaussian.field), x, 2, inversion=Inversion(method))
    # Newton's Jacobian comes with its own values, d calls of one value and one derivative
    if method == "anderson":  # of samples that are asked for longer than others the mean, rounded up at each step
        assert calls <= answer.evaluations < calls + 2
    else:
        assert calls <= answer.evaluations <= 2 * calls


@pytest.mark.parametrize("method", METHODS)
def test_samples_that_are_solved_are_not_asked_again(method):
    sizes = []

    class Uneven(ToData):
        """As far from the identity as the condition says: nowhere for the even samples."""

        def joint(self, y, s, t, cond):
            sizes.append(len(y))
            return Joint(cond["far"][:, None] * y.sin(), y.new_zeros(len(y)))

    x, far = torch.randn(6, 2), torch.tensor([0.0, 0.3, 0.0, 0.6, 0.0, 0.9])
    with torch.no_grad():
        answer = log_prob(Uneven(None), x, 1, {"far": far}, inversion=Inversion(method))
        *asked, last = sizes
        alone = [
            log_prob(Uneven(None), x[i : i + 1], 1, {"far": far[i : i + 1]}, inversion=Inversion(method))
            for i in range(6)
        ]
    # the first look shows that half of them are solved; the change of log-density is asked of all
    assert asked[0] == last == 6
    assert max(asked[1:]) == 3
    close(answer.noise + far[:, None] * answer.noise.sin(), x)
    close(answer.value, torch.cat([each.value for each in alone]))
    assert answer.evaluations < max(each.evaluations for each in alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_an_inversion_begins_where_it_is_told(gaussian, method, steps):
    noise, inversion = torch.randn(4, *gaussian.shape), Inversion(method)
    flow = ToData(gaussian.field)
    with torch.no_grad():
        x = sample(flow, noise, steps).state
        cold = log_prob(flow, x, steps, inversion=inversion)
        warm = log_prob(flow, x, steps, inversion=inversion, start=noise)
    close(warm.value, cold.value)
    close(warm.noise, noise)
    # one look at each step, one for the change of log-density, and the way from the start to where each step begins
    assert warm.evaluations == steps + steps + steps - 1
    assert warm.evaluations < cold.evaluations
    with pytest.raises(ValueError, match=r"start is where an inversion begins.* no inversion"):
        log_prob(flow, x, steps, start=noise)
    with pytest.raises(ValueError, match=r"got shape \(3, "):
        log_prob(flow, x, steps, inversion=inversion, start=noise[:3])


def test_of_several_noises_an_inversion_finds_the_near_one():
    class Folded(JointMap):
        """Noise of either sign leads to the same place, in one step."""

        def joint(self, x, s, t, cond):
            return Joint(x.square() - x, torch.zeros(len(x)))

    x = torch.full((2, 1), 4.0)
    found = log_prob(Folded(), x, 1, inversion=Inversion("newton"), start=torch.tensor([[1.5], [-1.5]]))
    close(found.noise, torch.tensor([[2.0], [-2.0]]))


@pytest.mark.parametrize("method", METHODS)
def test_inversion_of_a_nonlinear_map(method):
    flow = Logistic()
    x = flow.data(6)
    noise, exact = flow.solve(x)
    with torch.no_grad():
        answer = log_prob(ToData(LogisticMap(flow)), x, 4, inversion=Inversion(method))
    close(answer.value, exact, rtol=1e-6, atol=1e-6)
    close(answer.noise, noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_implicit_gradient_is_the_direct_one(gaussian, method):
    x = gaussian.states(5, 1.0).requires_grad_(True)
    inversion = Inversion(method, tolerance=1e-12)
    (direct,) = torch.autograd.grad(log_prob(gaussian.field, x, 2).value.sum(), x)
    (implicit,) = torch.autograd.grad(log_prob(ToData(gaussian.field), x, 2, inversion=inversion).value.sum(), x)
    close(implicit, direct, rtol=1e-6, atol=1e-6)
    ask = lambda y: log_prob(ToData(gaussian.field), y, 2, inversion=inversion).value.sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"take gradients by torch\.autograd\.grad"):
        torch.func.grad(ask)(x.detach())


@pytest.mark.parametrize("method", METHODS)
def test_unconverged_is_never_silent(method):
    problem = PROBLEMS["gaussian-vector-linear"]()
    x = problem.states(5, 1.0)
    x[0] = problem.jump(torch.zeros(1, 3), torch.zeros(1), torch.ones(1))[0][0]

    class Far(JointMap):
        """Easy for the first sample, far for the others."""

        directions = Direction.TO_DATA

        def joint(self, y, s, t, cond):
            far = (torch.arange(len(y)) > 0).to(y)[:, None]
            return Joint(far * 50 * torch.sin(9 * y), y.new_zeros(len(y)))

    with pytest.warns(UserWarning, match="did not converge for 4 of 5 samples"):
        answer = log_prob(Far(), x, 1, inversion=Inversion(method, max_iterations=2))
    assert answer.converged.tolist() == [True, False, False, False, False]
    assert answer.value.isnan().tolist() == [False, True, True, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_prob(Far(), x[:1], 1, inversion=Inversion(method, max_iterations=2))


def test_solution_residual_is_the_residual():
    displacement = lambda y: 0.4 * torch.sin(y @ torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))  # noqa: E731
    x = torch.randn(5, 3)
    for inversion in (Inversion(max_iterations=2), Inversion(), Inversion("newton")):
        with torch.no_grad():
            solution = inversion.solve(displacement, x)
        residual = (solution.state + displacement(solution.state) - x).square().mean(-1).sqrt()
        close(solution.residual, residual)
        assert torch.equal(solution.converged, residual <= 1e-10)


def test_classes_reach_the_map():
    flows = [PROBLEMS["gaussian-vector-linear"]().field, PROBLEMS["gaussian-vector-trigonometric"]().field]

    class Both(JointMap):
        def joint(self, x, s, t, cond):
            answers = [flow(x, s, t) for flow in flows]
            u = torch.where(cond[:, None] == 0, answers[0].velocity, answers[1].velocity)
            return Joint(u, torch.where(cond == 0, answers[0].divergence, answers[1].divergence))

    x, cond = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    both = log_prob(Both(), x, [0.0, 0.4, 1.0], cond)
    one, two = (log_prob(flow, x, [0.0, 0.4, 1.0]) for flow in flows)
    close(both.value, torch.where(cond == 0, one.value, two.value))
    close(sample(Both(), x, 2, cond).state[1], sample(flows[1], x, 2).state[1])


@pytest.mark.parametrize("form", ["number", "scalar", "expanded", "batch"])
def test_times_in_every_form(problem, form):
    """Times shared by the batch take a shortcut; it must give the same numbers and derivatives."""
    joint_map = bent()
    x = torch.randn(4, 3)
    make = {
        "number": float,
        "scalar": torch.tensor,
        "expanded": lambda v: torch.tensor(v).expand(4),
        "batch": lambda v: torch.full((4,), v),
    }[form]
    expected = joint_map(x, torch.full((4,), 0.2), torch.full((4,), 0.9))
    for a, b in zip(joint_map(x, make(0.2), make(0.9)), expected, strict=True):
        close(a, b)
    mixed = joint_map(x, make(0.2), torch.full((4,), 0.9))
    close(mixed.divergence, expected.divergence)
    y = problem.states(4, 0.3)
    close(problem.field.velocity(y, make(0.3)), problem.velocity(y, torch.full((4,), 0.3)), rtol=1e-9, atol=1e-9)
    time = torch.tensor(0.9, requires_grad=True)
    (slope,) = torch.autograd.grad(joint_map(x, 0.2, time).divergence.sum(), time)
    h = 1e-6
    difference = joint_map(x, 0.2, 0.9 + h).divergence.sum() - joint_map(x, 0.2, 0.9 - h).divergence.sum()
    close(slope, difference.detach() / (2 * h), rtol=1e-6, atol=1e-6)


def test_steps_may_be_any_whole_number(gaussian):
    import numpy as np

    x = gaussian.states(3, 1.0)
    flow = gaussian.field
    expected = log_prob(flow, x, 2).value
    for steps in (np.int64(2), torch.tensor(2), np.array([0.0, 0.5, 1.0]), torch.tensor([0.0, 0.5, 1.0]), (0, 0.5, 1)):
        assert torch.equal(log_prob(flow, x, steps).value, expected)


@pytest.mark.parametrize("method", METHODS)
def test_inversion_under_autocast_is_that_of_full_precision(method):
    torch.manual_seed(0)
    network = MLP((3,), width=16, blocks=1, directions="to_data").float()
    joint = JointFlowMap(network, DivergenceHead(network.features)).float().eval()
    randomize(joint)
    x = torch.randn(5, 3, dtype=torch.float32)
    with torch.no_grad():
        expected = log_prob(joint, x, 8, inversion=Inversion(method))
        with torch.autocast("cpu", torch.bfloat16):
            answer = log_prob(joint, x, 8, inversion=Inversion(method))
    assert answer.converged.all()
    close(answer.noise, expected.noise, rtol=1e-4, atol=1e-4)
