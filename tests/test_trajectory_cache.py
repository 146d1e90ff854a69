"""Trajectories on disk: the same numbers as without, integrated once, and never another teacher's."""

import warnings

import pytest
import torch

from f2d2_lightning import (
    DiagonalSource,
    GaussianBaseline,
    Hutchinson,
    TeacherSource,
    TrajectoryPool,
    TrajectoryRegression,
)
from f2d2_lightning.nn import MLP
from f2d2_lightning.trajectory_cache import TrajectoryCache
from problems import PROBLEMS, Student, randomise

TIMES = [0.0, 0.25, 0.5, 1.0]


class Counting(torch.nn.Module):
    """A velocity with weights that knows how often it was asked."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = randomise(MLP((3,), width=8, blocks=1), seed=seed)
        self.calls = 0

    def forward(self, x, t, cond=None):
        self.calls += 1
        return self.network.velocity(x, t, cond)


def states(seed=0, count=5):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def pool_of(source, cache, seed=0, times=TIMES, baseline=None, node=-1, count=5):
    pool = TrajectoryPool(times, capacity=20, baseline=baseline, cache=cache)
    torch.manual_seed(seed)
    pool.add(source, states(count=count), node)
    return pool


def test_a_second_run_integrates_nothing_and_gets_the_same(tmp_path):
    plain = pool_of(TeacherSource(Counting(), Hutchinson()), None)
    answers = []
    for fresh in (True, False):
        teacher = Counting()
        pool = pool_of(TeacherSource(teacher, Hutchinson()), TrajectoryCache(tmp_path))
        assert (teacher.calls > 0) == fresh
        assert torch.equal(pool._states, plain._states)
        assert torch.equal(pool._change, plain._change)
        answers.append(torch.rand(3))
    assert len(list(tmp_path.iterdir())) == 1
    # what is drawn afterwards is the same as well
    assert torch.equal(*answers)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_whole_objective_trains_to_the_same_numbers(tmp_path, conditional):
    problem = PROBLEMS["gaussian-vector-linear"]()
    field = problem.field

    class Teacher(torch.nn.Module):
        def forward(self, x, t, cond=None):
            return field.velocity(x, t) + (0 if cond is None else cond[:, None])

    source, losses = TeacherSource(Teacher(), Hutchinson()), []
    for cache in (None, tmp_path, tmp_path):
        student = Student(problem.field)
        objective = TrajectoryRegression(6, capacity=48, refresh=8.0, cache=cache)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
        torch.manual_seed(4)
        run = []
        for _ in range(6):
            x = torch.randn(16, 3)
            loss = objective(student, source, x, torch.rand(16) if conditional else None).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses.append(run)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    "other",
    [
        lambda: {"source": TeacherSource(Counting(seed=1), Hutchinson())},
        lambda: {"source": TeacherSource(Counting(), Hutchinson(2))},
        lambda: {"source": TeacherSource(Counting(), Hutchinson(distribution="gaussian"))},
        lambda: {"source": TeacherSource(Counting(), Hutchinson(control=GaussianBaseline((3,), "isotropic")))},
        lambda: {"seed": 1},
        lambda: {"times": [0.0, 0.5, 1.0]},
        lambda: {"baseline": GaussianBaseline.from_covariance(torch.zeros(3), torch.eye(3) * 2)},
        lambda: {"node": 1},
        lambda: {"count": 4},
    ],
    ids=["weights", "probes", "distribution", "control", "seed", "times", "baseline", "node", "points"],
)
def test_whatever_decides_the_numbers_is_in_the_name(tmp_path, other):
    cache = TrajectoryCache(tmp_path)
    source = TeacherSource(Counting(), Hutchinson())
    pool_of(source, cache)
    settings = {"source": source, **other()}
    kept = pool_of(cache=cache, **settings)
    assert len(list(tmp_path.iterdir())) == 2
    plain = pool_of(cache=None, **settings)
    assert torch.equal(kept._states, plain._states)
    assert torch.equal(kept._change, plain._change)


def test_a_resumed_pool_reads_what_it_had(tmp_path):
    teacher = Counting()
    source = TeacherSource(teacher, Hutchinson())
    pool = pool_of(source, TrajectoryCache(tmp_path))
    pool.add(source, states(1), 0)
    before = teacher.calls
    resumed = TrajectoryPool(TIMES, capacity=20, cache=TrajectoryCache(tmp_path))
    resumed.load_state_dict(pool.state_dict())
    resumed.restore(source)
    assert teacher.calls == before
    assert torch.equal(resumed._states, pool._states)


@pytest.mark.parametrize("damage", [b"", b"no trajectories", None], ids=["empty", "other", "cut"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    source, cache = TeacherSource(Counting(), Hutchinson()), TrajectoryCache(tmp_path)
    pool = pool_of(source, cache)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200] if damage is None else damage)
    with pytest.warns(UserWarning, match="integrated again"):
        again = pool_of(source, cache)
    assert torch.equal(again._states, pool._states)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pool_of(source, cache)._states, pool._states)


def test_a_folder_that_cannot_be_written_is_only_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be kept"):
        pool = pool_of(TeacherSource(Counting(), Hutchinson()), TrajectoryCache(tmp_path / "file"))
    assert len(pool) == 5


def test_teachers_that_cannot_be_told_apart_are_refused(tmp_path):
    cache = TrajectoryCache(tmp_path)
    problem = PROBLEMS["gaussian-vector-linear"]()
    for source, message in (
        (DiagonalSource(problem.field), "changes in training"),
        (TeacherSource(Counting(), stationary=False), "changes in training"),
        (TeacherSource(lambda x, t, cond: x), "no torch.nn.Module"),
    ):
        with pytest.raises(ValueError, match=message):
            pool_of(source, cache)
