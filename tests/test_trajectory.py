"""Trajectories and their pool: right to second order, within memory, and the same again after a checkpoint."""

import pytest
import torch

from f2d2_lightning import (
    Direction,
    Exact,
    Hutchinson,
    Intervals,
    JointMap,
    TeacherSource,
    TrajectoryPool,
    TrajectoryRegression,
)
from f2d2_lightning.trajectory import integrate
from problems import PROBLEMS, Logistic, LogisticMap, slope

close = torch.testing.assert_close


@pytest.fixture
def problem():
    return PROBLEMS["gaussian-vector-linear"]()


@pytest.fixture
def source(problem):
    return TeacherSource(problem.field, Hutchinson())


def even(nodes):
    return [k / nodes for k in range(nodes + 1)]


@pytest.mark.parametrize("backwards", [False, True], ids=["to data", "to noise"])
def test_integrate_is_of_second_order(gaussian, backwards):
    source, counts, errors = TeacherSource(gaussian.field, Exact()), (8, 16, 32), []
    start = 1.0 if backwards else 0.0
    x, s = gaussian.states(4, start), torch.full((4,), start)
    for nodes in counts:
        times = even(nodes)[::-1] if backwards else even(nodes)
        states, change = integrate(source, x, times)
        exact = [gaussian.jump(x, s, torch.full((4,), t)) for t in times]
        errors.append(
            [
                float((states - torch.stack([e[0] for e in exact], 1)).abs().max()),
                float((change - torch.stack([e[1] for e in exact], 1)).abs().max()),
            ]
        )
    for column in zip(*errors, strict=True):
        assert 1.4 < slope(counts, column) < 3


@pytest.mark.parametrize("from_data", [False, True], ids=["from noise", "from data"])
def test_drawn_targets_satisfy_the_map(from_data):
    """A flow whose divergence depends on the state and on the direction, so that nothing is right by symmetry."""
    flow, nodes = Logistic(), 128
    pool = TrajectoryPool(even(nodes), capacity=16)
    start = flow.data(16)
    if not from_data:
        start = flow.solve(start)[0]
    pool.add(TeacherSource(flow.velocity, Exact()), start, -1 if from_data else 0)
    x, s, t, cond, target = pool.draw(torch.rand(200), torch.rand(200))
    assert cond is None
    assert bool((s != t).all())
    pair = LogisticMap(flow)(x, s, t)
    close(pair.velocity, target.velocity, rtol=5e-3, atol=5e-3)
    close(pair.divergence, target.divergence, rtol=5e-3, atol=5e-3)
    swapped = LogisticMap(flow)(x, t, s)
    assert (swapped.divergence - target.divergence).abs().max() > 1


def test_draw_takes_the_nearest_kept_times(problem, source):
    pool = TrajectoryPool(even(4), capacity=8)
    pool.add(source, torch.randn(8, 3), 0)
    s, t = torch.tensor([0.0, 1.0, 0.3, 0.6, 0.74]), torch.tensor([1.0, 0.0, 0.9, 0.1, 0.26])
    drawn = pool.draw(s, t)
    close(drawn.s, torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75]))
    close(drawn.t, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.25]))


@pytest.mark.parametrize("direction", ["to_data", "to_noise"])
def test_draw_keeps_the_direction(problem, source, direction):
    pool = TrajectoryPool(even(8), capacity=8)
    pool.add(source, torch.randn(8, 3), 0)
    s, t = Intervals(direction, diagonal=0.0, grid=0.0).sample(500)
    drawn = pool.draw(s, t)
    assert bool((((drawn.t - drawn.s) > 0) == ((t - s) > 0)).all())


@pytest.mark.parametrize("direction", ["to_data", "to_noise"])
def test_one_directional_students_train(problem, source, direction):
    class OneWay(JointMap):
        directions = Direction.parse(direction)

        def joint(self, x, s, t, cond):
            return problem.field(x, s, t)

    objective = TrajectoryRegression(8, capacity=64, intervals=Intervals(direction), starts={"data": 0.5, "noise": 0.5})
    for _ in range(20):
        objective(OneWay(), source, problem.states(64, 1.0))


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_bound(shape, dtype):
    source = TeacherSource(lambda x, t, cond: -x)
    pool = TrajectoryPool(even(8), max_mib=0.01)
    for _ in range(20):
        pool.add(source, torch.randn(16, *shape, dtype=dtype), 0)
    held = sum(value.numel() * value.element_size() for value in (pool._states, pool._change))
    assert 0.8 * 0.01 * 2**20 < held <= 0.01 * 2**20
    assert len(pool) == pool.capacity_for(torch.zeros(1, *shape, dtype=dtype))
    assert pool.full
    # and the starting points for the checkpoint do not pile up either
    assert sum(len(e["x"]) for e in pool.state_dict()["entries"]) < len(pool) + 2 * 16


def test_memory_for_none_is_refused():
    with pytest.raises(ValueError, match="raise max_mib or keep fewer times"):
        TrajectoryPool(even(8), max_mib=1e-5).capacity_for(torch.zeros(1, 3))


def test_ring_overwrites_the_oldest():
    source = TeacherSource(lambda x, t, cond: torch.zeros_like(x))
    pool = TrajectoryPool(even(2), capacity=6)
    for value in range(1, 4):
        pool.add(source, torch.full((2, 1), float(value)), 0)
        assert len(pool) == 2 * value
    assert pool.full
    held = lambda: set(pool.draw(torch.zeros(300), torch.ones(300)).x.flatten().tolist())  # noqa: E731
    assert held() == {1.0, 2.0, 3.0}
    pool.add(source, torch.full((3, 1), 4.0), 0)
    assert held() == {2.0, 3.0, 4.0}
    assert int((pool._states[:, 0, 0] == 2).sum()) == 1
    pool.add(source, torch.full((3, 1), 5.0), 0)
    assert held() == {4.0, 5.0}
    assert [float(e["x"][0]) for e in pool.state_dict()["entries"]] == [4.0, 5.0]


def test_more_at_once_than_fit():
    source = TeacherSource(lambda x, t, cond: torch.zeros_like(x))
    pool = TrajectoryPool(even(2), capacity=3)
    pool.add(source, torch.arange(8.0)[:, None], 0)
    assert len(pool) == 3
    assert sorted(pool._states[:, 0, 0].tolist()) == [5.0, 6.0, 7.0]


@pytest.mark.parametrize("batches", [1, 3, 5, 9])
@pytest.mark.parametrize("conditional", [False, True], ids=["no cond", "cond"])
def test_checkpoint_reproduces_bit_for_bit(problem, conditional, batches):
    shift = torch.tensor([0.0, 0.5])
    source = TeacherSource(
        lambda x, t, cond: problem.field.velocity(x, t) + (0 if cond is None else shift[cond][:, None]), Hutchinson(2)
    )

    def new():
        return TrajectoryPool(even(4), capacity=20)

    def more(pool, count, seed):
        torch.manual_seed(seed)
        for k in range(count):
            cond = torch.randint(0, 2, (6,)) if conditional else None
            pool.add(source, torch.randn(6, 3), (0, -1, 2)[k % 3], cond)

    pool = new()
    more(pool, batches, 1)
    state = torch.load(_saved(pool.state_dict()), weights_only=True)
    loaded = new()
    loaded.load_state_dict(state)
    before = torch.get_rng_state()
    loaded.restore(source)
    assert torch.equal(before, torch.get_rng_state())
    for resumed in (False, True):
        if resumed:
            more(pool, 2, 2)
            more(loaded, 2, 2)
        assert len(loaded) == len(pool)
        assert torch.equal(loaded._states, pool._states)
        assert torch.equal(loaded._change, pool._change)
        assert not conditional or torch.equal(loaded._cond, pool._cond)
        s, t = torch.rand(50), torch.rand(50)
        answers = []
        for each in (pool, loaded):
            torch.manual_seed(3)
            drawn = each.draw(s, t)
            answers.append(torch.cat((drawn.x, drawn.target.velocity, drawn.target.divergence[:, None]), 1))
        assert torch.equal(*answers)


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_checkpoint_of_a_checkpoint_is_the_same(problem, source):
    """Saved again before it was restored, as by a run that only validates."""
    pool = TrajectoryPool(even(4), capacity=20)
    for _ in range(5):
        pool.add(source, torch.randn(6, 3), -1)
    again = TrajectoryPool(even(4), capacity=20)
    again.load_state_dict(pool.state_dict())
    third = TrajectoryPool(even(4), capacity=20)
    third.load_state_dict(again.state_dict())
    third.restore(source)
    assert torch.equal(third._states, pool._states)


def test_objective_resumes(problem, source):
    """Run on, or saved and loaded: the next losses are the same numbers."""
    make = lambda: TrajectoryRegression(8, capacity=64, refresh=20.0, intervals=Intervals(grid=0.5))  # noqa: E731
    objective = make()
    data = problem.states(32, 1.0)
    for _ in range(5):
        objective(problem.field, source, data)
    other = make()
    other.load_state_dict(objective.state_dict())
    losses = []
    for each in (objective, other):
        torch.manual_seed(9)
        losses.append([float(each(problem.field, source, data).loss) for _ in range(6)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("refresh", [0.0, 4.0, 8.0, 32.0])
def test_refresh_rate(problem, refresh):
    objective = TrajectoryRegression(8, capacity=64, refresh=refresh, chunk=16, starts={"data": 1.0})
    added = 0

    source, data = TeacherSource(problem.field, Hutchinson()), problem.states(32, 1.0)
    original = objective.pool.add

    def add(source, x, from_data, cond=None):
        nonlocal added
        added += len(x)
        original(source, x, from_data, cond)

    objective.pool.add = add
    for _ in range(4):
        objective(problem.field, source, data)
    assert added == 64  # fills a chunk at a time
    added = 0
    for _ in range(20):
        objective(problem.field, source, data)
    assert abs(added - 20 * refresh) <= 16


@pytest.mark.parametrize("kind", ["data", "perturbed", "noise", "student"])
def test_starts(problem, source, kind):
    """Where trajectories begin, read from the pool's own ends."""
    objective = TrajectoryRegression(8, capacity=512, chunk=512, starts={kind: 1.0}, perturbation=0.5)
    data = problem.states(512, 1.0)
    objective(problem.field, source, data)
    states = objective.pool._states
    ends, beginnings = states[:, -1], states[:, 0]
    distance = (ends - data).abs().amax(1)
    if kind == "data":
        assert torch.equal(ends, data)
    elif kind == "perturbed":
        expected = 3 * 0.5**2 / 3  # three dimensions, E[(0.5 U)^2]
        close(float((ends - data).square().sum(1).mean()), expected, rtol=0.25, atol=0.0)
    elif kind == "noise":
        close(beginnings.mean(0), torch.zeros(3), rtol=0, atol=0.2)
        close(torch.cov(beginnings.T), torch.eye(3), rtol=0, atol=0.25)
    else:
        close(torch.cov(ends.T), problem.covariances[0], rtol=0, atol=0.3)
        close(ends.mean(0), problem.means[0], rtol=0, atol=0.2)
        assert distance.median() > 0.1


def test_whole_numbers_as_shares(problem, source):
    objective = TrajectoryRegression(8, capacity=16, starts={"data": 1, "noise": 2})
    objective(problem.field, source, problem.states(16, 1.0))


def test_a_diverging_teacher_is_refused():
    pool = TrajectoryPool(even(4))
    with pytest.raises(FloatingPointError, match="became NaN or infinite"):
        pool.add(TeacherSource(lambda x, t, cond: x / 0), torch.ones(2, 3), 0)
