"""What Python's users expect of a model with likelihoods: raw data, arrays, seeds, batches, gradients, short text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.flows import GaussianFlow
from f2d2_lightning.likelihood import Determinant, JointModel
from f2d2_lightning.nn import MLP
from foreign import MeanFlowModule, callback
from lightning_parts import fit, student, teacher
from problems import randomize

MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)


def gaussian(levels=None):
    """A model whose density is known."""
    flow = GaussianFlow(f2.GaussianBaseline.from_covariance(MEAN, COVARIANCE))
    return JointModel(flow, (2,), None if levels is None else f2.Quantization(levels, -2.0, 2.0))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One of each kind, with random answers."""
    torch.set_default_dtype(torch.float64)  # for the whole module
    torch.manual_seed(0)
    added = callback()
    fit(tmp_path_factory.mktemp("added"), MeanFlowModule(), added)
    own = student()
    for part in (own.joint, own.average):
        randomize(part, 0.3)
    return {"student": own, "callback": added, "file": JointModel(own.joint, (2,)), "teacher": teacher()}


def test_nll_of_raw_data_is_that_of_the_known_density():
    model, normal = gaussian(16), torch.distributions.MultivariateNormal(MEAN, COVARIANCE)
    k = torch.randint(3, 13, (40, 2), dtype=torch.uint8)
    # the bin's mass where the density hardly changes; noise averages out over draws
    width = 4 / 16
    centres = -2 + (k.double() + 0.5) * width
    inside = torch.linspace(-0.5, 0.5, 41)[:-1] + 1 / 80
    grid = torch.cartesian_prod(inside, inside) * width
    exact = -(normal.log_prob(centres[:, None] + grid).mean(1) + 2 * math.log(width)) / (2 * math.log(2))
    found = model.nll(k, draws=400, seed=1)
    assert torch.allclose(found, exact, atol=0.05)
    assert not torch.allclose(model.nll(k, seed=1), exact, atol=0.05)
    assert torch.equal(found, model.nll(k.numpy(), draws=400, generator=None, seed=1, batch_size=7))
    # states as they are, and bits per dimension of continuous data
    x = normal.sample((300,))
    assert torch.allclose(model.nll(x), f2.bits_per_dim(normal.log_prob(x), 2, 16, -2.0, 2.0))
    continuous = gaussian()
    assert torch.allclose(continuous.nll(x.numpy()), -normal.log_prob(x))
    assert torch.allclose(continuous.nll([[0, 1]]), -normal.log_prob(torch.tensor([0.0, 1.0])))
    assert torch.allclose(continuous.bits_per_dim(x), f2.bits_per_dim(normal.log_prob(x), 2))
    for wrong, said in (
        (k + 100, "levels=16 means 0 to 15"),
        (centres, "never dequantized"),
        (k[0], r"x\[None\]"),
        (k.to(torch.complex64), "complex"),
    ):
        with pytest.raises(ValueError, match=said):
            model.nll(wrong)
    with pytest.raises(ValueError, match="draws=2"):
        model.nll(x, draws=2)


@pytest.mark.parametrize("name", ["student", "callback", "file", "teacher"])
def test_the_same_numbers_in_any_batches_and_from_any_array(models, name):
    model, x = models[name], torch.randn(11, 2)
    whole = model.log_prob(x)
    with pytest.raises(ValueError, match=r"shape \(0, .*B >= 1"):
        model.log_prob(x[:0], batch_size=4)
    parts = model.log_prob(x, batch_size=4)
    assert torch.allclose(parts.value, whole.value)
    assert parts.value.shape == (11,)
    assert parts.evaluations == whole.evaluations
    for other in (x.tolist(), x.numpy(), x.float(), x.half(), list(x), np.asfortranarray(x.numpy())[::1]):
        assert torch.allclose(model.log_prob(other).value, whole.value, atol=0.05)
    steps = 8 if name == "teacher" else 2
    drawn = model.sample(11, steps, seed=5)
    assert torch.allclose(model.sample(11, steps, seed=5, batch_size=3).state, drawn.state)
    assert torch.equal(model.sample(11, steps, seed=5).noise, drawn.noise)
    assert not torch.equal(model.sample(11, steps, seed=6).noise, drawn.noise)
    assert torch.equal(model.sample(11, steps, seed=2**70 + 5).noise, drawn.noise)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(model.sample(11, steps, generator=generator).noise, drawn.noise)
    with pytest.raises(ValueError, match="both given"):
        model.sample(2, steps, seed=1, generator=generator)
    with pytest.raises(ValueError, match=r"x\[None\]"):
        model.log_prob(x[0])


def test_probes_are_a_function_of_seed_and_sample(models):
    x = torch.randn(9, 2)
    for model in (models["student"], JointModel(models["student"].joint, (2,))):
        ask = lambda **how: model.log_prob(x, 2, determinant=Determinant(probes=2), **how).value  # noqa: B023, E731
        assert torch.allclose(ask(seed=3), ask(seed=3, batch_size=2))
        assert not torch.allclose(ask(seed=3), ask(seed=4))
        samples = [model.sample(9, 2, with_log_prob=True, determinant="estimate", seed=3, batch_size=n) for n in (9, 4)]
        assert torch.allclose(samples[0].log_prob, samples[1].log_prob)


@pytest.mark.parametrize("name", ["student", "callback", "file"])
def test_gradients_go_to_states_and_never_to_weights(models, name):
    model, x = models[name], torch.randn(3, 2)
    assert not model.log_prob(x).value.requires_grad
    assert not model.sample(2).state.requires_grad
    weights = [p for p in model.joint_map.parameters() if p.requires_grad]
    x.requires_grad_(True)
    value = model.log_prob(x).value
    value.sum().backward()
    step = 1e-5 * torch.eye(2)[0]
    slope = (model.log_prob(x.detach() + step).value - model.log_prob(x.detach() - step).value) / 2e-5
    assert torch.allclose(x.grad[:, 0], slope, atol=1e-4)
    # by torch.func too, of a batch and state by state
    ask = lambda y: model.log_prob(y[None] if y.ndim == 1 else y).value.sum()  # noqa: E731
    assert torch.allclose(torch.func.grad(ask)(x.detach()), x.grad)
    assert torch.allclose(torch.func.vmap(torch.func.grad(ask))(x.detach()), x.grad)
    assert all(p.grad is None for p in model.joint_map.parameters())
    # they are as they were
    assert all(p.requires_grad for p in weights)
    assert bool(weights) == (name != "student")


def test_answers_are_short_in_print_and_become_arrays(models):
    model = models["student"]
    answer = model.log_prob(torch.randn(4, 2))
    assert repr(answer).startswith("LogProb(value=(4,) ")
    assert "nats" in repr(answer)
    assert answer.numpy()["value"].shape == (4,)
    assert answer.numpy()["evaluations"] == 4
    assert "F2D2Module(shape=(2,), directions=both, steps=(1, 2, 4, 8)" in repr(model)
    shown = [answer, *models.values(), f2.data.Digits(), model.objective, model.estimator, f2.F2D2Callback("net")]
    assert all(len(repr(one)) < 600 and "object at" not in repr(one) for one in shown)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_checkpoint_of_a_script_is_loaded_without_its_objects(tmp_path, kind):
    inversion = f2.Inversion("newton", tolerance=1e-9)
    backbone = MLP((2,), width=16, blocks=2, directions="to_data")
    module = teacher() if kind == "teacher" else f2.F2D2Module(backbone, inversion=inversion, warmup=2)
    run = fit(tmp_path, module, limit_train_batches=1)
    run.save_checkpoint(tmp_path / "own.ckpt")
    for path in (tmp_path / "own.ckpt", str(tmp_path / "own.ckpt")):
        model = f2.load(path)
        x = torch.randn(5, 2)
        assert type(model) is type(module)
        assert torch.equal(model.log_prob(x).value, module.log_prob(x).value)
        assert model.inversion == module.inversion
        assert not model.training
