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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from f2d2_lightning.flows.gaussian import GaussianBaseline, baseline_of
from f2d2_lightning.flows.maps import Direction, JointMap
from f2d2_lightning.flows.paths import Path as ProbabilityPath
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives._pool import TrajectoryPool
from f2d2_lightning.objectives._starts import Starts
from f2d2_lightning.objectives.base import Batch, Objective, Terms, Weighting, unit_baseline
from f2d2_lightning.objectives.integrator import trajectory_times
from f2d2_lightning.objectives.intervals import Intervals, pick
from f2d2_lightning.objectives.targets import TargetChoice
from f2d2_lightning.objectives.trajectory_cache import TrajectoryCache
from f2d2_lightning.utils.checks import at_least, checked, share
from f2d2_lightning.utils.conditions import Cond, mapped, moved, some_of
from f2d2_lightning.utils.progress import tell

NODES, CAPACITY = 16, 12_000
"""Where nothing is said or measured."""


class TrajectoryRegression(Objective):
    """Regress ``(u, D)`` on pairs of points of the teacher's trajectories.

    Towards the end of training, ``unroll``, every other step regresses the student's whole K-step path from data
    instead, through all its jumps, on the teacher's states and log-likelihood: what drifts over several steps is seen
    and corrected there. The student's Gaussian baseline, if it has one, makes integration and weighting sharper.

    Args:
        nodes: Steps per trajectory, about, one teacher evaluation each; the likelihood grids' times are always among
            them. ``None`` takes what module and callback measure on the data before the first step
            (:func:`~f2d2_lightning.objectives.targets.choose_targets`), 16 where nothing is measured.
        capacity: Most trajectories kept, per process. ``None`` goes with ``nodes``: as many as take no longer to
            integrate than training takes, but 12,000 where these take at most three times as long.
        max_mib: Memory for them, in MiB, per process; the smaller of the two limits holds.
        refresh: New trajectories per training step once the pool is full, on average.
        chunk: Trajectories integrated at a time, begun at the data of as many batches as that takes.
        starts: Shares of where trajectories begin: ``"data"`` (the batch), ``"perturbed"`` (the batch plus noise),
            ``"mixed"`` (between a sample and one of its nearest neighbours in the batch: new samples that look like
            data, as test samples do), ``"path"`` (between noise and data, integrated both ways), ``"noise"`` (the
            prior), ``"wide"`` (noise up to twice as wide: it leads to states that are less likely than any sample of
            the teacher, as points are that it has not seen) and ``"student"`` (samples of the student: where its own
            path leads). Half data and half noise by default; where data are few, the student would learn them by
            heart, and ``"wide"`` alone is taken where ``nodes`` are measured and the training data are fewer than
            ``capacity``, or 12,000.
        perturbation: Smallest and largest standard deviation of the noise for ``"perturbed"``.
        quantization: Levels of discrete data: perturbed and mixed states are put back on levels and dequantized
            afresh, so that they look like data. ``None`` for continuous data; module and callback then give theirs.
        unroll: Last share of training in which whole paths are regressed, in [0, 1]; 0 for none.
        intervals: Distribution of ``(s, t)``; its diagonal share is regressed on the source at the batch's own
            noised states, its grids are those that are unrolled. Of their steps half are drawn by the clock of the
            student's Gaussian fit, if it has one: of images most happens in the last step to data.
        weighting: How errors become a loss; by default adaptive at .5, as a teacher's targets hardly scatter, and
            with a weight of the divergence by dimension.
        path: Probability path.
        near_data: Share of the nodes close to the data, evenly spread in ``log(1 - t)``. Images with point masses
            (black background) need about half: without, targets are off by tenths of a bit per dimension. ``None``
            goes with ``nodes``: measured, or 0.
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

    >>> objective = TrajectoryRegression(nodes=16, intervals=Intervals("to_data"))
    >>> objective.directions.label
    'to_data'
    """

    @checked
    def __init__(
        self,
        nodes: int | None = None,
        capacity: int | None = None,
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
        near_data: float | None = None,
        recompute: bool = True,
        likelihood_of_data: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(intervals, weighting or Weighting(None, adaptive=0.5), path)
        at_least(1, nodes=NODES if nodes is None else nodes, capacity=CAPACITY if capacity is None else capacity)
        at_least(1, chunk=chunk)
        at_least(0, refresh=refresh)
        share(unroll=unroll)
        if near_data is not None and not 0 <= near_data < 1:
            raise ValueError(f"near_data={near_data}; it is a share of the nodes, in [0, 1)")
        self.nodes, self.capacity, self.max_mib = nodes, capacity, max_mib
        self.refresh, self.chunk, self.near_data = refresh, chunk, near_data
        self.unroll, self.recompute, self.likelihood_of_data = unroll, recompute, likelihood_of_data
        self.quantization = quantization
        self.starts, self.perturbation = dict(starts or {}), perturbation
        self._starts_given = bool(starts)
        self.cache = None if cache is None else TrajectoryCache(cache)
        self.forget()
        self._starts()  # refuses what cannot be

    def forget(self) -> None:
        self._pool: TrajectoryPool | None = None
        self._saved_pool: Mapping[str, Any] | None = None
        self._due = 0.0
        self._recent: tuple[Tensor, Cond | None] | None = None  # data to begin at, of several batches
        self._stationary = True
        if not self._starts_given:
            self.starts = {"data": 0.5, "noise": 0.5}
        self.choice: TargetChoice | None = None
        """Nodes and their placing, where they were measured, and what was measured."""

    @property
    def grids(self) -> tuple[int, ...]:
        """Step counts whose times are among the nodes."""
        return self.intervals.steps if self.intervals.grid > 0 or self.unroll > 0 else ()

    def begin_around_few(self) -> None:
        """Begin trajectories where points like few data would lead to, unless it was said where they begin."""
        if not self._starts_given:
            self.starts = {"wide": 1.0}

    def _starts(self) -> Starts:
        steps, quantization = self.intervals.steps, self.quantization
        return Starts(self.starts, self.perturbation, steps, self.path, quantization, self.structure)

    @property
    def placing(self) -> tuple[int, float]:
        """Nodes, and the share of them near the data: as given, else as measured."""
        nodes, near_data = (NODES, 0.0) if self.choice is None else (self.choice.nodes, self.choice.near_data)
        return nodes if self.nodes is None else self.nodes, near_data if self.near_data is None else self.near_data

    @property
    def kept(self) -> int:
        """Most trajectories kept: as given, else as measured."""
        return self.capacity or (None if self.choice is None else self.choice.trajectories) or CAPACITY

    def times(self, student: JointMap) -> tuple[list[float], GaussianBaseline | None]:
        """Times at which trajectories are kept, ascending, and the Gaussian fit that they are integrated with."""
        baseline = baseline_of(student)
        if baseline is not None and not bool(baseline.fitted):
            baseline = None
        nodes, near_data = self.placing
        return trajectory_times(nodes, self.grids, baseline, near_data), baseline

    def pool(self, student: JointMap) -> TrajectoryPool:
        """The pool, made on first use: its times depend on the student's baseline."""
        if self._pool is None:
            times, baseline = self.times(student)
            self._pool = TrajectoryPool(times, self.max_mib, self.kept, baseline, self.cache)
            if self._saved_pool is not None:
                self._pool.load_state_dict(self._saved_pool)
                self._saved_pool = None
        return self._pool

    def loss(self, student: JointMap, batch: Batch) -> Terms:
        source = batch.source
        if not source.anywhere:
            raise ValueError(
                f"trajectories need a velocity everywhere, and {type(source).__name__} answers on the data pair's "
                "path only; use a teacher or the student's own diagonal"
            )
        self._refill(student, batch)
        late = batch.progress >= 1 - self.unroll and self.unroll > 0
        if late and bool(torch.rand((), generator=self.structure) < 0.5):
            return self.whole_paths(student, max(1, len(batch.data) // 2), pick(self.intervals.steps, self.structure))
        pool = self.pool(student)
        return self.regress(student, batch, lambda point, t: pool.draw(point.t, t, self.likelihood_of_data), pool.busy)

    def on_diagonal(self, count: int) -> int:
        # all or none: a teacher answers for a few states in much the time that it takes for a batch
        return count * self.intervals.on_diagonal(1, self.structure)

    def whole_paths(self, student: JointMap, count: int, steps: int) -> Terms:
        """Error of the student's path through all its jumps in a number of steps, on ``count`` trajectories.

        In natural units, whatever the weighting's.
        """
        to_noise = Direction.TO_NOISE in self.directions
        grid = time_grid(steps, to_noise)
        teacher = self.pool(student).draw_whole(count, grid, to_noise and self.likelihood_of_data)
        states = teacher.states
        x, log_change = states[:, 0], states.new_zeros(len(states))
        baseline = baseline_of(student) or unit_baseline(x)
        position_error, velocity_error = states.new_zeros(len(states)), states.new_zeros(len(states))
        for step, (s, t) in enumerate(itertools.pairwise(grid), start=1):
            if self.recompute and steps > 1:
                x, delta = checkpoint(student.jump, x, s, t, teacher.cond, use_reentrant=False)
            else:
                x, delta = student.jump(x, s, t, teacher.cond)
            log_change = log_change + delta
            error = x - states[:, step]
            position_error = position_error + baseline.deviations(error, expand_time(t, x)).square().sum(-1) / steps
            velocity_error = velocity_error + (error.detach() / (t - s)).flatten(1).square().mean(-1) / steps
        difference = log_change - teacher.change[:, -1]
        if to_noise:
            # the whole error of the log-likelihood, the prior's share included
            difference = difference + normal_log_prob(states[:, -1]) - normal_log_prob(x)
        weight = self.weighting.of_divergence(x[0].numel())
        return self.weighting.terms(position_error, weight * difference.square(), velocity_error, difference)

    def _refill(self, student: JointMap, batch: Batch) -> None:
        """Integrate what is due."""
        source, data, cond = batch.source, batch.data, batch.cond
        self._stationary = source.stationary
        pool = self.pool(student)
        pool.restore(source, data.device)
        if pool.full and not self.refresh:
            return
        self._due += self.refresh if pool.full else min(self.chunk, len(data))
        if self._recent is not None:
            before, labels = self._recent
            data = _after(before, data)
            cond = None if cond is None or labels is None else mapped(_after, labels, cond)
        rows = min(self.chunk, len(data), pool.capacity_for(data))
        self._recent = x, cond = data[-rows:], some_of(cond, slice(-rows, None))
        while self._due >= rows:
            self._due -= rows
            for node, (start, labels) in self._starts().draw(student, x, cond, pool.times).items():
                pool.add(source, start, node, labels)
            if not self.refresh:
                tell("trajectories", len(pool), pool.capacity_for(data))
        if pool.full and not self.refresh:
            self._recent = None

    def state_dict(self) -> dict[str, Any]:
        pool = self._saved_pool if self._pool is None else self._pool.state_dict(whole=not self._stationary)
        chosen = None if self.choice is None else asdict(self.choice)
        recent = None if self._recent is None else moved(self._recent, "cpu")
        return {"pool": pool, "due": self._due, "recent": recent, "targets": chosen, "starts": self.starts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pool, self._saved_pool = None, state["pool"]
        self._due, self._recent = float(state["due"]), state.get("recent")
        kept = state.get("targets")  # a run of version 0.1 measured nothing
        self.choice = None if kept is None else TargetChoice(**kept)
        if not self._starts_given:
            self.starts = dict(state.get("starts", self.starts))


def _after(before: Tensor, more: Tensor) -> Tensor:
    return torch.cat((before.to(more), more))
