"""A transformer on patches of an image (DiT), with two times in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, pixel_shuffle, pixel_unshuffle

from f2d2_lightning.nn._backbone import Backbone
from f2d2_lightning.nn._layers import attention, run_block
from f2d2_lightning.nn.embedding import IntervalEmbedding
from f2d2_lightning.utils.checks import at_least, one_of
from f2d2_lightning.utils.conditions import Cond

_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class DiT(Backbone):
    """Average velocity of images or latents: a transformer on patches, both times and the label in every block.

    The network of Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022,
    https://arxiv.org/abs/2212.09748 with "adaLN-Zero" blocks, which start as the identity, and the answer at zero.
    Smooth (GELU, LayerNorm), so that its derivatives exist in forward and in reverse mode; any order of ``s, t``.

    Features are those of the patches as a map, ``(B, width, H / patch, W / patch)``, so that a divergence head answers
    per patch.

    Args:
        shape: Shape of one image, ``(C, H, W)`` with sides that ``patch`` divides; no weight depends on ``H`` and
            ``W``, so that the state dictionary fits any other size.
        patch: Side of the square of pixels that becomes one token.
        width: Features of a token; divisible by 4 (positions) and by ``heads``.
        depth: Blocks.
        heads: Heads of attention.
        expansion: Width of a block's hidden layer, in units of ``width``.
        dropout: Probability of dropping a hidden unit in training.
        classes: Number of class labels; 0 for none. ``cond`` is then ``(B,)`` integers.
        null_label: One label more, ``classes``, that stands for none, for guidance without a classifier;
            ``cond=None`` then gives it to all.
        directions: Orders of time it is to be trained for.
        embedding: Module ``(s, t) -> (B, E)`` with an attribute ``features`` ``= E``; an :class:`IntervalEmbedding` of
            ``width`` by default.
        checkpointing: In training, compute every block a second time in the backward pass instead of keeping its inner
            activations.
        condition: What it is conditioned on, where that is no label: the length of a vector, or a module
            ``cond -> (B, C)`` with an attribute ``features`` ``= C``, trained along; 0 for nothing.

    Raises:
        ValueError: If the sizes do not divide as said.

    >>> DiT((1, 8, 4), width=16, depth=1, heads=2)(torch.zeros(3, 1, 8, 4), 0.0, 1.0).shape
    torch.Size([3, 1, 8, 4])
    """

    positions: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        expansion: int = 4,
        dropout: float = 0.0,
        classes: int = 0,
        null_label: bool = False,
        directions: str = "both",
        embedding: nn.Module | None = None,
        checkpointing: bool = False,
        condition: int | nn.Module = 0,
    ) -> None:
        at_least(1, patch=patch, width=width, depth=depth, heads=heads, expansion=expansion)
        if len(shape) != 3 or min(shape) < 1 or shape[1] % patch or shape[2] % patch:
            raise ValueError(
                f"shape is {tuple(shape)}; the network takes (C, H, W) with H and W divisible by patch={patch}; change "
                "patch=, or resize or pad the images"
            )
        if width % heads or width % 4:
            raise ValueError(f"width={width} is divisible by 4 and by heads={heads}; change one of them")
        if null_label and not classes:
            raise ValueError("null_label=True is one label more than classes=, and there are none; set classes=")
        embedding = embedding or IntervalEmbedding(width)
        super().__init__(shape, width, directions, embedding, classes + null_label, condition)
        self.patch, self.checkpointing, self.null_label = patch, checkpointing, null_label
        channels, height, across = self.shape
        self.register_buffer("positions", _positions(height // patch, across // patch, width), persistent=False)
        self.inlet = _linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(_Block(width, self.embedded, heads, expansion, dropout) for _ in range(depth))
        self.modulation = _silent(self.embedded, 2 * width)
        self.outlet = _silent(width, channels * patch**2)
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=0.02)

    @classmethod
    def sized(cls, size: str, shape: Sequence[int], patch: int = 2, **options: Any) -> DiT:
        """A network of one of the paper's sizes.

        Args:
            size: ``"S"`` (width 384, depth 12, 6 heads), ``"B"`` (768, 12, 12), ``"L"`` (1024, 24, 16) or ``"XL"``
                (1152, 28, 16): 33, 130, 458 and 675 million parameters with ``patch=2``, 1000 classes and a null label.
            shape: Shape of one image, ``(C, H, W)``.
            patch: Side of the square of pixels that becomes one token.
            options: Further arguments of the class.
        """
        one_of("size", size, _SIZES)
        width, depth, heads = _SIZES[size]
        return cls(shape, patch, width, depth, heads, **options)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(x)
        recompute = self.checkpointing and self.training
        if cond is None and self.null_label and self.labels is not None:
            cond = torch.full((len(x),), self.labels.num_embeddings - 1, device=x.device)
        time = self.embed(x, s, t, cond)
        patches = pixel_unshuffle(x, self.patch)
        h = self.inlet(patches.flatten(2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            h = run_block(block, h, time, recompute)
        h = _modulated(h, *self.modulation(time)[:, None].chunk(2, -1))
        out = self.outlet(h).transpose(1, 2).reshape(patches.shape)
        return pixel_shuffle(out, self.patch), h.transpose(1, 2).unflatten(2, patches.shape[2:])


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int, heads: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = _silent(embedding, 6 * width)
        self.qkv = _linear(width, 3 * width)
        self.mix = _linear(width, width)
        self.expand = _linear(width, expansion * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = _linear(expansion * width, width)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """``(B, N, width), (B or 1, E) -> (B, N, width)``."""
        shift, scale, gate, shift_inner, scale_inner, gate_inner = self.modulation(time)[:, None].chunk(6, -1)
        h = h + gate * self._attend(_modulated(h, shift, scale))
        inner = gelu(self.expand(_modulated(h, shift_inner, scale_inner)), approximate="tanh")
        return h + gate_inner * self.contract(self.dropout(inner))

    def _attend(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(attention(q, k, v).transpose(1, 2).flatten(2))


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _linear(inputs: int, outputs: int, start: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    start(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _silent(inputs: int, outputs: int) -> nn.Linear:
    return _linear(inputs, outputs, nn.init.zeros_)


def _positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the column in one half of the features, of the row in the other, ``(N, width)``."""
    rates = 10000 ** (-torch.arange(width // 4) / (width // 4))
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    angles = grid.flip(-1)[..., None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1).flatten(1)
