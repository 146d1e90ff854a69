"""Distances of two sets of images by the features of a network: torchmetrics' FID and KID; precision and recall.

Frechet's distance is equation 6 of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
Nash Equilibrium", 2017, https://arxiv.org/abs/1706.08500; the kernel distance, squared maximum mean discrepancy with
the kernel ``(x.y / F + 1)^3``, is from Binkowski et al., "Demystifying MMD GANs", 2018,
https://arxiv.org/abs/1801.01401.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance
from torchmetrics.utilities import dim_zero_cat

STATES = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples", "real_kept")
"""What is known of real images, in the order of :attr:`ImageDistance.real`."""
NEIGHBOR = 3
"""Which of the nearest vectors is as far off as near still is, in precision and recall."""


class ImageDistance(FrechetInceptionDistance):
    """FID, and on request KID, precision and recall, over batches of features and over processes.

    In double precision. Of real images sums can be taken out (:attr:`real`) and set in another one, so that they are
    computed once for all samples that are compared with them.

    Args:
        num_features: Number of features.
        kid: Also the kernel distance: 100 subsets of 1,000, or of all features where a set has fewer.
        precision_recall: Also precision and recall.
        kwargs: torchmetrics' own, such as ``sync_on_compute``.
    """

    real_kept: list[Tensor]
    fake_kept: list[Tensor]

    def __init__(self, num_features: int, kid: bool = False, precision_recall: bool = False, **kwargs: Any) -> None:
        given = nn.Identity()
        given.num_features = num_features  # type: ignore[assignment]
        super().__init__(feature=given, reset_real_features=False, **kwargs)
        self.kid, self.precision_recall = kid, precision_recall
        for name in ("real_kept", "fake_kept"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool, keep: int | None = None) -> None:
        """Add features ``(B, F)`` of a batch, of real images or of samples; a process without images adds ``(0, F)``.

        The first ``keep`` of them, by default all, are kept for what needs the features themselves.
        """
        features = features.detach().to(self.device).double()
        super().update(features, real)
        # an empty part as well: processes gather as many tensors of as many axes
        if self.kid or self.precision_recall:
            (self.real_kept if real else self.fake_kept).append(features[:keep])

    @property
    def real(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of real images, on the CPU: sum ``(F,)`` and products ``(F, F)`` of features, number, features ``(N, F)``.

        Of all processes between ``sync()`` and ``unsync()``, else of this one.
        """
        total, products, count, kept = (getattr(self, name) for name in STATES)
        features = dim_zero_cat(kept) if len(kept) else total.new_zeros(0)
        return total.cpu(), products.cpu(), count.cpu(), features.reshape(-1, len(total)).cpu()

    @real.setter
    def real(self, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        for name, value in zip(STATES, state, strict=True):
            value = value.to(self.device)
            setattr(self, name, [value] if name == "real_kept" else value.clone())
        self._computed = None

    def reset(self) -> None:
        """Forget the samples; what is known of real images stays."""
        kept = list(self.real_kept)  # it is emptied
        super().reset()
        self.real_kept = kept

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        """Distances by name: ``fid``, and where asked for ``kid``, ``kid_std``, ``precision`` and ``recall``.

        ``kid_std`` is the standard deviation over subsets. Fewer than 2 real images or samples are a ``RuntimeError``.
        """
        # rounding makes it slightly negative where the sets agree; NaN stays
        figures = {"fid": max(float(super().compute()), 0.0)}
        if not (self.kid or self.precision_recall):
            return figures
        size = len(self.real_features_sum)
        real, fake = (dim_zero_cat(kept).reshape(-1, size) for kept in (self.real_kept, self.fake_kept))
        if self.kid:
            least = min(1000, len(real), len(fake))
            kernel = KernelInceptionDistance(feature=nn.Identity(), subset_size=least, sync_on_compute=False)
            kernel.update(real, real=True)
            kernel.update(fake, real=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mean, std = kernel.compute()
            figures |= {"kid": float(mean), "kid_std": float(std)}
        if self.precision_recall:
            precision, recall = precision_recall(fake, real)
            figures |= {"precision": precision, "recall": recall}
        return figures


def precision_recall(samples: Tensor, real: Tensor, chunk: int = 1024) -> tuple[float, float]:
    """Share of samples that lie near real images, and share of real images that lie near samples; features ``(N, F)``.

    Near means within the ball around a vector of the other set that reaches that set's third nearest vector.
    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
    https://arxiv.org/abs/1904.06991. Both depend on the sizes of the sets: give as many samples as real images, at
    least four of each. Distances of ``chunk`` vectors to all others are held at a time.
    """
    if min(len(samples), len(real)) <= NEIGHBOR:
        raise ValueError(f"there are {len(samples)} samples and {len(real)} real images; at least {NEIGHBOR + 1} each")
    samples, real = samples.double(), real.double()

    def covered(points: Tensor, centers: Tensor) -> float:
        # a vector is its own nearest
        radius = torch.cat([torch.cdist(part, centers).kthvalue(NEIGHBOR + 1).values for part in centers.split(chunk)])
        inside = [(torch.cdist(part, centers) <= radius).any(1) for part in points.split(chunk)]
        return float(torch.cat(inside).double().mean())

    return covered(samples, real), covered(real, samples)
