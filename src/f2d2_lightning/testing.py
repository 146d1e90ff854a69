"""What every flow map must do, as a test class to inherit: for your own adapter, network or closed form.

    class TestMine(FlowMapContract):
        def make_flow_map(self):
            return MeanFlow("net(x, t, s)")(MyNetwork())

        def make_states(self):
            return torch.randn(4, 3, 8, 8, dtype=torch.float64)

pytest collects the inherited checks; each may also be called by itself. All run in double precision. Give
:meth:`FlowMapContract.exact_velocity` or :meth:`FlowMapContract.exact_jump` where the answers are known: without them
a flipped sign cannot be told from a trained one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.divergence.estimators import Exact, jacobian_product
from f2d2_lightning.flows.maps import Direction, FlowMap, JointMap
from f2d2_lightning.flows.paths import Point, expand_time
from f2d2_lightning.nn.head import JointFlowMap
from f2d2_lightning.utils.conditions import Cond, some_of

__all__ = ["FlowMapContract"]


def _expect(holds: bool, message: str) -> None:
    # a plain raise, so that the check also holds under python -O and without pytest's rewriting
    if not holds:
        raise AssertionError(message)


def _refuses(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        function(*arguments)
    except ValueError:
        return True
    return False


class FlowMapContract:
    """Checks of a flow map; inherit and define :meth:`make_flow_map` and :meth:`make_states`.

    Attributes:
        tolerance: Largest difference, relative to one plus the largest expected value, between answers that are equal
            but for rounding (network precision of float32: about 1e-5).
        exact_tolerance: The same for the exact answers.
        grid: Times asked for; all ordered pairs of them that the map's directions allow.
        has_features: Whether ``forward_features`` must work; ``None`` asks the map.
    """

    tolerance: float = 1e-8
    exact_tolerance: float = 1e-6
    grid: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    has_features: bool | None = None

    # --- what you define ---

    def make_flow_map(self) -> FlowMap:
        """The map under test, the same at every call; converted to float64 here."""
        raise NotImplementedError(f"{type(self).__name__} must define make_flow_map() -> FlowMap")

    def make_states(self) -> Tensor:
        """At least two states, ``(B, ...)``."""
        raise NotImplementedError(f"{type(self).__name__} must define make_states() -> Tensor")

    def make_conditioning(self) -> Tensor | None:
        """Conditioning for the states, first axis ``B``."""
        return None

    def make_joint(self) -> JointMap | None:
        """A joint map, whose pair is then checked too."""
        return None

    def exact_velocity(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor | None:
        """The known instantaneous velocity at times ``(B,)``, shape of ``x``."""
        return None

    def exact_jump(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Tensor | None:
        """The known state at times ``t``, from ``x`` at times ``s``, both ``(B,)``; shape of ``x``."""
        return None

    def exact_divergence(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor | None:
        """The known divergence of the instantaneous velocity, ``(B,)``, nats per unit of time."""
        return None

    # --- the checks ---

    def test_shape_and_dtype(self) -> None:
        """``u`` and jumps have the state's shape and dtype, and are finite."""
        flow_map, x, cond = self._case()
        for s, t in self._pairs(flow_map, diagonal=True):
            for what, value in (("u", flow_map(x, s, t, cond)), ("jump", flow_map.jump(x, s, t, cond))):
                _expect(
                    value.shape == x.shape and value.dtype == x.dtype,
                    f"{what} from {s} to {t} is {tuple(value.shape)} {value.dtype}, the state {tuple(x.shape)} "
                    f"{x.dtype}",
                )
                _expect(bool(value.isfinite().all()), f"{what} from {s} to {t} is not finite")

    def test_times_of_either_shape(self) -> None:
        """Numbers, ``()`` and ``(B,)`` are the same times, and each sample has its own."""
        flow_map, x, cond = self._case()
        pairs = self._pairs(flow_map, diagonal=True)
        for s, t in pairs:
            expected = flow_map(x, s, t, cond)
            for form in (lambda v: x.new_tensor(v), lambda v: x.new_full((len(x),), v)):
                self._same(flow_map(x, form(s), form(t), cond), expected, f"u from {s} to {t}, times of another shape")
        chosen = [pairs[i % len(pairs)] for i in range(len(x))]
        starts, stops = (x.new_tensor([pair[i] for pair in chosen]) for i in (0, 1))
        mixed = flow_map(x, starts, stops, cond)
        for i, (start, end) in enumerate(chosen):
            self._same(mixed[i], flow_map(x, start, end, cond)[i], f"u of sample {i} among others' times")

    def test_no_time_no_move(self) -> None:
        """A jump from a time to itself gives the state back."""
        flow_map, x, cond = self._case()
        for t in self.grid:
            moved = flow_map.jump(x, t, t, cond)
            _expect(bool((moved == x).all()), f"the jump from {t} to {t} moves the state")

    def test_jump_is_average_velocity(self) -> None:
        """A jump is ``x + (t - s) u(x, s, t)``, and the velocity is the diagonal."""
        flow_map, x, cond = self._case()
        for s, t in self._pairs(flow_map):
            self._same(flow_map.jump(x, s, t, cond), x + (t - s) * flow_map(x, s, t, cond), f"jump from {s} to {t}")
        if not self._endpoint_only(flow_map):
            for t in self.grid:
                self._same(flow_map.velocity(x, t, cond), flow_map(x, t, t, cond), f"velocity at {t}")

    def test_directions(self) -> None:
        """Orders of time that are not declared, and times outside [0, 1], are refused with a ValueError."""
        flow_map, x, cond = self._case()
        for s, t, direction in ((0.25, 0.75, Direction.TO_DATA), (0.75, 0.25, Direction.TO_NOISE)):
            refused = _refuses(flow_map.jump, x, s, t, cond)
            declared = direction in self._directions(flow_map)
            _expect(
                refused != declared,
                f"{'refuses' if refused else 'takes'} a jump from {s} to {t}, but declares "
                f"directions={flow_map.directions}",
            )
        _expect(_refuses(flow_map.jump, x, 0.5, 1.5, cond), "takes a jump to time 1.5; times lie in [0, 1]")
        _expect(_refuses(flow_map.jump, x, -0.5, 0.5, cond), "takes a jump from time -0.5; times lie in [0, 1]")

    def test_samples_are_independent(self) -> None:
        """A sample alone gets the answer that it gets in a batch."""
        flow_map, x, cond = self._case()
        s, t = self._pairs(flow_map, diagonal=True)[-1]
        batch = flow_map(x, s, t, cond)
        for i in range(len(x)):
            alone = flow_map(x[i : i + 1], s, t, some_of(cond, slice(i, i + 1)))
            self._same(alone, batch[i : i + 1], f"u of sample {i} alone")
        again = flow_map(x, s, t, cond)
        self._same(again, batch, "u asked for twice")

    def test_second_time_matters(self) -> None:
        """``u`` depends on the end: otherwise a jump is an Euler step."""
        flow_map, x, cond = self._case()
        if self._endpoint_only(flow_map):
            return
        pairs = self._pairs(flow_map)
        first: dict[float, Tensor] = {}
        for s, t in pairs:
            answer = flow_map(x, s, t, cond)
            if not torch.equal(first.setdefault(s, answer), answer):
                return
        _expect(not pairs, "u(x, s, t) is the same for all t: the end time is not used")

    def test_derivatives(self) -> None:
        """The forward-mode derivative is that of central differences and of reverse mode."""
        flow_map, x, cond = self._case()
        s, t = self._pairs(flow_map, diagonal=True)[-1]
        generator = torch.Generator().manual_seed(0)
        v, w = (torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for _ in range(2))

        def function(y: Tensor) -> Tensor:
            return flow_map(y, s, t, cond)

        with torch.no_grad():
            value, forward = jacobian_product(function, x, v)
            h = 1e-5
            finite = (function(x + h * v) - function(x - h * v)) / (2 * h)
            self._same(value, function(x), "u under forward-mode differentiation")
        what = "the forward-mode derivative against central differences"
        self._same(forward, finite, what, max(1e-6, self.tolerance))
        y = x.clone().requires_grad_(True)
        with torch.enable_grad():
            answer = function(y)
            reverse = torch.autograd.grad((answer * w).sum(), y)[0] if answer.requires_grad else torch.zeros_like(y)
        self._same((reverse * v).sum(), (forward * w).sum(), "the reverse-mode derivative against the forward one")

    def test_features(self) -> None:
        """Features are ``(B, F, ...)``, the same every time, and ``u`` beside them is that of a plain call."""
        flow_map, x, cond = self._case()
        if not self._gives_features(flow_map):
            return
        shapes = set()
        for s, t in self._pairs(flow_map, diagonal=True):
            u, h = flow_map.forward_features(x, s, t, cond)
            _expect(
                h.ndim >= 2 and len(h) == len(x) and torch.is_floating_point(h),
                f"features are {tuple(h.shape)} {h.dtype} for {len(x)} states, not (B, F, ...)",
            )
            shapes.add(tuple(h.shape))
            self._same(u, flow_map(x, s, t, cond), f"u from {s} to {t} beside its features")
            self._same(flow_map.forward_features(x, s, t, cond)[1], h, "features asked for twice")
        _expect(len(shapes) == 1, f"features have shapes {sorted(shapes)} at different times")

    def test_inference_mode(self) -> None:
        """Works in ``torch.inference_mode``, derivatives included, as Lightning validates in it."""
        flow_map, x, cond = self._case()
        s, t = self._pairs(flow_map, diagonal=True)[-1]
        expected = flow_map(x, s, t, cond)
        _, product = jacobian_product(lambda y: flow_map(y, s, t, cond), x, torch.ones_like(x))
        with torch.inference_mode():
            y = x.clone()
            self._same(flow_map(y, s, t, cond), expected, "u in inference mode")
            _, inside = jacobian_product(lambda z: flow_map(z, s, t, cond), y, torch.ones_like(x))
        self._same(inside, product, "the derivative in inference mode")

    def test_copies(self) -> None:
        """A deep copy answers the same and shares no weights; a state dictionary carries all that is learned."""
        flow_map, x, cond = self._case()
        s, t = self._pairs(flow_map, diagonal=True)[-1]
        with torch.no_grad():
            expected = flow_map(x, s, t, cond)
            other = copy.deepcopy(flow_map)
            self._same(other(x, s, t, cond), expected, "u of a deep copy")
            state = copy.deepcopy(flow_map.state_dict())
            for parameter in other.parameters():
                parameter.add_(0.1)
            self._same(flow_map(x, s, t, cond), expected, "u after a deep copy was changed")
            other.load_state_dict(state)
            self._same(other(x, s, t, cond), expected, "u of a map loaded from the state dictionary")

    def test_exact_answers(self) -> None:
        """Velocity, its divergence and jumps are the known ones, where they are given."""
        flow_map, x, cond = self._case()
        for time in self.grid:
            at = expand_time(time, x)
            velocity, divergence = self.exact_velocity(x, at, cond), self.exact_divergence(x, at, cond)
            if velocity is not None:
                self._close(flow_map.velocity(x, time, cond), velocity, f"the velocity at {time}")
                if divergence is None:
                    divergence = Exact()(self.exact_velocity, Point(x, at, cond)).divergence  # type: ignore[arg-type]
            if divergence is not None:
                with torch.no_grad():
                    estimate = Exact()(flow_map.velocity, Point(x, at, cond)).divergence
                self._close(estimate, divergence, f"the divergence at {time}")
        for s, t in self._pairs(flow_map):
            state = self.exact_jump(x, expand_time(s, x), expand_time(t, x), cond)
            if state is not None:
                self._close(flow_map.jump(x, s, t, cond), state, f"the jump from {s} to {t}")

    def test_joint(self) -> None:
        """A joint map's pair: shapes, the log-density of a jump, and the same ``u`` as its flow map."""
        joint = self.make_joint()
        if joint is None:
            return
        flow_map, x, cond = self._case()
        joint = joint.to(torch.float64).eval()
        for s, t in self._pairs(joint, diagonal=True):
            u, divergence = joint(x, s, t, cond)
            _expect(u.shape == x.shape, f"u is {tuple(u.shape)}, the state {tuple(x.shape)}")
            _expect(divergence.shape == (len(x),), f"D is {tuple(divergence.shape)}, not ({len(x)},)")
            jump = joint.jump(x, s, t, cond)
            self._same(jump.state, x + (t - s) * u, f"the joint map's jump from {s} to {t}")
            self._same(jump.log_prob_change, -(t - s) * divergence, f"the change of log-density from {s} to {t}")
            if isinstance(joint, JointFlowMap):
                self._same(u, flow_map(x, s, t, cond), f"the joint map's u from {s} to {t}")

    # --- helpers ---

    def _case(self) -> tuple[FlowMap, Tensor, Tensor | None]:
        x, cond = self.make_states(), self.make_conditioning()
        _expect(x.ndim >= 2 and len(x) >= 2, f"make_states gave shape {tuple(x.shape)}; at least two states, (B, ...)")
        return self.make_flow_map().to(torch.float64).eval(), x.to(torch.float64), cond

    @staticmethod
    def _directions(flow_map: FlowMap | JointMap) -> Direction:
        answerable = getattr(flow_map, "answerable", flow_map.directions)
        return answerable if isinstance(answerable, Direction) else flow_map.directions

    @staticmethod
    def _endpoint_only(flow_map: FlowMap) -> bool:
        return bool(getattr(flow_map, "endpoint_only", False))

    def _pairs(self, flow_map: FlowMap | JointMap, diagonal: bool = False) -> list[tuple[float, float]]:
        """Pairs of times of the grid that the map answers."""
        directions = self._directions(flow_map)
        times = sorted(self.grid)
        pairs = [(t, t) for t in times] if diagonal else []
        rising = [(s, t) for i, s in enumerate(times) for t in times[i + 1 :]]
        if Direction.TO_NOISE in directions:
            pairs += [(t, s) for s, t in rising]
        if Direction.TO_DATA in directions:
            pairs += rising
        return pairs

    def _gives_features(self, flow_map: FlowMap) -> bool:
        if self.has_features is not None:
            return self.has_features
        if type(flow_map).forward_features is FlowMap.forward_features:
            return False
        return getattr(flow_map, "tap", True) is not None

    def _same(self, actual: Tensor, expected: Tensor, what: str, tolerance: float | None = None) -> None:
        tolerance = self.tolerance if tolerance is None else tolerance
        _expect(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
        error = float((actual - expected).detach().abs().max())
        scale = 1 + float(expected.detach().abs().max())
        # written so that NaN fails as well
        _expect(error <= tolerance * scale, f"{what} is off by {error:.3g}")

    def _close(self, actual: Tensor, expected: Tensor, what: str) -> None:
        self._same(actual, expected, what, self.exact_tolerance)
