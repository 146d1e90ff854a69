"""Where a second time can be added to somebody's network of one: found by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap, Adapter, check_convention
from f2d2_lightning.adapters._asking import undisturbed, without_zeros
from f2d2_lightning.adapters.features import last_width


def time_embeddings(flow_map: AdaptedFlowMap, x: Tensor) -> list[str]:
    """Submodules with weights whose output is of the time alone, those that run first before others, outermost."""
    network = flow_map.network
    assert isinstance(network, nn.Module)
    runs: list[dict[str, list[Any]]] = []
    with undisturbed(flow_map, x), without_zeros(network):
        for states, time in ((x, 0.3), (x.flip(0) + 1, 0.3), (x, 0.8)):
            seen: dict[str, list[Any]] = {}
            handles = [
                module.register_forward_hook(
                    lambda module, arguments, answer, name=name, seen=seen: seen.setdefault(name, []).append(answer)
                )
                for name, module in network.named_modules()
                if name
            ]
            try:
                flow_map.velocity(states, time)
            finally:
                for handle in handles:
                    handle.remove()
            runs.append(seen)
    found = []
    for name in runs[0]:
        answers = [seen.get(name, []) for seen in runs]
        if any(len(one) != 1 or not isinstance(one[0], Tensor) or one[0].ndim < 2 for one in answers):
            continue
        here, moved, later = (one[0] for one in answers)
        if len(here) == len(x) and torch.equal(here, moved) and not torch.equal(here, later):
            try:
                last_width(network.get_submodule(name), name)
            except ValueError:
                continue  # without weights
            found.append(name)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def takes_interval(network: nn.Module, adapter: Adapter, name: str, x: Tensor, mode: str) -> bool:
    """Whether a second time that is added to a submodule reaches the answer."""
    try:
        flow_map = AdaptedFlowMap(network, adapter, interval=name)
        flow_map.probe(x)
        with undisturbed(flow_map, x), without_zeros(flow_map):
            reached = not torch.equal(flow_map(x, 0.3, 0.5), flow_map(x, 0.3, 0.9))
        check_convention(flow_map, x, mode=mode)
    except ValueError:
        return False
    return reached
