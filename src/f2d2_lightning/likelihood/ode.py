r"""The flow's ODE integrated with torchdiffeq, state and divergence together.

.. math:: \frac{d}{dt}(x, \ell) = (v(x, t), -\operatorname{div} v(x, t)).

This is what a few-step likelihood is measured against: hundreds to thousands of evaluations (Chen et al., "Neural
Ordinary Differential Equations", 2018, https://arxiv.org/abs/1806.07366; https://github.com/rtqichen/torchdiffeq).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from f2d2_lightning.divergence.estimators import (
    DivergenceEstimator,
    Exact,
    Hutchinson,
    SampleProbes,
    StillProbe,
    instantaneous,
)
from f2d2_lightning.flows.paths import Point
from f2d2_lightning.likelihood._inputs import Array, as_cond, as_states, check_cond
from f2d2_lightning.likelihood._log_prob import LogProb
from f2d2_lightning.likelihood.sampling import Samples, normal_log_prob
from f2d2_lightning.likelihood.time_grids import times_near_data
from f2d2_lightning.utils.checks import at_least, checked, one_of
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.progress import tell

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")
WEIGHTS = {
    "euler": (1.0,),
    "midpoint": (0.0, 1.0),
    "heun2": (1 / 2, 1 / 2),
    "heun3": (1 / 4, 0.0, 3 / 4),
    "rk4": (1 / 8, 3 / 8, 3 / 8, 1 / 8),
}
"""Of the evaluations of one step in its result; torchdiffeq's ``rk4`` is the 3/8 rule."""
FIXED = tuple(WEIGHTS)
EXACT_UP_TO = 128
"""Dimensions up to which a likelihood takes the exact divergence by default: one derivative a dimension."""


def _field(velocity: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Cond | None], Tensor]:
    """The velocity, at times within [0, 1]: the last stage of a step may round past the end of the interval."""
    diagonal = instantaneous(velocity)
    return lambda x, t, cond: diagonal(x, t.clamp(0, 1), cond)


def _solve(
    right_side: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    initial: tuple[Tensor, ...],
    start: float,
    method: str,
    steps: int | None,
    rtol: float,
    atol: float,
    near_data: float,
) -> list[Tensor]:
    """State at the other end of time, with torchdiffeq's settings as in :func:`reference_log_prob`."""
    x = initial[0]
    one_of("method", method, (*FIXED, *ADAPTIVE))
    if method in FIXED:
        steps = 128 if steps is None else steps
        at_least(1, steps=steps)
        ascending = _fixed_times(steps, near_data).to(x)
        times, options = ascending if start == 0 else ascending.flip(0), {}
    else:
        if steps is not None:
            raise ValueError(f"method {method!r} chooses its own steps; leave steps=None and set rtol and atol")
        if near_data:
            raise ValueError(f"method {method!r} chooses its own steps; near_data={near_data} is for fixed ones")
        times = torch.tensor([start, 1 - start], dtype=x.dtype, device=x.device)
        options = {"dtype": x.dtype}
    return [v[-1] for v in odeint(right_side, initial, times, rtol=rtol, atol=atol, method=method, options=options)]


def _fixed_times(steps: int, near_data: float) -> Tensor:
    """Ascending times from 0 to 1, ``(steps + 1,)``, float64."""
    if not 0 <= near_data < 1:
        raise ValueError(f"near_data is {near_data}; it is a share of the steps, in [0, 1)")
    close = round(near_data * steps)
    even = torch.linspace(0, 1, steps - close + 1, dtype=torch.float64)
    if not close:
        return even
    return torch.cat((even, torch.tensor(times_near_data(close), dtype=torch.float64))).unique()


@checked
def reference_log_prob(
    velocity: Callable[..., Tensor],
    x: Array,
    cond: Cond | None = None,
    *,
    divergence: DivergenceEstimator | None = None,
    method: str = "heun2",
    steps: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    near_data: float = 0.0,
    seed: int | None = None,
) -> LogProb:
    """Log-likelihood of data by integrating the flow from data to noise.

    Args:
        velocity: ``(x, t, cond) -> v``, or a flow map or joint map, whose diagonal is then integrated.
        x: Data at ``t = 1``, ``(B, ...)``.
        cond: Conditioning, first axis ``B``, or 1 for all: a tensor, or a tuple or dictionary of them.
        divergence: By default :class:`~f2d2_lightning.divergence.Exact` for states of up to 128 dimensions, and one
        probe of
            :class:`~f2d2_lightning.Hutchinson` above, where the exact one takes as many derivatives an evaluation as
            there are dimensions. With Hutchinson, fixed steps draw new probes at every evaluation (their errors
            average out along the path, and their scatter from one evaluation to the next gives ``standard_error``),
            adaptive ones hold the probes of a sample fixed (the integrand must be deterministic; ``standard_error``
            then needs two probes or more).
        method: torchdiffeq's solver: ``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"`` with fixed
            steps, ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"adaptive_heun"``, ``"fehlberg2"`` adaptive.
        steps: Fixed steps; 128 if not given. Adaptive methods take none.
        rtol: Relative tolerance of adaptive solvers.
        atol: Absolute tolerance of adaptive solvers.
        near_data: Share of fixed steps that are close to the data, spread evenly in ``log(1 - t)`` from .1 to .0005,
            beside even ones. For data that are sharp there (images with point masses at black or white).
        seed: The probes of a sample are a function of this number and of the sample's own values, whatever the batch
            and the process that it is in. ``None`` draws the number from the global generator, and takes a sample's
            place in the batch for its values.

    Returns:
        ``value`` in nats, ``(B,)``. ``evaluations`` counts calls of the network with its derivative. Under
        ``torch.no_grad`` or with gradients (through the solver), as the caller says. With adaptive solvers the samples
        of a batch share their steps, so a value depends on the others within the tolerance.

    Raises:
        ValueError: If ``x``, the method or the steps are unfit.

    >>> from f2d2_lightning.flows import GaussianBaseline, GaussianFlow
    >>> flow = GaussianFlow(GaussianBaseline.from_covariance(torch.zeros(2), torch.eye(2)))
    >>> reference_log_prob(flow, torch.zeros(1, 2), steps=8).value  # -log(2 pi)
    tensor([-1.8379])
    """
    x = as_states(x, "x", velocity)
    cond = as_cond(cond, x)
    check_cond(cond, len(x), velocity)
    estimator = divergence or (Exact() if x[0].numel() <= EXACT_UP_TO else Hutchinson())
    field = _field(velocity)
    probes = 1
    fixed_probes: Tensor | None = None
    if isinstance(estimator, Hutchinson):
        probes = estimator.probes
        drawn = SampleProbes(estimator, x, seed)
        fixed_probes = drawn.draw() if method in ADAPTIVE or isinstance(estimator, StillProbe) else None
    calls, scatter = 0, _Scatter(method)
    # adaptive solvers do not know how many there will be
    expected = 0 if method in ADAPTIVE or steps is None else steps * len(WEIGHTS[method])

    def right_side(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if expected:
            tell("reference", calls, expected)
        if isinstance(estimator, Hutchinson):
            eps = drawn.draw() if fixed_probes is None else fixed_probes
            v, estimates = estimator.per_probe(field, Point(state[0], t, cond), eps)
            if probes == 1 and fixed_probes is None:
                scatter.add(t, estimates[0])
            return v, -estimates
        v, estimate, _ = estimator(field, Point(state[0], t, cond))
        return v, -estimate[None]

    initial = (x, x.new_zeros(probes, len(x)))
    noise, change = _solve(right_side, initial, 1.0, method, steps, rtol, atol, near_data)
    error = change.std(0) / probes**0.5 if probes > 1 else scatter.standard_error()
    # `change` is log p_0(noise) - log p_1(x)
    return LogProb(normal_log_prob(noise) - change.mean(0), noise, calls, standard_error=error)


class _Scatter:
    """Standard error of an integral with fixed steps, from independent errors of its integrand at each evaluation.

    Second differences of neighbouring evaluations see the errors and hardly the integrand, which is smooth.
    """

    def __init__(self, method: str) -> None:
        self.weights = WEIGHTS.get(method, ())
        self.times: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, t: Tensor, value: Tensor) -> None:
        """The integrand's value at an evaluation, ``(B,)``."""
        self.times.append(t.detach())  # looking at its value would wait for a GPU
        self.values.append(value.detach())

    def standard_error(self) -> Tensor | None:
        """``(B,)``; ``None`` from fewer than three evaluations that count."""
        stages = len(self.weights)
        if not stages or not self.values or len(self.values) % stages:
            return None
        starts = [*torch.stack(self.times[::stages]).tolist(), 0.0]
        steps = [abs(b - a) for a, b in itertools.pairwise(starts)]
        counted = [
            (step * weight, self.values[index * stages + stage])
            for index, step in enumerate(steps)
            for stage, weight in enumerate(self.weights)
            if weight
        ]
        if len(counted) < 3:
            return None
        value = torch.stack([value for _, value in counted])
        weight = torch.tensor([weight for weight, _ in counted], dtype=value.dtype, device=value.device)[:, None]
        variance = (value[:-2] - 2 * value[1:-1] + value[2:]).square() / 6
        # the first and the last evaluation have one neighbour only, and take the next one's
        variance = torch.cat((variance[:1], variance, variance[-1:]))
        return (weight.square() * variance).sum(0).sqrt()


@checked
def reference_sample(
    velocity: Callable[..., Tensor],
    noise: Array,
    cond: Cond | None = None,
    *,
    method: str = "heun2",
    steps: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    near_data: float = 0.0,
) -> Samples:
    """Samples by integrating the flow from noise to data; arguments as :func:`reference_log_prob`.

    >>> reference_sample(lambda x, t, cond: torch.ones_like(x), torch.zeros(1, 2), steps=4).state
    tensor([[1., 1.]])
    """
    noise = as_states(noise, "noise", velocity)
    cond = as_cond(cond, noise)
    check_cond(cond, len(noise), velocity)
    field, calls = _field(velocity), 0

    def right_side(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        return (field(state[0], t, cond),)

    (state,) = _solve(right_side, (noise,), 0.0, method, steps, rtol, atol, near_data)
    return Samples(state, noise, calls)
