"""Which pairs of times ``(s, t)`` an objective trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.utils.checks import at_least, checked, share
from f2d2_lightning.utils.text import briefly


def pick(choices: Sequence[int], structure: torch.Generator | None = None) -> int:
    """One of some numbers at random; ``structure`` as in :meth:`Intervals.on_diagonal`."""
    return choices[int(torch.randint(len(choices), (), generator=structure, device="cpu"))]


class Intervals:
    """Distribution of training intervals: diagonal, the likelihood grid's own, and uniform.

    Args:
        directions: Orders of time to draw. By default those of the map that is trained (:meth:`follow`), and both until
            it is known; ``"to_data"`` is what the official recipe does.
        diagonal: Share of intervals with ``s = t``.
        grid: Share of intervals that are a step of a uniform K-step grid, K drawn from ``steps``. More of them makes
            likelihoods little better and samples worse (docs/CALIBRATION.md).
        to_noise: Share of the grid's intervals that go to noise, as likelihoods do; the others go to data, as samples
            do. Without effect where only one direction is trained.
        steps: The K of those grids: the step counts that likelihoods and samples will be asked for.
        length: Shortest of the other, uniform intervals.

    Raises:
        ValueError: If shares are not probabilities that sum to at most one, or a step count is below one.

    >>> s, t = Intervals("to_data", steps=(1, 4)).sample(100)
    >>> bool((s <= t).all())
    True
    """

    @checked
    def __init__(
        self,
        directions: Direction | str | None = None,
        diagonal: float = 0.1,
        grid: float = 0.3,
        steps: Sequence[int] = (1, 2, 4, 8),
        length: float = 0.0,
        to_noise: float = 0.5,
    ) -> None:
        share(to_noise=to_noise, diagonal=diagonal, grid=grid, **{"diagonal + grid": diagonal + grid})
        if grid > 0:
            at_least(1, **{"the least of steps": min(steps, default=0)})
        if not 0 <= length < 1:
            raise ValueError(f"length is {length}; it lies in [0, 1)")
        self.directions, self._follows = Direction.parse(directions or Direction.BOTH), directions is None
        self.diagonal = diagonal
        self.grid = grid
        self.steps = tuple(steps)
        self.length = length
        self.to_noise = to_noise

    def __repr__(self) -> str:
        return briefly(self)

    def follow(self, directions: Direction) -> None:
        """Take the directions that a map declares, unless some were given."""
        if self._follows:
            self.directions = directions

    def on_diagonal(self, count: int, structure: torch.Generator | None = None) -> int:
        """How many of ``count`` intervals have no length: their share, rounded up or down at random.

        A network that is asked for any number of states is planned, or compiled, anew for each.

        Args:
            count: Number of intervals.
            structure: CPU generator that decides; the global one by default.
        """
        return math.ceil(self.diagonal * count - float(torch.rand((), generator=structure, device="cpu")))

    def sample(
        self,
        count: int,
        device: torch.device | str | None = None,
        on_diagonal: int | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``count`` intervals: ``(s, t)``, each ``(count,)``, float32.

        Args:
            count: Number of intervals.
            device: Device of the answer.
            on_diagonal: How many have no length, which are the first ones; drawn by default.
            places: Ascending times, ``(N,)``, of which a grid's steps get equal shares; evenly by default.
        """
        on_diagonal = self.on_diagonal(count) if on_diagonal is None else on_diagonal
        uniform = torch.rand(count, 4, device=device, dtype=torch.float32)
        # ends of a uniform interval: a length and a position, so that no length is rare
        span = self.length + (1 - self.length) * uniform[:, 1]
        low = uniform[:, 2] * (1 - span)
        high = low + span
        up = uniform[:, 3] < 0.5
        if self.grid > 0:
            choices = torch.tensor(self.steps, device=device)
            k = choices[torch.randint(len(choices), (count,), device=device)]
            place = uniform[:, 2]
            if places is not None:
                place = places[(place * len(places)).long()].to(place)
            step = (place * k).floor().clamp(max=k - 1)
            on_grid = uniform[:, 0] * (1 - self.diagonal) < self.grid
            low, high = torch.where(on_grid, step / k, low), torch.where(on_grid, (step + 1) / k, high)
            up = torch.where(on_grid, uniform[:, 3] >= self.to_noise, up)
        if self.directions != Direction.BOTH:
            up = torch.full_like(up, Direction.TO_DATA in self.directions)
        s, t = torch.where(up, low, high), torch.where(up, high, low)
        # the diagonal covers [0, 1] evenly, which the start of an interval does not
        s[:on_diagonal] = t[:on_diagonal] = uniform[:on_diagonal, 2]
        return s.clamp(0, 1), t.clamp(0, 1)
