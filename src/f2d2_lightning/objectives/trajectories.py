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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Direction, Joint, JointMap
from f2d2_lightning.flows.paths import Path as ProbabilityPath
from f2d2_lightning.flows.paths import expand_time, like
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.sampling import normal_log_prob, sample
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives.base import Examples, Objective, Terms, Weighting, baseline_of, unit_baseline
from f2d2_lightning.objectives.integrator import integrate, trajectory_times
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import VelocitySource
from f2d2_lightning.objectives.trajectory_cache import TrajectoryCache

__all__ = ["TrajectoryPool", "TrajectoryRegression"]

STARTS = ("data", "perturbed", "mixed", "path", "noise", "student")


class TrajectoryPool:
    """A ring of integrated trajectories in a fixed amount of memory.

    A checkpoint holds only the starting points and seeds; loading one integrates them again, to the same numbers.

    Args:
        times: Ascending times from 0 to 1 at which states are kept.
        max_mib: Memory for states, in MiB; what fits is kept, per process.
        capacity: Most trajectories to keep, whatever the memory.
        baseline: Gaussian fit that the integrator uses, or ``None``.
        cache: Where integrated trajectories are kept for other runs, or ``None``.
    """

    def __init__(
        self,
        times: Sequence[float],
        max_mib: float = 256.0,
        capacity: int = 8192,
        baseline: GaussianBaseline | None = None,
        cache: TrajectoryCache | None = None,
    ) -> None:
        self.times = list(times)
        self.cache = cache
        self.baseline = baseline
        self.max_mib = max_mib
        self.max_capacity = capacity
        self._entries: list[dict[str, Any]] = []  # starting points, oldest first
        self._loaded: list[dict[str, Any]] = []  # from a checkpoint, to be integrated
        self._kept: Mapping[str, Any] | None = None  # likewise, trajectories
        self._states: Tensor | None = None
        self._change: Tensor | None = None
        self._cond: Tensor | None = None
        self._begun: Tensor | None = None  # node at which a trajectory begins
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

    def add(self, source: VelocitySource, x: Tensor, node: int, cond: Tensor | None = None) -> None:
        """Integrate from ``x`` at ``times[node]`` to both ends and keep the trajectories, the last that fit."""
        seed = int(torch.randint(2**62, ()))
        node = node % len(self.times)
        # more than the ring holds would write one place twice, in an order that threads decide
        fits = self.capacity_for(x)
        x, cond = x[-fits:], None if cond is None else cond[-fits:]
        self._add(source, {"x": x.detach().clone(), "node": node, "cond": cond, "seed": seed})

    def _add(self, source: VelocitySource, entry: dict[str, Any]) -> None:
        x, node, cond = entry["x"], entry["node"], entry["cond"]
        states, change = self._trajectories(source, entry)
        if self._states is None or self._change is None:
            capacity = self.capacity_for(x)
            self._states = states.new_zeros(capacity, *states.shape[1:])
            self._change = change.new_zeros(capacity, change.shape[1])
            self._cond = None if cond is None else cond.new_zeros(capacity, *cond.shape[1:])
            self._begun = torch.zeros(capacity, dtype=torch.long, device=states.device)
        size = len(self._states)
        rows = (self._next + torch.arange(len(x), device=x.device)) % size
        self._states[rows], self._change[rows] = states, change
        if self._begun is not None:
            self._begun[rows] = node
        if self._cond is not None:
            self._cond[rows] = cond
        self._next = (self._next + len(x)) % size
        self._count = min(self._count + len(x), size)
        self._entries.append(entry)
        # an entry whose rows are all written over is forgotten
        while sum(len(e["x"]) for e in self._entries[1:]) >= size:
            self._entries.pop(0)

    def _trajectories(self, source: VelocitySource, entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """States ``(B, len(times), ...)`` and changes of log-density ``(B, len(times))``, from the cache if there."""
        path = None if self.cache is None else self.cache.path(source, entry, self.times, self.baseline)
        if self.cache is not None and path is not None:
            kept = self.cache.read(path, entry["x"], len(self.times))
            if kept is not None:
                return kept
        states, change = self._integrate(source, entry["x"], entry["node"], entry["cond"], entry["seed"])
        if self.cache is not None and path is not None:
            self.cache.write(path, states, change)
        return states, change

    def _integrate(
        self, source: VelocitySource, x: Tensor, node: int, cond: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor]:
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            down, down_change = integrate(source, x, self.times[node::-1], cond, self.baseline)
            up, up_change = integrate(source, x, self.times[node:], cond, self.baseline)
        states = torch.cat((down.flip(1), up[:, 1:]), 1)
        change = torch.cat((down_change.flip(1), up_change[:, 1:]), 1)
        finite = bool(states.isfinite().all() and change.isfinite().all())
        if not finite:
            raise FloatingPointError(
                "a teacher trajectory became NaN or infinite; check the teacher (its own samples), or integrate with "
                "more nodes"
            )
        return states, change

    def restore(self, source: VelocitySource, device: torch.device | str | None = None) -> None:
        """Integrate, on ``device``, what a loaded checkpoint held; nothing to do otherwise."""
        loaded, self._loaded = self._loaded, []
        kept, self._kept = self._kept, None
        if kept is not None:
            self._take_over(kept, loaded, device)
        elif loaded:
            # the ring goes on writing where it was
            total = sum(len(e["x"]) for e in loaded)
            self._next = (self._next - total) % self.capacity_for(loaded[0]["x"])
            for entry in loaded:
                cond = None if entry["cond"] is None else entry["cond"].to(device)
                self._add(source, {**entry, "x": entry["x"].to(device), "cond": cond})

    def _take_over(self, kept: Mapping[str, Any], entries: list[dict[str, Any]], device: Any) -> None:
        capacity = self.capacity_for(entries[0]["x"])

        def padded(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            self._count = len(values)
            ring = values.new_zeros(capacity, *values.shape[1:], device=device)
            ring[: len(values)] = values.to(device)
            return ring

        self._states, self._change, self._cond = (padded(kept[name]) for name in ("states", "change", "cond"))
        self._begun = padded(kept.get("begun"))
        self._entries = entries

    def _rows(self, count: int, device: torch.device, from_data: Tensor | None) -> Tensor:
        """Random places in the ring; where ``from_data``, ``(count,)``, of trajectories that begin at data, if any."""
        rows = torch.randint(self._count, (count,), device=device)
        # without a wish nothing is looked at: on a GPU a look waits for it
        if from_data is None or self._begun is None or not bool(from_data.any()):
            return rows
        begun = (self._begun[: self._count] == len(self.times) - 1).nonzero().squeeze(-1)
        if len(begun) == 0:
            return rows
        return torch.where(from_data, begun[torch.randint(len(begun), rows.shape, device=device)], rows)

    def draw_whole(
        self, count: int, times: Sequence[float], from_data: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random trajectories at given kept times.

        Args:
            count: How many.
            times: The times, each a kept one.
            from_data: Only trajectories that begin at data, if there are any.

        Returns:
            States ``(count, len(times), ...)``, change of log-density since the first time ``(count, len(times))``,
            and conditioning.
        """
        assert self._states is not None
        assert self._change is not None
        device = self._states.device
        wish = torch.ones(count, dtype=torch.bool, device=device) if from_data else None
        rows = self._rows(count, device, wish)
        kept = torch.tensor(self.times, dtype=self._states.dtype, device=self._states.device)
        columns = _nearest(kept, torch.tensor(times, dtype=kept.dtype, device=kept.device))
        states, change = self._states[rows][:, columns], self._change[rows][:, columns]
        return states, change - change[:, :1], None if self._cond is None else self._cond[rows]

    def draw(self, s: Tensor, t: Tensor, likelihood_of_data: bool = False) -> Examples:
        """Random trajectories at the kept times nearest to ``s`` and ``t``, ``(B,)`` each.

        Args:
            s: Starts.
            t: Ends.
            likelihood_of_data: Take intervals towards noise from trajectories that begin at data, if there are any.

        Returns:
            States at ``s``, the kept times, and the pair that leads to ``t``. The order of ``s`` and ``t`` is kept.
        """
        assert self._states is not None
        assert self._change is not None
        kept = torch.tensor(self.times, dtype=self._states.dtype, device=self._states.device)
        i, j = _nearest(kept, s.to(kept)), _nearest(kept, t.to(kept))
        # where both fall on one kept time, they are set one apart in the order that was asked for
        last, same, up = len(kept) - 1, i == j, t.to(kept) >= s.to(kept)
        low = torch.where(up, i, i - 1).clamp(0, last - 1)
        i = torch.where(same, torch.where(up, low, low + 1), i)
        j = torch.where(same, torch.where(up, low + 1, low), j)
        rows = self._rows(len(i), kept.device, i > j if likelihood_of_data else None)
        s, t = kept[i], kept[j]
        x = self._states[rows, i]
        u = (self._states[rows, j] - x) / like(t - s, x)
        divergence = -(self._change[rows, j] - self._change[rows, i]) / (t - s)
        return Examples(x, s, t, None if self._cond is None else self._cond[rows], Joint(u, divergence))

    def state_dict(self, whole: bool = False) -> dict[str, Any]:
        """Starting points and seeds, on the CPU; with ``whole`` also the trajectories, for a source that changes."""
        entries = [
            {**e, "x": e["x"].cpu(), "cond": None if e["cond"] is None else e["cond"].cpu()}
            for e in (*self._entries, *self._loaded)
        ]
        state = {"entries": entries, "next": self._next}
        if self._kept is not None:
            state["kept"] = self._kept
        elif whole and self._states is not None and self._change is not None:
            kept = {"states": self._states, "change": self._change, "cond": self._cond, "begun": self._begun}
            state["kept"] = {name: None if v is None else v[: self._count].cpu() for name, v in kept.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over starting points; they are integrated by :meth:`restore`."""
        self._loaded = list(state["entries"])
        self._kept = state.get("kept")
        self._states = self._change = self._cond = self._begun = None
        self._entries, self._count, self._next = [], 0, int(state["next"])


def _mix_neighbors(x: Tensor, neighbors: int = 5) -> Tensor:
    """Points between each sample and one of its nearest neighbours, shape of ``x``.

    Chawla et al., "SMOTE: Synthetic Minority Over-sampling Technique", 2002, https://doi.org/10.1613/jair.953
    """
    if len(x) < 2:
        return x
    flat = x.flatten(1)
    distance = torch.cdist(flat, flat)
    distance.fill_diagonal_(math.inf)
    nearest = distance.topk(min(neighbors, len(x) - 1), largest=False).indices
    other = x[nearest.gather(1, torch.randint(nearest.shape[1], (len(x), 1), device=x.device)).squeeze(1)]
    share = like(torch.rand(len(x), dtype=x.dtype, device=x.device), x)
    return (1 - share) * x + share * other


def _nearest(kept: Tensor, t: Tensor) -> Tensor:
    upper = torch.searchsorted(kept, t.contiguous()).clamp(1, len(kept) - 1)
    lower = upper - 1
    return torch.where(t - kept[lower] < kept[upper] - t, lower, upper)


class TrajectoryRegression(Objective):
    """Regress ``(u, D)`` on pairs of points of the teacher's trajectories.

    Towards the end of training, ``unroll``, every other step regresses the student's whole K-step path from data
    instead, through all its jumps, on the teacher's states and log-likelihood: what drifts over several steps is seen
    and corrected there. The student's Gaussian baseline, if it has one, makes integration and weighting sharper.

    Args:
        nodes: Steps per trajectory, about, one teacher evaluation each; the likelihood grids' times are always among
            them.
        capacity: Most trajectories kept, per process.
        max_mib: Memory for them, in MiB, per process; the smaller of the two limits holds.
        refresh: New trajectories per training step once the pool is full, on average.
        chunk: Trajectories integrated at a time.
        starts: Shares of where trajectories begin: ``"data"`` (the batch), ``"perturbed"`` (the batch plus noise),
            ``"mixed"`` (between a sample and one of its nearest neighbours in the batch: new samples that look like
            data, as test samples do), ``"path"`` (between noise and data, integrated both ways), ``"noise"`` (the
            prior) and ``"student"`` (samples of the student: where its own path leads). Half data and half noise by
            default; where data are few, a thousand images or so, ``"perturbed"`` in place of ``"data"`` keeps the
            student from learning them by heart (docs/CALIBRATION.md).
        perturbation: Smallest and largest standard deviation of the noise for ``"perturbed"``.
        quantization: Levels of discrete data: perturbed and mixed states are put back on levels and dequantized
            afresh, so that they look like data. ``None`` for continuous data; module and callback then give theirs.
        unroll: Last share of training in which whole paths are regressed, in [0, 1]; 0 for none.
        intervals: Distribution of ``(s, t)``; its diagonal share is regressed on the source at the batch's own
            noised states, its grids are those that are unrolled.
        weighting: How errors become a loss.
        path: Probability path.
        near_data: Share of the nodes close to the data, evenly spread in ``log(1 - t)``. Images with point masses
            (black background) need about half: without, targets are off by tenths of a bit per dimension.
        recompute: Forget what a jump of a whole path computed inside and compute it again in the backward pass. A path
            of eight jumps then needs no more memory than an ordinary step, in place of four times as much, for a third
            more time where whole paths are regressed. Losses and gradients are the same.
        likelihood_of_data: Learn the way to noise, and with it the likelihood of data, from trajectories that begin at
            data alone; those that begin at noise then teach the way to data. A teacher's samples are more likely under
            it than data are, and a student that cannot tell the two apart is off by half of that on either.
        cache: Folder where integrated trajectories are kept for other runs: one that resumes, or another student of
            the same teacher and data, then reads what it would have integrated (:class:`TrajectoryCache`). ``None``
            keeps nothing.

    Raises:
        ValueError: If a number is out of range or a start is unknown.
    """

    def __init__(
        self,
        nodes: int = 16,
        capacity: int = 12_000,
        max_mib: float = 1024.0,
        refresh: float = 0.0,
        chunk: int = 512,
        starts: Mapping[str, float] | None = None,
        perturbation: tuple[float, float] = (0.02, 0.3),
        quantization: Quantization | None = None,
        unroll: float = 0.25,
        intervals: Intervals | None = None,
        weighting: Weighting | None = None,
        path: ProbabilityPath | None = None,
        near_data: float = 0.0,
        recompute: bool = True,
        likelihood_of_data: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(intervals, weighting, path)
        starts = dict(starts or {"data": 0.5, "noise": 0.5})
        unknown = set(starts) - set(STARTS)
        if unknown or not starts or min(starts.values()) < 0 or sum(starts.values()) <= 0:
            raise ValueError(f"starts is {starts}; it maps some of {', '.join(STARTS)} to shares that are not negative")
        if nodes < 1 or capacity < 1 or chunk < 1 or refresh < 0:
            raise ValueError(
                f"nodes={nodes}, capacity={capacity} and chunk={chunk} are at least 1, refresh={refresh} at least 0"
            )
        if not 0 < perturbation[0] <= perturbation[1]:
            raise ValueError(f"perturbation is {perturbation}; two positive numbers, the smaller first")
        if not 0 <= unroll <= 1 or not 0 <= near_data < 1:
            raise ValueError(
                f"unroll is {unroll}, a share of training in [0, 1], and near_data {near_data}, a share of the nodes "
                "in [0, 1)"
            )
        self.near_data = near_data
        self.recompute = recompute
        self.likelihood_of_data = likelihood_of_data
        self.cache = None if cache is None else TrajectoryCache(cache)
        self.nodes, self.capacity, self.max_mib = nodes, capacity, max_mib
        self.refresh, self.chunk = refresh, chunk
        self.starts = starts
        self.perturbation = tuple(perturbation)
        self.quantization = quantization
        self.unroll = unroll
        self._pool: TrajectoryPool | None = None
        self._saved_pool: Mapping[str, Any] | None = None
        self._due = 0.0
        self._stationary = True

    def pool(self, student: JointMap) -> TrajectoryPool:
        """The pool, made on first use: its times depend on the student's baseline."""
        if self._pool is None:
            baseline = baseline_of(student)
            if baseline is not None and not bool(baseline.fitted):
                baseline = None
            grids = self.intervals.steps if self.intervals.grid > 0 or self.unroll > 0 else ()
            times = trajectory_times(self.nodes, grids, baseline, self.near_data)
            self._pool = TrajectoryPool(times, self.max_mib, self.capacity, baseline, self.cache)
            if self._saved_pool is not None:
                self._pool.load_state_dict(self._saved_pool)
                self._saved_pool = None
        return self._pool

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
        baseline = baseline_of(student)
        answers = []
        for row in range(len(x)):
            a, b = float(s[row]), float(t[row])
            one = None if cond is None else cond[row : row + 1]
            if a == b:
                answers.append(source(x[row : row + 1], a, one))
                continue
            times = [a + (b - a) * k / self.nodes for k in range(self.nodes + 1)]
            states, change = integrate(source, x[row : row + 1], times, one, baseline)
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
        progress: float = 0.0,
    ) -> Terms:
        if not source.anywhere:
            raise ValueError(
                f"trajectories need a velocity everywhere, and {type(source).__name__} answers on the data pair's "
                "path only; use a teacher or the student's own diagonal"
            )
        self._refill(student, source, data, cond)
        if progress >= 1 - self.unroll and self.unroll > 0 and bool(torch.rand((), generator=self.structure) < 0.5):
            return self._unrolled(student, max(1, len(data) // 2))
        return super().__call__(student, source, data, cond, anchor=anchor, progress=progress)

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
        return self.pool(student).draw(s, t, self.likelihood_of_data)

    def _unrolled(self, student: JointMap, count: int) -> Terms:
        """Error of a whole K-step path, in natural units, for a random K."""
        k = self._pick(self.intervals.steps)
        to_noise = Direction.TO_NOISE in self.directions
        grid = time_grid(k, to_noise)
        from_data = to_noise and self.likelihood_of_data
        states, change, cond = self.pool(student).draw_whole(count, grid, from_data)
        x, log_change = states[:, 0], states.new_zeros(count)
        baseline = baseline_of(student) or unit_baseline(x)
        position_error, velocity_error = states.new_zeros(count), states.new_zeros(count)
        for step, (s, t) in enumerate(itertools.pairwise(grid), start=1):
            if self.recompute and k > 1:
                x, delta = checkpoint(student.jump, x, s, t, cond, use_reentrant=False)
            else:
                x, delta = student.jump(x, s, t, cond)
            log_change = log_change + delta
            error = x - states[:, step]
            position_error = position_error + baseline.deviations(error, expand_time(t, x)).square().sum(-1) / k
            velocity_error = velocity_error + (error.detach() / (t - s)).flatten(1).square().mean(-1) / k
        difference = log_change - change[:, -1]
        if to_noise:
            # the whole error of the log-likelihood, the prior's share included
            difference = difference + normal_log_prob(states[:, -1]) - normal_log_prob(x)
        velocity_loss = position_error.mean()
        divergence_loss = self.weighting.divergence * difference.square().mean()
        return Terms(
            velocity_loss + divergence_loss,
            velocity_loss,
            divergence_loss,
            velocity_error.mean(),
            difference.detach().square().mean(),
        )

    def _refill(self, student: JointMap, source: VelocitySource, data: Tensor, cond: Tensor | None) -> None:
        self._stationary = source.stationary
        pool = self.pool(student)
        pool.restore(source, data.device)
        rows = min(self.chunk, len(data), pool.capacity_for(data))
        x, cond = data[:rows], None if cond is None else cond[:rows]
        if not pool.full:
            self._integrate_chunk(student, source, x, cond, pool)
            return
        self._due += self.refresh
        while self._due >= rows:
            self._due -= rows
            self._integrate_chunk(student, source, x, cond, pool)

    def _integrate_chunk(
        self, student: JointMap, source: VelocitySource, x: Tensor, cond: Tensor | None, pool: TrajectoryPool
    ) -> None:
        shares = torch.tensor([float(share) for share in self.starts.values()])
        kinds = torch.multinomial(shares, len(x), replacement=True, generator=self.structure).to(x.device)
        # starts at the same time are integrated together
        groups: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        for index, kind in enumerate(self.starts):
            mine = (kinds == index).nonzero().squeeze(-1)
            if len(mine):
                cond_mine = None if cond is None else cond[mine]
                start, node = self._start(kind, student, x[mine], cond_mine, pool)
                groups.setdefault(node, []).append((start, cond_mine))
        for node, parts in groups.items():
            conds = [c for _, c in parts if c is not None]
            pool.add(source, torch.cat([start for start, _ in parts]), node, torch.cat(conds) if conds else None)

    @torch.no_grad()
    def _start(
        self, kind: str, student: JointMap, x: Tensor, cond: Tensor | None, pool: TrajectoryPool
    ) -> tuple[Tensor, int]:
        """States to start from, and the node at which."""
        last = len(pool.times) - 1
        if kind == "data":
            return x, last
        if kind == "perturbed":
            low, high = (math.log(value) for value in self.perturbation)
            size = (low + (high - low) * torch.rand(len(x), dtype=x.dtype, device=x.device)).exp()
            return self._on_levels(x + like(size, x) * torch.randn_like(x)), last
        if kind == "mixed":
            return self._on_levels(_mix_neighbors(x)), last
        noise = torch.randn_like(x)
        if kind == "path" and last > 1:
            node = self._pick(range(1, last))
            return self.path.sample(x, noise, expand_time(pool.times[node], x)), node
        if kind == "student":
            steps = self._pick(self.intervals.steps)
            return sample(student, noise, steps, cond).state, last
        return noise, 0

    def _pick(self, choices: Sequence[int]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.structure))]

    def _on_levels(self, x: Tensor) -> Tensor:
        if self.quantization is None:
            return x
        return self.quantization.dequantize(self.quantization.quantize(x)).to(x.dtype)

    def state_dict(self) -> dict[str, Any]:
        pool = self._saved_pool if self._pool is None else self._pool.state_dict(whole=not self._stationary)
        return {"pool": pool, "due": self._due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pool, self._saved_pool = None, state["pool"]
        self._due = float(state["due"])
