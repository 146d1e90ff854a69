"""Gaussian mixtures on a path: exact density, velocity and samples at every time. Toy data and ground truth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.paths import Path, expand_time
from f2d2_lightning.utils.conditions import Cond


class MixtureFlow(nn.Module):
    r"""The exact marginal velocity of a Gaussian mixture.

    The velocity is the average of the components' own velocities, weighted by the posterior of the component:
    :math:`v(x, t) = \sum_k p(k \mid x, t)\, v_k(x, t)`.

    Args:
        weights: Mixture weights, ``(K,)``, positive; normalised here.
        means: ``(K, d)``.
        covariances: ``(K, d, d)``.
        shape: Shape of one state with ``d`` entries; ``(d,)`` by default.
        path: Probability path; the linear one by default.

    >>> flow = MixtureFlow(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    >>> flow.velocity(torch.ones(1, 2), 0.0)  # towards the mean at unit speed
    tensor([[-1., -1.]])
    """

    log_weights: Tensor

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        shape: tuple[int, ...] | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        if bool((weights <= 0).any()) or len({len(weights), len(means), len(covariances)}) != 1:
            raise ValueError(
                f"weights {tuple(weights.shape)} must be positive and as many as means {tuple(means.shape)} and "
                f"covariances {tuple(covariances.shape)}"
            )
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.components = nn.ModuleList(
            GaussianBaseline.from_covariance(m, c, path=path, shape=shape)
            for m, c in zip(means, covariances, strict=True)
        )

    def _baselines(self) -> list[GaussianBaseline]:
        return [c for c in self.components if isinstance(c, GaussianBaseline)]

    def _joint_log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """``log p(x, k)`` at time ``t``, ``(B, K)``."""
        return torch.stack([c.log_prob(x, t) for c in self._baselines()], -1) + self.log_weights

    def log_prob(self, x: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """Log-density at time ``t``, ``(B,)``, nats."""
        return self._joint_log_prob(x, expand_time(t, x)).logsumexp(-1)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Marginal velocity, shape of ``x``."""
        t = expand_time(t, x)
        posterior = self._joint_log_prob(x, t).softmax(-1)
        velocities = torch.stack([c.average_velocity(x, t, t) for c in self._baselines()], -1)
        return (velocities * posterior.reshape(len(x), *(1 for _ in x.shape[1:]), -1)).sum(-1)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """As :meth:`velocity`."""
        return self.velocity(x, t, cond)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws from the data distribution, ``(count, *shape)``."""
        weights = self.log_weights.exp()
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        baselines = self._baselines()
        z = torch.randn(count, baselines[0].dim, dtype=weights.dtype, generator=generator)
        x = torch.stack([c.from_axes(c.variances.sqrt() * z) + c.mean.reshape(c.shape) for c in baselines])
        return x[which, torch.arange(count)]
