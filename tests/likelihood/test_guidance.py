"""Self-guidance against closed forms and finite differences; what it costs is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.flows._held import HeldFlowMap
from f2d2_lightning.likelihood import SelfGuidance
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.nn import MLP
from problems import _covariance


class Counted(f2.JointMap):
    """Counts evaluations and, through a hook on its answer, backward passes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0

    def joint(self, x, s, t, cond):
        self.forwards += 1
        u, divergence = self.inner.joint(x, s, t, cond)
        if x.requires_grad:
            # the last evaluation's velocity does not enter the likelihood, its divergence does
            divergence.register_hook(self._count)
        return f2.flows.Joint(u, divergence)

    def _count(self, gradient):
        self.backwards += 1


def mixture(shape=(2,)):
    """A joint map with a non-linear velocity and divergence, differentiable in its state."""
    d = 2 if shape == (2,) else 16
    head = f2.DivergenceHead(features=24, hidden=8, baseline=f2.GaussianBaseline(shape, "full"))
    net = MLP(shape, width=24, blocks=1)
    for parameter in [*net.parameters(), *head.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    joint = f2.JointFlowMap(net, head).double().eval()
    assert joint.head.baseline.dim == d
    return joint


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_gaussian_noise_moves_as_the_closed_form_says(shape, steps, scale):
    d = torch.Size(shape).numel()
    baseline = f2.GaussianBaseline.from_covariance(torch.randn(d), _covariance(d, 0.2, 2.0, 0), shape=shape)
    noise = torch.randn(5, *shape)
    made = SelfGuidance(scale, steps)(f2.flows.GaussianFlow(baseline), noise, 2, with_log_prob=True)
    # log p of a Gaussian map's sample is log N(z) plus a constant: the gradient is -z
    assert torch.allclose(made.noise, noise * (1 - scale) ** steps)
    assert torch.equal(made.unguided_noise, noise)
    unguided = f2.sample(f2.flows.GaussianFlow(baseline), noise, 2, with_log_prob=True).log_prob
    assert torch.allclose(made.log_prob_before, unguided)
    assert bool((made.log_prob > unguided).all()) == (scale > 0)
    expected = normal_log_prob(made.noise) + unguided - normal_log_prob(noise)
    assert torch.allclose(made.log_prob, expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["joint", "frozen"])
@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
@pytest.mark.parametrize("likelihood_steps", [1, 2])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradient_against_finite_differences(shape, likelihood_steps, frozen, mode):
    joint = mixture(shape)
    if frozen:
        joint = f2.JointFlowMap(joint.flow_map, joint.head, frozen=True)
    with mode():
        noise = torch.randn(3, *shape)
        made = SelfGuidance(0.1, likelihood_steps=likelihood_steps)(joint, noise, 1)

    def value(z):
        with torch.no_grad():
            return f2.sample(joint, z, likelihood_steps, with_log_prob=True).log_prob

    gradient = torch.empty(3, noise[0].numel())
    for axis in range(gradient.shape[1]):
        shift = torch.zeros_like(noise).flatten(1)
        shift[:, axis] = 1e-5
        shift = shift.reshape(noise.shape)
        gradient[:, axis] = (value(noise + shift) - value(noise - shift)) / 2e-5
    assert torch.allclose(((made.noise - noise) / 0.1).flatten(1), gradient, atol=1e-6, rtol=1e-6)
    assert all(parameter.grad is None for parameter in joint.parameters())


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scale", [0.05, -0.05])
def test_adam_is_that_of_torch(shape, steps, scale):
    joint, noise = mixture(shape), torch.randn(3, *shape)
    with torch.inference_mode():
        made = SelfGuidance(scale, steps, method="adam")(joint, noise, 1)
    moved = noise.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([moved], lr=abs(scale), maximize=scale > 0)
    for _ in range(steps):
        optimizer.zero_grad()
        f2.sample(joint, moved, 1, with_log_prob=True).log_prob.sum().backward()
        optimizer.step()
    torch.testing.assert_close(made.noise, moved.detach())
    if steps == 1:
        torch.testing.assert_close((made.noise - noise).abs(), torch.full_like(noise, abs(scale)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance_steps", [1, 3])
@pytest.mark.parametrize("likelihood_steps", [1, 2])
@pytest.mark.parametrize("measure", [False, True])
def test_evaluations_are_counted(steps, guidance_steps, likelihood_steps, measure):
    counted = Counted(mixture())
    guidance = SelfGuidance(0.01, guidance_steps, likelihood_steps, measure=measure)
    made = guidance(counted, torch.randn(4, 2), steps)
    assert made.evaluations == counted.forwards
    assert made.backward_evaluations == counted.backwards == guidance_steps * likelihood_steps
    assert (made.log_prob_after is not None) == measure
    if measure:
        again = f2.sample(counted, made.noise, likelihood_steps, with_log_prob=True).log_prob
        assert torch.allclose(made.log_prob_after, again)
        assert bool((made.log_prob_after > made.log_prob_before).all())


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_times_of_any_kind_are_those_of_so_many_steps(kind):
    counted, noise = Counted(mixture()), torch.randn(4, 2)
    expected = SelfGuidance(0.01, likelihood_steps=2, measure=True)(counted, noise, 2)
    before = counted.forwards
    made = SelfGuidance(0.01, likelihood_steps=2, measure=True)(counted, noise, kind([0.0, 0.5, 1.0]))
    assert torch.equal(made.state, expected.state)
    assert torch.equal(made.log_prob_after, expected.log_prob_after)
    assert made.evaluations == counted.forwards - before == 4


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_keep_norm(shape):
    noise = torch.randn(6, *shape)
    made = SelfGuidance(0.3, 4, keep_norm=True, measure=True)(mixture(shape), noise, 1)
    assert torch.allclose(made.noise.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1))
    assert not torch.allclose(made.noise, noise)
    assert float((made.log_prob_after - made.log_prob_before).detach().mean()) > 0


def test_no_guidance_is_plain_sampling():
    joint, noise = mixture(), torch.randn(6, 2)
    made = SelfGuidance(0.0)(joint, noise, 4, with_log_prob=True)
    plain = f2.sample(joint, noise, 4, with_log_prob=True)
    assert torch.equal(made.state, plain.state)
    assert torch.equal(made.log_prob, plain.log_prob)


def test_conditioning_reaches_the_gradient():
    class Shifted(f2.JointMap):
        def joint(self, x, s, t, cond):
            # log p rises along the direction that cond gives
            return f2.flows.Joint(torch.zeros_like(x) * x, -(cond * x).sum(-1))

    cond = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    made = SelfGuidance(1.0)(Shifted(), torch.zeros(2, 2), 1, cond)
    assert torch.allclose(made.noise, cond)


class Squared(f2.JointMap):
    """Leads far noise to infinity."""

    def joint(self, x, s, t, cond):
        return f2.flows.Joint(x * x.detach().square(), x.sum(-1))


def test_wrong_use():
    with pytest.raises(ValueError, match="scale=nan; a finite number"):
        SelfGuidance(float("nan"))
    with pytest.raises(ValueError, match="at least 1"):
        SelfGuidance(steps=0)
    with pytest.raises(ValueError, match="has no divergence"):
        SelfGuidance()(MLP((2,)), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        SelfGuidance()(mixture(), torch.full((1, 2), torch.nan))
    with pytest.raises(FloatingPointError, match="lower the scale"):
        SelfGuidance(1e308, 4)(mixture(), torch.randn(3, 2))
    with pytest.raises(FloatingPointError, match="made samples NaN or infinite; lower the scale"):
        SelfGuidance(1e200)(Squared(), torch.randn(3, 2))
    to_noise = f2.JointFlowMap(MLP((2,), directions="to_noise", width=24), f2.DivergenceHead(features=24))
    with pytest.raises(ValueError, match="only goes to noise"):
        SelfGuidance()(to_noise, torch.zeros(1, 2))
    joint = mixture()
    held = f2.JointFlowMap(HeldFlowMap(joint.flow_map), joint.head)
    with pytest.raises(ValueError, match="without a graph"):
        SelfGuidance()(held, torch.zeros(1, 2))
