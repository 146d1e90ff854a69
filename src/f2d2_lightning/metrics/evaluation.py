"""Few-step likelihoods over a data set: their mean, beside a reference on a part of it, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.utilities import dim_zero_cat

from f2d2_lightning.likelihood._log_prob import LogProb
from f2d2_lightning.likelihood.error_bars import Disagreement, ErrorBars, enough
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.likelihood.sampling import Samples
from f2d2_lightning.metrics.likelihood import Agreement, LikelihoodAgreement, MeanLikelihood, RoundTripError, doubt
from f2d2_lightning.utils.conditions import Cond, some_of
from f2d2_lightning.utils.measuring import clock
from f2d2_lightning.utils.seeding import counter_uniform, mix_seed

Made = TypeVar("Made", bound=Metric)
COMPARED = ["gap", "absolute_error", "correlation", "rank_correlation", "reference_nll"]


class Disagreements(Metric):
    """What a model disagrees with itself about, and its errors, of samples of all processes."""

    finer: list[Tensor]
    round_trip: list[Tensor]
    error: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("finer", "round_trip", "error"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, finer: Tensor, round_trip: Tensor, error: Tensor) -> None:
        """Add a batch, each ``(B,)``, nats but for the round trip."""
        for kept, new in ((self.finer, finer), (self.round_trip, round_trip), (self.error, error)):
            kept.append(new.double())

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of all samples, ``(N,)`` each."""
        return dim_zero_cat(self.finer), dim_zero_cat(self.round_trip), dim_zero_cat(self.error)


class LikelihoodEvaluation:
    """Gathers likelihoods at several step counts.

    Args:
        steps: Step counts.
        dim: Dimensions of one sample.
        quantization: Of discrete data: results in bits per dimension; ``None``: in nats.
        device: Where the likelihoods are.
        draws: Dequantization draws per sample whose log-likelihoods are averaged, the data's own first; the bound on
            the discrete code length is then less noisy, not tighter.

    Raises:
        ValueError: If ``draws`` is below 1, or above 1 for continuous data.
    """

    def __init__(
        self, steps: Sequence[int], dim: int, quantization: Quantization | None, device: torch.device, draws: int = 1
    ) -> None:
        check_draws(draws, quantization)
        self.steps = tuple(steps)
        self.draws = draws
        self.quantization = quantization
        # a process without samples takes part in gathering all the same, or the others would wait for it
        nothing = torch.zeros(0, device=device)

        def empty(metric: Made, inputs: int = 1) -> Made:
            # torchmetrics' own sums are of single precision: they lose what is small beside a mean, and count to 2^24
            metric.to(device).set_dtype(torch.float64).update(*[nothing] * inputs)
            return metric

        self._all = {k: empty(MeanLikelihood(dim, quantization)) for k in self.steps}
        self._compared = {k: empty(LikelihoodAgreement(dim, quantization), 2) for k in self.steps}
        self._disagreements = {k: empty(Disagreements(), 3) for k in self.steps}
        self._own_gaps, self._own_errors, self._negative, self._failed = (
            {k: empty(MeanMetric()) for k in self.steps} for _ in range(4)
        )
        self._counts = {k: empty(SumMetric()) for k in self.steps}
        self._round_trips = {k: empty(RoundTripError()) for k in self.steps}
        self._reference_errors = empty(RoundTripError())  # likewise a root mean square
        self._reference_failed, self._samples = empty(SumMetric()), empty(SumMetric())
        self._moments = [empty(MeanMetric(nan_strategy="error")) for _ in range(2)]
        self.seconds = dict.fromkeys(self.steps, 0.0)
        """Spent on few-step likelihoods by this process."""
        self.evaluations = dict.fromkeys(self.steps, 0)
        """Network evaluations per likelihood."""

    def evaluate(
        self,
        log_prob: Callable[[Tensor, int, Tensor | None], LogProb],
        sample: Callable[[Tensor, int, Tensor | None], Samples] | None,
        x: Tensor,
        cond: Cond | None,
        reference: Tensor | None,
        reference_error: Tensor | None = None,
        counted: Tensor | None = None,
        own: Mapping[int, Tensor] | None = None,
        once_more: bool = True,
    ) -> None:
        """Likelihoods of a batch at every step count, and its way to noise and back.

        Args:
            log_prob: ``(x, steps, cond)`` to the few-step likelihood.
            sample: ``(noise, steps, cond)`` to samples; ``None`` for a map that does not go to data.
            x: Data at ``t = 1``, ``(B, ...)``, dequantized if they were discrete.
            cond: Conditioning, first axis ``B``, or ``None``.
            reference: The reference's log-likelihoods of the first samples, ``(C,)``, nats, ``C <= B``.
            reference_error: Their standard errors over random probes, ``(C,)``, nats, where they are known.
            counted: Which samples count, ``(B,)`` bool: repeated ones, at the end, do not. All by default.
            own: Log-likelihoods of the first samples by the map's own changes of volume, by step count, ``(D,)``, nats.
            once_more: Whether those that are compared may be asked for in twice as many steps too, for error bars.
        """
        values, errors = {}, {}
        for k in self.steps:
            start = clock(x.device)
            answer = log_prob(x, k, cond)
            self.seconds[k] += clock(x.device) - start
            self.evaluations[k] = answer.evaluations
            values[k] = answer.value[None]
            if sample is not None:
                # what is lost on its way to noise is counted as such, and the others go on
                returned = sample(answer.noise.nan_to_num(0.0, 0.0, 0.0), k, cond).state
                errors[k] = (returned - x).flatten(1).double().square().mean(1)
            if own is not None:
                above = (own[k] - answer.value[: len(own[k])]) / self._all[k].unit
                self._own_gaps[k].update(above[above.isfinite()])
                self._own_errors[k].update(above[above.isfinite()].abs())
        if reference is not None:
            few, of = x[: len(reference)], some_of(cond, slice(len(reference)))
            finer = [2 * k for k in self.steps if once_more and 2 * k not in values]
            asked = {k: log_prob(few, k, of).value[None] for k in finer}
            self._compare_with_itself(values | asked, errors, reference)
        for draw in range(1, self.draws):
            assert self.quantization is not None
            again = draw_again(x, self.quantization, draw)
            for k in self.steps:
                values[k] = torch.cat((values[k], log_prob(again, k, cond).value[None]))
        if counted is not None and not bool(counted.all()):
            rows = counted.to(x.device)
            x, values = x[rows], {k: value[:, rows] for k, value in values.items()}
            errors = {k: error[rows] for k, error in errors.items()}
        for power, moment in enumerate(self._moments, start=1):
            moment.update(x.double() ** power)
        self.update(values, reference, errors, reference_error)

    def _compare_with_itself(
        self, answers: Mapping[int, Tensor], errors: Mapping[int, Tensor], reference: Tensor
    ) -> None:
        """What error bars are made of, about the samples that are compared with the reference."""
        count = len(reference)
        for k in (k for k in self.steps if 2 * k in answers):
            value, finer = (answers[n][0, :count] for n in (k, 2 * k))
            miss = errors[k][:count].sqrt() if errors else torch.zeros_like(value)
            self._disagreements[k].update(finer - value, miss, value - reference)

    def error_bars(self, coverage: float = 0.9) -> dict[int, ErrorBars]:
        """By step count, calibrated on what was compared; none where that was too little."""
        bars = {}
        for k, metric in self._disagreements.items():
            finer, miss, error = metric.compute()
            if enough(int((finer + miss + error).isfinite().sum()), coverage):
                bars[k] = ErrorBars.calibrated(Disagreement(finer, miss), error, coverage)
        return bars

    def covered(self, bars: Mapping[int, ErrorBars]) -> dict[str, Tensor]:
        """How often the reference lay within error bars, and their mean half width in the metrics' unit."""
        named = {}
        for k in (k for k in self.steps if k in bars):
            *parts, error = self._disagreements[k].compute()
            width = bars[k](Disagreement(*parts))
            good = error.isfinite() & ~width.isnan()
            if bool(good.any()):
                named[f"error_covered_{k}"] = (error.abs() <= width)[good].double().mean()
                named[f"error_bar_{k}"] = width[good].double().mean() / self._all[k].unit
        return named

    def update(
        self,
        values: Mapping[int, Tensor],
        reference: Tensor | None,
        errors: Mapping[int, Tensor] | None = None,
        reference_error: Tensor | None = None,
    ) -> None:
        """Add a batch, of which :meth:`evaluate` says more.

        Args:
            values: Log-likelihoods by step count, ``(B,)`` or ``(draws, B)``, nats; samples with one that is not
                finite count as failed. The reference's are of the first draw.
            reference: As there.
            errors: Mean squared error per dimension of each sample's way to noise and back, ``(B,)``, by step count.
            reference_error: As there.
        """
        if reference is not None:
            self._reference_failed.update((~reference.isfinite()).float())
        if reference_error is not None:
            self._reference_errors.update(reference_error[reference_error.isfinite()].square())
        self._samples.update(next(iter(values.values())).shape[-1])
        for k, value in values.items():
            value = torch.atleast_2d(value)  # of a batch of repeated samples alone none is left
            good = value.isfinite().all(0)
            self._failed[k].update((~good).float())
            self._all[k].update(value.mean(0)[good])
            self._negative[k].update((self._all[k].nll(value.mean(0)[good]) < 0).float())
            if reference is not None:
                kept = good[: len(reference)] & reference.isfinite()
                self._compared[k].update(value[0, : len(reference)][kept], reference[kept])
                self._counts[k].update(kept.float().sum())
            if errors:
                self._round_trips[k].update(errors[k][good])

    def results(self) -> dict[str, Tensor]:
        """Metrics by name, over all processes; what no sample has is left out.

        ``nll_k`` and its standard error are over all samples; ``gap_k``, ``absolute_error_k``, ``correlation_k``,
        ``rank_correlation_k`` and ``reference_nll_k`` over those that were compared; ``round_trip_k`` is the root mean
        square per dimension, in units of the state, of data to noise to data in k steps each way; ``unconverged_k``
        is the share of samples without a likelihood; ``reference_error`` the root mean square of the standard errors
        that each sample's reference has over random probes; ``doubtful_k`` is 1 where :meth:`doubts` finds something.
        ``own_density_gap_k`` and ``own_density_error_k`` compare the head's likelihoods with those of the map's own
        changes of volume, as gap and absolute error do with the reference.
        """
        named: dict[str, float] = {}
        for row in self.rows():
            names = ["unconverged"]
            names += ["nll", "nll_standard_error"] if not math.isnan(row["nll"]) else []
            names += COMPARED if not math.isnan(row["gap"]) else []
            names += ["own_density_gap", "own_density_error"] if not math.isnan(row["own_density_gap"]) else []
            names += ["round_trip"] if math.isfinite(row["round_trip"]) else []
            named |= {f"{name}_{row['steps']}": row[name] for name in names}
            named |= {f"doubtful_{row['steps']}": 1.0} if row["doubt"] else {}
            named |= {"reference_error": row["reference_error"]} if math.isfinite(row["reference_error"]) else {}
        device = self._reference_errors.device
        return {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in named.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row per step count, over all processes: every field of :class:`~f2d2_lightning.metrics.Agreement`.

        NaN where no sample has it. ``milliseconds`` are this process's, per sample; ``doubt`` is text.
        """
        rows: list[dict[str, Any]] = []
        mean, square = (moment.compute() for moment in self._moments)
        deviation = float((square - mean.square()).clamp(min=0).sqrt())  # NaN without states
        unit = self._all[self.steps[0]].unit
        reference_error, samples = float(self._reference_errors.compute()) / unit, int(self._samples.compute())
        for k in self.steps:
            row: dict[str, Any] = dict.fromkeys(Agreement._fields, math.nan)
            if (compared := int(self._counts[k].compute())) > 0:
                row |= {name: float(value) for name, value in self._compared[k].compute()._asdict().items()}
            mean, error, _ = self._all[k].compute()
            row |= {
                "own_density_gap": float(self._own_gaps[k].compute()),
                "own_density_error": float(self._own_errors[k].compute()),
                "nll": float(mean),
                "nll_standard_error": float(error),
                "round_trip": float(self._round_trips[k].compute()),
                "unconverged": float(self._failed[k].compute()),
                "steps": k,
                "samples": samples,
                "compared": compared,
                "evaluations": self.evaluations[k],
                "milliseconds": 1e3 * self.seconds[k] / max(1, int(self._all[k].count)),
                "reference_error": reference_error,
                "negative": float(self._negative[k].compute().nan_to_num()),
            }
            rows.append(row | {"doubt": doubt(row, self.quantization is not None, deviation)})
        return rows

    def doubts(self) -> str:
        """What is wrong with the likelihoods, in one sentence a step count; empty where nothing is."""
        said = []
        if (failed := int(self._reference_failed.compute())) > 0:
            said.append(f"the reference is NaN or infinite for {failed} samples, which are not compared")
        for row in self.rows():
            steps = f"the likelihood in {row['steps']} step{'s' * (row['steps'] > 1)}"
            said += [f"{steps} is doubtful: {row['doubt']}"] if row["doubt"] else []
            if row["unconverged"] > 0:
                said.append(f"{steps} is missing, NaN or infinite, for {100 * row['unconverged']:.3g} % of the samples")
        return ". ".join(said)

    def compared_values(self) -> tuple[dict[int, Tensor], Tensor]:
        """Negative log-likelihoods by step count, and the reference's, each ``(N,)``, in the metrics' unit.

        Of the samples that this process compared.
        """
        values, reference = {}, torch.empty(0)
        for k, metric in self._compared.items():
            own, other = metric.gathered()
            values[k], reference = metric.nll(own), metric.nll(other)
        return values, reference


def check_draws(draws: int, quantization: Quantization | None) -> None:
    """Raise ``ValueError`` where ``draws`` is below 1, or above 1 for continuous data."""
    levels = None if quantization is None else quantization.levels
    if draws < 1 or (draws > 1 and levels is None):
        raise ValueError(
            f"draws={draws} and levels={levels}; draws is at least 1, and more need the levels of discrete data"
        )


def draw_again(x: Tensor, quantization: Quantization, draw: int) -> Tensor:
    """Another dequantization of dequantized data, shape of ``x``.

    The noise is a function of each sample's own numbers and of ``draw``: the same in every epoch, whatever the batches
    and processes.
    """
    bits = x.float().contiguous().view(torch.int32).long().flatten(1)
    place = torch.arange(bits.shape[1], device=x.device)
    uniform = counter_uniform(bits + (place << 32), mix_seed("another draw", draw)).reshape(x.shape)
    return quantization.dequantize(quantization.quantize(x), uniform).to(x.dtype)
