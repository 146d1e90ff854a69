"""Few-step likelihoods over a data set, and beside a reference on a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
        make = lambda: {k: LikelihoodAgreement(dim, levels, low, high).to(device) for k in self.steps}  # noqa: E731
        self._all, self._compared = make(), make()
        self._failed = {k: torch.zeros((), device=device) for k in self.steps}
        self.seen, self.compared = 0, 0

    def update(self, values: Mapping[int, Tensor], reference: Tensor | None) -> None:
        """Add a batch.

        Args:
            values: Log-likelihoods by step count, ``(B,)``, nats; those that are not finite count as failed.
            reference: The reference's for the first samples of the batch, ``(C,)``, nats, ``C <= B``.
        """
        for k, value in values.items():
            good = value.isfinite()
            self._failed[k] += (~good).sum()
            self._all[k].update(value[good], value[good])
            if reference is not None:
                kept = good[: len(reference)]
                self._compared[k].update(value[: len(reference)][kept], reference[kept])
        self.seen += len(next(iter(values.values())))
        self.compared += 0 if reference is None else len(reference)

    def results(self) -> dict[str, Tensor]:
        """Metrics by name, over all processes; ``unconverged_k`` is a share of this process's samples."""
        named: dict[str, Tensor] = {}
        for k in self.steps:
            if self._all[k].log_prob:
                result = self._all[k].compute()
                named |= {f"nll_{k}": result.nll, f"nll_standard_error_{k}": result.nll_standard_error}
            if self._compared[k].log_prob:
                result = self._compared[k].compute()
                for name in ("gap", "absolute_error", "correlation", "reference_nll"):
                    named[f"{name}_{k}"] = getattr(result, name)
            named[f"unconverged_{k}"] = self._failed[k] / max(1, self.seen)
        return {name: value.float() for name, value in named.items()}
