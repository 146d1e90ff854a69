"""A residual multilayer perceptron for vectors and for small images taken as vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from f2d2_lightning.nn._backbone import Backbone
from f2d2_lightning.nn.embedding import IntervalEmbedding, VectorEmbedding
from f2d2_lightning.utils.checks import at_least
from f2d2_lightning.utils.conditions import Cond, one_row


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(embedding, 3 * width)
        self.expand = nn.Linear(width, expansion * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(expansion * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.normal_(self.contract.weight, std=0.3 / (expansion * width) ** 0.5)
        nn.init.zeros_(self.contract.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(time).chunk(3, -1)
        inner = nn.functional.silu(self.expand(self.norm(h) * (1 + scale) + shift))
        return h + (1 + gate) * self.contract(self.dropout(inner))


class MLP(Backbone):
    """Average velocity of states of a fixed shape, with both times in every block.

    Smooth (SiLU, LayerNorm), so that its derivatives exist in forward and in reverse mode; any order of ``s, t``.

    Args:
        shape: Shape of one state, ``(d,)`` or ``(C, H, W)``; flattened inside.
        width: Features of the residual stream.
        blocks: Residual blocks.
        expansion: Width of a block's hidden layer, in units of ``width``.
        dropout: Probability of dropping a hidden unit in training.
        classes: Number of class labels; 0 for none. ``cond`` is then ``(B,)`` integers.
        directions: Orders of time it is to be trained for.
        embedding: Module ``(s, t) -> (B, E)`` with an attribute ``features`` ``= E``; an :class:`IntervalEmbedding` by
            default.
        waves: Random directions whose sine and cosine the network sees beside the state, of unit scale: in few
            dimensions a perceptron learns fine structure slowly without them (Tancik et al., 2020,
            https://arxiv.org/abs/2006.10739). Their frequencies have mean square 1 along a unit vector of the plane.
        condition: What it is conditioned on, where that is no label: the length of a vector, or a module
            ``cond -> (B, C)`` with an attribute ``features`` ``= C``, trained along; 0 for nothing. A vector stands
            beside the state as well.

    >>> import torch
    >>> MLP((2,))(torch.zeros(3, 2), 0.0, torch.ones(3)).shape
    torch.Size([3, 2])
    """

    frequencies: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 256,
        blocks: int = 4,
        expansion: int = 2,
        dropout: float = 0.0,
        classes: int = 0,
        directions: str = "both",
        embedding: nn.Module | None = None,
        waves: int = 0,
        condition: int | nn.Module = 0,
    ) -> None:
        at_least(1, width=width, expansion=expansion)
        at_least(0, blocks=blocks, waves=waves)
        super().__init__(shape, width, directions, embedding or IntervalEmbedding(64), classes, condition)
        dim = math.prod(self.shape)
        # the same ones in every network: a student starts from its teacher's weights
        drawn = torch.randn(dim, waves, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        frequencies = (drawn * (2 / dim) ** 0.5).to(torch.get_default_dtype())
        self.register_buffer("frequencies", frequencies if waves else None)
        # a posterior often is of a difference to what was seen, which modulation alone learns slowly
        beside = self.condition.numbers if isinstance(self.condition, VectorEmbedding) else 0
        self.inlet = nn.Linear(dim + 2 * waves + beside, width)
        self.blocks = nn.ModuleList(_Block(width, self.embedded, expansion, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, dim)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check(x)
        time = self.embed(x, s, t, cond)
        seen = x.reshape(len(x), -1)
        if self.frequencies is not None:
            phases = seen @ self.frequencies
            seen = torch.cat((seen, phases.sin(), phases.cos()), -1)
        if isinstance(self.condition, VectorEmbedding):
            vector = self.condition.standardized(cast(Tensor, one_row(cond)))
            seen = torch.cat((seen, vector.expand(len(x), -1)), -1)
        h = self.inlet(seen)
        for block in self.blocks:
            h = block(h, time)
        h = self.norm(h)
        return self.outlet(h).reshape(x.shape), h
