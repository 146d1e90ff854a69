r"""Volume regression: the divergence head of a map that stays as it is learns the map's own change of volume.

A few-step sampler that was not trained with likelihoods in mind is not the flow of its own velocity: its jumps have a
density of their own, by the change of variables,

.. math:: D^*(x, s, t) = \frac{1}{t - s} \log \left|\det \frac{\partial X_{s \to t}(x)}{\partial x}\right|,

whose limit on the diagonal is the divergence. With a head taught the divergence of the velocity instead, the likelihood
of a frozen sampler is wrong by as much as the two differ. The determinant takes as many directional derivatives as the
state has dimensions, so it is made once per example and used many times; it is for states of up to a few hundred
dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import Direction, Joint, JointMap
from f2d2_lightning.flows.paths import Path, Point, like
from f2d2_lightning.likelihood.inversion import map_jacobian
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives._ring import Ring
from f2d2_lightning.objectives.base import Batch, Examples, Objective, Terms, Weighting
from f2d2_lightning.objectives.intervals import Intervals, pick
from f2d2_lightning.utils.checks import at_least, checked, share
from f2d2_lightning.utils.conditions import Cond, some_of

__all__ = ["VolumeRegression"]


class VolumeRegression(Objective):
    """Regress ``D`` on the logarithm of the determinant of the map's own jumps. The velocity is not trained.

    For ``frozen=True``: a map to data, whose likelihood of data then comes by inversion, or a student whose samples are
    to have their own density, as importance weights need it, in place of the teacher's.

    Args:
        capacity: Examples kept, per process.
        refresh: New examples per training step once they are there, on average; 0 for a map that does not change.
        chunk: Examples made at a time.
        own_path: Share of states that the map's own jumps lead to, from noise or, of intervals to noise, from data; the
            others lie between noise and data.
        intervals: Distribution of ``(s, t)``; mostly steps of the grids that likelihoods will be asked for.
        weighting: How errors become a loss.
        path: Probability path.
        max_dim: Largest state that is accepted, as a safeguard: each example costs as many evaluations.

    Raises:
        ValueError: If a number is out of range.
    """

    @checked
    def __init__(
        self,
        capacity: int = 6000,
        refresh: float = 0.0,
        chunk: int = 128,
        own_path: float = 0.5,
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: Path | None = None,
        max_dim: int = 1024,
    ) -> None:
        super().__init__(intervals or Intervals(diagonal=0.05, grid=0.85), weighting, path)
        at_least(1, capacity=capacity, chunk=chunk)
        at_least(0, refresh=refresh)
        share(own_path=own_path)
        self.capacity, self.refresh, self.chunk, self.own_path = capacity, refresh, chunk, own_path
        self.max_dim = max_dim
        self._ring, self._due = Ring(capacity), 0.0

    @torch.no_grad()
    def volume(self, student: JointMap, point: Point, t: Tensor) -> Tensor:
        """Logarithm of the determinant of the map's jump from each point to ``t``, ``(B,)``, per unit of time.

        Raises:
            ValueError: If the states are larger than ``max_dim``.
        """
        x, s, cond = point.x, point.t, point.cond
        if x[0].numel() > self.max_dim:
            raise ValueError(
                f"a determinant of {x[0].numel()} dimensions takes as many evaluations per example, and max_dim is "
                f"{self.max_dim}; fine-tune the map in both directions instead (TrajectoryRegression), or raise max_dim"
            )
        _, slope = map_jacobian(lambda y: student(y, s, t, cond).velocity, x)
        eye = torch.eye(slope.shape[-1], dtype=x.dtype, device=x.device)
        volume = torch.linalg.slogdet(eye + (t - s)[:, None, None] * slope).logabsdet
        apart, divergence = s != t, slope.diagonal(dim1=1, dim2=2).sum(-1)
        return torch.where(apart, volume / torch.where(apart, t - s, torch.ones_like(t)), divergence)

    def loss(self, student: JointMap, batch: Batch) -> Terms:
        ring = self._ring
        ring.to(batch.data.device)  # a checkpoint's is on the CPU
        self._due += self.refresh if ring.full else self.chunk
        if self._due >= self.chunk or not ring.count:
            self._due = 0.0
            self._make(student, batch.data, batch.cond)
        rows = torch.randint(ring.count, (len(batch.data),), device=batch.data.device)
        x, cond = ring["x"][rows], ring.get("cond")
        # what the map answers is what it should: only D is trained, and this part of the error is left at zero
        target = Joint(torch.zeros_like(x), ring["divergence"][rows])
        labels = some_of(cond, rows)
        return self.terms(student, Examples(x, ring["s"][rows], ring["t"][rows], labels, target))

    def _make(self, student: JointMap, data: Tensor, cond: Cond | None) -> None:
        """Put a chunk of new examples in the place of the oldest."""
        self.intervals.follow(student.directions)
        rows = torch.arange(self.chunk, device=data.device) % len(data)
        data, cond = data[rows], some_of(cond, rows)
        s, t = (v.to(data.dtype) for v in self.intervals.sample(len(data), data.device, self.on_diagonal(len(data))))
        x = self.path.sample(data, torch.randn_like(data), s)
        own = torch.rand(len(data), device=data.device) < self.own_path
        to_data = s <= t if Direction.TO_DATA in self.directions else torch.zeros_like(own)
        begin = torch.where(like(to_data, x), torch.randn_like(data), data)
        x = torch.where(like(own, x), self._led_to(student, begin, s, to_data, cond), x)
        self._ring.add(x=x, s=s, t=t, divergence=self.volume(student, Point(x, s, cond), t), cond=cond)

    @torch.no_grad()
    def _led_to(self, student: JointMap, x: Tensor, s: Tensor, to_data: Tensor, cond: Cond | None) -> Tensor:
        """Where the map's own jumps on one of the grids lead until times ``s``: noise to data, data to noise."""
        for a, b in itertools.pairwise(time_grid(pick(self.intervals.steps, self.structure))):
            start = torch.where(to_data, s.new_tensor(a), s.new_tensor(1 - a))
            end = torch.where(to_data, s.clamp(a, b), s.clamp(1 - b, 1 - a))
            moved = student.jump(x, start, end, cond).state
            x = torch.where(like(end != start, x), moved, x)
        return x

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self._ring.state_dict(), "next": self._ring.next, "due": self._due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ring, self._due = Ring(self.capacity), float(state["due"])
        self._ring.next = int(state["next"])
        self._ring.load_state_dict(state["kept"])
