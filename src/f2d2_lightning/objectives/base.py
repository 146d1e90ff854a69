"""What every objective has: a batch to learn from, the weighting of its errors, and the loss with its parts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.flows.gaussian import GaussianBaseline, baseline_of
from f2d2_lightning.flows.maps import Direction, Joint, JointMap
from f2d2_lightning.flows.paths import LinearPath, Path, Point
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import VelocitySource
from f2d2_lightning.utils.checks import at_least, check_fields, checked, one_of, positive, share
from f2d2_lightning.utils.conditions import Cond, joined
from f2d2_lightning.utils.text import briefly


@dataclass(frozen=True)
class Batch:
    """What a training step has."""

    data: Tensor
    """States at ``t = 1``, ``(B, ...)``; noise and times are drawn by the objective."""
    source: VelocitySource
    """Gives ``(v, div v)``."""
    cond: Cond | None = None
    """Conditioning, ``(B, ...)``; a tensor, or a tuple or dictionary of them."""
    anchor: VelocitySource | None = None
    """Gives ``(v, div v)`` on the diagonal, ``source`` by default. Self-distillation takes the student's own diagonal
    as source and the conditional velocity as anchor."""
    progress: float = 0.0
    """Share of training that is done, in [0, 1], for objectives with phases."""


class Terms(NamedTuple):
    """An objective's value, by part. All are means over the batch."""

    loss: Tensor
    """What is minimised."""
    velocity_loss: Tensor
    """Its velocity part, weighted."""
    divergence_loss: Tensor
    """Its divergence part, weighted."""
    velocity_mse: Tensor
    """Raw squared error of ``u``, per dimension."""
    divergence_mse: Tensor
    """Raw squared error of ``D``, per sample, (nats per unit of time) squared."""


class Examples(NamedTuple):
    """What a student is regressed on."""

    x: Tensor
    """States at time ``s``, ``(B, ...)``."""
    s: Tensor
    """Starts, ``(B,)``."""
    t: Tensor
    """Ends, ``(B,)``."""
    cond: Cond | None
    """Conditioning."""
    target: Joint
    """``(u, D)`` from ``s`` to ``t``, detached."""


def unit_baseline(x: Tensor) -> GaussianBaseline:
    """The fit that stands in where there is none: zero mean, unit variance, for states like ``x``, ``(B, ...)``."""
    return GaussianBaseline(x.shape[1:], "isotropic").to(x)


@dataclass(frozen=True)
class Weighting:
    """How errors of ``u`` and ``D`` become one loss.

    In units of ``"velocity"``, ``|u - u*|^2 / d + divergence * (D - D*)^2 / d``. In ``"natural"`` units, an error
    counts as what it does to the log-likelihood: the error of the position where the jump lands, in standard
    deviations of the Gaussian fit there (per axis, squared and summed), plus ``divergence`` times the squared error of
    the log-density's change, in nats. On the diagonal, where a jump has no length, it is given ``diagonal`` radians of
    the fit's mean angle (:mod:`f2d2_lightning.flows.gaussian`). Either is divided, per sample, by its own detached
    value to the power ``adaptive`` (Geng et al., 2024, https://arxiv.org/abs/2406.14548).

    Args:
        divergence: Weight of the divergence error. ``None``: .1 up to 16 dimensions, and as the inverse square of their
            number beyond, where the head would cost samples (docs/RECIPE.md).
        adaptive: 0 for plain squared errors, up to 1 for errors that count alike whatever their size; at .5 an error
            counts by its size, as it does in the mean error of a likelihood. What is learned from targets that scatter
            (conditional velocities) is then no longer their mean.
        units: ``"natural"`` or ``"velocity"``.
        diagonal: Length of a diagonal jump in natural units, radians.

    Raises:
        ValueError: If a weight is negative or the units unknown.

    >>> Weighting(divergence=0.5).of_divergence(dim=2)
    0.5
    """

    divergence: float | None = 0.1
    adaptive: float = 0.0
    units: str = "natural"
    diagonal: float = 0.3

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(0, divergence=self.of_divergence(1))
        share(adaptive=self.adaptive)
        positive(diagonal=self.diagonal)
        one_of("units", self.units, ("natural", "velocity"))

    def __call__(self, predicted: Joint, examples: Examples, baseline: GaussianBaseline | None = None) -> Terms:
        """Terms for a batch, of what the student answered at its examples, whose targets are detached here.

        The Gaussian fit ``baseline`` gives natural units; unit variance without one.
        """
        velocity_error = predicted.velocity - examples.target.velocity.detach()
        divergence_error = predicted.divergence - examples.target.divergence.detach()
        velocity_squared = velocity_error.flatten(1).square().mean(-1)
        weight = self.of_divergence(velocity_error[0].numel())
        if self.units == "velocity":
            weighted_velocity = velocity_squared
            weighted_divergence = weight * divergence_error.square() / velocity_error[0].numel()
        else:
            weighted_velocity, length = self._natural(velocity_error, examples, baseline)
            weighted_divergence = weight * (length * divergence_error).square()
        return self.terms(weighted_velocity, weighted_divergence, velocity_squared, divergence_error)

    def of_divergence(self, dim: int) -> float:
        """Weight of the divergence error of states of so many dimensions."""
        return 0.1 * min(1.0, 16 / dim) ** 2 if self.divergence is None else self.divergence

    def _natural(self, error: Tensor, examples: Examples, baseline: GaussianBaseline | None) -> tuple[Tensor, Tensor]:
        """Squared position error in standard deviations, ``(B,)``, and the length of the jumps, ``(B,)``."""
        baseline = baseline or unit_baseline(error)
        s, t = examples.s, examples.t
        rate = baseline.angle_rate(s, t).mean(-1).expand_as(t)
        length = torch.where(s == t, self.diagonal / rate.clamp(min=1.0), t - s)
        return (length[:, None] * baseline.deviations(error, t)).square().sum(-1), length

    def terms(self, velocity: Tensor, divergence: Tensor, velocity_squared: Tensor, divergence_error: Tensor) -> Terms:
        """Terms of errors ``(B,)``: squares with their weights, which are adapted here, and raw ones."""
        velocity_loss, divergence_loss = self.adapt(velocity), self.adapt(divergence)
        raw = velocity_squared.detach().mean(), divergence_error.detach().square().mean()
        return Terms(velocity_loss + divergence_loss, velocity_loss, divergence_loss, *raw)

    def adapt(self, error: Tensor) -> Tensor:
        """Mean of errors ``(B,)``, each a square with its weight, adapted."""
        if self.adaptive:
            error = error / (error.detach() + 1e-3) ** self.adaptive
        return error.mean()


class Objective(ABC):
    """A training objective.

    Args:
        intervals: Distribution of ``(s, t)``; in the directions of the map by default.
        weighting: How errors become a loss.
        path: Probability path that states are drawn from.
    """

    _taken = _levels_taken = False

    @checked
    def __init__(
        self, intervals: Intervals | None = None, weighting: Weighting | None = None, path: Path | None = None
    ) -> None:
        self.intervals = intervals or Intervals()
        self.weighting = weighting or Weighting()
        self.path = path or LinearPath()
        self.quantization: Quantization | None = None
        self.structure: torch.Generator | None = None
        """Where choices that decide how often the network is called are drawn from; ``None`` for the global generator.

        Processes that share a sharded network must call it equally often: give all of them the same CPU generator.
        """

    def __repr__(self) -> str:
        return briefly(self)

    @property
    def directions(self) -> Direction:
        """Orders of time that training covers."""
        return self.intervals.directions

    @abstractmethod
    def loss(self, student: JointMap, batch: Batch) -> Terms:
        """Loss of the joint map in training on a batch, to be minimised, and its parts."""

    def on_diagonal(self, count: int) -> int:
        """How many of a batch of ``count`` are regressed on the diagonal."""
        return self.intervals.on_diagonal(count, self.structure)

    def regress(
        self,
        student: JointMap,
        batch: Batch,
        off_diagonal: Callable[[Point, Tensor], Examples],
        places: Tensor | None = None,
    ) -> Terms:
        """Loss over intervals drawn afresh, on the path of the data: the anchor answers where they have no length.

        Args:
            student: The joint map in training.
            batch: What there is to learn from.
            off_diagonal: Examples from points at ``s``, which know their pair, and ends ``t``, ``(B,)``.
            places: Where steps of grids lie, see :meth:`Intervals.sample`.
        """
        data, cond, count = batch.data, batch.cond, len(batch.data)
        still = self.on_diagonal(count)
        s, t = (time.to(data.dtype) for time in self.intervals.sample(count, data.device, still, places))
        point, parts = self.path.point(data, torch.randn_like(data), s, cond), []
        if still:
            here = point[:still]
            parts.append(Examples(here.x, here.t, here.t, here.cond, (batch.anchor or batch.source)(here)))
        if still < count:
            parts.append(off_diagonal(point[still:], t[still:]))
        x, starts, ends, conds, targets = zip(*parts, strict=True)
        target = Joint(*map(torch.cat, zip(*targets, strict=True)))
        return self.terms(student, Examples(torch.cat(x), torch.cat(starts), torch.cat(ends), joined(conds), target))

    def terms(self, student: JointMap, examples: Examples) -> Terms:
        """Loss of a student on examples."""
        predicted = student(examples.x, examples.s, examples.t, examples.cond)
        return self.weighting(predicted, examples, baseline_of(student))

    def quantize(self, quantization: Quantization | None) -> None:
        """Take over the levels and range of the data, to which states that are made to look like data are put back.

        Raises:
            ValueError: If the objective has others.
        """
        if self.quantization is None:
            self.quantization, self._levels_taken = quantization, True
        elif self.quantization != quantization:
            raise ValueError(
                f"the objective has {self.quantization}, but the model's data have {quantization}; leave out the "
                "objective's, or make them agree"
            )

    def for_a_model(self) -> Objective:
        """Itself for the first model that takes it, for a further one a copy that begins anew.

        It goes where its model goes, and what it keeps is of one teacher.
        """
        if not self._taken:
            self._taken = True
            return self
        other = copy.copy(self)
        other.intervals = copy.copy(self.intervals)
        if self._levels_taken:
            other.quantization = None
        other.forget()
        return other

    def forget(self) -> None:  # noqa: B027
        """Let go of what is kept from step to step; nothing, unless a subclass that keeps something says how."""

    # trajectory regression has a state to keep; the others have none
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on as if nothing had happened."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, and the checkpoint holds {sorted(state)}")
