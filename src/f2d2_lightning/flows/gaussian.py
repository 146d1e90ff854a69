r"""The flow map of Gaussian data, in closed form: a baseline for the divergence, a preconditioner, a ground truth.

For data :math:`\mathcal N(\mu, V \Lambda V^\top)` on a path :math:`x_t = \sigma_t \epsilon + \alpha_t x_1` the
marginal at time ``t`` has variances :math:`w_i(t) = \sigma_t^2 + \alpha_t^2 \lambda_i` along the same axes, and the
flow map scales each axis by :math:`r_i = \sqrt{w_i(t) / w_i(s)}`:

.. math::
    u_0 = \frac{\alpha_t - \alpha_s}{t - s}\,\mu + V\,\frac{r - 1}{t - s}\,V^\top (x - \alpha_s \mu), \qquad
    D_0 = \frac{1}{2 (t - s)} \sum_i \log \frac{w_i(t)}{w_i(s)}.

Both are evaluated through divided differences, with no division by ``t - s``, so that the diagonal is no
special case. The pair obeys the semigroup, Lagrangian and Eulerian identities exactly.

The fit also gives each axis its natural clock, the angle :math:`\theta_i(t) = \arctan(\alpha_t \sqrt{\lambda_i} /
\sigma_t)` from 0 (noise) to :math:`\pi / 2` (data). In whitened coordinates :math:`z_i = (V^\top (x - \alpha_t \mu))_i
/ \sqrt{w_i(t)}` the Gaussian flow stands still, and any other flow moves at a rate of order one per unit of angle.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.maps import Joint, JointMap
from f2d2_lightning.flows.paths import LinearPath, Path, distinct, like, of_time
from f2d2_lightning.utils.checks import check_shape, checked, counts, one_of
from f2d2_lightning.utils.conditions import Cond
from f2d2_lightning.utils.configured import Configured

ENOUGH, PLENTY = 4, 64
"""Samples per dimension from which a full covariance is fitted without a warning, and taken as it is."""
FOLDS = 4
"""Parts of few samples, each of which is left out in turn; a power of two, at most 8."""
FEWEST = 16
"""Samples from which a variance per coordinate is taken without a warning."""
NARROWEST = 1e-9
"""Share of the largest variance below which a principal axis is rounding: single precision turns states no better."""
SMALLEST = 1e-12
"""Variance, absolute or as a share of the squared mean, below which a coordinate does not vary."""
FAR = 1e3
"""Distance from zero, in units of the data and in deviations, from which sums are taken around the data."""
ASYMMETRIC = 1e-4
"""Share of a covariance's largest entry up to which entries and their mirror images may differ: rounding."""
WIDEST = 4096
"""Dimensions of a full covariance: its axes are a 64 MiB buffer there, and grow with the square."""
USUAL, MANY = 1024, 2000
"""Dimensions up to which (axes of 4 MiB), and samples from which, a full covariance is the usual one, in few dimensions
:data:`PLENTY` a dimension."""


def _cosines(count: int) -> Tensor:
    """Orthonormal cosine waves over so many places, the rows of ``(count, count)``, from the slowest on."""
    wave = torch.arange(count, dtype=torch.float64)
    waves = (2 / count) ** 0.5 * torch.cos(math.pi / count * torch.outer(wave, wave + 0.5))
    waves[0] /= 2**0.5
    return waves


def _log1p_ratio(y: Tensor) -> Tensor:
    """``log(1 + y) / y``, smooth through ``y = 0``."""
    small = y.abs() < 1e-3
    series = 1 - y * (1 / 2 - y * (1 / 3 - y * (1 / 4 - y / 5)))
    safe = torch.where(small, torch.ones_like(y), y)
    return torch.where(small, series, torch.log1p(safe) / safe)


class GaussianBaseline(nn.Module, Configured):
    """Gaussian fit of the data, kept in buffers and so in the checkpoint.

    Zero mean and identity covariance until :meth:`fit` or a checkpoint fills it; or :meth:`from_covariance`.

    Args:
        shape: Shape of one state, ``(d,)`` or ``(C, H, W)``.
        covariance: ``"full"`` keeps principal axes; ``"cosine"``, of images, takes cosine waves (DCT-II) for them, and
            each wave's own principal colours: close to the principal axes of photographs (Ahmed, Natarajan and Rao,
            1974, https://doi.org/10.1109/T-C.1974.223784) at the memory of a few images; ``"diagonal"`` has a variance
            per coordinate, ``"isotropic"`` one. ``None``, of up to 1,024 dimensions: full if there are 2,000 samples to
            fit it to, or 64 a dimension, or else of axes along the coordinates (in units of narrow axes a network
            learns few samples by heart: docs/RECIPE.md); of more: ``"cosine"`` for images, ``"diagonal"`` for vectors.
        path: Probability path; the linear one by default.

    Raises:
        ValueError: If there is no such covariance, none of states of this shape, or the full one of so many dimensions
            would fill the memory.

    >>> baseline = GaussianBaseline((2,), "diagonal").fit([torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])])
    >>> baseline.mean
    tensor([2., 3.])
    """

    mean: Tensor
    variances: Tensor
    axes: Tensor | None
    fitted: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, shape: Sequence[int], covariance: str | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.shape = counts("shape", shape)
        self.dim = math.prod(self.shape)
        self.by_count = covariance is None and self.dim <= USUAL
        if covariance is None:
            covariance = "full" if self.by_count else "cosine" if len(self.shape) == 3 else "diagonal"
        one_of("covariance", covariance, ("full", "cosine", "diagonal", "isotropic"))
        self.covariance = covariance
        if covariance == "full" and self.dim > WIDEST:
            raise ValueError(
                f"a full covariance of states of shape {self.shape} has axes of {self.dim:,} x {self.dim:,} numbers, "
                f"{4 * self.dim**2 / 2**30:.1f} GiB in each copy of the model; up to {WIDEST:,} dimensions are taken: "
                "set covariance='diagonal'"
            )
        self.path = path or LinearPath()
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("variances", torch.ones(1 if covariance == "isotropic" else self.dim))
        axes = torch.eye(self.dim) if covariance == "full" else None
        if covariance == "cosine":
            if len(self.shape) != 3:
                raise ValueError(f"covariance='cosine' is of images (C, H, W); states have shape {self.shape}")
            channels, height, width = self.shape
            if max(self.shape) > WIDEST:
                raise ValueError(
                    f"cosine waves of images of shape {self.shape} are matrices of the square of each side; up to "
                    f"{WIDEST:,} are taken: set covariance='diagonal'"
                )
            axes = torch.eye(channels).repeat(height * width, 1, 1)
            self.register_buffer("rows", _cosines(height).to(torch.get_default_dtype()))
            self.register_buffer("columns", _cosines(width).to(torch.get_default_dtype()))
        self.register_buffer("axes", axes)
        self.register_buffer("fitted", torch.tensor(False))

    @classmethod
    @checked
    def from_covariance(
        cls, mean: Tensor, covariance: Tensor, path: Path | None = None, shape: Sequence[int] | None = None
    ) -> GaussianBaseline:
        """Baseline of ``N(mean, covariance)``, shapes ``(d,)`` and ``(d, d)``, in the mean's dtype.

        Raises:
            ValueError: If they are no finite, floating mean and symmetric covariance without negative eigenvalues, or
                ``shape`` is of another size.
        """
        size = (len(mean.flatten()),) * 2
        if not (mean.is_floating_point() and covariance.is_floating_point()) or tuple(covariance.shape) != size:
            raise ValueError(
                f"mean has dtype {mean.dtype} and shape {tuple(mean.shape)}, covariance {covariance.dtype} and "
                f"{tuple(covariance.shape)}; floating numbers are needed, of shapes (d,) and (d, d)"
            )
        if not bool(mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean or covariance holds NaN or infinity; give finite ones")
        if bool((covariance - covariance.mT).abs().max() > ASYMMETRIC * covariance.abs().max()):
            raise ValueError("the covariance is not symmetric; give the whole matrix, A @ A.T of a Cholesky factor A")
        if shape is not None and math.prod(shape) != size[0]:
            raise ValueError(f"shape={tuple(shape)} is of {math.prod(shape)} numbers, and the mean has {size[0]}")
        baseline = cls(shape or mean.shape, "full", path).to(mean)
        baseline._set(mean.flatten(), covariance)
        return baseline

    @torch.no_grad()
    def fit(
        self, batches: Iterable[Tensor], floor: float = 1e-6, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> GaussianBaseline:
        """Set mean and covariance from data, in one pass with float64 sums.

        Of fewer than 64 samples a dimension, a full covariance is shrunk towards its diagonal, or, of images, its
        cosine waves, as suits samples that are left out; of fewer than four a warning says so.

        Args:
            batches: States ``(B, *shape)``, dequantized as in training.
            floor: Variance along axes on which the data do not vary, in units of the data squared. Axes that are
                narrower than this, and yet more than rounding, keep their own.
            reduce: Sums a tensor over processes, where each of them sees a part of the data.

        Raises:
            ValueError: If there are fewer than two samples, another shape, or values that are not finite.
        """
        full = self.covariance == "full"
        batches = iter(batches)
        first = [self._rows(batch) for batch in itertools.islice(batches, 1)]
        origin = self._origin(first, reduce)
        # of parts, each of which may be left out
        parts = FOLDS if full else 1
        counts, totals = torch.zeros(parts, dtype=torch.float64), torch.zeros(parts, self.dim, dtype=torch.float64)
        moments = torch.zeros(parts, *self._moment(totals).shape, dtype=torch.float64)
        for flat in itertools.chain(first, map(self._rows, batches)):
            flat = flat - origin
            own = _folds(flat) if full else torch.zeros(len(flat))
            for part in range(parts):
                rows = flat[own == part]
                counts[part] += len(rows)
                totals[part] += rows.sum(0)
                moments[part] += self._moment(rows)
        if reduce is not None:
            totals, moments, counts = reduce(totals), reduce(moments), reduce(counts)
        count = int(counts.sum())
        if count < 2:
            raise ValueError(f"a Gaussian fit needs at least two samples, got {count}")
        mean = totals.sum(0) / count
        covariance = (moments.sum(0) - count * self._moment(mean[None])) / (count - 1)
        mean = mean + origin
        if self.by_count and count < min(MANY, PLENTY * self.dim):
            covariance = covariance.diagonal()
        elif full and count < self.enough:
            targets = {"its diagonal": lambda known: known.diagonal().diag()}
            if len(self.shape) == 3:
                targets["cosine waves"] = GaussianBaseline(self.shape, "cosine").to(torch.float64)._in_waves
            covariance, chosen, weight = _shrunk(
                counts, totals, moments, list(targets.values()), _rounding(mean, floor)
            )
            if count < ENOUGH * self.dim:
                warnings.warn(
                    f"a full covariance of {self.dim:,} dimensions is fitted to {count:,} samples, and therefore "
                    f"shrunk towards {list(targets)[chosen]} (weight {weight:.2g}), so that fresh data keep a "
                    f"likelihood: give {ENOUGH * self.dim:,} or more, or covariance='diagonal'",
                    stacklevel=3,
                )
        if count < FEWEST and (self.by_count or self.covariance in ("diagonal", "cosine")):
            warnings.warn(
                f"a variance for each of {self.dim:,} coordinates is fitted to {count} samples, and some come out far "
                f"too small: fresh data get too low a likelihood. Give {FEWEST} samples or more, or "
                "covariance='isotropic'",
                stacklevel=3,
            )
        self._set(mean, covariance, floor)
        return self

    @property
    def enough(self) -> int:
        """Samples from which the covariance is taken as it is."""
        if self.covariance != "full":
            return FEWEST
        return PLENTY * self.dim

    def _moment(self, flat: Tensor) -> Tensor:
        """Sum of products of coordinates of flat states that the covariance has: all, of a wave's colours, squares."""
        if self.covariance == "full":
            return flat.T @ flat
        if self.covariance == "cosine":
            waves = self._waves(flat)
            return torch.einsum("bpi, bpj -> pij", waves, waves)
        return flat.square().sum(0)

    def _waves(self, flat: Tensor) -> Tensor:
        """Amplitudes of cosine waves in each colour, ``(B, dim) -> (B, H W, C)``."""
        waves = self.rows.to(flat.dtype) @ flat.reshape(-1, *self.shape) @ self.columns.to(flat.dtype).T
        return waves.flatten(2).transpose(1, 2)

    def _pixels(self, waves: Tensor) -> Tensor:
        """Inverse of :meth:`_waves`, ``(B, H W, C) -> (B, dim)``."""
        waves = waves.transpose(1, 2).reshape(-1, *self.shape)
        return (self.rows.to(waves.dtype).T @ waves @ self.columns.to(waves.dtype)).flatten(1)

    def _in_waves(self, covariance: Tensor) -> Tensor:
        """What is left of a covariance ``(d, d)`` where waves of different frequencies are independent."""
        channels = self.shape[0]
        waves = self._waves(self._waves(covariance).flatten(1).T).unflatten(0, (-1, channels))
        place = torch.arange(len(waves))
        kept = torch.zeros_like(waves)
        kept[place, :, place] = waves[place, :, place]
        # one side, then the other
        half = self._pixels(kept.reshape(self.dim, -1, channels)).T
        return self._pixels(half.reshape(self.dim, -1, channels))

    def _rows(self, batch: Tensor) -> Tensor:
        """Flat states, ``(B, dim)``, in double precision; others, and any not finite, are a ``ValueError``."""
        if tuple(batch.shape[1:]) != self.shape:
            raise ValueError(f"a batch has samples of shape {tuple(batch.shape[1:])}, the baseline {self.shape}")
        flat = batch.reshape(len(batch), -1).to("cpu", torch.float64)
        if not bool(flat.isfinite().all()):
            raise ValueError("the data hold NaN or infinite values; the Gaussian fit needs finite data")
        return flat

    def _origin(self, first: list[Tensor], reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
        """What sums are taken around, ``(dim,)``: zero, but for coordinates so far away that squares would cancel."""
        origin = torch.zeros(self.dim, dtype=torch.float64)
        for flat in first:
            mean, deviation = flat.mean(0), flat.std(0, correction=0)
            origin = torch.where(mean.abs() > FAR * deviation.clamp(min=1), mean, origin)
        if reduce is not None:
            origin = reduce(origin) / float(reduce(torch.tensor(1.0, dtype=torch.float64)))
        return origin

    def _set(self, mean: Tensor, covariance: Tensor, floor: float = SMALLEST) -> None:
        variances, least = covariance, _rounding(mean, floor)
        if self.axes is not None and covariance.ndim == 1:
            self.axes.copy_(torch.eye(self.dim))
        elif self.axes is not None:
            variances, axes = torch.linalg.eigh(covariance.to(torch.float64))
            variances = variances.flatten()
            if float(variances.min()) < -1e-6 * float(variances.max()):
                raise ValueError(f"the covariance has a negative eigenvalue ({float(variances.min()):.3g})")
            self.axes.copy_(axes)
            least = torch.maximum(least.max(), NARROWEST * variances.max())
        elif self.covariance == "isotropic":
            variances, least = variances.mean(), least.max()
        self.mean.copy_(mean)
        self.variances.copy_(torch.where(variances > least, variances, variances.clamp(min=floor)))
        self.fitted.fill_(True)

    def check(self, x: Tensor) -> None:
        """Refuse states of another shape than the fit's.

        Raises:
            ValueError: Says both shapes.
        """
        check_shape(x, self.shape, "the Gaussian fit is of states", "set its shape to that of the data")

    def to_axes(self, x: Tensor) -> Tensor:
        """Coordinates along the principal axes, ``(B, *shape) -> (B, dim)``."""
        self.check(x)
        flat = x.reshape(len(x), -1)
        return flat if self.axes is None else self._turn(flat)

    def from_axes(self, z: Tensor) -> Tensor:
        """Inverse of :meth:`to_axes`, ``(B, dim) -> (B, *shape)``."""
        flat = z if self.axes is None else self._turn(z, back=True)
        return flat.reshape(len(z), *self.shape)

    def _turn(self, x: Tensor, back: bool = False) -> Tensor:
        """Flat states to the axes, or back from there, ``(B, dim)``."""
        assert self.axes is not None
        # in half precision, wide axes would drown narrow ones
        with torch.autocast(x.device.type, enabled=False):
            x, axes = x.to(self.axes.dtype), self.axes.mT if back else self.axes
            if self.covariance == "full":
                return x @ axes
            if not back:
                return torch.einsum("bpi, pij -> bpj", self._waves(x), axes).flatten(1)
            return self._pixels(torch.einsum("bpi, pij -> bpj", x.reshape(len(x), *axes.shape[:2]), axes))

    @of_time
    def marginal_variances(self, t: Tensor) -> Tensor:
        """``w(t) = sigma^2 + alpha^2 lambda`` along the axes, ``(B,) -> (B or 1, dim or 1)``."""
        (t,) = distinct(t)
        return self.path.sigma(t)[:, None] ** 2 + self.path.alpha(t)[:, None] ** 2 * self.variances

    @of_time
    def _relative_slope(self, s: Tensor, t: Tensor) -> Tensor:
        """``(w(t) - w(s)) / ((t - s) w(s))``, without the division."""
        path = self.path
        noise = path.sigma_slope(s, t) * (path.sigma(s) + path.sigma(t))
        data = path.alpha_slope(s, t) * (path.alpha(s) + path.alpha(t))
        return (noise[:, None] + data[:, None] * self.variances) / self.marginal_variances(s)

    @of_time
    def divergence(self, s: Tensor, t: Tensor) -> Tensor:
        """``D_0(s, t)``, ``(B,), (B,) -> (B,)``, nats per unit of time; the same for every state."""
        count, (s, t) = len(s), distinct(s, t)
        slope, elapsed = self._relative_slope(s, t), (t - s)[:, None]
        near = (elapsed * slope).abs() < 0.1
        small = torch.where(near, elapsed * slope, torch.zeros_like(slope))
        # far from the diagonal 1 + (t - s) slope would cancel for narrow axes
        safe = torch.where(near, torch.ones_like(slope), elapsed.expand_as(slope))
        far = (self.marginal_variances(t) / self.marginal_variances(s)).log() / safe
        rate = 0.5 * torch.where(near, slope * _log1p_ratio(small), far)
        return (rate.mean(-1) * self.dim).expand(count)

    def jacobian_product(self, v: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Jacobian of ``u_0(., s, t)`` times ``v``, shape of ``v``: a control variate for Hutchinson's estimator."""
        s, t = distinct(s, t)
        ratio = self.marginal_variances(t) / self.marginal_variances(s)
        # (r - 1) / (t - s), its eigenvalues
        return self.from_axes(self._relative_slope(s, t) / (ratio.sqrt() + 1) * self.to_axes(v))

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``u_0(x, s, t)``, shape of ``x``."""
        self.check(x)
        mean = self.mean.reshape(1, *self.shape)
        drift = like(self.path.alpha_slope(s, t), x) * mean
        return drift + self.jacobian_product(x - like(self.path.alpha(s), x) * mean, s, t)

    @of_time
    def angle(self, t: Tensor) -> Tensor:
        """``theta(t)``, ``(B,) -> (B or 1, dim or 1)``, radians: 0 at noise, pi/2 at data."""
        (t,) = distinct(t)
        data, noise = self.path.alpha(t)[:, None] * self.variances.sqrt(), self.path.sigma(t)[:, None]
        return torch.atan2(data, noise.expand_as(data))

    @of_time
    def angle_rate(self, s: Tensor, t: Tensor) -> Tensor:
        """``(theta(t) - theta(s)) / (t - s)``, ``(B or 1, dim or 1)``; the derivative where ``s = t``."""
        s, t = distinct(s, t)
        path, deviation = self.path, self.variances.sqrt()
        elapsed = (t - s)[:, None]
        # sin and cos of the difference of the angles, up to a common factor; the sine without its factor t - s
        sine = deviation * (path.alpha_slope(s, t) * path.sigma(s) - path.alpha(s) * path.sigma_slope(s, t))[:, None]
        cosine = (path.sigma(s) * path.sigma(t))[:, None] + (path.alpha(s) * path.alpha(t))[:, None] * self.variances
        small = (elapsed * sine).abs() < 1e-2 * cosine
        safe_cosine = torch.where(small, cosine, torch.ones_like(cosine))
        y2 = torch.where(small, (elapsed * sine / safe_cosine).square(), torch.zeros_like(cosine))
        series = sine / safe_cosine * (1 - y2 * (1 / 3 - y2 * (1 / 5 - y2 / 7)))
        safe_elapsed = torch.where(small, torch.ones_like(cosine), elapsed.expand_as(cosine))
        direct = torch.atan2(safe_elapsed * sine, torch.where(small, torch.ones_like(cosine), cosine)) / safe_elapsed
        return torch.where(small, series, direct)

    def clock(self, t: Tensor) -> Tensor:
        """Mean angle over the axes as a share of its range, ``(N,) -> (N,)``, from 0 to 1."""
        return self.angle(t).mean(-1) / (math.pi / 2)

    def draw_times(self, count: int, uniform_share: float = 0.25) -> Tensor:
        """Stratified random times whose density follows the clock, mixed with a share of uniform ones, ``(count,)``.

        Training spread by the clock sees each stretch of the flow as much as something happens in it.
        """
        device = self.mean.device
        return self.times_at(
            (torch.arange(count, device=device) + torch.rand(count, device=device)) / count, uniform_share
        )

    def times_at(self, level: Tensor, uniform_share: float = 0.25) -> Tensor:
        """Times below which shares ``level``, in [0, 1], of the draws of :meth:`draw_times` lie, ``(N,) -> (N,)``."""
        device = self.mean.device
        t = torch.linspace(0, 1, 2001, device=device)
        clock = (1 - uniform_share) * self.clock(t.to(self.mean.dtype)).to(t) + uniform_share * t
        upper = torch.searchsorted(clock, level).clamp(1, len(t) - 1)
        low, high = clock[upper - 1], clock[upper]
        return (t[upper - 1] + (level - low) / (high - low) * (t[1] - t[0])).clamp(0, 1)

    def unwhiten(self, z: Tensor, t: Tensor) -> Tensor:
        """Inverse of :meth:`whiten`, ``(B, dim) -> (B, *shape)``."""
        centered = self.from_axes(z * self.marginal_variances(t).sqrt())
        return centered + like(self.path.alpha(t), centered) * self.mean.reshape(1, *self.shape)

    def whiten(self, x: Tensor, t: Tensor) -> Tensor:
        """State at time ``t`` as unit-variance coordinates along the axes, ``(B, *shape) -> (B, dim)``."""
        self.check(x)
        centered = x - like(self.path.alpha(t), x) * self.mean.reshape(1, *self.shape)
        return self.deviations(centered, t)

    def deviations(self, difference: Tensor, t: Tensor) -> Tensor:
        """A difference of states at time ``t`` in standard deviations along the axes, ``(B, *shape) -> (B, dim)``."""
        return self.to_axes(difference) / self.marginal_variances(t).sqrt()

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """Log-density of the fit at time ``t``, ``(B,)``, nats."""
        log_scale = self.marginal_variances(t).log().mean(-1) * self.dim
        return -0.5 * (self.whiten(x, t).square().sum(-1) + log_scale + self.dim * math.log(2 * math.pi))

    def extra_repr(self) -> str:
        return f"shape={self.shape}, covariance={self.covariance!r}, fitted={bool(self.fitted)}"


def _rounding(mean: Tensor, floor: float) -> Tensor:
    """Variances up to which coordinates do not vary, ``(dim,)``, not above ``floor``."""
    return (SMALLEST * mean.square()).clamp(min=SMALLEST).clamp(max=floor)


def _folds(flat: Tensor) -> Tensor:
    """The part that each flat state belongs to, ``(B,)``, from its bits: the same in any order, and for copies."""
    bits = flat.view(torch.int64).sum(1) * 0x1E3779B97F4A7C15  # odd, so that all bits reach the highest
    return (bits >> 61) & (FOLDS - 1)


def _shrunk(
    counts: Tensor, totals: Tensor, moments: Tensor, targets: Sequence[Callable[[Tensor], Tensor]], floor: Tensor
) -> tuple[Tensor, int, float]:
    """A covariance of few samples, shrunk towards the target, with the weight, that suit samples left out of it best.

    Sums are enough: of a part that is left out, the squared lengths by the covariance of the others. (The weight that
    is best in squares, OAS, Chen et al., 2010, https://doi.org/10.1109/TSP.2010.2053029, and what generalised
    cross-validation gives are too small by far for pixels, which share a factor and have heavy tails.)

    From samples in each part, ``(K,)``, their sums ``(K, d)`` and sums of products ``(K, d, d)``, and ``targets`` that
    make of a sample covariance what may take its place, it answers covariance ``(d, d)``, the target's number, and its
    weight in (0, 1]. ``floor``, ``(d,)``, are variances below which coordinates do not vary.
    """
    count, total, moment = counts.sum(), totals.sum(0), moments.sum(0)
    weights = torch.logspace(-6, 0, 61, dtype=torch.float64)
    losses = torch.zeros(len(targets), len(weights), dtype=torch.float64)
    for own, sums, products in zip(counts, totals, moments, strict=True):
        if not 0 < own < count - 1:
            continue
        mean = (total - sums) / (count - own)
        known = (moment - products) / (count - own) - torch.outer(mean, mean)
        known *= (count - own) / (count - own - 1)
        left_out = products - torch.outer(sums, mean) - torch.outer(mean, sums) + own * torch.outer(mean, mean)
        for loss, target in zip(losses, targets, strict=True):
            root = torch.linalg.cholesky(target(known) + floor.diag())
            inside, outside = (torch.linalg.solve_triangular(root, part, upper=False) for part in (known, left_out))
            inside, outside = (torch.linalg.solve_triangular(root, part.mT, upper=False) for part in (inside, outside))
            values, axes = torch.linalg.eigh((inside + inside.mT) / 2)
            lengths = ((outside @ axes) * axes).sum(0)
            mixed = (1 - weights)[:, None] * values.clamp(min=0) + weights[:, None]
            loss += (lengths / mixed).sum(-1) + own * (mixed.log().sum(-1) + 2 * root.diagonal().log().sum())
    # of too few to leave any out nothing is known about correlations
    losses[0, -1] -= 1e-9
    best = int(losses.argmin())
    chosen, weight = best // len(weights), float(weights[best % len(weights)])
    covariance = (moment - torch.outer(total, total) / count) / (count - 1)
    return (1 - weight) * covariance + weight * targets[chosen](covariance), chosen, weight


def baseline_of(joint_map: JointMap) -> GaussianBaseline | None:
    """The Gaussian fit of a joint map's divergence head, if it has one."""
    baseline = getattr(getattr(joint_map, "head", None), "baseline", None)
    return baseline if isinstance(baseline, GaussianBaseline) else None


@torch.no_grad()
def fit_baselines(
    model: nn.Module, states: Callable[[], Iterable[Tensor]], reduce: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Fit every Gaussian baseline of a model that is not fitted yet.

    ``states`` gives the data anew at each call, in batches ``(B, ...)``; ``reduce`` sums a tensor over processes, where
    each of them sees a part.
    """
    baselines = [part for part in model.modules() if isinstance(part, GaussianBaseline)]
    for baseline in baselines:
        if baseline.fitted:
            continue
        # the head's and the backbone's are often alike; one pass then serves both
        kind = (baseline.shape, baseline.covariance, baseline.by_count)
        twins = [b for b in baselines if b.fitted and (b.shape, b.covariance, b.by_count) == kind]
        if twins:
            baseline.load_state_dict(twins[0].state_dict())
        else:
            baseline.fit(states(), reduce=reduce)


class GaussianFlow(JointMap):
    """The exact joint flow map of Gaussian data: both directions, any number of steps.

    >>> flow = GaussianFlow(GaussianBaseline.from_covariance(torch.zeros(2), 4 * torch.eye(2)))
    >>> flow.jump(torch.ones(1, 2), 0.0, 1.0).state
    tensor([[2., 2.]])
    """

    def __init__(self, baseline: GaussianBaseline) -> None:
        super().__init__()
        self.baseline = baseline

    def joint(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Joint:
        return Joint(self.baseline.average_velocity(x, s, t), self.baseline.divergence(s, t))
