"""Integrated trajectories in memory, drawn from again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.maps import Joint
from f2d2_lightning.flows.paths import like
from f2d2_lightning.objectives._ring import Ring
from f2d2_lightning.objectives.base import Examples
from f2d2_lightning.objectives.integrator import integrate_both_ways
from f2d2_lightning.objectives.sources import VelocitySource
from f2d2_lightning.objectives.trajectory_cache import TrajectoryCache
from f2d2_lightning.utils.conditions import Cond, moved, some_of
from f2d2_lightning.utils.progress import tell


class Trajectories(NamedTuple):
    """Trajectories at some times, in the order that was asked for."""

    states: Tensor
    """``(B, times, ...)``"""
    change: Tensor
    """Of the log-density since the first time, ``(B, times)``, nats."""
    cond: Cond | None
    """Conditioning."""


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
        self.busy = None if baseline is None else busy_times(baseline)
        """Times between which equal shares of what happens lie, ``(N,)``; ``None`` without a fit."""
        self.ring: Ring | None = None
        """States ``(capacity, times, ...)``, ``change`` of log-density, ``cond``, and ``begun``, the starts' nodes."""
        self._entries: list[dict[str, Any]] = []  # starting points, oldest first
        self._loaded: Mapping[str, Any] | None = None  # from a checkpoint, to be restored

    def __len__(self) -> int:
        return 0 if self.ring is None else self.ring.count

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
        return self.ring is not None and self.ring.full

    def add(self, source: VelocitySource, x: Tensor, node: int, cond: Cond | None = None) -> None:
        """Integrate from ``x`` at ``times[node]`` to both ends and keep the trajectories, the last that fit."""
        seed, fits = int(torch.randint(2**62, ())), self.capacity_for(x)
        # what would be written over at once is not integrated
        x, cond = x[-fits:], some_of(cond, slice(-fits, None))
        self._add(source, {"x": x.detach().clone(), "node": node % len(self.times), "cond": cond, "seed": seed})

    def _add(self, source: VelocitySource, entry: dict[str, Any]) -> None:
        x = entry["x"]
        states, change = self._trajectories(source, entry)
        self.ring = self.ring or Ring(self.capacity_for(x))
        begun = torch.full((len(x),), entry["node"], device=x.device)
        self.ring.add(states=states, change=change, cond=entry["cond"], begun=begun)
        self._entries.append(entry)
        # an entry whose rows are all written over is forgotten
        while sum(len(e["x"]) for e in self._entries[1:]) >= self.ring.capacity:
            self._entries.pop(0)

    def _trajectories(self, source: VelocitySource, entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """States ``(B, len(times), ...)`` and changes of log-density ``(B, len(times))``, from the cache if there."""
        if self.cache is None:
            return integrate_both_ways(source, self.times, self.baseline, **entry)
        path = self.cache.path(source, entry, self.times, self.baseline)
        kept = self.cache.read(path, entry["x"], len(self.times))
        if kept is None:
            kept = integrate_both_ways(source, self.times, self.baseline, **entry)
            self.cache.write(path, *kept)
        return kept

    def restore(self, source: VelocitySource, device: torch.device | str | None = None) -> None:
        """Integrate, on ``device``, what a loaded checkpoint held; nothing to do otherwise."""
        loaded, self._loaded = self._loaded, None
        entries = [] if loaded is None else list(loaded["entries"])
        if loaded is None or not entries:
            return
        self.ring = Ring(self.capacity_for(entries[0]["x"]))
        self.ring.next = int(loaded["next"])
        if "kept" in loaded:
            self.ring.load_state_dict(loaded["kept"])
            self.ring.to(device)
            self._entries = entries
            return
        # the ring goes on writing where it was
        self.ring.next = (self.ring.next - sum(len(e["x"]) for e in entries)) % self.ring.capacity
        for number, entry in enumerate(entries, start=1):
            cond = moved(entry["cond"], device)
            self._add(source, {**entry, "x": entry["x"].to(device), "cond": cond})
            tell("trajectories, again", number, len(entries))

    def _held(self) -> tuple[Tensor, Tensor, Tensor, Cond | None]:
        """The kept times, and the ring's states, changes and conditioning."""
        assert self.ring is not None
        states = self.ring["states"]
        kept = torch.tensor(self.times, dtype=states.dtype, device=states.device)
        return kept, states, self.ring["change"], self.ring.get("cond")

    def _rows(self, count: int, device: torch.device, from_data: Tensor | None) -> Tensor:
        """Random places in the ring; where ``from_data``, ``(count,)``, of trajectories that begin at data, if any."""
        assert self.ring is not None
        rows = torch.randint(self.ring.count, (count,), device=device)
        begun = self.ring.get("begun")
        # without a wish nothing is looked at: on a GPU a look waits for it
        if from_data is None or begun is None or not bool(from_data.any()):
            return rows
        begun = (begun[: self.ring.count] == len(self.times) - 1).nonzero().squeeze(-1)
        if len(begun) == 0:
            return rows
        return torch.where(from_data, begun[torch.randint(len(begun), rows.shape, device=device)], rows)

    def draw_whole(self, count: int, times: Sequence[float], from_data: bool = False) -> Trajectories:
        """Random trajectories at given kept times; with ``from_data`` such as begin at data, if there are any."""
        kept, states, change, cond = self._held()
        wish = torch.ones(count, dtype=torch.bool, device=kept.device) if from_data else None
        rows = self._rows(count, kept.device, wish)
        columns = _nearest(kept, torch.tensor(times, dtype=kept.dtype, device=kept.device))
        states, change = states[rows][:, columns], change[rows][:, columns]
        return Trajectories(states, change - change[:, :1], some_of(cond, rows))

    def draw(self, s: Tensor, t: Tensor, likelihood_of_data: bool = False) -> Examples:
        """Random trajectories at the kept times nearest to ``s`` and ``t``, ``(B,)`` each.

        Args:
            s: Starts.
            t: Ends.
            likelihood_of_data: Take intervals towards noise from trajectories that begin at data, if there are any.

        Returns:
            States at ``s``, the kept times, and the pair that leads to ``t``. The order of ``s`` and ``t`` is kept.
        """
        kept, states, change, cond = self._held()
        i, j = _nearest(kept, s.to(kept)), _nearest(kept, t.to(kept))
        # where both fall on one kept time, they are set one apart in the order that was asked for
        last, same, up = len(kept) - 1, i == j, t.to(kept) >= s.to(kept)
        low = torch.where(up, i, i - 1).clamp(0, last - 1)
        i = torch.where(same, torch.where(up, low, low + 1), i)
        j = torch.where(same, torch.where(up, low + 1, low), j)
        rows = self._rows(len(i), kept.device, i > j if likelihood_of_data else None)
        s, t = kept[i], kept[j]
        x = states[rows, i]
        u = (states[rows, j] - x) / like(t - s, x)
        divergence = -(change[rows, j] - change[rows, i]) / (t - s)
        return Examples(x, s, t, some_of(cond, rows), Joint(u, divergence))

    def state_dict(self, whole: bool = False) -> Mapping[str, Any]:
        """Starting points and seeds, on the CPU; with ``whole`` also the trajectories, for a source that changes."""
        if self._loaded is not None:
            return self._loaded
        entries = [{**e, "x": e["x"].cpu(), "cond": moved(e["cond"], "cpu")} for e in self._entries]
        state: dict[str, Any] = {"entries": entries, "next": 0 if self.ring is None else self.ring.next}
        if whole and self.ring is not None:
            state["kept"] = self.ring.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over starting points; they are integrated by :meth:`restore`."""
        self.ring, self._entries, self._loaded = None, [], state


def busy_times(baseline: GaussianBaseline) -> Tensor:
    """Times between which equal shares of the fit's clock lie, mixed with as many even ones, ``(1024,)``.

    Of images, most of what a likelihood depends on happens in the last step to data.
    """
    count = 1024
    return baseline.times_at((torch.arange(count, device=baseline.mean.device) + 0.5) / count, 0.5)


def _nearest(kept: Tensor, t: Tensor) -> Tensor:
    upper = torch.searchsorted(kept, t.contiguous()).clamp(1, len(kept) - 1)
    lower = upper - 1
    return torch.where(t - kept[lower] < kept[upper] - t, lower, upper)
