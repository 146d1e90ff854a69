"""Hidden features of a network that was not written to give any."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def find_submodule(network: nn.Module, name: str, what: str = "submodule") -> nn.Module:
    """A submodule by its dotted name, or a ``ValueError`` that lists names that are close, or those at the top."""
    modules = dict(network.named_modules(remove_duplicate=False))
    if name in modules and name:
        return modules[name]
    close = difflib.get_close_matches(name, [n for n in modules if n], n=5, cutoff=0.4)
    some = close or [n for n, _ in network.named_children()][:12]
    raise ValueError(
        f"{type(network).__name__} has no {what} {name!r}; "
        + (f"it has {', '.join(map(repr, some))}" if some else "it has no submodules at all")
        + " (names as in named_modules())"
    )


def _weighted(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution of some kind: it has a weight matrix of its own."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(module, nn.Embedding)


def last_width(module: nn.Module, name: str) -> tuple[int, str]:
    """Channels that a module's last linear layer or convolution answers, and where it stands, or a ``ValueError``.

    A layer says them in ``out_features`` or ``out_channels``, as torch's and EDM's own do; else its weight is taken to
    be ``(out, in, ...)``.
    """
    layers = [(inner, m) for inner, m in module.named_modules() if _weighted(m)]
    if not layers:
        raise ValueError(
            f"{name!r} ({type(module).__name__}) has no linear layer, so its width is not known; name the layer of the "
            "time embedding that has the learned weights"
        )
    inner, last = layers[-1]
    place = f"{name}.{inner}" if inner else name
    said = (getattr(last, attribute, None) for attribute in ("out_features", "out_channels"))
    return next((width for width in said if isinstance(width, int)), len(last.weight)), place


class FeatureTap:
    """Reads what flows through a network: a named submodule's output, or the input of its last layer.

    Features are given as ``(B, F)``, or with positions last, ``(B, F, ...)``: tokens ``(B, N, F)`` are turned. Where
    the channels are follows from the layer: a convolution has them second, a linear layer last.

    Args:
        network: The network.
        name: Submodule whose output is read. By default the last layer with a weight matrix that runs, whose input is
            read; it is found in the first call.
        channels_last: Whether the network keeps images as ``(B, H, W, C)``.
    """

    def __init__(self, network: nn.Module, name: str | None = None, channels_last: bool = False) -> None:
        self._network = [network]  # in a list, so that nothing registers it a second time
        self.name = name
        self.channels_last = channels_last
        self._last: str | None = None
        if name is not None:
            find_submodule(network, name)

    @property
    def layer(self) -> str | None:
        """Name of what is read: the submodule, or the last layer once a call has shown it."""
        return self.name or self._last

    def call(self, function: Callable[[], Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Run ``function``, which calls the network once on ``count`` states.

        Returns:
            What it answers, and the features ``(count, F, ...)``.

        Raises:
            ValueError: If no features came by, or none that have one row per state.
        """
        seen: dict[str, Any] = {}
        with self._listening(seen):
            answer = function()
        if self.layer is None:
            if not seen:
                raise ValueError(
                    f"{type(self._network[0]).__name__} ran no linear layer or convolution to read features from; name "
                    "a submodule: features='...', or give the head its own network: DivergenceHead(network=...)"
                )
            self._last = next(reversed(seen))
        if self.layer not in seen:
            raise ValueError(
                f"{type(self._network[0]).__name__} did not run {self.layer!r}, whose features the head reads; name a "
                "submodule that runs in every call: features='...'"
            )
        return answer, self._arranged(seen[self.layer], count)

    def find(self, function: Callable[[], Tensor]) -> None:
        """Choose the last layer whose output leads to what ``function`` answers, among those of other answers.

        A network with several outputs runs a layer of each, and the one that runs last may be of another output than
        the velocity (the scalar head of the official F2D2 network). The graph of one call tells them apart; where it
        shows nothing, the layer that runs last stays the choice. ``function`` calls the network once on few states.
        """
        nodes: dict[str, Any] = {}

        def mark(name: str, module: nn.Module, arguments: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
                return output
            # adds nothing, and gives the output a place in the graph also where all weights are frozen
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            nodes.pop(name, None)
            nodes[name] = output.grad_fn
            return output

        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as hooks:
            for name, module in self._network[0].named_modules():
                if name and _weighted(module):
                    hooks.enter_context(module.register_forward_hook(partial(mark, name)))
            waiting = [function().grad_fn]
        behind: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in behind:
                behind.add(node)
                waiting += [before for before, _ in node.next_functions]
        self._last = next((name for name in reversed(nodes) if nodes[name] in behind), None)

    @contextmanager
    def _listening(self, seen: dict[str, Any]) -> Iterator[None]:
        """Note what flows through the layer, or through every layer with weights until the last one is known."""
        network, layer = self._network[0], self.layer
        names = [layer] if layer is not None else [n for n, m in network.named_modules() if n and _weighted(m)]

        def note(name: str, value: Any) -> None:
            seen.pop(name, None)  # what runs again is entered anew, so the last entry ran last
            seen[name] = value

        def before(name: str, module: nn.Module, arguments: Any, keywords: Any) -> None:
            note(name, next((a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)), None))

        def after(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
            note(name, output[0] if isinstance(output, (tuple, list)) and output else output)

        with ExitStack() as hooks:
            for name in names:
                module = find_submodule(network, name)
                if self.name is None:
                    hook = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                else:
                    hook = module.register_forward_hook(partial(after, name))
                hooks.enter_context(hook)
            yield

    def _arranged(self, features: Any, count: int) -> Tensor:
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != count:
            came = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ValueError(
                f"features come from {self.layer!r}, and they are {came}, but there are {count} states; name a "
                "submodule whose output is (B, F), (B, F, H, W) or (B, N, F)"
            )
        if features.ndim > 2 and self._channels_are_last(features):
            features = features.movedim(-1, 1)
        return features

    def _channels_are_last(self, features: Tensor) -> bool:
        layer = find_submodule(self._network[0], str(self.layer))
        if isinstance(layer, (nn.Linear, nn.LayerNorm)):
            return True
        if _weighted(layer) and not _convolves(layer):
            # somebody's own linear layer, perhaps on another axis than the last: the sizes of its weight say which
            weight: Any = layer.weight
            sizes = tuple(weight.shape)
            first, last = features.shape[1] in sizes, features.shape[-1] in sizes
            return last or not first
        if _convolves(layer) or isinstance(layer, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            return False
        weighted = [module for module in layer.modules() if _weighted(module)]
        if weighted and not any(_convolves(module) for module in weighted):
            return True
        return self.channels_last or (not weighted and features.ndim == 3)


def _convolves(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 2
