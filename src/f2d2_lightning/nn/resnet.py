"""A small residual convolutional network for images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from f2d2_lightning.nn._backbone import Backbone
from f2d2_lightning.nn._layers import GroupNorm
from f2d2_lightning.nn.embedding import IntervalEmbedding
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import Cond


class _Block(nn.Module):
    def __init__(self, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        groups = max(g for g in (1, 2, 4, 8) if channels % g == 0)
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        silu = nn.functional.silu
        scale, shift = self.modulation(time)[:, :, None, None].chunk(2, 1)
        inner = self.conv1(silu(self.norm1(h)))
        inner = silu(self.norm2(inner) * (1 + scale) + shift)
        return h + self.conv2(self.dropout(inner))


class ResNet(Backbone):
    """Average velocity of images at two resolutions: residual blocks, one halving, one skip.

    Smooth (SiLU, GroupNorm, average pooling, nearest upsampling), so that its derivatives exist in forward and in
    reverse mode; any order of ``s, t``. Features are those of the full resolution, so the head averages over pixels.

    Args:
        shape: Shape of one image, ``(C, H, W)`` with even ``H`` and ``W``.
        width: Channels at full resolution; twice as many at half.
        blocks: Residual blocks at each of: full resolution, half, full again.
        dropout: Probability of dropping a hidden unit in training.
        classes: Number of class labels; 0 for none. ``cond`` is then ``(B,)`` integers.
        directions: Orders of time it is to be trained for.
        condition: What it is conditioned on, where that is no label: the length of a vector, or a module
            ``cond -> (B, C)`` with an attribute ``features`` ``= C``, trained along; 0 for nothing.

    Raises:
        ValueError: If ``shape`` is not ``(C, H, W)`` with even sides.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        blocks: int = 2,
        dropout: float = 0.0,
        classes: int = 0,
        directions: str = "both",
        condition: int | nn.Module = 0,
    ) -> None:
        if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
            raise ValueError(f"shape is {tuple(shape)}; the network takes (C, H, W) with even H and W")
        at_least(1, width=width)
        at_least(0, blocks=blocks)
        embedding = 4 * width
        super().__init__(shape, width, directions, IntervalEmbedding(embedding), classes, condition)
        self.inlet = nn.Conv2d(self.shape[0], width, 3, padding=1)
        self.fine_in = nn.ModuleList(_Block(width, embedding, dropout) for _ in range(blocks))
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.coarse = nn.ModuleList(_Block(2 * width, embedding, dropout) for _ in range(blocks))
        self.narrow = nn.Conv2d(2 * width, width, 1)
        self.fine_out = nn.ModuleList(_Block(width, embedding, dropout) for _ in range(blocks))
        self.norm = GroupNorm(1, width)
        self.outlet = nn.Conv2d(width, self.shape[0], 3, padding=1)
        nn.init.zeros_(self.outlet.weight)
        assert self.outlet.bias is not None
        nn.init.zeros_(self.outlet.bias)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(x)
        time = self.embed(x, s, t, cond)
        h = self.inlet(x)
        for block in self.fine_in:
            h = block(h, time)
        coarse = self.widen(nn.functional.avg_pool2d(h, 2))
        for block in self.coarse:
            coarse = block(coarse, time)
        h = h + nn.functional.interpolate(self.narrow(coarse), scale_factor=2, mode="nearest")
        for block in self.fine_out:
            h = block(h, time)
        h = nn.functional.silu(self.norm(h))
        return self.outlet(h), h
