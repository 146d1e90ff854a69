"""Closed forms: Gaussian map and baseline, mixtures, paths."""

import contextlib
import itertools
import math
import warnings

import numpy
import pytest
import scipy.fft
import sklearn.datasets
import torch

from f2d2_lightning import GaussianBaseline
from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.flows import GaussianFlow, LinearPath, TrigonometricPath
from f2d2_lightning.modules.distillation import default_head
from f2d2_lightning.nn import UNet
from problems import PROBLEMS, coefficients, rotation, z_score

PAIRS = [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7), (0.9, 0.35), (0.0, 0.01), (1.0, 0.99)]
close = torch.testing.assert_close


def times(pair, count=5):
    return torch.full((count,), pair[0]), torch.full((count,), pair[1])


@pytest.mark.parametrize("path", [LinearPath(), TrigonometricPath()], ids=["linear", "trigonometric"])
class TestPath:
    def test_ends(self, path):
        ends = torch.tensor([0.0, 1.0])
        close(path.alpha(ends), ends)
        close(path.sigma(ends), 1 - ends)

    @pytest.mark.parametrize("name", ["alpha", "sigma"])
    def test_slope_is_the_divided_difference(self, path, name):
        f, f_slope = getattr(path, name), getattr(path, f"{name}_slope")
        s, t = torch.rand(50), torch.rand(50)
        close(f_slope(s, t), (f(t) - f(s)) / (t - s), rtol=1e-10, atol=1e-10)
        t.requires_grad_(True)
        (derivative,) = torch.autograd.grad(f(t).sum(), t)
        close(f_slope(t, t).detach(), derivative)

    def test_conditional_velocity_is_the_derivative_of_the_state(self, path):
        data, noise, t, h = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2), 0.1 + 0.8 * torch.rand(6), 1e-5
        difference = (path.sample(data, noise, t + h) - path.sample(data, noise, t - h)) / (2 * h)
        close(path.conditional_velocity(data, noise, t), difference, rtol=1e-7, atol=1e-7)


def test_velocity_is_the_analytic_one(problem):
    t = torch.linspace(0, 1, 11)
    x = problem.states_at(t) + 0.3
    close(problem.field.velocity(x, t), problem.velocity(x, t), rtol=1e-9, atol=1e-9)


def test_log_prob_is_that_of_torch_distributions(problem):
    t = torch.linspace(0, 1, 11)
    x = problem.states_at(t) + 0.3
    log_prob = problem.baseline.log_prob if len(problem.weights) == 1 else problem.field.log_prob
    close(log_prob(x, t), problem.log_prob(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
class TestGaussianMap:
    def test_direct_formula(self, gaussian, pair):
        s, t = times(pair)
        x = gaussian.states(5, pair[0])
        u, divergence = gaussian.field(x, s, t)
        state, change = gaussian.jump(x, s, t)
        gap = (t - s).reshape(-1, *(1 for _ in gaussian.shape))
        close(u, (state - x) / gap, rtol=1e-8, atol=1e-8)
        close(divergence, -change / (t - s), rtol=1e-8, atol=1e-8)
        assert divergence.abs().min() > 0.01

    def test_divergence_is_the_log_determinant_of_the_map(self, gaussian, pair):
        s, t = times(pair, 1)
        x = gaussian.states(1, pair[0])
        jump = gaussian.field.jump(x, s, t)
        jacobian = torch.autograd.functional.jacobian(lambda y: gaussian.field.jump(y, s, t).state, x)
        log_det = torch.linalg.slogdet(jacobian.reshape(gaussian.dim, gaussian.dim)).logabsdet
        close(jump.log_prob_change, -log_det[None], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_diagonal_is_the_limit(gaussian, t):
    x = gaussian.states(5, t)
    u, divergence = gaussian.field(x, t, t)
    close(divergence, gaussian.divergence(x, torch.full((5,), t)), rtol=1e-9, atol=1e-9)
    close(u, gaussian.velocity(x, torch.full((5,), t)), rtol=1e-9, atol=1e-9)
    for h in (1e-3, 1e-6, 1e-9, 1e-12):
        beside = t - h if t > 0.5 else t + h
        close(gaussian.field(x, t, beside).velocity, u, rtol=0, atol=1e3 * h + 1e-13 * float(u.abs().max() + 1))
        close(gaussian.field(x, t, beside).divergence, divergence, rtol=0, atol=1e4 * h + 1e-11)


def waves(shape):
    """Matrix from flat images to cosine waves, by frequency and then by channel; and the blocks of one frequency."""
    every = torch.eye(math.prod(shape)).reshape(-1, *shape).numpy()
    matrix = torch.from_numpy(scipy.fft.dctn(every, axes=(2, 3), norm="ortho")).flatten(2).transpose(1, 2).flatten(1).T
    place = torch.arange(len(matrix)) // shape[0]
    return matrix, place[:, None] == place


def in_waves(covariance, shape):
    """What is left of a covariance where waves of different frequencies are independent."""
    matrix, same = waves(shape)
    return matrix.T @ torch.where(same, matrix @ covariance @ matrix.T, 0.0) @ matrix


def baselines(gaussian):
    """Every kind of covariance, each with its own Gaussian."""
    mean, full = gaussian.means[0], gaussian.covariances[0]
    yield GaussianBaseline.from_covariance(mean, full, gaussian.path, gaussian.shape), full
    for kind, variances in (("diagonal", full.diagonal()), ("isotropic", full.diagonal().mean().expand(gaussian.dim))):
        baseline = GaussianBaseline(gaussian.shape, kind, gaussian.path)
        baseline.mean.copy_(mean)
        baseline.variances.copy_(variances[: len(baseline.variances)])
        yield baseline, torch.diag(variances)
    if len(gaussian.shape) == 3:
        channels, (matrix, _) = gaussian.shape[0], waves(gaussian.shape)
        blocks = (matrix @ full @ matrix.T).unfold(0, channels, channels).unfold(1, channels, channels)
        baseline = GaussianBaseline(gaussian.shape, "cosine", gaussian.path)
        baseline._set(mean, blocks.diagonal().permute(2, 0, 1))
        yield baseline, in_waves(full, gaussian.shape)


def test_every_covariance_is_the_full_one(gaussian):
    s, t = torch.rand(6), torch.rand(6)
    x, v = gaussian.states_at(s), torch.randn(6, *gaussian.shape)
    for baseline, covariance in baselines(gaussian):
        full = GaussianBaseline.from_covariance(gaussian.means[0], covariance, gaussian.path, gaussian.shape)
        for name, arguments in {
            "average_velocity": (x, s, t),
            "divergence": (s, t),
            "clock": (t,),
            "jacobian_product": (v, s, t),
            "log_prob": (x, t),
        }.items():
            close(getattr(baseline, name)(*arguments), getattr(full, name)(*arguments), rtol=1e-9, atol=1e-9)


def test_identities(gaussian):
    """Semigroup, Lagrangian and Eulerian, for u and D, with derivatives by central differences."""
    s, m, t = (0.05 + 0.9 * torch.rand(8) for _ in range(3))
    h = 1e-5
    for baseline, _ in baselines(gaussian):
        flow = GaussianFlow(baseline)
        x = gaussian.states_at(s)
        wide = lambda time, x=x: time.reshape(-1, *(1 for _ in x.shape[1:]))  # noqa: E731
        pair, here = flow(x, s, t), flow(x, s, s)
        landed = flow.jump(x, s, t).state
        there = flow(landed, t, t)
        first, second = flow(x, s, m), flow(flow.jump(x, s, m).state, m, t)
        for part, scale in (("velocity", wide), ("divergence", lambda time: time)):
            f = lambda *arguments, flow=flow, part=part: getattr(flow(*arguments), part)  # noqa: E731
            whole = scale(m - s) * getattr(first, part) + scale(t - m) * getattr(second, part)
            close(scale(t - s) * getattr(pair, part), whole, rtol=1e-9, atol=1e-9)
            d_t = (f(x, s, t + h) - f(x, s, t - h)) / (2 * h)
            close(getattr(pair, part), getattr(there, part) - scale(t - s) * d_t, rtol=1e-6, atol=1e-6)
            v = here.velocity
            d_s = (f(x + h * v, s + h, t) - f(x - h * v, s - h, t)) / (2 * h)
            close(getattr(pair, part), getattr(here, part) + scale(t - s) * d_s, rtol=1e-6, atol=1e-6)


def test_jacobian_product_and_whitening(gaussian):
    s, t = torch.rand(4), torch.rand(4)
    x, v = gaussian.states_at(s), torch.randn(4, *gaussian.shape)
    _, product = torch.autograd.functional.jvp(lambda y: gaussian.baseline.average_velocity(y, s, t), x, v)
    close(gaussian.baseline.jacobian_product(v, s, t), product)
    close(gaussian.baseline.from_axes(gaussian.baseline.to_axes(x)), x)
    means, covariances = gaussian.moments(s)
    squared = ((x.flatten(1) - means[:, 0])[:, None] @ torch.linalg.inv(covariances[:, 0])).squeeze(1)
    mahalanobis = (squared * (x.flatten(1) - means[:, 0])).sum(-1)
    close(gaussian.baseline.whiten(x, s).square().sum(-1), mahalanobis)


FITS = [(kind, shape) for shape in ((3,), (3, 2, 1)) for kind in ("full", "diagonal", "isotropic")]


@pytest.mark.parametrize(("kind", "shape"), [*FITS, ("cosine", (3, 2, 1)), ("cosine", (2, 4, 3))])
def test_fit_is_the_moments(kind, shape):
    dim = math.prod(shape)
    data = 100 + torch.randn(500, dim) @ (rotation(dim, 1) * torch.linspace(0.2, 2, dim)).T
    images = data.reshape(-1, *shape)
    baseline = GaussianBaseline(shape, kind).fit(batch for batch in images.split(64))
    covariance = torch.cov(data.T)
    if kind == "diagonal":
        covariance = torch.diag(covariance.diagonal())
    elif kind == "isotropic":
        covariance = covariance.diagonal().mean() * torch.eye(dim)
    elif kind == "cosine":
        covariance = in_waves(covariance, shape)
    close(baseline.mean, data.mean(0))
    axes = baseline.to_axes(torch.eye(dim).reshape(-1, *shape))
    close((axes * baseline.variances) @ axes.T, covariance, rtol=1e-6, atol=1e-7)
    assert bool(baseline.fitted)


def test_fit_keeps_a_floor():
    baseline = GaussianBaseline((2,)).fit([torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])], floor=1e-3)
    close(baseline.variances.min(), torch.tensor(1e-3))
    assert baseline.divergence(torch.zeros(1), torch.ones(1)).isfinite().all()


@pytest.mark.parametrize("kind", ["full", "diagonal", "isotropic"])
def test_state_dict_round_trip(kind):
    data = torch.randn(50, 3) @ rotation(3, 2) * 2 + 1
    fitted = GaussianFlow(GaussianBaseline((3,), kind).fit([data]))
    loaded = GaussianFlow(GaussianBaseline((3,), kind))
    x, s, t = torch.randn(4, 3), torch.rand(4), torch.rand(4)
    assert not bool(loaded.baseline.fitted)
    assert not torch.equal(loaded(x, s, t).velocity, fitted(x, s, t).velocity)
    loaded.load_state_dict(fitted.state_dict())
    assert bool(loaded.baseline.fitted)
    for a, b in zip(loaded(x, s, t), fitted(x, s, t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["full", "diagonal", "isotropic"])
@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.6, 0.6001)], ids=str)
def test_single_precision(kind, pair):
    data = torch.randn(200, 3) @ (rotation(3, 2) * torch.tensor([0.03, 0.4, 2.0])).T + 1
    double = GaussianFlow(GaussianBaseline((3,), kind).fit([data]))
    single = GaussianFlow(GaussianBaseline((3,), kind).fit([data])).float()
    x = torch.randn(4, 3)
    for a, b in zip(single(x.float(), *pair), double(x, *pair), strict=True):
        assert a.dtype == torch.float32
        close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0)], ids=str)
def test_narrow_axes_in_single_precision(pair):
    """Pixels that hold dequantization noise only: 8-bit data on [-1, 1] have a variance of 5e-6 there."""
    dim, variance = 100, (2 / 256) ** 2 / 12
    baseline = GaussianBaseline((dim,), "isotropic")
    baseline.variances.fill_(variance)
    factor = variance**0.5 if pair[1] == 1 else variance**-0.5
    x = torch.ones(1, dim) / factor**0.5
    single = GaussianFlow(baseline.float())
    close(
        single(x.float(), *pair).divergence.double() * (pair[1] - pair[0]),
        torch.tensor([dim * math.log(factor)]),
        rtol=1e-5,
        atol=0.0,
    )
    close(single.jump(x.float(), *pair).state.double(), x * factor, rtol=1e-4, atol=0.0)


def test_mixture_samples_have_its_moments(mixture):
    x = mixture.field.sample(20000).flatten(1)
    mean = mixture.weights @ mixture.means
    spread = mixture.means - mean
    covariance = torch.einsum("k,kij->ij", mixture.weights, mixture.covariances) + (spread.T * mixture.weights) @ spread
    assert z_score(x, mean).abs().max() < 4.5
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert z_score(products.flatten(1), covariance.flatten()).abs().max() < 4.5


def test_problems_are_not_too_easy():
    """Guards the guards: rotated Jacobians and divergences away from zero."""
    for make, t in itertools.product(PROBLEMS.values(), (0.2, 0.8)):
        problem = make()
        x, time = problem.states(64, t), torch.full((64,), t)
        rows = torch.func.vmap(torch.func.jacrev(lambda y, s, p=problem: p.velocity(y[None], s[None])[0]))(x, time)
        jacobian = rows.reshape(64, problem.dim, problem.dim)
        assert (jacobian - torch.diag_embed(jacobian.diagonal(dim1=1, dim2=2))).abs().amax((1, 2)).mean() > 0.1
        assert problem.divergence(x, time).abs().mean() > 0.3


ANGLE_PAIRS = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.9), (1.0, 0.995), (0.98, 0.3), (0.5, 0.5001), (0.7, 0.7 - 1e-9)]
SPREAD = torch.tensor([2.0, 1e-4, 0.3, 40.0], dtype=torch.float64)  # variances, not in order
CURVES = pytest.mark.parametrize("path", [LinearPath(), TrigonometricPath()], ids=["linear", "trigonometric"])


def spread(path, kind="full"):
    """A fit with narrow and wide axes."""
    if kind == "full":
        axes = rotation(4, 5)
        return GaussianBaseline.from_covariance(torch.linspace(-1, 2, 4), (axes * SPREAD) @ axes.T, path)
    baseline = GaussianBaseline((4,), kind, path)
    baseline.mean.copy_(torch.linspace(-1, 2, 4))
    baseline.variances.copy_(SPREAD if kind == "diagonal" else SPREAD[1:2])
    return baseline


def angles(path, t, variances):
    a, b, _, _ = coefficients(path, t)
    return math.pi / 2 - torch.atan(b[:, None] / (a[:, None] * variances.sqrt()))


def angular_velocity(path, t, variances):
    a, b, da, db = (c[..., None] for c in coefficients(path, t))
    return variances.sqrt() * (da * b - a * db) / (b**2 + a**2 * variances)


@CURVES
@pytest.mark.parametrize("kind", ["full", "diagonal", "isotropic"])
class TestAngle:
    def test_angle(self, path, kind):
        baseline, t = spread(path, kind), torch.linspace(0, 1, 21)
        close(baseline.angle(t), angles(path, t, baseline.variances), rtol=1e-9, atol=1e-9)
        close(baseline.angle(torch.tensor([0.0])), torch.zeros(1, len(baseline.variances)))
        close(baseline.angle(torch.tensor([1.0])), torch.full((1, len(baseline.variances)), math.pi / 2))

    def test_rate_is_the_difference_of_angles(self, path, kind):
        baseline = spread(path, kind)
        pairs = torch.tensor([pair for pair in ANGLE_PAIRS if abs(pair[1] - pair[0]) > 1e-3])
        s, t = torch.cat((pairs, 0.98 * torch.rand(200, 2))).T
        difference = angles(path, t, baseline.variances) - angles(path, s, baseline.variances)
        close(baseline.angle_rate(s, t), difference / (t - s)[:, None], rtol=1e-9, atol=1e-9)
        assert bool((baseline.angle_rate(s, t) > 0).all())
        close(baseline.angle_rate(s, t), baseline.angle_rate(t, s), rtol=1e-12, atol=0.0)

    def test_rate_near_the_diagonal(self, path, kind):
        """The mean angular velocity, by quadrature, across the switch from the series to the arctangent."""
        baseline = spread(path, kind)
        gaps = torch.logspace(-13, -2.5, 40).repeat_interleave(4)
        s = torch.tensor([0.0, 0.4, 0.9, 1.0]).repeat(40)
        t = torch.where(s > 0.5, s - gaps, s + gaps)
        nodes, weights = (torch.as_tensor(part) for part in numpy.polynomial.legendre.leggauss(12))
        between = s[:, None] + (t - s)[:, None] * (nodes + 1) / 2
        mean = (angular_velocity(path, between, baseline.variances) * weights[:, None]).sum(1) / 2
        close(baseline.angle_rate(s, t), mean, rtol=1e-10, atol=0.0)

    @pytest.mark.parametrize("which", ["s", "t"])
    def test_time_derivative(self, path, kind, which):
        baseline, h = spread(path, kind), 1e-6
        s = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.995, 1 - 2e-6, 2e-6, 0.99])
        t = torch.tensor([0.8, 0.2, 0.5, 0.5 + 1e-7, 0.99, 2e-6, 1 - 2e-6, 0.995])
        function = {"s": lambda a: baseline.angle_rate(a, t), "t": lambda a: baseline.angle_rate(s, a)}[which]
        at = {"s": s, "t": t}[which]
        with torch.no_grad():
            value, product = jacobian_product(function, at, torch.ones_like(at))
        expected = (function(at + h) - function(at - h)) / (2 * h)
        scale = value.amax() if kind == "isotropic" else value.amax(0)
        close(product / scale, expected / scale, rtol=1e-5, atol=1e-7)
        leaf = at.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
        close(gradient, product.sum(-1))

    def test_clock_is_the_mean_angle(self, path, kind):
        baseline, t = spread(path, kind), torch.linspace(0, 1, 101)
        clock = baseline.clock(t)
        close(clock, angles(path, t, baseline.variances).mean(-1) / (math.pi / 2), rtol=1e-9, atol=1e-9)
        close(clock[[0, -1]], torch.tensor([0.0, 1.0]))
        assert bool((clock.diff() > 0).all())

    @pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
    def test_drawn_times_have_the_clocks_density(self, path, kind, share):
        """Stratified: the k-th of n times lies in the k-th n-th of the distribution, anywhere in it."""
        baseline, count = spread(path, kind), 400
        drawn = torch.stack([baseline.draw_times(count, share).double() for _ in range(50)])
        assert float(drawn.min()) >= 0
        assert float(drawn.max()) <= 1
        clock = angles(path, drawn.flatten(), baseline.variances).mean(-1) / (math.pi / 2)
        level = (1 - share) * clock.reshape(drawn.shape) + share * drawn
        within = level.sort(-1).values * count - torch.arange(count)
        # narrow axes turn within a few cells of the table that is inverted
        assert float(within.min()) > -0.3
        assert float(within.max()) < 1.3
        close(float(within.mean()), 0.5, rtol=0.0, atol=0.06)
        close(float(within.var()), 1 / 12, rtol=0.1, atol=0.0)

    def test_unwhiten_inverts_whiten(self, path, kind):
        baseline, t = spread(path, kind), torch.tensor([0.0, 0.3, 0.9, 1.0])
        x, z = torch.randn(4, 4), torch.randn(4, 4)
        close(baseline.unwhiten(baseline.whiten(x, t), t), x)
        close(baseline.whiten(baseline.unwhiten(z, t), t), z)

    def test_whitened_coordinates_stand_still(self, path, kind):
        baseline = spread(path, kind)
        s, t = torch.tensor([1.0, 0.0, 0.8, 0.2]), torch.tensor([0.0, 1.0, 0.1, 0.99])
        x = baseline.unwhiten(torch.randn(4, 4), s)
        landed = GaussianFlow(baseline).jump(x, s, t).state
        close(baseline.whiten(landed, t), baseline.whiten(x, s), rtol=1e-9, atol=1e-9)


def test_default_share_of_uniform_times():
    """A quarter, so that no stretch of time starves where the clock stands still."""
    baseline = GaussianBaseline((1,), "isotropic")
    baseline.variances.fill_(1e-8)
    t = torch.cat([baseline.draw_times(100) for _ in range(20)])
    assert abs(float((t < 0.9).double().mean()) - 0.225) < 0.01


def test_narrow_axes_survive_half_precision():
    """Turned towards the axes, a state keeps its narrow coordinates beside wide ones under autocast too."""
    variances = torch.logspace(-5, 0, 16)
    axes = rotation(16, 1)
    baseline = GaussianBaseline.from_covariance(torch.zeros(16), axes @ torch.diag(variances) @ axes.T).float()
    x = (torch.randn(64, 16) * variances.sqrt() @ axes.T).float()
    one = torch.ones(64).float()
    expected = baseline.log_prob(x, one)
    with torch.autocast("cpu", torch.bfloat16):
        came = baseline.log_prob(x, one)
        back = baseline.from_axes(baseline.to_axes(x))
    assert came.dtype == torch.float32
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_narrow_axes_keep_their_variance_and_constants_get_the_floor():
    """Condition number 1e8, in single precision: the fit is the density. Constants and copies of columns have none."""
    turn, deviations = rotation(5, 3), torch.logspace(-4, 0, 5)
    x = torch.randn(5000, 5) * deviations @ turn.T
    truth = torch.distributions.MultivariateNormal(torch.zeros(5), (turn * deviations**2) @ turn.T)
    fit = GaussianBaseline((5,)).float().fit(x.float().split(512))
    one = torch.ones(5000)
    close(fit.log_prob(x.float(), one.float()).double().mean(), truth.log_prob(x).mean(), rtol=0, atol=0.02)
    close(fit.variances.double(), deviations**2, rtol=0.1, atol=0)
    for kind in ("full", "diagonal"):
        narrow = GaussianBaseline((2,), kind).fit([1e-4 * torch.randn(2000, 2)])
        close(narrow.variances, torch.full((2,), 1e-8), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("count", [12, 4000])
@pytest.mark.parametrize("value", [0.0, 0.1, -900.1, 1234567.1, 5e8])
def test_a_constant_however_far_from_zero_gets_the_floor(kind, count, value):
    x = torch.cat((torch.randn(count, 2), torch.full((count, 1), value)), 1).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = GaussianBaseline((3,), kind).fit(x.split(100))
    close(fit.variances.min(), torch.tensor(1e-6))
    close(fit.mean, x.double().mean(0))
    jump = GaussianFlow(fit).jump(x.double(), 1.0, 0.0)
    for part in (*jump, fit.log_prob(x.double(), torch.ones(count))):
        assert part.isfinite().all()


def test_sums_of_several_processes_are_around_one_origin():
    """Far from zero, where squares would cancel: what two processes see adds up to what one sees."""
    x = 1e7 + torch.randn(300, 2) @ rotation(2, 1) * torch.tensor([1.0, 3.0])
    whole = GaussianBaseline((2,)).fit([x])
    close(whole.variances.sum(), x.var(0).sum(), rtol=1e-6, atol=0)
    parts = (x[:100], x[100:])
    sums = [[], []]
    for _ in range(5):
        # each process goes as far as to a sum that is not known yet
        known = [a + b for a, b in zip(*sums, strict=True)]
        sums = [_sent(part, known) for part in parts]
    known = iter([a + b for a, b in zip(*sums, strict=True)])
    merged = GaussianBaseline((2,)).fit([parts[0]], reduce=lambda value: next(known))
    close(merged.variances, whole.variances, rtol=1e-9, atol=0)
    close(merged.mean, whole.mean)


def _sent(part, known):
    """What a process has sent by the time that it waits for more than the sums that are known."""
    sent, sums = [], iter(known)

    def reduce(value):
        sent.append(value)
        return next(sums)

    with contextlib.suppress(StopIteration):
        GaussianBaseline((2,)).fit([part], reduce=reduce)
    return sent


@pytest.mark.parametrize("rows", [lambda: torch.randn(3, 4).repeat(500, 1), lambda: torch.randint(0, 2, (900, 4))])
@pytest.mark.parametrize("kind", ["full", "diagonal", "isotropic"])
def test_copies_and_levels_leave_a_fit_of_numbers(rows, kind):
    x = rows().double()
    fit = GaussianBaseline((4,), kind).fit([x])
    there = GaussianFlow(fit).jump(x, 1.0, 0.0)
    back = GaussianFlow(fit).jump(there.state, 0.0, 1.0)
    assert fit.variances.min() >= 0.999e-6
    close(back.state, x, rtol=0, atol=1e-9)
    close(back.log_prob_change, -there.log_prob_change)


def test_states_of_twelve_thousand_dimensions_take_a_few_mebibytes():
    shape = (3, 64, 64)
    with pytest.raises(ValueError, match=r"0\.6 GiB"):
        GaussianBaseline(shape, "full")
    network = UNet(shape, width=8)
    head = default_head(network.features, shape, network)
    assert head.baseline.covariance == "cosine"
    assert sum(value.nbytes for value in head.state_dict().values()) < 2**21
    x = torch.rand(64, *shape)
    # axes are turned, not stretched
    close(head.baseline.fit(x.split(16)).variances.sum(), x.var(0).sum())


def test_waves_are_better_axes_of_photographs_than_pixels():
    """Log-likelihood of fresh patches of a photograph, more than the axes of few patches give too."""
    photograph = torch.from_numpy(sklearn.datasets.load_sample_image("china.jpg")).permute(2, 0, 1) / 255.0
    patches = photograph.unfold(1, 16, 16).unfold(2, 16, 16).flatten(1, 2).transpose(0, 1)
    patches = patches[torch.randperm(len(patches))] + torch.rand(len(patches), 3, 16, 16) / 256
    known, fresh = patches[:400], patches[400:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples
        fits = {kind: GaussianBaseline((3, 16, 16), kind).fit([known]) for kind in ("cosine", "full", "diagonal")}
    values = {kind: float(fit.log_prob(fresh, torch.ones(len(fresh))).mean()) / 768 for kind, fit in fits.items()}
    assert values["cosine"] > values["full"] - 1e-9  # which may shrink to waves wholly
    assert values["full"] > values["diagonal"] + 1, values


@pytest.mark.parametrize("shape", [(5,), (1, 2, 3), (40,)])
def test_the_usual_covariance_is_full_of_many_samples_and_diagonal_of_few(shape):
    dim = math.prod(shape)
    enough = min(2000, 64 * dim)
    data = (torch.randn(enough, dim) @ rotation(dim, 1) * torch.linspace(0.2, 2, dim) + 1).reshape(-1, *shape)
    for count, kind in ((enough, "full"), (enough - 1, "diagonal")):
        usual, own = (GaussianBaseline(shape, name).fit([data[:count]]) for name in (None, kind))
        x, t = torch.randn(9, *shape), torch.rand(9)
        close(usual.log_prob(x, t), own.log_prob(x, t))
        close(usual.whiten(x, t).abs(), own.whiten(x, t).abs())


def test_waves_are_of_images():
    with pytest.raises(ValueError, match=r"cosine.*images.*shape \(5,\)"):
        GaussianBaseline((5,), "cosine")
    with pytest.raises(ValueError, match="square of each side; up to 4,096"):
        GaussianBaseline((1, 100_000, 1), "cosine")


@pytest.mark.parametrize(
    ("mean", "covariance", "said"),
    [
        (torch.tensor([math.nan, 0.0]), torch.eye(2), "NaN"),
        (torch.zeros(2), torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), "infinity"),
        (torch.zeros(2), torch.tensor([[1.0, 5.0], [0.0, 26.0]]), "not symmetric"),
        *(
            (torch.zeros(2), other, "shapes .d,. and .d, d.")
            for other in (torch.ones(2), torch.eye(3), torch.eye(2).long())
        ),
        (torch.zeros(2).long(), torch.eye(2), "torch.int64"),
        (torch.zeros(2).numpy(), torch.eye(2), "Tensor is expected"),
    ],
)
def test_a_covariance_that_is_none_is_refused(mean, covariance, said):
    with pytest.raises(ValueError, match=said):
        GaussianBaseline.from_covariance(mean, covariance)
    with pytest.raises(ValueError, match="of 3 numbers, and the mean has 2"):
        GaussianBaseline.from_covariance(torch.zeros(2), torch.eye(2), shape=(3,))
