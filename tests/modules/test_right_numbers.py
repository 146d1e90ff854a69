"""Numbers that were wrong without a word, each on a small input with the right value beside it."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.adapters import Adapter, ConventionError, check_convention
from f2d2_lightning.divergence import DerivativeError
from f2d2_lightning.divergence.estimators import SampleProbes
from f2d2_lightning.flows import Point
from f2d2_lightning.metrics import LikelihoodEvaluation
from f2d2_lightning.metrics.likelihood import doubt
from f2d2_lightning.nn import MLP, PreconditionedMLP
from f2d2_lightning.training.batches import check_values
from f2d2_lightning.utils.seeding import row_keys
from foreign import ManualModule, MeanFlowModule, callback
from lightning_parts import Pair, fit, same, student, teacher, trainer

MODES = ("forward", "reverse", "finite")
pytestmark = pytest.mark.usefixtures("single_precision")


def small():
    return MLP((2,), width=16, blocks=1)


def moving():
    """A network that answers something: a fresh one answers zero."""
    torch.manual_seed(0)
    network = small()
    for p in network.parameters():
        p.data.normal_(0, 0.3)
    return network


def distilled(network, of, **kwargs):
    """A student of any teacher, cheap to train."""
    settings = {"reference": f2.Reference(steps=8, probes=0), "steps": (1,)}
    settings["objective"] = f2.TrajectoryRegression(nodes=4, capacity=64, refresh=8.0, chunk=16)
    return f2.F2D2Module(network, (2,), of, **(settings | kwargs))


# --- derivatives of other people's networks ---


def writes_into_its_sum(x, t, cond=None):
    h = x + t[:, None]
    h.mul_(2.0)
    return h + x


def writes_into_its_input(x, t, cond=None):
    return 3 * x.mul_(2.0)


def leaky_with_skip(x, t, cond=None):
    """Slopes 1 and .2 after a time embedding, plus the state: divergence ``d + sum of slopes``."""
    return nn.functional.leaky_relu(x + t[:, None], 0.2, inplace=True) + x


@pytest.mark.parametrize("mode", MODES)
def test_operations_in_place_have_their_own_derivative(mode):
    x = torch.tensor([[0.5, -2.0, 1.0, 3.0], [1.0, 1.0, -1.0, -3.0]], dtype=torch.float64)
    before = x.clone()
    estimators = (f2.divergence.Exact(mode=mode, step=1e-4), f2.Hutchinson(3, mode=mode, step=1e-4))
    slopes = torch.where(x + 0.25 > 0, 1.0, 0.2).sum(1)
    expected = {writes_into_its_sum: 12.0, leaky_with_skip: 4 + slopes, writes_into_its_input: 24.0}
    for network, right in expected.items():
        for estimator in estimators:
            found = estimator(network, Point(x, 0.25)).divergence
            assert torch.allclose(found, torch.as_tensor(right, dtype=x.dtype), atol=1e-6), network.__name__
        assert torch.equal(x, before)


class Tokens(nn.Module):
    """Attention of every kind that torch has, over three tokens of four numbers."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.qkv = nn.Linear(4, 12)
        if kind == "module":
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        elif kind == "layer":
            self.inner = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x, t, cond=None):
        h = x.reshape(len(x), 3, 4) + t[:, None, None]
        if self.kind == "function":
            q, k, v = self.qkv(h).reshape(len(x), 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
            h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        elif self.kind == "module":
            h = self.inner(h, h, h, need_weights=False)[0]
        else:
            h = self.inner(h)
        return h.reshape(x.shape)


@pytest.mark.parametrize("kind", ["function", "module", "layer"])
@pytest.mark.parametrize("mode", MODES)
def test_attention_is_differentiated(kind, mode):
    network = Tokens(kind).double().eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    t = torch.full((3,), 0.3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda y: network(y, t).sum(0), x).permute(1, 0, 2)
    right = jacobian.diagonal(dim1=1, dim2=2).sum(-1)
    assert float(right.abs().min()) > 1e-3
    with torch.no_grad():
        found = f2.divergence.Exact(mode=mode, step=1e-4)(network, Point(x, t)).divergence
    assert torch.allclose(found, right, atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x[:, None], torch.eye(4, dtype=x.dtype)[None].expand(len(x), 4, 4))[:, 0]


class Far(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"far": Distances()})

    def forward(self, x, t, cond=None):
        return self.body["far"](x)


def test_what_has_no_derivative_in_forward_mode_is_named_and_others_do():
    torch.manual_seed(0)
    network, x = Far(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(DerivativeError, match=r"'body\.far' \(Distances\) of Far .*Hutchinson\(mode='finite'\)"):
        f2.divergence.Exact()(network, Point(x, 0.5))
    answers = [
        f2.divergence.Exact(mode=mode, step=1e-4)(network, Point(x, 0.5)).divergence for mode in ("reverse", "finite")
    ]
    assert torch.allclose(answers[0], answers[1], atol=1e-6)
    assert float(answers[0].detach().abs().min()) > 1e-3
    assert float(f2.Reference(steps=4, probes=0, mode="finite")(network, x).value.std()) > 0


def energy(x, t, cond=None):
    """The velocity is a gradient of -|x|^2 that the network takes itself."""
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        return torch.autograd.grad(-y.square().sum(), y)[0]


def inference(x, t, cond=None):
    with torch.inference_mode():
        return -2 * x


def test_dropped_derivatives_are_refused():
    x = torch.randn(3, 4)
    for network in (energy, inference):
        for mode in ("forward", "reverse"):
            with torch.no_grad(), pytest.raises(DerivativeError, match="no derivative came through it"):
                f2.Reference(steps=2, mode=mode)(network, x)
        exact = f2.Reference(steps=2, probes=0, mode="finite")(network, x).value
        assert torch.allclose(exact, f2.Reference(steps=2, probes=0)(lambda y, t, c: -2 * y, x).value, atol=1e-4)
    for mode in MODES:
        constant = f2.divergence.Exact(mode=mode)(lambda y, t, c: torch.ones_like(y), Point(x, 0.5))
        assert torch.equal(constant.divergence, torch.zeros(3))


def test_an_error_of_the_network_itself_is_its_own():
    def broken(x, t, cond):
        return x @ torch.ones(3, 3)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        f2.divergence.Exact()(broken, Point(torch.ones(2, 4), 0.5))


@pytest.mark.parametrize("name", ["Lagrangian", "Eulerian"])
@pytest.mark.parametrize("interval", [(0.2, 0.9), (0.9, 0.2), (0.0, 1.0), (1.0, 0.0)])
def test_differences_along_time_are_the_derivative(name, interval):
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mean = torch.tensor([1.0, -1.0], dtype=torch.float64)
    flow = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(mean, covariance))
    x = torch.randn(5, 2, dtype=torch.float64)
    s, t = (torch.full((5,), time, dtype=torch.float64) for time in interval)
    source = f2.objectives.TeacherSource(flow, f2.divergence.Exact())
    right = flow(x, s, t)
    for mode in ("forward", "finite"):
        found = getattr(f2, name)(mode=mode, step=1e-4).target(flow, source, Point(x, s), t)
        tolerance = 1e-9 if mode == "forward" else 1e-3
        assert torch.allclose(found.velocity, right.velocity, atol=tolerance)
        assert torch.allclose(found.divergence, right.divergence, atol=tolerance)
    with pytest.raises(ValueError, match="one of 'forward', 'finite'"):
        getattr(f2, name)(mode="reverse")


@pytest.mark.parametrize("mode", ["reverse", "finite"])
@pytest.mark.parametrize("frozen", [False, True])
def test_other_modes_work_from_the_first_step_to_the_report(tmp_path, mode, frozen):
    added = callback(estimator=f2.Hutchinson(mode=mode), reference=None, frozen=frozen)
    made = fit(tmp_path, MeanFlowModule(), added)
    assert added.reference.mode == mode
    assert math.isfinite(float(made.callback_metrics["val/f2d2_gap_2"]))
    own = student(estimator=f2.Hutchinson(mode=mode), reference=None)
    own.reference = f2.Reference(steps=8, mode=own.reference.mode)
    assert math.isfinite(float(fit(tmp_path, own).callback_metrics["val/gap_2"]))


def test_threads_wait_for_each_other():
    torch.manual_seed(0)
    network, x = MLP((2,), width=32, blocks=2).eval(), torch.randn(32, 2)
    for p in network.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    right = f2.Reference(steps=20)(network, x).value
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(f2.Reference(steps=20)(network, x).value)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(value, right) for value in found)


# --- references ---


def gaussian(dim=6):
    torch.manual_seed(3)
    axes = torch.linalg.qr(torch.randn(dim, dim))[0]
    covariance = axes @ torch.diag(torch.linspace(0.1, 4.0, dim)) @ axes.T
    return f2.flows.MixtureFlow(
        torch.ones(2), torch.stack((torch.ones(dim), -torch.ones(dim))), torch.stack((covariance,) * 2)
    )


@pytest.mark.parametrize("method", ["euler", "heun3", "rk4"])
def test_one_probe_knows_its_standard_error(method):
    axes = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    covariance = axes @ torch.diag(torch.linspace(0.1, 4.0, 6)) @ axes.T
    flow = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(torch.ones(6), covariance))
    x = torch.randn(200, 6)
    answers = [f2.Reference(method, steps=24, probes=1, seed=seed)(flow, x) for seed in range(12)]
    values, errors = torch.stack([a.value for a in answers]), torch.stack([a.standard_error for a in answers])
    assert float((errors.square().mean() / values.var(0).mean()).sqrt()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dim", [16, 17])
def test_a_reference_of_few_dimensions_is_exact(dim):
    flow = gaussian(dim)
    x = flow.sample(20, torch.Generator().manual_seed(1))
    exact = f2.Reference(steps=8, probes=0)(flow, x).value
    assert torch.equal(f2.Reference(steps=8)(flow, x).value, exact) == (dim == 16)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_sample_has_its_reference_in_any_batch(distribution):
    flow = gaussian(40)
    x = flow.sample(20, torch.Generator().manual_seed(1))

    def reference(y):
        estimator = f2.Hutchinson(2, distribution)
        return f2.reference_log_prob(flow, y, divergence=estimator, steps=10, seed=7).value

    alone = torch.cat([reference(row[None]) for row in x])
    assert torch.allclose(reference(x), alone, atol=1e-4)
    turned = torch.randperm(20)
    assert torch.allclose(reference(x[turned]), alone[turned], atol=1e-4)
    other = f2.reference_log_prob(flow, x, divergence=f2.Hutchinson(2, distribution), steps=10, seed=8).value
    assert float((other - alone).abs().min()) > 1e-3


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_of_keys_have_the_moments_of_others(distribution):
    x = torch.randn(500, 70)
    probes = SampleProbes(f2.Hutchinson(3, distribution), x, 7)
    eps = torch.cat([probes.draw() for _ in range(15)])
    assert eps.shape == (45, 500, 70)
    flat = eps[[0, 1, 31, 32, 44]].reshape(2500, 70)
    assert float(flat.mean(0).abs().max()) < 0.1
    second = flat.T @ flat / 2500
    assert float((second - torch.eye(70)).abs().max()) < 0.15
    assert len(flat.unique(dim=0)) == 2500
    # of one element over the probes
    over = eps.flatten(1).T[:2000]
    assert float((over.T @ over / 2000 - torch.eye(45)).abs().max()) < 0.15
    # what another machine rounds otherwise is no other sample
    again = SampleProbes(f2.Hutchinson(3, distribution), x.double() * (1 + 1e-7), 7).draw()
    assert float((again - eps[:3]).ne(0).double().mean()) < 0.01
    assert len(row_keys(x).unique()) == 500
    assert torch.equal(row_keys(x)[137:138], row_keys(x[137:138]))


def test_large_states_do_not_take_a_derivative_per_dimension():
    calls = []

    def field(x, t, cond):
        calls.append(len(x))
        return -x

    for dim, most in ((128, 128), (129, 1)):
        calls.clear()
        answer = f2.reference_log_prob(field, torch.randn(2, dim), steps=1, method="euler")
        assert sum(calls) == 2 * most
        assert answer.standard_error is None


def test_kept_references_are_of_the_same_solver_and_weights():
    module, x = student(), torch.randn(5, 2)
    velocity = module.average.velocity
    first = module.evaluation.reference(velocity, x, None)[0]
    module.reference = f2.Reference(steps=2, method="euler", probes=0)
    second = module.evaluation.reference(velocity, x, None)[0]
    assert torch.equal(second, module.reference(velocity, x).value)
    with torch.no_grad():
        next(module.average.parameters()).add_(0.5)
    for p in module.average.flow_map.parameters():
        p.data.normal_(0, 0.3)
    third = module.evaluation.reference(velocity, x, None)[0]
    assert torch.equal(third, module.reference(velocity, x).value)
    assert float((first - third).abs().max()) > 1e-3


# --- range, levels, dequantization ---

LEVELS = f2.Quantization(17)


def digits_like(count=64):
    return torch.randint(0, 17, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda k: -1 + (k + 0.5) * 2 / 17, "never dequantized"),  # bin centres
        (lambda k: -1 + k * 2 / 17, "never dequantized"),  # lower edges
        (lambda k: k / 16 * 2 - 1, "never dequantized"),  # both ends
        (lambda k: (k + torch.rand(k.shape)) / 17, r"seem to fill \[0, 1\]"),
        (lambda k: (k + torch.rand(k.shape)) / 17 - 0.5, r"seem to fill \[-0.5, 0.5\]"),
        (lambda k: k + torch.rand(k.shape), "% of the values outside"),
        (lambda k: k.float(), "% of the values outside"),
        (lambda k: k / 16, "0, 1"),
    ],
)
def test_states_that_are_not_dequantized_on_the_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        LEVELS.check_states(make(digits_like()))


def test_states_that_are_right_pass():
    k = digits_like()
    LEVELS.check_states(LEVELS.dequantize(k))
    LEVELS.check_states(LEVELS.dequantize(k)[:1])
    LEVELS.check_states(LEVELS.dequantize(k[:1, :, :1, :2]))
    LEVELS.check_states(LEVELS.dequantize(torch.zeros_like(k)))  # a batch of black images
    LEVELS.check_states(LEVELS.dequantize(torch.full_like(k, 16)))
    # a model's own samples lie a little outside
    LEVELS.check_states(LEVELS.dequantize(k) + 0.1 * torch.randn(k.shape))
    table = [(2, 0.0, 1.0, 0, 2), (256, 0.0, 256.0, 0, 256), (256, -3.0, 3.0, 0, 256), (65536, 0.0, 1.0, 0, 65536)]
    # few bright or pale pictures, and dark ones of levels with some hundred floats
    table += [(256, -1.0, 1.0, 128, 256), (256, -1.0, 1.0, 64, 192), (2, -1.0, 1.0, 1, 2), (65536, -1.0, 1.0, 0, 1)]
    for levels, low, high, first, last in (*table, (256, 0.0, 256.0, 0, 1)):
        other = f2.Quantization(levels, low, high)
        other.check_states(other.dequantize(torch.randint(first, last, (4, 1, 28, 28))))


def test_sixteen_bits_that_were_never_dequantized_are_refused():
    k = torch.randint(0, 65536, (64, 256))
    for low, span in ((-1.0, 2.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match="never dequantized"):
            f2.Quantization(65536, low, low + span).check_states(low + span * k / 65535)


def test_point_masses_are_said():
    x = f2.Quantization(256).dequantize(torch.randint(0, 256, (64, 1, 28, 28)))
    for wrong in (nn.functional.pad(x, (2,) * 4, value=-1.0), torch.cat([x] * 3 + [torch.ones_like(x)], 1)):
        with pytest.warns(UserWarning, match="one and the same number"):
            f2.Quantization(256).check_states(wrong)
    table = torch.randn(500, 4)
    for column in (table[:, :1].round(), table[:, :1].relu(), torch.ones(500, 1)):
        with pytest.warns(UserWarning, match="columns 4 of the states"):
            check_values(torch.cat((table, column), 1), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_values(table, None)
        f2.Quantization(256).check_states(x)


class Levels(Pair):
    """Integers of 17 levels in the plane."""

    def __init__(self, low=-1.0, high=1.0):
        super().__init__(quantization=f2.Quantization(17, low, high))

    def splits(self):
        values = torch.randint(0, 17, (400, 2), generator=torch.Generator().manual_seed(0))
        return {"train": (values, None), "val": (values[:50], None), "test": (values[:51], None)}


@pytest.mark.parametrize("said", [{}, {"levels": 17, "low": -1.0, "high": 1.0}])
def test_levels_that_would_end_with_the_processes_of_a_run_are_asked_for(tmp_path, said):
    """Without them integers would be taken for continuous states afterwards, and bits for what they are not."""
    made = student(teacher(**said), **said)
    run = functools.partial(fit, tmp_path, made, data=Levels(), strategy="ddp_fork", max_steps=1)
    if not said:
        with pytest.raises(Exception, match=r"levels=17, low=-1\.0, high=1\.0"):
            run()
        return
    run()
    assert made.nll(torch.zeros(2, 2, dtype=torch.int64)).max() < 20


def test_a_student_takes_levels_and_range_of_its_teacher(tmp_path):
    of = teacher(levels=17, low=0.0, high=2.0)
    made = student(of)
    assert (made.levels, made.low, made.high) == (17, 0.0, 2.0)
    assert made.objective.quantization == f2.Quantization(17, 0.0, 2.0)
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=True, logger=False)
    run.fit(made, datamodule=Levels(0.0, 2.0))
    # the width of a level is 2 / 17 whatever its place: the same densities in bits are
    x = torch.rand(4, 2)
    bits = f2.bits_per_dim(made.log_prob(x).value, 2, 17, 0.0, 2.0)
    assert torch.allclose(bits, -(made.log_prob(x).value + 2 * math.log(2 / 17)) / (2 * math.log(2)), atol=1e-5)
    run.save_checkpoint(tmp_path / "s.ckpt")
    kept = torch.load(tmp_path / "s.ckpt", weights_only=True)["hyper_parameters"]
    assert (kept["levels"], kept["low"], kept["high"]) == (17, 0.0, 2.0)
    with pytest.raises(ValueError, match=r"teacher was trained on .*high=2\.0.*the model is for .*high=1\.0"):
        student(of, levels=17, high=1.0)
    with pytest.raises(ValueError, match="the objective has"):
        student(of, objective=f2.TrajectoryRegression(quantization=f2.Quantization(17)))


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_ranges_are_compared_with_the_data_in_every_stage(tmp_path, stage):
    wrong = Levels(0.0, 1.0)
    for module in (teacher(levels=17), student(teacher(levels=17))):
        with pytest.raises(ValueError, match=r"low=-1\.0, but Levels has low=0\.0"):
            getattr(trainer(tmp_path), stage)(module, datamodule=wrong)
    with pytest.raises(ValueError, match=r"F2D2Callback\('net'\) has low=-1\.0, but Levels has low=0\.0"):
        getattr(trainer(tmp_path, callbacks=[callback(levels=17)]), stage)(MeanFlowModule(), datamodule=wrong)


def untold(who, **said):
    """What is trained and what answers: told nothing of the data but what is ``said``."""
    torch.manual_seed(0)
    cheap = {"reference": f2.Reference(steps=8, probes=0), **said}
    if who == "callback":
        added = callback(**cheap)
        return MeanFlowModule(), added, [added]
    if who == "teacher":
        module = teacher(validate_nll=True, **cheap)
    else:
        module = student(lambda x, t, cond: -x, flow_map=small(), **({"draws": 2} | cheap))
    return module, module, []


def nll_of(run, who):
    return float(
        run.callback_metrics[{"teacher": "val/nll", "student": "val/nll_1", "callback": "val/f2d2_nll_1"}[who]]
    )


@pytest.mark.parametrize("who", ["teacher", "student", "callback"])
def test_levels_and_range_are_those_of_the_data(tmp_path, who):
    found, told = f2.Quantization(17, 0.0, 2.0), {"levels": 17, "low": 0.0, "high": 2.0}

    def run(said, steps, **kwargs):
        module, model, callbacks = untold(who, **said)
        data = Levels(0.0, 2.0)
        kwargs |= {"max_steps": steps, "val_check_interval": 1, "num_sanity_val_steps": 1}
        made = fit(tmp_path, module, *callbacks, data=data, **kwargs)
        assert model.quantization == found
        assert who == "teacher" or model.objective.quantization == found
        return made, module, model

    first, module, _ = run({}, 2)
    other, same_module, _ = run(told, 2)
    assert same(module, same_module)
    assert nll_of(first, who) == nll_of(other, who)
    # the checkpoint says them to whoever was told nothing, with the data module and without
    path = tmp_path / "found.ckpt"
    first.save_checkpoint(path)
    run({}, 3, ckpt_path=path)
    module, model, callbacks = untold(who)
    again = trainer(tmp_path, callbacks=callbacks)
    again.validate(module, Levels(0.0, 2.0).val_dataloader(), ckpt_path=path, verbose=False)
    assert model.quantization == found
    assert nll_of(again, who) == pytest.approx(nll_of(first, who), abs=1e-6)
    if who != "callback":
        assert torch.load(path, weights_only=True)["hyper_parameters"].items() >= told.items()
        kept = type(module).load_from_checkpoint(path, flow_map=small())
        assert kept.quantization == found
    # what was said holds
    for said, message in (({"levels": 5}, "levels=5"), ({"low": 0.5}, "low=0.5")):
        module, model, callbacks = untold(who, **said)
        with pytest.raises(ValueError, match=f"{message}, but Levels has"):
            fit(tmp_path, module, *callbacks, data=Levels(0.0, 2.0))
    module, model, callbacks = untold(who, levels=5)
    again = trainer(tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"the checkpoint is of a model with levels=17, and .* has levels=5"):
        again.validate(module, Levels(0.0, 2.0).val_dataloader(), ckpt_path=path)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_what_was_trained_in_nats_is_not_taken_for_a_model_of_levels(tmp_path, who):
    continuous, discrete = Pair(), Levels()
    module = untold(who, **({} if who == "teacher" else {"draws": 1}))[0]
    run = fit(tmp_path, module, data=continuous, max_steps=1)
    run.save_checkpoint(tmp_path / "nats.ckpt")
    for trained in (module, type(module).load_from_checkpoint(tmp_path / "nats.ckpt", flow_map=small())):
        with pytest.raises(ValueError, match="has levels=None, but Levels has levels=17"):
            trainer(tmp_path).test(trained, discrete)
    with pytest.raises(ValueError, match=r"the checkpoint is of a model with levels=None, and .* has levels=17"):
        trainer(tmp_path).test(untold(who)[0], discrete, ckpt_path=tmp_path / "nats.ckpt")
    if who == "student":
        with pytest.raises(ValueError, match=r"teacher was trained on None, the model is for .*levels=17"):
            fit(tmp_path, student(fitted := teacher()), data=discrete)
        # one that has yet to learn of its data says them later
        early = student(fitted)
        fit(tmp_path, fitted, data=Levels(0.0, 2.0), max_steps=1)
        fit(tmp_path, early, data=Levels(0.0, 2.0), max_steps=1)
        assert early.quantization == early.objective.quantization == f2.Quantization(17, 0.0, 2.0)
        with pytest.raises(ValueError, match="draws=2 and levels=None"):
            fit(tmp_path, untold(who)[0], data=continuous)


class Fixed(f2.FlowMatchingModule):
    """Arguments of its own, none of them levels."""

    def __init__(self, width=8):
        super().__init__(MLP((2,), width, 1), warmup=2)


def test_a_checkpoint_says_levels_whatever_the_arguments_of_its_class(tmp_path):
    fit(tmp_path, Fixed(), data=Levels(0.0, 2.0), max_steps=1).save_checkpoint(tmp_path / "fixed.ckpt")
    assert Fixed.load_from_checkpoint(tmp_path / "fixed.ckpt").quantization == f2.Quantization(17, 0.0, 2.0)


def test_the_shape_is_that_of_the_network():
    for network in (small(), PreconditionedMLP((2,), width=8)):
        module = f2.FlowMatchingModule(network)
        assert module.shape == module.hparams.shape == f2.F2D2Module(network).shape == (2,)
    with pytest.raises(ValueError, match=r"does not say the shape of its states; give shape="):
        f2.FlowMatchingModule(Adapter("net(x, t)", directions="none")(nn.Identity()))


def test_an_empty_range_is_refused():
    for make in (lambda **k: teacher(**k), lambda **k: student(**k), lambda **k: callback(**k)):
        with pytest.raises(ValueError, match="low < high"):
            make(levels=17, low=1.0, high=1.0)


def test_the_first_batch_of_every_stage_is_looked_at(tmp_path):
    loader = DataLoader(torch.randint(0, 17, (400, 2)) / 17 + 1e-3, batch_size=200)
    for stage in ("fit", "validate", "test"):
        for module in (teacher(levels=17), student(teacher(levels=17))):
            with pytest.raises(ValueError, match="dequantize"):
                getattr(trainer(tmp_path), stage)(module, loader)
    with pytest.raises(ValueError, match="dequantize"):
        trainer(tmp_path, callbacks=[callback(levels=17)]).fit(MeanFlowModule(), loader)


def test_continuous_data_that_look_discrete_are_said(tmp_path):
    loader = DataLoader(torch.randint(0, 5, (1200, 2)).float(), batch_size=600)
    with pytest.warns(UserWarning, match="look discrete"):
        trainer(tmp_path, max_steps=1).fit(teacher(), loader)


@pytest.mark.parametrize(
    ("row", "quantized", "match"),
    [
        ({"nll": -0.1}, True, "no code of negative length"),
        ({"nll": -0.1}, False, None),
        ({"nll": 3.0, "gap": 0.5, "reference_deviation": 0.3}, True, "more than samples differ"),
        ({"nll": 3.0, "gap": -0.2, "reference_deviation": 0.3}, True, None),
        ({"nll": 3.0, "round_trip": 0.6}, False, "misses the data by 0.6"),
        ({"nll": 3.0, "round_trip": 0.4, "gap": math.nan}, False, None),
        ({"nll": 2.0, "reference_nll": -4.0}, True, "the reference is -4"),
    ],
)
def test_impossible_likelihoods_are_said(row, quantized, match):
    said = doubt(row, quantized, data_deviation=1.0)
    assert said == "" if match is None else match in said


def test_a_doubtful_likelihood_is_in_log_and_table():
    evaluation = LikelihoodEvaluation((1, 2), 2, LEVELS, torch.device("cpu"))
    good, bad = torch.tensor([-2.0, -1.0, -2.5]), torch.tensor([9.0, 8.0, 9.5])
    evaluation.update({1: good, 2: bad}, good, reference_error=torch.tensor([0.3, 0.0, 0.4]))
    results = evaluation.results()
    assert results["doubtful_2"] == 1
    assert "doubtful_1" not in results
    assert float(results["reference_error"]) == pytest.approx((0.25 / 3) ** 0.5 / (2 * math.log(2)), rel=1e-5)
    assert "the likelihood in 2 steps is doubtful" in evaluation.doubts()
    assert [bool(row["doubt"]) for row in evaluation.rows()] == [False, True]


def test_what_stays_doubtful_is_said_once_while_a_model_trains(tmp_path):
    class Off(f2.F2D2Module):
        def log_prob(self, *args, **kwargs):
            answer = super().log_prob(*args, **kwargs)
            return replace(answer, value=answer.value - 50.0)

    module, run = Off(teacher().flow_map, reference=f2.Reference(steps=8, probes=0)), trainer(tmp_path, max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, datamodule=Pair())
        run.test(module, datamodule=Pair(), verbose=False)
    assert len([w for w in caught if "in 1 step is doubtful" in str(w.message)]) == 2


# --- conditioning ---


class ByContract(f2.FlowMap):
    """Conditional, written by the documented contract and no more."""

    features = 2

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 2)

    def forward(self, x, s, t, cond=None):
        return x + self.table(cond)

    def forward_features(self, x, s, t, cond=None):
        return self(x, s, t, cond), x


class Labelled(Pair):
    def splits(self):
        return {name: (x, (x[:, 0] > 0).long()) for name, (x, _) in super().splits().items()}


def test_a_flow_map_by_the_contract_gets_its_conditioning(tmp_path):
    of = f2.FlowMatchingModule(ByContract(), (2,))
    assert of.conditional is None
    fit(tmp_path, of, data=Labelled())
    made = student(of, steps=(1,))
    fit(tmp_path, made, data=Labelled())
    x = torch.randn(4, 2)
    one, other = (made.log_prob(x, 1, torch.full((4,), k)).value for k in (0, 1))
    assert float((one - other).abs().min()) > 1e-4


def test_conditioning_that_would_be_ignored_is_refused():
    made, x, labels = student(), torch.randn(4, 2), torch.zeros(4, dtype=torch.long)
    assert made.conditional is False
    for ask in (made.log_prob, made.sample):
        with pytest.raises(ValueError, match="takes none"):
            ask(x, 2, labels)
    with pytest.raises(ValueError, match="takes none"):
        f2.reference_log_prob(made.average, x, labels, steps=2)


@pytest.mark.parametrize("cond", [{"label": torch.zeros(3)}, (torch.zeros(4), "b"), ["a"] * 4])
def test_conditioning_of_another_form_is_refused(cond):
    joint = f2.JointFlowMap(ByContract(), f2.DivergenceHead(features=2))
    with pytest.raises((ValueError, TypeError), match=r"cond (is|holds) (shape|a).*a tensor"):
        f2.log_prob(joint, torch.randn(4, 2), 2, cond)
    of = f2.FlowMatchingModule(ByContract(), (2,))
    with pytest.raises(ValueError, match="a tensor"):
        of.state((torch.randn(4, 2), cond))


# --- teachers ---


@pytest.mark.parametrize("how", ["module", "method", "held"])
def test_a_teacher_that_is_the_students_own_network_stays_as_it_is(tmp_path, how):
    """However it holds the network; a function that does has no copy, and is refused."""
    network = moving()

    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = [network]

        def forward(self, x, t, cond=None):
            return self.kept[0].velocity(x, t)

    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    before = network.velocity(x, t).detach()
    given = {"module": network, "method": network.velocity, "held": Held()}[how]
    made = distilled(network, given, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    fit(tmp_path, made, max_epochs=-1, max_steps=3)
    kept = made.teacher_velocity()
    assert torch.equal(getattr(kept, "velocity", kept)(x, t), before)
    assert not torch.equal(network.velocity(x, t), before)
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match=r"a function of a copy, copy\.deepcopy"):
        distilled(network, lambda x, t, c: network.velocity(x, t))


@pytest.mark.parametrize("how", ["module", "method"])
def test_a_callbacks_teacher_that_is_the_network_itself_stays_as_it_is(tmp_path, how):
    module, x, t = MeanFlowModule(), torch.randn(4, 2), torch.full((4,), 0.5)
    own = f2.adapters.MeanFlow(directions="both")(module.net)
    before = own.velocity(x, t).detach()
    added = callback(teacher=own if how == "module" else own.velocity)
    fit(tmp_path, module, added, max_epochs=-1, max_steps=3)
    kept = added.teacher.velocity if how == "module" else added.teacher
    assert torch.equal(kept(x, t), before)
    assert all(p.requires_grad for p in module.net.parameters())


def test_a_separate_teacher_keeps_its_gradients(tmp_path):
    network = small()
    fit(tmp_path, distilled(small(), network), max_epochs=-1, max_steps=2)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize("part", ["average", "flow_map"])
def test_a_part_of_a_teacher_as_backbone_is_copied_and_trained(tmp_path, part):
    of = teacher()
    made = distilled(getattr(of, part), of)
    assert made.joint.flow_map is not getattr(of, part)
    assert all(p.requires_grad for p in made.joint.flow_map.parameters())
    kept = [p.clone() for p in of.average.parameters()]
    fit(tmp_path, made, max_epochs=-1, max_steps=2)
    assert all(torch.equal(p, q) for p, q in zip(of.average.parameters(), kept, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(made.average.flow_map.parameters(), kept, strict=True))


def test_a_trained_map_goes_on_from_itself_whatever_the_teacher(tmp_path):
    of = teacher()
    first = student(of)
    fit(tmp_path, first)
    again = student(of, flow_map=first.average, optimizer=functools.partial(torch.optim.SGD, lr=1e-30))
    fit(tmp_path, again, max_epochs=-1, max_steps=1)
    assert same(again.joint, first.average)


# --- states are what the hooks of data and module make of batches ---


class Raw(Pair):
    """Ten times as wide, and moved."""

    def splits(self):
        return {name: (10 * values + 100, labels) for name, (values, labels) in super().splits().items()}


class Before(Raw):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return (batch - 100) / 10


class After(Raw):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch - 100) / 10


@pytest.mark.parametrize("data", [Before, After])
@pytest.mark.parametrize("who", ["teacher", "student", "callback"])
def test_fits_are_of_what_training_sees(tmp_path, who, data):
    def fitted(data):
        network = PreconditionedMLP((2,), width=16, blocks=1)
        if who == "callback":
            added = callback()
            fit(tmp_path, MeanFlowModule(), added, data=data)
            return added.added.live["head"].baseline
        module = student(f2.FlowMatchingModule(network)) if who == "student" else f2.FlowMatchingModule(network)
        fit(tmp_path, module, data=data)
        live = module.joint.head if who == "student" else module.flow_map
        return next(part for part in live.modules() if isinstance(part, f2.GaussianBaseline))

    found, right = fitted(data()), fitted(Pair())
    torch.testing.assert_close(found.mean, right.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.variances, right.variances, rtol=1e-3, atol=0)


def test_a_stream_without_a_length_is_validated(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.randn(40, 300, generator=torch.Generator().manual_seed(0)))

    objective = f2.TrajectoryRegression(nodes=4, capacity=64, refresh=8.0, chunk=16)
    network = PreconditionedMLP((300,), width=8, blocks=1)
    module = f2.F2D2Module(network, objective=objective, reference=f2.Reference(steps=4), steps=(1,))
    trainer(tmp_path, max_epochs=1).fit(module, DataLoader(Stream(), 10), DataLoader(Stream(), 10))
    assert math.isfinite(float(module.trainer.callback_metrics["val/nll_1"]))


def test_a_function_can_be_a_teacher(tmp_path):
    mean, covariance = torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.8], [0.8, 0.73]])
    flow = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(mean, covariance))
    reference = f2.Reference(steps=100, probes=0)
    made = distilled(small(), lambda x, t, cond: flow.velocity(x, t), reference=reference)
    logged = fit(tmp_path, made).callback_metrics
    right = -torch.distributions.MultivariateNormal(mean, covariance).log_prob(Pair().dataset("val").values).mean()
    assert float(logged["val/reference_nll"]) == pytest.approx(float(right), abs=1e-3)


@pytest.mark.parametrize("how", ["module", "method", "function"])
def test_a_teacher_that_was_changed_has_another_reference(tmp_path, how):
    network = moving()
    given = {"module": network, "method": network.velocity, "function": lambda x, t, c: network.velocity(x, t)}[how]
    made = distilled(small(), given)
    for _ in range(2):
        run = trainer(tmp_path)
        run.validate(made, datamodule=Pair(), verbose=False)
        right = -made.reference(made.teacher_velocity(), Pair().dataset("val").values).value.mean()
        assert float(run.callback_metrics["val/reference_nll"]) == pytest.approx(float(right), abs=1e-4)
        for p in network.parameters():
            p.data.mul_(1.5)


def test_references_of_functions_are_not_mixed_up():
    made, x = student(), torch.randn(5, 2)
    for k in (1.0, 2.0, 3.0):
        velocity = functools.partial(lambda k, x, t, c: -k * x, k)
        assert torch.equal(made.evaluation.reference(velocity, x, None)[0], made.reference(velocity, x).value)
        del velocity


def test_a_reference_that_is_nan_is_said_and_not_compared(tmp_path):
    made = distilled(small(), lambda x, t, c: torch.where(x[:, :1] > 1.0, torch.nan, -x))
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"the reference is NaN or infinite for \d+ samples"):
        run.validate(made, datamodule=Pair(), verbose=False)
    assert math.isfinite(float(run.callback_metrics["val/gap_1"]))


class HalfDetached(f2.FlowMap):
    """``-2 x``, half of it behind a detach: forward mode says -1 for each dimension."""

    features = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, s, t, cond=None):
        return self.scale * (-x - x.detach())


def test_a_teacher_that_loses_a_part_of_its_derivative_is_refused_before_the_first_step(tmp_path):
    of = HalfDetached().velocity
    with pytest.raises(ConventionError, match=r"HalfDetached answers, but not with its derivative.*mode='finite'"):
        fit(tmp_path, distilled(small(), HalfDetached()), max_steps=1)
    with pytest.raises(ConventionError, match="not with its derivative"):
        fit(tmp_path, MeanFlowModule(), callback(teacher=of))
    # in validation alone as well, and before a teacher's own likelihood
    for own in (distilled(small(), of), f2.FlowMatchingModule(HalfDetached(), (2,), validate_nll=True)):
        with pytest.raises(ConventionError, match="not with its derivative"):
            trainer(tmp_path).validate(own, datamodule=Pair(), verbose=False)
    # differences see all of it; the flow of -2 x shrinks noise by exp(-2)
    made = distilled(small(), of, estimator=f2.Hutchinson(mode="finite"), reference=None, reference_samples=5)
    right = -torch.distributions.Normal(0.0, math.exp(-2.0)).log_prob(Pair().dataset("val").values[:5]).sum(1).mean()
    assert float(fit(tmp_path, made).callback_metrics["val/reference_nll"]) == pytest.approx(float(right), rel=1e-3)


def test_a_teacher_of_another_path_is_refused():
    with pytest.raises(ValueError, match=r"teacher was trained on TrigonometricPath, the objective is on LinearPath"):
        student(teacher(path=f2.flows.TrigonometricPath()))


def test_an_untrained_student_is_said(tmp_path):
    with pytest.warns(UserWarning, match="was not trained"):
        trainer(tmp_path).test(student(), datamodule=Pair(), verbose=False)


# --- sizes, precision, Lightning ---


def test_another_size_than_trained_is_refused():
    class AnySize(f2.FlowMap):
        def forward_features(self, x, s, t, cond=None):
            return -x, x.mean(1, keepdim=True)

    head = f2.DivergenceHead(features=1, baseline=f2.GaussianBaseline((2,), "diagonal"))
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        f2.log_prob(f2.JointFlowMap(AnySize(), head), torch.randn(3, 4), 1)
    for ask in (student().log_prob, student().sample):
        with pytest.raises(ValueError, match=r"shape \(3, 1, 4, 4\), but the model was trained for \(B, 2\)"):
            ask(torch.randn(3, 1, 4, 4), 1)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_of_weights_is_refused_at_the_start(tmp_path, precision):
    for module in (teacher(), student()):
        with pytest.raises(ValueError, match=f"precision='{precision}'.*bf16-mixed"):
            trainer(tmp_path, precision=precision).fit(module, datamodule=Pair())
    head = f2.DivergenceHead(features=2).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"head\.float\(\)"):
        f2.JointFlowMap(ByContract(), head)(torch.zeros(2, 2), 1.0, 0.0, torch.zeros(2, dtype=torch.long))


def test_double_precision_works_everywhere(tmp_path):
    x = torch.randn(3, 2, dtype=torch.float64)
    made = student()
    run = fit(tmp_path, made, precision="64-true")
    assert math.isfinite(float(run.callback_metrics["val/gap_1"]))
    value = made.log_prob(x).value
    assert value.dtype == torch.float64
    assert torch.allclose(made.float().log_prob(x).value.double(), value, atol=1e-4)
    added = callback()
    fit(tmp_path, MeanFlowModule(), added, precision="64-true")
    assert added.log_prob(x).value.dtype == torch.float64
    # double states of somebody's data in a single-precision run
    loader = DataLoader(torch.randn(64, 2, dtype=torch.float64), batch_size=32)
    trainer(tmp_path, max_steps=2).fit(student(), loader, loader)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(2)


def test_training_data_without_an_end(tmp_path):
    made = student()
    trainer(tmp_path, max_steps=2, max_epochs=-1).fit(made, DataLoader(Endless(), batch_size=8192))
    assert bool(made.joint.head.baseline.fitted)
    assert torch.allclose(made.joint.head.baseline.variances, torch.ones(2), atol=0.05)


class Stream(IterableDataset):
    """Rows that end, and do not say where."""

    def __iter__(self):
        return iter(Pair().splits()["train"][0])


@pytest.mark.parametrize("accumulate", [None, {0: 1, 1: 3}, {0: 3, 1: 1}], ids=["none", "more", "less"])
def test_the_rate_ends_with_the_run_and_no_earlier(tmp_path, accumulate):
    """A cosine over the steps that were taken, however many batches make one; none where there is no last one."""

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    rates, schedules = [], [] if accumulate is None else [GradientAccumulationScheduler(accumulate)]
    fit(tmp_path, teacher(), Rates(), *schedules, max_epochs=3, limit_val_batches=0)
    share = torch.arange(len(rates) - 2) / (len(rates) - 2)
    torch.testing.assert_close(torch.tensor(rates[2:]), 1e-3 * (1 + torch.cos(math.pi * share)) / 2)
    rates = []
    trainer(tmp_path, callbacks=[Rates(), *schedules], max_epochs=3).fit(teacher(), DataLoader(Stream(), 32))
    assert rates[2:] == [1e-3] * (len(rates) - 2)


@pytest.mark.parametrize("make", [MeanFlowModule, ManualModule])
def test_phases_of_an_objective_are_shares_of_the_run(tmp_path, make):
    """Of two optimisers each takes its own steps, and data without a length are not at their end at once."""

    class Seen(f2.TrajectoryRegression):
        def loss(self, student, batch):
            seen.append(batch.progress)
            return super().loss(student, batch)

    def shares(data, **kwargs):
        seen.clear()
        made = callback(objective=Seen(nodes=4, capacity=16, refresh=4.0, chunk=16), check=False)
        trainer(tmp_path, callbacks=[made], limit_val_batches=0, **kwargs).fit(make(), data)
        return torch.tensor(seen)

    seen, twice = [], 2 if make is ManualModule else 1
    rows = DataLoader(list(Stream()), 32)
    torch.testing.assert_close(shares(rows, max_epochs=4), torch.arange(12) / 12)
    assert shares(DataLoader(Stream(), 32), max_epochs=2).tolist() == [0.0] * 3 + [0.5] * 3
    by_steps = shares(rows, max_steps=6 * twice, max_epochs=-1)
    assert by_steps[0] <= 1 / 12
    assert by_steps.diff().tolist() == pytest.approx([1 / 6] * 5)


@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
@pytest.mark.parametrize("who", ["callback", "module"])
def test_a_tuner_leaves_no_trace(tmp_path, what, who):
    def run(tuned):
        torch.manual_seed(0)
        added = callback() if who == "callback" else None
        module = MeanFlowModule() if added else student()
        made = trainer(tmp_path, max_steps=3, callbacks=[added] if added else [])
        if added:
            module.lr = 1e-2
        data = Pair()
        if tuned:
            options = {"num_training": 6} if what == "lr_find" else {"max_trials": 2, "steps_per_trial": 1}
            options |= {"update_attr": False} if what == "lr_find" else {}
            getattr(Tuner(made), what)(module, datamodule=data, **options)
            data.batch_size = 32
            module.lr = 1e-2 if added else None
        torch.manual_seed(5)
        made = trainer(tmp_path, max_steps=3, callbacks=[added] if added else [])
        made.fit(module, datamodule=data)
        x = torch.linspace(-1, 1, 8).reshape(4, 2)
        return (added or module).log_prob(x, 2).value.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(True), run(False))


def test_a_tuned_rate_is_taken():
    module = teacher()
    module.lr = 0.125
    module._trainer = L.Trainer(max_steps=1, logger=False, accelerator="cpu")
    assert module.configure_optimizers()["optimizer"].param_groups[0]["initial_lr"] == 0.125


@pytest.mark.parametrize("who", ["teacher", "student", "callback"])
def test_figures_do_not_depend_on_batches_and_workers(tmp_path, who):
    def run(size, workers):
        torch.manual_seed(0)
        data = Pair(num_workers=workers)
        data.eval_batch_size = size
        if who == "callback":
            added = callback(reference=f2.Reference(steps=8), reference_samples=13)
            made = fit(tmp_path, MeanFlowModule(), added, data=data)
            return {name: value for name, value in made.callback_metrics.items() if "f2d2" in name}
        make, own = (teacher, {"validate_nll": True}) if who == "teacher" else (student, {"reference_samples": 13})
        module = make(reference=f2.Reference(steps=8), **own)
        made = trainer(tmp_path)
        made.validate(module, datamodule=data, verbose=False)
        return dict(made.callback_metrics)

    one, other = run(50, 0), run(7, 2)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert float(other[name]) == pytest.approx(float(value), abs=2e-5), name


@pytest.mark.parametrize("other", [{"levels": 256, "low": 0.0, "high": 2.0}, {"levels": 17, "low": 0.0, "high": 4.0}])
def test_a_checkpoint_of_other_levels_is_refused(tmp_path, other):
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(teacher(levels=17, low=0.0, high=2.0), datamodule=Levels(0.0, 2.0))
    run.save_checkpoint(tmp_path / "t.ckpt")
    loader = DataLoader(torch.stack(list(Levels(0.0, 2.0).dataset("train"))), batch_size=40)
    with pytest.raises(ValueError, match="the checkpoint is of a model with"):
        trainer(tmp_path).test(teacher(**other), loader, ckpt_path=tmp_path / "t.ckpt", verbose=False)


def test_the_check_of_a_convention_holds_at_any_scale_of_the_data():
    class Field(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, x, t):
            return self.answer(x, t)

    adapter = Adapter("net(x, s)", noise_time=0.0, data_time=1.0, directions="none")
    means = torch.stack((torch.ones(4), -torch.ones(4)))
    for scale in (0.01, 0.3, 3.0, 50.0):
        flow = f2.flows.MixtureFlow(torch.ones(2), 0.7 * scale * means, (0.5 * scale**2 * torch.eye(4)).expand(2, 4, 4))
        x = flow.sample(64, torch.Generator().manual_seed(0))
        for network in (Field(flow.velocity), Field(lambda x, t: torch.zeros_like(x))):
            check_convention(adapter(network), x)


def test_a_heads_network_answers_one_number():
    head = f2.DivergenceHead(network=small())
    with pytest.raises(ValueError, match="one number a state"):
        f2.log_prob(f2.JointFlowMap(small(), head), torch.randn(3, 2), 1)


def test_reverse_mode_says_what_it_cannot_do():
    def split(x, t, cond):
        a, b = (x + t[:, None]).chunk(2, 1)
        return torch.cat((torch.relu_(a), b), 1)

    with torch.no_grad(), pytest.raises(DerivativeError, match="mode='finite'"):
        f2.divergence.Exact(mode="reverse")(split, Point(torch.randn(3, 2), 0.5))
    with torch.inference_mode():
        found = f2.divergence.Exact(mode="reverse")(
            lambda x, t, c: x * t[:, None], Point(torch.randn(3, 2), 0.5)
        ).divergence
    assert torch.equal(found, torch.ones(3))
