r"""Gaussian preconditioning: the exact map of the data's Gaussian fit, plus a network for the rest.

.. math::
    u(x, s, t) = u_0(x, s, t)
    + V \sqrt{w(t)}\; \frac{\theta(t) - \theta(s)}{t - s}\; n\big(w(s)^{-1/2} V^\top (x - \alpha_s \mu), s, t\big)

In whitened coordinates this reads ``z_t = z_s + (theta(t) - theta(s)) n(z_s, s, t)``
(:mod:`f2d2_lightning.flows.gaussian`): the network sees unit variances at every time and along every axis, and answers
in numbers of order one. On the diagonal the factor is the standard deviation that the conditional velocity has given
the state under the fit. It is the idea of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
Models", 2022, https://arxiv.org/abs/2206.00364, with the covariance in place of one number and a pair of times in
place of a noise level. Data whose axes differ in scale by orders of magnitude (pixels that hold only dequantization
noise beside pixels that hold the image) ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.flows.paths import distinct, expand_time, like, of_time
from f2d2_lightning.nn.mlp import MLP
from f2d2_lightning.nn.unet import UNet
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.configured import Configured


class GaussianPreconditioned(FlowMap):
    """A backbone in whitened coordinates on top of the Gaussian flow map.

    Args:
        network: Flow map on states of the same shape, in whitened coordinates.
        baseline: Gaussian fit, fitted on the training data before training starts.
        pixels: Turn whitened coordinates from the principal axes back to those of the data, and the network's answers
            from there to the axes: the symmetric root of the covariance, under which a pixel stays where it is, as
            convolutions need. (Bell and Sejnowski, "The independent components of natural scenes are edge filters",
            1997, https://doi.org/10.1016/S0042-6989(97)00121-1, call it ZCA.)
    """

    def __init__(self, network: FlowMap, baseline: GaussianBaseline, pixels: bool = False) -> None:
        super().__init__()
        self.network = network
        self.baseline = baseline
        self.pixels = pixels
        self.directions: Direction = network.directions

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one state, ``(d,)`` or ``(C, H, W)``."""
        return self.baseline.shape

    @property
    def conditional(self) -> bool | None:
        return self.network.conditional

    @property
    def condition(self) -> nn.Module | None:
        """Embedding of what the network is conditioned on, if anything."""
        return getattr(self.network, "condition", None)

    @property
    def features(self) -> int:
        """Feature channels of the network."""
        return int(self.network.features)  # type: ignore[arg-type]

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        s, t = expand_time(s, x), expand_time(t, x)
        baseline = self.baseline
        residual, features = self.network.forward_features(self.inputs(x, s), s, t, cond)
        scale = baseline.marginal_variances(t).sqrt() * baseline.angle_rate(s, t)
        along = baseline.to_axes(residual) if self.pixels else residual.reshape(len(x), -1)
        correction = baseline.from_axes(scale * along)
        return baseline.average_velocity(x, s, t) + correction, features

    def inputs(self, x: Tensor, s: Tensor) -> Tensor:
        """What the network sees of a state at times ``(B,)``; the whitened state, shape of ``x``, by default."""
        white = self.baseline.whiten(x, s)
        return self.baseline.from_axes(white) if self.pixels else white.reshape(x.shape)


class AngleEmbedding(nn.Module, Configured):
    """Embedding of a pair of times by the angles of five axes, from the narrowest to the widest.

    Along a narrow axis everything happens close to the data. Sinusoids of the angle resolve that without the fast
    sinusoids of time that make derivatives large.

    Args:
        baseline: Gaussian fit that gives the angles; shared with the network it is for.
        features: Width of the output.
    """

    def __init__(self, baseline: GaussianBaseline, features: int = 64) -> None:
        super().__init__()
        self.features = features
        # in a list, so that the baseline stays a submodule of its owner alone
        self._baseline = [baseline]
        inputs = 5 * 4 + 2
        self.start = nn.Linear(inputs, features)
        self.difference = nn.Linear(inputs, features, bias=False)
        self.project = nn.Linear(features, features)
        # a teacher never sees a difference; a student that starts from it sees none at first either
        nn.init.zeros_(self.difference.weight)

    @of_time
    def _waves(self, t: Tensor) -> Tensor:
        baseline = self._baseline[0]
        angles = baseline.angle(t)
        if angles.shape[-1] > 1:
            order = baseline.variances.argsort()
            picks = torch.linspace(0, len(order) - 1, 5, device=order.device).round().long()
            angles = angles[:, order[picks]]
        angles = angles.expand(len(t), 5)
        time = t[:, None]
        waves = (angles.cos(), angles.sin(), (2 * angles).cos(), (2 * angles).sin(), time, (math.pi * time).cos())
        return torch.cat(waves, -1)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """``(B,), (B,) -> (B, features)``, or ``(1, features)`` where all samples share both times."""
        s, t = distinct(s, t)
        first = self._waves(s)
        return self.project(nn.functional.silu(self.start(first) + self.difference(self._waves(t) - first)))


FEW_DIMENSIONS, WAVES = 8, 32
"""Dimensions up to which a perceptron sees waves, and how many."""


class PreconditionedMLP(GaussianPreconditioned):
    """A :class:`MLP` in whitened coordinates, its times embedded by angles: for vectors and small images.

    Args:
        shape: Shape of one state, ``(d,)`` or ``(C, H, W)``.
        covariance: Of the Gaussian fit, as for :class:`~f2d2_lightning.flows.gaussian.GaussianBaseline`.
        width: Features of the residual stream.
        blocks: Residual blocks.
        expansion: Width of a block's hidden layer, in units of ``width``.
        dropout: Probability of dropping a hidden unit in training.
        classes: Number of class labels; 0 for none.
        directions: Orders of time it is to be trained for.
        waves: As for :class:`MLP`; ``None`` for 32 up to 8 dimensions (docs/RECIPE.md) and none beyond.
        condition: As for :class:`MLP`.
    """

    BEFORE: ClassVar[Mapping[str, Any]] = {"waves": 0}
    """What arguments were in files that do not have them yet."""

    def __init__(
        self,
        shape: Sequence[int],
        covariance: str | None = None,
        width: int = 512,
        blocks: int = 2,
        expansion: int = 1,
        dropout: float = 0.0,
        classes: int = 0,
        directions: str = "both",
        waves: int | None = None,
        condition: int | nn.Module = 0,
    ) -> None:
        baseline = GaussianBaseline(shape, covariance)
        if waves is None:
            waves = WAVES if math.prod(shape) <= FEW_DIMENSIONS else 0
        embedding = AngleEmbedding(baseline)
        network = MLP(shape, width, blocks, expansion, dropout, classes, directions, embedding, waves, condition)
        super().__init__(network, baseline)


class PreconditionedUNet(GaussianPreconditioned):
    r"""A :class:`UNet` on top of the Gaussian flow map, its times embedded by angles: for images.

    With ``levels`` it is told how far each pixel is from the first and from the last level, where images have point
    masses (paper, black background, saturated light). Close to the data such a pixel is known to within one level, so
    the flow there is a hundred times steeper than elsewhere, and a network that saw the state alone would have to
    amplify its input as much: :math:`\operatorname{asinh}((x - \alpha_t e) / \sqrt{\sigma_t^2 + \alpha_t^2 b^2})`
    for an edge at ``e`` and the deviation ``b`` of the dequantization noise is of order one for pixels on it and the
    logarithm of the distance for the others.

    Args:
        shape: Shape of one image, ``(C, H, W)``.
        covariance: Of the Gaussian fit, as for :class:`~f2d2_lightning.flows.gaussian.GaussianBaseline`.
        levels: Levels of the discrete data, for the distances from the edges; ``None`` for no such features.
        low: Lower edge of the range that the levels fill.
        high: Upper edge.
        width: As for :class:`UNet`, like all that follow.
        multipliers: Channels at each resolution, in units of ``width``.
        blocks: Residual blocks per resolution.
        attention: Heights at which blocks attend.
        heads: Attention heads.
        patch: Side of the squares of pixels that become one position.
        dropout: Probability of dropping a hidden unit in training.
        classes: Number of class labels; 0 for none.
        directions: Orders of time it is to be trained for.
        checkpointing: Recompute activations in the backward pass.
        condition: As for :class:`UNet`.

    Raises:
        ValueError: If the sizes do not fit.
    """

    def __init__(
        self,
        shape: Sequence[int],
        covariance: str | None = None,
        levels: int | None = None,
        low: float = -1.0,
        high: float = 1.0,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        patch: int = 1,
        dropout: float = 0.0,
        classes: int = 0,
        directions: str = "both",
        checkpointing: bool = False,
        condition: int | nn.Module = 0,
    ) -> None:
        at_least(1, width=width)
        baseline = GaussianBaseline(shape, covariance)
        network = UNet(
            shape,
            width,
            multipliers,
            blocks,
            attention,
            heads,
            dropout,
            classes,
            directions,
            embedding=AngleEmbedding(baseline, 4 * width),
            scale_shift=True,
            patch=patch,
            inputs=shape[0] * (1 if levels is None else 3),
            checkpointing=checkpointing,
            condition=condition,
        )
        super().__init__(network, baseline, pixels=True)
        self.edges: tuple[float, ...] = ()
        if levels is not None:
            width_of_level = (high - low) / levels
            self.noise = width_of_level / math.sqrt(12)
            self.edges = (low + width_of_level / 2, high - width_of_level / 2)

    def inputs(self, x: Tensor, s: Tensor) -> Tensor:
        seen = [super().inputs(x, s)]
        if self.edges:
            alpha, sigma = self.baseline.path.alpha(s), self.baseline.path.sigma(s)
            deviation = like((sigma.square() + (alpha * self.noise).square()).sqrt(), x)
            seen += [torch.asinh((x - like(alpha, x) * edge) / deviation) for edge in self.edges]
        return torch.cat(seen, 1)
