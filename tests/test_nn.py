"""Backbones: derivatives in state and both times, any order of the times, classes, features."""

import pytest
import torch
from problems import PROBLEMS, randomise, rotation

from f2d2_lightning import GaussianBaseline
from f2d2_lightning.divergence import jacobian_product
from f2d2_lightning.nn import MLP, GaussianPreconditioned, IntervalEmbedding, ResNet

close = torch.testing.assert_close


def preconditioned(network, path=None):
    dim = torch.Size(network.shape).numel()
    covariance = rotation(dim, 3) @ torch.diag(torch.logspace(-2, 0.5, dim)) @ rotation(dim, 3).T
    return GaussianPreconditioned(
        network, GaussianBaseline.from_covariance(torch.linspace(-1, 1, dim), covariance, path, network.shape)
    )


NETWORKS = {
    "mlp vector": lambda **k: MLP((3,), width=16, blocks=2, **k),
    "mlp image": lambda **k: MLP((2, 2, 4), width=16, blocks=1, **k),
    "resnet": lambda **k: ResNet((2, 2, 4), width=8, blocks=1, **k),
    "preconditioned mlp": lambda **k: preconditioned(MLP((3,), width=16, blocks=1, **k)),
    "preconditioned resnet": lambda **k: preconditioned(ResNet((1, 2, 4), width=8, blocks=1, **k)),
}


@pytest.fixture(params=[(name, classes) for name in NETWORKS for classes in (0, 3)], ids=str)
def case(request):
    name, classes = request.param
    torch.manual_seed(1)
    network = randomise(NETWORKS[name](classes=classes), 0.2)
    shape = getattr(network, "network", network).shape
    cond = torch.tensor([2, 0, 1, 1]) if classes else None
    return network, torch.randn(4, *shape), torch.tensor([0.2, 0.9, 0.5, 0.6]), torch.tensor([0.8, 0.1, 0.5, 0.3]), cond


def central(function, h=1e-5):
    return ((function(h) - function(-h)) / (2 * h)).detach()


def test_jvp_in_the_state(case):
    network, x, s, t, cond = case
    v = torch.randn_like(x)
    with torch.no_grad():
        value, product = jacobian_product(lambda y: network(y, s, t, cond), x, v)
    close(value, network(x, s, t, cond).detach())
    close(product, central(lambda h: network(x + h * v, s, t, cond)), rtol=1e-6, atol=1e-7)
    assert product.abs().max() > 1e-2


@pytest.mark.parametrize("which", ["s", "t"])
def test_jvp_in_time(case, which):
    network, x, s, t, cond = case
    one = torch.ones(4)
    f = lambda a, b: network(x, a, b, cond)  # noqa: E731
    with torch.no_grad():
        if which == "s":
            _, product = jacobian_product(lambda a: f(a, t), s, one)
            expected = central(lambda h: f(s + h, t))
        else:
            _, product = jacobian_product(lambda b: f(s, b), t, one)
            expected = central(lambda h: f(s, t + h))
    close(product, expected, rtol=1e-6, atol=1e-7)
    assert product.abs().max() > 1e-3


def test_reverse_mode_agrees_with_forward(case):
    network, x, s, t, cond = case
    v, w = torch.randn_like(x), torch.randn_like(x)
    _, product = jacobian_product(lambda y: network(y, s, t, cond), x, v)
    y = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((network(y, s, t, cond) * w).sum(), y)
    close((gradient * v).sum(), (product * w).sum().detach())


def test_direction_matters(case):
    """Negative intervals are answered, and not as positive ones."""
    network, x, s, t, cond = case
    there, back = network(x, s, t, cond), network(x, t, s, cond)
    different = (there - back).flatten(1).abs().amax(1)
    assert bool((different[s != t] > 1e-4).all())
    assert bool((different[s == t] == 0).all())


def test_features_path_is_bitwise_the_forward_path(case):
    network, x, s, t, cond = case
    u, h = network.forward_features(x, s, t, cond)
    assert torch.equal(u, network(x, s, t, cond))
    assert h.shape[:2] == (4, network.features)
    assert (h[0] - h[1]).abs().max() > 1e-3


def test_samples_do_not_mix(case):
    network, x, s, t, cond = case
    alone = [
        network(x[i : i + 1], s[i : i + 1], t[i : i + 1], None if cond is None else cond[i : i + 1]) for i in range(4)
    ]
    close(torch.cat(alone), network(x, s, t, cond))


def test_classes_matter(case):
    network, x, s, t, cond = case
    if cond is not None:
        different = (network(x, s, t, cond) - network(x, s, t, (cond + 1) % 3)).flatten(1).abs().amax(1)
        assert bool((different > 1e-4).all())


def test_starts_at_zero_or_at_the_gaussian_map():
    for path in ("linear", "trigonometric"):
        problem = PROBLEMS[f"gaussian-vector-{path}"]()
        network = GaussianPreconditioned(MLP((3,), width=8, blocks=1), problem.baseline)
        s, t = torch.rand(5), torch.rand(5)
        x = problem.states_at(s)
        close(network(x, s, t), problem.field(x, s, t).velocity)
        close(network.network(x, s, t), torch.zeros_like(x))


def test_preconditioned_network_sees_unit_variances():
    """And its answer is scaled by the deviation of the conditional velocity: a unit answer has the exact spread."""
    problem = PROBLEMS["gaussian-vector-linear"]()
    seen = []

    class Watching(MLP):
        def forward_features(self, x, s, t, cond=None):
            seen.append(x)
            return torch.randn_like(x), x

    network = GaussianPreconditioned(Watching((3,)), problem.baseline)
    for time in (0.0, 0.4, 1.0):
        t = torch.full((20000,), time)
        x = problem.states(20000, time)
        answer = network(x, t, t) - problem.velocity(x, t)
        close(torch.cov(seen[-1].T), torch.eye(3), rtol=0, atol=0.05)
        close(seen[-1].mean(0), torch.zeros(3), rtol=0, atol=0.05)
        _, covariance = problem.moments(t[:1])
        expected = problem.covariances[0] @ torch.linalg.inv(covariance[0, 0])
        close(torch.cov(answer.T), expected, rtol=0, atol=0.06)


def test_embedding_tells_pairs_of_times_apart():
    embedding = IntervalEmbedding(16)
    s, t = torch.rand(50), torch.rand(50)
    assert (embedding(s, t) - embedding(t, s)).abs().amax(1).min() > 1e-3
    assert torch.pdist(embedding(s, t)).min() > 1e-3


def test_dropout_is_for_training_only():
    network, x = randomise(MLP((3,), width=16, blocks=1, dropout=0.5)), torch.randn(4, 3)
    assert not torch.equal(network(x, 0.0, 1.0), network(x, 0.0, 1.0))
    network.eval()
    assert torch.equal(network(x, 0.0, 1.0), network(x, 0.0, 1.0))
