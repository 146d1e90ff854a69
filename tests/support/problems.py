"""Test problems that know their answer, written without the package's formulas.

One family: mixtures of rotated anisotropic Gaussians with non-zero means. With one component the flow map is known too.
Their Jacobians are not diagonal (Rademacher probes would be exact there) and their divergence is far from zero (or a
flipped sign would pass).
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from f2d2_lightning import Direction, GaussianBaseline, JointMap
from f2d2_lightning.flows import GaussianFlow, Joint, LinearPath, MixtureFlow, TrigonometricPath
from f2d2_lightning.flows.paths import like


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, ...]
    trigonometric: bool
    weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def dim(self):
        return math.prod(self.shape)

    @property
    def path(self):
        return TrigonometricPath() if self.trigonometric else LinearPath()

    @functools.cached_property
    def baseline(self):
        return GaussianBaseline.from_covariance(self.means[0], self.covariances[0], self.path, self.shape)

    @functools.cached_property
    def field(self):
        """The package's answer: a joint map for one Gaussian, a velocity for mixtures."""
        if len(self.weights) == 1:
            return GaussianFlow(self.baseline)
        return MixtureFlow(self.weights, self.means, self.covariances, self.shape, self.path)

    def coefficients(self, t):
        return coefficients(self.path, t)

    def moments(self, t):
        """Means ``(B, K, d)`` and covariances ``(B, K, d, d)`` at times ``(B,)``."""
        a, b, _, _ = (c[:, None, None] for c in self.coefficients(t))
        eye = torch.eye(self.dim)
        return a * self.means, b[..., None] ** 2 * eye + a[..., None] ** 2 * self.covariances

    def marginal(self, t):
        """Distribution of flattened states at times ``(B,)``."""
        means, covariances = self.moments(t)
        components = MultivariateNormal(means, covariances, validate_args=False)
        weights = Categorical(self.weights.expand(len(t), -1), validate_args=False)
        return MixtureSameFamily(weights, components, validate_args=False)

    def log_prob(self, x, t):
        return self.marginal(t).log_prob(x.flatten(1))

    def states(self, count, t):
        """Draws at one time, ``(count, *shape)``."""
        return self.marginal(torch.full((count,), float(t))).sample().reshape(count, *self.shape)

    def states_at(self, t):
        """One draw at each time, ``(B, *shape)``."""
        return self.marginal(t).sample().reshape(len(t), *self.shape)

    def velocity(self, x, t):
        """``sum_k p(k | x) (alpha' m_k + (sigma sigma' I + alpha alpha' S_k) C_k^-1 (x - alpha m_k))``."""
        a, b, da, db = (c[:, None, None] for c in self.coefficients(t))
        means, covariances = self.moments(t)
        flat = x.flatten(1)[:, None]
        posterior = MultivariateNormal(means, covariances, validate_args=False).log_prob(flat) + self.weights.log()
        solved = torch.linalg.solve(covariances, (flat - means)[..., None])
        growth = (b * db)[..., None] * torch.eye(self.dim) + (a * da)[..., None] * self.covariances
        components = da * self.means + (growth @ solved).squeeze(-1)
        return (posterior.softmax(-1)[..., None] * components).sum(1).reshape(x.shape)

    def divergence(self, x, t):
        return trace(lambda y: self.velocity(y, t), x)

    def jump(self, x, s, t):
        """``alpha_t m + (C_t C_s^-1)^(1/2) (x - alpha_s m)``, and the change of log-density; one component only."""
        assert len(self.weights) == 1
        (m_s, c_s), (m_t, c_t) = self.moments(s), self.moments(t)
        axes = torch.linalg.eigh(self.covariances[0]).eigenvectors
        values_s, values_t = ((axes.T @ c[:, 0] @ axes).diagonal(dim1=1, dim2=2) for c in (c_s, c_t))
        matrix = axes @ torch.diag_embed((values_t / values_s).sqrt()) @ axes.T
        moved = m_t[:, 0] + (matrix @ (x.flatten(1) - m_s[:, 0])[..., None]).squeeze(-1)
        return moved.reshape(x.shape), -0.5 * (torch.logdet(c_t[:, 0]) - torch.logdet(c_s[:, 0]))


def coefficients(path, t):
    """``alpha, sigma`` and their derivatives, not by the package."""
    if isinstance(path, LinearPath):
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    a, b = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
    return a, b, math.pi / 2 * b, -math.pi / 2 * a


def trace(function, x):
    """Trace of the Jacobian of a batched function, by reverse mode."""
    x = x.detach().requires_grad_(True)
    value = function(x).flatten(1)
    rows = [torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(value.shape[1])]
    return torch.stack(rows, 1).diagonal(dim1=1, dim2=2).sum(-1)


def rotation(dim, seed):
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def _covariance(dim, low, high, seed):
    axes = rotation(dim, seed)
    return (axes * torch.logspace(math.log10(low), math.log10(high), dim, dtype=torch.float64)) @ axes.T


def _gaussian(shape, trigonometric):
    dim = math.prod(shape)
    mean = torch.linspace(-1.0, 1.5, dim, dtype=torch.float64)
    covariance = _covariance(dim, 0.02, 1.5, seed=dim)
    return Problem(shape, trigonometric, torch.ones(1, dtype=torch.float64), mean[None], covariance[None])


def _mixture(shape, trigonometric):
    dim = math.prod(shape)
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    directions = rotation(dim, seed=7)
    means = torch.stack([1.5 * directions[0], -1.5 * directions[0] + directions[1]])
    covariances = torch.stack([_covariance(dim, 0.1, 0.6, seed=20 + k) for k in range(2)])
    return Problem(shape, trigonometric, weights, means, covariances)


_KINDS = {
    "gaussian-vector": (_gaussian, (3,)),
    "gaussian-image": (_gaussian, (2, 2, 2)),
    "mixture-vector": (_mixture, (2,)),
    "mixture-image": (_mixture, (1, 2, 2)),
}
PROBLEMS = {
    f"{kind}-{'trigonometric' if curved else 'linear'}": functools.partial(make, shape, curved)
    for kind, (make, shape) in _KINDS.items()
    for curved in (False, True)
}


class Logistic:
    """``dy/dt = R f(R^T y)`` with ``f(x) = 2 (1 + t) x (1 - x)``: non-linear, cheap, and solved in closed form."""

    def __init__(self, dim=3):
        self.axes = rotation(dim, 11)

    def velocity(self, y, t, cond=None):
        x = y @ self.axes
        return (2 * (1 + t)[:, None] * x * (1 - x)) @ self.axes.T

    def data(self, count):
        return (0.1 + 0.8 * torch.rand(count, len(self.axes))) @ self.axes.T

    def solve(self, y):
        """Noise that data come from, and their log-density."""
        x = (y @ self.axes).detach()
        odds = (1 / x - 1) * math.exp(3.0)  # the integral of 2 (1 + t) over [0, 1]
        z = 1 / (1 + odds)
        log_det = (z * (1 - z) / (x * (1 - x))).log().sum(-1)
        normal = -0.5 * (z.square().sum(-1) + z.shape[1] * math.log(2 * math.pi))
        return z @ self.axes.T, normal + log_det


class LogisticMap(JointMap):
    """The logistic flow's own joint map: a divergence that depends on the state."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def joint(self, x, s, t, cond):
        # the integral of 2 (1 + t), and its divided difference
        rate = 2 + s + t
        growth = torch.exp((t - s) * rate)[:, None]
        average = (rate * _expm1_ratio((t - s) * rate))[:, None]
        y = x @ self.flow.axes
        below = 1 - y + y * growth
        u = average * y * (1 - y) / below
        # log of dX/dy = growth / below^2
        slope = 2 * average * y * _log1p_ratio((t - s)[:, None] * average * y)
        return Joint(u @ self.flow.axes.T, (rate[:, None] - slope).sum(-1))


def _expm1_ratio(z):
    small = z.abs() < 1e-5
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 + z / 2 + z * z / 6, torch.expm1(safe) / safe)


def _log1p_ratio(z):
    small = z.abs() < 1e-5
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 - z / 2 + z * z / 3, torch.log1p(safe) / safe)


class Mutant(JointMap):
    """A joint map with one thing wrong: what an objective must notice."""

    def __init__(self, original, mutation):
        super().__init__()
        self.original, self.mutation = original, mutation

    def joint(self, x, s, t, cond):
        if self.mutation == "swapped directions":
            return self.original(x, t, s, cond)
        u, divergence = self.original(x, s, t, cond)
        if self.mutation == "u flipped":
            return Joint(-u, divergence)
        assert self.mutation == "D flipped"
        return Joint(u, -divergence)


MUTATIONS = ("D flipped", "u flipped", "swapped directions")


class Student(JointMap):
    """The closed form, perturbed by learnable amounts; the velocity's diagonal stays exact if ``anchored``."""

    def __init__(self, flow, anchored=True):
        super().__init__()
        self.flow, self.anchored = flow, anchored
        self.amounts = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.4]))

    def joint(self, x, s, t, cond):
        u, divergence = self.flow(x, s, t)
        a, b, c = self.amounts
        gap = like(t - s, x) if self.anchored else 1.0
        bent = u + gap * (a * torch.sin(x.flip(1)) + b * torch.cos(2 * x) * like(t, x))
        return Joint(bent, divergence + c * torch.cos(x.flatten(1).sum(-1) + t) + b * s * t)


def randomize(module, scale=0.3, seed=0):
    """Fill zero-initialised layers too, so that nothing is zero for a wrong reason."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


class Nothing(torch.nn.Module):
    """A head's own network that adds nothing."""

    def forward(self, x, s, t, cond=None):
        return x.new_zeros(len(x))


@torch.no_grad()
def moved(function, tensor, direction, h=1e-5):
    """Central difference of ``function()`` where a tensor is moved in place along a direction."""
    tensor.add_(h * direction)
    ahead = function()
    tensor.sub_(2 * h * direction)
    behind = function()
    tensor.add_(h * direction)
    return (ahead - behind) / (2 * h)


def slope(steps, errors):
    """Order of convergence: minus the slope of log error against log steps."""
    x, y = torch.log(torch.as_tensor(steps, dtype=torch.float64)), torch.log(torch.as_tensor(errors))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / (x * x).sum())


def z_score(samples, expected=0.0):
    """Deviation of the mean over the first axis, in standard errors."""
    difference = samples - expected
    return difference.mean(0) / (difference.std(0) / len(difference) ** 0.5)


class ToData(JointMap):
    """The same map, known only towards the data."""

    directions = Direction.TO_DATA

    def __init__(self, original):
        super().__init__()
        self.original = original

    def joint(self, x, s, t, cond):
        return self.original(x, s, t, cond)


class LinearGaussian:
    """``theta ~ N(m, S)``, ``x = A theta + b + noise``: the posterior of ``theta`` given ``x`` in closed form.

    The observations have other scales and other offsets than the parameters, and are more.
    """

    def __init__(self, dim=2, seen=3):
        self.shape, self.seen = (dim,), seen
        self.mean = torch.linspace(-0.5, 0.8, dim, dtype=torch.float64)
        self.covariance = _covariance(dim, 0.4, 1.5, seed=3)
        generator = torch.Generator().manual_seed(5)
        self.matrix = 20 * torch.randn(seen, dim, generator=generator, dtype=torch.float64)
        self.offset = torch.linspace(100.0, 300.0, seen, dtype=torch.float64)
        self.noise = 15.0

    def draw(self, count):
        """Pairs ``(count, dim), (count, seen)``."""
        theta = MultivariateNormal(self.mean, self.covariance).sample((count,))
        return theta, theta @ self.matrix.T + self.offset + self.noise * torch.randn(count, self.seen)

    def posterior(self, x):
        """Distribution of ``theta`` for each ``x``, ``(B, seen)``: ``C = (S^-1 + A^T A / noise^2)^-1``."""
        precision = torch.linalg.inv(self.covariance) + self.matrix.T @ self.matrix / self.noise**2
        covariance = torch.linalg.inv(precision)
        pull = torch.linalg.solve(self.covariance, self.mean) + (x - self.offset) @ self.matrix / self.noise**2
        return MultivariateNormal(pull @ covariance, covariance)

    def velocity(self, theta, t, cond):
        """Of the linear path from noise to the posterior."""
        posterior = self.posterior(cond)
        eye, t = torch.eye(len(self.mean)), t[:, None]
        marginal = ((1 - t) ** 2)[..., None] * eye + (t**2)[..., None] * posterior.covariance_matrix
        growth = (t - 1)[..., None] * eye + t[..., None] * posterior.covariance_matrix
        away = torch.linalg.solve(marginal, (theta - t * posterior.mean)[..., None])
        return posterior.mean + (growth @ away).squeeze(-1)
