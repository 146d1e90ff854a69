"""A residual multilayer perceptron for vectors and for small images taken as vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.nn._attention import has_tangent
from f2d2_lightning.nn.embedding import IntervalEmbedding

__all__ = ["MLP"]


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


class MLP(FlowMap):
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

    >>> MLP((2,))(torch.zeros(3, 2), 0.0, torch.ones(3)).shape
    torch.Size([3, 2])
    """

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
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.features = width
        self.directions = Direction.parse(directions)
        dim = math.prod(self.shape)
        self.embedding = embedding or IntervalEmbedding(64)
        size = int(self.embedding.features)  # type: ignore[arg-type]
        self.labels = nn.Embedding(classes, size) if classes else None
        self.inlet = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width, size, expansion, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, dim)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        return self.forward_features(x, s, t, cond)[0]

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_input(x, self.shape)
        time = embed_times(self.embedding, self.labels, x, s, t, cond)
        h = self.inlet(x.reshape(len(x), -1))
        for block in self.blocks:
            h = block(h, time)
        h = self.norm(h)
        return self.outlet(h).reshape(x.shape), h


def check_input(x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse states of another shape than the network was made for.

    Raises:
        ValueError: Says both shapes.
    """
    if tuple(x.shape[1:]) != shape:
        raise ValueError(
            f"states have shape {tuple(x.shape)}, but the network takes (B, {', '.join(map(str, shape))}); "
            "set shape= to that of the data"
        )


def embed_times(
    embedding: nn.Module,
    labels: nn.Embedding | None,
    x: Tensor,
    s: Tensor | float,
    t: Tensor | float,
    cond: Tensor | None,
) -> Tensor:
    """What every block is modulated with, ``(B or 1, E)``: both times, and the label where there are classes."""
    time = embedding(expand_time(s, x), expand_time(t, x))
    if labels is not None:
        time = time + labels(check_labels(cond, labels.num_embeddings))
    return nn.functional.silu(time)


def check_labels(cond: Tensor | None, classes: int) -> Tensor:
    """Class labels ``(B,)`` as integers; their values are read where that is free, on the CPU outside compiled code.

    Raises:
        ValueError: If there are none, they are not integers ``(B,)``, or one is no class.
    """
    if cond is None or torch.is_floating_point(cond) or cond.ndim != 1:
        came = "none" if cond is None else f"dtype {cond.dtype}, shape {tuple(cond.shape)}"
        raise ValueError(f"the network has {classes} classes and needs cond of shape (B,), integers; got {came}")
    readable = cond.device.type == "cpu" and not torch.compiler.is_compiling() and not has_tangent(cond)
    if readable and bool(((cond < 0) | (cond >= classes)).any()):
        raise ValueError(
            f"labels lie in [{int(cond.min())}, {int(cond.max())}], and the network has {classes} classes: 0 to "
            f"{classes - 1}; set classes= to that of the data"
        )
    return cond
