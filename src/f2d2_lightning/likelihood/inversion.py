r"""Inversion of a flow map that only goes to data.

A step of such a map takes ``y`` at time ``s`` to ``x = y + (t - s) u(y, s, t)`` at ``t > s``. The likelihood of data
needs ``y`` from ``x``. Both solvers work on the residual :math:`F(y) = y + (t - s) u(y, s, t) - x`:

- ``"anderson"``: fixed-point iteration with Anderson mixing (Walker and Ni, "Anderson Acceleration for Fixed-Point
  Iterations", 2011, https://doi.org/10.1137/10078356X); one evaluation an iteration, any dimension.
- ``"newton"``: exact Jacobian, an evaluation and ``d`` directional derivatives an iteration, and one evaluation to see
  that it is done; converges where the step is far from the identity, for small ``d``.

Gradients are those of the implicit function, so the solver's iterations are not kept in memory. They are the solution
of a linear system, by the same method: iterations with ``"anderson"``, the exact Jacobian with ``"newton"``.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.flows.maps import is_transformed
from f2d2_lightning.flows.paths import like
from f2d2_lightning.utils.checks import at_least, check_fields, one_of, positive

Displacement: TypeAlias = Callable[[Tensor, slice | Tensor], Tensor]
"""Of states, and of which samples they are."""
Memory: TypeAlias = list[tuple[Tensor, ...]]
"""What a solver keeps of earlier iterations, a row a sample."""
Follow: TypeAlias = Callable[..., tuple[Tensor, Memory, int]]
"""From a displacement, states ``(B, ...)``, what is missing there ``(B, d)``, where that is less than ever before
``(B,)``, the best states so far ``(B, d)`` and the memory: the next states ``(B, d)``, the memory, and evaluations."""


@dataclass(frozen=True)
class Solution:
    """What a solver found."""

    state: Tensor
    """``y`` at time ``s``, shape of ``x``."""
    converged: Tensor
    """Whether the residual is within tolerance, ``(B,)``, bool."""
    residual: Tensor
    """Root mean square of ``F(y)`` over the dimensions, ``(B,)``, in units of the state."""
    evaluations: int
    """Network evaluations per sample, the mean over samples, rounded up."""


@dataclass(frozen=True)
class Inversion:
    """How to invert a step.

    Args:
        method: ``"anderson"`` or ``"newton"``.
        tolerance: Root-mean-square residual that counts as converged; ``None`` is ``1e-5`` in single and ``1e-10``
            in double precision. Of gradients, relative to each sample's own.
        max_iterations: Iterations before giving up.
        memory: Past iterates that Anderson mixing keeps; 1 is the plain fixed-point iteration.

    Raises:
        ValueError: If an argument is out of range.

    >>> Inversion("newton").solve(lambda y: 0.5 * y, torch.tensor([[3.0]])).state  # y + y / 2 = 3
    tensor([[2.]])
    """

    method: str = "anderson"
    tolerance: float | None = None
    max_iterations: int = 100
    memory: int = 6

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("method", self.method, ("anderson", "newton"))
        at_least(1, max_iterations=self.max_iterations, memory=self.memory)
        if self.tolerance is not None:
            positive(tolerance=self.tolerance)

    def solve(
        self, displacement: Callable[..., Tensor], x: Tensor, start: Tensor | None = None, rowwise: bool = False
    ) -> Solution:
        """The ``y`` with ``y + displacement(y) = x``.

        Args:
            displacement: ``y -> (t - s) u(y, s, t)``, shape of ``x``.
            x: Where the step lands, ``(B, ...)``.
            start: Where the search begins, shape of ``x``; by default ``x``.
            rowwise: ``displacement`` also takes which of the samples its states are, a slice or indices, and may be
                asked for some: each time that half of those asked are solved, only the others are asked further.

        Returns:
            The solution per sample; differentiable with respect to ``x`` and to the parameters of ``displacement``
            where gradients are enabled. A gradient whose solver does not converge is NaN, and a warning counts them.
            All is computed in the precision of ``x``, under autocast too.

        Raises:
            ValueError: If ``x`` is inside of a transform of ``torch.func``.
        """
        if is_transformed(x):
            raise ValueError(
                "a map is inverted by iterations that look at their values, and inside of a transform of torch.func "
                "there are none; take gradients by torch.autograd.grad, or torch.autograd.functional.jacobian"
            )
        ask: Displacement = displacement if rowwise else lambda y, rows: displacement(y)
        tolerance = self.tolerance or (1e-10 if x.dtype == torch.float64 else 1e-5)
        begin = (x if start is None else start).detach()
        # a network in lower precision answers in steps, between which no iteration finds a solution
        with torch.autocast(x.device.type, enabled=False):
            follow = self._anderson if self.method == "anderson" else _newton
            with torch.no_grad():
                y, residual, asked = self._search(follow, ask, x.detach(), begin, tolerance, rowwise)
            # far out rounding is larger than the tolerance, and where it cancels it looks like a solution
            lengths = (v.reshape(len(x), -1).square().mean(-1).sqrt() for v in (y, x.detach()))
            rounding, least = (torch.finfo(x.dtype).eps * length for length in lengths)
            converged = (residual <= tolerance) & (rounding <= tolerance + least)
            evaluations = math.ceil(asked / max(1, len(x)))
            if torch.is_grad_enabled():
                y, evaluations = self._attach_gradient(ask, x, y, tolerance), evaluations + 2
        return Solution(y, converged, residual, evaluations)

    def _search(
        self, follow: Follow, displacement: Displacement, x: Tensor, start: Tensor, tolerance: float, rowwise: bool
    ) -> tuple[Tensor, Tensor, int]:
        """Where the residual was least, its root mean square, and evaluations, of all samples together."""
        found, least, asked = start.clone(), x.new_full((len(x),), torch.inf), 0
        rows: slice | Tensor = slice(None)
        memory: Memory = []
        y = start
        for _ in range(self.max_iterations):
            missing = (x[rows] - displacement(y, rows) - y).reshape(len(y), -1)  # minus the residual F(y)
            residual = missing.square().mean(-1).sqrt()
            better = residual < least[rows]
            found[rows] = torch.where(like(better, x), y, found[rows])
            least[rows] = torch.where(better, residual, least[rows])
            asked, left = asked + len(y), ~(least[rows] <= tolerance)
            count = int(left.sum())
            if not count:
                break
            if rowwise and 2 * count <= len(y):
                rows = torch.arange(len(x), device=x.device)[rows][left]
                y, missing, better = y[left], missing[left], better[left]
                memory = [tuple(part[left] for part in entry) for entry in memory]
            best = found[rows].reshape(missing.shape)
            flat, memory, more = follow(lambda v, rows=rows: displacement(v, rows), y, missing, better, best, memory)
            y, asked = flat.reshape(y.shape), asked + more
        return found, least, asked

    def _anderson(
        self, displacement: object, y: Tensor, missing: Tensor, better: Tensor, best: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory, int]:
        """What mixing the last iterates leads to."""
        flat = y.reshape(missing.shape)
        memory = [*memory, (flat, missing)][-self.memory :]
        step = flat + missing
        if len(memory) > 1:
            states, moves = (
                torch.stack([b - a for a, b in itertools.pairwise(each)], -1) for each in zip(*memory, strict=True)
            )
            gram = moves.transpose(1, 2) @ moves
            # a touch of Tikhonov keeps the system solvable once differences vanish in converged samples
            ridge = gram.diagonal(dim1=1, dim2=2).mean(-1) * 1e-10 + torch.finfo(y.dtype).tiny
            gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=y.dtype, device=y.device)
            weights = _least_squares(gram, moves.transpose(1, 2) @ missing[..., None])
            step = step - ((states + moves) @ weights).squeeze(-1)
        return torch.where(step.isfinite(), step, best), memory, 0

    def _attach_gradient(self, displacement: Displacement, x: Tensor, y: Tensor, tolerance: float) -> Tensor:
        # y = x - displacement(y): the forward graph is one evaluation at the solution; backward solves
        # w = g - J^T w for the gradient that reaches x and the parameters (implicit function theorem)
        attached = x - displacement(y, slice(None))
        if not attached.requires_grad:
            return y
        point = y.clone().requires_grad_(True)
        moved = displacement(point, slice(None))

        def product(w: Tensor) -> Tensor:
            return torch.autograd.grad(moved, point, w, retain_graph=True)[0]

        @torch.no_grad()
        def solve_adjoint(gradient: Tensor) -> Tensor:
            if not moved.requires_grad:
                return gradient  # the displacement is the same everywhere
            # of each sample its own: one of a steep sample must not be what those of flat ones are measured by
            size = like(gradient.reshape(len(x), -1).square().mean(-1).sqrt(), x)
            scaled = gradient / size.clamp(min=torch.finfo(x.dtype).tiny)
            if self.method == "newton":
                found = _solve_transposed(product, scaled)
                converged = found.reshape(len(x), -1).isfinite().all(-1)
            else:
                ask: Displacement = lambda w, rows: product(w)  # noqa: E731
                found, residual, _ = self._search(self._anderson, ask, scaled, scaled, tolerance, False)
                converged = residual <= tolerance
            # what came in as NaN goes out as NaN, which is nothing to say here
            failed = ~converged & gradient.reshape(len(x), -1).isfinite().all(-1)
            if bool(failed.any()):
                warnings.warn(
                    f"the gradient of an inversion did not converge for {int(failed.sum())} of {len(x)} samples; it is "
                    "NaN for them (more iterations, memory above 1, more steps, or method='newton' may help)",
                    stacklevel=2,
                )
            found = torch.where(converged.reshape(size.shape), found, torch.full_like(found, torch.nan))
            return found * size

        attached.register_hook(solve_adjoint)
        return attached


def _newton(
    displacement: Callable[[Tensor], Tensor], y: Tensor, missing: Tensor, better: Tensor, best: Tensor, memory: Memory
) -> tuple[Tensor, Memory, int]:
    """A step by the Jacobian where the last one helped, half the last one, from the best point, where it did not."""
    direction, evaluations = memory[0][0] / 2 if memory else torch.zeros_like(missing), 0
    if bool(better.any()):
        jacobian, evaluations = map_jacobian(lambda v: v + displacement(v), y)[1], missing.numel()
        direction = torch.where(better[:, None], _least_squares(jacobian, missing[..., None]).squeeze(-1), direction)
    return best + direction, [(direction,)], evaluations


def _least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    """``(B, m, n), (B, m, 1) -> (B, n, 1)``; of samples that have diverged, anything: the backend refuses the batch."""
    return torch.linalg.lstsq(*(torch.nan_to_num(part, posinf=0.0, neginf=0.0) for part in (matrix, right))).solution


def _solve_transposed(product: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
    """``(I + J^T)^-1 g``, shape of ``g``, from ``w -> J^T w``, one product a dimension; in double precision."""
    rows = []
    for i in range(gradient[0].numel()):
        unit = torch.zeros_like(gradient).reshape(len(gradient), -1)
        unit[:, i] = 1
        rows.append(product(unit.reshape(gradient.shape)).reshape(len(gradient), -1))
    transposed = torch.stack(rows, -1).double() + torch.eye(len(rows), dtype=torch.float64, device=gradient.device)
    solved, _ = torch.linalg.solve_ex(transposed, gradient.reshape(len(gradient), -1, 1).double())
    return solved.reshape(gradient.shape).to(gradient.dtype)


def map_jacobian(function: Callable[[Tensor], Tensor], x: Tensor, together: int = 1) -> tuple[Tensor, Tensor]:
    """``f(x)``, shape of ``x``, and the Jacobian, ``(B, d, d)``: one directional derivative per dimension.

    So many directions are asked for ``together``, of as many copies of the states, one after the other: a few states
    take no longer with many than with one.
    """
    columns, value = [], x
    for units in torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).split(together):
        states = x.repeat(len(units), *(1 for _ in x.shape[1:]))
        tangents = units.repeat_interleave(len(x), 0).reshape(states.shape)
        values, products = jacobian_product(function, states, tangents)
        value = values[: len(x)]
        columns.append(products.reshape(len(units), len(x), -1))
    return value, torch.cat(columns).permute(1, 2, 0)
