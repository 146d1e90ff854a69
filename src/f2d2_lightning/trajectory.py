r"""Trajectory regression: integrate the teacher once, regress the student on what it did, many times over.

A trajectory of the teacher with its cumulative divergence, kept at a grid of times, holds an exact target (up to the
integrator's error) for every pair of its points, in either order:

.. math::
    u^* = \frac{x_t - x_s}{t - s}, \qquad D^* = -\frac{\log p_t(x_t) - \log p_s(x_s)}{t - s}.

Nothing is bootstrapped, so errors of the student do not feed its own targets; the random errors of a divergence
probe average out along the way. The price is memory, which the user sets, and the teacher's evaluations, which a
refresh rate sets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.flow_map import Joint, JointMap
from f2d2_lightning.intervals import Intervals
from f2d2_lightning.objectives import Examples, Objective, Terms, Weighting
from f2d2_lightning.paths import Path, like
from f2d2_lightning.sampling import sample
from f2d2_lightning.sources import VelocitySource

__all__ = ["TrajectoryPool", "TrajectoryRegression", "integrate"]

STARTS = ("data", "perturbed", "noise", "student")


@torch.no_grad()
def integrate(
    source: VelocitySource, x: Tensor, times: Sequence[float], cond: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Heun's method along given times, with the log-density's change.

    Every evaluation draws its own divergence probes, so that their errors are independent.

    Args:
        source: Gives ``(v, div v)`` anywhere.
        x: State at ``times[0]``, ``(B, ...)``.
        times: Times, ascending or descending.
        cond: Conditioning, or ``None``.

    Returns:
        States ``(B, len(times), ...)`` and ``log p_t(x_t) - log p_{t_0}(x)``, ``(B, len(times))``, nats.
    """
    states, change = [x], [x.new_zeros(len(x))]
    for a, b in itertools.pairwise(times):
        first = source(x, a, cond)
        second = source(x + (b - a) * first.velocity, b, cond)
        x = x + (b - a) / 2 * (first.velocity + second.velocity)
        states.append(x)
        change.append(change[-1] - (b - a) / 2 * (first.divergence + second.divergence))
    return torch.stack(states, 1), torch.stack(change, 1)


class TrajectoryPool:
    """A ring of integrated trajectories in a fixed amount of memory.

    A checkpoint holds only the starting points and seeds; loading one integrates them again, to the same numbers.

    Args:
        times: Ascending times from 0 to 1 at which states are kept.
        max_mib: Memory for states, in MiB; what fits is kept, per process.
        capacity: Most trajectories to keep, whatever the memory.
    """

    def __init__(self, times: Sequence[float], max_mib: float = 256.0, capacity: int = 8192) -> None:
        self.times = list(times)
        self.max_mib = max_mib
        self.max_capacity = capacity
        self._entries: list[dict[str, Any]] = []  # starting points, oldest first
        self._loaded: list[dict[str, Any]] = []  # from a checkpoint, to be integrated
        self._states: Tensor | None = None
        self._change: Tensor | None = None
        self._cond: Tensor | None = None
        self._count = 0
        self._next = 0

    def __len__(self) -> int:
        return self._count

    def capacity_for(self, x: Tensor) -> int:
        """Trajectories of states like ``x`` (``(B, ...)``) that fit.

        Raises:
            ValueError: If not even one does.
        """
        per_trajectory = len(self.times) * (x[0].numel() + 1) * x.element_size()
        fits = int(self.max_mib * 2**20 // per_trajectory)
        if fits < 1:
            raise ValueError(
                f"max_mib={self.max_mib} holds no trajectory of {len(self.times)} states of shape "
                f"{tuple(x.shape[1:])} ({per_trajectory / 2**20:.2f} MiB each); raise max_mib or keep fewer times"
            )
        return min(fits, self.max_capacity)

    @property
    def full(self) -> bool:
        """Whether every place is taken."""
        return self._states is not None and self._count == len(self._states)

    def add(self, source: VelocitySource, x: Tensor, from_data: bool, cond: Tensor | None = None) -> None:
        """Integrate from ``x`` (at ``t = 1`` if ``from_data``, else at ``t = 0``) and keep the trajectories."""
        seed = int(torch.randint(2**62, ()))
        self._add(source, {"x": x.detach().clone(), "from_data": from_data, "cond": cond, "seed": seed})

    def _add(self, source: VelocitySource, entry: dict[str, Any]) -> None:
        x, cond = entry["x"], entry["cond"]
        times = self.times[::-1] if entry["from_data"] else self.times
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(entry["seed"])
            states, change = integrate(source, x, times, cond)
        finite = bool(states.isfinite().all() and change.isfinite().all())
        if not finite:
            raise FloatingPointError(
                "a teacher trajectory became NaN or infinite; check the teacher (its own samples), or integrate with "
                "more nodes"
            )
        if entry["from_data"]:
            states, change = states.flip(1), change.flip(1)
        if self._states is None or self._change is None:
            capacity = self.capacity_for(x)
            self._states = states.new_zeros(capacity, *states.shape[1:])
            self._change = change.new_zeros(capacity, change.shape[1])
            self._cond = None if cond is None else cond.new_zeros(capacity, *cond.shape[1:])
        size = len(self._states)
        rows = (self._next + torch.arange(len(x), device=x.device)) % size
        self._states[rows], self._change[rows] = states, change
        if self._cond is not None:
            self._cond[rows] = cond
        self._next = (self._next + len(x)) % size
        self._count = min(self._count + len(x), size)
        self._entries.append(entry)
        # an entry whose rows are all written over is forgotten
        while sum(len(e["x"]) for e in self._entries[1:]) >= size:
            self._entries.pop(0)

    def restore(self, source: VelocitySource, device: torch.device | str | None = None) -> None:
        """Integrate, on ``device``, what a loaded checkpoint held; nothing to do otherwise."""
        loaded, self._loaded = self._loaded, []
        if loaded:
            # the ring goes on writing where it was
            total = sum(len(e["x"]) for e in loaded)
            self._next = (self._next - total) % self.capacity_for(loaded[0]["x"])
        for entry in loaded:
            cond = None if entry["cond"] is None else entry["cond"].to(device)
            self._add(source, {**entry, "x": entry["x"].to(device), "cond": cond})

    def draw(self, s: Tensor, t: Tensor) -> Examples:
        """Random trajectories at the kept times nearest to ``s`` and ``t``, ``(B,)`` each.

        Returns:
            States at ``s``, the kept times, and the pair that leads to ``t``. Where both fall on one kept time,
            ``t`` moves to the next.
        """
        assert self._states is not None
        assert self._change is not None
        kept = torch.tensor(self.times, dtype=self._states.dtype, device=self._states.device)
        i, j = _nearest(kept, s.to(kept)), _nearest(kept, t.to(kept))
        last = len(kept) - 1
        beside = torch.where(t.to(kept) >= s.to(kept), j + 1, j - 1)
        beside = torch.where(beside > last, last - 1, torch.where(beside < 0, torch.ones_like(beside), beside))
        j = torch.where(i == j, beside, j)
        rows = torch.randint(self._count, (len(i),), device=kept.device)
        s, t = kept[i], kept[j]
        x = self._states[rows, i]
        u = (self._states[rows, j] - x) / like(t - s, x)
        divergence = -(self._change[rows, j] - self._change[rows, i]) / (t - s)
        return Examples(x, s, t, None if self._cond is None else self._cond[rows], Joint(u, divergence))

    def state_dict(self) -> dict[str, Any]:
        """Starting points and seeds, on the CPU."""
        entries = [
            {**e, "x": e["x"].cpu(), "cond": None if e["cond"] is None else e["cond"].cpu()}
            for e in (*self._entries, *self._loaded)
        ]
        return {"entries": entries, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over starting points; they are integrated by :meth:`restore`."""
        self._loaded = list(state["entries"])
        self._states = self._change = self._cond = None
        self._entries, self._count, self._next = [], 0, int(state["next"])


def _nearest(kept: Tensor, t: Tensor) -> Tensor:
    upper = torch.searchsorted(kept, t.contiguous()).clamp(1, len(kept) - 1)
    lower = upper - 1
    return torch.where(t - kept[lower] < kept[upper] - t, lower, upper)


class TrajectoryRegression(Objective):
    """Regress ``(u, D)`` on pairs of points of the teacher's trajectories.

    Args:
        nodes: Heun steps per trajectory; a multiple of every likelihood grid, so that its times are among them.
        capacity: Most trajectories kept, per process.
        max_mib: Memory for them, in MiB, per process; the smaller of the two limits holds.
        refresh: New trajectories per training step once the pool is full, on average.
        chunk: Trajectories integrated at a time.
        starts: Shares of where trajectories begin: ``"data"`` (the batch), ``"perturbed"`` (the batch plus noise),
            ``"noise"`` (the prior) and ``"student"`` (samples of the student: where its own path leads).
        perturbation: Standard deviation of the noise for ``"perturbed"``, uniform between 0 and this.
        student_steps: Steps of the samples that ``"student"`` starts from, drawn at random.
        intervals: Distribution of ``(s, t)``; its diagonal share is regressed on the source at the batch's own
            noised states.
        weighting: How errors become a loss.
        path: Probability path.

    Raises:
        ValueError: If a number is out of range, a start is unknown, or ``nodes`` misses the likelihood grids.
    """

    def __init__(
        self,
        nodes: int = 32,
        capacity: int = 8192,
        max_mib: float = 512.0,
        refresh: float = 8.0,
        chunk: int = 256,
        starts: Mapping[str, float] | None = None,
        perturbation: float = 0.1,
        student_steps: Sequence[int] = (1, 2, 4, 8),
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__(intervals, weighting, path)
        starts = dict(starts or {"data": 0.4, "perturbed": 0.3, "noise": 0.3})
        unknown = set(starts) - set(STARTS)
        if unknown or not starts or min(starts.values()) < 0 or sum(starts.values()) <= 0:
            raise ValueError(f"starts is {starts}; it maps some of {', '.join(STARTS)} to shares that are not negative")
        if nodes < 1 or capacity < 1 or chunk < 1 or refresh < 0 or perturbation < 0:
            raise ValueError(
                f"nodes={nodes}, capacity={capacity} and chunk={chunk} are at least 1, refresh={refresh} and "
                f"perturbation={perturbation} at least 0"
            )
        if self.intervals.grid > 0 and any(nodes % k for k in self.intervals.steps):
            raise ValueError(
                f"nodes={nodes} is not a multiple of the likelihood grids {self.intervals.steps}; "
                f"use a multiple of {math.lcm(*self.intervals.steps)}"
            )
        self.starts = starts
        self.refresh = refresh
        self.chunk = chunk
        self.perturbation = perturbation
        self.student_steps = tuple(student_steps)
        self.pool = TrajectoryPool([k / nodes for k in range(nodes + 1)], max_mib, capacity)
        self._due = 0.0

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
        """Target at arbitrary points: integrates the source from ``x``; for tests and inspection."""
        answers = []
        for row in range(len(x)):
            count = len(self.pool.times) - 1
            a, b = float(s[row]), float(t[row])
            one = None if cond is None else cond[row : row + 1]
            if a == b:
                answers.append(source(x[row : row + 1], a, one))
                continue
            times = [a + (b - a) * k / count for k in range(count + 1)]
            states, change = integrate(source, x[row : row + 1], times, one)
            answers.append(Joint((states[:, -1] - states[:, 0]) / (b - a), -change[:, -1] / (b - a)))
        return Joint(torch.cat([a.velocity for a in answers]), torch.cat([a.divergence for a in answers]))

    def __call__(
        self,
        student: JointMap,
        source: VelocitySource,
        data: Tensor,
        cond: Tensor | None = None,
        *,
        anchor: VelocitySource | None = None,
    ) -> Terms:
        if not source.anywhere:
            raise ValueError(
                f"trajectories need a velocity everywhere, and {type(source).__name__} answers on the data pair's "
                "path only; use a teacher or the student's own diagonal"
            )
        self._refill(student, source, data, cond)
        return super().__call__(student, source, data, cond, anchor=anchor)

    def examples(
        self,
        student: JointMap,
        source: VelocitySource,
        data: Tensor,
        noise: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None,
    ) -> Examples:
        return self.pool.draw(s, t)

    def _refill(self, student: JointMap, source: VelocitySource, data: Tensor, cond: Tensor | None) -> None:
        self.pool.restore(source, data.device)
        if self.pool.full:
            self._due += self.refresh
            if self._due < min(self.chunk, len(data)):
                return
        rows = min(self.chunk, len(data))
        self._due = max(0.0, self._due - rows)
        x, cond = data[:rows], None if cond is None else cond[:rows]
        shares = torch.tensor(list(self.starts.values()))
        kinds = torch.multinomial(shares, rows, replacement=True).to(data.device)
        for index, kind in enumerate(self.starts):
            mine = (kinds == index).nonzero().squeeze(-1)
            if len(mine):
                start = self._start(kind, student, x[mine], None if cond is None else cond[mine])
                self.pool.add(source, start, kind != "noise", None if cond is None else cond[mine])

    @torch.no_grad()
    def _start(self, kind: str, student: JointMap, x: Tensor, cond: Tensor | None) -> Tensor:
        if kind == "data":
            return x
        if kind == "perturbed":
            size = self.perturbation * torch.rand(len(x), dtype=x.dtype, device=x.device)
            return x + like(size, x) * torch.randn_like(x)
        noise = torch.randn_like(x)
        if kind == "noise":
            return noise
        steps = self.student_steps[int(torch.randint(len(self.student_steps), ()))]
        return sample(student, noise, steps, cond).state

    def state_dict(self) -> dict[str, Any]:
        return {"pool": self.pool.state_dict(), "due": self._due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pool.load_state_dict(state["pool"])
        self._due = float(state["due"])
