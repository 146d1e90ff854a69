r"""Gaussian preconditioning: the exact map of the data's Gaussian fit, plus a network for the rest.

.. math::
    u(x, s, t) = u_0(x, s, t) + V \sqrt{\lambda / w(s)}\; n\big(w(s)^{-1/2} V^\top (x - \alpha_s \mu), s, t\big)

The network ``n`` sees unit variances at every time and along every axis, and its answer is scaled by the standard
deviation that the conditional velocity has given the state under the fit (on the linear path,
``Var(x_1 - eps | x_t) = lambda / w(t)`` per axis). It is the idea of Karras et al., "Elucidating the Design Space of
Diffusion-Based Generative Models", 2022, https://arxiv.org/abs/2206.00364, with the full covariance in place of one
number and a pair of times in place of a noise level. Data whose axes differ in scale by orders of magnitude (pixels
that hold only dequantisation noise beside pixels that hold the image) ask for it.
"""

from __future__ import annotations

from torch import Tensor

from f2d2_lightning.baseline import GaussianBaseline
from f2d2_lightning.flow_map import Direction, FlowMap
from f2d2_lightning.paths import expand_time

__all__ = ["GaussianPreconditioned"]


class GaussianPreconditioned(FlowMap):
    """A backbone in whitened coordinates on top of the Gaussian flow map.

    Args:
        network: Flow map on states of the same shape, in coordinates along the principal axes.
        baseline: Gaussian fit, fitted on the training data before training starts.
    """

    def __init__(self, network: FlowMap, baseline: GaussianBaseline) -> None:
        super().__init__()
        self.network = network
        self.baseline = baseline
        self.directions: Direction = network.directions

    @property
    def features(self) -> int:
        """Feature channels of the network."""
        return int(self.network.features)  # type: ignore[arg-type]

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        return self.forward_features(x, s, t, cond)[0]

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s, t = expand_time(s, x), expand_time(t, x)
        baseline = self.baseline
        white = baseline.whiten(x, s).reshape(x.shape)
        residual, features = self.network.forward_features(white, s, t, cond)
        scale = (baseline.variances / baseline.marginal_variances(s)).sqrt()
        correction = baseline.from_axes(scale * residual.reshape(len(x), -1))
        return baseline.average_velocity(x, s, t) + correction, features
