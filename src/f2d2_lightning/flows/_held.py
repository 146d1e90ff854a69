"""A network that is looked at while it trains: evaluation mode, and no gradient reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.maps import FlowMap
from f2d2_lightning.utils.conditions import Cond


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, whatever mode each submodule is in."""
    training = [m for m in module.modules() if m.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def weights_held(module: nn.Module) -> Iterator[None]:
    """No weight gets a gradient from what is computed in a while; states may."""
    trained = [p for p in module.parameters() if p.requires_grad]
    # the attribute: inside of a transform of torch.func the method is refused
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


class HeldFlowMap(FlowMap):
    """A flow map as it is at the moment, neither trained nor touched; somebody else may go on training it."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__()
        self.flow_map = flow_map
        self.directions = flow_map.directions

    @property
    def conditional(self) -> bool | None:
        return self.flow_map.conditional

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        with evaluating(self.flow_map), torch.no_grad():
            return self.flow_map(x, s, t, cond)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        with evaluating(self.flow_map), torch.no_grad():
            return self.flow_map.forward_features(x, s, t, cond)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        # where a state asks for gradients it is differentiated itself, by reverse mode
        with evaluating(self.flow_map), torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return self.flow_map.velocity(x, t, cond)
