"""Whether a trained network's velocity is that of the adapter's convention, or clearly that of another.

The same network is asked and read in other ways: with time mirrored, a thousand times as long or as short, with another
form of the second time, and its answer as the opposite, as a multiple, as the noise or as the clean data. One of them
that explains noised data clearly and certainly better than what was declared is what the network was trained for. An
untrained network explains nothing in any way, and passes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters._asking import TIMES, called, seed
from f2d2_lightning.adapters.adapter import SHARED, AdaptedFlowMap, Adapter
from f2d2_lightning.adapters.call import Call, ConventionError
from f2d2_lightning.adapters.variance_exploding import VarianceExploding
from f2d2_lightning.adapters.variance_preserving import VariancePreserving
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.flows.paths import LinearPath, like
from f2d2_lightning.utils.conditions import Cond, moved, repeated, some_of
from f2d2_lightning.utils.sharding import is_sharded

FEWEST_SAMPLES = 8  # below this nothing is judged
MOST_DRAWS = 8  # noises that are drawn per data point
FEW = 16  # samples of large states on which unlikely ways are tried; the other direction of time is tried on all

# shares of the declared convention's squared error that another one must stay below; a constant factor is judged by
# being one at every time too
CLEARLY_BETTER, BETTER_BY_A_FACTOR = 0.8, 0.95
# share of the error of the best multiple of the state that a network asked in an unlikely way must stay below: one that
# is half-trained may do better with its time held fixed, and is no better than that multiple
LEARNED = 0.97
SAYS_SOMETHING = 0.95  # share of the error of their mean as the answer everywhere, for answers read as noise or data
CERTAIN = 4.0  # standard errors that the difference must be away from zero

SCALES = (1000.0, 0.001)  # units of time that networks are written for, in each other
FACTORS = (2.0, 10.0, 100.0, 1000.0)  # by which an answer may be too small; others mean that not all is learned yet
NEAR = 0.1  # how near to one of them, relatively, a factor must be
TOO_LARGE = 0.7  # factors below this are of answers that are too large
ALIKE = 1.3  # by how much, as a factor, a factor may differ between times

# forms and orders of both times, before which scales stand
INDEX = f"clamp(-log2(clamp(abs(t - s), {2.0**-20}, 1.0)), 0.0, 7.0)"
FORMS = (("s", "t"), ("t", "s"), ("s", "t - s"), ("s", "s - t"), ("t - s", "s"), ("s - t", "s"), ("s", INDEX))
LABELS = ("s", "log(s) / 4", "250 * log(s)")  # what networks of noise levels are told of them

# intervals that jumps are compared on; those that are aligned are what shortcut models are trained for
PAIRS = ((0.0, 1.0), (0.0, 0.5), (0.25, 0.5), (0.5, 0.75), (0.5, 1.0))
STEPS = 6  # midpoint steps of the network's own velocity that a jump is compared with
JUMPS_BETTER = 0.6  # share of the declared jumps' squared error that another form must stay below, at each interval


class _Way(NamedTuple):
    """How a network is asked."""

    what: str
    adapter: Adapter
    mirrored: bool = False


class _Reading(NamedTuple):
    """What an answer is taken for: ``factor`` times the answer is the velocity, or the raw answer is something else."""

    what: str
    target: str = "velocity"
    factor: float = 1.0


AS_IS, OPPOSITE = _Reading(""), _Reading("the opposite sign", factor=-1.0)
OTHERS = (_Reading("the answer taken as the noise", "noise"), _Reading("the answer taken as the clean data", "data"))


@dataclass
class _Noised:
    """Noised data, ``(times, B, ...)``, and what networks may have learned of them."""

    states: Tensor
    cond: Cond | None
    target: Tensor  # data - noise, (1, B, d)
    draws: int  # noises per data point, which follow each other

    @classmethod
    def of(cls, x: Tensor, noise: Tensor, cond: Cond | None) -> _Noised:
        # of small states several noises each, which cost little there, and of which the mean says more
        draws = max(1, min(MOST_DRAWS, 128 // x[0].numel()))
        generator = torch.Generator().manual_seed(2)
        more = [torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device) for _ in range(draws - 1)]
        noise = torch.stack([noise, *more], 1).flatten(0, 1)
        x, cond = x.repeat_interleave(draws, 0), repeated(cond, draws, each=True)
        states = torch.stack([LinearPath().sample(x, noise, x.new_full((len(x),), t)) for t in TIMES])
        return cls(states, cond, (x - noise).flatten(1)[None], draws)

    @cached_property
    def times(self) -> Tensor:
        return self.states.new_tensor(TIMES)[:, None].expand(self.states.shape[:2])

    @cached_property
    def linear(self) -> Tensor:
        """Error of the best multiple of the state per time: what a network knows that has learned hardly anything."""
        flat = self.states.flatten(2)
        factor = (flat * self.target).sum((1, 2)) / flat.square().sum((1, 2))
        return (factor[:, None, None] * flat - self.target).square().mean((1, 2))


def check_velocity(flow_map: AdaptedFlowMap, x: Tensor, noise: Tensor, cond: Cond | None) -> None:
    """Refuse a network of which another convention is clearly right on noised data, and say which argument mends it."""
    if len(x) < FEWEST_SAMPLES:
        return
    ask, noised = _Asker(flow_map, x.device), _Noised.of(x, noise, cond)
    # a map's endpoint is a draw, not a mean, so it is less close to this one's target than a velocity
    leeway = 2.5 if flow_map.endpoint_only else 1.25
    base, found, plausible = x.new_zeros(()), [], set()
    for way in _ways(flow_map, x.ndim > 3):
        try:
            answers = _answers(ask, way, noised)
        except _UnfitError:
            continue
        if not way.what:
            base = _errors(answers, AS_IS, noised, flow_map.adapter)
        for reading in _readings(answers, noised, way, flow_map.adapter):
            rows = _judged(reading)
            other = _errors(answers, reading, noised, flow_map.adapter)[rows]
            before = base[rows, : other.shape[1]]
            gain = (before - other).mean(0).reshape(-1, noised.draws).mean(1)
            # of large or small data, a network that answers the same everywhere would do for one of noise or data
            nothing = math.inf
            if reading in OTHERS:
                mean = (x if reading.target == "data" else torch.zeros_like(x)).flatten(1).mean(0)
                same = flow_map.adapter.velocity_scale / flow_map.adapter.prior_std * mean.expand_as(answers)
                nothing = float(_errors(same, reading, noised, flow_map.adapter)[rows].sum())
            better = CLEARLY_BETTER if reading.factor in (1, -1) else BETTER_BY_A_FACTOR
            linear = noised.linear[rows]
            unlikely = way.adapter is not flow_map.adapter
            known = bool((other.mean(1) < leeway * linear).all())
            if unlikely and not way.mirrored and reading is AS_IS and known and float(gain.mean()) > 0:
                plausible.add(way.adapter.call.text)
            if (
                float(other.sum()) < min(better * float(before.sum()), SAYS_SOMETHING * nothing)
                and known
                and not (unlikely and float(other.mean(1).sum()) > LEARNED * leeway / 1.25 * float(linear.sum()))
                and float(gain.mean()) > CERTAIN * float(gain.std() / len(gain) ** 0.5)
            ):
                found.append((float(other.mean() / linear.mean()), float(other.mean()), way, reading))
    if found:
        # readings are not judged at the same times; what most is explained of counts
        _, error, way, reading = min(found, key=lambda entry: entry[0])
        energy = float(noised.target.square().mean())
        how = " and ".join(part for part in (way.what, reading.what) if part)
        raise ConventionError(
            f"{Adapter.describe(flow_map.network)}, called as {flow_map.adapter.call.text!r}, points the wrong "
            f"way: on {len(x)} noised data its velocity leaves {float(base.mean()) / energy:.2f} of the mean square of "
            f"data - noise as declared, and {error / energy:.2f} with {how}; "
            f"{_remedy(flow_map.adapter, way, reading)}"
        )
    if plausible or bool((base.mean(1) < leeway * noised.linear).all()):
        _check_jumps(ask, x, noise, cond, plausible)


# --- asking in other ways ---


def _ways(flow_map: AdaptedFlowMap, images: bool) -> Iterator[_Way]:
    """The declared way, time mirrored, and where a network can be asked so, others."""
    adapter, network = flow_map.adapter, flow_map.network
    yield _Way("", adapter)
    yield _Way("time running the other way", adapter, True)
    if isinstance(network, nn.Module) and is_sharded(network):
        return  # what raises on one process and not on another would leave them waiting for each other
    spans = adapter.call.times
    for scale in SCALES if spans else ():
        other = _changed(adapter, call=adapter.call.with_times([_scaled(span, scale) for span in spans]))
        yield _Way(f"times {scale:g} times as large", other)
        yield _Way(f"times {scale:g} times as large that run the other way", other, True)
    if images:
        turned = copy.copy(adapter)
        turned.channels_last = not adapter.channels_last
        yield _Way(f"channels_last={turned.channels_last}", turned)
    if isinstance(adapter, VarianceExploding):
        if not adapter.sees_end:
            call = _bare(adapter) if isinstance(adapter, VariancePreserving) else adapter.call.text
            yield _Way("the answer taken as the velocity", Adapter(call, **_shared(adapter)))
        name, readings = adapter.readings
        for reading in readings:
            if adapter.answer == "clean" and reading != getattr(adapter, name):
                yield _Way(f"{name}={reading!r}", _changed(adapter, **{name: reading}))
        # a DDPM's network is told numbers of levels, not levels
        for label in LABELS if len(spans) == 1 and not isinstance(adapter, VariancePreserving) else ():
            if not math.isclose(_value(label, 0.4, 0.4), _value(spans[0], 0.4, 0.4)):
                yield _Way(f"noise levels as {label}", _changed(adapter, call=adapter.call.with_times([label])))
        return
    if not adapter.sees_end:
        yield _Way("the network taken as a denoiser", VarianceExploding(adapter.call.text, **_shared(adapter)))
        yield _Way("the network taken as a DDPM's", VariancePreserving(_bare(adapter), **_shared(adapter)))
    seen = {_on_diagonal(spans)}
    for form in _forms(spans):
        if (key := _on_diagonal(form)) not in seen:
            seen.add(key)
            yield _Way(f"times as {', '.join(form)}", _changed(adapter, call=adapter.call.with_times(form)))


def _bare(adapter: Adapter) -> str:
    """The call with its times as they are: what a DDPM counts has another unit than times from 0 to 1."""
    return adapter.call.with_times(["s"] * len(adapter.call.times))


def _shared(adapter: Adapter) -> dict[str, Any]:
    return {name: getattr(adapter, name) for name in SHARED}


def _changed(adapter: Adapter, **changes: str) -> Adapter:
    """An adapter with other attributes, whatever its class is made from."""
    other = copy.copy(adapter)
    for name, value in changes.items():
        setattr(other, name, Call(value) if name == "call" else value)
    return other


def _value(span: str, s: float, t: float) -> float:
    """An expression of times, at these."""
    times = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("s", s), ("t", t))}
    names: dict[str, Any] = {"x": None, "cond": None, **times}
    return float(Call(f"net(x, {span})")(lambda x, value: value, names))


def _linear(span: str) -> tuple[float, float] | None:
    """``(a, b)`` where an expression of times is ``a s + b t``."""
    a, b = _value(span, 1.0, 0.0), _value(span, 0.0, 1.0)
    exact = all(
        math.isclose(_value(span, s, t), a * s + b * t, abs_tol=1e-9) for s, t in ((0, 0), (0.5, 0.2), (0.2, 0.9))
    )
    return (a, b) if exact else None


def _unit(span: str) -> float | None:
    """Factor of an expression that is linear in the times."""
    coefficients = _linear(span)
    return max(map(abs, coefficients)) if coefficients and any(coefficients) else None


def _scaled(span: str, scale: float) -> str:
    """An expression, ``scale`` times as large; a factor of its own is taken together with it."""
    unit = _unit(span)
    plain = next(
        (form for form in ("s", "t", "t - s", "s - t") if unit and _linear(f"{unit} * ({form})") == _linear(span)), None
    )
    if unit and plain:
        span, scale = plain, unit * scale
    return span if math.isclose(scale, 1) else f"{scale:g} * {span if span in ('s', 't') else f'({span})'}"


def _forms(spans: list[str]) -> list[list[str]]:
    """The two times of a call in other forms and orders, in the unit of those that stand there."""
    unit = next(filter(None, map(_unit, spans)), None)
    if len(spans) != 2 or unit is None:
        return []
    return [[part if part == INDEX else _scaled(part, unit) for part in form] for form in FORMS]


def _on_diagonal(spans: list[str]) -> tuple[float, ...]:
    return tuple(round(_value(span, 0.4, 0.4), 6) for span in spans)


class _UnfitError(Exception):
    """A network does not take such times, shapes or labels: they are not what it was trained for."""


class _Asker:
    """Asks a network in ways that it may not bear: an index of time that is too large stops a GPU for good.

    There, whatever is not declared is tried on a copy on the CPU first, which raises an error in its place.
    """

    def __init__(self, flow_map: AdaptedFlowMap, device: torch.device) -> None:
        self.flow_map = flow_map
        self.copy = None
        self.bears = True
        if device.type != "cpu":
            try:
                self.copy = copy.deepcopy(flow_map).cpu()
            except Exception:  # not every network has a copy
                self.bears = False

    def __call__(self, adapter: Adapter, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """The velocity, or :class:`_UnfitError` from any other adapter than the declared one."""
        if adapter is self.flow_map.adapter:
            return called(self.flow_map, lambda: self.flow_map(x, s, t, cond), x.device)
        if not self.bears:
            raise _UnfitError
        if self.copy is not None:
            few = slice(0, None, max(1, len(x) // len(TIMES)))  # every time, once
            labels = moved(some_of(cond, few), "cpu")
            self._tried(self.copy, adapter, x[few].cpu(), s[few].cpu(), t[few].cpu(), labels)
        return self._tried(self.flow_map, adapter, x, s, t, cond)

    @staticmethod
    def _tried(
        flow_map: AdaptedFlowMap, adapter: Adapter, x: Tensor, s: Tensor, t: Tensor, cond: Cond | None
    ) -> Tensor:
        seed(x.device)
        other = copy.copy(flow_map)  # the same network
        other.adapter = adapter
        try:
            return other(x, s, t, cond)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a network says of what it does not take
            raise _UnfitError from error


def _answers(ask: _Asker, way: _Way, noised: _Noised) -> Tensor:
    """The velocity as asked in a way, ``(times, B, d)``; a declared adapter's on all samples, another's on few."""
    # small states cost little, and of few of them little is certain
    few = max(FEW, min(64, 1024 // noised.states[0, 0].numel()))
    count = noised.states.shape[1] if way.adapter is ask.flow_map.adapter else few * noised.draws
    states, at = noised.states[:, :count], noised.times[:, :count]
    cond = some_of(noised.cond, slice(count))
    at = 1 - at if way.mirrored else at
    to = torch.ones_like(at) if ask.flow_map.endpoint_only else at
    if way.adapter is ask.flow_map.adapter:
        return torch.stack([ask(way.adapter, *row, cond) for row in zip(states, at, to, strict=True)]).flatten(2)
    labels = repeated(cond, len(TIMES))
    answer = ask(way.adapter, states.flatten(0, 1), at.flatten(), to.flatten(), labels)
    return answer.reshape(states.shape).flatten(2)


# --- reading in other ways ---


def _readings(answers: Tensor, noised: _Noised, way: _Way, adapter: Adapter) -> Iterator[_Reading]:
    if way.adapter is not adapter or way.mirrored:
        yield AS_IS
    yield OPPOSITE
    if any(isinstance(a, VarianceExploding) or a.answer == "state" for a in (adapter, way.adapter)):
        return
    yield from OTHERS
    factor = _factor(answers, noised)
    if factor is not None:
        yield _Reading(f"the answer times {factor:.3g}", factor=factor)


def _factor(answers: Tensor, noised: _Noised) -> float | None:
    """The factor that makes the velocity of all answers, if it is one at every time, and none of half-training."""
    target = noised.target[:, : answers.shape[1]]
    products = (answers * target).sum(-1)
    energy = answers.square().sum(-1)
    factors = products.sum(1) / energy.sum(1)
    doubts = ((products - factors[:, None] * energy).square().sum(1)).sqrt() / energy.sum(1)
    factor = float(products.sum() / energy.sum())
    if not math.isfinite(factor) or factor == 0:
        return None
    shares, doubts = factors / factor, doubts / abs(factor)
    one = bool(((shares > 1 / ALIKE - 2 * doubts) & (shares < ALIKE + 2 * doubts) & (shares > 2 * doubts)).all())
    # answers that are too large at every time are of no half-trained network; too small ones are, unless by a factor
    # that somebody multiplies by
    near = next((f for f in FACTORS if math.isclose(abs(factor), f, rel_tol=NEAR)), None)
    if not one or (near is None and abs(factor) >= TOO_LARGE):
        return None
    return factor if near is None else math.copysign(near, factor)


def _errors(answers: Tensor, reading: _Reading, noised: _Noised, adapter: Adapter) -> Tensor:
    """Mean squared error of each sample's velocity, ``(times, B)``.

    Noise and data are compared by the velocity that follows from them: the right reading is then the one with the least
    error, whatever the scale of the data.
    """
    if reading.target == "velocity":
        velocity = reading.factor * answers
    else:
        answers = adapter.prior_std / adapter.velocity_scale * answers
        count = answers.shape[1]
        states, times = noised.states[:, :count].flatten(2), noised.times[:, :count, None]
        velocity = (states - answers) / times if reading.target == "noise" else (answers - states) / (1 - times)
    return (velocity - noised.target[:, : answers.shape[1]]).square().mean(-1)


def _judged(reading: _Reading) -> list[int]:
    """Which times a reading is judged at: noise near noise, and data near data, say little of the velocity."""
    least = {"velocity": lambda t: 1.0, "noise": lambda t: t, "data": lambda t: 1 - t}[reading.target]
    return [k for k, t in enumerate(TIMES) if least(t) > 0.25]


def _remedy(adapter: Adapter, way: _Way, reading: _Reading) -> str:
    if isinstance(adapter, VarianceExploding) != isinstance(way.adapter, VarianceExploding):
        kinds = {VariancePreserving: "VariancePreserving", VarianceExploding: "Denoiser"}
        other = next((name for kind, name in kinds.items() if isinstance(way.adapter, kind)), "Adapter")
        return f"take {other}({way.adapter.call.text!r}) in place of {type(adapter).__name__}"
    if isinstance(adapter, VarianceExploding):
        changed = way.adapter.call.text != adapter.call.text
        fits = f"call={way.adapter.call.text!r}" if changed else way.what
        hint = f" (with {fits} its answers fit)" if fits else ""
        if isinstance(adapter, VariancePreserving):
            return f"check call=, prediction_type= and beta_schedule={hint}, or take another adapter"
        return (
            "the network must take noise levels sigma and answer the clean image (not the noise, and not a velocity): "
            f"check call=, precondition= and answer={hint}, or take another adapter"
        )
    if reading.target != "velocity":
        wrap = "(x - answer) / t" if reading.target == "noise" else "(answer - x) / (1 - t)"
        return (
            f"an Adapter takes velocities or states at the end, so wrap the network in a module that answers {wrap}, "
            "in its own time from 0 (noise) to 1 (data), with velocity_scale=1.0"
        )
    noise_time, data_time = adapter.noise_time, adapter.data_time
    scale = reading.factor * adapter.velocity_scale
    changes = []
    if way.adapter.call.text != adapter.call.text:
        changes.append(f"call={way.adapter.call.text!r}")
    if way.adapter.channels_last != adapter.channels_last:
        changes.append(f"channels_last={way.adapter.channels_last}")
    if way.mirrored:
        noise_time, data_time = data_time, noise_time
        changes.append(f"noise_time={noise_time}, data_time={data_time}")
    if not math.isclose(scale, data_time - noise_time):
        changes.append(f"velocity_scale={scale if reading.factor in (1, -1) else float(f'{scale:.3g}')}")
    return (
        f"give the adapter {', '.join(changes) or f'velocity_scale={scale}'} (it has noise_time={adapter.noise_time}, "
        f"data_time={adapter.data_time}, velocity_scale={adapter.velocity_scale})"
    )


# --- jumps ---


def _check_jumps(ask: _Asker, x: Tensor, noise: Tensor, cond: Cond | None, plausible: set[str]) -> None:
    """Compare jumps with many steps along the network's own velocity, in all forms of the second time.

    ``plausible`` are the calls whose velocity is another than that of the declared call, and as good.
    """
    flow_map, adapter = ask.flow_map, ask.flow_map.adapter
    spans = adapter.call.times
    forms = [form for form in _forms(spans) if form != spans]
    if isinstance(adapter, VarianceExploding) or not forms or flow_map.answerable == Direction.NONE:
        return
    if isinstance(flow_map.network, nn.Module) and is_sharded(flow_map.network):
        return
    pairs = x.new_tensor(PAIRS if Direction.TO_DATA in flow_map.answerable else [pair[::-1] for pair in PAIRS])
    count = min(FEW, len(x))
    few = torch.arange(count, device=x.device).repeat(len(pairs))
    s, t = (column.repeat_interleave(count) for column in pairs.unbind(1))
    states, labels = LinearPath().sample(x[few], noise[few], s), some_of(cond, few)

    def many_steps(called_as: Adapter) -> tuple[Tensor, Tensor]:
        """Average velocity along the instantaneous one, and that at the start."""
        moved, at, step = states, s, (t - s) / STEPS
        slopes = []
        for _ in range(STEPS):
            slopes.append(ask(called_as, moved, at, at, labels))
            middle = at + step / 2
            slope = ask(called_as, moved + like(step / 2, moved) * slopes[-1], middle, middle, labels)
            moved, at = moved + like(step, moved) * slope, at + step
        return (moved - states) / like(t - s, states), slopes[0]

    def errors(u: Tensor, average: Tensor) -> Tensor:
        """Mean squared error of each sample relative to the mean square of the way, ``(pairs, B)``."""
        error, way = (v.reshape(len(pairs), count, -1).square().mean(-1) for v in (u - average, average))
        return error / way.mean(1, keepdim=True)

    followed, jumped = many_steps(adapter), ask(adapter, states, s, t, labels)
    declared, told, best = errors(jumped, followed[0]), _told(spans, pairs, adapter), (math.inf, 0.0, "")
    for form in forms:
        other = _changed(adapter, call=adapter.call.with_times(form))
        same = _on_diagonal(form) == _on_diagonal(spans)
        if not same and other.call.text not in plausible:
            continue
        # pairs at which both forms are the same numbers tell nothing
        differ = [i for i, values in enumerate(_told(form, pairs, adapter)) if not same or values != told[i]]
        try:
            own, u = followed if same else many_steps(other), ask(other, states, s, t, labels)
        except _UnfitError:
            continue
        if len(differ) < 2:
            continue
        error, one_step, before = errors(u, own[0])[differ], errors(own[1], own[0])[differ], declared[differ]
        gain = (before - error).mean(0)
        if (
            bool((error.mean(1) < JUMPS_BETTER * before.mean(1)).all())
            and bool((error.mean(1) < 1.05 * one_step.mean(1)).all())
            and float(gain.mean()) > CERTAIN * float(gain.std() / count**0.5)
        ):
            best = min(best, (float(error.mean()), float(before.mean()), other.call.text))
    if best[2]:
        raise ConventionError(
            f"{Adapter.describe(flow_map.network)}, called as {adapter.call.text!r}, jumps to another place than its "
            f"own velocity leads to: the mean square of the difference is {best[1]:.2g} of that of the way, and "
            f"{best[0]:.2g} with call={best[2]!r}; give the adapter that call"
        )


def _told(spans: list[str], pairs: Tensor, adapter: Adapter) -> list[tuple[float, ...]]:
    """The numbers that stand in a call for the times, for each pair."""
    pairs = adapter.foreign_time(pairs.double())
    return [tuple(round(_value(span, float(s), float(t)), 6) for span in spans) for s, t in pairs]
