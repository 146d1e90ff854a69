"""What the networks of this folder share: times and conditions embedded together, and the refusal of other states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.nn._layers import has_tangent
from f2d2_lightning.nn.embedding import VectorEmbedding
from f2d2_lightning.utils.checks import at_least, check_shape
from f2d2_lightning.utils.conditions import Cond, kind_of, one_row


class Backbone(FlowMap):
    """A network for states of a fixed shape, with times and condition in every block, that gives features.

    The condition is one of ``classes``, or what ``condition`` says: a vector of so many numbers, or whatever a module
    ``cond -> (B, C)`` embeds, which says ``C`` by its attribute ``features`` or as the ``out_features`` of its last
    part, and is trained along.
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int,
        directions: str,
        embedding: nn.Module,
        classes: int,
        condition: int | nn.Module = 0,
    ) -> None:
        at_least(0, classes=classes, condition=0 if isinstance(condition, nn.Module) else condition)
        if classes and condition != 0:
            raise ValueError(
                f"classes={classes} and condition= are both given; take condition= alone, and embed the label in it"
            )
        super().__init__()
        self.shape, self.features = tuple(shape), features
        self.directions = Direction.parse(directions)
        self.embedding = embedding
        self.embedded = int(embedding.features)  # type: ignore[arg-type]
        self.labels = nn.Embedding(classes, self.embedded) if classes else None
        self.condition: nn.Module | None = None
        if isinstance(condition, nn.Module):
            self.condition = condition
        elif condition:
            self.condition = VectorEmbedding(condition)
        if self.condition is not None:
            self.join = nn.Linear(_width(self.condition), self.embedded)

    @property
    def conditional(self) -> bool:
        return self.labels is not None or self.condition is not None

    def check(self, x: Tensor, channels: int | None = None) -> None:
        """Refuse, with a ``ValueError``, states of another shape; ``channels`` in place of the shape's own."""
        shape = self.shape if channels is None else (channels, *self.shape[1:])
        check_shape(x, shape, "the network takes", "set shape= to that of the data")

    def embed(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None) -> Tensor:
        """What every block is modulated with, ``(B or 1, E)``: both times, and label or condition where there is one.

        Raises:
            ValueError: If there are classes and ``cond`` is no integers ``(B,)``, or one of them is no class. Their
                values are read where that is free, on the CPU outside compiled code. If ``cond`` is no vector of the
                length of :attr:`condition`, or the answer of somebody's network has another shape.
        """
        time = self.embedding(expand_time(s, x), expand_time(t, x))
        if self.labels is not None:
            time = time + self.labels(_checked(cond, self.labels.num_embeddings))
        if self.condition is not None:
            time = time + self.join(self._embedded(self.condition, cond, len(x)))
        return nn.functional.silu(time)

    def _embedded(self, condition: nn.Module, cond: Cond | None, count: int) -> Tensor:
        name, features = type(condition).__name__, self.join.in_features
        if cond is None and not isinstance(condition, VectorEmbedding):
            raise ValueError(f"the network needs cond, for its {name}; got none")
        # one for all, as of a posterior, is embedded once
        shared = one_row(cond)
        count = count if shared is cond else 1
        found = condition(shared)
        if found.shape != (count, features):
            raise ValueError(
                f"the {name} of condition= answered shape {tuple(found.shape)} for {count} states; "
                f"({count}, {features}) is expected"
            )
        return found


def fit_conditions(
    model: nn.Module, conditions: Callable[[], Iterable[Tensor]], reduce: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Standardise the vectors that the networks of a model are conditioned on, where that was not done yet.

    ``conditions`` gives those of the data anew at each call, in batches ``(B, numbers)``; ``reduce`` sums a tensor over
    processes, where each of them sees a part.
    """
    for part in model.modules():
        embedding = part.condition if isinstance(part, Backbone) else None
        if isinstance(embedding, VectorEmbedding) and not embedding.fitted:
            embedding.fit(conditions(), reduce)


def _width(network: nn.Module) -> int:
    *_, last = network, *network.children()
    found = getattr(network, "features", getattr(last, "out_features", None))
    if not isinstance(found, int):
        raise ValueError(
            f"the {type(network).__name__} of condition= does not say how many numbers it gives for each sample; set "
            "its attribute features"
        )
    return found


def _checked(cond: Cond | None, classes: int) -> Tensor:
    if not isinstance(cond, Tensor) or torch.is_floating_point(cond) or cond.ndim != 1:
        said = f"the network has {classes} classes and needs cond of shape (B,), integers"
        raise ValueError(f"{said}; got {kind_of(cond)}")
    cond = cond.long()  # an embedding takes no others
    readable = cond.device.type == "cpu" and not torch.compiler.is_compiling() and not has_tangent(cond)
    if readable and bool(((cond < 0) | (cond >= classes)).any()):
        raise ValueError(
            f"labels lie in [{int(cond.min())}, {int(cond.max())}], and the network has {classes} classes: 0 to "
            f"{classes - 1}; set classes= to that of the data"
        )
    return cond
