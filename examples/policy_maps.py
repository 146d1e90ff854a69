"""Policies that say how likely their actions are: a Gaussian, an ODE, a jump by its determinant and by its head."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from policy_task import ACTION, SEEN
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning.divergence import Exact
from f2d2_lightning.flows import FlowMap, Joint, JointMap, Point
from f2d2_lightning.likelihood import Determinant, Inversion
from f2d2_lightning.nn import MLP

POLICIES = ("gaussian", "ode", "jump", "head")


class Answer(NamedTuple):
    """Of a policy, for observations ``(B, 7)``."""

    action: Tensor
    """``(B, 2)``."""
    log_q: Tensor
    """``(B,)``, nats; NaN where no noise was found that leads to the action."""
    noise: Tensor
    """That leads to the actions, ``(B, 2)``."""
    evaluations: int
    """Of the network for each, a derivative along an axis being one more."""


class Gaussian(nn.Module):
    """Actions around ``network(seen)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = pairwise((SEEN, width, width))
        hidden = [part for a, b in sizes for part in (nn.Linear(a, b), nn.Tanh())]
        self.mean, self.log_scale = nn.Sequential(*hidden, nn.Linear(width, ACTION)), nn.Parameter(torch.zeros(ACTION))

    def act(self, seen: Tensor) -> Answer:
        noise = torch.randn(len(seen), ACTION)
        return self.of(self.mean(seen) + self.log_scale.exp() * noise, seen, noise)

    def of(self, action: Tensor, seen: Tensor, noise: Tensor) -> Answer:
        log_q = torch.distributions.Normal(self.mean(seen), self.log_scale.exp()).log_prob(action).sum(-1)
        return Answer(action, log_q, noise, 1)

    def refresh(self, seen: Tensor, noise: Tensor) -> tuple[Tensor, int]:
        return noise.new_zeros(()), 0


class Midpoint(JointMap):
    """An ODE's steps by its midpoint, with the exact divergence there: 2 evaluations and ``ACTION`` derivatives."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__()
        self.flow_map = flow_map

    def joint(self, x: Tensor, s: Tensor, t: Tensor, cond: Tensor) -> Joint:
        middle = x + ((t - s) / 2)[:, None] * self.flow_map.velocity(x, s, cond)
        return Joint(*Exact()(self.flow_map.velocity, Point(middle, (s + t) / 2, cond))[:2])


class Flow(nn.Module):
    """Actions that a joint map makes of noise in ``steps``.

    Args:
        joint: The map.
        steps: Jumps.
        cost: Evaluations that a jump of the map takes.
        determinant: ``"exact"`` for the jumps' own volumes, ``None`` for what the map says.
        share: Of an update's actions, from which the head learns volumes.
    """

    def __init__(self, joint: JointMap, steps: int, cost: int, determinant: str | None, share: float) -> None:
        super().__init__()
        self.joint, self.steps, self.cost, self.determinant, self.share = joint, steps, cost, determinant, share

    def act(self, seen: Tensor) -> Answer:
        noise = torch.randn(len(seen), ACTION)
        made = f2.sample(self.joint, noise, self.steps, seen, with_log_prob=True, determinant=self.determinant)
        return Answer(made.state, made.log_prob, noise, self.cost * made.evaluations)

    def of(self, action: Tensor, seen: Tensor, noise: Tensor) -> Answer:
        """Of actions that ``noise`` led to under earlier weights."""
        inversion, start = Inversion("newton", tolerance=1e-3, max_iterations=8), noise
        if f2.Direction.TO_NOISE in self.joint.directions:
            inversion = start = None
        told = f2.log_prob(
            self.joint, action, self.steps, seen, inversion=inversion, start=start, determinant=self.determinant
        )
        return Answer(action, told.value, told.noise.detach(), self.cost * told.evaluations)

    def refresh(self, seen: Tensor, noise: Tensor) -> tuple[Tensor, int]:
        """How far the head is from the volumes of the jumps from ``noise``, and the evaluations it took."""
        count, loss = round(self.share * len(seen)), noise.new_zeros(())
        x, seen = noise[:count], seen[:count]
        for s, t in pairwise(torch.linspace(0, 1, self.steps + 1).tolist() if count else ()):
            with torch.no_grad():
                landed, volume = Determinant(0).jump(self.joint, x, s, t, seen)[0]
            loss = loss + (self.joint.jump(x, s, t, seen).log_prob_change - volume).square().mean()
            x = landed
        return loss, (2 + ACTION) * self.steps * count


def policy(name: str, width: int, steps: int, share: float) -> Gaussian | Flow:
    """By its name."""
    if name == "gaussian":
        return Gaussian(width)
    network = MLP((ACTION,), width=width, blocks=2, condition=SEEN, directions="both" if name == "ode" else "to_data")
    if name == "ode":
        return Flow(Midpoint(network), 10, 2 + ACTION, None, 0.0)
    joint = f2.JointFlowMap(network, f2.DivergenceHead(features=network.features))
    return Flow(joint, steps, 1, *((None, share) if name == "head" else ("exact", 0.0)))
