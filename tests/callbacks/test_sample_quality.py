"""Sample quality: distances beside closed forms and torch-fidelity, features, real images, and the callback."""

from __future__ import annotations

import copy
import math
import pickle
import time
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import f2d2_lightning as f2
import launching as strategies
import quality_worker as worker
from f2d2_lightning.adapters import MeanFlow
from f2d2_lightning.callbacks import SampleQuality
from f2d2_lightning.likelihood import state_images
from f2d2_lightning.metrics import SmallFeatures
from f2d2_lightning.metrics import networks as feature_networks
from f2d2_lightning.metrics.distances import frechet_distance, kernel_distance, precision_recall
from f2d2_lightning.metrics.image import FeatureMoments, FeatureStatistics, feature_statistics
from f2d2_lightning.metrics.networks import (
    check_network,
    extract_features,
    inception_features,
    load_network,
    network_hash,
)
from f2d2_lightning.utils.seeding import mix_seed
from foreign import MeanFlowModule
from launching import launch, logs
from lightning_parts import Pair, trainer
from lightning_parts import student as pair_student
from quality_worker import LEVELS, SAMPLES, SHAPE, Pictures, Projection, quality, student, teacher

METHODS = ("plain", "conditional", "sharded", "augmented", "streamed")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def single_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def gaussian(size, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, rank or size, generator=generator)
    return torch.randn(size, generator=generator), root @ root.T


def random_features(count, size, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(count, size, generator=generator) @ mix + shift


def fidelity_fid(a, b):
    from torch_fidelity import metric_fid

    statistics = [metric_fid.fid_features_to_statistics(f.double()) for f in (a, b)]
    return metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]


def fidelity_kid(a, b, size):
    from torch_fidelity import metric_kid

    found = metric_kid.kid_features_to_metric(
        a.double(), b.double(), kid_subsets=100, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]


# --- distances ---


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_frechet_distance_of_gaussians_is_the_closed_form(size):
    (m1, c1), (m2, c2) = gaussian(size, 1), gaussian(size, 2)
    root = scipy.linalg.sqrtm(c1.numpy() @ c2.numpy())
    expected = float((m1 - m2).square().sum()) + np.trace(c1.numpy() + c2.numpy() - 2 * np.real(root))
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_frechet_distance_of_what_commutes_is_in_numbers():
    scales1, scales2, shift = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 1.0, 25.0]), torch.tensor([0.0, 3.0, 1])
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    c1, c2 = (rotation @ torch.diag(s) @ rotation.T for s in (scales1, scales2))
    # (2 - 1)^2 + (3 - 1)^2 + (0 - 5)^2 + 3^2 + 1^2
    assert frechet_distance(torch.zeros(3), c1, shift, c2) == pytest.approx(40, rel=1e-7)
    assert frechet_distance(shift, c1, shift, c1) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_loses_nothing_of_a_deficient_rank():
    mean, covariance = gaussian(60, 5, rank=4)
    assert frechet_distance(mean, covariance, mean, covariance) < 1e-5
    # the part of a second Gaussian that lies across the first counts in full
    across = torch.linalg.svd(covariance).U[:, -1]
    wider = covariance + 9 * torch.outer(across, across)
    assert frechet_distance(mean, covariance, mean, wider) == pytest.approx(9, abs=1e-5)


@pytest.mark.parametrize(("mean", "covariance", "message"), [
    (torch.zeros(2), torch.eye(3), "shapes"),
    (torch.zeros(2, 2), torch.eye(2), "shapes"),
    (torch.zeros(2), torch.full((2, 2), math.nan), "at least 2 samples"),
])  # fmt: skip
def test_frechet_distance_refuses(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(mean, covariance, mean, covariance)


@pytest.mark.parametrize("size", [3, 64])
def test_statistics_of_batches_are_numpys_and_the_distance_torch_fidelitys(size):
    a, b = random_features(301, size, 1), random_features(250, size, 2, scale=1.2, shift=0.5)
    moments = FeatureMoments(size)
    # a mean far from zero costs digits of single precision, not of double
    for part in (a + 1000).split(47):
        moments.update(part)
    found = moments.statistics()
    assert found.count == 301
    assert np.allclose(found.mean.numpy(), (a + 1000).numpy().mean(0), rtol=1e-14)
    assert np.allclose(found.covariance.numpy(), np.cov(a.numpy(), rowvar=False), rtol=1e-7, atol=1e-8)
    statistics = [FeatureMoments(size) for _ in range(2)]
    for metric, features in zip(statistics, (a, b), strict=True):
        metric.update(features)
    distance = statistics[0].statistics().distance(statistics[1].statistics())
    assert distance == pytest.approx(fidelity_fid(a, b), rel=1e-9)


def test_kernel_distance_is_the_unbiased_estimate_and_torch_fidelitys():
    a, b = random_features(9, 4, 1), random_features(9, 4, 2, shift=0.3)

    def kernel(x, y):
        return (sum(x[i] * y[i] for i in range(4)) / 4 + 1) ** 3

    same = sum(kernel(f[i], f[j]) for f in (a, b) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    other = sum(kernel(x, y) for x in a for y in b) / 81
    found = kernel_distance(a, b, subsets=3)
    assert found.mean == pytest.approx(float(same - 2 * other), rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)
    a, b = random_features(60, 4, 1), random_features(70, 4, 2, shift=0.3)
    assert kernel_distance(a, b, size=20) == pytest.approx(fidelity_kid(a, b, 20), rel=1e-9)
    a, b, apart = (random_features(400, 4, seed, scale=0.3, shift=m) for seed, m in ((1, 0), (2, 0), (3, 1)))
    assert kernel_distance(a, apart, 5).mean > 20 * abs(kernel_distance(a, b, 5).mean)


def test_precision_and_recall_by_hand_and_torch_fidelitys():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    line = torch.arange(5.0)[:, None]
    # samples hold together between the first two real images; the real ones further on are not reached
    samples = 0.4 + 0.05 * line
    assert precision_recall(samples, line) == (1.0, 0.0)
    assert precision_recall(line, samples) == (0.0, 1.0)
    assert precision_recall(line + 100, line) == (0.0, 0.0)
    a, b = random_features(90, 3, 1, scale=0.4), random_features(80, 3, 2)
    precision, recall = precision_recall(a, b, chunk=13)
    assert (precision, recall) == pytest.approx(calculate_precision_recall_full(a, b), abs=1e-6)
    assert precision > recall + 0.1
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(a[:3], b)


# --- images ---


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-2.0, 6.0)])
def test_dequantized_states_become_the_images_they_were_made_from(levels, low, high):
    values = torch.arange(levels).repeat(20).reshape(5, 1, 4, -1)
    states = f2.Quantization(levels, low, high).dequantize(values)
    assert torch.equal(state_images(states, levels, low, high).double(), (255 * values.double() / (levels - 1)).round())
    outside = torch.tensor([[[[low - 9, high + 9]]]])
    assert state_images(outside, levels, low, high).flatten().tolist() == [0, 255]


def test_continuous_states_are_scaled_and_clipped():
    states = torch.tensor([[[[-3.0, -1.0, 0.0, 0.5, 1.0, 7.0]]]])
    assert state_images(states).flatten().tolist() == [0, 0, 128, 191, 255, 255]
    assert state_images(states, low=0.0, high=2.0).flatten().tolist() == [0, 0, 0, 64, 128, 255]


@pytest.mark.parametrize(("states", "message"), [
    (torch.zeros(3, 2), "of images"),
    (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), "dtype torch.uint8"),
    (torch.full((3, 1, 2, 2), math.nan), "3 of 3 states"),
])  # fmt: skip
def test_what_is_no_image_is_refused(states, message):
    with pytest.raises(ValueError, match=message):
        state_images(states)


# --- feature networks ---


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (28, 28), (5, 33)])
def test_small_features_of_any_size_come_back_from_a_file(size, tmp_path):
    network = SmallFeatures(classes=4, num_features=7, width=3).eval()
    for value in network.buffers():
        value.add_(torch.rand(value.shape).to(value.dtype))
    path = tmp_path / "deep" / "features.pt"
    network.save(path)
    images = torch.randint(0, 256, (5, 1, *size), dtype=torch.uint8)
    again = SmallFeatures.load(path)
    features = extract_features(network, images, 7)
    assert torch.equal(extract_features(again, images), features)
    assert network_hash(again) == network_hash(network)
    assert again.logits(images).shape == (5, 4)
    # the same image has the same features in any batch
    assert torch.allclose(extract_features(network, images[3:4]), features[3:4], atol=1e-12)
    assert [p.name for p in path.parent.iterdir()] == ["features.pt"]
    with pytest.raises(FileExistsError, match="exists"):
        network.save(path)


def test_small_features_refuse_other_images_and_other_files(tmp_path):
    network = SmallFeatures()
    with pytest.raises(ValueError, match="3 channels"):
        network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(2, 1, 8, 8))
    with pytest.raises(FileNotFoundError, match="train_features"):
        SmallFeatures.load(tmp_path / "none.pt")
    path = tmp_path / "features.pt"
    network.save(path)
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    torch.save(network, tmp_path / "code.pt")
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"sizes": saved["sizes"] | {"width": 4}}, tmp_path / "sizes.pt")
    for name in ("half", "other", "code", "sizes"):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            SmallFeatures.load(tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match="inception"):
        load_network(str(path), weights="inception.pth")


def test_the_hash_of_a_network_sees_weights_buffers_and_structure():
    networks = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), act) for act in (nn.ReLU(), nn.SiLU())]
    hashes = [network_hash(network) for network in networks]
    networks[0][1].running_mean += 1
    hashes.append(network_hash(networks[0]))
    with torch.no_grad():
        networks[0][1].weight += 1
    hashes.append(network_hash(networks[0]))
    assert len(set(hashes)) == 4
    assert network_hash(copy.deepcopy(networks[0])) == hashes[-1]


class Answer(nn.Module):
    """Answers what a function makes of images."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.function(images)


UNFIT = {
    "not a tensor": (lambda x: (x.flatten(1).double(),), "answered a tuple"),
    "axes": (lambda x: x.double(), "one row per image"),
    "rows": (lambda x: x.flatten(1).double()[:1], "one row per image"),
    "integers": (lambda x: x.flatten(1), "floating features"),
    "not finite": (lambda x: x.flatten(1).double() / 0, "NaN or infinity"),
    "changing": (lambda x: x.flatten(1)[:, : 3 + len(x)].double(), "must not depend on the batch"),
    "floats wanted": (lambda x: nn.functional.conv2d(x, torch.ones(1, 1, 2, 2)), "scales them itself"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_network_of_other_answers_is_refused(name):
    function, message = UNFIT[name]
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        check_network(Answer(function), images)


def test_a_network_that_misstates_its_number_of_features_is_refused():
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    assert check_network(Answer(lambda x: x.flatten(1).double(), num_features=16), images) == 16
    with pytest.raises(ValueError, match="num_features=8"):
        check_network(Answer(lambda x: x.flatten(1).double(), num_features=8), images)


def test_features_are_taken_in_evaluation_mode_without_gradients():
    network = nn.Sequential(nn.Flatten(), Answer(lambda x: x.double()), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    network[0].eval()
    images = torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8)
    features = extract_features(network, images)
    assert torch.allclose(features, images.flatten(1).double(), rtol=1e-4)
    assert not features.requires_grad
    assert [m.training for m in network.modules()] == [True, False, True, True, True]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in torch-fidelity's format."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["64"])
    torch.save({name: value.half() for name, value in network.state_dict().items()}, path)
    return path


def test_inception_is_torch_fidelitys_from_a_local_file(inception_file, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    def no_download(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(inception, "load_state_dict_from_url", no_download)
    images = torch.randint(0, 256, (1, 3, 20, 24), dtype=torch.uint8)
    theirs = inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["64", "2048"], feature_extractor_weights_path=str(inception_file)
    )
    ours = load_network("inception", str(inception_file))
    assert (ours.num_features, ours.training) == (2048, False)
    assert torch.equal(extract_features(ours, images), theirs(images)[1])
    small, gray = inception_features(inception_file, 64), images[:, :1]
    theirs.features_list = ["64"]
    assert torch.equal(extract_features(small, gray), theirs(gray.repeat(1, 3, 1, 1))[0])
    assert not torch.equal(extract_features(small, gray), theirs(images)[0])
    with pytest.raises(ValueError, match="2 channels"):
        small(images[:, :2])
    with pytest.raises(ValueError, match="layers of 64"):
        inception_features(inception_file, 100)


def test_weights_that_are_not_inceptions_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "code.pth")
    for name in ("other", "code"):
        with pytest.raises(ValueError, match=f"{name}.pth"):
            inception_features(tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match=r"weights is not given.*curl -LO https://github.com/toshas"):
        inception_features(None)


# --- statistics in files ---


def test_feature_statistics_of_images_and_in_a_file(tmp_path):
    images = torch.randint(0, 256, (45, *SHAPE), dtype=torch.uint8)
    network = Projection()
    found = feature_statistics(network, images, batch_size=8, keep=True)
    expected = network(images).detach()
    assert torch.equal(found.kept(), expected)
    assert np.allclose(found.covariance.numpy(), np.cov(expected.numpy(), rowvar=False), atol=1e-14)
    other = feature_statistics(network, iter(images[:20].split(7)))
    assert found.distance(other) == pytest.approx(fidelity_fid(expected, expected[:20]), rel=1e-9)
    with pytest.raises(ValueError, match="keep=True"):
        other.kept()
    with pytest.raises(ValueError, match="no images"):
        feature_statistics(network, [])
    with pytest.raises(ValueError, match="at least 2"):
        found.distance(feature_statistics(network, images[:1]))
    with pytest.raises(ValueError, match="one feature network"):
        found.distance(feature_statistics(Projection(features=4), images))

    found.save(tmp_path / "real.npz")
    again = FeatureStatistics.load(tmp_path / "real.npz")
    assert again.count == 45
    assert torch.equal(again.mean, found.mean)
    assert torch.equal(again.covariance, found.covariance)
    assert torch.equal(again.kept(), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["real.npz"]
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3), covariance=np.zeros((3, 2)), count=np.array(3))
    np.savez(tmp_path / "code.npz", mean=np.array([{}], dtype=object))
    content = bytearray((tmp_path / "real.npz").read_bytes())
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    content[len(content) // 3] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)
    for name in ("other", "code", "half", "flipped"):
        with pytest.raises(ValueError, match=f"{name}.npz"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


def test_one_feature_is_enough():
    """torchmetrics drops axes of length one."""
    values = torch.randn(10, 1)
    moments = FeatureMoments(1)
    moments.update(values, keep=1)
    found = moments.statistics()
    assert (found.mean.shape, found.covariance.shape, found.kept().shape) == ((1,), (1, 1), (1, 1))
    assert float(found.covariance) == pytest.approx(float(values.var()))


# --- the callback ---


def images_of(callback, module, steps, cond=None):
    """What the callback should draw, by another route."""
    generators = [torch.Generator() for _ in range(SAMPLES)]
    for i, generator in enumerate(generators):
        generator.manual_seed(mix_seed("sample quality", callback.seed, i))
    noise = torch.stack([torch.randn(*SHAPE, generator=g, dtype=torch.float32) for g in generators])
    with torch.no_grad():
        states = module.sample(noise.to(torch.get_default_dtype()), steps, cond).state
    level = ((states.double() + 1) / 2 * LEVELS).floor().clamp(0, LEVELS - 1)
    return (level * 255 / (LEVELS - 1)).round().to(torch.uint8)


def real_images(data, split="train"):
    values = data.dataset(split).values
    return (values.double() * 255 / (LEVELS - 1)).round().to(torch.uint8)


@pytest.mark.parametrize("labels", [False, True])
def test_a_students_figures_are_torch_fidelitys_on_its_samples(tmp_path, labels):
    module, data = student(classes=3 if labels else 0), Pictures(labels=labels)
    callback = quality(tmp_path, kid=True, precision_recall=True)
    made = trainer(tmp_path, callbacks=[callback])
    made.test(module, datamodule=data, verbose=False)
    network = Projection()
    real = network(real_images(data)).detach()
    # all real images decide the FID; as many as samples, in a fixed random order, decide the rest
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    kept = callback.real.kept()
    assert torch.allclose(kept, real[order[:SAMPLES]], rtol=1e-12)
    cond = data.dataset("train").labels[order[:SAMPLES]] if labels else None
    for k in worker.STEPS:
        features = network(images_of(callback, module, k, cond)).detach()
        found = callback.results[k]
        assert found["fid"] == pytest.approx(fidelity_fid(features, real), rel=1e-9)
        assert (found["kid"], found["kid_std"]) == pytest.approx(fidelity_kid(features, kept, SAMPLES), rel=1e-8)
        assert (found["precision"], found["recall"]) == pytest.approx(precision_recall(features, kept))
        for name, value in found.items():
            assert float(made.callback_metrics[f"test/{name}_{k}"]) == pytest.approx(value, rel=1e-6)
    if labels:
        wrong = network(images_of(callback, module, 1, cond.roll(1))).detach()
        assert abs(fidelity_fid(wrong, real) - callback.results[1]["fid"]) > 1e-6


def test_a_teachers_flow_is_integrated_in_as_many_steps(tmp_path):
    module = teacher()
    callback = quality(tmp_path, steps=(2,), method="midpoint")
    trainer(tmp_path, callbacks=[callback]).test(module, datamodule=Pictures(), verbose=False)
    noise = callback.noise(range(SAMPLES), SHAPE).double()
    with torch.no_grad():
        for step in range(2):
            half = noise + 0.25 * module(noise, step / 2)
            noise = noise + 0.5 * module(half, step / 2 + 0.25)
    network = Projection()
    drawn = feature_statistics(network, state_images(noise, LEVELS))
    expected = drawn.distance(feature_statistics(network, real_images(Pictures())))
    assert callback.results[2]["fid"] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="fixed steps"):
        trainer(tmp_path, callbacks=[quality(tmp_path, method="dopri5")]).test(module, datamodule=Pictures())


class Foreign(MeanFlowModule):
    """Somebody else's module on images, with a source of randomness of its own."""

    def __init__(self, **kwargs):
        super().__init__(dim=36, dropout=0.2, **kwargs)

    def loss(self, batch):
        return super().loss(batch.flatten(1))


def foreign_callback(**kwargs):
    settings = {
        "objective": f2.TrajectoryRegression(nodes=4, capacity=32, refresh=8.0, chunk=16),
        "reference_samples": 0,
        "steps": (1,),
        "levels": LEVELS,
    }
    return f2.F2D2Callback("net", MeanFlow(directions="both"), **(settings | kwargs))


class Plain(Pictures):
    """Loaders without this package's order: shuffled by the global random state."""

    def train_dataloader(self):
        return DataLoader(self.dataset("train").__getitems__(list(range(self.count))), batch_size=32, shuffle=True)


@pytest.mark.usefixtures("single_precision")
def test_training_is_the_same_with_it_to_the_bit_and_checkpoints_hold_nothing_of_it(tmp_path):
    def run(*callbacks):
        torch.manual_seed(5)
        own, module = foreign_callback(), Foreign()
        made = trainer(tmp_path, callbacks=[own, *callbacks], num_sanity_val_steps=1)
        made.fit(module, datamodule=Plain())
        return made, module, own, torch.rand(3)

    callback = quality(tmp_path, batch_size=SAMPLES, every_n_epochs=2)
    made, module, own, after = run(callback)
    before, plain, plain_own, plain_after = run()
    assert all(torch.equal(a, b) for a, b in zip(own.added.live.parameters(), plain_own.added.live.parameters()))
    state, expected = module.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(after, plain_after)

    features = Projection()(images_of(callback, own, 3)).detach()
    real = Projection()(real_images(Plain())).detach()
    assert callback.results[3]["fid"] == pytest.approx(fidelity_fid(features, real), rel=1e-6)
    assert made.callback_metrics["val/fid_3"].item() == pytest.approx(callback.results[3]["fid"], rel=1e-6)

    for one, name in ((made, "with"), (before, "without")):
        one.save_checkpoint(tmp_path / f"{name}.ckpt")
    saved, other = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("with", "without"))
    assert saved["state_dict"].keys() == other["state_dict"].keys()
    assert saved["callbacks"].keys() == other["callbacks"].keys()
    assert callback.state_dict() == {}
    assert (tmp_path / "with.ckpt").stat().st_size == pytest.approx((tmp_path / "without.ckpt").stat().st_size, abs=500)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.results == callback.results
        assert torch.equal(copied.network.weight, callback.network.weight)


@pytest.mark.usefixtures("single_precision")
def test_epochs_noise_and_runs_without_validation(tmp_path):
    class Epochs(SampleQuality):
        seen = ()

        def _evaluate(self, trainer, pl_module, stage):
            super()._evaluate(trainer, pl_module, stage)
            self.seen = (*self.seen, (stage, trainer.current_epoch))

    for options, data in (({}, "val"), ({"limit_val_batches": 0}, "test")):
        callback = Epochs(Projection(), steps=(1,), samples=8, every_n_epochs=2, data=data, cache=str(tmp_path))
        made = trainer(tmp_path, callbacks=[callback], max_epochs=5, **options)
        made.fit(teacher(), datamodule=Pictures())
        assert callback.seen == (("val", 1), ("val", 3))
        assert "val/fid_1" in made.callback_metrics
        expected = feature_statistics(Projection(), real_images(Pictures(), data))
        assert torch.allclose(callback.real.covariance, expected.covariance, rtol=1e-9)
    made.validate(teacher(), datamodule=Pictures(), verbose=False)
    assert callback.seen[2:] == ((("val", 5),) if options == {} else ())
    # a sample's noise depends on its number and the seed alone
    noise = callback.noise(range(8), SHAPE)
    assert torch.equal(callback.noise([5], SHAPE)[0], noise[5])
    assert not torch.equal(quality(tmp_path, seed=1).noise([5], SHAPE)[0], noise[5])
    assert float(callback.noise(range(400), SHAPE).std()) == pytest.approx(1, abs=0.02)


@pytest.mark.usefixtures("single_precision")
def test_missing_weights_are_told_before_the_first_step(tmp_path):
    callback = SampleQuality("inception", weights=str(tmp_path / "none.pth"))
    made = trainer(tmp_path, callbacks=[callback])
    with pytest.raises(FileNotFoundError, match=feature_networks.INCEPTION_FILE) as raised:
        made.fit(student(), datamodule=Pictures())
    assert all(part in str(raised.value) for part in ("none.pth", feature_networks.INCEPTION_URL, "of your own"))
    assert made.global_step == 0
    with pytest.raises(FileNotFoundError, match="no feature network"):
        trainer(tmp_path, callbacks=[SampleQuality(str(tmp_path / "none.pt"))]).fit(student(), datamodule=Pictures())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Pictures(labels=True).dataset("train").__getitems__(list(range(91)))[0].split(1))


REFUSED = {
    "vectors": (lambda: pair_student(), Pair, {}, "images"),
    "answers": (student, Pictures, {"features": Answer(lambda x: x.double())}, "one row per image"),
    "nothing": (Foreign, Pictures, {}, "draws no samples"),
    "no data": (student, lambda: Pictures(count=1), {}, "1 real images"),
    "channels": (student, Pictures, {"features": SmallFeatures(channels=3)}, "1 channels"),
    "name": (student, Pictures, {"flow_map": "other"}, "draws no samples"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("single_precision")
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, name):
    module, data, options, message = REFUSED[name]
    made = trainer(tmp_path, callbacks=[quality(tmp_path, **options)])
    with pytest.raises(ValueError, match=message):
        made.fit(module(), datamodule=data())
    assert made.global_step == 0


@pytest.mark.usefixtures("single_precision")
def test_somebody_elses_vectors_are_refused_before_the_first_step(tmp_path):
    made = trainer(tmp_path, callbacks=[quality(tmp_path), foreign_callback(levels=None)])
    with pytest.raises(ValueError, match="of images"):
        made.fit(MeanFlowModule(), datamodule=Pair())
    assert made.global_step == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"samples": 1}, "at least 2"),
    ({"samples": 3, "precision_recall": True}, "at least 4"),
    ({"real_samples": 1}, "at least 2"),
    ({"steps": (0, 1)}, "at least 1"),
    ({"steps": ()}, "at least 1"),
    ({"every_n_epochs": 0}, "at least 1"),
    ({"data": "training"}, "train, val, test"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SampleQuality(Projection(), **options)


def test_samples_that_are_not_finite_are_told_with_their_step_count(tmp_path):
    module = student()
    noise = quality(tmp_path).noise(range(SAMPLES), SHAPE).flatten(1)[:, 0]
    module.spoiled = (0, float(noise.sort().values[-4]))
    with pytest.raises(ValueError, match="3 of 45 samples in 1 step hold NaN"):
        trainer(tmp_path, callbacks=[quality(tmp_path)]).test(module, datamodule=Pictures(), verbose=False)


def test_too_few_samples_for_the_features_are_told_once(tmp_path):
    made = trainer(tmp_path, callbacks=[quality(tmp_path, samples=5)])
    with pytest.warns(UserWarning, match="deficient rank"):
        made.test(student(), datamodule=Pictures(), verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*deficient rank.*")
        made.test(student(), datamodule=Pictures(), verbose=False)


def test_streams_are_compared_with_as_many_images_as_asked_for(tmp_path):
    class Streamed(Pictures):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=None)

    callback = quality(tmp_path, samples=20, real_samples=40)
    trainer(tmp_path, callbacks=[callback]).test(student(), datamodule=Streamed(), verbose=False)
    expected = feature_statistics(Projection(), real_images(Pictures())[:40])
    assert callback.real.count == 40
    assert torch.allclose(callback.real.covariance, expected.covariance, rtol=1e-9)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_figures_do_not_hang_on_batches_and_workers(tmp_path, workers, batch_size):
    """What is random in an image is of the image, whoever loads it beside which others."""

    def measured(workers, batch_size):
        callback = quality(tmp_path / f"{workers} {batch_size}", samples=20, kid=True, batch_size=batch_size)
        data = worker.Transformed(workers)
        trainer(tmp_path, callbacks=[callback]).test(student(), datamodule=data, verbose=False)
        return callback.real, callback.results

    (real, figures), (other, others) = measured(0, 16), measured(workers, batch_size)
    assert torch.allclose(real.features, other.features, atol=1e-12)
    assert torch.allclose(real.covariance, other.covariance, atol=1e-12)
    assert strategies.difference(figures, others) < 1e-8


class Counting(Projection):
    """Counts images."""

    seen = 0
    scale = 1.0

    def forward(self, images):
        self.seen += len(images)
        return self.scale * super().forward(images)


def test_statistics_are_kept_by_content(tmp_path, recwarn):
    def run(module=None, **options):
        network = options.pop("features", Counting())
        callback = quality(tmp_path, features=network, samples=8, steps=(1,), **options)
        trainer(tmp_path, callbacks=[callback]).test(student(), datamodule=module or Pictures(), verbose=False)
        return callback.real, network.seen

    folder = tmp_path / "cache"
    first, full = run()
    (path,) = folder.iterdir()
    second, fewer = run()
    assert full - fewer == 91
    assert torch.equal(first.covariance, second.covariance)
    # another noise of dequantization is no other data; fewer or other images are
    assert run(Pictures(seed=3))[1] == fewer
    for data, options in (
        (Pictures(90), {}),
        (None, {"real_samples": 50}),
        (None, {"kid": True}),
        (None, {"data": "val"}),
    ):
        count = len(list(folder.iterdir()))
        run(data, **options)
        assert len(list(folder.iterdir())) == count + 1
    assert len(run(kid=True)[0].kept()) == 8
    other = Counting()
    with torch.no_grad():
        other.weight.mul_(1.01)
    assert run(features=other)[1] == full
    assert not [w for w in recwarn if "again" in str(w.message)]

    changed = Counting()
    changed.scale = 1.1  # what neither weights nor structure tell
    with pytest.warns(UserWarning, match="code has changed"):
        third, count = run(features=changed)
    assert count == full
    assert torch.allclose(third.mean, 1.1 * first.mean)
    run()  # writes its own over it
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="damaged.*computed again"):
        fourth, count = run()
    assert count == full
    assert torch.equal(fourth.covariance, first.covariance)
    assert run()[1] == fewer


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    callback = quality(tmp_path, samples=8)
    made = trainer(tmp_path, callbacks=[callback])
    with pytest.warns(UserWarning, match="choose another folder"):
        made.test(student(), datamodule=Pictures(), verbose=False)
    assert callback.results[1]["fid"] > 0


@pytest.mark.usefixtures("single_precision")
def test_a_configuration_builds_it(tmp_path, monkeypatch):
    from f2d2_lightning.cli import F2D2CLI

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.chdir(tmp_path)
    SmallFeatures(num_features=6, width=2).save("features.pt")
    config = tmp_path / "run.yaml"
    config.write_text("""
model:
  class_path: f2d2_lightning.FlowMatchingModule
  init_args:
    shape: [1, 6, 6]
    levels: 17
    flow_map: {class_path: f2d2_lightning.nn.MLP, init_args: {shape: [1, 6, 6], width: 8, blocks: 1}}
data: {class_path: quality_worker.Pictures}
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: f2d2_lightning.callbacks.SampleQuality
      init_args: {features: features.pt, steps: [1, 4], samples: 20, kid: true}
    - class_path: f2d2_lightning.callbacks.SampleQuality
      init_args:
        features: {class_path: quality_worker.Projection, init_args: {features: 3}}
        samples: 10
        steps: [2]
""")
    made = F2D2CLI(args=["fit", "--config", str(config)]).trainer
    logged = {name for name in made.callback_metrics if name.startswith(("val/fid", "val/kid"))}
    assert logged == {"val/fid_1", "val/fid_4", "val/kid_1", "val/kid_4", "val/kid_std_1", "val/kid_std_4", "val/fid_2"}
    assert list((tmp_path / "home" / "f2d2_lightning" / "feature_statistics").iterdir())


# --- two processes ---


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("quality")
    processes = launch(worker.__file__, folder, 2)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = {"1-0": {name: case(folder) for name, case in worker.cases(1).items()}}
        end = time.monotonic() + 300
        for process in processes:
            process.wait(timeout=max(1, end - time.monotonic()))
    finally:
        torch.set_default_dtype(default)
        for process in processes:
            process.kill()
    for name in ("2-0", "2-1"):
        assert (folder / f"{name}.pt").exists(), logs(folder)
        found[name] = torch.load(folder / f"{name}.pt", weights_only=False)
    return found


@pytest.mark.parametrize("case", METHODS)
def test_two_processes_give_the_figures_of_one(results, case):
    """45 samples and 91 images do not divide by two; with 5 samples the second process has less to do."""
    first, second = (strategies.get(results, f"2-{rank}", case) for rank in (0, 1))
    alone = strategies.get(results, "1-0", case)
    assert strategies.difference(first["results"], second["results"]) == 0
    assert strategies.difference(first["logged"], second["logged"]) == 0
    assert len(first["logged"]) == 2 * len(worker.FIGURES) + 2
    assert strategies.difference(first["results"], alone["results"]) < 1e-8
    for one, two in zip(alone["real"], first["real"], strict=True):
        assert float((one - two).abs().max()) < 1e-12


def test_one_sample_of_one_process_is_refused_by_both(results):
    told = {strategies.get(results, name, "spoiled")["refused"] for name in ("1-0", "2-0", "2-1")}
    assert len(told) == 1
    assert "1 of 45 samples in 1 step hold NaN" in told.pop()
