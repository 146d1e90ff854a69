"""The recipe's table: splits that share nothing, densities that are what is drawn from, numbers found where put."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch

import f2d2_lightning as f2
import recipe
import recipe_data
from f2d2_lightning.flows import GaussianFlow
from f2d2_lightning.utils.measuring import spread_of
from problems import PROBLEMS
from recipe import Goals, Run, compare, lengths, network, reference
from recipe_data import SETS, resolution, table

# --- data ---


def every(data):
    return {split: data.dataset(split).values.double() for split in ("train", "val", "test")}


def test_a_table_is_divided_once_and_dequantized_at_its_resolution():
    rows = np.arange(200.0)
    continuous = np.random.default_rng(0).normal(size=200)
    values = np.stack((rows, rows % 2, 0.1 * (rows % 7), continuous), 1)
    parts = every(table(values))
    assert [len(part) for part in parts.values()] == [140, 30, 30]
    assert parts["train"].shape[1] == 3  # the column of two values is left out
    assert torch.allclose(parts["train"].mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(parts["train"].std(0), torch.ones(3), atol=1e-5)
    # rows are told apart by their number, which noise moves by a half at most: each is in one split
    number = torch.cat(list(parts.values()))[:, 0].sort().values
    scale = (number[-20:].mean() - number[:20].mean()) / 180
    found = (number - number.mean()) / scale + rows.mean()
    assert float((found - torch.arange(200.0)).abs().max()) < 0.75
    assert len(number.unique()) == 200
    # the steps of a discrete column are filled, those of a continuous one are as they were
    assert len(torch.cat(list(parts.values()))[:, 1].unique()) == 200


def test_resolution_is_the_coarsest_that_fits_almost_all():
    assert resolution(np.array([1.0, 5.0, 12.0])) == 1
    assert resolution(np.array([0.25, 3.5, 7.0])) == 0.01
    assert resolution(np.append(np.arange(30.0), 1.37)) == 1
    assert resolution(np.random.default_rng(0).normal(size=50)) == 0


@pytest.mark.parametrize("side", [8, 16])
def test_patches_of_two_splits_share_no_pixel(monkeypatch, side):
    """Photographs whose pixels say which block they are of: a patch is of one, and a block of one split."""
    place = np.indices((427, 640)) // recipe_data.BLOCK
    # 255: data must reach their highest level
    images = [np.stack((np.full((427, 640), 255 * p), *place), -1).astype(np.uint8) for p in range(2)]
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: SimpleNamespace(images=images))
    seen = {}
    for split, values in every(SETS[f"patches {side}x{side}"].data()).items():
        assert values.shape[1:] == (3, side, side)
        assert torch.equal(values, values[:, :, :1, :1].expand_as(values))
        seen[split] = {tuple(row) for row in values[:, :, 0, 0].tolist()}
    assert sum(len(blocks) for blocks in seen.values()) == len(set.union(*seen.values())) == 2 * 6 * 10


def test_patches_are_those_of_the_photographs():
    values = SETS["patches 8x8"].data().dataset("val").values
    pixels = sklearn.datasets.load_sample_images().images
    picture, row, column = recipe_data.blocks()["val"][0]
    wanted = torch.from_numpy(pixels[picture][row : row + 8, column : column + 8].copy()).permute(2, 0, 1)
    assert (values == wanted).flatten(1).all(1).any()


PLANE = ["two moons", "eight Gaussians", "checkerboard", "pinwheel"]


@pytest.mark.parametrize("name", PLANE)
def test_a_density_integrates_to_one_and_is_that_of_the_points(name):
    """Against sums over a fine grid: moments and the entropy of 20,000 points, within four standard errors."""
    line = (torch.arange(480) + 0.5) * 0.025 - 6
    grid = torch.cartesian_prod(line, line)
    log_p = torch.cat([SETS[name].log_prob(part) for part in grid.split(20_000)])
    share = log_p.exp() * 0.025**2
    assert float(share.sum()) == pytest.approx(1, abs=2e-4)
    points = SETS[name].data().dataset("train").values[:20_000].double()

    def statistics(x, log_p):
        first, second = x.T
        return torch.stack((first, second, first**2, second**2, first * second, first**3, first * second**2, log_p), 1)

    known = share > 0
    expected = (share[known, None] * statistics(grid[known], log_p[known])).sum(0)
    found = statistics(points, SETS[name].log_prob(points).double())
    error = found.std(0) / len(points) ** 0.5
    assert bool(((found.mean(0) - expected).abs() < 4 * error + 2e-3).all())


def test_the_splits_of_a_density_are_draws_of_their_own():
    for name in (*PLANE, "mixture 16-d"):
        values = torch.cat(list(every(SETS[name].data()).values()))
        assert len(values.unique(dim=0)) > 0.999 * len(values)


def test_the_rule_for_networks_and_lengths():
    """Every shape has a network that takes it; a teacher of few points stops early and drops units."""
    cases = ((2,), 50_000, None), ((30,), 398, None), ((1, 8, 8), 1297, 17), ((3, 16, 16), 14_196, 256)
    for shape, count, levels in cases:
        made = network(shape, count, levels)
        assert made.velocity(torch.zeros(2, *shape), 0.5).shape == (2, *shape)
        drops = [part.p for part in made.modules() if isinstance(part, torch.nn.Dropout)]
        assert (max(drops) > 0) == (count < 2000)
    assert lengths(768, 32) == (500, 500)
    assert lengths(768, 14_196) == (2500, 2500)
    assert lengths(30, 398)[0] < lengths(30, 5000)[0] < lengths(30, 398)[1]


# --- numbers ---


def test_goals():
    row = {"error": 0.05, "gap": -0.02, "r": 0.998}
    assert Goals.of(False, 2000).missed(row) == []
    assert Goals.of(False, 2000).missed({"error": 0.06, "gap": -0.03, "r": 0.99}) == ["error", "r", "gap"]
    assert Goals.of(False, 1999).missed({"error": 0.1, "gap": 0.05, "r": 0.99}) == []
    assert Goals.of(True, 10**6).missed(row | {"r": math.nan}) == []
    assert Goals.of(False, 2000).missed(dict.fromkeys(row, math.nan)) == ["error", "r", "gap"]


def test_spread_is_a_deviation_that_outliers_do_not_move():
    x = 3 * torch.randn(100_000)
    assert spread_of(x) == pytest.approx(3, rel=0.02)
    x[:100] = 1e6
    assert spread_of(x) == pytest.approx(3, rel=0.02)


def test_the_reference_is_as_exact_as_it_says():
    """Below 64 dimensions by steps, above by probes."""
    for dim in (3, 80):
        axes = torch.linalg.qr(torch.randn(dim, dim)).Q * torch.logspace(-0.1, 0.1, dim)
        baseline = f2.GaussianBaseline.from_covariance(torch.randn(dim), axes @ axes.T)
        x = torch.randn(96, dim) @ axes.T + baseline.mean
        found = reference(GaussianFlow(baseline).velocity, x, constant=False)
        off = (found["value"] - baseline.log_prob(x, torch.ones(96))).abs().mean() / spread_of(found["value"])
        assert float(off) < found["error"]
        assert (found["probes"] > 0) == (dim > 64)


class Lifted(f2.JointMap):
    """A Gaussian's map whose divergence is too large."""

    def __init__(self, field, lift):
        super().__init__()
        self.field, self.lift = field, lift

    def joint(self, x, s, t, cond):
        u, divergence = self.field(x, s, t)
        return f2.flows.Joint(u, divergence + self.lift)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_that_is_off_is_found_so(steps):
    """Half a nat of divergence too much makes every point half a nat less likely, and nothing else."""
    closed = PROBLEMS["gaussian-vector-linear"]()
    x = closed.states(50, 1.0)
    row = compare(Lifted(closed.field, 0.5), x, closed.log_prob(x, torch.ones(50)), 2.0, steps)
    assert row["gap"] == pytest.approx(0.25)
    assert row["error"] == pytest.approx(0.25)
    assert row["r"] == pytest.approx(1)
    assert row["rank_r"] == pytest.approx(1)
    assert row["round_trip"] < 1e-8


# --- the command ---


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)


def ask(monkeypatch, capsys, folder, *words):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--tiny", "--seeds", "0", "--folder", str(folder), *words])
    recipe.main()
    return capsys.readouterr().out


@pytest.mark.usefixtures("single")
def test_the_command_on_a_plane_and_a_table(monkeypatch, capsys, tmp_path):
    sets = ("--sets", "two moons", "wine")
    told = ask(monkeypatch, capsys, tmp_path, "--validate", *sets)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(tmp_path / "tiny").as_posix() for path in files}
    for name in ("two-moons", "wine"):
        assert {f"{name}/seed0/{part}" for part in
                ("teacher/last.ckpt", "teacher/val.pt", "defaults/last.ckpt", "defaults/val.json")} <= kept  # fmt: skip
    result = json.loads((tmp_path / "tiny/wine/seed0/defaults/val.json").read_text())
    assert result["points"] == 26
    rows = [result["steps"][steps] for steps in "1248"]
    assert all(abs(row["gap"]) <= row["error"] for row in rows)
    error, gap, r = (" / ".join(f"{row[key]:{form}}" for row in rows) for key, form in
                     (("error", ".3f"), ("gap", "+.3f"), ("r", ".4f")))  # fmt: skip
    assert f"| wine | {error} | {gap} (± {max(row['gap_error'] for row in rows):.3f}) | {r} |" in told
    assert told.count("| 0.10, 0.05, 0.99 |") == 2  # 192 points of the plane are few too
    # nothing is made again, and what is not there is left out
    assert ask(monkeypatch, capsys, tmp_path, "--validate", "--report_only", *sets, "pinwheel") == told
    assert ask(monkeypatch, capsys, tmp_path, "--validate", *sets) == told
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    # test points are others; teacher and student are those that there are
    ask(monkeypatch, capsys, tmp_path, "--sets", "wine")
    last = tmp_path / "tiny/wine/seed0/defaults/last.ckpt"
    assert last.stat().st_mtime_ns == files[last]
    tested = json.loads(last.with_name("test.json").read_text())
    assert tested["points"] == 27
    assert tested["nll"] != result["nll"]


@pytest.mark.usefixtures("single")
def test_by_a_callback_and_with_fixed_choices(monkeypatch, capsys, tmp_path):
    """Six steps change little: all ways begin at the Gaussian fit's likelihood."""
    begin = ("--validate", "--sets", "two moons")
    for way in ("callback", "alone"):
        told = ask(monkeypatch, capsys, tmp_path, *begin, "--way", way, "--name", way)
        assert told.count("| 0.10, 0.05, 0.99 |") == 1
    homes = [tmp_path / "tiny/two-moons/seed0" / name for name in ("teacher", "callback", "alone")]
    assert [(home / "val.pt").exists() for home in homes] == [True, False, True]  # whose reference it is
    for home in homes[1:]:
        result = json.loads((home / "val.json").read_text())
        assert result["way"] == home.name
        assert max(row["error"] for row in result["steps"].values()) < 0.1
    told = ask(monkeypatch, capsys, tmp_path, *begin, "--fixed", "errors", "weight")
    assert [line.split(" | ")[0] for line in told.splitlines()[2:]] == [
        "| squared errors",
        "| weight .1 of the divergence",
    ]
    fixed = json.loads((tmp_path / "tiny/two-moons/seed0/fixed-errors/val.json").read_text())
    assert f"{fixed['steps']['1']['error']:.3f} / {fixed['steps']['2']['error']:.3f}" in told


@pytest.mark.usefixtures("single")
def test_training_that_was_stopped_goes_on_to_the_same(monkeypatch, tmp_path):
    whole = Run("wine", SETS["wine"], 0, tmp_path / "whole", tiny=True).teacher.state_dict()
    run = Run("wine", SETS["wine"], 0, tmp_path / "stopped", tiny=True)
    step = f2.FlowMatchingModule.training_step

    def stop(self, batch, index):
        if self.global_step == 4:
            raise RuntimeError("stopped here")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(f2.FlowMatchingModule, "training_step", stop)
        with pytest.raises(RuntimeError, match="stopped here"):
            run.teacher  # noqa: B018
    before = run.seconds("teacher")["total"]
    assert before > 0
    for name, value in run.teacher.state_dict().items():
        assert torch.equal(value, whole[name]), name
    assert run.seconds("teacher")["total"] > before
