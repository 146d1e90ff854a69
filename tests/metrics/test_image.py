"""Images and their features: states as images, feature networks, distances beside closed forms and torch-fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import f2d2_lightning as f2
from f2d2_lightning.likelihood import state_images
from f2d2_lightning.metrics import InceptionFeatures, SmallFeatures
from f2d2_lightning.metrics._cache import StatisticsCache
from f2d2_lightning.metrics.image import ImageDistance, precision_recall
from f2d2_lightning.metrics.networks import check_network, extract_features, load_network
from f2d2_lightning.utils.fingerprints import fingerprint
from quality_worker import Answer, fidelity_fid, fidelity_kid


def random_features(count, size, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(count, size, generator=generator) @ mix + shift


def distance(real, fake, batch=47, **options):
    """Of two sets of features, a batch at a time."""
    metric = ImageDistance(real.shape[1], **options)
    for features, kind in ((real, True), (fake, False)):
        for part in features.split(batch):
            metric.update(part, real=kind)
    return metric.compute()


# --- distances ---


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_frechet_distance_is_the_closed_form_and_torch_fidelitys(size):
    # a mean far from zero costs digits of single precision, not of double
    real, fake = random_features(301, size, 1) + 1000, random_features(250, size, 2, 1.2, 1000.5)
    (m1, c1), (m2, c2) = ((f.numpy().mean(0), np.atleast_2d(np.cov(f.numpy(), rowvar=False))) for f in (real, fake))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(scipy.linalg.sqrtm(c1 @ c2)))
    found = distance(real, fake)
    assert found.keys() == {"fid"}
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert distance(fake, real)["fid"] == pytest.approx(expected, rel=1e-6)
    if size > 1:
        real, fake = real - 1000, fake - 1000
        assert distance(real, fake)["fid"] == pytest.approx(fidelity_fid(real, fake), rel=1e-8)


def test_the_frechet_distance_of_a_deficient_rank():
    """Fewer images than features; the root of rounded zeros costs some digits, far fewer than so few images do."""
    real, fake = random_features(30, 60, 1), random_features(40, 60, 2)
    centered = [(f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (real, fake)]
    overlap = torch.linalg.svdvals(centered[0] @ centered[1].T).sum()
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    expected = shift + centered[0].square().sum() + centered[1].square().sum() - 2 * overlap
    assert distance(real, fake)["fid"] == pytest.approx(float(expected), rel=1e-6)
    assert 0 <= distance(real, real)["fid"] < 1e-4


def test_features_that_are_nan_are_at_no_distance():
    real = random_features(20, 3, 0)
    assert math.isnan(distance(real, torch.full((20, 3), math.nan))["fid"])
    assert distance(real, real)["fid"] >= 0


def test_real_features_are_taken_over_and_samples_forgotten():
    real, fake, other = (random_features(60, 5, seed) for seed in (1, 2, 3))
    first, options = ImageDistance(5, kid=True), {"kid": True, "precision_recall": True}
    first.update(real, real=True, keep=50)
    second = ImageDistance(5, **options)
    second.real = first.real
    second.update(other, real=False)
    before = second.compute()
    second.reset()
    second.update(fake, real=False)
    found = second.compute()
    assert found["fid"] == pytest.approx(distance(real, fake)["fid"], rel=1e-12) != before["fid"]
    assert [found[name] for name in ("kid", "kid_std", "recall")] == pytest.approx(
        [distance(real[:50], fake, **options)[name] for name in ("kid", "kid_std", "recall")]
    )
    with pytest.raises(RuntimeError, match="More than one sample"):
        distance(real[:1], fake)


def test_the_kernel_distance_is_the_unbiased_estimate_and_torch_fidelitys():
    a, b = random_features(9, 4, 1), random_features(9, 4, 2, shift=0.3)

    def kernel(x, y):
        return (sum(x[i] * y[i] for i in range(4)) / 4 + 1) ** 3

    same = sum(kernel(f[i], f[j]) for f in (a, b) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    other = sum(kernel(x, y) for x in a for y in b) / 81
    torch.manual_seed(3)
    found, after = distance(a, b, kid=True), torch.rand(1)
    assert found["kid"] == pytest.approx(float(same - 2 * other), rel=1e-12)
    assert found["kid_std"] == pytest.approx(0, abs=1e-12)
    assert found["kid"] == pytest.approx(fidelity_kid(a, b, 9)[0], rel=1e-9)
    # subsets are the same every time, and nobody else's random numbers
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    a, b = random_features(60, 4, 1), random_features(70, 4, 2, shift=0.3)
    assert distance(a, b, kid=True) == distance(a, b, kid=True)
    mean, std = fidelity_kid(a, b, 60)
    assert distance(a, b, kid=True)["kid"] == pytest.approx(mean, abs=std)


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


def test_a_file_of_statistics_is_read_or_made_again(tmp_path):
    cache, probe = StatisticsCache(tmp_path / "deep"), random_features(3, 4, 9)
    metric = ImageDistance(4, kid=True)
    metric.update(random_features(45, 4, 1), real=True, keep=20)
    cache.write("key", metric.real, probe)
    path = cache.path("key")
    assert all(torch.equal(a, b) for a, b in zip(cache.read("key", probe), metric.real, strict=True))
    assert [p.name for p in path.parent.iterdir()] == ["key.npz"]
    assert cache.read("another", probe) is None
    content = bytearray(path.read_bytes())
    half, flipped = content[: len(content) // 2], bytes(content).replace(b"kept.npy", b"kepr.npy")
    for spoiled in (half, flipped):
        path.write_bytes(spoiled)
        with pytest.warns(UserWarning, match=f"{path.name}.*computed again"):
            assert cache.read("key", probe) is None
    np.savez(path, total=np.array([{}], dtype=object))
    with pytest.warns(UserWarning, match="computed again"):
        assert cache.read("key", probe) is None


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
    assert fingerprint(again) == fingerprint(network)
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


UNFIT = {
    "not a tensor": (lambda x: (x.flatten(1).double(),), "answered a .*tuple.*floating features"),
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
    small, gray = InceptionFeatures(inception_file, 64), images[:, :1]
    theirs.features_list = ["64"]
    assert torch.equal(extract_features(small, gray), theirs(gray.repeat(1, 3, 1, 1))[0])
    assert not torch.equal(extract_features(small, gray), theirs(images)[0])
    with pytest.raises(ValueError, match="2 channels"):
        small(images[:, :2])
    with pytest.raises(ValueError, match="layers of 64"):
        InceptionFeatures(inception_file, 100)


def test_weights_that_are_not_inceptions_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "code.pth")
    for name in ("other", "code"):
        with pytest.raises(ValueError, match=f"{name}.pth"):
            InceptionFeatures(tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match=r"weights is not given.*curl -LO https://github.com/toshas"):
        InceptionFeatures(None)
