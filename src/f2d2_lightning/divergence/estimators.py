r"""Estimators of the instantaneous divergence, each giving velocity and divergence together.

Every estimator is called as ``estimator(velocity, Point(x, t, cond))`` with ``velocity(x, t, cond) -> v`` and answers
a :class:`Divergence`. They differentiate the network in forward mode by default: under ``torch.no_grad`` no graph is
kept, so memory is that of inference, and it is the form that works under DDP and FSDP. With gradients enabled the
answers are differentiable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from f2d2_lightning.divergence._tangents import REMEDY, DerivativeError, forward_mode
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.paths import LinearPath, Path, Point, even_rows, repeat_time
from f2d2_lightning.utils.checks import at_least, checked, one_of, positive
from f2d2_lightning.utils.conditions import Cond, mapped, repeated
from f2d2_lightning.utils.seeding import counter_normal, hashed, mix_seed, own_random_state, row_keys
from f2d2_lightning.utils.text import briefly

T = TypeVar("T")
MODES = ("forward", "reverse", "finite")


def check_mode(mode: str, step: float = 1.0) -> None:
    """Refuse, with a ``ValueError``, a way to differentiate that there is not."""
    one_of("mode", mode, MODES)
    positive(step=step)


class Divergence(NamedTuple):
    """Velocity and its divergence at one point of space and time."""

    velocity: Tensor
    """``v(x, t)``, shape of ``x``."""
    divergence: Tensor
    """``div v(x, t)``, ``(B,)``, nats per unit of time."""
    standard_error: Tensor | None = None
    """Of ``divergence`` over the estimator's own randomness, ``(B,)``; ``None`` if exact or not known."""


def jacobian_product(
    function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, *, checked: bool = True
) -> tuple[Tensor, Tensor]:
    """``(f(x), J_f(x) v)`` in one forward-mode pass, shapes of ``f(x)``.

    Lightning tests and predicts in inference mode, where tangents are dropped without a word; it is left for the pass.
    A function without a rule for forward mode, or, if ``checked``, one that drops tangents, is a
    :class:`DerivativeError`.
    """
    with _derivatives_allowed(), forward_mode():
        # copies: a network may change its input in place
        value, product = forward_ad.unpack_dual(function(forward_ad.make_dual(x.clone(), v.clone())))
    if product is None:
        if checked:
            _check_constant(function, x, v)
        product = torch.zeros_like(value)
    return value, product


def _check_constant(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> None:
    """Refuse, with a :class:`DerivativeError`, a function that moves with ``x`` although no tangent came through it.

    A network that detaches its input, as one whose answer is a gradient does, or that runs itself in inference mode,
    drops tangents without a word, and its divergence would be 0.
    """
    with torch.no_grad():
        near, far = (same_draws(function, x + step * v) for step in (-1e-2, 1e-2))
    if not torch.equal(near, far):
        raise DerivativeError(
            "a velocity changes with its state, and no derivative came through it: it detaches its input, or runs in "
            f"inference mode. {REMEDY}"
        )


def same_draws(function: Callable[..., T], x: Tensor, *rest: Tensor) -> T:
    """``function(x, *rest)``, after which random states are as before: the next call drops out the same units.

    Of two answers with dropout of their own, a difference over a small step would be noise.
    """
    with own_random_state(x.device):
        return function(x, *rest)


def _products(
    function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, mode: str, step: float
) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``J v``, or ``J^T v`` in reverse mode: either will do for ``v^T J v``."""
    if mode == "forward":
        return jacobian_product(function, x, v)
    if mode == "finite":
        with _derivatives_allowed():
            x = _usable(x)
            ahead, behind = (same_draws(function, x + h * v) for h in (step, -step))
            return function(x.clone()), (ahead - behind) / (2 * step)
    wanted = torch.is_grad_enabled()
    with _derivatives_allowed(), torch.enable_grad():
        # a copy in any case: a leaf cannot be changed in place
        leaf = x if wanted and x.requires_grad else _usable(x.detach()).requires_grad_(True)
        product = None
        try:
            value = function(leaf.clone())
            if value.requires_grad:
                (product,) = torch.autograd.grad(value, leaf, v, create_graph=wanted, allow_unused=True)
        except (RuntimeError, AttributeError) as error:  # what functions with a backward pass of their own raise
            with torch.no_grad():
                function(x.clone())  # an error of the network itself is its own
            raise DerivativeError(
                f"a network cannot be differentiated in reverse mode ({str(error).splitlines()[0][:160]}). {REMEDY}"
            ) from error
        if product is None:
            _check_constant(function, x, v)
            product = torch.zeros_like(value)
    return (value if wanted else value.detach()), product


@contextmanager
def _derivatives_allowed() -> Iterator[None]:
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _usable(x: Tensor) -> Tensor:
    # a tensor made in inference mode takes no part in differentiation, its copy does
    return x.clone() if x.is_inference() else x


def _at(velocity: Callable[..., Tensor], t: Tensor, cond: Cond | None, x: Tensor) -> Tensor:
    return velocity(x, _usable(t), mapped(_usable, cond))


class DivergenceEstimator(ABC):
    """Interface of the estimators."""

    mode: str = "forward"
    """How the network is differentiated: ``"forward"``, ``"reverse"`` or ``"finite"``."""

    def __repr__(self) -> str:
        return briefly(self)

    @abstractmethod
    def __call__(self, velocity: Callable[..., Tensor], point: Point) -> Divergence:
        """Velocity and divergence at a point.

        Args:
            velocity: ``(x, t, cond) -> v``.
            point: States and times; only :class:`Conditional` needs the pair that the states were made from.
        """

    def along_path(self) -> DivergenceEstimator:
        """The estimator for one path of a batch, to be called at its points in their order.

        What is random may then be drawn so that its errors cancel along the path; each answer is as good as before.
        """
        return self


class Exact(DivergenceEstimator):
    """Full trace, one directional derivative per dimension: for small ``d`` and for tests.

    Args:
        chunk: Directions evaluated in one batched call; bounds memory at ``chunk * B`` states.
        mode: How the network is differentiated, as in :class:`Hutchinson`.
        step: Half-width of the finite difference, in units of the state.
    """

    @checked
    def __init__(self, chunk: int = 32, mode: str = "forward", step: float = 1e-2) -> None:
        at_least(1, chunk=chunk)
        check_mode(mode, step)
        self.chunk, self.mode, self.step = chunk, mode, step

    def __call__(self, velocity: Callable[..., Tensor], point: Point) -> Divergence:
        x, t = point.x, point.t
        batch, dim = len(x), x[0].numel()
        v, trace = None, x.new_zeros(batch)
        for start in range(0, dim, self.chunk):
            stop = min(start + self.chunk, dim)
            count = stop - start
            basis = x.new_zeros(count, dim)
            basis.diagonal(start).fill_(1)
            tangent = basis.repeat(batch, 1).reshape(batch * count, *x.shape[1:])
            times = t[:1].expand(batch * count) if t.stride(0) == 0 else t.repeat_interleave(count)
            conds = repeated(point.cond, count, each=True)
            function = partial(_at, velocity, times, conds)
            value, product = _products(function, x.repeat_interleave(count, 0), tangent, self.mode, self.step)
            trace = trace + (product * tangent).reshape(batch, -1).sum(-1)
            if v is None:
                v = value.reshape(batch, count, *x.shape[1:])[:, 0]
        assert v is not None
        return Divergence(v, trace)


class Hutchinson(DivergenceEstimator):
    r"""Unbiased random estimate, :math:`E[\epsilon^\top J \epsilon]`.

    Hutchinson, 1990; for flows: Grathwohl et al., "FFJORD", 2018, https://arxiv.org/abs/1810.01367

    Args:
        probes: Random directions per call; with two or more there is a standard error.
        distribution: ``"rademacher"`` (lower variance) or ``"gaussian"``.
        mode: ``"forward"`` (one pass, no graph), ``"reverse"`` (for backbones without a forward-mode rule; under
            FSDP1 inside a training step it is silently wrong) or ``"finite"`` (central differences, two more
            evaluations; works with anything, accurate to about ``step ** 2``).
        step: Half-width of the finite difference, in units of the state.
        control: Gaussian fit whose known Jacobian is subtracted before probing and whose known trace is added
            back: same mean, smaller variance.

    Raises:
        ValueError: If an argument is none of the above.

    >>> Hutchinson(probes=4)(lambda x, t, cond: -x, Point(torch.ones(1, 2), torch.tensor([0.5]))).divergence
    tensor([-2.])
    """

    @checked
    def __init__(
        self,
        probes: int = 1,
        distribution: str = "rademacher",
        mode: str = "forward",
        step: float = 1e-2,
        control: GaussianBaseline | None = None,
    ) -> None:
        at_least(1, probes=probes)
        one_of("distribution", distribution, ("rademacher", "gaussian"))
        check_mode(mode, step)
        self.probes = probes
        self.distribution = distribution
        self.mode = mode
        self.step = step
        self.control = control

    def draw(self, x: Tensor) -> Tensor:
        """Probe vectors for a batch of states, ``(B, ...) -> (probes, B, ...)``, from the global generator."""
        shape = (self.probes, *x.shape)
        if self.distribution == "gaussian":
            return torch.randn(shape, dtype=x.dtype, device=x.device)
        return torch.randint(0, 2, shape, dtype=x.dtype, device=x.device) * 2 - 1

    def per_probe(self, velocity: Callable[..., Tensor], point: Point, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``(v, e)``: velocity, shape of ``x``, and one estimate per given probe, ``(probes, B)``."""
        x, t, cond = point.x, point.t, point.cond
        count, batch = len(probes), len(x)
        eps = probes.reshape(count * batch, *x.shape[1:])
        xs, times = x.repeat(count, *(1 for _ in x.shape[1:])), repeat_time(t, count)
        function = partial(_at, velocity, times, repeated(cond, count))
        values, product = _products(function, xs, eps, self.mode, self.step)
        if self.control is not None:
            product = product - self.control.jacobian_product(eps, times, times)
        estimates = (product * eps).reshape(count, batch, -1).sum(-1)
        if self.control is not None:
            estimates = estimates + self.control.divergence(t, t)
        return values[:batch], estimates

    def __call__(self, velocity: Callable[..., Tensor], point: Point) -> Divergence:
        v, estimates = self.per_probe(velocity, point, self.draw(point.x))
        error = None if self.probes == 1 else estimates.std(0) / self.probes**0.5
        return Divergence(v, estimates.mean(0), error)

    def along_path(self) -> Hutchinson:
        # a subclass may draw as it likes
        return _AlongPath(self) if type(self) is Hutchinson and self.distribution == "rademacher" else self


class _AlongPath(Hutchinson):
    r"""Hutchinson's estimator whose errors cancel from one point of a path to the next.

    A probe is a row of a Hadamard matrix ``H``, its columns times random signs ``s`` that a sample keeps. An entry
    :math:`J_{ij}` beside the diagonal comes in as :math:`s_i s_j H_{ki} H_{kj} J_{ij}`: zero on average, so that each
    estimate is unbiased, and over as many rows as there are columns its sum is zero whatever the signs (Bekas,
    Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007). Along a path the entries change slowly,
    so most of an integral's error goes.

    Rows come four at a time, which separate neighbours: columns, or pixels in both directions, next to each other. The
    fours come in a random order: in their own, entries that only later rows separate would add up until then.
    """

    def __init__(self, estimator: Hutchinson) -> None:
        super().__init__(
            estimator.probes, estimator.distribution, estimator.mode, estimator.step, control=estimator.control
        )
        self._drawn = 0
        self._signs: Tensor | None = None
        self._order = [0]

    def draw(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        if self._signs is None:
            self._signs = torch.randint(0, 2, x.shape, dtype=x.dtype, device=x.device) * 2 - 1
            fours = 2 ** sum((side - 1).bit_length() for side in shape) // 4
            if fours > 1:
                self._order = torch.randperm(fours).tolist()
        rows = []
        for drawn in range(self._drawn, self._drawn + self.probes):
            four, row = divmod(drawn, 4)
            rows.append(_hadamard_row(4 * self._order[four % len(self._order)] + row, shape, x))
        self._drawn += self.probes
        return torch.stack(rows)[:, None] * self._signs


def _hadamard_row(number: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Row of the product of a Hadamard matrix for each axis, their finest differences first, of ``shape``."""
    bits = [(side - 1).bit_length() for side in shape]
    levels, axes = range(max(bits, default=0)), range(len(shape))[::-1]
    picked = [0] * len(shape)
    for place, (level, axis) in enumerate((level, axis) for level in levels for axis in axes if level < bits[axis]):
        picked[axis] |= (number >> place & 1) << level
    row = torch.ones(shape, dtype=like.dtype, device=like.device)
    for axis, side in enumerate(shape):
        # an entry of a Hadamard matrix is the parity of the bits that its row and column share
        signs = [1 - 2 * ((column & picked[axis]).bit_count() % 2) for column in range(side)]
        row = row * torch.tensor(signs, dtype=like.dtype, device=like.device).reshape(
            [-1 if other == axis else 1 for other in range(len(shape))]
        )
    return row


class StillProbe(Hutchinson):
    """One probe per state, the same at all times."""

    def __init__(self, x: Tensor, baseline: GaussianBaseline | None, mode: str, step: float = 1e-2) -> None:
        super().__init__(mode=mode, step=step, control=baseline)
        generator = torch.Generator().manual_seed(0)
        self.probe = (torch.randint(0, 2, (1, *x.shape), generator=generator, device="cpu") * 2 - 1).to(x)

    def draw(self, x: Tensor) -> Tensor:
        return self.probe


def with_probes(
    probes: int, mode: str = "forward", step: float = 1e-2, control: GaussianBaseline | None = None
) -> DivergenceEstimator:
    """Hutchinson's estimator with so many probes, or the exact one for 0; arguments as of :class:`Hutchinson`."""
    return Hutchinson(probes, mode=mode, step=step, control=control) if probes else Exact(mode=mode, step=step)


def probes_in_words(probes: int) -> str:
    """How :func:`with_probes` estimates, for a log."""
    words = {0: "exact divergence", 1: "1 probe of the divergence"}
    return words.get(probes, f"{probes} probes of the divergence")


class SampleProbes:
    """Probes that are a function of a seed, of each sample's own values and of how many were drawn before.

    A sample has the same ones in any batch and process (:func:`~f2d2_lightning.utils.seeding.row_keys`). Their number
    and distribution are those of ``estimator``, for states ``x``, ``(B, ...)``. Without a ``seed`` one is drawn from
    the global generator, and places in the batch stand for values.
    """

    def __init__(self, estimator: Hutchinson, x: Tensor, seed: int | None) -> None:
        self.estimator, self.x = estimator, x
        places = torch.arange(len(x), device=x.device)
        rows = hashed(places, int(torch.randint(2**62, ()))) if seed is None else row_keys(x, seed)
        self.keys = rows[:, None] + torch.arange(x[0].numel(), device=x.device)
        self._drawn = 0
        self._words: tuple[int, Tensor] = (-1, self.keys)

    def draw(self) -> Tensor:
        """The next ones, ``(probes, B, ...)``."""
        probes = [self._one(self._drawn + k) for k in range(self.estimator.probes)]
        self._drawn += len(probes)
        return torch.stack(probes).to(self.x.dtype).reshape(-1, *self.x.shape)

    def _one(self, number: int) -> Tensor:
        if self.estimator.distribution == "gaussian":
            return counter_normal(self.keys, mix_seed("probe", number))
        block, bit = divmod(number, 32)
        if self._words[0] != block:
            self._words = block, hashed(self.keys, mix_seed("probe", block))
        return (self._words[1] >> (16 + bit) & 1) * 2 - 1


class Conditional(DivergenceEstimator):
    r"""No Jacobian at all: one velocity evaluation and the pair that the state was made from.

    On the linear path, for the exact marginal velocity ``v``,

    .. math::
        \operatorname{div} v(x_t, t)
        = E\!\left[\frac{t\,\lVert x_1 - \epsilon - v\rVert^2 - d}{1 - t} \,\middle|\, x_t\right],

    so the estimate is as unbiased as ``v`` is exact (its bias is ``-t |v - v*|^2 / (1 - t)``). Its variance grows
    like ``1 / (1 - t)^2``; past ``handover`` another estimator answers. It needs no derivative, so flash attention,
    compiled and sharded networks need no care.

    Args:
        handover: Time in (0, 1] from which ``near_data`` answers.
        near_data: Estimator near the data; Hutchinson's with one probe by default.
        path: Must be the linear path.
    """

    @checked
    def __init__(
        self, handover: float = 0.7, near_data: DivergenceEstimator | None = None, path: Path | None = None
    ) -> None:
        if not 0 < handover <= 1:
            raise ValueError(f"handover is {handover}; it is a time in (0, 1]")
        if not isinstance(path or LinearPath(), LinearPath):
            raise ValueError(f"Conditional holds on the linear path, got {type(path).__name__}; use Hutchinson there")
        self.handover = handover
        self.near_data = near_data or Hutchinson()
        self.mode = self.near_data.mode

    def __call__(self, velocity: Callable[..., Tensor], point: Point) -> Divergence:
        if point.pair is None:
            raise ValueError(
                "Conditional needs the pair (data, noise) that x was made from, and got none; states on a trajectory "
                "have no such pair: use Hutchinson or Exact there"
            )
        v, divergence = torch.zeros_like(point.x), torch.zeros_like(point.t)
        late = point.t >= self.handover
        for mine, answer in ((~late, self._from_pair), (late, self.near_data)):
            rows, count = even_rows(mine)
            if count:
                part = answer(velocity, point[rows])
                rows, part = rows[:count], Divergence(part.velocity[:count], part.divergence[:count])
                v = v.index_copy(0, rows, part.velocity.to(v.dtype))  # lower under autocast
                divergence = divergence.index_copy(0, rows, part.divergence)
        return Divergence(v, divergence)

    def along_path(self) -> DivergenceEstimator:
        return self.near_data.along_path()  # its points belong to no data pair

    @staticmethod
    def _from_pair(velocity: Callable[..., Tensor], point: Point) -> Divergence:
        assert point.pair is not None
        data, noise = point.pair
        v = velocity(point.x, point.t, point.cond)
        residual = (data - noise - v).flatten(1).square().sum(-1)
        return Divergence(v, (point.t * residual - point.x[0].numel()) / (1 - point.t))


def instantaneous(velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``(x, t, cond) -> v`` from a velocity function, or from a flow map or joint map (its diagonal)."""
    diagonal = getattr(velocity, "velocity", None)
    return diagonal if callable(diagonal) else velocity
