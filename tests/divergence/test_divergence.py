"""Divergence estimators against traces by reverse mode, and their randomness against theory."""

import pytest
import torch

from f2d2_lightning import Hutchinson
from f2d2_lightning.divergence import Conditional, Exact
from f2d2_lightning.divergence.estimators import StillProbe, jacobian_product
from f2d2_lightning.flows import Point, TrigonometricPath
from f2d2_lightning.objectives import ConditionalSource, TeacherSource
from problems import moved, rotation, trace, z_score

close = torch.testing.assert_close
SHAPES = [(6,), (1, 2, 3)]
MODES = ["forward", "reverse", "finite"]
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])


class Field(torch.nn.Module):
    """A small smooth network with a dense Jacobian that depends on state, time and class."""

    def __init__(self, shape):
        super().__init__()
        dim = torch.Size(shape).numel()
        self.inlet, self.outlet = torch.nn.Linear(dim + 1, 10), torch.nn.Linear(10, dim)
        self.labels = torch.nn.Embedding(3, 10)
        with torch.no_grad():
            self.outlet.weight.mul_(4)

    def forward(self, x, t, cond=None):
        h = self.inlet(torch.cat((x.flatten(1), t[:, None]), -1))
        if cond is not None:
            h = h + self.labels(cond)
        return self.outlet(torch.tanh(h)).reshape(x.shape)


@pytest.fixture(params=SHAPES, ids=str)
def case(request):
    torch.manual_seed(1)
    shape = request.param
    return Field(shape), torch.randn(5, *shape), torch.rand(5), torch.tensor([0, 1, 2, 1, 0])


def jacobian_of(field, x, t, cond):
    """``(B, d, d)``"""
    rows = []
    for b in range(len(x)):
        f = lambda y, b=b: field(y, t[b : b + 1], cond[b : b + 1])  # noqa: E731
        rows.append(torch.autograd.functional.jacobian(f, x[b : b + 1]).reshape(x[0].numel(), -1))
    return torch.stack(rows)


@GRAD
@pytest.mark.parametrize("chunk", [1, 4, 6, 32])
def test_exact_is_the_trace(case, chunk, grad):
    field, x, t, cond = case
    expected = trace(lambda y: field(y, t, cond), x)
    assert expected.abs().min() > 0.01
    with torch.set_grad_enabled(grad):
        v, divergence, error = Exact(chunk)(field, Point(x, t, cond))
    close(divergence, expected)
    close(v, field(x, t, cond))
    assert error is None
    assert divergence.requires_grad == v.requires_grad == grad


@pytest.mark.parametrize("mode", MODES)
def test_exact_has_all_directions_whatever_the_default_device(case, mode):
    field, x, t, cond = case
    expected = trace(lambda y: field(y, t, cond), x)
    with torch.device("meta"):
        found, probe = Exact(4, mode)(field, Point(x, t, cond)).divergence, StillProbe(x, None, mode).probe
    assert probe.abs().eq(1).all()
    close(found, expected, rtol=1e-2, atol=1e-2)


def test_scalar_time_and_number(case):
    field, x, _, cond = case
    expected = trace(lambda y: field(y, torch.full((5,), 0.3), cond), x)
    for estimator in (Exact(), Hutchinson(2)):
        torch.manual_seed(0)
        number = estimator(field, Point(x, 0.3, cond)).divergence
        torch.manual_seed(0)
        close(estimator(field, Point(x, torch.tensor(0.3), cond)).divergence, number)
    close(Exact()(field, Point(x, 0.3, cond)).divergence, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_difference_drops_out_the_same_units(mode):
    layer, x = torch.nn.Dropout(0.5), torch.ones(200, 3)
    torch.manual_seed(0)
    v, divergence, _ = Exact(mode=mode)(lambda x, t, cond: layer(x), Point(x, 0.5))
    assert set(divergence.round(decimals=6).tolist()) == {0.0, 2.0, 4.0, 6.0}
    assert set(v.flatten().tolist()) == {0.0, 2.0}


def test_jacobian_product_of_a_constant():
    value, product = jacobian_product(lambda y: torch.ones(2, 3), torch.randn(2, 3), torch.randn(2, 3))
    close(value, torch.ones(2, 3))
    close(product, torch.zeros(2, 3))


@GRAD
@pytest.mark.parametrize("mode", MODES)
def test_each_probe_is_the_quadratic_form(case, mode, grad):
    field, x, t, cond = case
    probes = torch.randn(3, *x.shape)
    jacobian = jacobian_of(field, x, t, cond)
    expected = torch.einsum("pbi,bij,pbj->pb", probes.flatten(2), jacobian, probes.flatten(2))
    with torch.set_grad_enabled(grad):
        v, estimates = Hutchinson(3, mode=mode, step=1e-4).per_probe(field, Point(x, t, cond), probes)
    close(estimates, expected, rtol=1e-6, atol=1e-6)
    close(v, field(x, t, cond))
    if not grad:
        assert not v.requires_grad
        assert not estimates.requires_grad


@GRAD
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("mode", MODES)
def test_hutchinson_is_unbiased_and_knows_its_error(case, mode, distribution, grad):
    field, x, t, cond = case
    probes = 2000
    with torch.set_grad_enabled(grad):
        v, mean, error = (
            value.detach() for value in Hutchinson(probes, distribution, mode, step=1e-4)(field, Point(x, t, cond))
        )
    jacobian = jacobian_of(field, x, t, cond)
    symmetric = (jacobian + jacobian.mT) / 2
    if distribution == "rademacher":
        symmetric = symmetric - torch.diag_embed(symmetric.diagonal(dim1=1, dim2=2))
    variance = 2 * symmetric.square().sum((1, 2))
    close(error, (variance / probes).sqrt(), rtol=0.1, atol=0.0)
    assert ((mean - jacobian.diagonal(dim1=1, dim2=2).sum(-1)) / error).abs().max() < 4
    close(v, field(x, t, cond).detach())


class Matrix(torch.nn.Module):
    """A linear velocity that stays, with a dense matrix."""

    def __init__(self, shape):
        super().__init__()
        self.dim = torch.Size(shape).numel()
        self.matrix = torch.randn(self.dim, self.dim, dtype=torch.float64)

    def forward(self, x, t, cond=None):
        return (x.flatten(1) @ self.matrix.mT).reshape(x.shape)


@pytest.mark.parametrize(("shape", "cycle"), [((1,), 1), ((2,), 2), ((5,), 8), ((16,), 16), ((2, 3, 4), 32)], ids=str)
@pytest.mark.parametrize("probes", [1, 2, 4])
def test_along_a_path_errors_cancel(shape, cycle, probes):
    velocity = Matrix(shape)
    point = Point(torch.randn(4000, *shape, dtype=torch.float64), torch.full((4000,), 0.5, dtype=torch.float64))
    exact, path = velocity.matrix.trace(), Hutchinson(probes).along_path()
    answers = torch.stack([path(velocity, point).divergence for _ in range(max(1, cycle // probes))])
    close(answers.mean(0), exact.expand(4000))
    if cycle > probes:  # each answer is random on its own, and unbiased
        for answer in answers[:3]:
            assert answer.std() > 0.1
            assert z_score(answer - exact) < 4
        assert not torch.equal(Hutchinson(probes).along_path()(velocity, point).divergence, answers[0])


def test_first_rows_separate_neighbouring_pixels():
    """Four evaluations are exact where the Jacobian reaches the next pixel alone, as a stencil does."""
    kernel = torch.tensor([[0.3, 1.0, 0.2], [0.7, -2.0, 0.5], [0.1, 0.4, 0.6]], dtype=torch.float64)
    velocity = lambda x, t, c=None: torch.nn.functional.conv2d(x, kernel.expand(1, 1, 3, 3), padding=1)  # noqa: E731
    path = Hutchinson().along_path()
    point = Point(torch.randn(3, 1, 7, 8, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    answers = torch.stack([path(velocity, point).divergence for _ in range(4)])
    close(answers.mean(0), torch.full((3,), -2.0 * 56, dtype=torch.float64))
    assert answers[0].std() > 0.1


@pytest.mark.parametrize(("shape", "apart", "count"), [((32,), 16, 16), ((64,), 32, 24), ((1, 8, 8), 4, 24)], ids=str)
def test_fewer_evaluations_than_rows_do_not_add_errors_up(shape, apart, count):
    """Entries that only late rows separate: positions and momenta, say, behind each other in one vector."""
    matrix = torch.diag(torch.ones(torch.Size(shape).numel() - apart, dtype=torch.float64), apart)
    velocity = lambda x, t, c=None: (x.flatten(1) @ matrix.mT).reshape(x.shape)  # noqa: E731
    point = Point(torch.randn(500, *shape, dtype=torch.float64), torch.zeros(500, dtype=torch.float64))
    sizes = {False: 0.0, True: 0.0}
    for _ in range(20):
        for along in sizes:
            estimator = Hutchinson().along_path() if along else Hutchinson()
            off = torch.stack([estimator(velocity, point).divergence for _ in range(count)]).mean(0)
            sizes[along] += float(off.square().mean()) / 20
    assert sizes[True] < 4 * sizes[False]


def test_what_draws_in_its_own_way_does_so_along_a_path():
    class Ones(Hutchinson):
        def draw(self, x):
            return torch.ones(1, *x.shape, dtype=x.dtype)

    for estimator in (Ones(), Hutchinson(distribution="gaussian"), Exact()):
        assert estimator.along_path() is estimator
    near = Hutchinson(3)
    assert Conditional(near_data=near).along_path().probes == 3


@pytest.mark.parametrize("mode", MODES)
def test_exact_control_variate_leaves_no_variance(gaussian, mode):
    t = torch.linspace(0, 1, 6)
    x = gaussian.states_at(t)
    estimator = Hutchinson(8, "gaussian", mode, control=gaussian.baseline)
    _, divergence, error = estimator(gaussian.field.velocity, Point(x, t))
    close(divergence, gaussian.divergence(x, t), rtol=1e-8, atol=1e-8)
    assert error.max() < 1e-8


def pairs(problem, count, high):
    data, noise = problem.states(count, 1.0), torch.randn(count, *problem.shape)
    t = high * torch.rand(count)
    return data, noise, t, problem.path.sample(data, noise, t)


def projections(x, t):
    """Test functions of ``x_t``: an unbiased estimate has the right mean against all of them."""
    flat = x.flatten(1)
    return torch.stack([torch.ones_like(t), t, flat[:, 0], torch.tanh(flat.sum(-1)), torch.sin(2 * flat[:, -1])], -1)


def test_conditional_is_unbiased_given_the_state(linear):
    data, noise, t, x = pairs(linear, 20000, 0.7)
    v, estimate, error = Conditional(1.0)(linear.field.velocity, Point(x, t, pair=(data, noise)))
    exact = linear.divergence(x, t)
    assert error is None
    close(v, linear.velocity(x, t))
    assert z_score((estimate - exact)[:, None] * projections(x, t)).abs().max() < 4
    # the test would notice a flipped sign, or a factor
    assert z_score((-estimate - exact)[:, None] * projections(x, t)).abs().max() > 20
    assert z_score((0.5 * estimate - exact)[:, None] * projections(x, t)).abs().max() > 5


def test_conditional_has_the_stated_bias(linear):
    data, noise, t, x = pairs(linear, 20000, 0.7)
    offset = 0.5 * torch.sin(x + 1)
    wrong = lambda y, time, cond: linear.field.velocity(y, time) + 0.5 * torch.sin(y + 1)  # noqa: E731
    estimate = Conditional(1.0)(wrong, Point(x, t, pair=(data, noise))).divergence
    # the formula estimates the marginal's divergence, plus t |v - v*|^2 / (1 - t)
    excess = t * offset.flatten(1).square().sum(-1) / (1 - t)
    assert z_score((estimate - linear.divergence(x, t) - excess)[:, None] * projections(x, t)).abs().max() < 4


@GRAD
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.1, 0.5), (0.7, 1.0)], ids=["both kinds", "all far", "all near"]
)
def test_conditional_hands_over_near_the_data(linear, grad, low, high):
    data, noise, _, _ = pairs(linear, 200, 1.0)
    t = low + (high - low) * torch.rand(200)
    t[:3] = torch.tensor([0.6, 1.0, 0.0]).clamp(low, high)
    x = linear.path.sample(data, noise, t)
    near = t >= 0.6
    assert bool(near.any()) == (high > 0.6)
    assert bool(near.all()) == (low > 0.6)
    with torch.set_grad_enabled(grad):
        v, estimate, _ = Conditional(0.6, Exact())(linear.field.velocity, Point(x, t, pair=(data, noise)))
    close(v, linear.velocity(x, t), rtol=1e-9, atol=1e-9)
    close(estimate[near], linear.divergence(x, t)[near], rtol=1e-9, atol=1e-9)
    residual = (data - noise - linear.velocity(x, t)).flatten(1).square().sum(-1)
    close(estimate[~near], ((t * residual - linear.dim) / (1 - t))[~near], rtol=1e-9, atol=1e-9)


def test_conditional_source_on_any_path(problem):
    """By default too, the source is unbiased, whatever its path."""
    data, noise, t, x = pairs(problem, 20000, 0.65)

    class Student:
        velocity = staticmethod(problem.field.velocity)

    v, estimate = ConditionalSource(Student(), path=problem.path)(Point(x, t, pair=(data, noise)))
    difference = (v - problem.velocity(x, t)).flatten(1)
    assert z_score(difference[..., None] * projections(x, t)[:, None]).abs().max() < 4.5
    assert z_score((estimate - problem.divergence(x, t))[:, None] * projections(x, t)).abs().max() < 4.5


def test_teacher_source_falls_back_where_there_is_no_pair(linear):
    x, t = linear.states(5, 0.3), torch.full((5,), 0.3)
    v, divergence = TeacherSource(linear.field, Conditional(near_data=Exact()))(Point(x, t))
    close(v, linear.velocity(x, t))
    close(divergence, linear.divergence(x, t))


@pytest.mark.parametrize("leaf", [False, True], ids=["x plain", "x with gradient"])
@pytest.mark.parametrize(
    "estimator",
    [Exact(4), *(Hutchinson(2, mode=mode) for mode in MODES), Conditional(0.5), Conditional(0.5, Exact())],
    ids=["exact", *MODES, "conditional", "conditional with exact"],
)
def test_gradients_against_finite_differences(case, estimator, leaf):
    field, x, t, cond = case
    data, noise = torch.randn_like(x), torch.randn_like(x)
    weights = torch.randn(5)

    def loss(y):
        torch.manual_seed(5)
        answer = estimator(field, Point(y, t, cond, (data, noise)))
        return (answer.divergence * weights).sum() + answer.velocity.square().sum()

    parameters = [field.inlet.weight, field.outlet.weight, field.labels.weight]
    y = x.clone().requires_grad_(leaf)
    gradients = torch.autograd.grad(loss(y), [*parameters, *([y] if leaf else [])])
    for parameter, gradient in zip([*parameters, x], gradients, strict=False):
        direction = torch.randn_like(parameter)
        expected = moved(lambda: loss(x), parameter, direction)
        close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-5)


def test_rademacher_alone_would_prove_nothing():
    """On a diagonal Jacobian Rademacher probes are exact; on a rotated one they are not."""
    axes = rotation(4, 0)
    for matrix, exact in (
        (torch.diag(torch.arange(1.0, 5.0)), True),
        (axes @ torch.diag(torch.arange(4.0)) @ axes.T, False),
    ):
        error = Hutchinson(50)(lambda x, t, cond, m=matrix: x @ m, Point(torch.randn(3, 4), 0.5)).standard_error
        assert bool((error < 1e-12).all()) == exact


def test_the_formula_needs_the_linear_path():
    with pytest.raises(ValueError, match="linear path"):
        Conditional(path=TrigonometricPath())


def test_conditional_takes_a_velocity_of_lower_precision():
    """As a network answers under autocast."""
    data, noise = torch.randn(2, 6, 3, dtype=torch.float32)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.9, 0.95], dtype=torch.float32)
    point = Point((1 - t)[:, None] * noise + t[:, None] * data, t, pair=(data, noise))
    full, low = (
        Conditional(0.7, Exact())(lambda x, t, c, kind=kind: x.sin().to(kind), point)
        for kind in (torch.float32, torch.bfloat16)
    )
    assert low.velocity.dtype == torch.float32
    torch.testing.assert_close(low.divergence, full.divergence, atol=0.3, rtol=0.05)
