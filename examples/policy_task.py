"""A mass in the plane that goes round a disk to its goal, many at once."""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH, SEEN, ACTION = 40, 7, 2
"""Steps of an episode, numbers of an observation, and of an action."""


class Field:
    """Masses ``(envs, 2)`` pushed by forces ``(envs, 2)`` within [-1, 1] towards their goals."""

    def __init__(self, envs: int) -> None:
        angle = 2 * torch.pi * torch.rand(envs)
        self.at = torch.stack((angle.cos(), angle.sin()), -1)
        self.goal = -self.at + 0.1 * torch.randn(envs, 2)
        self.speed, self.left = torch.zeros(envs, 2), LENGTH

    def see(self) -> Tensor:
        """Place, speed, way to the goal, and the time left, ``(envs, 7)``."""
        left = torch.full((len(self.at), 1), self.left / LENGTH)
        return torch.cat((self.at, self.speed, self.goal - self.at, left), -1)

    def push(self, force: Tensor) -> Tensor:
        """Rewards ``(envs,)`` of a tenth of a time unit."""
        self.speed = 0.8 * self.speed + 0.3 * force.clamp(-1, 1)
        self.at, self.left = self.at + 0.1 * self.speed, self.left - 1
        crossing = (self.at.norm(dim=-1) < 0.5).float()
        return -0.1 * ((self.at - self.goal).norm(dim=-1) + 3 * crossing + 0.05 * force.square().sum(-1))
