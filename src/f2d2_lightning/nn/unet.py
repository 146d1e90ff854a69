"""A U-Net for images of the DDPM++ class, with two times in any order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, interpolate, pixel_shuffle, pixel_unshuffle, silu

from f2d2_lightning.nn._backbone import Backbone
from f2d2_lightning.nn._layers import GroupNorm, attention, run_block
from f2d2_lightning.nn.embedding import IntervalEmbedding
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import Cond


def _convolution(inputs: int, outputs: int, kernel: int, gain: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int) -> GroupNorm:
    groups = max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)
    return GroupNorm(groups, channels, eps=1e-6)


class Resample(nn.Module):
    """Halve (``factor=0.5``) or double (``2.0``) height and width with a separable filter.

    Its ``taps`` along an axis are of an even number: ``(1, 1)`` averages and repeats, ``(1, 3, 3, 1)`` is smoother.
    """

    taps: Tensor

    def __init__(self, factor: float, taps: Sequence[float] = (1, 1)) -> None:
        super().__init__()
        if factor not in (0.5, 2.0) or len(taps) % 2 or not taps:
            raise ValueError(f"factor={factor} is 0.5 or 2.0, and taps={tuple(taps)} an even number of weights")
        self.factor = factor
        line = torch.tensor(tuple(taps), dtype=torch.float32)
        self.register_buffer("taps", torch.outer(line, line) / line.sum() ** 2, persistent=False)
        self.plain = tuple(taps) == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C, factor H, factor W)``."""
        if self.plain:
            return avg_pool2d(x, 2) if self.factor < 1 else interpolate(x, scale_factor=2, mode="nearest")
        channels, padding = x.shape[1], self.taps.shape[0] // 2 - 1
        taps = self.taps.to(x.dtype).expand(channels, 1, -1, -1)
        if self.factor < 1:
            return conv2d(x, taps, stride=2, padding=padding, groups=channels)
        return conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)


class UNetBlock(nn.Module):
    """Two convolutions with the times between them, a residual, and self-attention where asked for.

    Factors of 0.5 and 2.0 halve and double height and width, no ``heads`` is no attention, a ``skip_scale`` of
    ``sqrt(1/2)`` keeps variances, and with ``scale_shift`` the times scale the hidden units too, not only shift them.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        factor: float = 1.0,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = math.sqrt(0.5),
        scale_shift: bool = False,
        taps: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        self.heads, self.skip_scale, self.scale_shift = heads, skip_scale, scale_shift
        self.resample = Resample(factor, taps) if factor != 1 else None
        self.norm_in = _norm(inputs)
        self.conv_in = _convolution(inputs, outputs, 3)
        self.affine = nn.Linear(embedding, outputs * (2 if scale_shift else 1))
        nn.init.xavier_uniform_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.norm_out = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        # a branch starts almost at nothing, but not at a saddle
        self.conv_out = _convolution(outputs, outputs, 3, gain=1e-5)
        self.skip = _convolution(inputs, outputs, 1) if inputs != outputs or factor != 1 else None
        if heads:
            self.norm_attention = _norm(outputs)
            self.qkv = _convolution(outputs, 3 * outputs, 1, gain=math.sqrt(0.2))
            self.mix = _convolution(outputs, outputs, 1, gain=1e-5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``(B, inputs, H, W), (B or 1, E) -> (B, outputs, factor H, factor W)``."""
        h, residual = silu(self.norm_in(x)), x
        if self.resample is not None:
            h, residual = self.resample(h), self.resample(residual)
        h = self.conv_in(h)
        modulation = self.affine(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, 1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + modulation)
        h = self.conv_out(self.dropout(silu(h)))
        if self.skip is not None:
            residual = self.skip(residual)
        h = (h + residual) * self.skip_scale
        return self._attend(h) if self.heads else h

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        qkv = self.qkv(self.norm_attention(x)).reshape(batch, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        answer = attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return (x + self.mix(answer)) * self.skip_scale


class UNet(Backbone):
    r"""Average velocity of images: the U-Net called DDPM++, smooth, with both times in every block.

    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456; sizes, initialisation and residual scaling as in Karras et al., "Elucidating the
    Design Space of Diffusion-Based Generative Models", 2022, https://arxiv.org/abs/2206.00364, table 7. The defaults
    are the network of the paper's CIFAR-10 experiments.

    Features are those of the full resolution, so that a divergence head answers per pixel.

    Args:
        shape: Shape of one image, ``(C, H, W)``; ``H`` and ``W`` are multiples of ``2 ** (len(multipliers) - 1)``.
        width: Channels at full resolution, in units of which the others are given.
        multipliers: Channels at each resolution, from full to coarsest.
        blocks: Residual blocks per resolution on the way down, one more on the way up.
        attention: Heights (in pixels) at which blocks attend to each other; the coarsest resolution's middle always
            does.
        heads: Attention heads.
        head_width: Channels of an attention head, in place of ``heads``; ``None`` goes by ``heads``.
        dropout: Probability of dropping a hidden unit in training.
        classes: Number of class labels; 0 for none. ``cond`` is then ``(B,)`` integers.
        directions: Orders of time it is to be trained for.
        embedding: Module ``(s, t) -> (B, E)`` with an attribute ``features`` ``= E``; an :class:`IntervalEmbedding` of
            ``4 width`` by default.
        taps: Filter of halving and doubling: ``(1, 1)`` (DDPM++), ``(1, 3, 3, 1)`` (NCSN++).
        scale_shift: Let the times scale the hidden units too.
        patch: Side of the squares of pixels that become one position with ``patch ** 2`` times the channels before the
            first convolution; ``shape`` divided by it is then the full resolution of all the rest.
        inputs: Channels that come in, where features stand beside the state's ``C``; the answer has ``C``.
        frequencies: Powers ``n`` for which :math:`\sin(2^n \pi x)` and :math:`\cos(2^n \pi x)` join the input, so that
            fine scales are seen (Kingma et al., "Variational Diffusion Models", 2021,
            https://arxiv.org/abs/2107.00630, section 5.1).
        skip_scale: Factor on the sum of residual and branch: ``sqrt(1/2)`` (DDPM++), 1 (ADM).
        checkpointing: In training, compute every block a second time in the backward pass instead of keeping its
            inner activations.
        condition: What it is conditioned on, where that is no label: the length of a vector, or a module
            ``cond -> (B, C)`` with an attribute ``features`` ``= C``, trained along; 0 for nothing.

    Raises:
        ValueError: If the sides cannot be halved as often, or channels do not divide by heads.

    >>> UNet((1, 8, 8), width=8, multipliers=(1, 2), blocks=1)(torch.zeros(3, 1, 8, 8), 0.0, 1.0).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        heads: int = 1,
        dropout: float = 0.0,
        classes: int = 0,
        directions: str = "both",
        embedding: nn.Module | None = None,
        taps: Sequence[float] = (1, 1),
        scale_shift: bool = False,
        patch: int = 1,
        inputs: int | None = None,
        frequencies: Sequence[int] = (),
        checkpointing: bool = False,
        head_width: int | None = None,
        skip_scale: float = math.sqrt(0.5),
        condition: int | nn.Module = 0,
    ) -> None:
        at_least(1, width=width, blocks=blocks, heads=heads, patch=patch)
        at_least(1, **{"the least of multipliers": min(multipliers, default=0)})
        times = patch * 2 ** (len(multipliers) - 1)
        if len(shape) != 3 or shape[1] % times or shape[2] % times:
            raise ValueError(
                f"shape is {tuple(shape)}; with {len(multipliers)} resolutions and patch={patch} the network takes "
                f"(C, H, W) with H and W multiples of {times}: use fewer multipliers, or pad the images"
            )
        name, unit = ("heads", heads) if head_width is None else ("head_width", head_width)
        for multiplier in multipliers:
            if unit < 1 or width * multiplier % unit:
                raise ValueError(f"{width * multiplier} channels do not divide by {name}={unit}")
        embedding = embedding or IntervalEmbedding(4 * width)
        super().__init__(shape, width * multipliers[0], directions, embedding, classes, condition)
        self.patch = patch
        self.inputs = self.shape[0] if inputs is None else inputs
        self.frequencies, self.checkpointing = tuple(frequencies), checkpointing

        def block(before: int, after: int, factor: float = 1.0, attends: bool = False) -> UNetBlock:
            count = (after // head_width if head_width else heads) if attends else 0
            return UNetBlock(before, after, self.embedded, factor, count, dropout, skip_scale, scale_shift, taps)

        channels, height = self.shape[0] * patch**2, self.shape[1] // patch
        self.inlet = _convolution(self.inputs * (1 + 2 * len(self.frequencies)) * patch**2, width, 3)
        self.down = nn.ModuleList()
        current, skips = width, [width]
        for level, multiplier in enumerate(multipliers):
            if level:
                self.down.append(block(current, current, 0.5))
                skips.append(current)
            for _ in range(blocks):
                self.down.append(block(current, width * multiplier, attends=height >> level in attention))
                current = width * multiplier
                skips.append(current)
        self.middle = nn.ModuleList([block(current, current, attends=True), block(current, current)])
        self.up = nn.ModuleList()
        self.takes_skip: list[bool] = []
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < len(multipliers) - 1:
                self.up.append(block(current, current, 2.0))
                self.takes_skip.append(False)
            for index in range(blocks + 1):
                attends = index == blocks and height >> level in attention
                self.up.append(block(current + skips.pop(), width * multiplier, attends=attends))
                self.takes_skip.append(True)
                current = width * multiplier
        self.norm = _norm(current)
        self.outlet = _convolution(current, channels, 3, gain=1e-5)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(x, self.inputs)
        recompute = self.checkpointing and self.training
        time = self.embed(x, s, t, cond)
        h = self.inlet(pixel_unshuffle(self._with_waves(x), self.patch))
        skips = [h]
        for block in self.down:
            h = run_block(block, h, time, recompute)
            skips.append(h)
        for block in self.middle:
            h = run_block(block, h, time, recompute)
        for block, takes_skip in zip(self.up, self.takes_skip, strict=True):
            h = run_block(block, torch.cat((h, skips.pop()), 1) if takes_skip else h, time, recompute)
        h = silu(self.norm(h))
        return pixel_shuffle(self.outlet(h), self.patch), h

    def _with_waves(self, x: Tensor) -> Tensor:
        if not self.frequencies:
            return x
        waves = [x]
        for power in self.frequencies:
            angle = 2**power * math.pi * x
            waves += [angle.sin(), angle.cos()]
        return torch.cat(waves, 1)
