"""Four few-step generative models of small images, as somebody else might have written them.

Nothing here knows of likelihoods or of this repository's package: a shortcut model, a MeanFlow, a consistency model
with the denoiser it is distilled from, and a flow map, each in the calling convention of its own family, with the loss
of its own paper, in plain PyTorch. ``wrap_shortcut.py``, ``wrap_consistency.py`` and
``benchmarks/wrapped_families.py`` wrap them.

Images are ``(B, C, H, W)``. All networks are one residual perceptron, preconditioned with a fixed mean and standard
deviation per pixel (after Karras et al., 2022, https://arxiv.org/abs/2206.00364): under a Gaussian of that mean and
deviation the answer is right with the perceptron at zero, and the perceptron answers numbers of order one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ConsistencyNet", "FlowMapNet", "MeanFlowNet", "ShortcutNet", "meanflow_loss"]

Draw = Callable[[], Tensor]

SCALES = (0.04, 0.12, 0.35, 1.0)


def phase_features(signal: Tensor, noise: Tensor) -> Tensor:
    """Smooth features of a noise level, ``(B,), (B,) -> (B, 16)``: its phase as seen by data of several scales."""
    angle = torch.atan2(signal[:, None] * signal.new_tensor(SCALES), noise[:, None])
    return torch.cat((angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()), -1)


def draw_times(count: int) -> Tensor:
    """Times in [0, 1], ``(count,)``, where ``t`` is the share of data, evenly spread over the phases above."""
    angle = torch.rand(count) * (math.pi / 2)
    scale = torch.tensor(SCALES)[torch.randint(len(SCALES), (count,))]
    return angle.sin() / (angle.sin() + scale * angle.cos())


class Block(nn.Module):
    """Residual block, modulated by the time embedding."""

    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(embedding, 3 * width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.normal_(self.body[3].weight, std=0.3 / width**0.5)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(time).chunk(3, -1)
        return h + (1 + gate) * self.body(self.norm(h) * (1 + scale) + shift)


class Perceptron(nn.Module):
    """Residual perceptron on normalised pixels ``(B, D)``, with a gain per pixel that depends on time."""

    def __init__(self, dim: int, time_features: int, width: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(time_features, 96), nn.SiLU(), nn.Linear(96, 96))
        self.inlet = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, 96, dropout) for _ in range(blocks))
        self.gain = nn.Linear(96, dim)
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, dim)
        for layer in (self.gain, self.outlet):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, time_features: Tensor) -> Tensor:
        time = nn.functional.silu(self.time_embedding(time_features))
        h = self.inlet(z)
        for block in self.blocks:
            h = block(h, time)
        return self.gain(time) * z + self.outlet(self.norm(h))


class Normalized(nn.Module):
    """Base of the networks: pixel statistics, and the average velocity of a Gaussian with them on the linear path.

    Inside, time is the share of data: ``x_t = (1 - t) eps + t x_1``.
    """

    def __init__(self, mean: Tensor, std: Tensor, time_features: int, width: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean.flatten())
        self.register_buffer("std", std.flatten())
        self.perceptron = Perceptron(mean.numel(), time_features, width, blocks, dropout)

    def variance(self, t: Tensor) -> Tensor:
        return (1 - t)[:, None] ** 2 + (t[:, None] * self.std) ** 2

    def scale(self, t: Tensor) -> Tensor:
        """What the perceptron's answer is multiplied with, ``(B, D)``: how uncertain the velocity is at ``t``."""
        return self.std / self.variance(t).sqrt()

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, time_features: Tensor) -> Tensor:
        start, end = self.variance(s), self.variance(t)
        centered = x.flatten(1) - s[:, None] * self.mean
        # the variances' divided difference, so that s = t is no special case
        growth = (s + t)[:, None] * self.std**2 - (2 - s - t)[:, None]
        slope = growth / (start * ((end / start).sqrt() + 1))
        answer = self.perceptron(centered / start.sqrt(), time_features)
        return (self.mean + slope * centered + self.scale(s) * answer).reshape(x.shape)


class ShortcutNet(Normalized):
    """Shortcut model, ``net(x, t, dt, y)``: time runs from noise (0) to data (1), ``dt > 0`` is the step's length.

    Frans et al., 2024, https://arxiv.org/abs/2410.12557
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int = 384, blocks: int = 2, dropout: float = 0.4) -> None:
        super().__init__(mean, std, 16 + 6, width, blocks, dropout)

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, y: Tensor | None = None) -> Tensor:
        octaves = dt.log2() / 7
        lengths = [dt, dt.sqrt(), octaves]
        lengths += [(math.pi / 2 * octaves).cos(), (math.pi / 2 * octaves).sin(), (math.pi * octaves).cos()]
        features = torch.cat((phase_features(t, 1 - t), torch.stack(lengths, -1)), -1)
        return self.average_velocity(x, t, t, features)


class MeanFlowNet(Normalized):
    """MeanFlow, ``net(x, (t, h), aug_cond)``: time runs from data (0) to noise (1); ``z_r = z_t - h u``, ``h = t - r``.

    Geng et al., 2025, https://arxiv.org/abs/2505.13447
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int = 384, blocks: int = 2, dropout: float = 0.4) -> None:
        super().__init__(mean, std, 2 * 16 + 2, width, blocks, dropout)

    def forward(self, x: Tensor, times: tuple[Tensor, Tensor], aug_cond: Tensor | None = None) -> Tensor:
        t, h = times
        r = t - h
        features = torch.cat((phase_features(1 - t, t), phase_features(1 - r, r), torch.stack(times, -1)), -1)
        return -self.average_velocity(x, 1 - t, 1 - r, features)


class FlowMapNet(Normalized):
    """Flow map, ``net(s, t, x)``: ``X_{s,t}(x) = x + (t - s) net(s, t, x)``, time runs from noise (0) to data (1).

    Boffi et al., 2025, https://arxiv.org/abs/2505.18825
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int = 384, blocks: int = 2, dropout: float = 0.4) -> None:
        super().__init__(mean, std, 2 * 16 + 2, width, blocks, dropout)

    def forward(self, s: Tensor, t: Tensor, x: Tensor) -> Tensor:
        features = torch.cat((phase_features(s, 1 - s), phase_features(t, 1 - t), torch.stack((s, t - s), -1)), -1)
        return self.average_velocity(x, s, t, features)


class ConsistencyNet(Normalized):
    """Denoiser or consistency model, ``net(x, sigma) -> clean image`` of ``x = x_1 + sigma eps``.

    c_skip is one and c_out is zero at ``sigma = 0``, so that it answers the state there. Song et al., 2023,
    https://arxiv.org/abs/2303.01469
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int = 384, blocks: int = 2, dropout: float = 0.4) -> None:
        super().__init__(mean, std, 16, width, blocks, dropout)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma[:, None]
        total = level**2 + self.std**2
        centered = x.flatten(1) - self.mean
        answer = self.perceptron(centered / total.sqrt(), phase_features(torch.ones_like(sigma), sigma))
        clean = self.mean + self.std**2 / total * centered + level * self.std / total.sqrt() * answer
        return clean.reshape(x.shape)


# --- training ---


def fit(
    network: nn.Module,
    loss: Callable[[nn.Module, nn.Module], Tensor],
    steps: int,
    lr: float = 2e-3,
    weight_decay: float = 2.0,
    decay: float = 0.998,
) -> nn.Module:
    """AdamW with a cosine schedule; gives the average of the weights, in evaluation mode.

    ``loss(network, average)`` draws its own batch.
    """
    average = copy.deepcopy(network).eval().requires_grad_(False)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps), pct_start=0.07)
    network.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(network, average).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        rate = 1 - min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for a, b in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(b, rate)
    return average


def along(t: Tensor, x: Tensor) -> Tensor:
    """Times ``(B,)`` shaped to multiply images ``(B, C, H, W)``."""
    return t.reshape(-1, *(1 for _ in x.shape[1:]))


def squared(error: Tensor, scale: Tensor) -> Tensor:
    """Mean square of an error ``(B, ...)`` in units of ``scale``, ``(B, D)``: one number per sample, ``(B,)``."""
    return (error.flatten(1) / scale).square().mean(-1)


def linear_path(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Time, state, velocity ``x_1 - eps`` and data of a batch on the linear path, time being the share of data."""
    data = draw()
    t, noise = draw_times(len(data)), torch.randn_like(data)
    return t, data * along(t, data) + noise * along(1 - t, data), data - noise, data


def train_shortcut(draw: Draw, mean: Tensor, std: Tensor, steps: int, finest: int = 7, **sizes: float) -> nn.Module:
    """Flow matching at the shortest step, self-consistency of doubled steps for a quarter of the batch."""

    def loss(network: nn.Module, average: nn.Module) -> Tensor:
        t, x, v, data = linear_path(draw)
        flow = squared(network(x, t, torch.full_like(t, 2.0**-finest)) - v, network.scale(t))
        few = len(data) // 4
        count = 2 ** torch.randint(finest, (few,))
        step = 1 / count
        t = (torch.rand(few) * count).floor() / count
        x = data[:few] * along(t, data) + torch.randn_like(data[:few]) * along(1 - t, data)
        with torch.no_grad():
            first = average(x, t, step / 2)
            middle = x + along(step / 2, x) * first
            target = (first + average(middle, t + step / 2, step / 2)) / 2
        return flow.mean() + squared(network(x, t, step) - target, network.scale(t)).mean()

    return fit(ShortcutNet(mean, std, **sizes), loss, steps)


def meanflow_loss(network: nn.Module, data: Tensor) -> Tensor:
    """The MeanFlow identity ``u = v - h du/dt``, with the derivative from a Jacobian-vector product."""
    share, x, v, _ = linear_path(lambda: data)
    t, v = 1 - share, -v
    far = torch.rand(len(t)) < 0.5
    h = torch.where(far, t * torch.rand(len(t)), 0.0)
    one = torch.ones_like(t)
    u, slope = torch.func.jvp(lambda z, a, b: network(z, (a, b)), (x, t, h), (v, one, one))
    error = squared(u - (v - along(h, x) * slope).detach(), network.scale(1 - t))
    return (error / (error.detach() + 0.1)).mean()


def train_meanflow(draw: Draw, mean: Tensor, std: Tensor, steps: int, **sizes: float) -> nn.Module:
    """MeanFlow with :func:`meanflow_loss`."""
    return fit(MeanFlowNet(mean, std, **sizes), lambda network, average: meanflow_loss(network, draw()), steps)


def train_flow_map(draw: Draw, mean: Tensor, std: Tensor, steps: int, **sizes: float) -> nn.Module:
    """Flow matching on the diagonal, the semigroup property off it (progressive self-distillation)."""

    def loss(network: nn.Module, average: nn.Module) -> Tensor:
        t, x, v, data = linear_path(draw)
        flow = squared(network(t, t, x) - v, network.scale(t))
        few = len(data) // 2
        s, end = torch.stack((draw_times(few), torch.rand(few))).sort(0).values
        s = torch.where(torch.rand(few) < 0.3, 0.0, s)
        end = torch.where(torch.rand(few) < 0.3, 1.0, end)
        middle = s + (end - s) * torch.rand(few)
        x = data[:few] * along(s, data) + torch.randn_like(data[:few]) * along(1 - s, data)
        with torch.no_grad():
            first = average(s, middle, x)
            second = average(middle, end, x + along(middle - s, x) * first)
            share = along((middle - s) / (end - s).clamp(min=1e-6), x)
            target = share * first + (1 - share) * second
        return flow.mean() + squared(network(s, end, x) - target, network.scale(s)).mean()

    return fit(FlowMapNet(mean, std, **sizes), loss, steps)


def train_denoiser(draw: Draw, mean: Tensor, std: Tensor, steps: int, **sizes: float) -> nn.Module:
    """A denoiser, ``net(x, sigma)``, which a consistency model is distilled from."""

    def loss(network: nn.Module, average: nn.Module) -> Tensor:
        data = draw()
        t = draw_times(len(data)).clamp(1 / 81, 1 / 1.002)
        sigma = (1 - t) / t
        clean = network(data + along(sigma, data) * torch.randn_like(data), sigma)
        level = sigma[:, None]
        return squared(clean - data, level * network.std / (level**2 + network.std**2).sqrt()).mean()

    return fit(ConsistencyNet(mean, std, **sizes), loss, steps)


def train_consistency(draw: Draw, denoiser: nn.Module, steps: int, levels: int = 40) -> nn.Module:
    """Consistency distillation: the answer is the same at both ends of a Heun step of the denoiser's flow."""
    ramp = torch.linspace(0, 1, levels)
    sigmas = (0.002 ** (1 / 7) + ramp * (80.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    network = copy.deepcopy(denoiser).requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1

    def loss(network: nn.Module, average: nn.Module) -> Tensor:
        data = draw()
        n = torch.randint(levels - 1, (len(data),))
        low, high = sigmas[n], sigmas[n + 1]
        x = data + along(high, data) * torch.randn_like(data)
        with torch.no_grad():
            slope = (x - denoiser(x, high)) / along(high, x)
            near = x + along(low - high, x) * slope
            slope = (slope + (near - denoiser(near, low)) / along(low, x)) / 2
            near = x + along(low - high, x) * slope
            target = average(near, low)
        level = high[:, None]
        return squared(network(x, high) - target, level * network.std / (level**2 + network.std**2).sqrt()).mean()

    return fit(network, loss, steps, lr=1e-3, weight_decay=0.01, decay=0.99)


@torch.no_grad()
def sample_consistency(network: nn.Module, noise: Tensor, steps: int, sigma_max: float = 80.0) -> Tensor:
    """Its own sampler: jump to data, add fresh noise (seeded), as often as ``steps`` says, from ``noise``."""
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.linspace(sigma_max ** (1 / 7), 0.002 ** (1 / 7), steps + 1)[:-1] ** 7
    clean, fresh = torch.zeros_like(noise), noise
    for sigma in sigmas:
        clean = network(clean + sigma * fresh, sigma.expand(len(noise)))
        fresh = torch.randn(noise.shape, generator=generator)
    return clean
