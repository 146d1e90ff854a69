"""Everything that computes, on the device in each precision, against float64 on the CPU with the same draws.

A check makes its networks and states in float64 on the CPU from one seed, moves them where it is told, and answers
tensors. Random numbers are drawn on the CPU in float64 for all settings, so that they agree to rounding. What counts is
``|answer - truth| / |truth|`` over all numbers of a check.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning import adapters, divergence, flows, likelihood, objectives
from f2d2_lightning import nn as networks
from f2d2_lightning.modules._compile import compile_network
from gpu_stages.kept import Kept

SHAPE, POINTS = (3, 8, 8), (6,)
TOLERANCES = {"float32": 1e-2, "compiled": 1e-2, "bf16": 0.2, "bf16 compiled": 0.2}
"""Largest relative error: convolutions in TF32 and a solver of some steps; bfloat16 has 8 bits."""


@contextlib.contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Global random numbers come from one CPU generator in float64, whatever the device and precision asked for."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str) -> Callable[..., Tensor]:
        plain = getattr(torch, name)

        @functools.wraps(plain)
        def draw(*args: Any, generator: Any = None, device: Any = None, dtype: Any = None, **kwargs: Any) -> Tensor:
            if str(sys._getframe(1).f_globals.get("__name__")).startswith("torch."):
                # a compiler traces these as operations
                given = {"generator": generator} if generator is not None else {}
                return plain(*args, **given, device=device, dtype=dtype, **kwargs)
            own = common if generator is None else generator
            if name.endswith("_like"):
                like, *rest = args
                made = getattr(torch, name.removesuffix("_like"))(*rest, like.shape, generator=own)
                return made.to(device=device or like.device, dtype=dtype or like.dtype)
            args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
            wide = {"dtype": torch.float64} if name in ("rand", "randn") else {}
            made = plain(*args, generator=own, **wide, **kwargs)
            kind = dtype or (torch.get_default_dtype() if wide else made.dtype)
            return made.to(device=device, dtype=kind)

        return draw

    common = generator
    names = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like")
    with mock.patch.multiple(torch, **{name: drawn(name) for name in names}):
        yield


@dataclass(frozen=True)
class Setting:
    """Where and how a check runs."""

    device: torch.device
    name: str = "float64"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.name == "float64" else torch.float32

    def move(self, module: Any) -> Any:
        """A network or a map here, compiled where that is the setting."""
        module = module.to(device=self.device, dtype=self.dtype)
        network = getattr(module, "flow_map", module)
        if "compiled" in self.name and isinstance(network, flows.FlowMap):
            with contextlib.suppress(ValueError):  # an adapted network is refused
                compile_network(network)
        return module

    def state(self, count: int, shape: tuple[int, ...], seed: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (0.7 * torch.randn(count, *shape, generator=generator)).to(self.device, self.dtype)

    def times(self, *values: float) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=self.dtype)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in self.name):
            yield


def baseline(shape: tuple[int, ...], covariance: str = "diagonal") -> f2.GaussianBaseline:
    made = f2.GaussianBaseline(shape, covariance)
    made.fit([0.3 + 0.6 * torch.randn(4096, *shape, generator=torch.Generator().manual_seed(2))])
    return made


BACKBONES: dict[str, tuple[tuple[int, ...], Callable[[], flows.FlowMap]]] = {
    "MLP": (POINTS, lambda: networks.MLP(POINTS, width=64, blocks=2)),
    "PreconditionedMLP": (POINTS, lambda: networks.PreconditionedMLP(POINTS, "full", width=64, blocks=2)),
    "ResNet": (SHAPE, lambda: networks.ResNet(SHAPE, width=16)),
    "UNet": (SHAPE, lambda: networks.UNet(SHAPE, width=32, multipliers=(1, 2), blocks=1, attention=(4,), classes=3)),
    "DiT": (SHAPE, lambda: networks.DiT(SHAPE, width=64, depth=2, heads=4)),
    "PreconditionedUNet": (SHAPE, lambda: networks.PreconditionedUNet(SHAPE, width=32, multipliers=(1, 2), blocks=1)),
}


def joint(name: str) -> f2.JointFlowMap:
    """A joint map with random weights, float32 on the CPU."""
    shape, make = BACKBONES[name]
    torch.manual_seed(0)
    backbone = make()
    fit = baseline(shape, "full" if shape == POINTS else "diagonal")
    if isinstance(backbone, networks.GaussianPreconditioned):
        backbone.baseline.load_state_dict(baseline(shape, backbone.baseline.covariance).state_dict())
    made = f2.JointFlowMap(backbone, f2.DivergenceHead(backbone.features, hidden=32, baseline=fit))
    made.head.scale.fill_(3.0)
    with torch.no_grad():
        for parameter in made.parameters():  # last layers start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


Check = Callable[[Setting], list[Tensor]]


def _answers(name: str) -> Check:
    def check(here: Setting) -> list[Tensor]:
        student, shape = here.move(joint(name)), BACKBONES[name][0]
        x, s, t = here.state(4, shape), here.times(0.1, 0.9, 0.5, 1.0), here.times(0.8, 0.2, 0.5, 0.0)
        cond = torch.tensor([0, 1, 2, 1], device=here.device) if student.flow_map.conditional else None
        with torch.no_grad():
            return list(student(x, s, t, cond))

    return check


def _estimated(name: str, make: Callable[[], f2.divergence.DivergenceEstimator], backbone: str) -> Check:
    def check(here: Setting) -> list[Tensor]:
        student, shape = here.move(joint(backbone)), BACKBONES[backbone][0]
        estimator = make()
        if getattr(estimator, "control", None) is not None:
            estimator.control = here.move(estimator.control)  # type: ignore[attr-defined]
        data, noise, t = here.state(4, shape), here.state(4, shape, 6), here.times(0.1, 0.4, 0.6, 0.95)
        column = t.reshape(-1, *(1 for _ in shape))
        x = (1 - column) * noise + column * data
        with torch.no_grad():
            answer = estimator(student.velocity, flows.Point(x, t, None, (data, noise)))
        return [answer.velocity, answer.divergence]

    return check


ESTIMATORS: dict[str, Callable[[], divergence.DivergenceEstimator]] = {
    "Exact": lambda: divergence.Exact(chunk=5),
    "Exact in reverse": lambda: divergence.Exact(mode="reverse"),
    "Hutchinson": lambda: divergence.Hutchinson(2),
    "Hutchinson, Gaussian probes": lambda: divergence.Hutchinson(2, "gaussian"),
    "Hutchinson in reverse": lambda: divergence.Hutchinson(mode="reverse"),
    "Hutchinson by differences": lambda: divergence.Hutchinson(mode="finite", step=0.1),
    "Conditional": lambda: divergence.Conditional(),
}
OBJECTIVES: dict[str, Callable[[], objectives.Objective]] = {
    "TrajectoryRegression": lambda: objectives.TrajectoryRegression(nodes=6, capacity=8, chunk=8, unroll=0.0),
    "TrajectoryRegression, whole paths": lambda: objectives.TrajectoryRegression(
        nodes=6, capacity=8, chunk=8, unroll=1.0, starts={"mixed": 0.5, "student": 0.5}
    ),
    "Semigroup": objectives.Semigroup,
    "Lagrangian": objectives.Lagrangian,
    "Eulerian": objectives.Eulerian,
    "VolumeRegression": objectives.VolumeRegression,
}


def _loss(make: Callable[[], objectives.Objective], backbone: str) -> Check:
    def check(here: Setting) -> list[Tensor]:
        student, teacher = here.move(joint(backbone)), here.move(copy.deepcopy(joint(backbone).flow_map))
        objective = make()
        objective.structure = torch.Generator().manual_seed(0)
        source = objectives.TeacherSource(teacher, f2.Hutchinson())
        data = here.state(8, BACKBONES[backbone][0])
        terms = objective.loss(student, objectives.Batch(data, source, progress=1.0))
        terms.loss.backward()
        gradient = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        return [terms.loss.detach()[None], torch.cat(gradient)]

    return check


class Foreign(nn.Module):
    """Somebody's network: a velocity field, smooth, with whatever times it is given as one more input."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inlet, self.times, self.outlet = nn.Linear(6, 32), nn.Linear(times, 32), nn.Linear(32, 6)

    def forward(self, x: Tensor, *times: Any) -> Tensor:
        flat = [v for t in times if t is not None for v in (t if isinstance(t, tuple) else (t,))]
        columns = torch.stack([v.to(x.dtype).expand(len(x)) for v in flat], -1)
        return self.outlet(torch.tanh(self.inlet(x) + self.times(columns)))


ADAPTERS: dict[str, tuple[Callable[[], adapters.Adapter], int]] = {
    "FlowMatching": (lambda: adapters.FlowMatching(), 1),
    "TorchCFM": (lambda: adapters.TorchCFM("net(x, s)"), 1),
    "MeanFlow": (lambda: adapters.MeanFlow(directions="both"), 2),
    "Shortcut": (lambda: adapters.Shortcut(directions="both"), 2),
    "Shortcut by index": (lambda: adapters.Shortcut("index", call="net(x, s, -log2(clamp(abs(t - s), 1e-3, 1.0)))"), 2),
    "TwoTime": (lambda: adapters.TwoTime("net(x, s, t)", directions="both"), 2),
    "Denoiser": (lambda: adapters.Denoiser(call="net(x, s)", precondition="edm"), 1),
    "VariancePreserving": (lambda: adapters.VariancePreserving("net(x, s / 1000)"), 1),
    "Consistency": (lambda: adapters.Consistency(call="net(x, s)", precondition="consistency"), 1),
    "CTM": (lambda: adapters.CTM(call="net(x, s, t)"), 2),
}


def _adapted(make: Callable[[], adapters.Adapter], times: int) -> Check:
    def check(here: Setting) -> list[Tensor]:
        flow_map = here.move(make()(Foreign(times)))
        x, s = here.state(4, POINTS), here.times(0.3, 0.4, 0.5, 0.6)
        t = s if flow_map.directions == f2.Direction.NONE else here.times(0.5, 0.8, 0.9, 1.0)
        with torch.no_grad():
            answers = [flow_map(x, s, t)]
            if not flow_map.endpoint_only:  # a consistency model has no velocity
                answers += list(f2.Hutchinson()(flow_map.velocity, flows.Point(x, s)))[:2]
        return answers

    return check


def _likelihoods(call: Callable[[f2.JointFlowMap, Tensor], list[Tensor]], backbone: str) -> Check:
    def check(here: Setting) -> list[Tensor]:
        student = here.move(joint(backbone))
        with torch.no_grad():
            return call(student, here.state(4, BACKBONES[backbone][0]))

    return check


def _inverted(student: f2.JointFlowMap, x: Tensor, method: str) -> Tensor:
    student.flow_map.directions = f2.Direction.TO_DATA
    return f2.log_prob(student, x, 8, inversion=f2.Inversion(method, tolerance=1e-4)).value


def _guided(student: f2.JointFlowMap, x: Tensor) -> list[Tensor]:
    made = f2.SelfGuidance(scale=0.05, steps=2, measure=True)(student, x, 2)
    assert made.log_prob_after is not None
    return [made.state, made.log_prob_after]


def _sampled(student: f2.JointFlowMap, x: Tensor) -> list[Tensor]:
    made = f2.sample(student, x, 4, with_log_prob=True)
    assert made.log_prob is not None
    return [made.state, made.log_prob]


LIKELIHOODS: dict[str, Callable[[f2.JointFlowMap, Tensor], list[Tensor]]] = {
    "log_prob, 1 step": lambda m, x: [f2.log_prob(m, x, 1).value],
    "log_prob, 4 steps": lambda m, x: [f2.log_prob(m, x, 4).value],
    "log_prob by inversion, Anderson": lambda m, x: [_inverted(m, x, "anderson")],
    "log_prob by inversion, Newton": lambda m, x: [_inverted(m, x, "newton")],
    "mirrored_log_prob": lambda m, x: [likelihood.mirrored_log_prob(lambda y: f2.log_prob(m, y, 4).value, x)],
    "sample with log_prob": _sampled,
    "SelfGuidance": _guided,
    "reference, exact": lambda m, x: [f2.reference_log_prob(m, x, divergence=divergence.Exact(), steps=8).value],
    "reference, Hutchinson": lambda m, x: [f2.reference_log_prob(m, x, divergence=f2.Hutchinson(), steps=8).value],
    "reference, adaptive": lambda m, x: [
        f2.reference_log_prob(m, x, divergence=divergence.Exact(), method="dopri5", rtol=1e-4, atol=1e-4).value
    ],
    "reference_sample": lambda m, x: [f2.reference_sample(m, x, steps=8).state],
}


def checks() -> dict[str, Check]:
    """All of them by name."""
    made: dict[str, Check] = {f"backbone {name}": _answers(name) for name in BACKBONES}
    for backbone in ("PreconditionedMLP", "DiT"):
        made |= {f"estimator {n}, {backbone}": _estimated(n, m, backbone) for n, m in ESTIMATORS.items()}
        made |= {f"objective {n}, {backbone}": _loss(m, backbone) for n, m in OBJECTIVES.items()}
        made |= {f"{n}, {backbone}": _likelihoods(c, backbone) for n, c in LIKELIHOODS.items()}
    control = lambda: divergence.Hutchinson(2, control=baseline(POINTS, "full"))  # noqa: E731
    made["estimator Hutchinson with control, PreconditionedMLP"] = _estimated("control", control, "PreconditionedMLP")
    return made | {f"adapter {name}": _adapted(make, times) for name, (make, times) in ADAPTERS.items()}


def error(answer: list[Tensor], truth: list[Tensor]) -> float:
    """Relative, over each tensor, the largest."""
    pairs = [(a.double().cpu(), b) for a, b in zip(answer, truth, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def run(device: torch.device, tiny: bool, kept: Kept) -> None:
    """Errors by check and setting, ``None`` where the check raised; what failed, and why."""
    rows, failures = kept.part("rows"), kept.part("failures")
    for name, check in checks().items():
        if name in rows:
            continue
        with same_draws():
            truth = [v.double().cpu() for v in check(Setting(torch.device("cpu")))]
        found: dict[str, float | None] = {}
        # estimators and references differentiate forward, where compiled networks step aside
        compiled = (
            () if tiny or name.startswith(("estimator", "reference", "adapter")) else ("compiled", "bf16 compiled")
        )
        for setting in ("float32", "bf16", *compiled):
            here, found[setting] = Setting(device, setting), None
            try:
                with same_draws(), here.arithmetic():
                    off = error(check(here), truth)
            except Exception as raised:  # a table of what works shows what does not
                failures[f"{name}, {setting}"] = f"{type(raised).__name__}: {str(raised)[:500]}"
                traceback.print_exc()
                continue
            found[setting] = off
            if not off <= TOLERANCES[setting]:
                failures[f"{name}, {setting}"] = f"relative error {off:.2g}"
        rows[name] = found
        kept.save()
        print(name, found, flush=True)
        torch.compiler.reset()
