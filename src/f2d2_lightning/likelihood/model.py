"""What can be asked of a model with likelihoods, whoever trains it: a student, a teacher, a map that was added to."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import Direction, JointMap
from f2d2_lightning.likelihood._log_prob import LogProb, log_prob
from f2d2_lightning.likelihood.determinant import Determinant
from f2d2_lightning.likelihood.guidance import SelfGuidance
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.quantization import Quantization, bits_per_dim
from f2d2_lightning.likelihood.reference import Reference, ReferenceChoice
from f2d2_lightning.likelihood.sampling import Samples, draw_noise, sample
from f2d2_lightning.utils.checks import check_shape

if TYPE_CHECKING:
    from f2d2_lightning.metrics.diagnosis import Diagnosis

__all__ = ["JointModel", "LikelihoodModel"]


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
    def data_to_state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """States ``(B, *shape)`` at ``t = 1`` and conditioning of a batch."""

    def state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """:meth:`data_to_state`, looked at."""
        return self.data_to_state(batch)

    @abstractmethod
    def reference_velocity(self) -> Callable[..., Tensor] | None:
        """``(x, t, cond) -> v`` that likelihoods are compared with; ``None`` if there is none."""

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
        """Whose the reference is."""
        return "teacher" if self.reference_fixed else "own velocity"

    @property
    def quantization(self) -> Quantization | None:
        """Levels and range of discrete data; ``None`` for continuous data."""
        return None if self.levels is None else Quantization(self.levels, self.low, self.high)

    @property
    def unit(self) -> str:
        """Unit of :meth:`nll`."""
        return "nats" if self.levels is None else "bits/dim"

    def nll(self, log_prob: Tensor) -> Tensor:
        """Negative log-likelihoods in :attr:`unit` from log-likelihoods in nats, any shape; float64 on the CPU."""
        value = log_prob.detach().cpu().double()
        return -value if self.levels is None else bits_per_dim(value, self.dim, self.quantization)

    # --- asking it ---

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode for a while, where the map is one that trains."""
        return nullcontext()

    def log_prob(
        self,
        x: Tensor,
        steps: int | Sequence[float] = 4,
        cond: Tensor | None = None,
        *,
        determinant: Determinant | str | None = None,
    ) -> LogProb:
        """Log-likelihood of states at ``t = 1``, nats; see :func:`f2d2_lightning.log_prob`.

        Raises:
            ValueError: If they have another shape than the model's, or ``cond`` does not fit it.
        """
        joint = self.joint_map
        inversion = None if Direction.TO_NOISE in joint.directions else self.inversion
        with self.evaluating():
            return log_prob(joint, self._fitting(x), steps, cond, inversion=inversion, determinant=determinant)

    def settled_reference(
        self, velocity: Callable[..., Tensor], x: Tensor, cond: Tensor | None = None, identity: str | None = None
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

    def reference_log_prob(self, velocity: Callable[..., Tensor], x: Tensor, cond: Tensor | None = None) -> LogProb:
        """Log-likelihood of states ``(B, *shape)`` at ``t = 1`` by :meth:`settled_reference`, nats."""
        return self.settled_reference(velocity, x, cond)(velocity, x, cond)

    def sample(
        self,
        noise: int | Tensor,
        steps: int | Sequence[float] = 4,
        cond: Tensor | None = None,
        *,
        with_log_prob: bool = False,
        determinant: Determinant | str | None = None,
        guidance: SelfGuidance | None = None,
    ) -> Samples:
        """Samples from a number of draws or from given noise; see :func:`f2d2_lightning.sample`.

        With ``guidance`` towards higher likelihood, see :class:`f2d2_lightning.SelfGuidance`.
        """
        joint = self.joint_map
        if isinstance(noise, int):
            noise = draw_noise(noise, self.shape, self.device)
        noise = self._fitting(noise)
        with self.evaluating():
            if guidance is not None:
                if determinant is not None:
                    raise ValueError("guidance climbs the head's likelihood; determinant= is for samples without it")
                return guidance(joint, noise, steps, cond, with_log_prob=with_log_prob)
            return sample(joint, noise, steps, cond, with_log_prob=with_log_prob, determinant=determinant)

    def _fitting(self, x: Tensor) -> Tensor:
        """States of the model's shape."""
        remedy = "a likelihood of another size means nothing: resize the data, or train a model for them"
        check_shape(x, self.shape, "the model was trained for", remedy)
        return x

    def diagnose(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        reference: Tensor | None = None,
        reference_error: float = math.nan,
    ) -> Diagnosis:
        """Whose the error of few-step likelihoods is: targets, head, map or grid, and what to do; ``print`` it.

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

    def __init__(
        self,
        joint: JointMap,
        shape: Sequence[int],
        quantization: Quantization | None = None,
        inversion: Inversion | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self._joint, self.shape = joint, tuple(shape)
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

    def to(self, device: torch.device) -> JointModel:
        """Move the map to a device."""
        self._joint.to(device)
        return self

    def data_to_state(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """A batch is states, or a sequence whose first items are states and conditioning."""
        x, cond = batch, None
        if isinstance(batch, (tuple, list)) and batch:
            x, cond = batch[0], batch[1] if len(batch) > 1 else None
        return self._fitting(x), None if self.conditional is False else cond

    def reference_velocity(self) -> Callable[..., Tensor]:
        """The map's own diagonal."""
        return self._joint.velocity
