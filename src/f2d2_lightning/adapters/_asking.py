"""How the checks of a convention ask a network: without leaving a trace, and alike each time."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters.adapter import AdaptedFlowMap, Adapter
from f2d2_lightning.adapters.call import ConventionError
from f2d2_lightning.flows._held import evaluating
from f2d2_lightning.utils.seeding import own_random_state

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Symmetric about one half, so that mirroring time gives the same ones."""


@contextlib.contextmanager
def undisturbed(flow_map: nn.Module, data: Tensor) -> Iterator[torch.device]:
    """Evaluation mode and forked random state; gives the device that the network is on."""
    tensor = next(iter(flow_map.parameters()), next(iter(flow_map.buffers()), data))
    with torch.inference_mode(False), torch.no_grad(), own_random_state(tensor.device), evaluating(flow_map):
        yield tensor.device


def seed(device: torch.device) -> None:
    """Start the random numbers anew, so that a network with random parts answers the same question alike."""
    # only the generators that were forked: torch.manual_seed would reach every device
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(0)


def called(flow_map: AdaptedFlowMap, function: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What ``function``, which calls the network, answers; its errors say how the network was called."""
    seed(device)
    try:
        return function()
    except (ConventionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        network, adapter = flow_map.network, flow_map.adapter
        raise ConventionError(
            f"{Adapter.describe(network)} was called as {adapter.call.text!r} and raised {type(error).__name__}: "
            f"{error}. It takes {signature(flow_map)}; write the adapter's call= to fit (order and keywords, the "
            "form of the second time, time_axes=, classes= for one-hot labels, null_label=, channels_last=)"
        ) from error


def signature(flow_map: AdaptedFlowMap) -> str:
    """What the network takes, as its author wrote it."""
    network = flow_map.network
    method = flow_map.adapter.call.method or ("forward" if isinstance(network, nn.Module) else None)
    function = network if method is None else getattr(network, method)
    try:
        return f"{Adapter.describe(network)}{'.' + method if method else ''}{inspect.signature(function)}"
    except (TypeError, ValueError):
        return "arguments that cannot be inspected"


@contextlib.contextmanager
def without_zeros(network: Callable[..., object]) -> Iterator[None]:
    """Fill parameters that are all zero for a moment: zero-initialised layers hide what is behind them."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    zeros = [p for p in parameters if not bool(p.any())]
    kept = [p.clone() for p in zeros]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in zeros:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        yield
    finally:
        for p, value in zip(zeros, kept, strict=True):
            p.copy_(value)
