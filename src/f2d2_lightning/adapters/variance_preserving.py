r"""Networks of the variance-preserving process, ``x_vp = alpha x_1 + beta eps`` with ``alpha^2 + beta^2 = 1``: DDPM.

Its state is that of the variance-exploding process at :math:`\sigma = \beta / \alpha`, divided by
:math:`\sqrt{1 + \sigma^2}`; noise, clean image and v-prediction say the same clean image. So a DDPM's network is a
denoiser of :mod:`f2d2_lightning.adapters.variance_exploding` whose levels are numbered by its schedule, and a step of
its velocity from level to level is a step of DDIM.

Ho et al., 2020, https://arxiv.org/abs/2006.11239; Song et al., 2021, https://arxiv.org/abs/2010.02502 (DDIM) and
https://arxiv.org/abs/2011.13456 (VP-SDE); Nichol and Dhariwal, 2021, https://arxiv.org/abs/2102.09672 (cosine);
Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512 (v-prediction)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.adapters.adapter import SHARED
from f2d2_lightning.adapters.variance_exploding import VarianceExploding
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.flows.paths import like
from f2d2_lightning.utils.checks import one_of
from f2d2_lightning.utils.conditions import Cond

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "continuous")
CONTINUOUS = 1e-5, 1.0
"""Times of the continuous schedule that its likelihoods are integrated between (Song et al., 2021)."""
MOST_TIMES = 10**5
FAINTEST = 28.0
"""Logarithm of a noise level at which hardly anything is left of the data, nor of numbers in single precision."""


@functools.lru_cache(maxsize=32)
def _log_levels(schedule: str, start: float, end: float, count: int, zero_snr: bool, device: torch.device) -> Tensor:
    """Logarithms of the noise levels of a DDPM's times 0, 1, ..., float64; without the last if it holds no data."""
    if schedule == "squaredcos_cap_v2":
        cosine = (((torch.arange(count + 1, dtype=torch.float64) / count) + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    else:
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    log_signal = torch.log1p(-betas).cumsum(0)  # of alpha^2
    if zero_snr:
        signal = (log_signal / 2).exp()
        shifted = (signal - signal[-1])[:-1] * (signal[0] / (signal[0] - signal[-1]))
        log_signal = 2 * shifted.log()
    return (0.5 * (torch.log(-torch.expm1(log_signal)) - log_signal)).to(device)


class VariancePreserving(VarianceExploding):
    """A diffusion network of DDPM's kind, as a teacher: ``net(x, time, cond) -> noise``.

    The arguments' names and values are those of the configuration of a scheduler of diffusers. ``s`` in the call is
    the time 0 to ``num_train_timesteps - 1`` as the network is trained with, and a fraction between two of them:
    ``"net(x, s / 1000, cond)"`` for one that takes it so, ``"net(x, round(s), cond)"`` for one that looks times up.
    Beyond the first and the last the nearest one is used, as :class:`VarianceExploding` says.

    Args:
        call: The call; ``x`` is the state as the network wants it, ``s`` its time.
        directions: Orders of time that the network was trained for.
        prediction_type: What it answers: ``"epsilon"`` (the noise), ``"sample"`` (the clean image) or
            ``"v_prediction"``.
        beta_schedule: ``"linear"`` (DDPM, ADM, DiT), ``"scaled_linear"`` (latent and stable diffusion),
            ``"squaredcos_cap_v2"`` (the cosine of improved DDPM), or ``"continuous"`` for the VP-SDE of score_sde,
            whose time ``s`` runs to 1 (``"net(x, 999 * s)"`` there).
        beta_start: The schedule's beginning; by default .0001, of the continuous one .1.
        beta_end: The schedule's end; by default .02, of the continuous one 20.
        num_train_timesteps: How many times there are.
        rescale_betas_zero_snr: Whether the schedule is stretched until nothing is left of the data at its last time
            (Lin et al., 2023, https://arxiv.org/abs/2305.08891); the time before it then stands for that one.
        learned_variance: Whether the network answers a variance beside it, in as many channels (improved DDPM, ADM,
            DiT): the first half counts.
        kwargs: ``output``, ``channels_last``, ``null_label``, ``classes``, ``time_axes`` as :class:`Adapter`.

    Raises:
        ValueError: If an argument is none of the above, or betas do not rise within 0 and 1.

    >>> network = lambda x, time: 0 * x  # sees no noise: at time 1/2 half of the state's way to data is left
    >>> VariancePreserving("net(x, s)")(network).velocity(torch.ones(1, 2), 0.5)
    tensor([[2., 2.]])
    """

    _arguments = (
        *("call", "directions", "prediction_type", "beta_schedule", "beta_start", "beta_end"),
        *("num_train_timesteps", "rescale_betas_zero_snr", "learned_variance", *SHARED),
    )
    readings = "prediction_type", PREDICTIONS

    def __init__(
        self,
        call: str = "net(x, s, cond)",
        directions: Direction | str = "none",
        prediction_type: str = "epsilon",
        beta_schedule: str = "linear",
        beta_start: float | None = None,
        beta_end: float | None = None,
        num_train_timesteps: int = 1000,
        rescale_betas_zero_snr: bool = False,
        learned_variance: bool = False,
        **kwargs: Any,
    ) -> None:
        self._refuse_unfit(kwargs)
        one_of("prediction_type", prediction_type, PREDICTIONS)
        one_of("beta_schedule", beta_schedule, SCHEDULES)
        self.continuous = beta_schedule == "continuous"
        default = (0.1, 20.0) if self.continuous else (0.0001, 0.02)
        self.beta_start, self.beta_end = (
            value if given is None else given for given, value in zip((beta_start, beta_end), default, strict=True)
        )
        if not 0 < self.beta_start < self.beta_end or (self.beta_end >= 1 and not self.continuous):
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} of schedule {beta_schedule!r}; they are "
                "positive, in this order" + ("" if self.continuous else ", and below 1")
            )
        if rescale_betas_zero_snr and self.continuous:
            raise ValueError("rescale_betas_zero_snr is of counted times; beta_schedule='continuous' has none")
        if not (fewest := 2 + rescale_betas_zero_snr) <= num_train_timesteps <= MOST_TIMES:
            raise ValueError(f"num_train_timesteps={num_train_timesteps}; it is {fewest} to {MOST_TIMES}")
        self.prediction_type, self.beta_schedule = prediction_type, beta_schedule
        self.num_train_timesteps, self.learned_variance = int(num_train_timesteps), learned_variance
        self.rescale_betas_zero_snr = rescale_betas_zero_snr
        if self.continuous:
            integrals = [time * (self.beta_start + self._slope * time / 2) for time in CONTINUOUS]
            first, last = (math.log(math.expm1(min(integral, 2 * FAINTEST))) / 2 for integral in integrals)
        else:
            first, last = self._levels(torch.device("cpu"))[[0, -1]].tolist()
        if not last < FAINTEST - 1:
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} leave nothing of the data at the last time "
                f"of schedule {beta_schedule!r}; give smaller ones"
            )
        super().__init__(call, directions, sigma_min=math.exp(first), sigma_max=math.exp(last), **kwargs)

    @property
    def _slope(self) -> float:
        return self.beta_end - self.beta_start

    def _levels(self, device: torch.device) -> Tensor:
        betas = self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps
        return _log_levels(*betas, self.rescale_betas_zero_snr, device)

    def time_of(self, sigma: Tensor) -> Tensor:
        """The network's time at a noise level, ``(B,)``: between two times evenly in the level's logarithm."""
        if self.continuous:
            integral = torch.log1p(sigma.square())  # of beta, up to this time
            return 2 * integral / (self.beta_start + (self.beta_start**2 + 2 * self._slope * integral).sqrt())
        levels, log_sigma = self._levels(sigma.device).to(sigma.dtype), sigma.log()
        above = torch.searchsorted(levels, log_sigma.detach()).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return (above - 1 + (log_sigma - low) / (high - low)).clamp(0, len(levels) - 1)

    def _part(self, answer: Any) -> Tensor:
        answer = super()._part(answer)
        return answer.chunk(2, -1 if self.channels_last else 1)[0] if self.learned_variance else answer

    def _clean(
        self, network: Callable[..., Any], state: Tensor, sigma: Tensor, sigma_end: Tensor, cond: Cond | None
    ) -> Tensor:
        norm = like((1 + sigma.square()).sqrt(), state)  # 1 / alpha
        answer = self._ask(network, state / norm, self.time_of(sigma), self.time_of(sigma_end), cond)
        if self.prediction_type == "epsilon":
            return state - like(sigma, state) * answer
        if self.prediction_type == "v_prediction":
            return state / norm.square() - like(sigma, state) / norm * answer
        return answer


class LatentConsistency(VariancePreserving):
    """A latent consistency model: from any time of a DDPM's schedule to data, no end time.

    Luo et al., 2023, https://arxiv.org/abs/2310.04378. The share of the state in its answer, ``c_skip``, is below .003
    from time 1 on and is taken for none, so that a map made with ``interval=`` can learn to leave the data. As
    :class:`~f2d2_lightning.adapters.Consistency`, it has no instantaneous velocity without.
    """

    endpoint_only = True

    def __init__(
        self,
        call: str = "net(x, s, cond)",
        directions: Direction | str = "to_data",
        prediction_type: str = "epsilon",
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        **kwargs: Any,
    ) -> None:
        super().__init__(call, directions, prediction_type, beta_schedule, beta_start, beta_end, **kwargs)
