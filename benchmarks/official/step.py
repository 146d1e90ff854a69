"""The F2D2 training step as its paper's code takes it, written plainly: what training_step.py compares with.

Facts from the public PyTorch code of Ai et al., 2025 (https://arxiv.org/abs/2512.02636). For each image of a batch
there are two regression targets, one on the diagonal and one on an interval to data of length 1, 1/2, ..., 1/64:

- the student's answer on the diagonal, with gradient, beside the teacher's velocity and a reverse-mode Hutchinson
  product of it (one Rademacher probe), for which the teacher runs with a graph that is itself differentiable;
- the student's answer on the whole interval, with gradient, beside the mean of its own two answers on the halves,
  without.

Then come backward pass, gradients made finite and clipped, RAdam, and the weight average, parameter by parameter. It is
the cost that is copied, not the results: the intervals are asked for in this package's convention.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from f2d2_lightning import FlowMap, JointFlowMap
from f2d2_lightning.flows.paths import like

__all__ = ["OfficialRecipe"]


class OfficialRecipe:
    """Student, average and optimizer, and the step that trains them.

    Args:
        student: The joint map in training.
        teacher: Frozen flow map whose diagonal teaches.
        decay: Of the weight average.
        divergence_unit: What divergences are divided by before they are compared.
    """

    def __init__(
        self,
        student: JointFlowMap,
        teacher: FlowMap,
        decay: float = 0.9999,
        divergence_unit: float = 20_000.0,
    ) -> None:
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        self.optimizer = torch.optim.RAdam(student.parameters(), lr=1e-4)
        self.decay = decay
        self.unit = divergence_unit

    def teacher_answer(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and one-probe divergence, ``(B, ...)`` and ``(B,)``; ``x`` requires a gradient."""
        velocity = self.teacher.velocity(x, t)
        probe = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1
        along_probe = (velocity * probe).flatten(1).sum(1)
        (product,) = torch.autograd.grad(along_probe.sum(), x, create_graph=True, retain_graph=False)
        # the graphs are let go of here, as in the public code
        return velocity.detach(), (product * probe).flatten(1).sum(1).detach()

    def diagonal_loss(self, data: Tensor) -> Tensor:
        """The student's diagonal on the teacher."""
        t = torch.randint(0, 1024, (len(data),), device=data.device).to(data.dtype) / 1024
        x = like(1 - t, data) * torch.randn_like(data) + like(t, data) * data
        x.requires_grad_(True)
        u, divergence = self.student(x, t, t)
        velocity, target = self.teacher_answer(x, t)
        return mse_loss(u, velocity) + mse_loss(divergence / self.unit, target / self.unit)

    def interval_loss(self, data: Tensor) -> Tensor:
        """The student's long step on its own two short ones."""
        halvings = torch.randint(0, 7, (len(data),), device=data.device)
        length = 0.5 ** halvings.to(data.dtype)
        start = (torch.rand(len(data), device=data.device) / length).floor() * length
        start = start.clamp(max=1 - length)
        middle, end = start + length / 2, start + length
        x = like(1 - start, data) * torch.randn_like(data) + like(start, data) * data
        x.requires_grad_(True)
        with torch.no_grad():
            u_first, d_first = self.student(x, start, middle)
            u_second, d_second = self.student(x + like(length / 2, x) * u_first, middle, end)
        u, divergence = self.student(x, start, end)
        target_u, target_d = (u_first + u_second) / 2, (d_first + d_second) / 2
        return mse_loss(u, target_u) + mse_loss(divergence / self.unit, target_d / self.unit)

    def step(self, data: Tensor) -> float | Tensor:
        """One training step on a batch ``(B, C, H, W)``: ``2 B`` regression targets. The loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.diagonal_loss(data) + self.interval_loss(data)
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 0.01)
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.student.parameters(), strict=True):
                mine.copy_(theirs.detach().lerp(mine, self.decay))
        return loss.detach()
