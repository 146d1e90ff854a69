r"""The divergence head, and the joint flow map that it makes of a backbone.

The divergence of image flows is thousands of nats, most of it the same for every image. The head therefore learns a
residual, :math:`D(x, s, t) = D_0(s, t) + \mathrm{scale} \cdot \mathrm{head}(x, s, t)`, with the Gaussian fit's
closed form as :math:`D_0` (:mod:`f2d2_lightning.flows.gaussian`) and a scale measured on data. Both are buffers, kept
in the checkpoint; there are no magic constants.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Direction, FlowMap, Joint, JointMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.nn.embedding import IntervalEmbedding
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.configured import Configured


class Head(nn.Module, Configured):
    """What every divergence head does: a residual times ``scale``, beside the closed form of a Gaussian fit, if any."""

    scale: Tensor
    per_axis = False
    """Whether it answers by the baseline's principal axes."""
    reads_features = True
    """Whether the head needs the backbone's features."""

    def __init__(self, baseline: GaussianBaseline | None = None) -> None:
        super().__init__()
        self.baseline = baseline
        self.register_buffer("scale", torch.ones(()))

    def residual(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None, features: Tensor | None) -> Tensor:
        """What is learned, ``(B,)``, in units of ``scale``; arguments as :meth:`forward`, in the head's precision."""
        raise NotImplementedError

    @property
    def precision(self) -> torch.dtype:
        """Type that divergences are computed in; half precision is a ``ValueError``."""
        dtype = self.scale.dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the divergence head is in {dtype}, in which thousands of nats are rounded to whole ones; keep it in "
                "float32 (head.float()), and use mixed precision for the network: bf16-mixed"
            )
        return dtype

    def forward(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Average divergence from ``s`` to ``t``.

        Args:
            x: State at time ``s``, ``(B, ...)``.
            s: Time of ``x``, ``()`` or ``(B,)``.
            t: Target time, ``()`` or ``(B,)``.
            cond: Conditioning, for a head with its own network.
            features: ``(B, F)`` or ``(B, F, H, W)``, for a head on features.

        Returns:
            ``D``, ``(B,)``, nats per unit of time.

        Raises:
            ValueError: If features are missing or have another number of channels, states have another shape than the
                baseline's, or the head is of half precision.
        """
        dtype = self.precision
        if self.baseline is not None:
            self.baseline.check(x)
        s, t = expand_time(s, x).to(dtype), expand_time(t, x).to(dtype)
        # thousands of nats do not fit into half precision, and the head is small
        with torch.autocast(x.device.type, enabled=False):
            read = None if features is None else features.to(dtype)
            divergence = self.scale * self.residual(x.to(dtype), s, t, cond, read)
            divergence = divergence if self.baseline is None else divergence + self.baseline.divergence(s, t)
            # of a lower precision, a state's log-density still counts in the head's own
            return divergence.to(torch.promote_types(x.dtype, dtype))


class DivergenceHead(Head):
    """Average divergence ``D`` from features of the backbone, or from a small network of its own.

    Args:
        features: Number of feature channels ``F`` that the backbone gives (``forward_features``). Vectors
            ``(B, F)`` give one number; maps ``(B, F, H, W)`` give one number per pixel, averaged, so that no
            resolution is built in (``scale`` holds the size).
        hidden: Width of the head's hidden layers.
        layers: Hidden layers; with none the head is linear in the features and sees the times through them.
        per_axis: Answer one number per principal axis of the baseline, each weighted with how far the Gaussian fit's
            angle turns along that axis, so that an answer of order one is right at every time and axis. Needs a
            baseline; on maps one whose axes are the pixels or all alike (``"diagonal"``, ``"isotropic"``).
        patch: For ``per_axis`` on maps: side of the square of pixels that one position of the map answers for, one
            number per channel and pixel. 0 for features that are vectors.
        network: Instead of ``features``: a module ``(x, s, t, cond) -> (B,)`` that needs no backbone.
        baseline: Closed form that is added; ``None`` for no baseline.

    Raises:
        ValueError: If not exactly one of ``features`` and ``network`` is given.

    >>> from f2d2_lightning.nn import MLP
    >>> backbone = MLP((2,), width=8, blocks=1)
    >>> joint = JointFlowMap(backbone, DivergenceHead(features=backbone.features))
    >>> joint(torch.zeros(3, 2), 1.0, 0.0).divergence.shape
    torch.Size([3])
    """

    def __init__(
        self,
        features: int | None = None,
        hidden: int = 128,
        layers: int = 2,
        per_axis: bool = False,
        network: nn.Module | None = None,
        baseline: GaussianBaseline | None = None,
        patch: int = 0,
    ) -> None:
        super().__init__(baseline)
        if (features is None) == (network is None):
            raise ValueError("give the head either features=F, to read the backbone, or network=..., its own")
        at_least(0, layers=layers)
        at_least(1, hidden=hidden, features=1 if features is None else features)
        if per_axis and (baseline is None or network is not None):
            raise ValueError("per_axis=True weights features by the baseline's axes; give features=F and a baseline")
        if patch:
            _check_patch(patch, per_axis, baseline)
        self.features = features
        self.hidden = hidden
        self.per_axis = per_axis
        self.patch = patch
        self.network = network
        if features is not None:
            widths = [features] + [hidden] * layers
            self.embedding = IntervalEmbedding(hidden) if layers else None
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
            axes = 1
            if per_axis and baseline is not None:
                axes = baseline.shape[0] * patch**2 if patch else baseline.dim
            self.out = nn.Linear(widths[-1], axes)
            # starts as the baseline alone, which is already the right answer for Gaussian data
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    @property
    def reads_features(self) -> bool:  # type: ignore[override]
        """Whether the head needs the backbone's features."""
        return self.network is None

    def residual(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None, features: Tensor | None) -> Tensor:
        if self.network is None:
            return self._from_features(features, s, t)
        answer = self.network(x, s, t, cond)
        if answer.numel() != len(x):
            raise ValueError(
                f"the head's network answered shape {tuple(answer.shape)} for {len(x)} states; one number a state is "
                f"needed, ({len(x)},)"
            )
        return answer.reshape(len(x))

    def _from_features(self, features: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        if features is None or features.ndim < 2 or features.shape[1] != self.features:
            came = "none" if features is None else f"shape {tuple(features.shape)}"
            raise ValueError(
                f"the head reads features of {self.features} channels, (B, F) or (B, F, H, W), and got {came}; "
                "set DivergenceHead(features=...) to what the backbone's forward_features gives"
            )
        h = features if features.ndim == 2 else features.flatten(2).transpose(1, 2)
        for index, layer in enumerate(self.layers):
            h = layer(h)
            if index == 0 and self.embedding is not None:
                time = self.embedding(s, t)
                h = h + (time if h.ndim == 2 else time[:, None])
            h = nn.functional.silu(h)
        out = self.out(h)
        if self.per_axis:
            assert self.baseline is not None
            return (self._by_axis(out, features) * self.baseline.angle_rate(s, t)).sum(-1)
        out = out.squeeze(-1)
        # a mean, not a sum, keeps the unit of `scale` the same at any resolution of the features
        return out if out.ndim == 1 else out.mean(-1)

    def _by_axis(self, out: Tensor, features: Tensor) -> Tensor:
        """Answers in the order of the baseline's axes, ``(B, dim)``."""
        assert self.baseline is not None
        if not self.patch:
            if out.ndim != 2:
                raise ValueError(
                    f"per_axis=True reads features (B, F), got {tuple(features.shape)}; for maps say patch=, the side "
                    "of the square of pixels that one position answers for"
                )
            return out
        expected = tuple(side // self.patch for side in self.baseline.shape[1:])
        if features.ndim != 4 or tuple(features.shape[2:]) != expected:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; with patch={self.patch} and a baseline of shape "
                f"{self.baseline.shape} maps (B, F, {', '.join(map(str, expected))}) are expected"
            )
        pixels = out.transpose(1, 2).reshape(len(out), -1, *expected)
        return nn.functional.pixel_shuffle(pixels, self.patch).flatten(1)


def _check_patch(patch: int, per_axis: bool, baseline: GaussianBaseline | None) -> None:
    if not per_axis or baseline is None:
        raise ValueError(f"patch={patch} is for per_axis=True with a baseline; leave it out otherwise")
    if baseline.axes is not None or len(baseline.shape) != 3 or any(side % patch for side in baseline.shape[1:]):
        raise ValueError(
            f"patch={patch} needs a baseline of images (C, H, W) with H and W divisible by it, whose axes are pixels "
            f"('diagonal', 'isotropic'); this one is {baseline.covariance!r} of shape {baseline.shape}"
        )


class JointFlowMap(JointMap):
    """A flow map with a divergence head: samples and log-likelihoods from the same evaluations.

    Args:
        flow_map: Backbone.
        head: Divergence head.
        frozen: Keep the backbone as it is, weights, mode and samples bit for bit; only the head is trained.

    >>> from f2d2_lightning.nn import MLP
    >>> backbone = MLP((2,), width=8, blocks=1)
    >>> JointFlowMap(backbone, DivergenceHead(features=backbone.features)).jump(torch.zeros(3, 2), 0.0, 1.0).state.shape
    torch.Size([3, 2])
    """

    def __init__(self, flow_map: FlowMap, head: Head, frozen: bool = False) -> None:
        super().__init__()
        self.flow_map = flow_map
        self.head = head
        self.frozen = frozen
        if frozen:
            flow_map.requires_grad_(False)
            flow_map.eval()

    @property
    def directions(self) -> Direction:  # type: ignore[override]
        """Those of the backbone."""
        return self.flow_map.directions

    @property
    def conditional(self) -> bool | None:
        """That of the backbone; not known for a head with a network of its own, unless the backbone needs ``cond``."""
        return self.flow_map.conditional or (self.flow_map.conditional if self.head.reads_features else None)

    def train(self, mode: bool = True) -> JointFlowMap:
        """Training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.flow_map.eval()
        return self

    def joint(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Joint:
        _ = self.head.precision  # refused before the network says so in its own way
        if not self.head.reads_features:
            return Joint(self.flow_map(x, s, t, cond), self.head(x, s, t, cond))
        u, features = self.flow_map.forward_features(x, s, t, cond)
        return Joint(u, self.head(x, s, t, cond, features))

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        return self.flow_map.velocity(x, t, cond)
