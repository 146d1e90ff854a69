"""Few-step likelihoods over a data set, and beside a reference on a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from f2d2_lightning.metrics import LikelihoodAgreement

__all__ = ["LikelihoodEvaluation"]


class LikelihoodEvaluation:
    """Gathers likelihoods at several step counts.

    Args:
        steps: Step counts.
        dim: Dimensions of one sample.
        levels: Levels of discrete data: results in bits per dimension; ``None``: in nats.
        low: Lower edge of the range that the levels fill.
        high: Upper edge.
        device: Where the likelihoods are.
    """

    def __init__(
        self, steps: Sequence[int], dim: int, levels: int | None, low: float, high: float, device: torch.device
    ) -> None:
        self.steps = tuple(steps)
        agreement = lambda: LikelihoodAgreement(dim, levels, low, high)  # noqa: E731
        self._all = {k: agreement().to(device) for k in self.steps}
        self._compared = {k: agreement().to(device) for k in self.steps}
        self._failed = {k: MeanMetric().to(device) for k in self.steps}
        self._counts = {k: (SumMetric().to(device), SumMetric().to(device)) for k in self.steps}
        for metric in (*self._all.values(), *self._compared.values()):
            # a process without samples takes part in gathering all the same, or the others would wait for it
            metric.update(torch.zeros(0, device=device), torch.zeros(0, device=device))
        self.compared = 0

    def update(self, values: Mapping[int, Tensor], reference: Tensor | None) -> None:
        """Add a batch.

        Args:
            values: Log-likelihoods by step count, ``(B,)``, nats; those that are not finite count as failed.
            reference: The reference's for the first samples of the batch, ``(C,)``, nats, ``C <= B``.
        """
        for k, value in values.items():
            good = value.isfinite()
            self._failed[k].update((~good).float())
            self._all[k].update(value[good], value[good])
            kept = good[:0] if reference is None else good[: len(reference)]
            if reference is not None:
                self._compared[k].update(value[: len(reference)][kept], reference[kept])
            for count, chosen in zip(self._counts[k], (good, kept), strict=True):
                count.update(chosen.float().sum())
        self.compared += 0 if reference is None else len(reference)

    def results(self) -> dict[str, Tensor]:
        """Metrics by name, over all processes; ``unconverged_k`` is the share of samples without a likelihood.

        What no sample has is left out.
        """
        named: dict[str, Tensor] = {}
        for k in self.steps:
            found, compared = (float(count.compute()) for count in self._counts[k])
            if found:
                result = self._all[k].compute()
                named |= {f"nll_{k}": result.nll, f"nll_standard_error_{k}": result.nll_standard_error}
            if compared:
                result = self._compared[k].compute()
                for name in ("gap", "absolute_error", "correlation", "reference_nll"):
                    named[f"{name}_{k}"] = getattr(result, name)
            named[f"unconverged_{k}"] = self._failed[k].compute()
        return {name: value.float() for name, value in named.items()}
