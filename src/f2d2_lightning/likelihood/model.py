"""What can be asked of a model with likelihoods, whoever trains it: a student, a teacher, a map that was added to."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.flows._held import weights_held
from f2d2_lightning.flows.maps import Direction, JointMap
from f2d2_lightning.likelihood._inputs import (
    OTHER_SIZE,
    Array,
    as_cond,
    as_tensor,
    check_cond,
    check_state,
    in_parts,
    seed_of,
)
from f2d2_lightning.likelihood._log_prob import LogProb, log_prob
from f2d2_lightning.likelihood.determinant import Determinant
from f2d2_lightning.likelihood.error_bars import Disagreement, ErrorBars
from f2d2_lightning.likelihood.guidance import SelfGuidance
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.quantization import Quantization, bits_per_dim
from f2d2_lightning.likelihood.reference import Reference, ReferenceChoice
from f2d2_lightning.likelihood.sampling import Samples, draw_noise, sample
from f2d2_lightning.utils.checks import at_least, check_shape, checked, counts
from f2d2_lightning.utils.conditions import Cond, halves

if TYPE_CHECKING:
    from f2d2_lightning.metrics.diagnosis import Diagnosis

MOST_DRAWS = 2**20
"""Of dequantization noise: more are a mistake."""


class LikelihoodModel(ABC):
    """A joint map with what using it needs to know: shape and range of its data, step counts, how it is inverted.

    Samples and likelihoods are those of :attr:`joint_map`, which a module, a callback or a file stands behind.
    """

    shape: tuple[int, ...]
    """Of one state."""
    levels: int | None
    """Levels of discrete data; ``None`` for continuous data."""
    low: float
    """Lower edge of the range that the levels fill."""
    high: float
    """Upper edge."""
    steps: tuple[int, ...]
    """Step counts that are looked at; empty for a model that makes no steps."""
    inversion: Inversion | None
    """How a map that only goes to data is inverted."""
    reference: Reference
    """Solver of the reference likelihood, which may leave things open."""
    reference_choice: ReferenceChoice | None = None
    """What was chosen of :attr:`reference`, once something was."""
    said_reference: Reference | None = None
    """The one that an evaluation said last: it is said again where it is another."""
    error_bars: Mapping[int, ErrorBars] = MappingProxyType({})
    """By step count, as the last validation or :meth:`calibrate` made them."""
    class_names: list[str] | None = None
    """Names of the classes in the order of their labels, see :mod:`f2d2_lightning.utils.class_names`."""
    name: str = ""
    """Tells several of one trainer apart."""

    # --- what a model says of itself ---

    @property
    @abstractmethod
    def joint_map(self) -> JointMap:
        """The map that answers; in training the weight average."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is."""

    @abstractmethod
    def data_to_state(self, batch: Any) -> tuple[Tensor, Cond | None]:
        """States ``(B, *shape)`` at ``t = 1`` and conditioning of a batch."""

    def state(self, batch: Any) -> tuple[Tensor, Cond | None]:
        """:meth:`data_to_state`, looked at."""
        return self.data_to_state(batch)

    @abstractmethod
    def reference_velocity(self) -> Callable[..., Tensor] | None:
        """``(x, t, cond) -> v`` that likelihoods are compared with; ``None`` if there is none."""

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.joint_map.parameters()) if self.ready else 0
        data = f"shape={self.known_shape}" + ("" if self.levels is None else f", {self.quantization}")
        # a title may name the network already
        title = f"{self.title[:-1]}, " if self.title.endswith(")") else f"{self.title}("
        named = f"{title}{data}, directions={self.directions.label}, steps={self.steps}"
        return f"{named}, {size:,} parameters)" if size else f"{named})"

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return type(self).__name__

    @property
    def ready(self) -> bool:
        """Whether there is a model to ask."""
        return True

    @property
    def known_shape(self) -> tuple[int, ...] | None:
        """:attr:`shape`, or ``None`` where the data have yet to show it."""
        return self.shape

    @property
    def dim(self) -> int:
        """Dimensions of one state."""
        return math.prod(self.shape)

    @property
    def conditional(self) -> bool | None:
        """Whether ``cond`` is needed; ``None`` if that is not known."""
        return getattr(self.joint_map, "conditional", None)

    @property
    def directions(self) -> Direction:
        """Where the model's steps lead."""
        return self.joint_map.directions

    @property
    def draws_samples(self) -> bool:
        """Whether :meth:`sample` can be asked."""
        return Direction.TO_DATA in self.directions

    @property
    def reference_fixed(self) -> bool:
        """Whether the reference stays the same while the model trains."""
        return False

    @property
    def reference_name(self) -> str:
        """What the reference is called."""
        return "teacher" if self.reference_fixed else "own velocity"

    @property
    def quantization(self) -> Quantization | None:
        """Levels and range of discrete data; ``None`` for continuous data."""
        return None if self.levels is None else Quantization(self.levels, self.low, self.high)

    @property
    def unit(self) -> str:
        """Unit of :meth:`nll` and :meth:`nll_of`."""
        return "nats" if self.levels is None else "bits/dim"

    def nll_of(self, log_prob: Tensor) -> Tensor:
        """Negative log-likelihoods in :attr:`unit` from log-likelihoods in nats, any shape; float64 on the CPU."""
        value = log_prob.detach().cpu().double()
        return -value if self.levels is None else bits_per_dim(value, self.dim, self.quantization)

    # --- asking it ---

    def evaluating(self) -> AbstractContextManager[None]:
        """For a while evaluation mode, where the map is one that trains, and weights that get no gradients."""
        return nullcontext()

    @checked
    def nll(
        self,
        x: Array,
        steps: int | Sequence[float] | None = None,
        cond: Cond | None = None,
        *,
        draws: int = 1,
        determinant: Determinant | str | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Negative log-likelihood of data, in :attr:`unit`: bits per dimension of discrete data, else nats.

        Args:
            x: ``(B, *shape)``. Integers of a model of discrete data are levels, and are dequantized to its range;
                floating numbers are states.
            steps: As of :meth:`log_prob`, whose default is taken where none are given.
            cond: Conditioning, first axis ``B``, or 1 for all.
            draws: Dequantization draws per sample of integers, whose log-likelihoods are averaged: the bound on the
                code length is then less noisy, not tighter.
            determinant: As of :meth:`log_prob`.
            batch_size: Most samples at a time, which bounds the memory; the values stay the same.
            seed: Of the dequantization noise, a function of it, of the draw and of a sample's place in ``x``.
            generator: Where a seed is drawn from; by default the global generator.

        Returns:
            ``(B,)``, lower is more likely.

        Raises:
            TypeError: If ``x`` is no tensor, array or list.
            ValueError: If it does not fit the model, or more ``draws`` are asked for than make sense.
        """
        x, seed = self._shaped(as_tensor(x, "x")), seed_of(seed, generator)
        at_least(1, draws=draws)
        if draws > MOST_DRAWS:
            raise ValueError(f"draws={draws}; up to {MOST_DRAWS:,} are taken")
        integers, quantization = not x.is_floating_point() and not x.is_complex(), self.quantization
        if draws > 1 and (quantization is None or not integers):
            raise ValueError(
                f"draws={draws} are of dequantization noise, and x has dtype {x.dtype}, levels={self.levels}; give "
                "integers to a model of discrete data, or draws=1"
            )
        if quantization is None:
            states = iter([x.to(torch.get_default_dtype()) if integers else x])
        elif integers:
            states = quantization.draws(x, draws, int(torch.randint(2**62, ())) if seed is None else seed)
        else:
            check_state(x, "x")
            quantization.check_states(x[:256])
            states = iter([x])
        # what a user's own log_prob need not know of is not said
        said = {"steps": steps, "determinant": determinant, "batch_size": batch_size, "seed": seed}
        asked: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        value = torch.stack([self.log_prob(state, cond=cond, **asked).value for state in states]).mean(0)
        return -value if quantization is None else bits_per_dim(value, self.dim, quantization)

    def bits_per_dim(
        self, x: Array, steps: int | Sequence[float] | None = None, cond: Cond | None = None, **kwargs: Any
    ) -> Tensor:
        """As :meth:`nll`, in bits per dimension of continuous data too: there it depends on the unit of the states."""
        value = self.nll(x, steps, cond, **kwargs)
        return value if self.levels is not None else bits_per_dim(-value, self.dim)

    @checked
    def log_prob(
        self,
        x: Array,
        steps: int | Sequence[float] = 4,
        cond: Cond | None = None,
        *,
        determinant: Determinant | str | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> LogProb:
        """Log-likelihood of states at ``t = 1``, nats; see :func:`f2d2_lightning.log_prob`.

        States and ``cond`` may be arrays or lists, and are brought to the model's dtype and device. Gradients go to
        those that ask for them (``requires_grad``), never to the model's weights.

        Args:
            x: States, ``(B, *shape)``.
            steps: Number of uniform steps, or the times themselves.
            cond: Conditioning, first axis ``B``, or 1 for all states: a tensor, or a tuple or dictionary of them.
            determinant: See :func:`f2d2_lightning.log_prob`.
            batch_size: Most states at a time, which bounds the memory where no gradients are kept; values stay the
                same.
            seed: Of an estimated determinant's probes.
            generator: Where a seed is drawn from instead.

        Raises:
            TypeError: If ``x`` is no tensor, array or list.
            ValueError: If states have another shape than the model's, or ``cond`` does not fit it.
        """
        joint, determinant = self.joint_map, Determinant.said(determinant)
        if (seed := seed_of(seed, generator)) is not None and determinant is not None:
            determinant = replace(determinant, seed=seed)
        inversion = None if Direction.TO_NOISE in joint.directions else self.inversion
        x = self._fitting(x, "x")
        ask = partial(log_prob, joint, inversion=inversion, determinant=determinant)
        with self.evaluating():
            return in_parts(lambda x, cond: ask(x, steps, cond), x, self._conditioning(cond, x), batch_size)

    @checked
    def error_bar(self, x: Array, steps: int = 4, cond: Cond | None = None, *, batch_size: int | None = None) -> Tensor:
        """How far off :meth:`log_prob` may be, sample by sample, without asking the reference.

        The half width of an interval that holds the reference's log-likelihood, for states like those that the bars
        were calibrated on, with the probability of :attr:`ErrorBars.coverage`. It takes the evaluations of
        :meth:`log_prob` four times: in as many steps, in twice as many, and back.

        Args:
            x: States, ``(B, *shape)``.
            steps: Number of uniform steps.
            cond: Conditioning, first axis ``B``, or 1 for all.
            batch_size: Most states at a time.

        Returns:
            ``(B,)``, nats, without gradients.

        Raises:
            ValueError: If there are no bars for that number of steps.
        """
        if (steps := int(steps)) not in self.error_bars:
            raise ValueError(
                f"there are no error bars for {steps} steps (for {list(self.error_bars) or 'none'}); validate the "
                f"model with {steps} among its steps, or calibrate(x, steps=[...]) on states that it was not trained on"
            )
        x = self._fitting(x, "x")
        with torch.no_grad():
            found = in_parts(
                lambda x, cond: self.disagreement(x, steps, cond)[1], x, self._conditioning(cond, x), batch_size
            )
        return self.error_bars[steps](found)

    def disagreement(self, x: Tensor, steps: int, cond: Cond | None = None) -> tuple[LogProb, Disagreement]:
        """The log-likelihood of states in a number of steps, and what the model disagrees with itself about there."""
        answer = self.log_prob(x, steps, cond)
        finer = self.log_prob(x, 2 * steps, cond).value - answer.value
        miss = x.new_zeros(len(x))
        if self.draws_samples:
            # a state that is lost on its way to noise has no likelihood, and the others go on
            back = self.sample(answer.noise.nan_to_num(0.0, 0.0, 0.0), steps, cond).state
            miss = (back - x).flatten(1).square().mean(1).sqrt()
        return answer, Disagreement(finer, miss)

    @torch.no_grad()
    def calibrate(
        self, x: Array, cond: Cond | None = None, *, steps: Sequence[int] | None = None, coverage: float = 0.9
    ) -> None:
        """Make :attr:`error_bars` from states that the model was not trained on and their reference.

        Args:
            x: States, ``(N, *shape)``.
            cond: Conditioning, first axis ``N``.
            steps: Step counts; by default those of the model, of one from a file those that it has bars for.
            coverage: Share of such states whose reference is to lie within.

        Raises:
            ValueError: If there is no reference, no step count, or too few states for that share.
        """
        steps = self.steps or tuple(self.error_bars) if steps is None or not len(steps) else counts("steps", steps)
        if not steps:
            raise ValueError(f"{self.title} says no step counts; say for which: calibrate(x, steps=[1, 2, 4, 8])")
        velocity = self.reference_velocity()
        if velocity is None:
            raise ValueError(
                f"{self.title} has no velocity, and so nothing that its likelihoods could be compared with"
            )
        x = self._fitting(x, "x")
        cond = self._conditioning(cond, x)
        with self.evaluating():
            reference, bars = self.reference_log_prob(velocity, x, cond).value, {}
            for k in steps:
                answer, found = self.disagreement(x, k, cond)
                bars[k] = ErrorBars.calibrated(found, answer.value - reference, coverage)
        self.error_bars = bars

    def settled_reference(
        self, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None = None, identity: str | None = None
    ) -> Reference:
        """:attr:`reference` with what it leaves open chosen on the first states that come here, ``(B, *shape)``.

        Where an ``identity`` of the velocity is given, what was chosen for another is not taken.
        """
        if not getattr(self.reference, "open", False):
            return self.reference
        known = self.reference_choice
        if known is None or not self.reference.allows(known.reference) or identity not in (None, known.identity):
            known = replace(self.reference.chosen(velocity, x, cond), identity=identity)
            # too few states say nothing of the next ones
            self.reference_choice = known if known.measured else None
            if not known.good:
                warnings.warn(known.said(), stacklevel=3)
        return known.reference

    def forget_reference(self) -> None:
        """To be called where weights change: what was chosen for a velocity that moves was for the one before."""
        if self.reference_choice is not None and not self.reference_fixed:
            self.reference_choice = None

    def reference_log_prob(self, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None = None) -> LogProb:
        """Log-likelihood of states ``(B, *shape)`` at ``t = 1`` by :meth:`settled_reference`, nats."""
        return self.settled_reference(velocity, x, cond)(velocity, x, cond)

    @checked
    def sample(
        self,
        noise: int | Array,
        steps: int | Sequence[float] = 4,
        cond: Cond | None = None,
        *,
        with_log_prob: bool = False,
        determinant: Determinant | str | None = None,
        guidance: SelfGuidance | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Samples from a number of draws or from given noise; see :func:`f2d2_lightning.sample`.

        Gradients go to given noise and ``cond`` that ask for them (``requires_grad``), never to the model's weights.

        Args:
            noise: Number of samples, or draws of ``N(0, I)``, ``(B, *shape)``.
            steps: Number of uniform steps, or the times themselves.
            cond: Conditioning, first axis ``B``, or 1 for all; where ``noise`` is a number, a divisor of it: of ``M``
                conditions each then has ``B / M`` samples in a row, ``state.unflatten(0, (M, -1))``.
            with_log_prob: Also the samples' log-density.
            determinant: See :func:`f2d2_lightning.sample`.
            guidance: Towards higher likelihood, see :class:`f2d2_lightning.SelfGuidance`.
            batch_size: Most samples at a time, which bounds the memory. All noise is drawn first, so that samples stay
                the same.
            seed: Of the noise, the same on every device, and of an estimated determinant's probes.
            generator: Where they are drawn from instead.

        Raises:
            TypeError: If ``noise`` is neither a number nor a tensor, array or list.
            ValueError: If it has another shape than the model's, or ``cond`` does not fit it.
        """
        joint, determinant = self.joint_map, Determinant.said(determinant)
        if isinstance(noise, Tensor) and noise.ndim == 0 and not noise.is_floating_point():
            noise = int(noise)
        drawn, noise = not hasattr(noise, "__len__"), self._noise(noise, seed, generator)
        if (seed := seed_of(seed, generator)) is not None and determinant is not None:
            determinant = replace(determinant, seed=seed)
        if guidance is not None and determinant is not None:
            raise ValueError("guidance climbs the head's likelihood; determinant= is for samples without it")
        ask = guidance or partial(sample, determinant=determinant)
        with self.evaluating():
            return in_parts(
                lambda noise, cond: ask(joint, noise, steps, cond, with_log_prob=with_log_prob),
                noise,
                self._conditioning(cond, noise, drawn),
                batch_size,
            )

    def _noise(self, noise: int | Array, seed: int | None, generator: torch.Generator | None) -> Tensor:
        """Given noise, or so many draws."""
        if isinstance(noise, (int, np.integer)) and not isinstance(noise, bool):
            return self._fitting(draw_noise(int(noise), self.shape, self.device, seed, generator), "noise")
        return self._fitting(noise, "noise")  # type: ignore[arg-type]

    def _shaped(self, x: Tensor) -> Tensor:
        """States or levels of the model's shape."""
        check_shape(x, self.shape, "the model was trained for", OTHER_SIZE)
        return x

    def _fitting(self, x: Array, what: str = "x") -> Tensor:
        """States of the model's shape, as a tensor on its device."""
        x = as_tensor(x, what)
        return self._shaped(x).to(self.device)

    def _conditioning(self, cond: Cond | None, x: Tensor, drawn: bool = False) -> Cond | None:
        cond = as_cond(cond, x, drawn)
        check_cond(cond, len(x), self.joint_map)
        return cond

    def diagnose(
        self, x: Tensor, cond: Cond | None = None, reference: Tensor | None = None, reference_error: float = math.nan
    ) -> Diagnosis:
        """Where the error of few-step likelihoods comes from: targets, head, map or grid, and what to do; ``print`` it.

        Args:
            x: States at ``t = 1`` that were not trained on, ``(B, *shape)``; 32 are enough.
            cond: Conditioning.
            reference: Their negative log-likelihoods by the reference, ``(B,)``, in :attr:`unit`, where they are known;
                NaN for states to leave out. By default they are computed, which takes the most of the time.
            reference_error: Mean size of the given reference's own error, in :attr:`unit`.

        Raises:
            ValueError: If there is no reference, or nothing that was taught.

        Numbers are those of :class:`f2d2_lightning.metrics.Diagnosis`, in :attr:`unit`.
        """
        raise ValueError(f"{self.title} was not distilled here, so there is nobody to name; ask the module or callback")

    # --- its last evaluation ---

    def evaluated_reference(self, values: Mapping[int, Tensor]) -> Tensor | None:
        """The reference's NLL of the first samples of the last evaluation, where the evaluation has computed it.

        Args:
            values: Few-step NLL of those samples by step count, ``(N,)``: they tell whether the samples are the same.

        Returns:
            ``(N,)``, in :attr:`unit`, NaN for those that were not compared; ``None`` if it has none of these samples.
        """
        return None

    def agreement_table(self) -> list[dict[str, Any]]:
        """Rows of the last evaluation over all processes, which must all call this; none where there was none."""
        return []


class JointModel(LikelihoodModel):
    """A joint map that nothing trains, such as one from a file.

    Args:
        joint: The map, in evaluation mode.
        shape: Of one state.
        quantization: Levels and range of discrete data; ``None`` for continuous data.
        inversion: How it is inverted if it only goes to data.
        class_names: Names of its classes.
    """

    @checked
    def __init__(
        self,
        joint: JointMap,
        shape: Sequence[int],
        quantization: Quantization | None = None,
        inversion: Inversion | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self._joint, self.shape = joint, counts("shape", shape)
        self.levels = None if quantization is None else quantization.levels
        self.low, self.high = (-1.0, 1.0) if quantization is None else (quantization.low, quantization.high)
        self.steps, self.reference, self.inversion = (), Reference(), inversion or Inversion()
        self.class_names = class_names

    @property
    def joint_map(self) -> JointMap:
        return self._joint

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self._joint.parameters()), torch.device("cpu"))

    def evaluating(self) -> AbstractContextManager[None]:
        return weights_held(self._joint)

    def to(self, device: torch.device | str) -> JointModel:
        """Move the map to a device."""
        self._joint.to(device)
        return self

    def data_to_state(self, batch: Any) -> tuple[Tensor, Cond | None]:
        """A batch is states, or a sequence whose first items are states and conditioning."""
        x, cond = halves(batch)
        return self._fitting(x), None if self.conditional is False else cond

    def reference_velocity(self) -> Callable[..., Tensor]:
        """The map's own diagonal."""
        return self._joint.velocity
