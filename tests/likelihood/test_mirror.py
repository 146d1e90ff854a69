"""A density made symmetric by a fair coin: against the closed form, normalised, and between what bounds it."""

from __future__ import annotations

import math

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.likelihood import mirrored_log_prob
from f2d2_lightning.likelihood.mirror import mirror
from problems import PROBLEMS


@pytest.fixture(params=["gaussian-image-linear", "mixture-image-linear"])
def image(request):
    """Densities of images, asymmetric."""
    return PROBLEMS[request.param]()


def density(problem):
    return lambda x: problem.log_prob(x, torch.ones(len(x)))


def mirrored_problem(problem):
    """The same family with the pixels' order reversed in each row: mirrored means and covariances."""
    order = torch.arange(problem.dim).reshape(problem.shape).flip(-1).flatten()
    means, covariances = problem.means[:, order], problem.covariances[:, order][:, :, order]
    return type(problem)(problem.shape, problem.trigonometric, problem.weights, means, covariances)


def both(problem, widened=1.0):
    """Half the one and half the other, in closed form."""
    other = mirrored_problem(problem)
    return type(problem)(
        problem.shape,
        problem.trigonometric,
        torch.cat((problem.weights, other.weights)) / 2,
        torch.cat((problem.means, other.means)),
        widened * torch.cat((problem.covariances, other.covariances)),
    )


def test_it_is_the_mixture_of_the_density_and_its_mirror_image(image):
    x = torch.cat((image.states(50, 1.0), mirror(image.states(50, 1.0)), 3 * torch.randn(20, *image.shape)))
    found = mirrored_log_prob(density(image), x)
    assert torch.allclose(found, density(both(image))(x), rtol=0, atol=1e-10)
    assert float((found - density(image)(x)).abs().max()) > 0.5
    assert torch.allclose(mirrored_log_prob(density(image), mirror(x)), found, rtol=0, atol=1e-10)


def test_a_symmetric_density_stays_as_it_is():
    def log_prob(x):
        return -0.5 * (x.square().flatten(1).sum(1) + 4 * math.log(2 * math.pi))

    x = torch.randn(30, 1, 2, 2)
    assert torch.allclose(mirrored_log_prob(log_prob, x), log_prob(x), rtol=0, atol=1e-12)


def test_of_a_flow_map_with_labels():
    """With a joint map's own likelihood, and conditioning beforehand; gradients go through both evaluations."""
    problem = PROBLEMS["gaussian-image-linear"]()
    x = problem.states(7, 1.0).requires_grad_(True)
    cond = torch.arange(7)
    calls = []

    class Shifted(f2.JointMap):
        def joint(self, x, s, t, cond):
            calls.append(cond)
            return problem.field.joint(x, s, t, None)

    q = mirrored_log_prob(lambda x: f2.log_prob(Shifted(), x, 1, cond).value, x)
    assert torch.allclose(q, mirrored_log_prob(density(problem), x), rtol=0, atol=1e-8)
    assert len(calls) == 2
    assert all(torch.equal(c, cond) for c in calls)
    q.sum().backward()
    assert bool((x.grad.flatten(1).norm(dim=1) > 0).all())


def test_what_has_no_density_has_none():
    x = torch.zeros(3, 1, 1, 2)
    values = iter([torch.tensor([-math.inf, 0.0, math.nan]), torch.tensor([-math.inf, -math.inf, 0.0])])
    q = mirrored_log_prob(lambda x: next(values), x)
    assert float(q[0]) == -math.inf
    assert float(q[1]) == pytest.approx(-math.log(2))
    assert bool(q[2].isnan())


@pytest.mark.parametrize(
    ("x", "log_prob", "message"),
    [
        (torch.zeros(3), lambda x: x, r"x has shape \(3,\)"),
        (torch.zeros(3, 2), lambda x: x, r"log_prob gave shape \(3, 2\) for states \(3, 2\); a tensor \(3,\)"),
        (torch.zeros(3, 2), lambda x: "x", "log_prob gave a str .*its .value"),
    ],
)
def test_errors(x, log_prob, message):
    with pytest.raises(ValueError, match=message):
        mirrored_log_prob(log_prob, x)
