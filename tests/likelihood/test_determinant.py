"""The density of a map's own jumps: against full Jacobians by reverse mode, closed forms, and itself backwards."""

import itertools

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.flows import Joint
from f2d2_lightning.likelihood import Determinant, Inversion
from f2d2_lightning.nn import PreconditionedMLP, PreconditionedUNet
from problems import PROBLEMS, Nothing, randomize, rotation

close = torch.testing.assert_close


class Lifted(f2.JointMap):
    """A map whose head says half a nat too much divergence."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def joint(self, x, s, t, cond):
        u, divergence = self.field(x, s, t)
        return Joint(u, divergence + 0.5)


def student(shape, cond=False, scale=0.15):
    """A network with random weights on a rotated Gaussian fit, and a head that knows nothing."""
    dim = torch.Size(shape).numel()
    make = PreconditionedUNet if len(shape) == 3 else PreconditionedMLP
    options = {"width": 8, "blocks": 1} | ({"multipliers": (1,)} if len(shape) == 3 else {})
    flow_map = randomize(make(shape, covariance="full", classes=3 if cond else 0, **options), scale)
    axes = rotation(dim, 1) * torch.logspace(-1.5, 0.3, dim)
    flow_map.baseline._set(torch.linspace(-1, 1, dim), axes @ axes.T)
    head = f2.DivergenceHead(flow_map.features, baseline=flow_map.baseline)
    return f2.JointFlowMap(flow_map, head).eval().requires_grad_(False)


def volume(joint, x, times, cond=None):
    """Change of log-density over jumps, from Jacobians by reverse mode, one sample after the other."""
    found = []
    for row in range(len(x)):
        state, total = x[row : row + 1], 0.0
        label = None if cond is None else cond[row : row + 1]
        for s, t in itertools.pairwise(times):

            def move(y, s=s, t=t, label=label):
                return joint.jump(y, s, t, label).state

            jacobian = torch.autograd.functional.jacobian(move, state).reshape(x[0].numel(), -1)
            total, state = total - torch.linalg.slogdet(jacobian).logabsdet, move(state)
        found.append(total)
    return torch.stack(found)


def normal(z):
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(-1)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["gaussian-vector-linear", "gaussian-image-linear"])
def test_a_gaussian_map_has_the_gaussians_density_whatever_its_head_says(name, steps):
    closed = PROBLEMS[name]()
    joint, x, noise = Lifted(closed.field), closed.states(5, 1.0), torch.randn(5, *closed.shape)
    truth = closed.log_prob(x, torch.ones(5))
    close(f2.log_prob(joint, x, steps).value, truth - 0.5)
    exact = f2.log_prob(joint, x, steps, determinant="exact")
    close(exact.value, truth)
    assert exact.standard_error is None
    assert exact.evaluations == steps * (1 + closed.dim)
    made = f2.sample(joint, noise, steps, with_log_prob=True, determinant="exact")
    close(made.log_prob, closed.log_prob(made.state, torch.ones(5)))


@pytest.mark.parametrize("shape", [(5,), (2, 4, 2)])
@pytest.mark.parametrize("count", [1, 3, 700])
def test_a_networks_own_density(shape, count):
    """One state, a few, and more than pass through the network at a time."""
    joint, x = student(shape), torch.randn(count, *shape)
    seen = min(count, 3)
    found = f2.log_prob(joint, x, 2, determinant="exact")
    expected = normal(found.noise) - volume(joint, x[:seen], (1.0, 0.5, 0.0)).repeat(count // seen + 1)[:count]
    close(found.value[:seen], expected[:seen])
    made = f2.sample(joint, x, 2, with_log_prob=True, determinant="exact")
    close(made.log_prob[:seen], normal(x[:seen]) + volume(joint, x[:seen], (0.0, 0.5, 1.0)))
    assert torch.equal(made.state, f2.sample(joint, x, 2).state)


@pytest.mark.parametrize("ask", ["sample", "log_prob", "inverted"])
def test_what_is_exact_has_the_gradients_of_its_differences(ask):
    joint, x, weight = student((3,)).requires_grad_(True), torch.randn(4, 3), torch.randn(4)
    about = next(p for name, p in joint.flow_map.named_parameters() if name.endswith("outlet.weight"))

    def value(moved, noise):
        if ask == "sample":
            return f2.sample(joint, noise, 2, with_log_prob=True, determinant=moved).log_prob @ weight
        inversion = Inversion("newton") if ask == "inverted" else None
        return f2.log_prob(joint, noise, 2, inversion=inversion, determinant=moved).value @ weight

    states = x.clone().requires_grad_(True)
    found = torch.autograd.grad(value("exact", states), (states, about))
    for part, place, index in ((states, x, (1, 2)), (about, about.data, (0, 5))):
        differences, kept = [], place[index].item()
        for step in (1e-5, -1e-5):
            place[index] = kept + step
            with torch.no_grad():
                differences.append(float(value("exact", x)))
        place[index] = kept
        slope = found[0 if part is states else 1][index]
        close(slope, torch.tensor((differences[0] - differences[1]) / 2e-5), rtol=1e-4, atol=1e-6)
    if ask != "inverted":
        assert not value(Determinant(probes=2, iterations=2), x).requires_grad


def test_conditions_stay_with_their_states():
    joint, x, labels = student((4,), cond=True), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    for determinant in ("exact", Determinant(probes=400, iterations=4)):
        made = f2.sample(joint, x, 2, labels, with_log_prob=True, determinant=determinant)
        expected = normal(x) + volume(joint, x, (0.0, 0.5, 1.0), labels)
        off = (made.log_prob - expected).abs()
        assert bool((off < (1e-9 if determinant == "exact" else 4 * made.standard_error + 1e-9)).all())


def test_a_sampler_is_as_likely_inverted_as_it_was_when_it_drew():
    joint = student((4,))
    made = f2.sample(joint, torch.randn(6, 4), 4, with_log_prob=True, determinant="exact")
    inversion = Inversion("newton", tolerance=1e-11)
    found = f2.log_prob(joint, made.state, 4, inversion=inversion, determinant="exact")
    assert bool(found.converged.all())
    close(found.noise, made.noise, rtol=0, atol=1e-8)
    close(found.value, made.log_prob, rtol=0, atol=1e-7)


@pytest.mark.parametrize("with_fit", [True, False])
@pytest.mark.parametrize("shape", [(12,), (2, 4, 2)])
def test_the_estimate_is_unbiased_and_knows_its_error(shape, with_fit):
    """As many iterations as dimensions leave probes' noise alone, whose size is said."""
    joint = student(shape)
    if not with_fit:
        joint.head.baseline = None
    x, dim = torch.randn(6, *shape), torch.Size(shape).numel()
    exact = f2.log_prob(joint, x, 2, determinant="exact")
    found = f2.log_prob(joint, x, 2, determinant=Determinant(probes=64, iterations=dim))
    assert found.evaluations == 2 * (1 + dim * 64)
    z = (found.value - exact.value) / found.standard_error
    assert float(z.abs().max()) < 4
    assert float(z.abs().mean()) > 0.1


def test_few_iterations_are_enough_beside_a_fit():
    """The Gaussian's own jump is known: what is left is close to the identity, where without it nothing is."""
    joint = student((64,), scale=0.03)
    x = joint.flow_map.baseline.unwhiten(torch.randn(8, 64), torch.ones(8))
    exact = f2.log_prob(joint, x, 1, determinant="exact").value
    found = f2.log_prob(joint, x, 1, determinant=Determinant(probes=16, iterations=6))
    error = float((found.value - exact).abs().mean())
    joint.head.baseline = None
    without = f2.log_prob(joint, x, 1, determinant=Determinant(probes=16, iterations=6))
    assert error < 0.2 * float((without.value - exact).abs().mean())
    assert error < 3 * float(found.standard_error.mean())


@pytest.mark.parametrize("direction", ["to_data", "to_noise"])
def test_a_steep_jump_is_estimated_within_its_error(direction):
    """Singular values from .01 to 100 or so: iterations on the product with the transpose would miss half of it."""
    dim = 200
    turned = torch.linalg.qr(torch.randn(dim, dim))[0]
    slope = turned @ torch.logspace(-2, 2, dim).diag() @ (turned.T + 0.02 * torch.randn(dim, dim) / dim**0.5)
    away = (slope - torch.eye(dim)).T * (1 if direction == "to_data" else -1)
    joint = f2.JointFlowMap(f2.as_flow_map(lambda x, s, t, c: x @ away), f2.DivergenceHead(network=Nothing()))
    x, s = torch.randn(30, dim), torch.full((30,), float(direction == "to_noise"))
    found, error = Determinant(16).log_volume(joint, x, s, 1 - s)
    z = (found - torch.linalg.slogdet(slope).logabsdet) / error
    assert float(z.square().mean()) < 2
    assert float(error.mean()) < 0.25 * dim


def test_what_is_exact_of_a_gaussian_has_no_noise():
    closed = PROBLEMS["gaussian-vector-linear"]()
    joint = Lifted(closed.field)
    joint.head = f2.DivergenceHead(features=1, baseline=closed.baseline)
    joint.head.baseline.fitted.fill_(True)
    x = closed.states(4, 1.0)
    found = f2.log_prob(joint, x, 3, determinant=Determinant(probes=2, iterations=2))
    close(found.value, closed.log_prob(x, torch.ones(4)))
    close(found.standard_error, torch.zeros(4), rtol=0, atol=1e-9)


def test_in_inference_mode():
    joint, x = student((5,)), torch.randn(3, 5)
    for determinant in ("exact", Determinant(2, 5)):
        torch.manual_seed(1)
        plain = f2.log_prob(joint, x, 1, determinant=determinant).value
        torch.manual_seed(1)
        with torch.inference_mode():
            close(f2.log_prob(joint, x, 1, determinant=determinant).value, plain)


def test_many_dimensions_are_estimated_and_few_exact():
    small, large = student((5,)), student((300,))
    assert f2.log_prob(small, torch.randn(2, 5), 1, determinant=Determinant()).standard_error is None
    assert f2.log_prob(large, torch.randn(2, 300), 1, determinant=Determinant(iterations=2)).standard_error is not None


def test_what_cannot_be():
    joint, x = student((5,)), torch.randn(2, 5)
    with pytest.raises(ValueError, match="determinant is 'head'; it is 'exact'"):
        f2.log_prob(joint, x, determinant="head")
    with pytest.raises(ValueError, match="with_log_prob=True"):
        f2.sample(joint, x, determinant="exact")
    with pytest.raises(ValueError, match="probes=-1"):
        Determinant(probes=-1)
