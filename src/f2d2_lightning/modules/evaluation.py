"""Validation and test of a model with likelihoods: beside its reference, and on the way there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from f2d2_lightning.adapters import check_differentiable
from f2d2_lightning.divergence._tangents import DerivativeError
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.likelihood.determinant import EXACT_UP_TO, Determinant
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.reference import LOOKED_AT, Reference
from f2d2_lightning.metrics.evaluation import LikelihoodEvaluation
from f2d2_lightning.objectives.targets import PASSES
from f2d2_lightning.training.batches import rows_of_batches
from f2d2_lightning.utils.conditions import Cond, moved, some_of
from f2d2_lightning.utils.fingerprints import fingerprint
from f2d2_lightning.utils.measuring import clock
from f2d2_lightning.utils.processes import Places, process_count
from f2d2_lightning.utils.seeding import own_random_state
from f2d2_lightning.utils.sharding import is_sharded

if TYPE_CHECKING:
    from f2d2_lightning.modules.distillation import DistilledModel


class SharedReference:
    """What a reference leaves open, chosen on the first states of an evaluation, by all processes alike.

    A fixed one keeps what was chosen first, in a resumed run too. The velocity of a model that trains is looked at anew
    in every evaluation: it is smooth at the start, and what was enough for it then is not later. The first ``most``
    samples of a loader are compared, or all; ``identify`` gives a fingerprint of what a velocity's answers depend on,
    where that is known.
    """

    def __init__(
        self,
        model: LikelihoodModel,
        trainer: L.Trainer,
        most: int | None = None,
        identify: Callable[[Callable[..., Tensor]], str | None] = lambda velocity: None,
    ) -> None:
        self.model, self.trainer, self.most, self.identify = model, trainer, most, identify
        self._settled = most == 0 or not getattr(model.reference, "open", False)

    def settle(self, x: Tensor, cond: Cond | None) -> None:
        """Choose; nothing after the first time. Every process must call it, and the first one's states decide."""
        velocity = None if self._settled else self.model.reference_velocity()
        self._settled = True
        if velocity is None:
            return
        model, strategy, known = self.model, self.trainer.strategy, self.model.reference_choice
        identity = self.identify(velocity)
        fits = known is not None and known.measured and model.reference.allows(known.reference)
        kept = known if model.reference_fixed and fits else None
        other = kept is not None and kept.identity != identity
        # a sharded network is called equally often by all processes; each has a device of its own
        few = (x[:LOOKED_AT].cpu(), moved(some_of(cond, slice(LOOKED_AT)), "cpu"))
        choice, (x, cond) = strategy.broadcast((None if other else kept, few))
        if choice is None:
            x, cond = x.to(model.device), moved(cond, model.device)
            choice = strategy.broadcast(replace(model.reference.chosen(velocity, x, cond), identity=identity))
        model.reference_choice = choice
        before = model.said_reference if known is None else known.reference
        model.said_reference = choice.reference
        if other or before != choice.reference:
            said = choice.said(Places(self.trainer).expected(self.most), self.trainer.world_size)
            if other:
                said += "; chosen anew, since the teacher is not the one that it was chosen for before"
            (rank_zero_info if choice.good else rank_zero_warn)(said)

    def finish(self) -> None:
        """At the end: a process without samples takes part all the same, or the others would wait for it."""
        if process_count() > 1:
            self.settle(torch.zeros(0, device=self.model.device), None)
        choice = self.model.reference_choice
        if choice is not None and not choice.measured:
            # too few states say nothing of the next ones
            self.model.reference_choice = None


IN_TRAINING = 64
"""Samples that are compared with the reference while a model trains, where nothing is said."""
OWN, OWN_IN_TEST = 2**12, 2**18
"""Derivatives that a validation, and a test, may take to compare the head with the map's own changes of volume."""
OWN_SHARE = 0.05
"""Of the evaluations between two validations: most such derivatives while a model trains, where they only estimate."""


class Evaluation:
    """What a module and a callback do in validation and test.

    With ``check`` the derivative of what the reference integrates is compared with differences, once an evaluation.
    """

    def __init__(self, model: DistilledModel, check: bool = True) -> None:
        self.model, self.check = model, check
        self.likelihoods: LikelihoodEvaluation | None = None
        self._references: dict[str | None, tuple[Tensor, Tensor | None]] = {}
        self._identity: tuple[Any, str | None] = None, None
        self._doubted: set[str] = set()
        # whose derivative was compared with differences
        self._checked: Any = None
        self._cost = (0.0, 0)  # seconds, evaluations per sample
        self._owned, self._sharded = 0, False

    def start(self, trainer: L.Trainer) -> None:
        """Begin a pass over the data."""
        model = self.model
        self._places = Places(trainer)
        training = trainer.state.fn == "fit"
        self._most = IN_TRAINING if model.reference_samples is None and training else model.reference_samples
        self._shared = SharedReference(model, trainer, self._most, self._identity_of)
        self._identity, self._checked = (None, None), None
        self.likelihoods = LikelihoodEvaluation(model.steps, model.dim, model.quantization, model.device, model.draws)
        derivatives = Determinant().derivatives(model.dim) * sum(model.steps)
        most = OWN_IN_TEST if trainer.testing else OWN
        if training and model.dim > EXACT_UP_TO:
            most = int(min(most, OWN_SHARE * _trained_between(trainer)))
        # all processes must call a sharded network equally often
        self._sharded = process_count() > 1 and is_sharded(model.joint)
        self._owned = 0 if self._sharded else min(64, most // derivatives)
        if not model.reference_fixed:
            # the model's own diagonal has changed since
            self._cost = (0.0, 0)

    @torch.no_grad()
    def add(self, x: Tensor, cond: Cond | None, loader: int = 0) -> None:
        """Likelihoods of a batch of states ``(B, ...)`` at ``t = 1``, of one of the trainer's loaders."""
        assert self.likelihoods is not None
        model = self.model
        place, counted = self._places.take(len(x), loader)
        most = self._most
        compared = int((counted if most is None else counted & (place < most)).sum())
        velocity = model.reference_velocity()
        reference = error = None
        self._shared.settle(x, cond)
        if compared > 0 and velocity is not None:
            # places ascend
            reference, error = self.reference(velocity, x[:compared], some_of(cond, slice(compared)))
        sample = model.sample if Direction.TO_DATA in model.directions else None
        few = int((counted & (place < self._owned)).sum())
        own = self._own_density(x[:few], some_of(cond, slice(few))) if few else None
        self.likelihoods.evaluate(model.log_prob, sample, x, cond, reference, error, counted, own, not self._sharded)

    def _own_density(self, x: Tensor, cond: Cond | None) -> dict[int, Tensor] | None:
        """Log-likelihoods by the changes of volume of the map's own jumps, by step count, ``(B,)``, nats.

        ``None``, with a warning, where the network has no derivative by which to find them.
        """
        try:
            with own_random_state(x.device, 0):
                # a user's own log_prob need not know of determinants
                own = partial(LikelihoodModel.log_prob, self.model, determinant=Determinant())
                return {k: own(x, k, cond).value for k in self.model.steps}
        except DerivativeError as error:
            rank_zero_warn(f"the head is not compared with the map's own density: {error}")
            self._owned = 0
            return None

    def log(self, log: Callable[[str, Tensor], None], prefix: str) -> None:
        """Log what was gathered, under names that begin with ``prefix``, and say what is doubtful."""
        if self.likelihoods is None:
            return
        self._shared.finish()
        del self._shared, self._places  # a module that holds its trainer cannot be pickled
        results = self.likelihoods.results()
        if Direction.TO_NOISE in self.model.directions:
            # nothing is inverted, and a sample without a likelihood is an accident
            results = {name: v for name, v in results.items() if not name.startswith("unconverged") or bool(v > 0)}
        if prefix.startswith("val"):
            self.model.error_bars = self.likelihoods.error_bars() or self.model.error_bars
        else:
            results |= self.likelihoods.covered(self.model.error_bars)
        # the reference's samples are the same for every step count
        references = [results.pop(name) for name in list(results) if name.startswith("reference_nll")]
        for name, value in [*results.items(), *(("reference_nll", value) for value in references[-1:])]:
            log(f"{prefix}{name}", value)
        doubts = self.likelihoods.doubts()
        doubtful = {n for n, v in results.items() if n.startswith(("doubtful", "unconverged")) and bool(v > 0)}
        # validations while a model trains do not say again what they log
        if doubts and not (prefix.startswith("val") and doubtful and doubtful <= self._doubted):
            rank_zero_warn(doubts)
        self._doubted |= doubtful

    # --- the reference ---

    def reference(self, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor | None]:
        """Reference log-likelihoods, ``(B,)``, nats, and their standard errors over probes where those are known.

        Computed once per batch of points, and kept while what answers stays the same.
        """
        identity = self._identity_of(velocity)
        solver = self.model.settled_reference(velocity, x, cond, identity)
        key = identity and fingerprint(str(solver), identity, str(x.device), x, cond)
        if key in self._references:
            value, error = self._references[key]
            return value.to(x.device), None if error is None else error.to(x.device)
        value, error = self._integrated(solver, velocity, x, cond)
        if key is not None:
            self._references[key] = value.cpu(), None if error is None else error.cpu()
        return value, error

    def settled(self, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None) -> Reference:
        """The model's reference with nothing left open, chosen for this velocity."""
        return self.model.settled_reference(velocity, x, cond, self._identity_of(velocity))

    def _integrated(
        self, solver: Reference, velocity: Callable[..., Tensor], x: Tensor, cond: Cond | None
    ) -> tuple[Tensor, Tensor | None]:
        # a callback wraps its network anew for every batch
        asked = getattr(velocity, "__self__", velocity) if self.model.reference_fixed else self.model
        if self.check and self._checked is not asked:
            check_differentiable(velocity, x, cond, getattr(self.model.reference, "mode", "forward"))
            self._checked = asked
        start = clock(x.device)
        answer = solver(velocity, x, cond)
        self._cost = (self._cost[0] + clock(x.device) - start, answer.evaluations)
        return answer.value, answer.standard_error

    def _identity_of(self, velocity: Callable[..., Tensor]) -> str | None:
        """What a velocity's answers depend on: its weights; ``None`` if that is not known, or changes anyway."""
        owner = getattr(velocity, "__self__", velocity)
        if not self.model.reference_fixed or not isinstance(owner, nn.Module) or is_sharded(owner):
            return None
        if self.likelihoods is None or self._identity[0] is not owner:
            # weights stay as they are during an evaluation
            self._identity = owner, fingerprint(owner)
        return self._identity[1]

    # --- results ---

    def compared_values(self) -> tuple[dict[int, Tensor], Tensor]:
        """Negative log-likelihoods by step count, and the reference's, each ``(N,)``, that this process compared."""
        if self.likelihoods is None:
            raise ValueError("nothing was evaluated yet; validate or test first")
        return self.likelihoods.compared_values()

    def table(self) -> list[dict[str, Any]]:
        """Rows: one per step count, and one (``steps`` is ``None``) of the reference; none before an evaluation."""
        if self.likelihoods is None:
            return []
        rows: list[dict[str, Any]] = list(self.likelihoods.rows())
        seconds, evaluations = self._cost
        last, count = rows[-1], len(self.compared_values()[1])
        rows.append(
            {
                "steps": None,
                "nll": last["reference_nll"],
                # of all processes, as the mean is; time is this one's, and so is the number it is divided by
                "nll_standard_error": last["reference_deviation"] / math.sqrt(max(1, last["compared"])),
                "reference_nll": last["reference_nll"],
                "reference_error": last["reference_error"],
                "evaluations": evaluations,
                "milliseconds": 1e3 * seconds / max(1, count),
                "doubt": "",
            }
        )
        return rows

    def known_reference(self, values: Mapping[int, Tensor]) -> Tensor | None:
        """See :meth:`~f2d2_lightning.likelihood.LikelihoodModel.evaluated_reference`."""
        if self.likelihoods is None:
            return None
        few, reference = self.compared_values()
        last = self.model.steps[-1]
        # the evaluation keeps samples with a likelihood only, in their order, and compares the first of them
        good = values[last].isfinite().nonzero().flatten()
        count = min(len(good), len(few[last]), len(reference))
        mine, theirs = values[last][good[:count]], few[last][:count].cpu().double()
        if count == 0 or not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4):
            return None
        aligned = torch.full_like(values[last], math.nan)
        aligned[good[:count]] = reference[:count].cpu().double()
        return aligned


def _trained_between(trainer: L.Trainer) -> float:
    """Evaluations of the network that training takes from one validation to the next."""
    batches, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if batches is None or math.isinf(batches):
        batches = trainer.num_training_batches
    return PASSES * rows_of_batches(trainer.train_dataloader) * batches * (epochs or 1)
