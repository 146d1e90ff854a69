"""Reference likelihoods: which solver of the flow's ODE is fine enough, how far off it is, and how long it takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import Exact, StillProbe, check_mode, probes_in_words, with_probes
from f2d2_lightning.likelihood._inputs import in_parts
from f2d2_lightning.likelihood._log_prob import LogProb
from f2d2_lightning.likelihood.ode import ADAPTIVE, FIXED, WEIGHTS, reference_log_prob
from f2d2_lightning.likelihood.time_grids import PLACINGS
from f2d2_lightning.utils.checks import at_least, check_fields, one_of, share
from f2d2_lightning.utils.conditions import Cond, some_of
from f2d2_lightning.utils.measuring import clock, spread_of

AGAIN_EXACT_UP_TO = 16
"""Dimensions up to which likelihoods of whole data sets take the exact divergence, where steps are given."""
LOOKED_AT, FEWEST = 64, 8
"""States that a reference is chosen on: at most, and at least."""
FINE = 0.005
"""What is allowed, in spreads of log p: of the last doubling of the steps, and of the probes' standard error."""
LEAST_SPREAD = 0.1
"""Nats that a spread counts as: where all data are as likely, an error of less than a thousandth of a nat is none."""
FIRST_STEPS, MOST_EVALUATIONS, MOST_PROBES, CHOSEN_EXACT_UP_TO = 16, 1000, 16, 64
"""What is tried: steps, evaluations and probes; dimensions up to which the exact divergence may be taken."""
TIMED = 4
"""Steps that are timed."""
NUMBERS = 2**18
"""In states and their tangents that are evaluated at once."""
OPEN: Mapping[str, Any] = {
    "method": str,
    "steps": int,
    "probes": (int, type(None)),
    "near_data": (int, float),
    "batch": (int, type(None)),
}
"""What a reference may leave open, and what it is once chosen."""


@dataclass(frozen=True)
class Reference:
    """Settings of a reference likelihood, to be given to a module or to the command line.

    Without ``steps`` they are chosen by measurement (:meth:`chosen`): by a module, a callback or the command line on
    the first states that they ask for, once; by a call of this object on the states of the call. What is given stays.

    Args:
        method: torchdiffeq's solver, as in :func:`reference_log_prob`. By default ``"rk4"`` where steps are chosen,
            ``"heun2"`` where they are given.
        steps: Fixed steps; ``heun2`` evaluates twice a step, so 500 steps are 1,000 evaluations. ``None`` chooses them.
        probes: Hutchinson probes per evaluation; 0 for the exact divergence. ``None`` chooses them with the steps; with
            given steps it takes the exact one for states of up to 16 dimensions, and one probe above.
        rtol: Relative tolerance of adaptive solvers.
        atol: Absolute tolerance of adaptive solvers.
        seed: Of the probes, which are a function of it and of each sample: with given steps and probes a reference is
            the same whenever it is computed, in whatever batch and process. What is left open is chosen on the first
            states, and differs where they do.
        near_data: Share of fixed steps spread evenly in ``log(1 - t)`` near the data. ``None`` chooses it among 0 and
            .5 with the steps; with given steps it is 0.
        mode: How the network is differentiated, ``"forward"``, ``"reverse"`` or ``"finite"``, as in
            :class:`~f2d2_lightning.Hutchinson`.
        step: Half-width of finite differences, in units of the state.
        batch: Most states at a time; ``None`` for all, or, where probes are chosen, as many as need little memory.

    Raises:
        ValueError: If the method or the mode is unknown, or a number out of range.

    >>> from f2d2_lightning.flows import GaussianBaseline, GaussianFlow
    >>> flow = GaussianFlow(GaussianBaseline.from_covariance(torch.zeros(2), torch.eye(2)))
    >>> Reference(steps=8)(flow, torch.zeros(1, 2)).value  # -log(2 pi)
    tensor([-1.8379])
    """

    method: str | None = None
    steps: int | None = None
    probes: int | None = None
    rtol: float = 1e-5
    atol: float = 1e-5
    seed: int = 0
    near_data: float | None = None
    mode: str = "forward"
    step: float = 1e-2
    batch: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_mode(self.mode, self.step)
        one_of("method", self.method or "rk4", (*FIXED, *ADAPTIVE))
        at_least(0, probes=self.probes or 0)
        at_least(1, batch=1 if self.batch is None else self.batch)

    @property
    def open(self) -> bool:
        """Whether the steps are left to be chosen."""
        return self.steps is None and self.method not in ADAPTIVE

    def allows(self, other: Reference) -> bool:
        """Whether ``other`` is this one, with what it leaves open."""
        return all(getattr(self, f.name) in (None, getattr(other, f.name)) for f in fields(self))

    @torch.no_grad()
    def __call__(self, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None = None) -> LogProb:
        """:func:`reference_log_prob` with these settings; draws no random numbers."""
        if self.open:
            choice = self.chosen(velocity, x, cond)
            if not choice.good:
                warnings.warn(choice.said(), stacklevel=2)
            return choice.reference(velocity, x, cond)
        probes = (0 if x[0].numel() <= AGAIN_EXACT_UP_TO else 1) if self.probes is None else self.probes
        solve = partial(
            reference_log_prob,
            velocity,
            divergence=with_probes(probes, self.mode, self.step),
            method=self.method or "heun2",
            steps=None if self.method in ADAPTIVE else self.steps,
            rtol=self.rtol,
            atol=self.atol,
            near_data=0.0 if self.method in ADAPTIVE else self.near_data or 0.0,
            seed=self.seed,
        )
        return in_parts(solve, x, cond, self.batch or max(1, len(x)))

    @torch.no_grad()
    def chosen(self, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None = None) -> ReferenceChoice:
        """What is left open, chosen such that log p is off by little beside its spread over data.

        Steps are doubled, evenly spread and with half of them near the data, until the states move by less than .5 %
        of the spread, at most to 1,000 evaluations. A probe's standard error then says how many probes bring it there
        too, 16 at most; the exact divergence is taken in up to 64 dimensions where it costs no more than twice as much.

        Args:
            velocity: ``(x, t, cond) -> v``, as in :func:`reference_log_prob`.
            x: Data at ``t = 1``, ``(B, ...)``; the first 64 are looked at. Fewer than 8, or fewer with a finite
                likelihood, say too little: 500 steps are taken then.
            cond: Conditioning, first axis ``B``.

        Returns:
            The choice; draws no random numbers from the global generator. With given steps there is nothing to choose
            and to measure.
        """
        if not self.open:
            return ReferenceChoice(self, 0)
        few, of_few = x[:LOOKED_AT], some_of(cond, slice(LOOKED_AT))
        found = _Search(self, velocity, few, of_few).choice() if len(few) >= FEWEST else None
        as_before = replace(self, method=self.method or "heun2", steps=500, near_data=self.near_data or 0.0)
        return found or ReferenceChoice(as_before, len(few))


@dataclass(frozen=True)
class ReferenceChoice:
    """Settings of a reference, and how far off it is; NaN where that was not measured."""

    reference: Reference
    """With nothing left open."""
    states: int
    """That it was chosen on."""
    moved: float = math.nan
    """Mean change of log p per state by the last doubling of the steps, in nats: more than what is left of it."""
    noise: float = math.nan
    """Mean standard error of log p over probes, in nats; 0 for the exact divergence."""
    spread: float = math.nan
    """Interquartile range of log p over the states / 1.35, at least .1, in nats."""
    seconds: float = math.nan
    """That a state takes, on the device and in a batch of the states that it was chosen on."""
    identity: str | None = None
    """A fingerprint of the network that it was chosen for, where that stays as it is and is known."""

    @property
    def error(self) -> float:
        """Of log p per state by steps and probes, in nats."""
        return math.hypot(self.moved, self.noise)

    @property
    def measured(self) -> bool:
        """Whether it is known how far off it is."""
        return math.isfinite(self.error)

    @property
    def evaluations(self) -> int | None:
        """Of the network with its derivative, for a likelihood; ``None`` for adaptive solvers."""
        method, steps = self.reference.method or "heun2", self.reference.steps
        return None if method in ADAPTIVE or steps is None else steps * len(WEIGHTS[method])

    @property
    def good(self) -> bool:
        """Whether nothing is known to be off by more than is allowed."""
        return not max(self.moved, self.noise) > FINE * self.spread

    def remedy(self) -> str:
        """The reference that would be within what is allowed, as far as that can be told."""
        how, probes = self.reference, self.reference.probes
        if self.noise > FINE * self.spread:
            probes = _probes_for(self.noise, probes or 1, self.spread)
        steps = (how.steps or 0) * (2 if self.moved > FINE * self.spread else 1)
        return f"Reference(method={how.method!r}, steps={steps}, probes={probes}, near_data={how.near_data})"

    def __str__(self) -> str:
        """In words, for a log."""
        how = self.reference
        divergence = "" if how.probes is None else f", {probes_in_words(how.probes)}"
        steps = "" if self.evaluations is None else f"{how.steps} steps of "
        evaluations = "" if self.evaluations is None else f" ({self.evaluations:,} evaluations)"
        near = f", {how.near_data:.0%} of them near the data" if how.near_data else ""
        known = f"what it is off by cannot be told from {self.states} states"
        if self.measured:
            known = (
                f"off by {100 * self.error / self.spread:.2g} % of the spread of log p ({self.error:.2g} of "
                f"{self.spread:.3g} nats)"
            )
        return f"{steps}{how.method or 'heun2'}{evaluations}{near}{divergence}: {known}"

    def said(self, samples: float = math.nan, processes: int = 1) -> str:
        """The line for a log: what was chosen, about how long so many samples take, and what would be better."""
        seconds = samples * self.seconds / processes
        long = f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds / 60:,.0f} minutes"
        lasts = f"; about {long} for {samples:,.0f} samples" if math.isfinite(seconds) else ""
        return f"reference: {self}{lasts}" + ("" if self.good else f"; finer would be {self.remedy()}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"reference": {name: getattr(self.reference, name) for name in OPEN}}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any] | None, given: Reference) -> ReferenceChoice | None:
        """Inverse of :meth:`to_dict`, for the reference that left things open; ``None`` of ``None``.

        Raises:
            ValueError: If values are not of the kind that :meth:`to_dict` gives.
        """
        if kept is None or not getattr(given, "open", False):
            return None
        reference = _checked(kept, {"reference": Mapping})["reference"]
        own = _checked(kept, {"states": int, "identity": (str, type(None))})
        own |= _checked(kept, dict.fromkeys(("moved", "noise", "spread", "seconds"), (int, float)))
        chosen = _checked(reference, OPEN)
        at_least(1, steps=chosen["steps"])
        share(near_data=chosen["near_data"])
        return cls(replace(given, **chosen), **own)


class _Search:
    """For what a reference leaves open, on a few states."""

    def __init__(self, given: Reference, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None) -> None:
        self.given, self.velocity, self.x, self.cond = given, velocity, x, cond
        self.method, self.dim = given.method or "rk4", x[0].numel()

    def choice(self) -> ReferenceChoice | None:
        """What is chosen; ``None`` if log p is finite for too few states."""
        given = self.given
        steps, near_data, moved, spread, pilot = self._steps()
        probes = given.probes
        noise = 0.0 if probes == 0 else _mean(pilot.standard_error)
        if not math.isfinite(moved + noise):
            return None
        if probes is None:
            enough = _probes_for(noise, 1, spread)
            probes = 0 if self.dim <= min(CHOSEN_EXACT_UP_TO, 2 * enough) else min(enough, MOST_PROBES)
            noise = noise / probes**0.5 if probes else 0.0
        at_once = self._at_once(probes)
        chosen = replace(given, method=self.method, steps=steps, probes=probes, near_data=near_data, batch=at_once)
        start = clock(self.x.device)
        replace(chosen, steps=TIMED)(self.velocity, self.x, self.cond)
        seconds = (clock(self.x.device) - start) * steps / TIMED / len(self.x)
        return ReferenceChoice(chosen, len(self.x), moved, noise, spread, seconds)

    def _steps(self) -> tuple[int, float, float, float, LogProb]:
        """Steps, their placing, what is left of their error, the spread, and answers with probes that are redrawn."""
        given, most = self.given, MOST_EVALUATIONS // len(WEIGHTS[self.method])
        steps, placings = FIRST_STEPS, PLACINGS if given.near_data is None else (given.near_data,)
        before = {share: self._solve(steps, share).value for share in placings}
        while True:
            steps = min(2 * steps, most)
            values = {share: self._solve(steps, share).value for share in before}
            moves = {share: _mean((values[share] - before[share]).abs()) for share in before}
            near_data = min(moves, key=lambda share: moves[share])
            # a doubling can move little by accident; the other placing then lies elsewhere
            apart = [_mean((values[share] - values[near_data]).abs()) for share in values if share != near_data]
            moved = max([moves[near_data], *apart])
            if moved <= FINE * _spread(values[near_data]) or steps == most:
                pilot = self._solve(steps, near_data, 1 if given.probes is None else given.probes)
                spread = self._spread(values[near_data], pilot)
                if moved <= FINE * spread or steps == most:
                    return steps, near_data, moved, spread, pilot
            # a placing that moves far more is not going to win
            before = {share: values[share] for share in before if moves[share] <= 4 * moves[near_data]}

    def _spread(self, still: Tensor, pilot: LogProb) -> float:
        """Of log p: of exact values where there are some, else without what probes scatter."""
        if self.dim <= AGAIN_EXACT_UP_TO:
            return _spread(still)
        # a probe that stays as it is scatters log p more than one that is redrawn
        error = pilot.standard_error
        noise = 0.0 if error is None else _mean(error.square())
        return max(math.sqrt(max(0.0, _spread(pilot.value) ** 2 - noise)), LEAST_SPREAD)

    def _solve(self, steps: int, near_data: float, probes: int | None = None) -> LogProb:
        """With so many probes that are redrawn, 0 for the exact divergence; ``None``: without their noise.

        With one and the same probe all along, few and many steps differ by what the steps make.
        """
        given, exact = self.given, self.dim <= AGAIN_EXACT_UP_TO

        def solve(part: Tensor, of_part: Tensor | None) -> LogProb:
            still = probes is None and not exact
            redrawn = with_probes(probes or 0, given.mode, given.step)
            return reference_log_prob(
                self.velocity,
                part,
                of_part,
                divergence=StillProbe(part, None, given.mode, given.step) if still else redrawn,
                method=self.method,
                steps=steps,
                near_data=near_data,
                seed=given.seed,
            )

        return in_parts(solve, self.x, self.cond, self._at_once(probes if probes is not None else 1 - exact))

    def _at_once(self, probes: int) -> int:
        """States: as many as need little memory, but not so few that a device has nothing to do."""
        return self.given.batch or max(16, NUMBERS // (self.dim * (probes or min(self.dim, Exact().chunk))))


def _checked(kept: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a file, by name; no file of ours lacks one or has one of another kind."""
    if not isinstance(kept, Mapping):
        raise ValueError(f"the choice of a reference in a file is {kept!r}; it holds values by name")
    for name, kind in kinds.items():
        if not isinstance(kept.get(name), kind) or isinstance(kept.get(name), bool):
            raise ValueError(f"the choice of a reference in a file has {name}={kept.get(name)!r}, which it cannot be")
    return {name: kept[name] for name in kinds}


def _mean(values: Tensor | None) -> float:
    """Of those that are finite; infinite where they are too few."""
    known = torch.empty(0) if values is None else values[values.isfinite()]
    return float(known.double().mean()) if len(known) >= FEWEST else math.inf


def _spread(values: Tensor) -> float:
    known = values[values.isfinite()]
    return max(spread_of(known), LEAST_SPREAD) if len(known) else LEAST_SPREAD


def _probes_for(noise: float, probes: int, spread: float) -> int:
    return max(1, math.ceil(probes * (noise / (FINE * spread)) ** 2))
