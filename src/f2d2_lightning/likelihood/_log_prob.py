r"""Log-likelihood of data in a few evaluations of a joint flow map.

From data at ``t = 1`` to noise at ``t = 0`` over times ``1 = t_0 > ... > t_K = 0``:

.. math:: \log p_1(x) = \log \mathcal N(z; 0, I) - \sum_k D(x_k, t_k, t_{k+1})\,(t_k - t_{k+1}).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import Direction, FlowMap, JointMap
from f2d2_lightning.likelihood._answers import Answer
from f2d2_lightning.likelihood._inputs import Array, as_cond, as_states, check_cond
from f2d2_lightning.likelihood.determinant import Determinant
from f2d2_lightning.likelihood.inversion import Inversion
from f2d2_lightning.likelihood.sampling import normal_log_prob, walk
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.utils.checks import checked
from f2d2_lightning.utils.conditions import Cond, some_of


@dataclass(frozen=True, repr=False)
class LogProb(Answer):
    """Log-likelihoods and how they came about."""

    value: Tensor
    """``log p(x)``, ``(B,)``, nats. NaN where an inversion did not converge."""
    noise: Tensor
    """Where each sample lands at ``t = 0``, shape of ``x``."""
    evaluations: int
    """Network evaluations per sample (a Jacobian-vector product counts as one more)."""
    converged: Tensor | None = None
    """Whether every step's inversion converged, ``(B,)``; ``None`` if nothing was inverted."""
    standard_error: Tensor | None = None
    """Of ``value`` over random probes, ``(B,)``, nats; ``None`` if nothing was random or it is not known."""


@checked
def log_prob(
    joint_map: JointMap | FlowMap,
    x: Array,
    steps: int | Sequence[float] = 4,
    cond: Cond | None = None,
    *,
    inversion: Inversion | None = None,
    start: Array | None = None,
    determinant: Determinant | str | None = None,
) -> LogProb:
    """Log-likelihood of data.

    Args:
        joint_map: A joint flow map that goes to noise; one that only goes to data needs ``inversion``.
        x: Data at ``t = 1``, ``(B, ...)``, dequantized if they were discrete. They are brought to dtype and device of
            the map's weights; arrays and lists become tensors.
        steps: Number of uniform steps, or the times themselves.
        cond: Conditioning, first axis ``B``, or 1 for all: a tensor, or a tuple or dictionary of them.
        inversion: Invert the map's steps to data instead of using its steps to noise. Unconverged samples get
            NaN, ``converged`` says which, and a warning counts them.
        start: Noise near what leads to ``x``, shape of ``x``, where the inversion begins: that of an earlier answer,
            of a map that has been trained on since. Few iterations are then needed, and where several noises lead to
            ``x`` it is the near one. By default each step begins where it lands.
        determinant: ``"exact"``, ``"estimate"`` or a :class:`Determinant`: take the change of volume of the map's own
            jumps in the place of what the head says of them; an estimate has no gradients. With ``inversion`` that is
            the density of the sampler itself; of a map to noise the density that it pulls back, of which a sampler that
            it inverts draws.

    Returns:
        ``value`` in nats, ``(B,)``; one evaluation per step without inversion. Under ``torch.no_grad`` or with
        gradients, as the caller says.

    Raises:
        ValueError: If ``x`` is unfit or the map has no way to noise.

    >>> from f2d2_lightning.flows import GaussianBaseline, GaussianFlow
    >>> flow = GaussianFlow(GaussianBaseline.from_covariance(torch.zeros(2), torch.eye(2)))
    >>> log_prob(flow, torch.zeros(1, 2), steps=1).value  # -log(2 pi)
    tensor([-1.8379])
    """
    if not isinstance(joint_map, JointMap):
        raise ValueError(
            f"log_prob needs a joint map, and {type(joint_map).__name__} has no divergence; "
            "wrap it: JointFlowMap(flow_map, DivergenceHead(...))"
        )
    x = as_states(x, "x", joint_map)
    cond = as_cond(cond, x)
    check_cond(cond, len(x), joint_map)
    grid, determinant = time_grid(steps, to_noise=True), Determinant.said(determinant)
    if start is not None:
        start = as_states(start, "start", joint_map)
        if inversion is None or start.shape != x.shape:
            came = "no inversion" if inversion is None else f"shape {tuple(start.shape)}"
            raise ValueError(
                f"start is where an inversion begins, for each state of shape {tuple(x.shape)}; got {came}; leave it "
                "out, or give inversion=Inversion() and the noise of an earlier answer for the same states"
            )
    if inversion is not None:
        return _by_inversion(joint_map, x, grid, cond, inversion, determinant, start)
    if Direction.TO_NOISE not in joint_map.directions:
        raise ValueError(
            f"{type(joint_map).__name__} only goes to data (directions={joint_map.directions}), and the likelihood of "
            "data needs the way to noise; pass inversion=Inversion(), or train the map in both directions"
        )
    way = walk(joint_map, x, grid, cond, determinant)
    value = normal_log_prob(way.state) - way.change
    return LogProb(value, way.state, way.evaluations, standard_error=way.standard_error)


@torch.no_grad()
def _led_to(joint_map: JointMap, noise: Tensor, grid: Sequence[float], cond: Cond | None) -> list[Tensor]:
    """Where noise is after each of the map's steps to data but the last, the latest first; itself comes last."""
    states = [noise]
    for t, s in itertools.pairwise(grid[:0:-1]):
        states.append(joint_map.jump(states[-1], t, s, cond).state)
    return states[::-1]


def _by_inversion(
    joint_map: JointMap,
    x: Tensor,
    grid: list[float],
    cond: Cond | None,
    inversion: Inversion,
    determinant: Determinant | None,
    start: Tensor | None = None,
) -> LogProb:
    starts = [None] * (len(grid) - 1) if start is None else _led_to(joint_map, start, grid, cond)
    state, change, variance = x, x.new_zeros(len(x)), None
    evaluations = 0 if start is None else len(grid) - 2
    converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
    keys = None if determinant is None else determinant.keys(x)
    for (t, s), begin in zip(itertools.pairwise(grid), starts, strict=True):

        def displacement(y: Tensor, rows: slice | Tensor, s: float = s, t: float = t) -> Tensor:
            return (t - s) * joint_map(y, s, t, some_of(cond, rows)).velocity

        solution = inversion.solve(displacement, state, begin, rowwise=True)
        state = solution.state
        converged = converged & solution.converged
        way = walk(joint_map, state, [s, t], cond, determinant, keys)
        change = change + way.change
        evaluations += solution.evaluations + way.evaluations
        if way.standard_error is not None:
            variance = way.standard_error.square() + (0.0 if variance is None else variance)
    value = normal_log_prob(state) + change
    if not bool(converged.all()):
        warnings.warn(
            f"inversion did not converge for {int((~converged).sum())} of {len(x)} samples; their log-likelihood is "
            "NaN (more iterations, more steps, or method='newton' may help; `converged` says which)",
            stacklevel=4,
        )
        value = torch.where(converged, value, torch.full_like(value, torch.nan))
    return LogProb(value, state, evaluations, converged, None if variance is None else variance.sqrt())
