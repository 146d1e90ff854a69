"""A foreign network as a flow map, with features for the head and, where it lacks one, a second time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters.adapter import Adapter, check_conditioning
from f2d2_lightning.adapters.features import FeatureTap, find_submodule, last_width
from f2d2_lightning.flows._held import evaluating
from f2d2_lightning.flows.maps import Direction, FlowMap, check_interval
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.nn.embedding import IntervalEmbedding
from f2d2_lightning.utils.configured import Configured

__all__ = ["AdaptedFlowMap", "AddedInterval"]

MOST_AXES, MOST_CLASSES = 64, 10**6
"""What an adapter may ask for: times and labels become tensors of so many axes and columns, whoever says the number."""


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


class AdaptedFlowMap(FlowMap, Configured):
    """A network in a foreign convention as a flow map.

    Args:
        network: The network, a module (compiled or not) or any function that ``adapter`` can call.
        adapter: How it is called; the generic one by default.
        features: Name of the submodule whose output a divergence head reads; by default the input of the last layer.
        interval: Name of the submodule that embeds the network's time. An :class:`AddedInterval` is added to its
            output, so that the map can be fine-tuned to go between any two times, in both directions.
        directions: Orders of time that it was, or will be, trained for; by default the adapter's, and both with
            ``interval``.

    Raises:
        ValueError: If a named submodule or method does not exist.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        adapter: Adapter | None = None,
        features: str | None = None,
        interval: str | None = None,
        directions: Direction | str | None = None,
    ) -> None:
        super().__init__()
        # forward-mode derivatives and hooks do not pass through compiled code: the network's own code is called
        network = getattr(network, "_orig_mod", network)
        if not callable(network):
            raise ValueError(f"the network is {network!r:.120}; a torch.nn.Module or a function is needed")
        self.network = network
        self.adapter = adapter or Adapter()
        if self.adapter.time_axes > MOST_AXES or (self.adapter.classes or 0) > MOST_CLASSES:
            raise ValueError(
                f"the adapter has time_axes={self.adapter.time_axes:,} and classes={self.adapter.classes}; up to "
                f"{MOST_AXES} and {MOST_CLASSES:,} are made into tensors"
            )
        self.tap: FeatureTap | None = None
        self.interval_name = interval
        self.interval: AddedInterval | None = None
        self._compiled = False
        if isinstance(network, nn.Module):
            self.adapter.call.check(network)
            self._compiled = _is_compiled(network)
            self.tap = FeatureTap(network, features, self.adapter.channels_last)
            self.interval = None if interval is None else AddedInterval.for_submodule(network, interval)
        elif features is not None or interval is not None:
            raise ValueError(f"features= and interval= name submodules, and {Adapter.describe(network)} has none")
        if directions is None:
            directions = self.adapter.directions if interval is None else Direction.BOTH
        self.directions = Direction.parse(directions)
        self._features: int | None = None

    def configuration(self) -> dict[str, Any]:
        """Arguments of the constructor, as the map is now."""
        return {
            "network": self.network,
            "adapter": self.adapter,
            "features": None if self.tap is None else self.tap.name,
            "interval": self.interval_name,
            "directions": self.directions.label,
        }

    @property
    def answerable(self) -> Direction:
        """``directions``, or none if the network is told no end time: it then knows instantaneous velocities only."""
        sees_end = self.adapter.sees_end or self.adapter.endpoint_only or self.interval is not None
        return self.directions if sees_end else Direction.NONE

    @property
    def endpoint_only(self) -> bool:
        """Whether the network knows no other end than data, as a consistency model without ``interval=``."""
        return self.adapter.endpoint_only and self.interval is None

    @property
    def conditional(self) -> bool:
        """Whether the network is told conditioning."""
        return self.adapter.conditional

    @property
    def features(self) -> int:
        """Channels of the features, known once :meth:`probe` or a call of :meth:`forward_features` has shown them.

        Raises:
            ValueError: If neither has happened yet.
        """
        if self._features is None:
            raise ValueError(
                "how many feature channels the network gives is known only from a call: probe(x, cond), with a batch "
                "of states, first"
            )
        return self._features

    def probe(self, x: Tensor, cond: Tensor | None = None) -> int:
        """Call the network once, without training mode or gradients, and find the features' channels.

        Args:
            x: States, ``(B, ...)``.
            cond: Conditioning.

        Returns:
            Channels ``F`` for ``DivergenceHead(features=F)``.
        """
        with evaluating(self), torch.no_grad():
            low, high = (0.25, 0.75) if self.directions != Direction.TO_NOISE else (0.75, 0.25)
            self.forward_features(x, low, low if self.answerable == Direction.NONE else high, cond)
        return self.features

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        directions = self.answerable
        if directions != Direction.BOTH:
            check_interval(s, t, directions, what=Adapter.describe(self.network))
        s, t = expand_time(s, x), expand_time(t, x)
        with self.eager(), self._interval_added(s, t):
            return self.adapter.average_velocity(self.network, x, s, t, cond)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """Instantaneous velocity ``u(x, t, t)``, shape of ``x``.

        Raises:
            ValueError: If the network knows no other end than data: on its diagonal it answers the jump to data.
        """
        if self.endpoint_only:
            raise ValueError(
                f"{Adapter.describe(self.network)} maps to data only (a consistency model), and that jump is not its "
                "instantaneous velocity; give a teacher that has one (TeacherSource, Denoiser), or interval='name of "
                "the time embedding' and fine-tune it into a map between any two times"
            )
        return super().velocity(x, t, cond)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.tap is None:
            raise ValueError(
                f"{Adapter.describe(self.network)} is a function and gives no features; give the head its own network: "
                "DivergenceHead(network=...)"
            )
        if self.tap.layer is None and self.adapter.output is not None:
            self._find_layer(x, s, t, cond)
        u, features = self.tap.call(lambda: self(x, s, t, cond), len(x))
        self._features = features.shape[1]
        return u, features.to(x.dtype)

    def _find_layer(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None) -> None:
        """Which of several outputs' last layers the velocity comes from, by one more call on one state."""
        assert self.tap is not None
        check_conditioning(cond)
        s, t = expand_time(s, x)[:1], expand_time(t, x)[:1]
        cond = None if cond is None else cond[:1]
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), evaluating(self):
            self.tap.find(lambda: self(x[:1], s, t, cond))

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Run compiled parts of the network as they were written."""
        if not self._compiled or torch.compiler.is_compiling():
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    @contextlib.contextmanager
    def _interval_added(self, s: Tensor, t: Tensor) -> Iterator[None]:
        if self.interval is None:
            yield
            return
        added, ran = self.interval, False

        def add(module: nn.Module, arguments: Any, output: Any) -> Tensor:
            nonlocal ran
            ran = True
            return added.added_to(output, s, t)

        assert isinstance(self.network, nn.Module)
        handle = find_submodule(self.network, str(self.interval_name)).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
        if not ran:
            raise ValueError(
                f"{Adapter.describe(self.network)} did not run {self.interval_name!r}, so the pair of times was added "
                "nowhere; name the submodule of the time embedding that runs in every call: interval='...'"
            )

    def extra_repr(self) -> str:
        return f"{self.adapter!r}, directions={self.directions.name}"


def _is_compiled(network: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in network.modules())
