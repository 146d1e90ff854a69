"""Reference solutions: densities of mixtures, orders of the solvers, honest errors of random ones."""

import pytest
import torch

from f2d2_lightning import GaussianBaseline, Hutchinson, as_flow_map, reference_log_prob, reference_sample
from f2d2_lightning.divergence import Exact
from problems import PROBLEMS, Logistic, slope, z_score

close = torch.testing.assert_close
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE = ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"]


@pytest.fixture
def logistic():
    return Logistic()


def data_of(problem, count=8):
    x = problem.states(count, 1.0)
    return x, problem.log_prob(x, torch.ones(count))


def test_log_prob_is_the_exact_density(problem):
    x, exact = data_of(problem)
    with torch.no_grad():
        answer = reference_log_prob(problem.field, x, method="dopri5", rtol=1e-4, atol=1e-4)
    close(answer.value, exact, rtol=3e-2, atol=3e-2)
    # only the right density will do, and it is not that of the noise
    assert (exact - problem.log_prob(x, torch.zeros(8))).abs().max() > 0.5
    assert answer.standard_error is None
    assert answer.converged is None


@pytest.mark.parametrize("method", ORDERS)
def test_order_of_log_prob_and_state(logistic, method):
    x = logistic.data(8)
    noise, exact = logistic.solve(x)
    counts = (16, 32, 64) if method != "euler" else (64, 128, 256)
    with torch.no_grad():
        answers = [reference_log_prob(logistic.velocity, x, method=method, steps=n) for n in counts]
    value_errors = [float((a.value - exact).abs().max()) for a in answers]
    noise_errors = [float((a.noise - noise).abs().max()) for a in answers]
    assert ORDERS[method] - 0.3 < slope(counts, value_errors) < ORDERS[method] + 0.8
    assert ORDERS[method] - 0.3 < slope(counts, noise_errors) < ORDERS[method] + 0.8


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_solvers_reach_their_tolerance(logistic, method):
    x = logistic.data(4)
    _, exact = logistic.solve(x)
    tolerance = 1e-8 if method in ("dopri5", "dopri8") else 1e-5
    with torch.no_grad():
        tight = reference_log_prob(logistic.velocity, x, method=method, rtol=tolerance, atol=tolerance)
        loose = reference_log_prob(logistic.velocity, x, method=method, rtol=1e-2, atol=1e-2)
    close(tight.value, exact, rtol=100 * tolerance, atol=100 * tolerance)
    assert loose.evaluations < tight.evaluations
    assert (loose.value - exact).abs().max() > (tight.value - exact).abs().max()


def test_sample_is_the_gaussian_map(gaussian):
    noise = torch.randn(8, *gaussian.shape)
    with torch.no_grad():
        answer = reference_sample(gaussian.field, noise, method="dopri5", rtol=1e-9, atol=1e-9)
    close(answer.state, gaussian.jump(noise, torch.zeros(8), torch.ones(8))[0], rtol=1e-6, atol=1e-6)


def test_functions_maps_and_fields_agree(gaussian):
    """A velocity, a flow map and a joint map stand for the same flow: the diagonal."""
    x, _ = data_of(gaussian, 3)
    field = gaussian.field
    flow_map = as_flow_map(lambda y, s, t, cond: field(y, s, t).velocity)
    answers = [
        reference_log_prob(f, x, steps=8).value for f in (field, flow_map, lambda y, t, cond: field.velocity(y, t))
    ]
    close(answers[0], answers[1])
    close(answers[0], answers[2])


def test_evaluations_are_counted(mixture):
    x, _ = data_of(mixture, 2)
    calls = 0

    def field(y, t, cond):
        nonlocal calls
        calls += 1
        return mixture.field.velocity(y, t)

    assert reference_log_prob(field, x, steps=5, divergence=Hutchinson()).evaluations == 10 == calls
    calls = 0
    assert reference_sample(field, x, steps=5, method="rk4").evaluations == 20 == calls
    calls = 0
    adaptive = reference_sample(field, x, method="dopri5")
    assert adaptive.evaluations == calls > 6


def test_probes_average_out_along_the_path(logistic):
    """Fixed steps draw new probes each time: unbiased, with an error that is right and shrinks with the steps."""
    x = logistic.data(1)
    errors = []
    for steps in (16, 64):
        with torch.no_grad():
            answer = reference_log_prob(
                logistic.velocity, x.repeat(2000, 1), divergence=Hutchinson(4, "gaussian"), steps=steps
            )
            exact = reference_log_prob(logistic.velocity, x, steps=steps).value
        deviation = answer.value - exact
        assert abs(float(z_score(deviation))) < 4
        close(answer.standard_error.square().mean().sqrt(), deviation.std(), rtol=0.1, atol=0.0)
        errors.append(float(deviation.std()))
    assert 1.7 < errors[0] / errors[1] < 2.3  # a factor of two for four times the steps


def test_fixed_probes_under_an_adaptive_solver(logistic):
    """The integrand is deterministic, so the solver converges; over probes the answer is unbiased."""
    x = logistic.data(1)
    _, exact = logistic.solve(x)
    answers = []
    for tolerance in (1e-6, 1e-8):
        torch.manual_seed(4)
        hutchinson = Hutchinson(2, "gaussian")
        with torch.no_grad():
            answers.append(
                reference_log_prob(
                    logistic.velocity,
                    x.repeat(2000, 1),
                    divergence=hutchinson,
                    method="dopri5",
                    rtol=tolerance,
                    atol=tolerance,
                )
            )
    close(answers[0].value, answers[1].value, rtol=1e-2, atol=1e-2)
    assert answers[1].evaluations < 500
    assert abs(float(z_score(answers[1].value, exact))) < 4
    close(answers[1].standard_error.square().mean().sqrt(), answers[1].value.std(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("mode", ["forward", "reverse", "finite"])
def test_every_mode_integrates_the_same(mixture, mode):
    x, _ = data_of(mixture, 3)
    answers = []
    for each in ("forward", mode):
        torch.manual_seed(2)
        with torch.no_grad():
            answers.append(
                reference_log_prob(mixture.field, x, divergence=Hutchinson(2, mode=each, step=1e-4), steps=6).value
            )
    close(answers[0], answers[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(2)], ids=["exact", "hutchinson"])
def test_gradient_through_the_solver(logistic, divergence):
    x = logistic.data(3)

    def total(y):
        torch.manual_seed(0)
        return reference_log_prob(logistic.velocity, y, divergence=divergence, steps=20).value.sum()

    y = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(total(y), y)
    direction, h = torch.randn_like(x), 1e-5
    with torch.no_grad():
        difference = (total(x + h * direction) - total(x - h * direction)) / (2 * h)
    close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-6)


def test_classes_reach_the_field():
    flows = [GaussianBaseline.from_covariance(torch.zeros(2), c * torch.eye(2)) for c in (0.25, 4.0)]

    def field(x, t, cond):
        both = torch.stack([f.average_velocity(x, t, t) for f in flows])
        return both[cond, torch.arange(len(x))]

    x, cond = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    expected = torch.stack([f.log_prob(x, torch.ones(4)) for f in flows])[cond, torch.arange(4)]
    for divergence in (Exact(), Exact(1)):
        close(
            reference_log_prob(field, x, cond, divergence=divergence, method="rk4", steps=32).value,
            expected,
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["heun2", "dopri5"])
def test_dtypes(dtype, method):
    problem = PROBLEMS["gaussian-vector-linear"]()
    x, exact = data_of(problem)
    settings = {"steps": 128} if method == "heun2" else {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        answer = reference_log_prob(problem.field.to(dtype), x.to(dtype), method=method, **settings)
    assert answer.value.dtype == answer.noise.dtype == dtype
    close(answer.value.double(), exact, rtol=5e-3, atol=1e-2)


def narrow_gaussian():
    """Axes as narrow as dequantization noise beside wide ones: everything happens close to the data."""
    deviations = torch.tensor([0.003, 0.5, 0.003])
    return GaussianBaseline.from_covariance(torch.tensor([-1.0, 0.0, 0.5]), torch.diag(deviations**2))


@pytest.mark.parametrize("method", ["heun2", "rk4"])
def test_steps_near_the_data_resolve_narrow_axes(method):
    baseline = narrow_gaussian()
    flow = as_flow_map(lambda x, s, t, cond: baseline.average_velocity(x, s, t))
    x = baseline.mean + torch.randn(16, 3) * baseline.variances.sqrt() @ baseline.axes.T
    exact = baseline.log_prob(x, torch.ones(16))
    with torch.no_grad():
        even, close_by = (reference_log_prob(flow, x, method=method, steps=60, near_data=share) for share in (0.0, 0.6))
    errors = [float((answer.value - exact).abs().max()) for answer in (even, close_by)]
    assert errors[1] < 0.1 < errors[0] / 4
    assert close_by.evaluations == even.evaluations
    # the same path the other way
    with torch.no_grad():
        back = reference_sample(flow, close_by.noise, method=method, steps=60, near_data=0.6)
    close(back.state, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("share", "method", "message"),
    [(1.0, "heun2", r"in \[0, 1\)"), (-0.1, "rk4", r"in \[0, 1\)"), (0.5, "dopri5", "own steps")],
)
def test_near_data_is_a_share_of_fixed_steps(logistic, share, method, message):
    with pytest.raises(ValueError, match=message):
        reference_log_prob(logistic.velocity, logistic.data(2), method=method, near_data=share)
