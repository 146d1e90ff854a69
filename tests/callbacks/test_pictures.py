"""Pictures of a run: on disk and in the loggers, of any model here, and without a trace in the training.

python tests/test_pictures.py FOLDER      (what each of two processes does, in test_two_processes)
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from matplotlib.image import imread

import f2d2_lightning as f2
from f2d2_lightning.callbacks import Pictures
from f2d2_lightning.callbacks._gallery import Gallery, Points
from f2d2_lightning.callbacks._models import find_models
from f2d2_lightning.callbacks.pictures import figure_sender
from f2d2_lightning.nn import MLP
from f2d2_lightning.plots import sample_figure
from f2d2_lightning.training.folders import unused
from foreign import MeanFlowModule, callback
from launching import WITH_FSDP2, ended, launch, logs
from lightning_parts import Pair, fit, same, student, teacher, trainer

IMAGE = {"samples.png", "calibration.png", "nll_steps.png", "ranked.png"}
PLANE = {"samples.png", "calibration.png", "nll_steps.png", "density.png"}
QUICK = {"samples": 4, "images": 12, "teacher_steps": 2, "grid": 6}


@pytest.fixture(autouse=True)
def small_and_single_precision(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("f2d2_lightning.plots._figure.DPI", 40)


class Images(f2.data.FlowDataModule):
    """Small images of four grey levels, with their brightness as label."""

    shape = (1, 4, 4)

    def __init__(self, labels=False, batch_size=16, **kwargs):
        super().__init__(batch_size, eval_batch_size=16, quantization=f2.Quantization(4), **kwargs)
        self.with_labels = labels

    def splits(self):
        generator = torch.Generator().manual_seed(0)

        def draw(count):
            kinds = torch.randint(3, (count,), generator=generator)
            values = (torch.randint(2, (count, 1, 4, 4), generator=generator) + kinds[:, None, None, None]).clamp(max=3)
            return values, kinds if self.with_labels else None

        return {"train": draw(48), "val": draw(40), "test": draw(20)}


def image_teacher(classes=0):
    torch.manual_seed(1)
    net = MLP((1, 4, 4), width=16, blocks=1, classes=classes)
    return f2.FlowMatchingModule(net, shape=(1, 4, 4), levels=4, warmup=2)


def image_student(classes=0, **kwargs):
    return quick_student(image_teacher(classes), **kwargs)


def quick_student(of=None, **kwargs):
    """A student whose steps cost little."""
    return student(of, **({"steps": (1, 2), "objective": f2.objectives.Semigroup()} | kwargs))


@torch.no_grad()
def shaken(module):
    """A module whose networks say something: fresh ones answer zero."""
    torch.manual_seed(3)
    for network in (module.average, *([module.teacher.average] if isinstance(module, f2.F2D2Module) else [])):
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def written(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*.png"))}


class Quiet(Logger):
    """A logger of figures alone."""

    name, version, save_dir, run_id = "stand-in", "0", None, "run-7"

    def __init__(self, experiment=None):
        super().__init__()
        self.experiment, self.calls = experiment, []

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


class ImageLogger(Quiet):
    """Takes images as Lightning's WandbLogger does, which hands them on to ``wandb.Image``."""

    def log_image(self, key, images, step=None, **kwargs):
        (image,) = images
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
        self.calls.append((key, image, step))


class MlflowClient:
    def __init__(self):
        self.calls = []

    def log_figure(self, run_id, figure, artifact_file, *, save_kwargs=None):
        self.calls.append((run_id, figure, artifact_file))


class CometExperiment:
    def __init__(self):
        self.calls = []

    def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None):
        self.calls.append((figure_name, figure, step))


# --- loggers ---


def test_figures_reach_mlflow_and_comet(tmp_path):
    figure = sample_figure({"1 step": torch.zeros(1, 1, 4, 4)})
    client, experiment = MlflowClient(), CometExperiment()
    figure_sender(Quiet(client))("val/samples", figure, 5)
    assert client.calls == [("run-7", figure, "pictures/val/samples/step_00000005.png")]
    figure_sender(Quiet(experiment))("val/samples", figure, 5)
    assert experiment.calls == [("val/samples", figure, 5)]
    for other in (CSVLogger(tmp_path), Quiet(object()), Quiet(None)):
        assert figure_sender(other) is None


def test_two_epochs_reach_disk_and_loggers(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images, board = ImageLogger(), TensorBoardLogger(tmp_path / "board")
    loggers = [CSVLogger(tmp_path / "csv", name="run", version="a"), board, images]
    run = trainer(tmp_path, callbacks=[Pictures(**QUICK)], logger=loggers)
    module = student(image_teacher(), steps=(1, 2))
    run.fit(module, datamodule=Images())
    files = written(tmp_path / "csv/run/a/pictures")
    assert set(files) == {f"epoch_000{e}/{name}" for e in (0, 1) for name in IMAGE}
    assert files["epoch_0000/samples.png"] != files["epoch_0001/samples.png"]
    assert not list((tmp_path / "board").rglob("*.png"))
    names = {f"val/{name[:-4]}" for name in IMAGE}
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == names
    steps = [module.trainer.global_step // 2, module.trainer.global_step]
    assert all([e.step for e in events.Images(name)] == steps for name in names)
    assert [(key, step) for key, _, step in images.calls if key == "val/ranked"] == [("val/ranked", s) for s in steps]
    assert {key for key, _, _ in images.calls} == names
    # what the logger got is what the file holds
    shown = (imread(tmp_path / "csv/run/a/pictures/epoch_0001/ranked.png")[..., :3] * 255).round().astype(np.uint8)
    assert np.array_equal(next(i for key, i, step in images.calls if (key, step) == ("val/ranked", steps[1])), shown)


def test_pictures_must_go_somewhere(tmp_path):
    with pytest.raises(ValueError, match="both off"):
        Pictures(to_disk=False, to_loggers=False)
    run = trainer(tmp_path, callbacks=[Pictures(to_disk=False)], logger=CSVLogger(tmp_path))
    with pytest.raises(ValueError, match=r"none of the loggers \(CSVLogger\) takes figures"):
        run.fit(image_student(), datamodule=Images())
    images = ImageLogger()
    run = fit(tmp_path, image_student(), Pictures(to_disk=False, **QUICK), data=Images(), logger=images)
    assert len(images.calls) == 4
    assert not written(tmp_path)


# --- the pictures themselves ---


def measured(module, data, callbacks=()):
    """What a Gallery measures of validation data, after a validation."""

    class Look(L.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            (model, *_) = find_models(trainer, pl_module)
            self.gallery = Gallery(trainer, model, samples=4, images=12, teacher_steps=2, grid=6)

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            self.gallery.points.add(*self.gallery.model.state(batch))

        def on_validation_epoch_end(self, trainer, pl_module):
            self.measured = self.gallery.measure()
            self.figures = self.gallery.figures(self.measured)

    look = Look()
    trainer(Path("."), callbacks=[*callbacks, look]).validate(module, datamodule=data, verbose=False)
    return look.measured, look.figures


def test_a_student_is_shown_as_it_answers(monkeypatch):
    module, data = shaken(image_student()), Images()
    calls = []
    original = f2.Reference.__call__

    def counting(self, velocity, x, cond=None):
        calls.append(len(x))
        return original(self, velocity, x, cond)

    monkeypatch.setattr(f2.Reference, "__call__", counting)
    found, figures = measured(module, data)
    assert abs(module.agreement_table()[0]["gap"]) > 0.01
    # the reference is the evaluation's, 40 samples in its own batches: none is integrated again
    assert calls == [16, 16, 8]
    x = data.dataset("val").__getitems__(list(range(12)))
    assert torch.equal(found.x, x)
    bits = lambda value: f2.bits_per_dim(value.double(), 16, 4)  # noqa: E731
    with torch.no_grad():
        for k in (1, 2):
            assert torch.allclose(found.values[k], bits(module.log_prob(x, k).value), atol=1e-5)
        exact = original(module.reference, module.reference_velocity(), x).value
        assert torch.allclose(found.reference, bits(exact), atol=1e-4)
        noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        assert list(found.samples) == ["1 step", "2 steps", "teacher, 4 evaluations"]
        assert torch.allclose(found.samples["2 steps"], module.sample(noise, 2).state, atol=1e-6)
        by_teacher = f2.reference_sample(module.reference_velocity(), noise, steps=2).state
        assert torch.allclose(found.samples["teacher, 4 evaluations"], by_teacher, atol=1e-6)
    # an image's words are its own values
    for ax in figures["ranked"].axes:
        few, teachers = ax.get_xlabel().split("\n")
        both = [(f"{float(a):.3f}", f"{float(b):.3f}") for a, b in zip(found.values[2], found.reference, strict=True)]
        index = both.index((few, teachers))
        gray = ((x[index] + 1) / 2).expand(3, -1, -1).permute(1, 2, 0)
        assert np.allclose(ax.images[0].get_array(), gray, atol=1e-6)
    # the curve is over all samples of the evaluation
    rows = module.agreement_table()
    line = figures["nll_steps"].axes[0].lines
    assert rows[-1]["nll"] == next(v for v in line if v.get_label().startswith("teacher")).get_ydata()[0]
    curve = next(v for v in line if list(v.get_xdata()) == [1, 2])
    assert list(curve.get_ydata()) == pytest.approx([row["nll"] for row in rows[:2]], rel=1e-5)


def test_samples_without_a_likelihood_keep_their_places(monkeypatch):
    """The evaluation drops them; their neighbours must not move up into another image's place."""
    module, data = shaken(image_student()), Images()
    original = type(module).log_prob

    def failing(self, x, steps=4, cond=None):
        answer = original(self, x, steps, cond)
        # a property of the sample, as an inversion's failure is
        bad = (x.flatten(1).sum(1) > 0) if steps == 2 else (x[:, 0, 0, 0] > 0.5)
        return type(answer)(torch.where(bad, math.nan, answer.value), answer.noise, answer.evaluations)

    monkeypatch.setattr(type(module), "log_prob", failing)
    found, figures = measured(module, data)
    bad = found.x.flatten(1).sum(1) > 0
    assert 0 < int(bad.sum()) < 12
    assert torch.equal(found.values[2].isnan(), bad)
    with torch.no_grad():
        exact = module.reference(module.reference_velocity(), found.x).value
    expected = f2.bits_per_dim(exact.double(), 16, 4)
    assert torch.allclose(found.reference[~bad], expected[~bad], atol=1e-4)
    assert bool(found.reference[bad].isnan().all())
    assert "ranked" in figures
    # none at all: no order to show, and nothing to compare with
    monkeypatch.setattr(
        type(module),
        "log_prob",
        lambda self, x, steps=4, cond=None: f2.likelihood.LogProb(torch.full((len(x),), math.nan), x, 1),
    )
    found, figures = measured(module, data)
    assert set(figures) == {"samples", "nll_steps", "calibration"}


def test_few_references_are_not_made_up_for():
    found, figures = measured(shaken(image_student(reference_samples=5)), Images())
    assert found.reference.isfinite().tolist() == [True] * 5 + [False] * 7
    assert len(figures["calibration"].axes[0].collections[0].get_offsets()) == 5
    # the line and the points are of the same five
    rows_gap = found.rows[0]["gap"]
    five = (found.values[1] - found.reference)[:5].mean()
    assert rows_gap == pytest.approx(float(five), abs=1e-4)
    curve = next(v for v in figures["nll_steps"].axes[0].lines if list(v.get_xdata()) == [1, 2])
    assert curve.get_ydata()[0] == pytest.approx(float(found.values[1][:5].mean()), abs=1e-4)


def test_classes_in_order():
    points = Points(5)
    points.add(torch.zeros(3, 2), torch.tensor([2, 0, 2]))
    points.add(torch.zeros(4, 2), torch.tensor([5, 5, 7, 7]))
    assert points.cond.tolist() == [2, 0, 2, 5, 5]
    assert points.classes(7).tolist() == [0, 2, 5, 0, 2, 5, 0]
    features = Points(2)
    features.add(torch.zeros(2, 2), torch.tensor([[3.0], [1.0]]))
    assert features.classes(3).tolist() == [[3.0], [1.0], [3.0]]
    found, figures = measured(image_student(classes=3), Images(labels=True))
    assert {f"{name}.png" for name in figures} == IMAGE
    assert len(found.samples["1 step"]) == 4


def test_the_plane_has_densities():
    class Exact(Pair):
        def log_prob(self, x):
            return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)

    module, data = shaken(quick_student()), Exact()
    found, figures = measured(module, data)
    assert {f"{name}.png" for name in figures} == PLANE
    assert list(found.densities) == ["1 step", "2 steps", "teacher", "true density"]
    a, b, c, d = found.extent
    assert a < float(found.x[:, 0].min()) < float(found.x[:, 0].max()) < b
    assert c < float(found.x[:, 1].min()) < float(found.x[:, 1].max()) < d
    corner = torch.tensor([[a + (b - a) / 12, c + (d - c) / 12]])
    with torch.no_grad():
        assert float(found.densities["2 steps"][0, 0]) == pytest.approx(
            float(module.log_prob(corner, 2).value), rel=1e-4
        )
        assert float(found.densities["true density"][0, 0]) == pytest.approx(float(data.log_prob(corner)), rel=1e-4)


def test_somebody_elses_module(tmp_path):
    module, added = MeanFlowModule(), callback(reference_samples=4)
    # before the callback in the list, and all the same after it in what it knows
    fit(tmp_path, module, pictures := Pictures(**QUICK), added)
    assert set(written(tmp_path / "pictures/epoch_0000")) == PLANE
    (gallery,) = pictures.galleries.values()
    points, found = gallery.points, gallery.measure()
    with torch.no_grad():
        assert list(found.samples) == ["1 step", "2 steps", "own velocity, 4 evaluations"]
        assert torch.equal(found.values[2], -added.log_prob(points.x, 2).value.double())
        own = added.reference(added.joint.velocity, points.x).value
        # what the evaluation compared
        assert torch.allclose(found.reference[:4], -own.double()[:4], atol=1e-5)
        assert found.reference[4:].isnan().all()
    figure = gallery.figures(found)["nll_steps"]
    curve = next(v for v in figure.axes[0].lines if list(v.get_xdata()) == [1, 2])
    row = added.agreement_table()[1]
    # on those that were compared
    assert curve.get_ydata()[1] == pytest.approx(row["reference_nll"] + row["gap"], rel=1e-6)
    assert figure.axes[0].get_ylabel() == "NLL, nats"


class Two(MeanFlowModule):
    """Two networks, one of which its own loss leaves alone."""

    def __init__(self):
        super().__init__()
        self.other = MeanFlowModule().net

    def loss(self, batch):
        return super().loss(batch) + 0 * sum(p.sum() for p in self.other.parameters())


KINDS = {
    "two networks": (Two, Pair, lambda: [callback(), callback(flow_map="other")],
                     {f"{name}/{file}" for name in ("net", "other") for file in PLANE}),
    "a teacher": (image_teacher, Images, lambda: [], {"samples.png"}),
    "to data": (MeanFlowModule, Pair, lambda: [callback(directions="to_data")], PLANE),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*did not converge.*")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_shows_what_it_can(tmp_path, kind):
    module, data, added, expected = KINDS[kind]
    fit(tmp_path, module(), *added(), Pictures(**QUICK), data=data())
    assert set(written(tmp_path / "pictures/epoch_0000")) == expected


def test_validation_without_a_head_makes_none(tmp_path):
    run = trainer(tmp_path, callbacks=[callback(), Pictures(**QUICK)])
    with pytest.warns(UserWarning, match="no trained head"):
        run.validate(MeanFlowModule(), datamodule=Pair(), verbose=False)
    assert not written(tmp_path)


# --- training is as it would be without ---


@pytest.mark.parametrize("kind", ["student", "foreign", "teacher"])
def test_training_is_the_same_bit_for_bit(tmp_path, kind):
    states = []
    for pictures in ([], [Pictures(**QUICK)]):
        torch.manual_seed(5)
        module = {"student": quick_student, "foreign": MeanFlowModule, "teacher": teacher}[kind]()
        # converting a batch may draw random numbers, here dequantization
        convert = lambda batch: (batch + 0.01 * torch.rand_like(batch), None)  # noqa: E731
        added = [callback(data_to_state=convert)] if kind == "foreign" else []
        run = trainer(tmp_path / str(len(states)), callbacks=[*added, *pictures])
        run.fit(module, datamodule=Pair())
        state = dict(module.state_dict())
        for one in added:
            state |= {f"added.{name}": value for name, value in one.added.live.state_dict().items()}
        states.append((state, torch.rand(1)))
    assert written(tmp_path / "1")
    assert torch.equal(states[0][1], states[1][1])
    assert same(states[0][0], states[1][0])


def test_a_fixed_teacher_is_asked_once(tmp_path, monkeypatch):
    calls = []
    original = f2.Reference.__call__
    monkeypatch.setattr(
        f2.Reference, "__call__", lambda self, v, x, cond=None: (calls.append(len(x)), original(self, v, x, cond))[1]
    )
    fit(tmp_path, quick_student(), Pictures(**QUICK), max_epochs=2)
    # two validation batches, and one grid of densities, in two validations
    assert calls == [40, 10, 36]


# --- when ---


@pytest.mark.parametrize(
    ("options", "settings", "folders"),
    [
        ({"every_n_validations": 2}, {"max_epochs": 3}, {"epoch_0000", "epoch_0002"}),
        ({}, {"val_check_interval": 1}, {"epoch_0000", "epoch_0000_step_00000002", "epoch_0000_step_00000003"}),
    ],
)
def test_validations_that_are_due(tmp_path, options, settings, folders):
    fit(tmp_path, image_teacher(), Pictures(**QUICK, **options), data=Images(), **settings)
    assert {Path(p).parts[0] for p in written(tmp_path / "pictures")} == folders


def test_trials_and_sanity_checks_leave_nothing(tmp_path):
    for options in ({"fast_dev_run": 1}, {"num_sanity_val_steps": 2, "max_epochs": 1, "limit_train_batches": 0}):
        images = ImageLogger()
        fit(tmp_path, image_student(), Pictures(**QUICK), data=Images(), **({"logger": images} | options))
        assert not written(tmp_path)
        assert not images.calls


def test_numbers_are_at_least_one():
    for option in ("every_n_validations", "samples", "images", "teacher_steps", "grid"):
        with pytest.raises(ValueError, match=f"{option}=0"):
            Pictures(**{option: 0})


def test_another_module_is_refused_before_it_trains(tmp_path):
    with pytest.raises(ValueError, match="neither F2D2Module nor FlowMatchingModule"):
        fit(tmp_path, MeanFlowModule(), Pictures())


# --- nothing is written over ---


def test_another_run_takes_another_folder(tmp_path):
    for count in (1, 2):
        fit(tmp_path, image_student(), Pictures(**QUICK), data=Images())
        folders = {Path(p).parts[0] for p in written(tmp_path)}
        assert folders == {"pictures", *(f"pictures-{n}" for n in range(1, count))}
        before = before if count == 2 else written(tmp_path / "pictures")  # noqa: F821
    assert written(tmp_path / "pictures") == before


def test_a_resumed_run_goes_on_in_its_own_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/mine.png").write_bytes(b"somebody else's")
    whole = tmp_path / "whole"

    def go(folder, epochs, *more, **kwargs):
        pictures, module = Pictures(every_n_validations=2, **QUICK), image_student(lr_scheduler=constant)
        fit(folder, module, pictures, *more, data=Images(), max_epochs=epochs, **kwargs)

    go(whole, 3)
    saved = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0)
    go(tmp_path, 1, saved, enable_checkpointing=True)
    # a checkpoint of a run says where its pictures are
    first = tmp_path / "checkpoints/first.ckpt"
    (tmp_path / "checkpoints/last.ckpt").rename(first)
    go(tmp_path, 3, ckpt_path=first)
    once = written(tmp_path / "pictures-1")
    # the second validation is left out, as it would have been without the interruption, and the third is the same
    assert {Path(p).parts[0] for p in once} == {"epoch_0000", "epoch_0002"}
    expected = written(whole / "pictures")
    differing = [
        p for p in expected if not np.array_equal(imread(whole / "pictures" / p), imread(tmp_path / "pictures-1" / p))
    ]
    assert differing == []
    # again from the same place: its own pictures are made again
    go(tmp_path, 3, ckpt_path=first)
    assert set(written(tmp_path / "pictures-1")) == set(once)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith("pictures")} == {"pictures", "pictures-1"}
    assert (tmp_path / "pictures/mine.png").read_bytes() == b"somebody else's"


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def test_each_test_has_a_folder(tmp_path):
    images = ImageLogger()
    run = trainer(tmp_path, callbacks=[Pictures(**QUICK)], logger=images)
    for _ in range(2):
        run.test(image_student(), datamodule=Images(), verbose=False)
    run.validate(image_student(), datamodule=Images(), verbose=False)
    assert set(written(tmp_path / "pictures")) == {f"{f}/{n}" for f in ("test", "test-1", "validate") for n in IMAGE}
    assert {key.split("/")[0] for key, _, _ in images.calls} == {"test", "val"}


def test_unused_folders(tmp_path):
    assert unused(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert unused(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a/file").touch()
    assert unused(tmp_path / "a") == tmp_path / "a-1"
    (tmp_path / "a-1").touch()
    assert unused(tmp_path / "a") == tmp_path / "a-2"
    assert unused(tmp_path / "a", number=2) == tmp_path / "a-2"


# --- two processes ---


def fit_in_one_of_two(folder):
    """Train with pictures under DDP and FSDP2, and test with a report; a lone collective would hang."""
    from f2d2_lightning.callbacks import TestReport
    from f2d2_lightning.plots import _figure as figure

    figure.DPI = 40
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    strategies = {
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp": ModelParallelStrategy(
            process_group_backend="gloo",
            save_distributed_checkpoint=False,
            data_parallel_size=2,
            tensor_parallel_size=1,
        ),
    }
    for name in WITH_FSDP2:
        logger = CSVLogger(folder / name, name="run", version="a")
        callbacks = [Pictures(**QUICK), TestReport(samples=4, teacher_steps=2, grid=6)]
        run = trainer(
            folder / name, callbacks=callbacks, strategy=strategies[name], devices=2, logger=logger, max_epochs=1
        )
        module = quick_student()
        run.fit(module, datamodule=Pair())
        run.test(module, datamodule=Pair(), verbose=False)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    assert ended(launch(__file__, tmp_path, 2), 200) == [0, 0], logs(tmp_path)
    for name in WITH_FSDP2:
        run = tmp_path / name / "run/a"
        assert set(written(run / "pictures")) == {
            f"{folder}/{file}" for folder in ("epoch_0000", "test") for file in PLANE
        }
        assert set(written(run)) >= PLANE
        assert "| test samples | 50 |" in (run / "report.md").read_text()


if __name__ == "__main__":
    fit_in_one_of_two(Path(sys.argv[1]))
