"""A second time for a network that lacks one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from f2d2_lightning.adapters.features import find_submodule, last_width
from f2d2_lightning.nn.embedding import IntervalEmbedding


class AddedInterval(nn.Module):
    """A pair of times for a network that does not take it, added to the output of its time embedding.

    It starts at zero, so the network starts as it was. This is all that a network needs to learn, by fine-tuning, the
    direction that its own second time cannot say (a logarithm or an index of the interval has no sign), or an end time
    at all (consistency models, plain velocities).

    Args:
        width: Channels of the time embedding's output, ``(B, E)``, ``(B, 1, E)`` or ``(B, E, 1, 1)``.
        hidden: Width of the added embedding.
        layer: Name of the layer that the width was taken from, for messages.
    """

    added_whole: ClassVar[bool] = True
    """That a network without it has all the weights of one with it but for its own (``one_time_state``)."""

    def __init__(self, width: int, hidden: int = 128, layer: str | None = None) -> None:
        super().__init__()
        self.width = width
        self.layer = layer
        self.embedding = IntervalEmbedding(hidden)
        self.out = nn.Linear(hidden, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def for_submodule(cls, network: nn.Module, name: str) -> AddedInterval:
        """One that fits the output of ``network``'s submodule ``name``, whose last linear layer says the width.

        The layer may be of any class with a weight ``(out, in, ...)``; where an attribute ``out_features`` or
        ``out_channels`` says the width, that counts.

        Raises:
            ValueError: If there is no such submodule, or no linear layer in it.
        """
        module = find_submodule(network, name, "time embedding")
        width, layer = last_width(module, name)
        return cls(width, layer=layer).to(find_submodule(network, layer).weight)  # type: ignore[arg-type]

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """Embedding of the times ``(B,)``, ``(B, width)``, or ``(1, width)`` where all samples share them."""
        dtype = self.out.weight.dtype
        return self.out(nn.functional.silu(self.embedding(s.to(dtype), t.to(dtype))))

    def added_to(self, output: Any, s: Tensor, t: Tensor) -> Tensor:
        """``output``, the answer of the time embedding, with the embedding of the times ``(B,)`` added to it.

        Raises:
            ValueError: If the output is no tensor, or no axis of it has the right number of channels.
        """
        axes = [a for a in (-1, 1) if isinstance(output, Tensor) and output.ndim > 1 and output.shape[a] == self.width]
        if not axes:
            came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            layer = "it" if self.layer is None else repr(self.layer)
            raise ValueError(
                f"the time embedding answered {came}, in which no axis has its {self.width} channels; name the layer "
                f"of the time embedding that gives (B, E), and if {layer} keeps its weight as (in, out), give it an "
                "attribute out_features that says its width"
            )
        added = self(s, t)
        shape = [1] * output.ndim
        shape[0], shape[axes[0]] = len(added), self.width
        return output + added.reshape(shape).to(output.dtype)
