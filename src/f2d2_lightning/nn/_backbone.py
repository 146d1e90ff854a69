"""What the networks of this folder share: times and labels embedded together, and the refusal of other states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.nn._layers import has_tangent
from f2d2_lightning.utils.checks import at_least, check_shape


class Backbone(FlowMap):
    """A network for states of a fixed shape, with both times and the label in every block, that gives features."""

    def __init__(
        self, shape: Sequence[int], features: int, directions: str, embedding: nn.Module, classes: int
    ) -> None:
        at_least(0, classes=classes)
        super().__init__()
        self.shape, self.features = tuple(shape), features
        self.directions = Direction.parse(directions)
        self.embedding = embedding
        self.embedded = int(embedding.features)  # type: ignore[arg-type]
        self.labels = nn.Embedding(classes, self.embedded) if classes else None

    def check(self, x: Tensor, channels: int | None = None) -> None:
        """Refuse states of another shape; ``channels`` in place of the shape's own.

        Raises:
            ValueError: Says both shapes.
        """
        shape = self.shape if channels is None else (channels, *self.shape[1:])
        check_shape(x, shape, "the network takes", "set shape= to that of the data")

    def embed(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None) -> Tensor:
        """What every block is modulated with, ``(B or 1, E)``: both times, and the label where there are classes.

        Raises:
            ValueError: If there are classes and ``cond`` is no integers ``(B,)``, or one of them is no class. Their
                values are read where that is free, on the CPU outside compiled code.
        """
        time = self.embedding(expand_time(s, x), expand_time(t, x))
        if self.labels is not None:
            time = time + self.labels(_checked(cond, self.labels.num_embeddings))
        return nn.functional.silu(time)


def _checked(cond: Tensor | None, classes: int) -> Tensor:
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
