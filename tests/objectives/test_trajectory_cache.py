"""Trajectories on disk: the same numbers as without, integrated once, and never another teacher's."""

import contextlib
import json
import pickle
import random
import resource
import warnings

import pytest
import torch
from safetensors.torch import save

from f2d2_lightning import GaussianBaseline, Hutchinson, TrajectoryRegression
from f2d2_lightning.nn import MLP
from f2d2_lightning.objectives import Batch, DiagonalSource, TeacherSource, TrajectoryPool
from f2d2_lightning.objectives.trajectory_cache import TrajectoryCache
from f2d2_lightning.utils.fingerprints import fingerprint
from problems import PROBLEMS, Student, randomize

TIMES = [0.0, 0.25, 0.5, 1.0]


class Counting(torch.nn.Module):
    """A velocity with weights that knows how often it was asked."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = randomize(MLP((3,), width=8, blocks=1), seed=seed)
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
        assert torch.equal(pool.ring["states"], plain.ring["states"])
        assert torch.equal(pool.ring["change"], plain.ring["change"])
        answers.append(torch.rand(3))
    assert len(list(tmp_path.iterdir())) == 1
    # what is drawn afterwards is the same as well
    assert torch.equal(*answers)


def test_the_whole_objective_trains_to_the_same_numbers(tmp_path):
    problem = PROBLEMS["gaussian-vector-linear"]()
    field = problem.field

    class Teacher(torch.nn.Module):
        def forward(self, x, t, cond=None):
            return field.velocity(x, t) + cond[:, None]

    source, losses = TeacherSource(Teacher(), Hutchinson()), []
    for cache in (None, tmp_path, tmp_path):
        student = Student(problem.field)
        objective = TrajectoryRegression(6, capacity=48, refresh=8.0, cache=cache)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
        torch.manual_seed(4)
        run = []
        for _ in range(6):
            x = torch.randn(16, 3)
            loss = objective.loss(student, Batch(x, source, torch.rand(16))).loss
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
    assert torch.equal(kept.ring["states"], plain.ring["states"])
    assert torch.equal(kept.ring["change"], plain.ring["change"])


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
    assert torch.equal(resumed.ring["states"], pool.ring["states"])


def test_a_damaged_file_is_made_again(tmp_path):
    source, cache = TeacherSource(Counting(), Hutchinson()), TrajectoryCache(tmp_path)
    pool = pool_of(source, cache)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match="integrated again"):
        again = pool_of(source, cache)
    assert torch.equal(again.ring["states"], pool.ring["states"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pool_of(source, cache).ring["states"], pool.ring["states"])


def test_a_folder_that_cannot_be_written_is_only_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be kept"):
        pool = pool_of(TeacherSource(Counting(), Hutchinson()), TrajectoryCache(tmp_path / "file"))
    assert len(pool) == 5


@contextlib.contextmanager
def full_disk():
    # the system refuses what goes beyond: Python ignores the signal
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_only_a_warning(tmp_path):
    source, cache = TeacherSource(Counting(), Hutchinson()), TrajectoryCache(tmp_path)
    plain = pool_of(source, None)
    with full_disk(), pytest.warns(UserWarning, match="cannot be kept in .*make room"):
        pool = pool_of(source, cache)
    assert torch.equal(pool.ring["states"], plain.ring["states"])
    assert list(tmp_path.iterdir()) == []
    # and with room again it is kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool_of(source, cache)
    assert len(list(tmp_path.iterdir())) == 1


START, SHAPE = torch.zeros(2, 3, dtype=torch.float64), (2, 4, 3)


def content(**other):
    generator = torch.Generator().manual_seed(1)
    kept = {"states": torch.randn(SHAPE, generator=generator), "change": torch.randn(SHAPE[:2], generator=generator)}
    return kept | other


def read(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = TrajectoryCache(path.parent).read(path, START, 4)
    return found, [str(warning.message) for warning in caught]


def test_no_changed_bit_gives_other_numbers(tmp_path):
    path, kept = tmp_path / "a.safetensors", content()
    TrajectoryCache(tmp_path).write(path, kept["states"], kept["change"])
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        found, said = read(path)
        if found is None:
            refused += 1
            assert f"{path} cannot be read" in said[-1]
            assert "integrated again" in said[-1]
        else:
            assert torch.equal(found[0], kept["states"])
            assert torch.equal(found[1], kept["change"])
    # the others are padding
    assert refused > 0.9 * len(whole)


def giant():
    """A header that says 32 TiB, which nothing may try to make."""
    header = {"states": {"dtype": "F64", "shape": [2, 4, 2**39], "data_offsets": [0, 2**45]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


BAD = {
    "a pickle": (lambda: pickle.dumps(content()), "cannot be read"),
    "without a checksum": (lambda: save(content()), "its checksum is another"),
    "a key is missing": (
        lambda: signed({"states": torch.zeros(SHAPE)}),
        "{'states': .*; expected is {'change': .*'states'",
    ),
    "of other numbers": (lambda: save(content(change=torch.zeros(2, 4)), sign(content())), "its checksum is another"),
    "fewer rows": (lambda: signed(content(states=torch.zeros(1, 4, 3))), r"torch.float64 \(1, 4, 3\)'};.*\(2, 4, 3\)"),
    "another precision": (lambda: signed(content(states=torch.zeros(SHAPE).float())), "'states': 'torch.float32"),
    "not a number": (lambda: signed(content(states=torch.full(SHAPE, torch.nan))), "values that are not finite"),
    "giant": (giant, "cannot be read"),
}


def sign(kept):
    return {"checksum": fingerprint(*(value for _, value in sorted(kept.items())))}


def signed(kept):
    return save(kept, sign(kept))


@pytest.mark.parametrize("case", list(BAD))
def test_a_file_of_something_else_is_not_used(tmp_path, case):
    make, message = BAD[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(make())
    with pytest.warns(UserWarning, match=message) as caught:
        assert TrajectoryCache(tmp_path).read(path, START, 4) is None
    assert f"{path} cannot be read" in str(caught[-1].message)
    TrajectoryCache(tmp_path).write(path, *(content()[name] for name in ("states", "change")))
    assert torch.equal(read(path)[0][0], content()["states"])


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
