r"""Volume regression: the divergence head of a map that stays as it is learns the map's own change of volume.

A few-step sampler that was not trained with likelihoods in mind is not the flow of its own velocity: its jumps have a
density of their own, by the change of variables,

.. math:: D^*(x, s, t) = \frac{1}{t - s} \log \left|\det \frac{\partial X_{s \to t}(x)}{\partial x}\right|,

whose limit on the diagonal is the divergence. With a head taught the divergence of the velocity instead, the likelihood
of a frozen sampler is wrong by as much as the two differ. A determinant takes as many directional derivatives as the
state has dimensions, or some hundred where it is estimated, so it is made once per example and used many times.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import with_probes
from f2d2_lightning.flows.gaussian import baseline_of
from f2d2_lightning.flows.maps import Direction, Joint, JointMap
from f2d2_lightning.flows.paths import Path, Point, like
from f2d2_lightning.likelihood.determinant import Determinant
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
        determinant: How volumes are found: ``"exact"``, ``"estimate"``, or a
            :class:`~f2d2_lightning.likelihood.Determinant`; by default exactly up to 256 dimensions, estimated above.

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
        determinant: Determinant | str | None = None,
    ) -> None:
        super().__init__(intervals or Intervals(diagonal=0.05, grid=0.85), weighting, path)
        at_least(1, capacity=capacity, chunk=chunk)
        at_least(0, refresh=refresh)
        share(own_path=own_path)
        self.capacity, self.refresh, self.chunk, self.own_path = capacity, refresh, chunk, own_path
        self.determinant = Determinant.said(determinant) or Determinant()
        self.forget()

    def forget(self) -> None:
        self._ring, self._due = Ring(self.capacity), 0.0

    @torch.no_grad()
    def volume(self, student: JointMap, point: Point, t: Tensor) -> Tensor:
        """Logarithm of the determinant of the map's jump from each point to ``t``, ``(B,)``, per unit of time."""
        x, s, cond = point.x, point.t, point.cond
        volume, still = self.determinant.log_volume(student, x, s, t, cond)[0], s == t
        if bool(still.any()):
            rows = still.nonzero()[:, 0]
            estimator = with_probes(self.determinant.count(x[0].numel()), control=baseline_of(student))
            volume[rows] = estimator(student.velocity, Point(x[rows], s[rows], some_of(cond, rows))).divergence
        return volume / torch.where(still, torch.ones_like(t), t - s)

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

    @torch.no_grad()
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
        self.forget()
        self._due = float(state["due"])
        self._ring.next = int(state["next"])
        self._ring.load_state_dict(state["kept"])
