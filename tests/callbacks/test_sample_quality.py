"""Sample quality as a callback: its figures beside torch-fidelity's, real images, their cache, two processes."""

from __future__ import annotations

import pickle
import warnings

import lightning as L
import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

import f2d2_lightning as f2
import launching as strategies
import quality_worker as worker
from f2d2_lightning.adapters import MeanFlow
from f2d2_lightning.callbacks import SampleQuality
from f2d2_lightning.cli import F2D2CLI
from f2d2_lightning.likelihood import state_images
from f2d2_lightning.metrics import SmallFeatures
from f2d2_lightning.metrics.image import ImageDistance, precision_recall
from f2d2_lightning.metrics.networks import INCEPTION_FILE, INCEPTION_URL
from foreign import MeanFlowModule, of_pytorch_lightning
from launching import ended, launch, logs
from lightning_parts import Pair, fit, trainer
from lightning_parts import student as pair_student
from quality_worker import (
    LEVELS,
    SAMPLES,
    SHAPE,
    Answer,
    Pictures,
    Projection,
    fidelity_fid,
    fidelity_kid,
    quality,
    student,
    teacher,
)

METHODS = ("plain", "conditional", "sharded", "augmented", "streamed")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def single_precision():
    torch.set_default_dtype(torch.float32)


def sums(images):
    """What should be known of real images."""
    metric = ImageDistance(Projection.num_features)
    metric.update(Projection()(images), real=True)
    return metric.real


def images_of(callback, module, steps, cond=None):
    """What the callback should draw, by another route."""
    noise = callback.noise(range(SAMPLES), SHAPE)
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
    kept = callback.real[3]
    assert torch.allclose(kept, real[order[:SAMPLES]], rtol=1e-12)
    cond = data.dataset("train").labels[order[:SAMPLES]] if labels else None
    for k in worker.STEPS:
        features = network(images_of(callback, module, k, cond)).detach()
        found = callback.results[k]
        assert found["fid"] == pytest.approx(fidelity_fid(features, real), rel=1e-8)
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
    drawn, real = network(state_images(noise, LEVELS)).detach(), network(real_images(Pictures())).detach()
    expected = fidelity_fid(drawn, real)
    assert callback.results[2]["fid"] == pytest.approx(expected, rel=1e-8)
    with pytest.raises(ValueError, match="fixed steps"):
        trainer(tmp_path, callbacks=[quality(tmp_path, method="dopri5")]).test(module, datamodule=Pictures())


class OnImages:
    """Somebody else's module, on images and with a source of randomness of its own."""

    def __init__(self, **kwargs):
        super().__init__(dim=36, dropout=0.2, **kwargs)

    def loss(self, batch):
        return super().loss(batch.flatten(1))


class Foreign(OnImages, MeanFlowModule):
    """Of lightning."""


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
        made = fit(tmp_path, module, own, *callbacks, data=Plain(), num_sanity_val_steps=1, max_epochs=2)
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
    copied = pickle.loads(pickle.dumps(callback))
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
        made = fit(tmp_path, teacher(), callback, data=Pictures(), max_epochs=5, **options)
        assert callback.seen == (("val", 1), ("val", 3))
        assert "val/fid_1" in made.callback_metrics
        assert torch.allclose(callback.real[1], sums(real_images(Pictures(), data))[1], rtol=1e-9)
    made.validate(teacher(), datamodule=Pictures(), verbose=False)
    assert callback.seen[2:] == ((("val", 5),) if options == {} else ())
    # a sample's noise depends on its number and the seed alone
    noise = callback.noise(range(8), SHAPE)
    assert torch.equal(callback.noise([5], SHAPE)[0], noise[5])
    assert not torch.equal(quality(tmp_path, seed=1).noise([5], SHAPE)[0], noise[5])
    assert float(callback.noise(range(400), SHAPE).std()) == pytest.approx(1, abs=0.02)


@pytest.mark.usefixtures("single_precision")
def test_trainers_of_pytorch_lightning_get_the_same_figures(tmp_path):
    found = []
    other = type("Other", (OnImages, of_pytorch_lightning().MeanFlowModule), {})
    for library, module in ((L, Foreign), (pytorch_lightning, other)):
        torch.manual_seed(0)
        loader, callbacks = Plain().train_dataloader(), [foreign_callback(), quality(tmp_path, steps=(1,))]
        run = library.Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path, accelerator="cpu")
        run.fit(module(), loader, loader)
        found.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert "val/fid_1" in found[0]
    assert found[0] == found[1]


@pytest.mark.usefixtures("single_precision")
def test_missing_weights_are_told_before_the_first_step(tmp_path):
    callback = SampleQuality("inception", weights=str(tmp_path / "none.pth"))
    made = trainer(tmp_path, callbacks=[callback])
    with pytest.raises(FileNotFoundError, match=INCEPTION_FILE) as raised:
        made.fit(student(), datamodule=Pictures())
    assert all(part in str(raised.value) for part in ("none.pth", INCEPTION_URL, "of your own"))
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
    with pytest.raises(ValueError, match="of images"):
        fit(tmp_path, MeanFlowModule(), quality(tmp_path), foreign_callback(levels=None))


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


def test_two_that_would_log_under_the_same_names_are_refused(tmp_path):
    made = trainer(tmp_path, callbacks=[quality(tmp_path), quality(tmp_path, steps=(2, 3))])
    with pytest.raises(ValueError, match=r"two SampleQuality callbacks would log steps=\[3\] under the same names"):
        made.test(student(), datamodule=Pictures(), verbose=False)


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
    assert callback.real[2] == 40
    assert torch.allclose(callback.real[1], sums(real_images(Pictures())[:40])[1], rtol=1e-9)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 5), (2, 64)])
def test_figures_do_not_hang_on_batches_and_workers(tmp_path, workers, batch_size):
    """What is random in an image is of the image, whoever loads it beside which others."""

    def measured(workers, batch_size):
        callback = quality(tmp_path / f"{workers} {batch_size}", samples=20, kid=True, batch_size=batch_size)
        data = worker.Transformed(workers)
        trainer(tmp_path, callbacks=[callback]).test(student(), datamodule=data, verbose=False)
        return callback.real, callback.results

    (real, figures), (other, others) = measured(0, 16), measured(workers, batch_size)
    assert all(torch.allclose(one, two, atol=1e-12) for one, two in zip(real, other, strict=True))
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
    second, fewer = run()
    assert full - fewer == 91
    assert torch.equal(first[1], second[1])
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
    assert len(run(kid=True)[0][3]) == 8
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
    assert torch.allclose(third[0], 1.1 * first[0])


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    callback = quality(tmp_path, samples=8)
    made = trainer(tmp_path, callbacks=[callback])
    with pytest.warns(UserWarning, match="choose another folder"):
        made.test(student(), datamodule=Pictures(), verbose=False)
    assert callback.results[1]["fid"] > 0


@pytest.mark.usefixtures("single_precision")
def test_a_configuration_builds_it(tmp_path, monkeypatch):
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
    finally:
        torch.set_default_dtype(default)
        ended(processes, 300)
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
