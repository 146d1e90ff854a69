"""The paper's experiments: every configuration parses, has the network and batch it says, and trains on small files.

The images that are made up are noise, and the networks start at zero velocity. Losses and likelihoods of the first
steps are therefore known in closed form, units included.
"""

from __future__ import annotations

import csv
import importlib
import math
import re
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import f2d2_lightning as f2
from command_line import f2d2, single_precision  # noqa: F401
from f2d2_lightning.cli import F2D2CLI, main
from f2d2_lightning.data.images import celeba, cifar, imagenet
from f2d2_lightning.flows import Direction
from f2d2_lightning.training.loading import load_module, read_checkpoint
from lightning_parts import CONFIGS
from made_data import make_celeba, make_cifar, make_imagenet_batches

FOLDERS = ("celeba64", "cifar10", "imagenet64")
FILES = [f"{folder}/{path.name}" for folder in FOLDERS for path in sorted((CONFIGS / folder).glob("*.yaml"))]
STUDENTS = [name for name in FILES if "teacher" not in name]
DISTILLED = [name for name in STUDENTS if "distill" in name or name.endswith("/f2d2.yaml") or "lsd" in name]
IMAGES_PER_STEP = {name: 512 for name in FILES} | {
    "cifar10/meanflow_f2d2.yaml": 1024, "celeba64/teacher.yaml": 256, "celeba64/lsd_f2d2.yaml": 256,
}  # fmt: skip
PARAMETERS = {"cifar10": 55.7e6, "imagenet64": 283.7e6, "celeba64": 119.0e6}
"""The first beside the 55.7 million of DDPM++ in Karras et al., 2022, table 7."""
FACTOR = {"cifar10": 20000, "imagenet64": 20000, "celeba64": 10000}
"""What the released code multiplies the head's answer with."""

QUICK = [
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]",
    "--trainer.log_every_n_steps=1", "--trainer.accumulate_grad_batches=1", "--trainer.max_steps=2",
    "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.check_val_every_n_epoch=1",
    "--data.init_args.batch_size=4", "--data.init_args.eval_batch_size=4", "--data.init_args.val=4",
    "--model.init_args.flow_map.init_args.width=4", "--model.init_args.flow_map.init_args.blocks=1",
    "--model.init_args.flow_map.init_args.multipliers=[1,1]",
]  # fmt: skip


def small(name):
    """Options that make a configuration's run tiny."""
    options = [*QUICK]
    folder = name.split("/")[0]
    if folder != "cifar10":
        options += ["--data.init_args.num_workers=0", "--model.init_args.flow_map.init_args.head_width=4",
                    "--model.init_args.flow_map.init_args.multipliers=[1,1,1,1]",
                    "--model.init_args.flow_map.init_args.attention=[16]"]  # fmt: skip
    if name in STUDENTS:
        options += ["--model.init_args.reference=f2d2_lightning.Reference", "--model.init_args.reference.steps=1",
                    "--model.init_args.steps=[1,2]", "--model.init_args.reference_samples=3"]  # fmt: skip
    if name.endswith("/f2d2.yaml"):
        options += ["--model.init_args.objective.init_args.nodes=2", "--model.init_args.objective.init_args.capacity=8",
                    "--model.init_args.objective.init_args.intervals=f2d2_lightning.Intervals",
                    "--model.init_args.objective.init_args.intervals.init_args.steps=[1,2]"]  # fmt: skip
    elif name in STUDENTS:
        options += ["--model.init_args.head.init_args.features=4"]
    return options


def fit(name, *options):
    """Two steps and a validation batch; returns the run's folder."""
    f2d2("fit", "--config", CONFIGS / name, *small(name), *options)
    return f"runs/{name.removesuffix('.yaml')}"


def metrics(run):
    """Every value that was logged, by name, in order."""
    found: dict[str, list[float]] = {}
    with open(f"{run}/metrics.csv") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value:
                    found.setdefault(key, []).append(float(value))
    return found


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A folder with small files of all three data sets, where the configurations look for them; the current one."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "ROWS", 3)
        patch.setattr(celeba, "COUNTS", {"train": 8, "val": 4, "test": 4})
        patch.setattr(imagenet, "BATCH_COUNTS", {"train": 12, "valid": 4})
        make_cifar(folder / "data", "cifar-10-python.tar.gz", 3)
        make_celeba(folder / "data/celeba", (8, 4, 4), zipped=False)
        make_imagenet_batches(folder / "data/imagenet64", [2, 2, *([1] * 8)], 4, "npz")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def teachers(home):
    """A trained teacher for each data set: their runs."""
    return {folder: fit(f"{folder}/teacher.yaml") for folder in FOLDERS}


DATA = {
    "cifar10": lambda: f2.data.CIFAR10("data", val=4),
    "celeba64": lambda: f2.data.CelebA64("data/celeba", crop=140, resize="box", val=4),
    "imagenet64": lambda: f2.data.ImageNet64("data/imagenet64", val=4),
}


def validation_images(name):
    """The validation batch that the run saw, ``(4, 3, H, W)``."""
    return DATA[name.split("/")[0]]().dataset("val").__getitems__([0, 1, 2, 3])


def bits_of_a_standard_normal(x):
    """Bits per dimension of 256 levels on [-1, 1] where the flow does nothing."""
    return float(0.5 * math.log2(2 * math.pi) + 0.5 * x.square().mean() / math.log(2) + math.log2(128))


# --- parsing ---


class _StopError(BaseException):
    pass


@pytest.fixture(scope="module")
def parser():
    """The command line's parser, made once."""
    found: list[Any] = []

    class Parser(F2D2CLI):
        def parse_arguments(self, parser, args):
            found.append(parser)
            raise _StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("f2d2_lightning.cli._main.F2D2CLI", Parser)
        with pytest.raises(_StopError):
            main(["fit", "--print_config"])
    return found[0]


def parsed(parser, name, *others):
    """What ``f2d2 fit`` would run with."""
    files = [CONFIGS / name, *(CONFIGS / other for other in others if other.endswith(".yaml"))]
    arguments = ["fit"]
    for file in files:
        arguments += ["--config", str(file)]
    return parser.parse_args([*arguments, *(other for other in others if not other.endswith(".yaml"))]).fit


def test_files_are_those_of_the_paper():
    recipes = ["f2d2", "meanflow_f2d2", "shortcut_distill_f2d2", "shortcut_f2d2", "teacher"]
    expected = [f"{folder}/{recipe}.yaml" for folder in ("cifar10", "imagenet64") for recipe in recipes]
    assert sorted(FILES) == sorted([*expected, "celeba64/lsd_f2d2.yaml", "celeba64/teacher.yaml"])


@pytest.mark.parametrize("name", FILES)
def test_parses_with_every_strategy(parser, name):
    ddp = parsed(parser, name, "strategies/ddp.yaml", "evaluation/inception.yaml")
    assert ddp.trainer.strategy.class_path.endswith("DDPStrategy")
    callbacks = [callback.class_path.rpartition(".")[2] for callback in ddp.trainer.callbacks]
    assert callbacks == ["SampleQuality"]
    assert ddp.checkpoint.every_n_train_steps == 5000
    assert ddp.trainer.callbacks[-1].init_args.features == "inception"
    logger = ddp.trainer.logger.init_args
    assert f"{logger.name}/{logger.version}.yaml" == name
    fsdp = parsed(parser, name, "strategies/fsdp2.yaml")
    assert fsdp.trainer.strategy.class_path.endswith("ModelParallelStrategy")
    assert fsdp.model == ddp.model
    # one GPU takes the batch in 8 parts
    assert ddp.trainer.accumulate_grad_batches == 8
    assert 8 * ddp.data.init_args.batch_size == IMAGES_PER_STEP[name]


def test_eight_gpus_take_a_part_each(parser):
    eight = parsed(parser, "imagenet64/f2d2.yaml", "strategies/gpu8.yaml").trainer
    assert eight.strategy.class_path.endswith("DDPStrategy")
    assert (eight.devices, eight.precision, eight.accelerator) == (8, "bf16-mixed", "cuda")
    assert eight.devices * eight.accumulate_grad_batches == 8
    assert eight.max_steps == written("imagenet64/f2d2.yaml")["trainer"]["max_steps"]


# --- what the files say ---


def written(name):
    """A file's content as it is."""
    return OmegaConf.to_object(OmegaConf.load(CONFIGS / name))


def made(value):
    """An object from ``class_path`` and ``init_args``, at every level; other values as they are."""
    if isinstance(value, list):
        return [made(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: made(item) for key, item in value.items()}
    module, _, name = value["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**made(value.get("init_args", {})))


@pytest.mark.parametrize("name", FILES)
def test_full_size(name):
    arguments = written(name)["model"]["init_args"]
    with torch.device("meta"):
        network = made(arguments["flow_map"])
    folder = name.split("/")[0]
    count = sum(p.numel() for p in network.parameters())
    assert count == pytest.approx(PARAMETERS[folder], rel=0.01)
    assert f"| {count / 1e6:.1f} |" in row_of(folder)


@pytest.mark.parametrize(
    "name", ["cifar10/shortcut_f2d2.yaml", "imagenet64/meanflow_f2d2.yaml", "celeba64/lsd_f2d2.yaml"]
)
def test_full_size_answers(name):
    arguments = written(name)["model"]["init_args"]
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network, head = made(arguments["flow_map"]), made(arguments["head"])
        x, s, t = torch.zeros(1, *arguments["flow_map"]["init_args"]["shape"]), torch.zeros(1), torch.ones(1)
        velocity, features = network.forward_features(x, s, t)
        count = counter.get_total_flops()
        assert velocity.shape == x.shape
        assert head(x, s, t, None, features).shape == (1,)
    assert f"| {count / 1e9:.1f} |" in row_of(name.split("/")[0])


def document():
    return (CONFIGS.parent / "docs/PAPER.md").read_text()


def row_of(folder):
    """The document's row of a network."""
    return next(line for line in document().splitlines() if line.startswith(f"| `{folder}` |"))


@pytest.mark.parametrize("name", STUDENTS)
def test_students_train_both_directions_and_weigh_the_divergence(name):
    arguments = written(name)["model"]["init_args"]
    objective = made(arguments["objective"])
    with torch.device("meta"):
        network = made(arguments["flow_map"])
    assert objective.directions == network.directions == Direction.BOTH
    s, t = objective.intervals.sample(4000)
    assert bool((s > t).float().mean() > 0.15)
    assert bool((s < t).float().mean() > 0.15)
    assert ("teacher" in arguments) == (name in DISTILLED)
    if not name.endswith("/f2d2.yaml"):
        dim = math.prod(arguments["flow_map"]["init_args"]["shape"])
        # 1 / factor^2 per sample, as a share of the mean over dimensions
        assert objective.weighting.divergence == pytest.approx(dim / FACTOR[name.split("/")[0]] ** 2, rel=0.01)


def test_length_and_cost_of_training():
    rows = [line.split("|")[1:-1] for line in document().splitlines() if re.match(r"\| `\w+/\w+.yaml`.*\d \|$", line)]
    seen = []
    for names, images, passes, work, hours in rows:
        for name in re.findall(r"`(\S+)`", names):
            file = written(name)
            per_step = file["data"]["init_args"]["batch_size"] * file["trainer"]["accumulate_grad_batches"]
            assert file["trainer"]["max_steps"] * per_step / 1e6 == pytest.approx(float(images), rel=0.005), name
            gflop = float(row_of(name.split("/")[0]).split("|")[-2])
            total = float(images) * float(passes.replace("about", "")) * gflop * 1e-3
            assert float(work) == pytest.approx(total, rel=0.01, abs=0.5)
            # 8 GPUs at 100 TFLOP/s
            assert float(hours) == pytest.approx(float(work) * 1e18 / 8e14 / 3600, rel=0.01, abs=0.5)
            seen.append(name)
    assert sorted(seen) == FILES


def test_published_figures_are_those_of_the_document():
    found = re.findall(r"\| ([-\d.]+ / [\d.]+) \| (\S+ / \S+) \| (\S+ / \S+) \| (\S+ / \S+) \| `(\S+)` \|", document())
    assert len(found) == 3
    for *figures, name in found:
        header = " ".join(line.lstrip("# ") for line in (CONFIGS / name).read_text().splitlines() if line[:1] == "#")
        assert "at 8, 4, 2, 1 steps: " + ", ".join(figures).replace(" / ", "/") in header


def learning_rates(name, steps):
    """Learning rates of a file's optimiser and schedule at ascending steps."""
    arguments = written(name)["model"]["init_args"]
    optimizer, schedule = arguments["optimizer"], arguments["lr_scheduler"]
    optimizer = made(
        optimizer | {"init_args": optimizer["init_args"] | {"params": [torch.nn.Parameter(torch.ones(1))]}}
    )
    module, _, kind = schedule["class_path"].rpartition(".")
    scheduler = getattr(importlib.import_module(module), kind)(optimizer, **schedule["init_args"])
    found, last = [], max(steps)
    optimizer.step()
    for step in range(last + 1):
        if step in steps:
            found.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return found


def test_learning_rate_rises_over_ten_million_images():
    rates = learning_rates("cifar10/teacher.yaml", [0, 9766, 19531, 25000])
    assert rates == pytest.approx([5.12e-9, 5e-5, 1e-4, 1e-4], rel=1e-3)


def test_learning_rate_falls_with_the_root_of_the_step():
    steps = [0, 35000, *range(36000, 100001, 8000)]
    rates = learning_rates("celeba64/lsd_f2d2.yaml", steps)
    expected = [1e-4 * min(1, (35000 / max(step, 1)) ** 0.5) for step in steps]
    assert rates == pytest.approx(expected, rel=0.0906)
    last = 1e-4 * 0.8408964**9
    assert last == pytest.approx(1e-4 * (35000 / 800000) ** 0.5, rel=0.0906)
    assert len(written("celeba64/lsd_f2d2.yaml")["model"]["init_args"]["lr_scheduler"]["init_args"]["milestones"]) == 9


def test_commands_of_the_document_name_files_that_exist():
    named = re.findall(r"configs/[\w/]+\.yaml", document())
    assert len(named) > 5
    assert not [name for name in named if not (CONFIGS.parent / name).is_file()]
    assert not [name for name in FILES if f"`{name}`" not in document()]


# --- two steps on small files ---


@pytest.mark.parametrize("folder", FOLDERS)
def test_teacher_trains(teachers, folder):
    found = metrics(teachers[folder])
    assert len(found["train/loss"]) == 2
    x = validation_images(folder)
    # zero velocity is off by the data pair's own, data minus noise
    assert found["val/loss"] == [pytest.approx(float(x.square().mean()) + 1, abs=0.02)]
    assert read_checkpoint(f"{teachers[folder]}/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("name", STUDENTS)
def test_student_trains(teachers, name):
    run = fit(name)
    found = metrics(run)
    assert len(found["train/loss"]) == 2
    assert all(math.isfinite(value) for values in found.values() for value in values)
    x = validation_images(name)
    still = bits_of_a_standard_normal(x)
    assert found["val/reference_nll"] == [pytest.approx(bits_of_a_standard_normal(x[:3]), abs=0.01)]
    module = load_module(f"{run}/checkpoints/last.ckpt", f2.F2D2Module)
    baseline = module.average.head.baseline
    if baseline is not None:
        # the head begins with the Gaussian fit's divergence, beside a velocity that is not the fit's
        still += 0.5 * float(baseline.variances.log2().mean())
    assert [*found["val/nll_1"], *found["val/nll_2"]] == pytest.approx([still, still], abs=0.02)
    assert (module.kept_teacher.path is not None) == (name in DISTILLED)


def test_the_released_direction(teachers):
    name = "cifar10/shortcut_distill_f2d2.yaml"
    header = " ".join(line.lstrip("# ") for line in (CONFIGS / name).read_text().splitlines() if line.startswith("#"))
    options = re.findall(r"(--model\S+) ([\w.]+)", header)
    assert len(options) == 3
    run = "runs/cifar10/to_data"
    fit(name, *(f"{key}={value}" for key, value in options), "--trainer.logger.init_args.version=to_data")
    found = metrics(run)
    assert found["val/unconverged_2"] == [0.0]
    assert found["val/nll_2"] == [pytest.approx(bits_of_a_standard_normal(validation_images(name)), abs=0.02)]


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("folder", "lacks"), [("cifar10", "cifar-10-python.tar.gz"), ("celeba64", "img_align_celeba"),
                          ("imagenet64", "train_data_batch_1")],
)  # fmt: skip
def test_missing_data(folder, lacks):
    with pytest.raises(FileNotFoundError, match=rf"nowhere (has|lacks).*{lacks}.*--data.init_args.folder"):
        fit(f"{folder}/teacher.yaml", "--data.init_args.folder=nowhere", "--trainer.logger.init_args.version=nothing",
            *(["--data.init_args.cache=null"] if folder == "celeba64" else []))  # fmt: skip


def test_missing_teacher_and_a_second_start(teachers):
    name = "cifar10/shortcut_distill_f2d2.yaml"
    # other first weights than the teacher's, but for what it takes over
    options = ["--trainer.logger.init_args.version=again", "--trainer.max_steps=1", "--seed_everything=1"]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere/last.ckpt; train one \(f2d2 fit --config"):
        fit(name, *options, "--model.init_args.teacher=nowhere/last.ckpt")
    # what a failed start left is no run that would be in the way
    fit(name, *options)
    with open("runs/cifar10/again/config.yaml") as file:
        assert yaml.safe_load(file)["model"]["init_args"]["teacher"] == "runs/cifar10/teacher/checkpoints/last.ckpt"

    def weight(run, part):
        return read_checkpoint(f"{run}/checkpoints/last.ckpt")["state_dict"][f"{part}.inlet.weight"]

    mine, theirs = weight("runs/cifar10/again", "joint.flow_map"), weight(teachers["cifar10"], "average")
    # a step of 5e-9 later
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_sample_quality_needs_its_weights():
    with pytest.raises(FileNotFoundError, match=r"Inception's weights are needed.*weights-inception.*\.pth"):
        fit("cifar10/teacher.yaml", "--config", CONFIGS / "evaluation/inception.yaml",
            "--trainer.logger.init_args.version=nothing")  # fmt: skip
