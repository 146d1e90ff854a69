r"""The density that a map's own jumps have, whatever its divergence head says.

A jump :math:`X_{s \to t}(x) = x + (t - s)\,u(x, s, t)` takes a density along by the change of variables, and what a
few-step sampler draws from is the density of its jumps, not the one that a head was taught:

.. math:: \log |\det A|, \qquad A = I + (t - s)\,\frac{\partial u}{\partial x}.

Exactly it takes as many directional derivatives as a state has dimensions. In many dimensions it is estimated: with
:math:`A_0` the Jacobian of the Gaussian fit's jump, whose determinant is known, and :math:`B = A_0^{-1} A`,

.. math:: \log |\det A| = \log \det A_0 + \tfrac12 \operatorname{tr} \log B^\top B

and the trace by stochastic Lanczos quadrature (Ubaru, Chen and Saad, "Fast Estimation of tr(f(A)) via Stochastic
Lanczos Quadrature", 2017, https://doi.org/10.1137/16M1104974). Jumps are far from the identity along narrow axes of the
data and close to the Gaussian's everywhere, so that few of its steps are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.flows.gaussian import GaussianBaseline, baseline_of
from f2d2_lightning.flows.maps import JointMap, Jump
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.likelihood.inversion import map_jacobian
from f2d2_lightning.utils.checks import at_least, check_fields
from f2d2_lightning.utils.conditions import Cond, repeated, some_of
from f2d2_lightning.utils.seeding import hashed, mix_seed, row_keys

__all__ = ["Determinant"]

EXACT_UP_TO = 256
"""Dimensions up to which determinants are exact where nothing is said."""
ROWS, NUMBERS = 1024, 2**22
"""States that pass through the network at a time, and numbers in the Jacobians of exact determinants."""
NEGLIGIBLE = 1e-6
"""Share of a vector that is left after its projections are taken away, where Lanczos' steps have found all."""


@dataclass(frozen=True)
class Determinant:
    """How ``log |det|`` of a jump's Jacobian is found.

    Args:
        probes: Random vectors of the estimate; 0 for the exact determinant; ``None`` for the exact one up to 256
            dimensions, four probes above.
        lanczos: Lanczos steps per probe, each of a derivative along a vector and one of a product; more of them take
            away what the probes' standard error does not show.
        seed: The probes of a sample are a function of this number and of the sample's own values, whatever the batch
            that it is in; ``None`` draws them from the global generator.

    Raises:
        ValueError: If a number is out of range.
    """

    probes: int | None = None
    lanczos: int = 12
    seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(1, lanczos=self.lanczos)
        if self.probes is not None:
            at_least(0, probes=self.probes)

    @classmethod
    def said(cls, said: Determinant | str | None) -> Determinant | None:
        """What a user says: one of these, ``"exact"``, ``"estimate"``, or ``None`` for the head's divergence.

        Raises:
            ValueError: If it is none of them.
        """
        if said is None or isinstance(said, Determinant):
            return said
        if said not in ("exact", "estimate"):
            raise ValueError(
                f"determinant is {said!r}; it is 'exact', 'estimate', a Determinant(probes=...), or None for what the "
                "head says"
            )
        return cls(0 if said == "exact" else 4)

    def keys(self, x: Tensor) -> Tensor | None:
        """Numbers that the probes of samples ``(B, ...)`` are made from, ``(B,)``; ``None`` without a seed."""
        return None if self.seed is None else row_keys(x, self.seed)

    def derivatives(self, dim: int) -> int:
        """Derivatives along a vector, and products with one, that a jump of so many dimensions takes."""
        return 2 * min(self.lanczos, dim) * self._probes(dim) or dim

    def _probes(self, dim: int) -> int:
        return (0 if dim <= EXACT_UP_TO else 4) if self.probes is None else self.probes

    def jump(
        self,
        joint_map: JointMap,
        x: Tensor,
        s: float,
        t: float,
        cond: Cond | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Jump, Tensor | None]:
        """A jump whose change of log-density is that of its own volume.

        What is exact has gradients, as the caller says; an estimate has none. ``keys`` are those of its probes,
        ``(B,)``, by default of ``x`` (:meth:`keys`).

        Returns:
            The jump, and the standard error of the change over probes, ``(B,)``, nats; ``None`` of what is exact and of
            a single probe.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._probes(x[0].numel())):
            return self._jump(joint_map, x, s, t, cond, keys)

    def _jump(
        self, joint_map: JointMap, x: Tensor, s: float, t: float, cond: Cond | None, keys: Tensor | None
    ) -> tuple[Jump, Tensor | None]:
        start, end = expand_time(s, x), expand_time(t, x)
        state, baseline = joint_map.jump(x, s, t, cond).state, baseline_of(joint_map)
        fit = baseline if baseline is not None and bool(baseline.fitted) else None

        def part(rows: slice) -> Callable[[Tensor], Tensor]:
            # the same rows, as often as there are vectors
            def moved(y: Tensor) -> Tensor:
                times = len(y) // len(start[rows])
                own = repeated(some_of(cond, rows), times)
                return y + (t - s) * joint_map(y, start[rows].repeat(times), end[rows].repeat(times), own).velocity

            return moved

        dim = x[0].numel()
        probes, keys = self._probes(dim), self.keys(x) if keys is None else keys
        size = max(1, ROWS // probes if probes else min(ROWS, NUMBERS // dim**2))
        values, errors = [], []
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            if not probes:
                jacobian = map_jacobian(part(rows), x[rows], max(1, ROWS // len(x[rows])))[1]
                values.append(torch.linalg.slogdet(jacobian.double()).logabsdet.to(x))
            else:
                if keys is None:
                    signs = torch.randint(0, 2, (probes, len(x[rows]), dim), device=x.device)
                else:
                    words = keys[rows, None] + torch.arange(dim, device=x.device)
                    streams = [mix_seed("determinant", f"{s} {t}", probe) for probe in range(probes)]
                    signs = torch.stack([hashed(words, stream) >> 40 & 1 for stream in streams])
                value, error = _estimate(part(rows), x[rows], fit, start[rows], end[rows], signs * 2 - 1, self.lanczos)
                values.append(value)
                errors += [] if error is None else [error]
        return Jump(state, -torch.cat(values)), torch.cat(errors) if errors else None


def _estimate(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    baseline: GaussianBaseline | None,
    s: Tensor,
    t: Tensor,
    signs: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor | None]:
    """Stochastic Lanczos quadrature of ``log |det|`` at states ``(B, ...)``, relative to the Gaussian fit's.

    The probes are ``signs``, ``(probes, B, dim)``.

    Returns:
        ``(B,)``, and its standard error over probes; ``None`` of a single one.
    """
    probes, count, dim = signs.shape
    steps = min(steps, dim)
    states = x.repeat(probes, *(1 for _ in x.shape[1:]))
    known, ratio = x.new_zeros(()), None
    if baseline is not None:
        known = (baseline.divergence(s, t) * (t - s)).to(x)
        ratio = (baseline.marginal_variances(t) / baseline.marginal_variances(s)).sqrt().expand(count, -1)
        ratio = ratio.repeat(probes, 1).to(x)

    def square(v: Tensor) -> Tensor:
        """``B^T B v``, ``(P B, d)``, in the fit's axes."""
        along = v.reshape(states.shape) if baseline is None else baseline.from_axes(v).to(x)
        image = jacobian_product(function, states, along)[1].reshape(len(v), dim)
        if baseline is not None and ratio is not None:
            image = baseline.to_axes(image.reshape(states.shape)).to(x) / ratio.square()
            image = baseline.from_axes(image).to(x)
        with torch.inference_mode(False), torch.enable_grad():
            point = states.clone().requires_grad_(True)
            (back,) = torch.autograd.grad(function(point), point, image.clone().reshape(states.shape))
        return back.reshape(len(v), dim) if baseline is None else baseline.to_axes(back).to(x)

    vectors = signs.reshape(len(states), dim).to(x) / dim**0.5
    basis, diagonal, beside = [vectors], [], []
    for _ in range(steps):
        image = square(basis[-1])
        diagonal.append((image * basis[-1]).sum(-1))
        for _ in range(2):  # twice is enough (Kahan; Parlett)
            for vector in basis:
                image = image - (image * vector).sum(-1, keepdim=True) * vector
        length = image.norm(dim=-1)
        # of a sample that has no further directions the rest of the matrix is cut off
        going = length > NEGLIGIBLE * diagonal[-1].abs()
        beside.append(torch.where(going, length, torch.zeros_like(length)))
        basis.append(torch.where(going, 1 / length, torch.zeros_like(length))[:, None] * image)
    small = torch.diag_embed(torch.stack(diagonal, -1).double())
    if steps > 1:
        off = torch.stack(beside[:-1], -1).double()
        small = small + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, axes = torch.linalg.eigh(small)
    shares = axes[:, 0].square()
    logs = torch.where(shares > 0, values.clamp(min=torch.finfo(torch.float64).tiny).log(), torch.zeros_like(values))
    traces = (0.5 * dim * (shares * logs).sum(-1)).reshape(probes, count).to(x)
    error = traces.std(0) / probes**0.5 if probes > 1 else None
    return known + traces.mean(0), error
