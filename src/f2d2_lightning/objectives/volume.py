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
from f2d2_lightning.flows.paths import Path, expand_time, like
from f2d2_lightning.likelihood.inversion import map_jacobian
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives.base import Examples, Objective, Terms, Weighting, baseline_of
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import VelocitySource

__all__ = ["VolumeRegression"]


class VolumeRegression(Objective):
    """Regress ``D`` on the logarithm of the determinant of the map's own jumps. The velocity is not trained.

    For ``frozen=True`` and maps to data, whose likelihood of data then comes by inversion.

    Args:
        capacity: Examples kept, per process.
        refresh: New examples per training step once they are there, on average; 0 for a map that does not change.
        chunk: Examples made at a time.
        own_path: Share of states that the map's own jumps lead to from noise; the others lie between noise and data.
        intervals: Distribution of ``(s, t)``, to data; mostly steps of the grids that likelihoods will be asked for.
        weighting: How errors become a loss.
        path: Probability path.
        max_dim: Largest state that is accepted, as a safeguard: each example costs as many evaluations.

    Raises:
        ValueError: If a number is out of range, or the intervals go to noise.
    """

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
        super().__init__(intervals or Intervals("to_data", diagonal=0.05, grid=0.85), weighting, path)
        if self.intervals.directions != Direction.TO_DATA:
            raise ValueError(
                f"volume regression is for maps to data, and the intervals go {self.intervals.directions}; use "
                'Intervals("to_data"), or train both directions with TrajectoryRegression'
            )
        if capacity < 1 or chunk < 1 or refresh < 0 or not 0 <= own_path <= 1:
            raise ValueError(
                f"capacity={capacity} and chunk={chunk} are at least 1, refresh={refresh} at least 0, "
                f"own_path={own_path} a share"
            )
        self.capacity, self.refresh, self.chunk, self.own_path = capacity, refresh, chunk, own_path
        self.max_dim = max_dim
        self._kept: dict[str, Tensor | None] = {}
        self._count, self._next, self._due = 0, 0, 0.0

    @torch.no_grad()
    def target(
        self,
        student: JointMap,
        source: VelocitySource,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
        data: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Joint:
        """The map's own ``u``, and the logarithm of its jump's determinant per unit of time."""
        if x[0].numel() > self.max_dim:
            raise ValueError(
                f"a determinant of {x[0].numel()} dimensions takes as many evaluations per example, and max_dim is "
                f"{self.max_dim}; fine-tune the map in both directions instead (TrajectoryRegression), or raise max_dim"
            )
        elapsed = like(t - s, x)
        u, slope = map_jacobian(lambda y: student(y, s, t, cond).velocity, x)
        eye = torch.eye(slope.shape[-1], dtype=x.dtype, device=x.device)
        volume = torch.linalg.slogdet(eye + (t - s)[:, None, None] * slope).logabsdet
        apart = (t - s) != 0
        divergence = slope.diagonal(dim1=1, dim2=2).sum(-1)
        safe = torch.where(apart, elapsed.flatten(), torch.ones_like(divergence))
        return Joint(u, torch.where(apart, volume / safe, divergence))

    def __call__(
        self,
        student: JointMap,
        source: VelocitySource,
        data: Tensor,
        cond: Tensor | None = None,
        *,
        anchor: VelocitySource | None = None,
        progress: float = 0.0,
    ) -> Terms:
        full = self._count == self.capacity
        self._due += self.refresh if full else self.chunk
        if self._due >= self.chunk or not self._kept:
            self._due = 0.0
            self._make(student, source, data, cond)
        examples = self._draw(len(data))
        predicted = student(examples.x, examples.s, examples.t, examples.cond)
        return self.weighting(predicted, examples, baseline_of(student))

    def _make(self, student: JointMap, source: VelocitySource, data: Tensor, cond: Tensor | None) -> None:
        """Put a chunk of new examples in the place of the oldest."""
        rows = torch.arange(self.chunk, device=data.device) % len(data)
        data, cond = data[rows], None if cond is None else cond[rows]
        s, t = (v.to(data.dtype) for v in self.intervals.sample(len(data), data.device, self.structure))
        x = self.path.sample(data, torch.randn_like(data), s)
        own = torch.rand(len(data), device=data.device) < self.own_path
        x = torch.where(like(own, x), self._led_to(student, torch.randn_like(data), s, cond), x)
        divergence = self.target(student, source, x, s, t, cond).divergence
        places = (self._next + torch.arange(len(x), device=x.device)) % self.capacity
        made = {"x": x, "s": s, "t": t, "divergence": divergence, "cond": cond}
        for name, value in made.items():
            if value is None:
                self._kept[name] = None
                continue
            ring = self._kept.get(name)
            if ring is None:
                ring = value.new_zeros(self.capacity, *value.shape[1:])
            self._kept[name] = ring.to(value.device)
            ring = self._kept[name]
            assert ring is not None
            ring[places] = value
        self._next = (self._next + len(x)) % self.capacity
        self._count = min(self._count + len(x), self.capacity)

    @torch.no_grad()
    def _led_to(self, student: JointMap, x: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        """Where the map's own jumps on one of the grids lead from noise ``x`` until times ``s``."""
        steps = self.intervals.steps[int(torch.randint(len(self.intervals.steps), (), generator=self.structure))]
        for a, b in itertools.pairwise(time_grid(steps)):
            start, end = expand_time(a, x), torch.minimum(s, expand_time(b, x))
            going = end > start
            moved = student.jump(x, start, torch.where(going, end, start), cond).state
            x = torch.where(like(going, x), moved, x)
        return x

    def _draw(self, count: int) -> Examples:
        x, s, t, divergence, cond = (self._kept[n] for n in ("x", "s", "t", "divergence", "cond"))
        assert x is not None and s is not None and t is not None and divergence is not None  # noqa: PT018
        rows = torch.randint(self._count, (count,), device=x.device)
        # what the map answers is what it should: only D is trained, and this part of the error is left at zero
        unused = torch.zeros_like(x[rows])
        labels = None if cond is None else cond[rows]
        return Examples(x[rows], s[rows], t[rows], labels, Joint(unused, divergence[rows]))

    def state_dict(self) -> dict[str, Any]:
        kept = {n: None if v is None else v[: self._count].cpu().clone() for n, v in self._kept.items()}
        return {"kept": kept, "next": self._next, "due": self._due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept, self._next, self._due = {}, int(state["next"]), float(state["due"])
        self._count = 0
        for name, value in state["kept"].items():
            if value is None:
                self._kept[name] = None
                continue
            self._count = len(value)
            ring = value.new_zeros(self.capacity, *value.shape[1:])
            ring[: len(value)] = value
            self._kept[name] = ring
