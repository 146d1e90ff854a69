"""Other people's conventions, each with a network that answers a closed form in it."""

import copy
import inspect
import math
import pickle
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from f2d2_lightning import (
    Direction,
    DivergenceHead,
    Inversion,
    JointFlowMap,
    log_prob,
    reference_log_prob,
    reference_sample,
    sample,
)
from f2d2_lightning.adapters import (
    CTM,
    AdaptedFlowMap,
    Adapter,
    Consistency,
    ConventionError,
    Denoiser,
    FlowMatching,
    LatentConsistency,
    MeanFlow,
    Shortcut,
    TorchCFM,
    TwoTime,
    VarianceExploding,
    VariancePreserving,
    adapter_from_config,
    check_convention,
)
from f2d2_lightning.divergence import Exact
from f2d2_lightning.flows.paths import Point, expand_time, like
from problems import PROBLEMS

CLASSES = 3


class Truth:
    """Gaussians of one covariance, a mean per class and one for no class; on our path and in our time."""

    def __init__(self, shape):
        self.base = PROBLEMS[f"gaussian-{'vector' if len(shape) == 1 else 'image'}-linear"]()
        self.shape = self.base.shape
        generator = torch.Generator().manual_seed(3)
        self.shifts = torch.randn(CLASSES + 1, *self.shape, generator=generator, dtype=torch.float64)

    def _shift(self, x, label):
        return self.shifts[torch.full((len(x),), CLASSES) if label is None else label]

    def jump(self, x, s, t, label=None):
        shift = self._shift(x, label)
        return self.base.jump(x - like(s, x) * shift, s, t)[0] + like(t, x) * shift

    def velocity(self, x, t, label=None):
        shift = self._shift(x, label)
        return self.base.velocity(x - like(t, x) * shift, t) + shift

    def average(self, x, s, t, label=None):
        gap = torch.where(s == t, torch.ones_like(s), t - s)
        average = (self.jump(x, s, t, label) - x) / like(gap, x)
        return torch.where(like(s == t, x), self.velocity(x, t, label), average)

    def divergence(self, x, s, t, label=None):
        gap = torch.where(s == t, torch.ones_like(s), t - s)
        with torch.enable_grad():
            diagonal = self.base.divergence(x, t).detach()
        return torch.where(s == t, diagonal, -self.base.jump(x, s, t)[1] / gap)

    def log_prob(self, x, label=None):
        return self.base.log_prob(x - self._shift(x, label), torch.ones(len(x)))

    def states(self, t, label=None):
        x = self.base.states_at(t)
        return x + like(t, x) * self._shift(x, label)


class Net(nn.Module):
    """What the truth answers in some convention: a method of a class, or a function of the truth."""

    def __init__(self, truth, function=None):
        super().__init__()
        self.truth, self.function = truth, function

    def forward(self, *arguments, **keywords):
        return self.function(self.truth, *arguments, **keywords)


def answering(function):
    return lambda truth: Net(truth, function)


def from_one_hot(y):
    if y is None:
        return None
    assert y.shape[1] == CLASSES
    assert bool((y.sum(1) == 1).all())
    return y.argmax(1)


class OfficialF2D2(Net):
    def forward(self, x, t, dt, class_labels=None):
        assert bool((dt >= 0).all())
        u = self.truth.average(x, t, t + dt, from_one_hot(class_labels))
        return u, torch.zeros(len(x), 1)


class ShortcutJax(Net):
    """Channels last, and the index of the interval: 0 is a full step, 7 the instantaneous velocity."""

    def forward(self, x, t, dt, y):
        assert x.shape[-1] == self.truth.shape[0]
        assert bool(((dt >= 0) & (dt <= 7)).all())
        length = torch.where(dt == 7, torch.zeros_like(t), torch.exp2(-dt))
        return self.truth.average(x.movedim(-1, 1), t, t + length, y).movedim(1, -1)


class MeanFlowNet(Net):
    """Time runs down: ``z_r = z_t - (t - r) u``."""

    def down(self, z, t, r, y=None):
        return -self.truth.average(z, 1 - t, 1 - r, y)


class PyMeanFlow(MeanFlowNet):
    def forward(self, x, times, aug_cond):
        assert aug_cond is None
        t, h = times
        return self.down(x, t, t - h)


class IMeanFlow(MeanFlowNet):
    def forward(self, x, t, h, w, t_min, t_max, y):
        assert bool((w == 1).all() and (t_min == 0).all() and (t_max == 1).all())
        return self.down(x, t, t - h, y), torch.zeros_like(x)


class AlphaFlow(MeanFlowNet):
    def forward(self, x, *, sigma_next, sigma, cond):
        return self.down(x, sigma.squeeze(1), sigma_next.squeeze(1), cond["label"])


class FastGen(MeanFlowNet):
    def forward(self, x, t, condition=None, *, r=None, fwd_pred_type=None):
        assert fwd_pred_type == "flow"
        return {"flow": self.down(x, t, r, from_one_hot(condition))}


class OurOwn(Net):
    def forward(self, x, s, t, cond=None):
        return self.truth.average(x, s, t, cond)


class TorchCFMNet(Net):
    def forward(self, t, x, y=None):
        return self.truth.velocity(x, t, y)


class Exploding(Net):
    """Closed forms in the variance-exploding process, ``x_ve = x_1 + sigma eps``."""

    def ours(self, x, sigma):
        tau = 1 / (1 + sigma)
        return x * like(tau, x), tau

    def denoised(self, x, sigma, y):
        z, tau = self.ours(x, sigma)
        return z + like(1 - tau, x) * self.truth.velocity(z, tau, y)

    def endpoint(self, x, sigma, y):
        z, tau = self.ours(x, sigma)
        return self.truth.jump(z, tau, torch.ones_like(tau), y)

    def moved(self, x, sigma, end, y):
        z, tau = self.ours(x, sigma)
        tau_end = 1 / (1 + end)
        return self.truth.jump(z, tau, tau_end, y) * like(1 + end, x)


class EDM(Exploding):
    def forward(self, x, sigma, class_labels=None):
        return self.denoised(x, sigma, from_one_hot(class_labels))


class ECT(Exploding):
    def forward(self, x, sigma, class_labels=None):
        return self.endpoint(x, sigma, from_one_hot(class_labels))


SIGMA_MIN = 1e-6
SHIFTED_MIN = 0.1  # large, so that c_skip with and without it differ


class Inner(Exploding):
    """What stands between the preconditioning: ``D = c_skip x + c_out F(c_in x, c_noise)``."""

    def __init__(self, truth, kind):
        super().__init__(truth)
        self.kind = kind

    def forward(self, x, noise_label, y=None):
        sigma = torch.exp(noise_label / 250) if self.kind == "consistency" else torch.exp(4 * noise_label)
        norm = (sigma**2 + 0.25).sqrt()
        state = x * like(norm, x)
        shifted = sigma - SHIFTED_MIN if self.kind == "consistency" else sigma
        answer = (self.endpoint if self.kind == "consistency" else self.denoised)(state, sigma, y)
        skip, out = 0.25 / (shifted**2 + 0.25), shifted * 0.5 / norm
        return (answer - like(skip, x) * state) / like(out, x)


class CTMNet(Exploding):
    def __init__(self, truth, state):
        super().__init__(truth)
        self.state = state

    def forward(self, x, rt, y=None, s=None):
        sigma, end = torch.exp(rt / 250), torch.exp(s / 250)
        moved = self.moved(x, sigma, end, y)
        if self.state:
            return moved
        share = like(end / sigma, x)
        near = (share - 1).abs() < 1e-9
        limit = self.denoised(x, sigma, y)
        return torch.where(near, limit, (moved - share * x) / torch.where(near, torch.ones_like(share), 1 - share))


class DDPM(Exploding):
    """``x_vp = sqrt(abar) x_1 + sqrt(1 - abar) eps`` at counted times, abar the product of what each time keeps."""

    def __init__(self, truth, betas, prediction):
        super().__init__(truth)
        kept = np.cumprod(1 - betas.astype(np.longdouble))
        self.levels = np.log((1 - kept) / kept).astype(float) / 2
        self.prediction = prediction

    def sigma(self, time):
        return torch.from_numpy(np.exp(np.interp(time.numpy(), np.arange(len(self.levels)), self.levels)))

    def forward(self, x, time, y=None):
        sigma = self.sigma(time)
        signal, noise = (like(part, x) for part in ((1 + sigma**2) ** -0.5, sigma / (1 + sigma**2) ** 0.5))
        clean = self.denoised(x / signal, sigma, y)
        epsilon = (x - signal * clean) / noise
        answers = {"epsilon": epsilon, "sample": clean, "v_prediction": signal * epsilon - noise * clean}
        return torch.cat([answers[self.prediction], torch.zeros_like(x)], 1)


class LCM(DDPM):
    """Answers the noise between the state and where the jump to data lands."""

    denoised = Exploding.endpoint


class ScoreSDE(DDPM):
    def sigma(self, time):
        return torch.expm1(1e-6 * time + (60 - 1e-6) / 2 * time**2).sqrt()


def ddpm(betas, prediction="epsilon", cls=DDPM):
    return lambda truth: cls(truth, np.array(betas), prediction)


EXPLODING = {"sigma_min": SIGMA_MIN, "sigma_max": 1e8}


@dataclass(frozen=True)
class Family:
    network: object
    adapter: Adapter
    labels: bool = True
    images: bool = False
    tolerance: float = 1e-9

    def made(self, count=4):
        """The closed form, and labels for so many states."""
        truth = Truth((2, 2, 2) if self.images else (3,))
        return truth, torch.arange(count) % CLASSES if self.labels else None

    def flow_map(self, truth, adapter=None):
        return (adapter or self.adapter)(self.network(truth))


TIMES = ((0.0, 1.0), (0.25, 0.5), (0.5, 1.0), (0.625, 0.75))
FAMILIES = {
    "official-f2d2": Family(OfficialF2D2, Shortcut(output=0, classes=CLASSES)),
    "shortcut-index": Family(ShortcutJax, Shortcut("index", channels_last=True, null_label=CLASSES), images=True),
    "shortcut-length": Family(
        answering(lambda truth, x, t, length, y=None: truth.average(x, t, t + length, y)),
        Shortcut("length", shortest_length=1e-6), tolerance=1e-4),
    "py-meanflow": Family(PyMeanFlow, MeanFlow(), labels=False),
    # its embedding multiplies times by a thousand itself
    "haidog": Family(
        answering(lambda truth, x, t, r, y, return_v: (-truth.average(x, 1 - t, 1 - r, y), "v")[: 1 + return_v]),
        MeanFlow("net(x, s, t, cond, return_v=True)", output=0, null_label=CLASSES)),
    "zhuyu": Family(
        answering(lambda truth, x, r, t, y: -truth.average(x, 1 - t, 1 - r, y)),
        MeanFlow("net(x, t, s, cond)", null_label=CLASSES), images=True),
    "imeanflow": Family(IMeanFlow, MeanFlow(
        "net(x, s, s - t, full(1.0, s), full(0.0, s), full(1.0, s), cond)", output=0, null_label=CLASSES)),
    "alphaflow": Family(AlphaFlow, MeanFlow(
        "net(x, sigma_next=t, sigma=s, cond={'label': cond})", null_label=CLASSES, time_axes=2)),
    "fastgen": Family(FastGen, MeanFlow(
        "net(x, s, cond, r=t, fwd_pred_type='flow')", output="flow", classes=CLASSES, directions="both")),
    # answers the state; its prior has a standard deviation of one half, and so all its states are ours halved
    "flow-maps": Family(
        answering(lambda truth, s, t, x, label: truth.jump(x / 0.5, s, t, from_one_hot(label)) * 0.5),
        TwoTime("net(s, t, x, cond)", "both", answer="state", prior_std=0.5, classes=CLASSES, shortest=1e-6),
        images=True, tolerance=1e-4),
    "two-time": Family(OurOwn, Adapter()),
    # one vector of state and times, as small networks often take
    "beside": Family(
        answering(lambda truth, both: truth.average(both[:, :3], both[:, 3], both[:, 4], None)),
        Adapter("net(cat(x, s, t))"), labels=False),
    "to-noise": Family(OurOwn, Adapter(directions="to_noise")),
    # time from 0 at data to 5 at noise, the velocity in that time
    "steep-time": Family(
        answering(lambda truth, x, s, t, cond=None: truth.average(x, 1 - s / 5, 1 - t / 5, cond) / -5),
        Adapter(noise_time=5.0, data_time=0.0)),
    "flow-matching": Family(
        answering(lambda truth, x, t, extra: truth.velocity(x, t, extra["label"])),
        FlowMatching("net(x, s, extra={'label': cond})")),
    "torchcfm": Family(TorchCFMNet, TorchCFM(), images=True),
    "edm": Family(EDM, Denoiser(classes=CLASSES, **EXPLODING), tolerance=1e-5),
    "edm-inner": Family(lambda truth: Inner(truth, "edm"), Denoiser(
        "net(x, log(s) / 4, cond)", precondition="edm", **EXPLODING), images=True, tolerance=1e-5),
    "ect": Family(ECT, Consistency(classes=CLASSES, **EXPLODING), tolerance=1e-5),
    "consistency": Family(lambda truth: Inner(truth, "consistency"), Consistency(
        "net(x, 250 * log(s), cond)", precondition="consistency", sigma_min=SHIFTED_MIN, sigma_max=1e8),
        tolerance=1e-5),
    "ctm": Family(lambda truth: CTMNet(truth, False), CTM(
        "net(x, 250 * log(s), cond, s=250 * log(t))", "both", **EXPLODING), tolerance=1e-5),
    "ctm-state": Family(lambda truth: CTMNet(truth, True), CTM(
        "net(x, 250 * log(s), cond, s=250 * log(t))", answer="state", shortest=1e-4, sigma_min=SIGMA_MIN,
        sigma_max=1e5), tolerance=1e-3),
    # betas that leave hardly any signal, so that the first state is noise
    "ddpm": Family(ddpm(np.linspace(1e-12, 0.06, 1000)), VariancePreserving(
        beta_start=1e-12, beta_end=0.06, learned_variance=True), images=True, tolerance=1e-5),
    "ddpm-clean": Family(ddpm(np.linspace(1e-6, 0.3, 900) ** 2, "sample"), VariancePreserving(
        prediction_type="sample", beta_schedule="scaled_linear", beta_start=1e-12, beta_end=0.09,
        num_train_timesteps=900, learned_variance=True), tolerance=1e-5),
    "lcm": Family(ddpm(np.linspace(1e-6, 0.3, 900) ** 2, cls=LCM), LatentConsistency(
        beta_start=1e-12, beta_end=0.09, num_train_timesteps=900, learned_variance=True), tolerance=1e-5),
    "score-sde": Family(ddpm([0.5], "v_prediction", ScoreSDE), VariancePreserving(
        prediction_type="v_prediction", beta_schedule="continuous", beta_start=1e-6, beta_end=60.0,
        learned_variance=True), tolerance=1e-3),
}  # fmt: skip
NAMES = list(FAMILIES)
MAPS = [name for name in NAMES if FAMILIES[name].adapter.directions and not FAMILIES[name].adapter.endpoint_only]
ENDPOINT = [name for name in NAMES if FAMILIES[name].adapter.endpoint_only]


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual - expected).detach().abs().max()
    assert float(error) <= tolerance * (1 + float(expected.detach().abs().max())), float(error)


def assert_exact(family, flow_map, truth, labels):
    """Velocities, jumps, divergences and samples are those of the closed form, in our convention."""
    tolerance, count = family.tolerance, 4
    directions = flow_map.directions
    if not flow_map.endpoint_only:
        for time in (0.0, 0.3, 0.75, 1.0):
            t = torch.full((count,), time)
            x = truth.states(t, labels)
            close(flow_map.velocity(x, time, labels), truth.velocity(x, t, labels), tolerance)
            divergence = Exact()(flow_map.velocity, Point(x, t, labels)).divergence
            # states of 1e8 at t = 0 of the exploding process cost digits in the derivative of nothing else
            close(divergence, truth.divergence(x, t, t, labels), 100 * tolerance)
    pairs = [*TIMES] if Direction.TO_DATA in directions else []
    pairs += [(t, s) for s, t in TIMES] if Direction.TO_NOISE in directions else []
    for start, end in pairs:
        if flow_map.endpoint_only:
            end = 1.0
        if start == end:
            continue
        s, t = torch.full((count,), start), torch.full((count,), end)
        x = truth.states(s, labels)
        close(flow_map(x, s, t, labels), truth.average(x, s, t, labels), tolerance)
        close(flow_map.jump(x, start, end, labels), truth.jump(x, s, t, labels), tolerance)
    noise = torch.randn(count, *truth.shape)
    expected = truth.jump(noise, torch.zeros(count), torch.ones(count), labels)
    if Direction.TO_DATA in directions:
        for steps in (1,) if flow_map.endpoint_only else (1, 4):
            close(sample(flow_map, noise, steps, labels).state, expected, tolerance * 10)
    elif directions == Direction.NONE:
        close(reference_sample(flow_map, noise, labels, method="rk4", steps=40).state, expected, 1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_family_is_exact(name):
    family = FAMILIES[name]
    truth, labels = family.made()
    assert_exact(family, family.flow_map(truth), truth, labels)
    if family.labels:
        assert_exact(family, family.flow_map(truth), truth, None)  # no class is a class of its own


def rebuilt(adapter, **changes):
    return adapter_from_config(adapter.config() | changes)


def swapped_ends(call):
    # names of keywords stay
    return re.sub(r"\b[st]\b(?!=)", lambda name: {"s": "t", "t": "s"}[name[0]], call)


def mutants(adapter):
    if isinstance(adapter, VarianceExploding):
        yield "noise levels inverted", rebuilt(adapter, call=adapter.call.text.replace("log(s)", "log(1 / s)"))
        yield (
            "noise level scaled",
            rebuilt(adapter, call=adapter.call.text.replace("(x, s", "(x, 1.1 * s").replace("log(s)", "log(1.1 * s)")),
        )
        if isinstance(adapter, VariancePreserving):
            others = {"epsilon": "v_prediction", "v_prediction": "sample", "sample": "epsilon"}
            yield "another prediction", rebuilt(adapter, prediction_type=others[adapter.prediction_type])
            yield "another schedule", rebuilt(adapter, beta_end=0.9 * adapter.beta_end)
        elif adapter.answer == "clean":
            others = {"none": "edm", "edm": "none", "consistency": "edm"}
            yield "another preconditioning", rebuilt(adapter, precondition=others[adapter.precondition])
    else:
        swapped = {"noise_time": adapter.data_time, "data_time": adapter.noise_time}
        yield "time mirrored", rebuilt(adapter, **swapped, velocity_scale=adapter.velocity_scale)
        if adapter.answer == "velocity":
            yield "sign flipped", rebuilt(adapter, velocity_scale=-adapter.velocity_scale)
            yield "time mirrored and sign flipped", rebuilt(adapter, **swapped, velocity_scale=-adapter.velocity_scale)
            yield "scaled", rebuilt(adapter, velocity_scale=1.01 * adapter.velocity_scale)
        yield "prior scaled", rebuilt(adapter, prior_std=1.1 * adapter.prior_std)
    if adapter.sees_end:
        yield "start and end swapped", rebuilt(adapter, call=swapped_ends(adapter.call.text))


MUTANTS = [
    (name, what)
    for name in NAMES
    for what, mutant in mutants(FAMILIES[name].adapter)
    if mutant.config() != FAMILIES[name].adapter.config()
]


@pytest.mark.parametrize(("name", "what"), MUTANTS)
def test_wrong_adapters_are_not_exact(name, what):
    family = FAMILIES[name]
    truth, labels = family.made()
    mutant = dict(mutants(family.adapter))[what]
    with pytest.raises((AssertionError, ValueError)):
        assert_exact(family, family.flow_map(truth, mutant), truth, labels)


class ExactDivergence(nn.Module):
    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def forward(self, x, s, t, cond):
        return self.truth.divergence(x, s, t, cond)


@pytest.mark.parametrize("name", MAPS + ENDPOINT)
def test_likelihood_of_data(name):
    family = FAMILIES[name]
    truth, labels = family.made()
    flow_map = family.flow_map(truth)
    joint = JointFlowMap(flow_map, DivergenceHead(network=ExactDivergence(truth)))
    x = truth.states(torch.ones(4), labels)
    steps = 1 if flow_map.endpoint_only else 4
    if Direction.TO_NOISE in flow_map.directions:
        close(log_prob(joint, x, steps, labels).value, truth.log_prob(x, labels), 20 * family.tolerance)
        return
    with pytest.raises(ValueError, match="inversion=Inversion"):
        log_prob(joint, x, steps, labels)
    inverted = log_prob(joint, x, steps, labels, inversion=Inversion("newton", tolerance=1e-7))
    assert bool(inverted.converged.all())
    close(inverted.value, truth.log_prob(x, labels), 20 * max(family.tolerance, 1e-6))


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].adapter.directions == Direction.NONE])
def test_teachers_have_the_reference_likelihood(name):
    family = FAMILIES[name]
    truth, labels = family.made()
    x = truth.states(torch.ones(4), labels)
    value = reference_log_prob(family.flow_map(truth), x, labels, method="rk4", steps=25).value
    close(value, truth.log_prob(x, labels), 2e-3)
    with pytest.raises(ValueError, match="distil it"):
        family.flow_map(truth).jump(x, 1.0, 0.0, labels)


@pytest.mark.parametrize("name", ENDPOINT)
def test_a_consistency_model_has_no_velocity(name):
    family = FAMILIES[name]
    truth, labels = family.made()
    flow_map = family.flow_map(truth)
    x = truth.states(torch.full((4,), 0.5), labels)
    for ask in (
        lambda: flow_map.velocity(x, 0.5, labels),
        lambda: reference_log_prob(flow_map, x, labels),
        lambda: JointFlowMap(flow_map, DivergenceHead(network=ExactDivergence(truth))).velocity(x, 0.5, labels),
    ):
        with pytest.raises(ValueError, match=r"teacher.*interval="):
            ask()
    # towards an inner time: the straight line to its endpoint
    half = torch.full((4,), 0.5)
    endpoint = truth.jump(x, half, torch.ones(4), labels)
    close(flow_map.jump(x, 0.5, 0.8, labels), x + 0.3 / 0.5 * (endpoint - x), family.tolerance)


@pytest.mark.parametrize("name", ["edm", "ect", "ctm"])
def test_the_ends_of_the_exploding_process(name):
    # usual noise levels: at our noise the network sees sigma_max x, and its clean image is where the jump lands
    family = FAMILIES[name]
    truth, labels = family.made()
    adapter = rebuilt(family.adapter, sigma_min=0.002, sigma_max=80.0)
    network = family.network(truth)
    flow_map = adapter(network)
    noise = torch.randn(4, *truth.shape)
    ends = (0.0, 0.0) if name == "edm" else (0.0, 1.0)
    sigma, one_hot = torch.full((4,), 80.0), nn.functional.one_hot(labels, CLASSES).double()
    if name == "ctm":
        clean = network(80 * noise, 250 * sigma.log(), labels, s=250 * torch.full((4,), 0.002).log())
    else:
        clean = network(80 * noise, sigma, one_hot)
    close(noise + flow_map(noise, *ends, labels), clean, 1e-12)
    assert bool((clean - truth.jump(noise, torch.zeros(4), torch.ones(4), labels)).abs().max() < 3)
    x = truth.states(torch.ones(4), labels)
    if name == "edm":
        close(flow_map.velocity(x, 1.0, labels), truth.velocity(x, torch.ones(4), labels), 0.1)
    else:
        close(flow_map.jump(x, 1.0, 1.0, labels), x, 1e-12)


def test_times_of_the_cosine_schedule():
    """Nichol and Dhariwal's, equation 17: what is left of the data after each time, their betas at most .999."""
    left = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    left = np.append(left[1:-1] / left[0], 0.001 * left[-2] / left[0])
    sigma = torch.from_numpy(((1 - left) / left) ** 0.5)
    adapter = VariancePreserving(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)
    close(adapter.time_of(sigma), torch.arange(50.0), 1e-12)
    half_way = (sigma[10] * sigma[11]).sqrt()
    close(adapter.time_of(torch.stack((sigma[0] / 2, half_way, sigma[-1] * 2))), torch.tensor([0, 10.5, 49]), 1e-12)


def test_a_schedule_whose_last_time_is_noise_alone():
    """Lin et al.: the signal is moved down until the last time has none, then stretched to what the first had."""
    signal = np.cumprod(1 - np.linspace(0.01, 0.2, 50)) ** 0.5
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    sigma = torch.from_numpy((1 / signal[:-1] ** 2 - 1) ** 0.5)
    adapter = VariancePreserving(
        beta_start=0.01, beta_end=0.2, num_train_timesteps=50, rescale_betas_zero_snr=True
    )  # fmt: skip
    close(adapter.time_of(sigma), torch.arange(49.0), 1e-9)
    assert abs(adapter.sigma_max / float(sigma[-1]) - 1) < 1e-9


# --- how an adapter is written down ---


@pytest.mark.parametrize("name", NAMES)
def test_config_roundtrip(name):
    family = FAMILIES[name]
    config = family.adapter.config()
    assert all(isinstance(value, (str, int, float, bool, type(None), tuple)) for value in config.values())
    truth, labels = family.made()
    again = adapter_from_config(config)
    assert type(again) is type(family.adapter)
    assert again.config() == config
    pickled = pickle.loads(pickle.dumps(family.adapter))
    assert pickled.config() == config
    s, t = (0.5, 0.5) if not family.adapter.directions else (0.25, 0.5)
    s, t = (t, s) if family.adapter.directions == Direction.TO_NOISE else (s, t)
    x = truth.states(torch.full((4,), 0.5), labels)
    expected = family.flow_map(truth)(x, s, t, labels)
    for adapter in (again, pickled, copy.deepcopy(family.adapter)):
        assert torch.equal(family.flow_map(truth, adapter)(x, s, t, labels), expected)


def test_config_names_every_argument():
    # a family's defaults too, so that others in a later version change nothing that was saved
    assert set(Consistency().config()) == set(VarianceExploding().config())
    for cls in (Adapter, VarianceExploding):
        arguments = [p.name for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD]
        assert set(arguments) <= set(cls().config())
        changed = {"time_axes": 2, "null_label": 7, "output": "u", "shortest": 0.01, "channels_last": True}
        assert cls(**changed).config().items() >= changed.items()


# --- the check before training ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_right_adapters_pass_the_check(name, seed):
    torch.manual_seed(seed)
    family = FAMILIES[name]
    truth, labels = family.made(32)
    check_convention(family.flow_map(truth), truth.states(torch.ones(32), labels), labels)


def test_an_answer_that_is_no_clean_image_is_found():
    def backwards(truth, x, sigma):
        z = like(1 / (1 + sigma), x) * x
        return z - like(sigma / (1 + sigma), x) * truth.velocity(z, 1 / (1 + sigma))

    truth = Truth((3,))
    check_convention(Denoiser("net(x, s)")(EDM(truth)), truth.states(torch.ones(32)))
    with pytest.raises(ConventionError, match="clean image"):
        check_convention(Denoiser("net(x, s)")(Net(truth, backwards)), truth.states(torch.ones(32)))


class Mlp(nn.Module):
    def __init__(self, dim, out_scale=1.0, skip=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 2, 32), nn.SiLU(), nn.Linear(32, dim))
        self.skip = skip
        with torch.no_grad():
            self.net[-1].weight.mul_(out_scale)
            self.net[-1].bias.mul_(out_scale)

    def forward(self, x, s, t, cond=None):
        times = torch.stack((s, t), 1)
        return self.net(torch.cat((x, times), 1)) + self.skip * x


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("skip", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("out_scale", [0.0, 1.0, 10.0])
def test_untrained_networks_pass_the_check(spread, skip, out_scale):
    for seed in range(3):
        torch.manual_seed(seed)
        check_convention(Adapter()(Mlp(3, out_scale, skip)), spread * torch.randn(16, 3) + spread)


def test_the_check_leaves_everything_as_it_was():
    truth = Truth((3,))

    class Restless(OurOwn):
        def __init__(self, truth):
            super().__init__(truth)
            self.norm = nn.BatchNorm1d(3)
            self.frozen = nn.Dropout().eval()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x, s, t, cond=None):
            assert not self.training
            return super().forward(x, s, t) + 1e-3 * torch.randn_like(x) + self.weight + 0 * self.norm(x)

    flow_map = Adapter()(Restless(truth))
    x = truth.states(torch.ones(16))
    before, weights = torch.get_rng_state(), copy.deepcopy(flow_map.state_dict())
    check_convention(flow_map, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in flow_map.state_dict().items())
    assert flow_map.training
    assert not flow_map.network.frozen.training
    assert all(p.grad is None for p in flow_map.parameters())
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        check_convention(flow_map, x.clone())


def test_an_end_time_that_is_ignored_is_found():
    truth = Truth((3,))
    x = truth.states(torch.ones(16))
    deaf = Net(truth, lambda truth, x, s, t, cond=None: truth.velocity(x, s, cond))
    for directions in ("to_data", "to_noise", "both"):
        with pytest.raises(ConventionError, match=r"does not depend on the end time t.*interval="):
            check_convention(Adapter(directions=directions)(deaf), x)
    check_convention(Adapter("net(x, s, s)", directions="none")(deaf), x)
    # the velocity that the adapter makes of a state does change with the end, the network does not
    for adapter in (Adapter(answer="state"), CTM("net(x, s, t)", answer="state")):
        with pytest.raises(ConventionError, match="does not depend"):
            check_convention(adapter(Net(truth, lambda truth, x, s, t, cond=None: x + 1.0)), x)


@pytest.mark.parametrize("kind", ["zero last layer", "zero gate", "index", "zero and index"])
def test_second_times_that_hide_are_not_accused(kind):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 4)
            self.smooth = nn.Linear(1, 4)
            self.gate = nn.Linear(4, 3)
            self.body = nn.Linear(3, 3)
            if "zero" in kind:
                nn.init.zeros_(self.gate.weight)
                nn.init.zeros_(self.gate.bias)
            if kind == "zero last layer":
                nn.init.zeros_(self.body.weight)
                nn.init.zeros_(self.body.bias)

        def forward(self, x, s, length, cond=None):
            index = (-torch.log2(length.clamp(min=2.0**-7))).round().long()
            embedded = self.table(index) if "index" in kind else self.smooth(length[:, None])
            return self.body(x * (1 + self.gate(embedded)))

    network = Hidden()
    kept = copy.deepcopy(network.state_dict())
    check_convention(Shortcut("length")(network), torch.randn(16, 3))
    assert all(torch.equal(value, kept[key]) for key, value in network.state_dict().items())


def test_calls_that_do_not_fit_are_quoted():
    truth = Truth((3,))
    x = truth.states(torch.ones(16))
    cases = [
        (Adapter("net(x, s, t, extra=cond)"), OurOwn, "extra", "OurOwn.forward"),
        (MeanFlow("net(x, s, t)"), PyMeanFlow, "PyMeanFlow", "aug_cond"),
        (MeanFlow("net(x, s, t, cond)"), AlphaFlow, "AlphaFlow", "sigma_next"),
    ]
    for adapter, network, *words in cases:
        with pytest.raises(ConventionError) as caught:
            check_convention(adapter(network(truth)), x)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert adapter.call.text in str(caught.value)
        assert isinstance(caught.value.__cause__, Exception)
    # what the adapter says of an answer stays as it says it
    with pytest.raises(ConventionError, match=r"^the network answered a tuple of 2.*output=0"):
        check_convention(Shortcut()(OfficialF2D2(truth)), x)


def test_answers_that_are_not_finite_are_found():
    def log(truth, x, s, length, cond):
        return truth.average(x, s, s + length) + 0 * torch.log(length)[:, None]

    truth = Truth((3,))
    with pytest.raises(ConventionError, match=r"NaN or infinity.*clamp"):
        check_convention(Shortcut()(Net(truth, log)), truth.states(torch.ones(16)))


def test_a_network_that_is_told_no_end_does_not_jump():
    truth = Truth((3,))
    flow_map = Adapter("net(s, x, cond)")(TorchCFMNet(truth))  # declared for both directions
    x = truth.states(torch.full((4,), 0.5))
    close(flow_map.velocity(x, 0.5), truth.velocity(x, torch.full((4,), 0.5)), 1e-12)
    with pytest.raises(ValueError, match="instantaneous velocity"):
        flow_map.jump(x, 0.5, 0.6)
    check_convention(flow_map, truth.states(torch.ones(16)))


# --- precision ---


class Affine(nn.Module):
    """Weights in a precision of their own."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(3, 3).to(dtype)
        self.times = nn.Linear(2, 3).to(dtype)

    def forward(self, x, s, t, cond=None):
        assert x.dtype == s.dtype == t.dtype == self.linear.weight.dtype
        assert cond is None or cond.dtype == self.linear.weight.dtype
        return self.linear(x) + self.times(torch.stack((s, t), 1))


@pytest.mark.parametrize("adapter", [Adapter(), CTM("net(x, s, t, cond)", directions="both")], ids=["up", "exploding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_double_precision_states_in_a_lower_precision_network(adapter, dtype):
    network = Affine(dtype)
    flow_map = adapter(network)
    x = torch.randn(4, 3)
    assert flow_map(x, 0.2, 0.6, torch.ones(4, 3)).dtype == torch.float64
    u, features = flow_map.forward_features(x, 0.2, 0.6)
    assert u.dtype == features.dtype == torch.float64
    assert flow_map.jump(x, 0.0, 1.0).dtype == torch.float64
    wide = adapter(copy.deepcopy(network).double())
    close(u, wide(x, 0.2, 0.6), 5e-6 if dtype == torch.float32 else 5e-2)


def test_autocast_does_not_lower_the_precision_of_the_state():
    flow_map = Adapter()(Affine(torch.float32))
    x = torch.randn(4, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flow_map(x, 0.2, 0.6).dtype == torch.float32
        assert flow_map.jump(x, 0.2, 0.6).dtype == torch.float32


def test_times_in_single_precision_stay_in_range():
    truth = Truth((3,))
    for name in ("edm", "ect"):
        adapter = rebuilt(FAMILIES[name].adapter, sigma_min=0.002, sigma_max=80.0)
        seen = []

        class Watch(nn.Module):
            def forward(self, x, sigma, class_labels=None):
                seen.append(sigma)  # noqa: B023
                return 0 * x

        flow_map = adapter(Watch())
        for s in (0.0, 1e-8, 0.5, 1 - 1e-7, 1.0):
            u = flow_map(torch.randn(4, 3, dtype=torch.float32), s, s if name == "edm" else 1.0)
            assert bool(u.isfinite().all())
        sigmas = torch.cat(seen)
        assert float(sigmas.min()) >= 0.002 * (1 - 1e-4)
        assert float(sigmas.max()) <= 80 * (1 + 1e-4)
    assert math.isfinite(float(truth.log_prob(torch.zeros(1, 3))))


@pytest.mark.parametrize("name", NAMES)
def test_times_of_another_precision_than_the_state(name):
    family = FAMILIES[name]
    truth, labels = family.made()
    flow_map = family.flow_map(truth)
    s, t = (0.25, 0.25) if not flow_map.directions else (0.25, 1.0)
    s, t = (t, s) if flow_map.directions == Direction.TO_NOISE else (s, t)
    x = truth.states(torch.full((4,), s), labels)
    expected = flow_map(x, s, t, labels)
    for dtype in (torch.float32, torch.bfloat16):  # both times are exact in them
        start, end = torch.full((4,), s, dtype=dtype), torch.tensor(t, dtype=dtype)
        u = flow_map(x, start, end, labels)
        assert torch.equal(u, expected)
        assert u.dtype == torch.float64


class Writing(nn.Module):
    """Writes into everything that it is given, as hurried code does."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, x, s, t, y):
        s.mul_(1000)
        t.sub_(1).mul_(1000)
        y[y > 2] = 3
        return x.mul_(2) + (s + t)[:, None] + self.table(y)


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_network_writes_into_is_not_the_callers(shared):
    network = Writing()
    flow_map = Adapter()(network)
    x, y = torch.randn(4, 3), torch.tensor([0, 7, 2, 9])
    s, t = (torch.tensor(0.25), torch.tensor(0.5)) if shared else (torch.rand(4), torch.rand(4))
    kept = [value.clone() for value in (x, s, t, y)]
    u = flow_map(x, s, t, y)
    assert all(torch.equal(value, before) for value, before in zip((x, s, t, y), kept, strict=True))
    expected = 2 * x + (1000 * (s + t - 1)).expand(4)[:, None] + network.table(torch.tensor([0, 3, 2, 3]))
    close(u, expected.detach(), 1e-12)
    assert torch.equal(flow_map(x, s, t, y), u)


def test_adapted_maps_are_modules():
    truth = Truth((3,))
    flow_map = Adapter()(OurOwn(truth))
    assert isinstance(flow_map, AdaptedFlowMap)
    x = truth.states(torch.full((4,), 0.2))
    s, t = expand_time(0.2, x), expand_time(0.7, x)
    assert torch.equal(copy.deepcopy(flow_map)(x, s, t), flow_map(x, s, t))
    assert torch.equal(pickle.loads(pickle.dumps(flow_map))(x, s, t), flow_map(x, s, t))
