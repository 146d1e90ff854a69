r"""The density that a map's own jumps have, whatever its divergence head says.

A jump :math:`X_{s \to t}(x) = x + (t - s)\,u(x, s, t)` takes a density along by the change of variables, and what a
few-step sampler draws from is the density of its jumps, not the one that a head was taught:

.. math:: \log |\det A|, \qquad A = I + (t - s)\,\frac{\partial u}{\partial x}.

Exactly it takes as many directional derivatives as a state has dimensions. In many dimensions it is estimated: with
:math:`A_0` the Jacobian of the Gaussian fit's jump, whose determinant is known, and
:math:`S = A_0^{-1/2} A A_0^{-1/2}`,

.. math:: \log |\det A| = \log \det A_0 + \operatorname{Re} \operatorname{tr} \log S

and the trace by random probes, for each of which a function of a matrix follows from a few products with it by
Arnoldi's iteration (Saad, "Analysis of some Krylov subspace approximations to the matrix exponential operator", 1992,
https://doi.org/10.1137/0729014; by Lanczos', of symmetric ones: Ubaru, Chen and Saad, 2017,
https://doi.org/10.1137/16M1104974). Not of :math:`S^\top S`, which is symmetric and whose condition is the square.
Where a jump folds, some eigenvalues of :math:`S` are negative and others next to zero; probes then scatter, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.flows.gaussian import GaussianBaseline, baseline_of
from f2d2_lightning.flows.maps import JointMap, Jump
from f2d2_lightning.flows.paths import expand_time, like, repeat_time
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
"""Share of a vector that is left after its projections are taken away, where the iteration has found all."""


@dataclass(frozen=True)
class Determinant:
    """How ``log |det|`` of a jump's Jacobian is found.

    Args:
        probes: Random vectors of the estimate; 0 for the exact determinant; ``None`` for the exact one up to 256
            dimensions, four probes above.
        iterations: Of Arnoldi's, per probe: derivatives along a vector.
        seed: The probes of a sample are a function of this number and of the sample's own values, whatever the batch
            that it is in; ``None`` draws them from the global generator.

    Raises:
        ValueError: If a number is out of range.
    """

    probes: int | None = None
    iterations: int = 24
    seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(1, iterations=self.iterations)
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
        """Derivatives along a vector that a jump of so many dimensions takes."""
        return min(self.iterations, dim) * self.count(dim) or dim

    def count(self, dim: int) -> int:
        """Random vectors for states of so many dimensions; 0 where the determinant is exact."""
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
            The jump, and the error of the change, ``(B,)``, nats: the standard error over probes and what the second
            half of the iterations changed; ``None`` of what is exact and of a single probe.
        """
        keys = self.keys(x) if keys is None else keys
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.count(x[0].numel())):
            state = joint_map.jump(x, s, t, cond).state
            times = expand_time(s, x), expand_time(t, x)
            volume, error = self.log_volume(joint_map, x, *times, cond, keys, f"{s} {t}")
        return Jump(state, -volume), error

    def log_volume(
        self,
        joint_map: JointMap,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Cond | None = None,
        keys: Tensor | None = None,
        name: str = "",
    ) -> tuple[Tensor, Tensor | None]:
        """``log |det|`` of the jump of each state ``(B, ...)`` from its own time ``(B,)`` to another, ``(B,)``, nats.

        Args:
            joint_map: Whose jumps.
            x: States.
            s: Their times.
            t: Where the jumps lead, in either direction.
            cond: Conditioning.
            keys: Numbers that the probes are a function of, ``(B,)``, with ``name``; by default they are drawn.
            name: Tells this jump's probes from those of others with the same keys.

        Returns:
            The logarithm, and its error as :meth:`jump` has it.
        """
        baseline = baseline_of(joint_map)
        fit = baseline if baseline is not None and bool(baseline.fitted) else None

        def part(rows: slice) -> Callable[[Tensor], Tensor]:
            # the same rows, as often as there are vectors
            def moved(y: Tensor) -> Tensor:
                times = len(y) // len(s[rows])
                start, end = repeat_time(s[rows], times), repeat_time(t[rows], times)
                velocity = joint_map(y, start, end, repeated(some_of(cond, rows), times)).velocity
                return y + like(end - start, y) * velocity

            return moved

        dim = x[0].numel()
        probes = self.count(dim)
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
                    streams = [mix_seed("determinant", name, probe) for probe in range(probes)]
                    signs = torch.stack([hashed(words, stream) >> 40 & 1 for stream in streams])
                value, error = _estimate(part(rows), x[rows], fit, s[rows], t[rows], signs * 2 - 1, self.iterations)
                values.append(value)
                errors += [] if error is None else [error]
        return torch.cat(values), torch.cat(errors) if errors else None


def _estimate(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    baseline: GaussianBaseline | None,
    s: Tensor,
    t: Tensor,
    signs: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor | None]:
    """``log |det|`` at states ``(B, ...)`` relative to the Gaussian fit's, ``(B,)``, and its error as of a jump.

    By probes ``signs``, ``(probes, B, dim)``.
    """
    probes, count, dim = signs.shape
    steps = min(steps, dim)
    states = x.repeat(probes, *(1 for _ in x.shape[1:]))
    known, root = x.new_zeros(()), x.new_ones(())
    if baseline is not None:
        known = (baseline.divergence(s, t) * (t - s)).to(x)
        ratio = baseline.marginal_variances(t) / baseline.marginal_variances(s)
        root = (ratio**0.25).expand(count, -1).repeat(probes, 1).to(x)

    def product(v: Tensor) -> Tensor:
        """``S v``, ``(P B, d)``, in the fit's axes."""
        along = v / root
        along = along.reshape(states.shape) if baseline is None else baseline.from_axes(along).to(x)
        image = jacobian_product(function, states, along)[1]
        return (image.reshape(len(v), dim) if baseline is None else baseline.to_axes(image).to(x)) / root

    basis = [signs.reshape(len(states), dim).to(x) / dim**0.5]
    # of a sample that has no further directions the rest of the matrix is the identity, apart from what was found
    small = torch.eye(steps, dtype=torch.float64, device=x.device).repeat(len(states), 1, 1)
    going = torch.ones(len(states), dtype=torch.bool, device=x.device)
    for j in range(steps):
        image = product(basis[-1])
        before, column = image.norm(dim=-1), image.new_zeros(len(states), j + 1)
        for _ in range(2):  # twice is enough (Kahan; Parlett)
            for i, vector in enumerate(basis):
                part = (image * vector).sum(-1)
                column[:, i] += part
                image = image - part[:, None] * vector
        small[:, : j + 1, j] = torch.where(going[:, None], column.double(), small[:, : j + 1, j])
        length = image.norm(dim=-1)
        going = going & (length > NEGLIGIBLE * before)
        if j + 1 < steps:
            small[:, j + 1, j] = torch.where(going, length, torch.zeros_like(length)).double()
        basis.append(torch.where(going, 1 / length, torch.zeros_like(length))[:, None] * image)
    small = small.cpu()

    def traces(taken: int) -> Tensor:
        """By the first of the iterations, ``(P, B)``."""
        values, axes = torch.linalg.eig(small[:, :taken, :taken])
        first = torch.eye(taken, 1, dtype=axes.dtype, device="cpu").expand(len(small), -1, -1)
        shares = axes[:, 0] * torch.linalg.solve(axes, first)[..., 0]
        logs = torch.where(shares == 0, torch.zeros_like(values), values.log())
        return (dim * (shares * logs).sum(-1).real).reshape(probes, count).to(x)

    found = traces(steps)
    if probes == 1:
        return known + found[0], None
    short = (traces((steps + 1) // 2) - found).mean(0)
    return known + found.mean(0), (found.var(0) / probes + short.square()).sqrt()
