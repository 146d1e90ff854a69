"""How many deliberately wrong adapters and networks `check_convention` refuses, and whether it refuses a right one.

Small networks (multilayer perceptrons, a U-Net of convolutions, attention over patches) are trained for seconds as flow
maps of a two-dimensional mixture and of 8 x 8 digits; each is then dressed in other people's conventions, and called by
right and by wrong adapters. The same is done with networks of random weights, and the right ones also with networks
that have been trained for a few steps only.

    python benchmarks/conventions.py

Thresholds were chosen on `--design --seed 0` and `--seed 1` of it (other activations, another mixture, times embedded
the other way round); the table is of a seed that had not been looked at before.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from f2d2_lightning.adapters import (
    AdaptedFlowMap,
    Adapter,
    ConventionError,
    Denoiser,
    FlowMatching,
    MeanFlow,
    Shortcut,
    TorchCFM,
    TwoTime,
    VariancePreserving,
    check_convention,
)
from f2d2_lightning.flows import LinearPath
from f2d2_lightning.flows.paths import like

CLASSES = 10
FIRST = 40
"""Digits that are the centres of the mixture: few, so that seconds of training learn its jumps as well."""

FEW_STEPS = (3, 10, 30, 100)
"""Steps of training after which right networks are checked, beside none and all."""


# --- data whose velocity is known ---


class Points:
    """A mixture of equal round Gaussians at given points, and its velocity."""

    def __init__(self, points: Tensor, std: float, labels: Tensor | None = None) -> None:
        self.points, self.std, self.labels = points, std, labels

    def data(self, count: int) -> tuple[Tensor, Tensor | None]:
        index = torch.randint(len(self.points), (count,))
        x = self.points[index] + self.std * torch.randn(count, *self.points.shape[1:])
        return x, None if self.labels is None else self.labels[index]

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        flat, points, t = x.flatten(1), self.points.flatten(1), t[:, None]
        variance = (1 - t) ** 2 + (t * self.std) ** 2
        distance = flat.square().sum(1, keepdim=True) - 2 * t * flat @ points.T + t**2 * points.square().sum(1)
        logits = -distance / (2 * variance)
        if y is not None and self.labels is not None:
            other = (y[:, None] != self.labels) & (y[:, None] < CLASSES)
            logits = logits.masked_fill(other, -math.inf)
        mean = logits.softmax(1) @ points
        return (mean + (t * self.std**2 - (1 - t)) / variance * (flat - t * mean)).reshape(x.shape)

    def pool(self, count: int, steps: int = 4) -> tuple[Tensor, ...]:
        """States, times, labels and average velocities; half are instantaneous, the others of intervals to data."""
        x, y = self.data(count)
        if y is not None:
            y = torch.where(torch.rand(count) < 0.2, CLASSES, y)
        k = 2 ** torch.randint(0, 5, (count,))
        at = (torch.rand(count) * k).floor()
        diagonal = torch.rand(count) < 0.5
        s = torch.where(diagonal, torch.rand(count), at / k)
        t = torch.where(diagonal, s, (at + 1) / k)
        state = LinearPath().sample(x, torch.randn_like(x), s)
        moved, now, step = state, s, (t - s) / steps
        total = torch.zeros_like(x)
        for _ in range(steps):
            half = moved + like(step / 2, x) * self.velocity(moved, now, y)
            slope = self.velocity(half, now + step / 2, y)
            moved, now, total = moved + like(step, x) * slope, now + step, total + slope / steps
        return state, s, t, total, *(() if y is None else (y,))


def ring(count: int, spread: float) -> Points:
    angle = 2 * math.pi * torch.arange(count) / count
    return Points(spread * torch.stack((angle.cos(), angle.sin()), 1), 0.2)


def digits() -> Points:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return Points(x[:FIRST], 0.2, torch.tensor(labels[:FIRST]))


# --- networks ---


class Times(nn.Module):
    """Sinusoids of a thousand times the time, as most image networks have them; or the plain numbers."""

    def __init__(self, width: int, plain: bool, labels: bool) -> None:
        super().__init__()
        self.plain = plain
        self.layers = nn.Sequential(nn.Linear(2 if plain else 64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width) if labels else None

    def forward(self, s: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        def waves(value: Tensor) -> Tensor:
            angles = 1000 * value[:, None] * torch.exp(-math.log(10_000) * torch.arange(16) / 16)
            return torch.cat((angles.sin(), angles.cos()), 1)

        embedded = self.layers(torch.stack((s, t), 1) if self.plain else torch.cat((waves(s), waves(t - s)), 1))
        return embedded if y is None or self.label is None else embedded + self.label(y)


class Perceptron(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int, activation: type[nn.Module], plain: bool) -> None:
        super().__init__()
        self.times, self.inlet = Times(width, plain, len(shape) > 1), nn.Linear(math.prod(shape), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(activation(), nn.Linear(width, width), activation(), nn.Linear(width, width))
            for _ in range(3)
        )
        self.outlet = nn.Linear(width, math.prod(shape))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        time = self.times(s, t, y)
        h = self.inlet(x.flatten(1)) + time
        for block in self.blocks:
            h = h + block(h + time)
        return self.outlet(h).reshape(x.shape)


class Convolutions(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int, activation: type[nn.Module], plain: bool) -> None:
        super().__init__()
        self.times, self.activation = Times(2 * width, plain, True), activation()
        self.inlet = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.norms = nn.ModuleList(nn.GroupNorm(4, 2 * width) for _ in range(3))
        self.inner = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 3, padding=1) for _ in range(3))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.outlet = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), activation(), nn.Conv2d(width, shape[0], 1)
        )

    def forward(self, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        time = self.times(s, t, y)[:, :, None, None]
        first = self.inlet(x)
        h = self.down(first)
        for norm, layer in zip(self.norms, self.inner, strict=True):
            h = h + layer(self.activation(norm(h) + time))
        return self.outlet(torch.cat((first, self.up(h)), 1))


class Attention(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int, activation: type[nn.Module], plain: bool) -> None:
        super().__init__()
        self.times, self.inlet, self.outlet = Times(width, plain, True), nn.Linear(4, width), nn.Linear(width, 4)
        self.place = nn.Parameter(0.1 * torch.randn(shape[1] * shape[2] // 4, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.mixed = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width)) for _ in range(2)
        )

    def forward(self, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        time = self.times(s, t, y)[:, None]
        h = self.inlet(nn.functional.pixel_unshuffle(x, 2).flatten(2).mT) + self.place + time
        for i in range(2):
            q, k, v = self.mixed[i](self.norms[2 * i](h) + time).unflatten(-1, (3, 4, -1)).transpose(1, 3).unbind(2)
            h = h + (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)
            h = h + self.inner[i](self.norms[2 * i + 1](h))
        side = x.shape[-1] // 2
        return nn.functional.pixel_shuffle(self.outlet(h).mT.reshape(len(x), 4, side, side), 2)


@dataclass
class Case:
    """A network of each age, and data to check it on."""

    name: str
    ages: dict[int | str, nn.Module]
    data: Tensor
    cond: Tensor | None


def train(name: str, points: Points, make: Callable[[], nn.Module], steps: int, seed: int) -> Case:
    torch.manual_seed(seed)
    network = make()
    ages: dict[int | str, nn.Module] = {0: copy.deepcopy(network)}
    zero = copy.deepcopy(network)
    last = [m for m in zero.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    nn.init.zeros_((zero.outlet if isinstance(getattr(zero, "outlet", None), nn.Linear) else last).weight)
    ages["zero"] = zero
    pool = points.pool(8192)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        state, s, t, target, *y = _draw(pool)
        loss = (network(state, s, t, *y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in FEW_STEPS:
            ages[step] = copy.deepcopy(network)
    ages[steps] = network
    x, y = points.data(64)
    return Case(name, ages, x, y)


def _draw(pool: tuple[Tensor, ...]) -> list[Tensor]:
    index = torch.randint(len(pool[0]), (128,))
    return [value[index] for value in pool]


# --- other people's conventions ---


class Foreign(nn.Module):
    """A core in somebody's convention, which ``body(core, ...)`` is."""

    def __init__(self, core: nn.Module, body: Callable[..., Any]) -> None:
        super().__init__()
        self.core, self.body = core, body

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.body(self.core, *arguments, **keywords)


net = SimpleNamespace(
    two_time=lambda core, x, s, t, y=None: core(x, s, t, y),
    end_first=lambda core, x, t, s, y=None: core(x, s, t, y),
    thousand=lambda core, x, s, t, y=None: core(x, s / 1000, t / 1000, y),
    shortcut=lambda core, x, s, dt, y=None: core(x, s, s + dt, y),
    end_down=lambda core, x, s, r, y=None: -core(x, 1 - s, 1 - r, y),
    haidog=lambda core, x, s, r, y=None: (-core(x, 1 - s, 1 - r, y), -core(x, 1 - s, 1 - s, y)),
    teacher=lambda core, x, s, y=None: core(x, s, s, y),
    time_first=lambda core, s, x, y=None: core(x, s, s, y),
    lands=lambda core, s, t, x, y=None: x + like(t - s, x) * core(x, s, t, y),
    noise_answer=lambda core, x, s, y=None: x - like(s, x) * core(x, s, s, y),
    clean_answer=lambda core, x, s, y=None: x + like(1 - s, x) * core(x, s, s, y),
    detached=lambda core, x, s, t, y=None: core(x.detach(), s, t, y),
    no_forward_rule=lambda core, x, s, t, y=None: core(OwnBackward.apply(x), s, t, y),
    deaf=lambda core, x, s, t, y=None: core(x, s, s, y),
    labels_needed=lambda core, x, s, t, y: core(x, s, t, y.long()),
    last_channels=lambda core, x, s, t, y=None: core(x.movedim(-1, 1), s, t, y).movedim(1, -1),
)
"""A core asked in other conventions; the last ones answer wrongly, or lose their derivative."""


def mean_flow(core: nn.Module, x: Tensor, times: tuple[Tensor, Tensor], y: Tensor | None = None) -> Tensor:
    s, h = times
    return -core(x, 1 - s, 1 - s + h, y)


def denoiser(core: nn.Module, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
    tau = 1 / (1 + sigma)
    z = like(tau, x) * x
    return z + like(1 - tau, x) * core(z, tau, tau, y)


def edm_inner(core: nn.Module, x: Tensor, label: Tensor, y: Tensor | None = None) -> Tensor:
    sigma = (4 * label).exp()
    norm = (sigma**2 + 0.25).sqrt()
    state = like(norm, x) * x
    clean = denoiser(core, state, sigma, y)
    return (clean - like(0.25 / norm**2, x) * state) / like(0.5 * sigma / norm, x)


def ddpm(core: nn.Module, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
    """The noise, at times 0 to 999 with betas from .0001 to .02."""
    sigma = torch.expm1((time + 1) * (1e-4 + 9.97e-6 * time)).sqrt()
    state = like((1 + sigma**2).sqrt(), x) * x
    return (state - denoiser(core, state, sigma, y)) / like(sigma, x)


DOWN = {"noise_time": 1.0, "data_time": 0.0}
NULL: dict[str, Any] = {"null_label": CLASSES}
RIGHT: dict[str, tuple[Callable[..., Any], Callable[..., Adapter]]] = {
    "two times": (net.two_time, lambda **k: Adapter(**{"directions": "to_data"} | k)),
    "end first": (net.end_first, lambda **k: Adapter("net(x, t, s, cond)", **{"directions": "to_data"} | k)),
    "thousands": (
        net.thousand,
        lambda **k: Adapter("net(x, 1000 * s, 1000 * t, cond)", **{"directions": "to_data"} | k),
    ),
    "shortcut": (net.shortcut, lambda **k: Shortcut(**k)),
    "mean flow": (mean_flow, lambda **k: MeanFlow("net(x, (s, s - t), cond)", **k)),
    "mean flow, end": (net.end_down, lambda **k: MeanFlow("net(x, s, t, cond)", **k)),
    "two answers": (net.haidog, lambda **k: MeanFlow("net(x, s, t, cond)", **{"output": 0} | k)),
    "state": (net.lands, lambda **k: TwoTime(answer="state", **k)),
    "teacher": (net.teacher, lambda **k: FlowMatching("net(x, s, cond)", **k)),
    "teacher, time first": (net.time_first, lambda **k: TorchCFM(**k)),
    "denoiser": (denoiser, lambda **k: Denoiser(**k)),
    "EDM inner": (edm_inner, lambda **k: Denoiser("net(x, log(s) / 4, cond)", precondition="edm", **k)),
    "DDPM": (ddpm, lambda **k: VariancePreserving(**k)),
}


def multiplied(body: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda core, *a: factor * body(core, *a)


def scaled_time(factor: float) -> Callable[..., Any]:
    """The times in another unit than two_time's."""
    return lambda core, x, s, t, y=None: core(x, s * factor, t * factor, y)


# networks that answer rightly and lose their derivative


def in_inference(core: nn.Module, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return core(x, s, t, y)


def without_gradients(core: nn.Module, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return core(x.detach().clone(), s, t, y)


def energy(core: nn.Module, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        return torch.autograd.grad((core(x.detach(), s, t, y).detach() * leaf).sum(), leaf)[0]


def half_detached(core: nn.Module, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    u = core(x, s, t, y)
    return 0.5 * (u + u.detach())


def overwritten(core: nn.Module, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    u = 2 * core(x, s, t, y)
    u.data.mul_(0.5)  # the tangent stays twice as large
    return u


class OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


UNKNOWABLE = ("direction of time", "sign of velocity", "scale of time", "scale of velocity", "answers noise or data")
"""Kinds that an untrained network does not show."""


def wrong(images: bool, flat: bool) -> Iterator[tuple[str, Callable[..., Any], Adapter, bool]]:
    """Kind, network, adapter, and whether labels are given."""
    two = {"directions": "to_data"} | NULL
    for name, (body, make) in RIGHT.items():
        if name in ("denoiser", "EDM inner", "DDPM", "state"):
            continue
        right = make(**NULL)
        mirrored = {"noise_time": right.data_time, "data_time": right.noise_time}
        yield "direction of time", body, make(**NULL, **mirrored), True
        yield "direction of time", body, make(**NULL, **mirrored, velocity_scale=right.velocity_scale), True
        yield "sign of velocity", body, make(**NULL, velocity_scale=-right.velocity_scale), True
        for factor in (2.0, 0.5, -3.0, 0.001, 1000.0):
            if name in ("two times", "mean flow", "teacher") or factor in (2.0, 0.5):
                yield "scale of velocity", body, make(**NULL, velocity_scale=factor * right.velocity_scale), True
    yield "scale of velocity", multiplied(net.two_time, 1000.0), Adapter(**two), True
    yield "scale of velocity", multiplied(net.two_time, 0.5), Adapter(**two), True
    yield "scale of time", net.thousand, Adapter(**two), True
    yield "scale of time", net.two_time, Adapter("net(x, 1000 * s, 1000 * t, cond)", **two), True
    yield "scale of time", net.thousand, Adapter("net(x, 1000 * (1000 * s), 1000 * (1000 * t), cond)", **two), True
    yield "scale of time", net.haidog, MeanFlow("net(x, 1000 * s, 1000 * t, cond)", output=0, **NULL), True
    yield "scale of time", mean_flow, MeanFlow("net(x, (1000 * s, 1000 * (s - t)), cond)", **NULL), True
    yield "scale of time", net.shortcut, Shortcut(call="net(x, 1000 * s, 1000 * (t - s), cond)", **NULL), True
    yield "scale of time", net.teacher, FlowMatching("net(x, 1000 * s, cond)", **NULL), True
    yield "scale of time", net.time_first, TorchCFM("net(s / 1000, x, cond)", **NULL), True
    yield "scale of time", scaled_time(0.001), Adapter("net(x, s, t, cond)", **two, **DOWN), True
    yield "answers noise or data", net.noise_answer, FlowMatching("net(x, s, cond)", **NULL), True
    yield "answers noise or data", net.clean_answer, FlowMatching("net(x, s, cond)", **NULL), True
    yield "form of the second time", net.shortcut, Adapter("net(x, s, t, cond)", **two), True
    yield "form of the second time", net.shortcut, Shortcut(call="net(x, s, s - t, cond)", **NULL), True
    yield "form of the second time", net.shortcut, Shortcut("index", **NULL), True
    yield "form of the second time", net.two_time, Shortcut(**NULL), True
    yield "form of the second time", net.two_time, Adapter("net(x, s, s - t, cond)", **two), True
    yield "form of the second time", mean_flow, MeanFlow("net(x, (s, t), cond)", **NULL), True
    yield "form of the second time", mean_flow, MeanFlow("net(x, (s, t - s), cond)", **NULL), True
    yield "form of the second time", net.end_down, MeanFlow("net(x, s, s - t, cond)", **NULL), True
    yield "order of the times", net.two_time, Adapter("net(x, t, s, cond)", **two), True
    yield "order of the times", net.end_first, Adapter("net(x, s, t, cond)", **two), True
    yield "order of the times", net.end_down, MeanFlow("net(x, t, s, cond)", **NULL), True
    yield "order of the times", net.shortcut, Shortcut(call="net(x, t - s, s, cond)", **NULL), True
    yield "order of the times", mean_flow, MeanFlow("net(x, (s - t, s), cond)", **NULL), True
    yield "arguments that do not fit", net.two_time, Adapter("net(s, t, x, cond)", **two), True
    yield "arguments that do not fit", net.time_first, FlowMatching("net(x, s, cond)", **NULL), True
    yield "arguments that do not fit", net.teacher, FlowMatching("net(x, s, t, cond, 1)", **NULL), True
    yield "arguments that do not fit", mean_flow, MeanFlow("net(x, s, s - t, cond)", **NULL), True
    yield "arguments that do not fit", net.two_time, Adapter("net(x, s, t, label=cond)", **two), True
    yield "arguments that do not fit", net.haidog, MeanFlow("net(x, s, t, cond)", **NULL), True
    yield "arguments that do not fit", net.haidog, MeanFlow("net(x, s, t, cond)", output="u", **NULL), True
    yield "arguments that do not fit", net.two_time, Adapter("net(x, s, t, cond)", time_axes=2, **two), True
    if images:
        yield "arguments that do not fit", net.last_channels, Adapter(**two), True
        if not flat:  # to one that flattens images of one channel the place of the channel is no matter
            yield "arguments that do not fit", net.two_time, Adapter(channels_last=True, **two), True
        yield "labels", net.two_time, Adapter(directions="to_data", classes=CLASSES), True
        yield "labels", net.labels_needed, Adapter(directions="to_data"), False
        yield "labels", net.two_time, Adapter(directions="to_data", null_label=1000), False
        yield "labels", net.two_time, Adapter(directions="to_data", null_label=-1), False
    for body in (net.detached, in_inference, without_gradients, energy, half_detached):
        yield "dropped tangents", body, Adapter(**two), True
    yield "written in place", overwritten, Adapter(**two), True
    yield "no rule of forward mode", net.no_forward_rule, Adapter(**two), True
    yield "second time ignored", net.deaf, Adapter(**two), True
    yield "second time ignored", lambda core, x, s, h, y=None: core(x, s, s, y), Shortcut(**NULL), True
    yield "noise levels", denoiser, Denoiser("net(x, log(s) / 4, cond)", **NULL), True
    yield "noise levels", denoiser, Denoiser(precondition="edm", **NULL), True
    yield "noise levels", edm_inner, Denoiser("net(x, log(s) / 4, cond)", **NULL), True
    yield "noise levels", edm_inner, Denoiser("net(x, 250 * log(s), cond)", precondition="edm", **NULL), True
    yield "noise levels", denoiser, FlowMatching("net(x, s, cond)", **NULL), True
    yield "noise levels", net.teacher, Denoiser(**NULL), True
    yield "noise levels", ddpm, VariancePreserving("net(x, s / 1000, cond)", **NULL), True
    yield "noise levels", ddpm, VariancePreserving(prediction_type="v_prediction", **NULL), True
    yield "noise levels", ddpm, FlowMatching("net(x, s, cond)", **NULL), True
    yield "noise levels", ddpm, Adapter("net(x, 1000 * s, cond)", directions="none", **DOWN, **NULL), True
    yield "noise levels", net.teacher, VariancePreserving("net(x, s / 1000, cond)", **NULL), True


def refusal(flow_map: AdaptedFlowMap, case: Case, labels: bool) -> str | None:
    try:
        check_convention(flow_map, case.data, case.cond if labels else None)
    except ConventionError as error:
        return str(error)
    return None


def cases(seed: int, steps: int, design: bool) -> Iterator[Case]:
    activation: type[nn.Module] = nn.ReLU if design else nn.SiLU
    mixture, images = (ring(8, 1.5) if design else ring(5, 1.0)), digits()
    shape = (1, 8, 8)
    yield train("mixture, MLP", mixture, lambda: Perceptron((2,), 64, activation, design), steps, seed)
    yield train(
        "mixture, MLP, plain times", mixture, lambda: Perceptron((2,), 96, activation, not design), steps, seed + 1
    )
    yield train("digits, MLP", images, lambda: Perceptron(shape, 192, activation, design), steps, seed + 2)
    yield train("digits, convolutions", images, lambda: Convolutions(shape, 24, activation, design), steps, seed + 3)
    yield train("digits, attention", images, lambda: Attention(shape, 64, activation, design), steps, seed + 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=300)
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--design", action="store_true", help="the cases that thresholds were chosen on")
    parser.add_argument("--kinds", nargs="*", help="kinds of wrong ones, all by default")
    parser.add_argument("--missed", action="store_true", help="name what was not refused")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    counts: Counter[tuple[str, str]] = Counter()
    for case in cases(options.seed, options.steps, options.design):
        trained = options.steps
        if options.missed:
            print(f"# {case.name}, {time.perf_counter() - start:.0f} s", flush=True)
        for kind, body, adapter, labels in wrong(case.data.ndim > 2, "MLP" in case.name):
            if options.kinds and kind not in options.kinds:
                continue
            for age, state in ((trained, "trained"), (0, "untrained")):
                refused = refusal(adapter(Foreign(case.ages[age], body)), case, labels)
                counts[kind, state] += 1
                counts[kind, f"{state}, refused"] += refused is not None
                if options.missed and refused is None and (state == "trained" or kind not in UNKNOWABLE):
                    print(f"missed, {state}: {case.name}: {kind}: {adapter.config()}")
        for age in case.ages:
            state = "trained" if age == trained else "untrained" if age in (0, "zero") else "half-trained"
            for name, (body, make) in RIGHT.items():
                refused = refusal(make(**NULL)(Foreign(case.ages[age], body)), case, True)
                counts["right", state] += 1
                counts["right", f"{state}, refused"] += refused is not None
                if refused is not None and options.missed:
                    print(f"wrongly refused after {age} steps: {case.name}: {name}: {refused}")
    kinds = [kind for kind in dict.fromkeys(kind for kind, _ in counts) if kind != "right"]
    print("| wrong | trained: refused | untrained: refused |\n|---|---|---|")
    for kind in kinds:
        print("| " + " | ".join([kind] + [_share(counts, [kind], state) for state in ("trained", "untrained")]) + " |")
    print("| **all** | " + " | ".join(_share(counts, kinds, state) for state in ("trained", "untrained")) + " |\n")
    print("| right | trained | half-trained | untrained |\n|---|---|---|---|")
    states = ("trained", "half-trained", "untrained")
    print("| refused | " + " | ".join(_share(counts, ["right"], state) for state in states) + " |")
    print(f"\n{time.perf_counter() - start:.0f} s")


def _share(counts: Counter[tuple[str, str]], kinds: list[str], state: str) -> str:
    return f"{sum(counts[k, f'{state}, refused'] for k in kinds)} / {sum(counts[k, state] for k in kinds)}"


if __name__ == "__main__":
    main()
