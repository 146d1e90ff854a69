"""Few-step sampling, with the samples' own log-density on request."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import FlowMap, JointMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.likelihood._answers import Answer
from f2d2_lightning.likelihood._inputs import Array, as_cond, as_states, check_cond
from f2d2_lightning.likelihood.determinant import Determinant
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.utils.checks import at_least, checked
from f2d2_lightning.utils.conditions import Cond


@dataclass(frozen=True, repr=False)
class Samples(Answer):
    """Samples and, where asked for, how likely the model finds them."""

    state: Tensor
    """Samples at ``t = 1``, ``(B, ...)``."""
    noise: Tensor
    """What they were made from at ``t = 0``, ``(B, ...)``."""
    evaluations: int
    """Network evaluations per sample."""
    log_prob: Tensor | None = None
    """Log-density of each sample, ``(B,)``, nats."""
    standard_error: Tensor | None = None
    """Of :attr:`log_prob` over random probes, ``(B,)``, nats; ``None`` if nothing was random or it is not known."""


def normal_log_prob(z: Tensor) -> Tensor:
    """Log-density of ``N(0, I)``, ``(B, ...) -> (B,)``, nats."""
    return -0.5 * (z.reshape(len(z), -1).square().sum(-1) + z[0].numel() * math.log(2 * math.pi))


def draw_noise(
    count: int,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws of ``N(0, I)``, ``(count, *shape)``: from the global generator, a given one, or one of a ``seed``.

    Those of a seed are drawn on the CPU, and so are the same on every device. Seeds that differ by 2^64 are one.
    """
    at_least(1, samples=count)
    if seed is not None:
        if generator is not None:
            raise ValueError(f"seed={seed} and generator= are both given; one of them says what is drawn")
        generator = torch.Generator().manual_seed(int(seed) % 2**64)
    where = device if generator is None else generator.device
    return torch.randn(count, *shape, generator=generator, device=where).to(device)


class Way(NamedTuple):
    """Several jumps, one after the other."""

    state: Tensor
    """Where they lead, shape of the states."""
    change: Tensor
    """Of the log-density, ``(B,)``, nats."""
    evaluations: int
    """Of the network, per sample."""
    standard_error: Tensor | None
    """Of ``change`` over random probes, ``(B,)``; ``None`` if nothing was random or it is not known."""


def walk(
    joint_map: JointMap,
    x: Tensor,
    grid: Sequence[float],
    cond: Cond | None,
    determinant: Determinant | None,
    keys: Tensor | None = None,
) -> Way:
    """Jump from time to time, with the head's changes of log-density or those of the jumps' own volumes.

    ``keys`` are those of the determinant's probes, ``(B,)``; by default of ``x`` (:meth:`Determinant.keys`).
    """
    keys = determinant.keys(x) if keys is None and determinant is not None else keys
    change, evaluations, variances = x.new_zeros(len(x)), 0, []
    for s, t in itertools.pairwise(grid):
        evaluations += 1
        if determinant is None:
            x, delta = joint_map.jump(x, s, t, cond)
        else:
            (x, delta), error = determinant.jump(joint_map, x, s, t, cond, keys)
            evaluations += determinant.derivatives(x[0].numel())
            variances += [] if error is None else [error.square()]
        change = change + delta
    return Way(x, change, evaluations, torch.stack(variances).sum(0).sqrt() if variances else None)


@checked
def sample(
    flow_map: FlowMap | JointMap,
    noise: Array,
    steps: int | Sequence[float] = 4,
    cond: Cond | None = None,
    *,
    with_log_prob: bool = False,
    determinant: Determinant | str | None = None,
) -> Samples:
    """Samples from noise in a few evaluations.

    Args:
        flow_map: A flow map, or a joint one.
        noise: Draws of ``N(0, I)``, ``(B, ...)``; ``torch.randn(n, *shape)``. It is brought to dtype and device of the
            map's weights; arrays and lists become tensors.
        steps: Number of uniform steps from ``t = 0`` to ``t = 1``, or the times themselves.
        cond: Conditioning, first axis ``B``, or 1 for all: a tensor, or a tuple or dictionary of them.
        with_log_prob: Also the samples' log-density, at no further evaluation; needs a joint map.
        determinant: ``"exact"``, ``"estimate"`` or a :class:`Determinant`: the log-density by the change of volume of
            the map's own jumps, which is that of the sampler itself, in the place of what the head says; an estimate
            has no gradients.

    Returns:
        Samples at ``t = 1``; one evaluation per step. Under ``torch.no_grad`` or with gradients, as the caller says.

    Raises:
        ValueError: If the map does not go to data, the noise is unfit, or ``with_log_prob`` is asked of a map without
            a divergence.

    >>> from f2d2_lightning.flows import GaussianBaseline, GaussianFlow
    >>> flow = GaussianFlow(GaussianBaseline.from_covariance(torch.zeros(2), 4 * torch.eye(2)))
    >>> sample(flow, torch.ones(1, 2), steps=1, with_log_prob=True).state
    tensor([[2., 2.]])
    """
    noise = as_states(noise, "noise", flow_map)
    cond = as_cond(cond, noise)
    check_cond(cond, len(noise), flow_map)
    if with_log_prob and not isinstance(flow_map, JointMap):
        raise ValueError(
            f"with_log_prob=True needs a joint map, and {type(flow_map).__name__} has no divergence; "
            "wrap it: JointFlowMap(flow_map, DivergenceHead(...))"
        )
    grid = time_grid(steps)
    if determinant is not None and not with_log_prob:
        raise ValueError(f"determinant={determinant!r} is of a log-density; ask for it: with_log_prob=True")
    if isinstance(flow_map, JointMap):
        way = walk(flow_map, noise, grid, cond, Determinant.said(determinant))
        density = normal_log_prob(noise) + way.change if with_log_prob else None
        return Samples(way.state, noise, way.evaluations, density, way.standard_error)
    x = noise
    for s, t in itertools.pairwise(grid):
        x = flow_map.jump(x, expand_time(s, x), expand_time(t, x), cond)
    return Samples(x, noise, len(grid) - 1)
