"""Compiled networks that keep their names, and step aside where derivatives in forward mode pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap
from f2d2_lightning.flows.maps import FlowMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.nn._layers import has_tangent
from f2d2_lightning.utils.conditions import Cond

MODES = ("default", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")


class CompiledCall:
    """A method of a flow map that answers ``(x, s, t, cond)``, compiled on its first call.

    Calls that carry a tangent (divergences, time derivatives) or come from a transform of ``torch.func`` run the method
    as it was written, by the rules of :mod:`f2d2_lightning.divergence._tangents`: torch does not say what compiled code
    does with a tangent. A copy of the network gets a copy of this that calls the copy's own method.
    """

    def __init__(self, network: FlowMap, name: str, how: dict[str, Any]) -> None:
        self.network, self.name, self.how = network, name, how
        self._fast: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fast": None}

    def __call__(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Any:
        s, t = expand_time(s, x), expand_time(t, x)
        plain = getattr(type(self.network), self.name).__get__(self.network)
        if torch.compiler.is_compiling() or has_tangent(x, s, t):
            return plain(x, s, t, cond)
        if self._fast is None:
            self._fast = torch.compile(plain, **self.how)
        return self._fast(x, s, t, cond)


def compile_network(network: nn.Module, how: bool | str = True) -> None:
    """Compile a flow map in place: names in its ``state_dict`` stay as they are, ``False`` undoes it.

    What is compiled is the method that does the work, ``forward_features`` where the class has one, ``forward``
    otherwise. The first call of each shape, mode and kind of gradient takes its time, minutes for large networks.

    ``how`` is ``True`` for torch's defaults, the name of a mode (``"max-autotune-no-cudagraphs"``) or of a backend
    (``"inductor"``, ``"eager"``) of ``torch.compile``. One that there is not, or that would reuse the memory of its
    answers, is a ``ValueError``, and so is any other network than a flow map that is written as one.
    """
    if not isinstance(network, FlowMap) or isinstance(network, AdaptedFlowMap):
        raise ValueError(
            f"compile is for flow maps that are written as one, and this is a {type(network).__name__}; features and "
            "derivatives of an adapted network do not pass through compiled code: leave compile out"
        )
    has_features = type(network).forward_features is not FlowMap.forward_features
    name = "forward_features" if has_features else "forward"
    if how is False:
        vars(network).pop(name, None)
    else:
        setattr(network, name, CompiledCall(network, name, _arguments(how)))


def _arguments(how: bool | str) -> dict[str, Any]:
    """Keyword arguments of ``torch.compile``; see :func:`compile_network`."""
    if isinstance(how, bool):
        return {}
    if how in CUDA_GRAPHS:
        raise ValueError(
            f"compile is {how!r}, which records CUDA graphs: they write every answer into the same memory, and a path "
            "of several steps still needs the last one; use True or 'max-autotune-no-cudagraphs'"
        )
    backends = torch.compiler.list_backends(exclude_tags=())
    if how not in MODES and how not in backends:
        raise ValueError(
            f"compile is {how!r}; it is True, False, a mode of torch.compile ({', '.join(MODES)}) or a backend of it "
            f"({', '.join(backends)})"
        )
    return {"mode": how} if how in MODES else {"backend": how}
