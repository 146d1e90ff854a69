"""Numbers that were wrong without a word: each is right now, or is refused or flagged."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import f2d2_lightning as f2
from f2d2_lightning import GaussianBaseline, Inversion, Quantization, log_prob
from f2d2_lightning.cli import main, nll_command, sample_command
from f2d2_lightning.cli._common import check_labels, class_count
from f2d2_lightning.data.images._reader import read_images
from f2d2_lightning.metrics.likelihood import said_of_bits
from f2d2_lightning.nn import MLP
from f2d2_lightning.training.loading import load_module
from f2d2_lightning.utils.class_names import guessed_labels
from f2d2_lightning.utils.seeding import counter_uniform
from lightning_parts import trainer
from problems import PROBLEMS, Logistic, LogisticMap, ToData, randomize, rotation

# --- Gaussian fits of few samples ---


def wide_gaussian(kind, dim):
    """A covariance ``(d, d)``."""
    if kind == "isotropic":
        return torch.eye(dim)
    if kind == "scales":
        return torch.diag(torch.logspace(-4, 4, dim))
    if kind == "rotated":
        axes = rotation(dim, 1)
        return (axes * torch.logspace(-2, 0.2, dim)) @ axes.T
    if kind == "one factor":
        return 0.1 * torch.eye(dim) + 0.9
    assert kind == "few factors"
    axes = rotation(dim, 2)[:, :5]
    return 1e-3 * torch.eye(dim) + dim / 5 * axes @ axes.T


def fresh(dim, covariance, count, kind="full"):
    """Mean log-likelihood of fresh data under a fit to ``count`` samples, and under the truth, by ``torch``."""
    root = torch.linalg.cholesky(covariance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        baseline = GaussianBaseline((dim,), kind).fit((3 + torch.randn(count, dim) @ root.T).split(50))
    x = 3 + torch.randn(500, dim) @ root.T
    truth = torch.distributions.MultivariateNormal(torch.full((dim,), 3.0), covariance)
    return float(baseline.log_prob(x, torch.ones(500)).mean()), float(truth.log_prob(x).mean())


# how far the fit may be from the truth, nats; before, each of them was off by 1e4 to 1e9
@pytest.mark.parametrize(
    ("kind", "dim", "count", "within"),
    [
        ("isotropic", 64, 64, 3),
        ("scales", 256, 64, 12),
        ("scales", 256, 257, 4),
        ("rotated", 256, 256, 75),
        ("one factor", 256, 64, 40),
        ("few factors", 256, 255, 35),
    ],
)
def test_fresh_data_of_a_fit_to_few_samples(kind, dim, count, within):
    got, right = fresh(dim, wide_gaussian(kind, dim), count)
    assert abs(got - right) < within
    if kind not in ("isotropic", "scales"):
        # better than what knows no correlations at all
        assert got > fresh(dim, wide_gaussian(kind, dim), count, "diagonal")[0]


def test_coordinates_that_do_not_vary_in_few_samples():
    varying = torch.randn(40, 30) @ (rotation(30, 3) * torch.linspace(0.5, 2, 30)).T
    with pytest.warns(UserWarning, match="full covariance of 40 dimensions is fitted to 40 samples.*give 160 or more"):
        padded = GaussianBaseline((40,), "full").fit([torch.cat((varying, torch.full((40, 10), 0.5)), 1)], floor=1e-3)
    with pytest.warns(UserWarning, match="shrunk towards its diagonal"):
        alone = GaussianBaseline((30,), "full").fit([varying])
    x = torch.randn(200, 30) @ (rotation(30, 3) * torch.linspace(0.5, 2, 30)).T
    flat = torch.distributions.Normal(0.5, 1e-3**0.5)
    z = 0.5 + 0.02 * torch.randn(200, 10)
    got = padded.log_prob(torch.cat((x, z), 1), torch.ones(200)) - flat.log_prob(z).sum(-1)
    # samples fall into other parts, so that the weights are not quite the same
    assert float((got - alone.log_prob(x, torch.ones(200))).mean()) == pytest.approx(0, abs=1)
    assert torch.equal(padded.variances[:10], torch.full((10,), 1e-3))


def test_a_fit_to_enough_samples_is_the_samples_own():
    x = torch.randn(4096, 64) @ rotation(64, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baseline = GaussianBaseline((64,), "full").fit([x])
        GaussianBaseline((64,), "diagonal").fit([x[:16]])
        GaussianBaseline((64,), "isotropic").fit([x[:2]])
    mean = x.mean(0)
    values, axes = torch.linalg.eigh((x.T @ x - 4096 * torch.outer(mean, mean)) / 4095)
    torch.testing.assert_close(baseline.variances, values.clamp(min=1e-6))
    torch.testing.assert_close((baseline.axes * axes).sum(0).abs(), torch.ones(64))
    with pytest.warns(UserWarning, match="each of 64 coordinates is fitted to 15 samples"):
        GaussianBaseline((64,), "diagonal").fit([x[:15]])


def test_few_samples_in_parts_are_the_same_as_at_once():
    x = torch.randn(60, 20) @ rotation(20, 4)
    with pytest.warns(UserWarning, match="60 samples"):
        whole = GaussianBaseline((20,), "full").fit([x])
    # what sums are taken around and of how many processes, sums, squares and count
    parts = [torch.zeros(20), torch.zeros(()), torch.zeros(4, 20), torch.zeros(4, 20, 20), torch.zeros(4)]
    for half in (x[:17], x[17:]):
        place = itertools.count()

        def add(value, place=place):
            parts[i] = parts[(i := next(place))] + value
            return parts[i]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            summed = GaussianBaseline((20,), "full").fit(half.split(5), reduce=add)
    for name, value in whole.state_dict().items():
        if name != "axes":
            torch.testing.assert_close(summed.state_dict()[name], value)
    y = torch.randn(9, 20)
    torch.testing.assert_close(summed.log_prob(y, torch.ones(9)), whole.log_prob(y, torch.ones(9)))


def test_a_covariance_that_fills_the_memory_is_refused():
    with pytest.raises(ValueError, match=r"16,384 x 16,384 numbers, 1.0 GiB .*covariance='diagonal'"):
        GaussianBaseline((4, 64, 64), "full")
    assert GaussianBaseline((4, 64, 64)).covariance == "cosine"
    assert GaussianBaseline((16384,)).covariance == "diagonal"


# --- gradients through an inversion ---


def maps(name):
    """A joint map both ways, and data that it is for."""
    if name == "logistic":
        flow = Logistic()
        return LogisticMap(flow), flow.data(5)
    problem = PROBLEMS["gaussian-vector-linear"]()
    return problem.field, problem.states(5, 1.0)


@pytest.mark.parametrize("name", ["gaussian", "logistic"])
@pytest.mark.parametrize("method", ["newton", "anderson"])
@pytest.mark.parametrize("memory", [1, 2, 6])
@pytest.mark.parametrize("steps", [1, 4])
def test_gradients_of_an_inversion_are_right_or_said_to_be_missing(name, method, memory, steps):
    both_ways, x = maps(name)
    if name == "logistic" and steps == 1:
        exact = Logistic().solve
        h = 1e-5
        # the noise that a point comes from is known in closed form, its likelihood's derivative by differences
        shifted = [torch.eye(3)[i] * h for i in range(3)]
        right = torch.stack([(exact(x + e)[1] - exact(x - e)[1]) / (2 * h) for e in shifted], -1)
    else:
        x.requires_grad_(True)
        (right,) = torch.autograd.grad(log_prob(both_ways, x, steps).value.sum(), x)
    x = x.detach().requires_grad_(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = log_prob(ToData(both_ways), x, steps, inversion=Inversion(method, memory=memory))
        (gradient,) = torch.autograd.grad(answer.value.nansum(), x)
    found = answer.converged & gradient.isfinite().all(-1)
    torch.testing.assert_close(gradient[found], right[found], rtol=1e-5, atol=1e-5)
    assert bool(found.all()) or any("did not converge" in str(warning.message) for warning in caught)
    assert bool(found.all()) or method == "anderson"


def turning(y):
    """A displacement whose Jacobian turns a plane: the fixed-point iteration goes around."""
    turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]]).to(y)
    return y @ turn.T


def test_a_gradient_that_does_not_converge_is_nan_and_said():
    x = torch.randn(3, 2, requires_grad=True)
    exact = torch.linalg.inv(torch.eye(2) + torch.tensor([[0.0, -2.0], [2.0, 0.0]]))
    solution = Inversion("newton", memory=1).solve(turning, x)
    assert bool(solution.converged.all())
    (gradient,) = torch.autograd.grad(solution.state[:, 0].sum(), x)
    torch.testing.assert_close(gradient, exact[0].expand(3, 2))
    # a start at the solution: nothing to iterate there, but its gradient has to be
    y = torch.zeros(3, 2, requires_grad=True)
    solution = Inversion("anderson", memory=1).solve(turning, y)
    assert bool(solution.converged.all())
    with pytest.warns(UserWarning, match=r"gradient of an inversion did not converge for 3 of 3 .*memory above 1"):
        (gradient,) = torch.autograd.grad(solution.state[:, 0].sum(), y)
    assert gradient.isnan().all()
    (gradient,) = torch.autograd.grad(Inversion("anderson").solve(turning, y).state[:, 0].sum(), y)
    torch.testing.assert_close(gradient, exact[0].expand(3, 2))


@pytest.mark.parametrize("method", ["newton", "anderson"])
def test_gradients_of_samples_do_not_hang_together(method):
    """A steep loss of one sample is no measure for the gradient of another, nor is one that is NaN."""
    scales = torch.tensor([1e8, 1.0, 1e-8, math.nan])
    y = torch.zeros(4, 2, requires_grad=True)
    state = Inversion(method).solve(turning, y).state
    (gradient,) = torch.autograd.grad((scales * state[:, 0]).sum(), y)
    exact = torch.linalg.inv(torch.eye(2) + torch.tensor([[0.0, -2.0], [2.0, 0.0]]))[0]
    for i in range(3):
        torch.testing.assert_close(gradient[i] / scales[i], exact, rtol=1e-8, atol=1e-8)
    assert gradient[3].isnan().all()


@pytest.mark.parametrize("method", ["newton", "anderson"])
def test_a_sample_that_diverges_leaves_the_others_alone(method):
    """What is not finite in one of a batch was an error of the linear algebra's."""

    def displacement(y):
        return torch.where(torch.arange(3)[:, None] == 1, torch.exp(y.exp() ** 2) + y.log(), 0.3 * y.sin())

    x = torch.tensor([[0.3, 0.4], [0.5, -0.6], [0.1, 0.2]])
    with torch.no_grad():
        solution = Inversion(method, tolerance=1e-9).solve(displacement, x)
    assert solution.converged.tolist() == [True, False, True]
    for i in (0, 2):
        torch.testing.assert_close(solution.state[i] + 0.3 * solution.state[i].sin(), x[i])


def test_rounding_far_out_is_no_solution():
    with torch.no_grad():
        answer = Inversion().solve(lambda y: torch.where(y.abs() > 1e15, -y, -y + 1e20), torch.zeros(2, 3))
    assert (answer.residual == 0).all()
    assert not answer.converged.any()


# --- labels by name ---


class Picky(f2.F2D2Module):
    """A conditional student with random weights, whose likelihoods depend on the class."""

    def __init__(self, classes: int = 11, shape: list[int] = [1, 4, 4], levels: int | None = 256) -> None:  # noqa: B006
        torch.manual_seed(3)
        network = randomize(MLP(shape, width=12, blocks=1, classes=classes))
        head = f2.DivergenceHead(12, baseline=f2.GaussianBaseline(shape, "diagonal"))
        super().__init__(network, shape, head=head, levels=levels, steps=(1,), reference=f2.Reference(steps=2))
        self.average.load_state_dict(randomize(self.joint).state_dict())


@pytest.fixture
def single(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PIXELS = {"2": 40, "10": 200, "cat": 90, "3": 120}


def pictures(folder, *classes, count=6):
    """Pictures whose brightness is their class."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = np.random.default_rng(PIXELS[name] + i).integers(0, 100, (4, 4))
            values = noise + PIXELS[name] // 2 + 50 * (i < 1)
            Image.fromarray(values.astype(np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def image_data(folder, **settings):
    return f2.data.ImageFolder(folder, 4, channels=1, labels=True, val=2, test=4, batch_size=4, **settings)


def classes_kept(path, folder, classes=11, names=True, **settings):
    """A checkpoint that a trainer wrote after a step on a folder of classes, with the class that it is of."""
    module, made = Picky(classes), trainer(path.parent, max_steps=1, limit_val_batches=0)
    made.fit(module, datamodule=image_data(folder, **settings))
    made.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] = {"_class_path": f"{__name__}.Picky", "classes": classes}
    if not names:
        del content["f2d2"]["classes"]
    torch.save(content, path)
    return load_module(path, f2.F2D2Module, trust=[__name__])


def nll(path, data, *options):
    """What the command says of each sample, by its name."""
    arguments = ["--ckpt", path, "--trust", __name__, "--data", data, "--device", "cpu", "--overwrite", "true"]
    nll_command([*map(str, arguments), *map(str, options)])
    with open("nll.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def right(module, folder, order):
    """Likelihoods of a folder's pictures under the label of each one's class in ``order``."""
    images = read_images(folder, module.shape)
    uniform = counter_uniform(torch.arange(images.values.numel()).reshape(len(images.values), -1), 0)
    x = Quantization(256).dequantize(images.values, uniform.reshape(images.values.shape))
    labels = torch.tensor([order.index(name.split("/")[0]) for name in images.names])
    with torch.no_grad():
        return module.log_prob(x, 4, labels).value.tolist()


@pytest.mark.parametrize("given", [("2", "10"), ("10",), ("2",)])
def test_a_class_is_called_by_its_name(single, given):
    """Training sorts names as text, 10 before 2; the command took them for the labels themselves."""
    module = classes_kept(single / "a.ckpt", pictures(single / "train", "2", "10"))
    assert module.class_names == ["10", "2"]
    folder = pictures(single / "given", *given)
    expected = right(module, folder, ["10", "2"])
    got = [float(row["log_prob"]) for row in nll("a.ckpt", folder)]
    assert got == pytest.approx(expected, rel=1e-4)
    other = right(module, folder, ["2", "10"])
    assert np.abs(np.subtract(expected, other)).mean() > 1


def test_a_data_module_of_fewer_classes_follows_the_model(single):
    module = classes_kept(single / "a.ckpt", pictures(single / "train", "2", "10", "cat"))
    assert module.class_names == ["10", "2", "cat"]
    data = image_data(pictures(single / "fewer", "2", "cat"))
    with torch.no_grad():
        trainer(single).test(module, datamodule=data, verbose=False)
    assert data.classes == ["10", "2", "cat"]
    assert {int(label) for label in data.dataset("train").labels} == {1, 2}
    # and from the command line
    arguments = {"folder": str(single / "fewer"), "size": 4, "channels": 1, "labels": True, "val": 2, "test": 4}
    rows = nll("a.ckpt", "f2d2_lightning.data.ImageFolder", "--data_args", json.dumps(arguments))
    x, labels = data.dataset("test").__getitems__(list(range(4)))
    with torch.no_grad():
        expected = module.log_prob(x, 4, labels).value.tolist()
    assert [float(row["log_prob"]) for row in rows] == pytest.approx(expected, rel=1e-4)


def test_a_run_goes_on_with_the_labels_that_it_began_with(single):
    folder = pictures(single / "train", "2", "10", "cat")
    classes_kept(single / "a.ckpt", folder)
    content = torch.load("a.ckpt", weights_only=True)
    content["f2d2"]["classes"] = ["cat", "2", "10"]
    torch.save(content, "b.ckpt")
    seen = {}

    class Seeing(Picky):
        def training_step(self, batch, batch_idx):
            for image, label in zip(*batch, strict=True):
                seen.setdefault(int(label), []).append(float(image.mean()))
            return super().training_step(batch, batch_idx)

    module = Seeing()
    data = image_data(folder, flip=True)
    trainer(single, max_epochs=3, limit_val_batches=0).fit(module, datamodule=data, ckpt_path="b.ckpt")
    assert module.class_names == ["cat", "2", "10"]
    means = {label: np.mean(values) for label, values in seen.items()}
    # cat is 90, 2 is 40, 10 is 200
    assert sorted(means, key=means.get) == [1, 0, 2]


def test_a_student_has_the_labels_of_its_teacher(single):
    network = randomize(MLP([1, 4, 4], width=12, blocks=1, classes=3))
    teacher = f2.FlowMatchingModule(network, [1, 4, 4], levels=256)
    teacher.class_names = ["cat", "2", "10"]
    data, student = image_data(pictures(single / "train", "2", "10", "cat")), f2.F2D2Module(teacher=teacher, steps=(1,))
    trainer(single, max_steps=1, limit_val_batches=0).fit(student, datamodule=data)
    assert data.classes == student.class_names == ["cat", "2", "10"]
    teacher.class_names = ["2", "cat", "10"]
    with pytest.raises(ValueError, match=r"student's classes are \['cat', '2', '10'\], the teacher's \['2', 'cat'"):
        trainer(single).test(student, datamodule=data, verbose=False)


def refused_nll(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        nll(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_classes_that_the_model_does_not_know_are_refused_with_both_lists(single, capsys):
    module = classes_kept(single / "a.ckpt", pictures(single / "train", "2", "10"))
    folder = pictures(single / "other", "2", "cat")
    both = "class 'cat' that the model does not know: the data have '2', 'cat'; the model has '10', '2'"
    assert both in refused_nll(capsys, "a.ckpt", folder)
    with pytest.raises(ValueError, match=both):
        trainer(single).test(module, datamodule=image_data(folder), verbose=False)
    content = torch.load("a.ckpt", weights_only=True)
    content["f2d2"]["classes"] = []
    torch.save(content, "numbers.ckpt")
    assert "labels that are numbers, without names" in refused_nll(capsys, "numbers.ckpt", folder)
    # numbers are what a model of numbers calls its classes
    folder = pictures(single / "numbers", "2", "10")
    got = [float(row["log_prob"]) for row in nll("numbers.ckpt", folder)]
    assert got == pytest.approx(right(module, folder, [str(i) for i in range(11)]), rel=1e-4)
    content["f2d2"]["classes"] = ["a", 3]
    torch.save(content, "bad.ckpt")
    assert "a list of different names is expected" in refused_nll(capsys, "bad.ckpt", folder)


def test_checkpoints_that_do_not_say_their_classes(single, capsys):
    """Before names were kept: the order of training, where that is certain or said, and else a question."""
    folder = pictures(single / "train", "2", "10")
    module = classes_kept(single / "two.ckpt", folder, classes=2, names=False)
    assert module.class_names is None
    got = [float(row["log_prob"]) for row in nll("two.ckpt", folder)]
    assert got == pytest.approx(right(module, folder, ["10", "2"]), rel=1e-4)
    assert "warning" not in capsys.readouterr().err
    module = classes_kept(single / "eleven.ckpt", folder, classes=11, names=False)
    said = refused_nll(capsys, "eleven.ckpt", folder)
    assert "order is ambiguous" in said
    got = [float(row["log_prob"]) for row in nll("eleven.ckpt", folder, "--classes", "10,2")]
    assert got == pytest.approx(right(module, folder, ["10", "2"]), rel=1e-4)
    # of ten classes and fewer, text and numbers have one order
    three = pictures(single / "three", "3")
    module = classes_kept(single / "ten.ckpt", folder, classes=10, names=False)
    got = [float(row["log_prob"]) for row in nll("ten.ckpt", three)]
    assert got == pytest.approx(right(module, three, [str(i) for i in range(10)]), rel=1e-4)
    assert "are taken as labels: if that is wrong" in capsys.readouterr().err
    labels, said = guessed_labels(sorted(map(str, range(12))), 12, "a folder")
    assert labels == list(range(12))
    assert "order is ambiguous; taken as text: 0 is 0, 1 is 1, 10 is 2" in said


# --- labels out of range ---


def test_samples_of_a_class(single, capsys):
    module = classes_kept(single / "a.ckpt", pictures(single / "train", "2", "10"))

    def drawn(label, path="a.ckpt"):
        options = ["--ckpt", path, "--trust", __name__, "--device", "cpu", "--num", "3", "--out", "x.npz"]
        sample_command([*options, "--overwrite", "true", f"--label={label}"])
        return np.load("x.npz")

    made = drawn("2")
    with torch.no_grad():
        again = module.sample(torch.from_numpy(made["noise"]), 4, torch.ones(3, dtype=torch.long))
    assert np.allclose(made["x"], again.state, atol=1e-5)
    for label in ("1", "cat", "-1"):
        with pytest.raises(SystemExit):
            drawn(label)
        assert "the model has 10, 2; say one of them" in capsys.readouterr().err
    content = torch.load("a.ckpt", weights_only=True)
    del content["f2d2"]["classes"]
    torch.save(content, "numbers.ckpt")
    assert np.allclose(drawn("1", "numbers.ckpt")["x"], made["x"])
    for label, message in (("11", "the model is for 11 classes, 0 to 10"), ("-1", "-1"), ("cat", "whole numbers")):
        with pytest.raises(SystemExit):
            drawn(label, "numbers.ckpt")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["embedding", "one-hot", "null label"])
def test_labels_that_are_no_classes_are_refused(kind):
    if kind == "embedding":
        module = Picky(3)
    else:
        net = MLP([2], width=8, blocks=1, classes=0 if kind == "one-hot" else 4)
        settings = {"classes": 3} if kind == "one-hot" else {"null_label": 3}
        adapter = f2.adapters.Adapter(
            "net(x, s, t, cond)", noise_time=0.0, data_time=1.0, directions="both", **settings
        )
        module = f2.F2D2Module(adapter(net), [2], head=f2.DivergenceHead(network=MLP([2], width=8, blocks=1)))
    assert class_count(module) == (3 if kind != "null label" else 4)
    check_labels(module, torch.tensor([0, 2]), "x")
    for labels, message in (
        (torch.tensor([0, -1]), "labels -1 to 0"),
        (torch.tensor([0, 4]), "labels 0 to 4.* 0 to"),
        (torch.tensor([0.0, 1.0]), r"type torch.float64.*integers, one a sample"),
        (torch.tensor([[0, 1]]), r"shape \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_labels(module, labels, "x")


# --- likelihoods that cannot be ---


class Sharp(Picky):
    """Its density is by far too high, or NaN where a pixel is bright."""

    def __init__(self, classes: int = 0, shift: float = 1000.0, poison: bool = False) -> None:
        super().__init__(classes)
        self.shift, self.poison = shift, poison

    def log_prob(self, x, *args, **kwargs):
        answer = super().log_prob(x, *args, **kwargs)
        value = answer.value * 0 + self.shift
        if self.poison:
            value = torch.where(x.flatten(1)[:, 0] > 0, torch.nan, value)
        return dataclasses.replace(answer, value=value)

    def sample(self, *args, **kwargs):
        made = super().sample(*args, **kwargs)
        return made if made.log_prob is None else dataclasses.replace(made, log_prob=made.log_prob * 0 + self.shift)


def sharp(path, **settings):
    content = {"state_dict": Sharp().state_dict(), "f2d2": {}, "pytorch-lightning_version": "2.0.0"}
    torch.save(content | {"hyper_parameters": {"_class_path": f"{__name__}.Sharp", **settings}}, path)
    return path


# 16 dimensions of 256 levels on [-1, 1]: 0 bits/dim are 16 log(128) = 77.63 nats
@pytest.mark.parametrize(("shift", "bits"), [(77.0, None), (78.0, "-0.0331"), (1000.0, "-83.16")])
def test_bits_below_zero_are_flagged(single, capsys, shift, bits):
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (8, 1, 4, 4)).astype(np.uint8))
    nll(sharp("a.ckpt", shift=shift), "x.npy")
    said = capsys.readouterr().out
    assert ("warning: bits_per_dim cannot be right" in said) == (bits is not None)
    if bits is not None:
        assert f"mean {bits}" in said
        assert "8 of 8 below 0 bits/dim" in said
        assert "check levels (256), range ([-1, 1]) and dequantization" in said
    sample_command(["--ckpt", "a.ckpt", "--trust", __name__, "--device", "cpu", "--num", "3", "--out", "x.npz"])
    assert ("warning: bits_per_dim cannot be right" in capsys.readouterr().out) == (bits is not None)


def test_more_than_a_percent_below_zero_is_flagged():
    bits = torch.full((200,), 3.0)
    bits[:2] = -0.1
    assert said_of_bits(bits, "bits", Quantization(256)) is None
    bits[2] = -0.1
    assert "3 of 200 below 0" in said_of_bits(bits, "bits", Quantization(256))
    assert said_of_bits(-bits, "bits", None) is None


def test_what_is_not_finite_is_flagged(single, capsys):
    values = np.zeros((8, 1, 4, 4), np.uint8)
    values[:3] = 255
    np.save("x.npy", values)
    rows = nll(sharp("a.ckpt", shift=-3.0, poison=True), "x.npy")
    assert sum(row["log_prob"] == "nan" for row in rows) == 3
    said = capsys.readouterr().out
    assert "warning: log_prob cannot be right: 3 of 8 are NaN or infinite" in said
    assert "did not converge" not in said
    assert "log_prob: -3.0000" in said


def test_figures_of_a_test_that_cannot_be_are_flagged(single, capsys):
    sharp("a.ckpt", shift=200.0)
    values = np.random.default_rng(0).integers(0, 256, (8, 1, 4, 4)).astype(np.uint8)
    for i, value in enumerate(values):
        (single / "set").mkdir(exist_ok=True)
        Image.fromarray(value[0]).save(single / "set" / f"{i}.png")
    data = "{folder: set, size: 4, channels: 1, val: 2, test: 4}"

    def run(command, settings):
        (single / "run.yaml").write_text(
            f"model: {{class_path: {__name__}.Sharp, init_args: {{{settings}}}}}\n"
            f"data: {{class_path: f2d2_lightning.data.ImageFolder, init_args: {data}}}\n"
            "trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}\n"
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            main([command, "--config", "run.yaml", "--ckpt_path", "a.ckpt"])
        return " ".join(str(w.message) for w in caught if "likelihood" in str(w.message))

    for command in ("test", "validate"):
        said = run(command, "shift: 200.0")
        assert "in 1 step is doubtful: 100 % of the samples are below 0 bits/dim, it is -11.03 bits/dim" in said
        assert "below 0" not in run(command, "shift: 20.0")
        assert re.search(r"missing, NaN or infinite, for \d+ % of the samples", run(command, "poison: true"))


class Probed(Picky):
    """With another number of probes."""

    def __init__(self, classes: int = 11, probes: int = 1) -> None:
        super().__init__(classes)
        self.reference = f2.Reference(steps=2, probes=probes)


def test_the_error_of_a_reference_is_a_column(single, capsys):
    module = classes_kept(single / "a.ckpt", pictures(single / "train", "2", "10"))
    x = torch.rand(5, 1, 4, 4) * 2 - 1
    np.savez("x.npz", x=x.numpy(), y=np.array([0, 1, 0, 1, 1]))
    content = torch.load("a.ckpt", weights_only=True)
    rows = {}
    for probes in (0, 3):
        content["hyper_parameters"] |= {"probes": probes, "_class_path": f"{__name__}.Probed"}
        torch.save(content, "probed.ckpt")
        rows[probes] = nll("probed.ckpt", "x.npz", "--reference", "true")
    assert "reference_standard_error" not in rows[0][0]
    answer = f2.Reference(steps=2, probes=3)(module.average.velocity, x, torch.tensor([0, 1, 0, 1, 1]))
    got = [float(row["reference_standard_error"]) for row in rows[3]]
    assert got == pytest.approx(answer.standard_error.tolist(), rel=1e-3)
    rms = float(answer.standard_error.square().mean().sqrt())
    assert f"reference_standard_error: {rms:.4f}"[:-1] in capsys.readouterr().out


# --- data modules of other levels or of another range ---


class Theirs(L.LightningDataModule):
    """Somebody's, which says what its states are."""

    def __init__(self, levels: int = 256, low: float = -1.0, high: float = 1.0, shape: list[int] | None = None) -> None:
        super().__init__()
        self.quantization = Quantization(levels, low, high)
        self.shape = shape

    def test_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(4, 1, 4, 4)), batch_size=2)


class Ranged(f2.data.FlowDataModule):
    """Of this package's kind."""

    shape = (1, 4, 4)

    def __init__(self, levels: int = 256, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(quantization=Quantization(levels, low, high))

    def splits(self):
        values = torch.arange(64).reshape(4, 1, 4, 4) * (self.quantization.levels - 1) // 63
        return dict.fromkeys(("train", "val", "test"), (values, None))


@pytest.mark.parametrize("kind", ["Theirs", "Ranged"])
@pytest.mark.parametrize("other", [{"low": 0.0}, {"levels": 128}, {}])
def test_data_of_other_levels_or_range_are_refused(single, capsys, kind, other):
    sharp("a.ckpt", shift=3.0)
    arguments = ("a.ckpt", f"{__name__}.{kind}", "--data_args", json.dumps(other))
    if not other:
        assert len(nll(*arguments)) == 4
        return
    said = refused_nll(capsys, *arguments)
    assert "levels=256, low=-1.0, high=1.0" in said or "shape (1, 4, 4) and levels 256" in said
    # another shape, before anything is read
    if kind == "Theirs":
        said = refused_nll(capsys, *arguments[:3], json.dumps({"shape": [3, 4, 4]}))
        assert "has shape (3, 4, 4)" in said
