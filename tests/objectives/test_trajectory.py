"""Trajectories and their pool: right to second order, within memory, and the same again after a checkpoint."""

import io
import itertools
import math

import pytest
import torch

from f2d2_lightning import (
    DivergenceHead,
    GaussianBaseline,
    Hutchinson,
    Intervals,
    JointFlowMap,
    JointMap,
    Quantization,
    TrajectoryRegression,
    Weighting,
    as_flow_map,
    log_prob,
    sample,
)
from f2d2_lightning.divergence import Exact
from f2d2_lightning.flows import Joint, TrigonometricPath
from f2d2_lightning.flows.paths import like
from f2d2_lightning.likelihood.time_grids import times_near_data
from f2d2_lightning.objectives import Batch, DiagonalSource, TeacherSource, TrajectoryPool
from f2d2_lightning.objectives.integrator import integrate, trajectory_times
from problems import PROBLEMS, Logistic, LogisticMap, Mutant, Nothing, Student, moved, slope

close = torch.testing.assert_close


@pytest.fixture
def problem():
    return PROBLEMS["gaussian-vector-linear"]()


@pytest.fixture
def source(problem):
    return TeacherSource(problem.field, Hutchinson())


def even(nodes):
    return [k / nodes for k in range(nodes + 1)]


@pytest.mark.parametrize("node", [0, 20, 64, 100, -1])
def test_drawn_targets_satisfy_the_map(node):
    """A flow whose divergence depends on the state and on the direction, so that nothing is right by symmetry."""
    flow, times = Logistic(), even(128)
    source, data = TeacherSource(flow.velocity, Exact()), flow.data(16)
    pool, from_data = (TrajectoryPool(times, capacity=16) for _ in range(2))
    from_data.add(source, data, -1)
    pool.add(source, LogisticMap(flow).jump(data, 1.0, times[node]).state, node)
    # wherever it begins, it is the same trajectory
    close(pool.ring["states"], from_data.ring["states"], rtol=0, atol=2e-3)
    changes = [each.ring["change"] - each.ring["change"][:, :1] for each in (pool, from_data)]
    close(*changes, rtol=0, atol=2e-3)
    assert changes[1][:, -1].abs().max() > 0.5
    x, s, t, cond, target = pool.draw(torch.rand(200), torch.rand(200))
    assert cond is None
    assert bool((s != t).all())
    pair = LogisticMap(flow)(x, s, t)
    close(pair.velocity, target.velocity, rtol=5e-3, atol=5e-3)
    close(pair.divergence, target.divergence, rtol=5e-3, atol=5e-3)
    swapped = LogisticMap(flow)(x, t, s)
    assert (swapped.divergence - target.divergence).abs().max() > 1


def test_draws_take_the_nearest_kept_times(source):
    pool = TrajectoryPool(even(4), capacity=8)
    pool.add(source, torch.randn(8, 3), 0)
    s, t = torch.tensor([0.0, 1.0, 0.3, 0.6, 0.74]), torch.tensor([1.0, 0.0, 0.9, 0.1, 0.26])
    drawn = pool.draw(s, t)
    close(drawn.s, torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75]))
    close(drawn.t, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.25]))
    torch.manual_seed(1)
    states, _, _ = pool.draw_whole(10, [1.0, 0.6, 0.2, 0.0])
    torch.manual_seed(1)
    assert torch.equal(states, pool.ring["states"][torch.randint(8, (10,))][:, [4, 2, 1, 0]])


@pytest.mark.parametrize("direction", ["to_data", "to_noise"])
def test_draw_keeps_the_direction(problem, source, direction):
    pool = TrajectoryPool(even(8), capacity=8)
    pool.add(source, torch.randn(8, 3), 0)
    s, t = Intervals(direction, diagonal=0.0, grid=0.0).sample(500)
    drawn = pool.draw(s, t)
    assert bool((((drawn.t - drawn.s) > 0) == ((t - s) > 0)).all())


@pytest.mark.parametrize("whole", [False, True], ids=["integrated again", "kept"])
def test_the_way_to_noise_can_be_of_data_alone(whole):
    """Which trajectories begin at data is known, in a ring that was written over and after a checkpoint too."""
    source = TeacherSource(lambda x, t, cond: torch.zeros_like(x))  # states stand still, so their values say who is who
    pool = TrajectoryPool(even(8), capacity=30)
    for node, value in ((-1, 1.0), (0, 2.0), (4, 3.0), (0, 4.0), (-1, 5.0)):
        pool.add(source, torch.full((8, 1), value), node)
    loaded = TrajectoryPool(even(8), capacity=30)
    loaded.load_state_dict(pool.state_dict(whole))
    loaded.restore(source)
    s, t = torch.rand(2, 400)
    for each in (pool, loaded):
        drawn = each.draw(s, t, likelihood_of_data=True)
        to_noise = drawn.t < drawn.s
        assert set(drawn.x[to_noise].flatten().tolist()) == {5.0}
        # eight of forty were written over, and two of the next
        assert set(drawn.x[~to_noise].flatten().tolist()) == {2.0, 3.0, 4.0, 5.0}
        assert set(each.draw(s, t).x[to_noise].flatten().tolist()) == {2.0, 3.0, 4.0, 5.0}
        for from_data, held in ((True, {5.0}), (False, {2.0, 3.0, 4.0, 5.0})):
            assert set(each.draw_whole(300, [1.0, 0.0], from_data)[0].flatten().tolist()) == held
    noise_alone = TrajectoryPool(even(8), capacity=8)
    noise_alone.add(source, torch.ones(8, 1), 0)
    assert bool((noise_alone.draw(s, t, likelihood_of_data=True).x == 1).all())


def test_a_student_asks_for_the_likelihood_of_data(problem, source):
    """The option reaches both ways of drawing, and only towards noise."""
    objective = TrajectoryRegression(
        8,
        capacity=64,
        likelihood_of_data=True,
        starts={"data": 0.5, "noise": 0.5},
        unroll=1.0,
        intervals=Intervals(diagonal=0.0),
    )
    student, data, asked = problem.field, problem.states(64, 1.0), []
    pool = objective.pool(student)
    draw, draw_whole = pool.draw, pool.draw_whole
    pool.draw = lambda s, t, of_data: asked.append(of_data) or draw(s, t, of_data)
    pool.draw_whole = lambda count, times, of_data: asked.append(of_data) or draw_whole(count, times, of_data)
    for _ in range(8):
        objective.loss(student, Batch(data, source, progress=1.0))
    assert len(asked) == 8
    assert all(asked)


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_bound(shape, dtype):
    source = TeacherSource(lambda x, t, cond: -x)
    pool = TrajectoryPool(even(8), max_mib=0.01)
    for _ in range(20):
        pool.add(source, torch.randn(16, *shape, dtype=dtype), 0)
    held = sum(value.numel() * value.element_size() for value in (pool.ring["states"], pool.ring["change"]))
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
    assert int((pool.ring["states"][:, 0, 0] == 2).sum()) == 1
    pool.add(source, torch.full((3, 1), 5.0), 0)
    assert held() == {4.0, 5.0}
    assert [float(e["x"][0]) for e in pool.state_dict()["entries"]] == [4.0, 5.0]


def test_more_at_once_than_fit():
    source = TeacherSource(lambda x, t, cond: torch.zeros_like(x))
    pool = TrajectoryPool(even(2), capacity=3)
    pool.add(source, torch.arange(8.0)[:, None], 0)
    assert len(pool) == 3
    assert sorted(pool.ring["states"][:, 0, 0].tolist()) == [5.0, 6.0, 7.0]
    # what is written over at once is neither integrated nor saved: two writes of one place race between threads
    assert sum(len(e["x"]) for e in pool.state_dict()["entries"]) == 3


def test_conditions_with_a_graph_are_refused():
    """An encoder in training would learn in the first step and end the second."""
    source = TeacherSource(lambda x, t, cond: torch.zeros_like(x))
    pool = TrajectoryPool([0.0, 1.0], baseline=None)
    with pytest.raises(ValueError, match=r"cond requires gradients.* is trained along as condition="):
        pool.add(source, torch.ones(2, 3), 0, {"series": torch.nn.Linear(3, 4)(torch.ones(2, 3))})


@pytest.mark.parametrize("batches", [1, 3, 5, 9])
@pytest.mark.parametrize("conditional", [False, True], ids=["no cond", "cond"])
@pytest.mark.parametrize("whole", [False, True], ids=["integrated again", "kept"])
def test_checkpoint_reproduces_bit_for_bit(problem, conditional, batches, whole):
    """Also one that was saved again before it was restored, as by a run that only validates."""
    shift = torch.tensor([0.0, 0.5])
    source = TeacherSource(
        lambda x, t, cond: problem.field.velocity(x, t) + (0 if cond is None else shift[cond][:, None]), Hutchinson(2)
    )

    def new(state=None):
        pool = TrajectoryPool(even(4), capacity=20)
        if state is not None:
            pool.load_state_dict(torch.load(_saved(state), weights_only=True))
        return pool

    def more(pool, count, seed):
        torch.manual_seed(seed)
        for k in range(count):
            cond = torch.randint(0, 2, (6,)) if conditional else None
            pool.add(source, torch.randn(6, 3), (0, -1, 2)[k % 3], cond)

    pool = new()
    more(pool, batches, 1)
    loaded = new(new(pool.state_dict(whole)).state_dict(whole))
    before = torch.get_rng_state()
    # what was kept whole is not asked for
    loaded.restore(TeacherSource(lambda x, t, cond: x / 0) if whole else source)
    assert torch.equal(before, torch.get_rng_state())
    for resumed in (False, True):
        if resumed:
            more(pool, 2, 2)
            more(loaded, 2, 2)
        assert len(loaded) == len(pool)
        for name in ("states", "change", "begun", *(["cond"] if conditional else [])):
            assert torch.equal(loaded.ring[name], pool.ring[name])
        s, t = torch.rand(50), torch.rand(50)
        answers = []
        for each in (pool, loaded):
            torch.manual_seed(3)
            drawn = each.draw(s, t)
            answers.append(torch.cat((drawn.x, drawn.target.velocity, drawn.target.divergence[:, None]), 1))
        assert torch.equal(*answers)


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("refresh", [0.0, 4.0, 8.0, 32.0])
def test_refresh_rate(problem, refresh):
    objective = TrajectoryRegression(8, capacity=64, refresh=refresh, chunk=16, starts={"data": 1.0})
    added = 0

    source, data = TeacherSource(problem.field, Hutchinson()), problem.states(32, 1.0)
    pool = objective.pool(problem.field)
    original = pool.add

    def add(source, x, node, cond=None):
        nonlocal added
        assert node % len(pool.times) == len(pool.times) - 1
        added += len(x)
        original(source, x, node, cond)

    pool.add = add
    for _ in range(4):
        objective.loss(problem.field, Batch(data, source))
    assert added == 64  # fills a chunk at a time
    added = 0
    for _ in range(20):
        objective.loss(problem.field, Batch(data, source))
    assert abs(added - 20 * refresh) <= 16


def test_a_full_pool_that_is_not_refreshed_stays_as_it_is(problem, source):
    """Whatever was still due, and however small a batch is."""
    objective = TrajectoryRegression(8, capacity=64, chunk=48, starts={"data": 1.0})
    for _ in range(5):
        objective.loss(problem.field, Batch(problem.states(32, 1.0), source))
    pool = objective.pool(problem.field)
    assert pool.full
    before = pool.ring["states"].clone()
    for count in (32, 8, 1):
        objective.loss(problem.field, Batch(problem.states(count, 1.0), source))
    assert torch.equal(pool.ring["states"], before)


@pytest.mark.parametrize("kind", ["data", "perturbed", "mixed", "path", "noise", "wide", "student"])
def test_starts(problem, source, kind):
    """Where trajectories begin, read from the pool's own ends."""
    objective = TrajectoryRegression(8, capacity=512, chunk=512, starts={kind: 1.0}, perturbation=(0.02, 0.8))
    data = problem.states(512, 1.0)
    objective.loss(problem.field, Batch(data, source))
    states = objective.pool(problem.field).ring["states"]
    ends, beginnings = states[:, -1], states[:, 0]
    distance = (ends - data).abs().amax(1)
    if kind == "data":
        assert torch.equal(ends, data)
    elif kind == "perturbed":
        low, high = math.log(0.02), math.log(0.8)
        squared = (ends - data).square().sum(1)
        # three dimensions; the size is uniform in its logarithm
        close(float(squared.mean()), 3 * (0.8**2 - 0.02**2) / (2 * (high - low)), rtol=0.25, atol=0.0)
        expected = (low + high) / 2 + 0.5 * (math.log(2) + float(torch.special.digamma(torch.tensor(1.5))))
        close(float(squared.log().mean()) / 2, expected, rtol=0.0, atol=0.2)
    elif kind == "mixed":
        # between a sample and one of its five nearest neighbours
        others = data[None] - data[:, None]
        moved = (ends - data)[:, None]
        share = (moved * others).sum(-1) / others.square().sum(-1).clamp(min=1e-12)
        on_line = (moved - share[..., None] * others).square().sum(-1) < 1e-18
        near = others.square().sum(-1).argsort(1).argsort(1)
        fits = on_line & (share > -1e-9) & (share < 1 + 1e-9) & (near >= 1) & (near <= 5)
        assert bool(fits.any(1).all())
        share, rank = (value[fits] for value in (share, near))
        close(float(share.mean()), 0.5, rtol=0, atol=0.06)
        assert bool((torch.bincount(rank, minlength=6)[1:] > 60).all())
    elif kind == "path":
        kept = objective.pool(problem.field)
        entries = kept.state_dict()["entries"]
        assert len(entries) == 1
        node = entries[0]["node"]
        assert 0 < node < 8
        assert torch.equal(states[:, node], entries[0]["x"])
        t = kept.times[node]
        noise = (entries[0]["x"] - t * data) / (1 - t)
        close(noise.mean(0), torch.zeros(3), rtol=0, atol=0.2)
        close(torch.cov(noise.T), torch.eye(3), rtol=0, atol=0.25)
    elif kind == "noise":
        close(beginnings.mean(0), torch.zeros(3), rtol=0, atol=0.2)
        close(torch.cov(beginnings.T), torch.eye(3), rtol=0, atol=0.25)
    elif kind == "wide":
        # the mean of exp(|n| / 2) for a normal n
        wider = 2 * math.exp(1 / 8) * 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
        close(torch.cov(beginnings.T), wider * torch.eye(3), rtol=0, atol=0.3)
    else:
        close(torch.cov(ends.T), problem.covariances[0], rtol=0, atol=0.3)
        close(ends.mean(0), problem.means[0], rtol=0, atol=0.2)
        assert distance.median() > 0.1


def test_a_diverging_teacher_is_refused():
    pool = TrajectoryPool(even(4))
    with pytest.raises(FloatingPointError, match="became NaN or infinite"):
        pool.add(TeacherSource(lambda x, t, cond: x / 0), torch.ones(2, 3), 0)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.8), (1.0, 0.6)], ids=str)
def test_exponential_scheme_is_exact_for_its_gaussian_in_one_step(gaussian, pair):
    x = gaussian.states(5, pair[0])
    states, change = integrate(TeacherSource(gaussian.field, Exact()), x, pair, baseline=gaussian.baseline)
    state, expected = gaussian.jump(x, torch.full((5,), pair[0]), torch.full((5,), pair[1]))
    close(states[:, -1], state, rtol=1e-9, atol=1e-9)
    close(change[:, -1], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(states[:, 0], x)
    assert bool((change[:, 0] == 0).all())
    # and the plain scheme is far away
    plain, _ = integrate(TeacherSource(gaussian.field, Exact()), x, pair)
    assert (plain[:, -1] - state).abs().max() > 0.02


@pytest.mark.parametrize("kind", [None, "full", "diagonal", "isotropic"])
@pytest.mark.parametrize("to_noise", [False, True], ids=["to data", "to noise"])
def test_integration_is_of_second_order(kind, to_noise):
    """Plain, and with any fit, even one that is wrong: here a flow that does not start at a normal distribution."""
    flow, counts, errors = Logistic(), (32, 64, 128), []
    data = flow.data(12)
    baseline = kind and GaussianBaseline((3,), kind).fit([flow.data(1000)])
    x = data if to_noise else flow.solve(data)[0]
    times = (1.0, 0.0) if to_noise else (0.0, 1.0)
    exact = LogisticMap(flow).jump(x, *times)
    for count in counts:
        grid = even(count)[:: -1 if to_noise else 1]
        states, change = integrate(TeacherSource(flow.velocity, Exact()), x, grid, baseline=baseline)
        missed = (states[:, -1] - exact.state).square().mean(), (change[:, -1] - exact.log_prob_change).square().mean()
        errors.append([float(error.sqrt()) for error in missed])
    for column in zip(*errors, strict=True):
        assert 1.5 < slope(counts, column) < 2.7
        assert column[-1] < 2e-2


@pytest.mark.parametrize("fit", [False, True], ids=["plain", "fit"])
def test_one_evaluation_per_step(fit):
    problem, asked = PROBLEMS["gaussian-vector-linear"](), []

    class Counting(TeacherSource):
        def __call__(self, point):
            asked.append(float(point.t[0]))
            return super().__call__(point)

    times = [0.0, 0.1, 0.4, 0.5, 1.0]
    integrate(Counting(problem.field, Exact()), torch.randn(3, 3), times, baseline=problem.baseline if fit else None)
    assert asked == times


@pytest.mark.parametrize("times", [[0.0, 0.1, 0.4, 0.5, 1.0], [1.0, 0.7, 0.65, 0.1, 0.0]], ids=str)
def test_predictor_knows_the_length_of_the_last_step(times):
    """Uneven steps: where the velocity is linear in time, all but the first prediction are exact."""
    asked = []

    def velocity(x, t, cond):
        asked.append((float(t[0]), x.clone()))
        return (1 - 4 * t)[:, None] * torch.ones_like(x)

    x = torch.randn(2, 3)
    states, _ = integrate(TeacherSource(velocity, Hutchinson(mode="finite")), x, times)
    position = lambda t: x + (t - 2 * t**2) - (times[0] - 2 * times[0] ** 2)  # noqa: E731
    for k, t in enumerate(times):
        close(states[:, k], position(t))
    seen = [(t, state) for t, state in asked if len(state) == 2]
    predictions = [state for t, state in seen if (state - position(t)).abs().max() < 1e-9]
    exact_times = {t for t, state in seen if (state - position(t)).abs().max() < 1e-9}
    assert len(predictions) >= 4
    assert exact_times == set(times) - {times[1]}


def axes_fit(*variances, path=None):
    baseline = GaussianBaseline((len(variances),), "diagonal", path)
    baseline.variances.copy_(torch.tensor(variances))
    baseline.fitted.fill_(True)
    return baseline


EIGHT_BIT = (2 / 256) ** 2 / 12  # the variance of a pixel that holds dequantization noise only
FITS = {
    "none": lambda: None,
    "wide": lambda: axes_fit(1.0, 0.5, 4.0),
    "narrow": lambda: axes_fit(1.0, 1e-2, 1e-3),
    "8 bit": lambda: axes_fit(EIGHT_BIT),
    "curved": lambda: axes_fit(1e-2, 1e-2, 1.0, path=TrigonometricPath()),
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("grids", [(1, 2, 4, 8), (3, 2), (1,), ()], ids=str)
@pytest.mark.parametrize("nodes", [1, 5, 16, 50])
def test_trajectory_times(fit, grids, nodes):
    times = trajectory_times(nodes, grids, FITS[fit]())
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert all(b - a > 1e-6 for a, b in itertools.pairwise(times))
    for k in grids:
        assert all(min(abs(t - j / k) for t in times) < 1e-12 for j in range(k + 1))
    coarse = math.lcm(*grids)
    assert abs(len(times) - 1 - nodes) <= coarse
    assert len(times) - 1 >= coarse


def test_times_are_dense_where_the_clock_is_fast():
    baseline = axes_fit(1e-3, 1e-3, 1.0)
    times = torch.tensor(trajectory_times(64, (1, 2, 4, 8), baseline))
    gaps = times.diff()
    assert gaps[-1] < 0.3 * gaps[0]
    # even steps of the clock, three tenths of plain time mixed in, within each eighth
    clock = (baseline.clock(times) + 0.3 * times) / 1.3
    for k in range(8):
        inside = (times >= k / 8) & (times <= (k + 1) / 8)
        ticks = clock[inside].diff()
        assert ticks.max() < 1.5 * ticks.min() + 1e-3
    assert clock.diff().max() < 1.6 / 64
    even_ones = torch.tensor(trajectory_times(64, (8,), None)).diff()
    close(even_ones, torch.full_like(even_ones, 1 / 64))


@pytest.mark.parametrize("nodes", [10, 32])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_share_of_the_times_lies_near_the_data(nodes, share):
    times = torch.tensor(trajectory_times(nodes, (1, 2, 4, 8), axes_fit(1e-2, 1.0), share))
    assert bool((times.diff() > 1e-6).all())
    assert all(float((times - j / 8).abs().min()) < 1e-12 for j in range(9))
    close_by = torch.tensor(times_near_data(round(share * nodes)))
    assert bool((close_by > 0.9).all() & (close_by < 0.9996).all())
    close((1 - close_by).log().diff(), (1 - close_by).log().diff()[:1].expand(len(close_by) - 1))
    assert all(float((times - t).abs().min()) < 1e-6 for t in close_by)


def test_targets_of_very_narrow_axes_are_finite():
    baseline = axes_fit(EIGHT_BIT)
    times = trajectory_times(32, (1, 2, 4, 8), baseline)
    pool = TrajectoryPool(times, capacity=8, baseline=baseline)
    pool.add(TeacherSource(lambda x, t, cond: baseline.average_velocity(x, t, t), Exact()), torch.randn(8, 1), 0)
    kept = torch.tensor(times[1:-1])
    drawn = pool.draw(kept + 1e-6, kept - 1e-6)
    assert bool((drawn.s != drawn.t).all())
    assert bool(drawn.target.velocity.isfinite().all())


@pytest.mark.parametrize("to_noise", [False, True])
def test_whole_trajectories(to_noise):
    flow = Logistic()
    pool = TrajectoryPool(even(128), capacity=8)
    shift = torch.arange(8) % 2
    pool.add(TeacherSource(flow.velocity, Exact()), flow.data(8), -1, shift)
    grid = [0.0, 0.25, 0.5, 1.0][:: -1 if to_noise else 1]
    states, change, cond = pool.draw_whole(30, grid)
    assert states.shape == (30, 4, 3)
    assert bool((change[:, 0] == 0).all())
    for k, t in enumerate(grid):
        jump = LogisticMap(flow).jump(states[:, 0], grid[0], t)
        close(states[:, k], jump.state, rtol=0, atol=2e-3)
        close(change[:, k], jump.log_prob_change, rtol=0, atol=5e-3)
    end = pool.ring["states"][:, -1]
    rows = (states[:, grid.index(1.0)][:, None] - end[None]).abs().amax(-1).argmin(1)
    assert torch.equal(cond, shift[rows])
    assert len(rows.unique()) > 4


def with_fit(problem):
    """The closed form as a student with a head, whose baseline the objective finds."""
    network = as_flow_map(lambda x, s, t, cond: problem.field(x, s, t).velocity)
    return JointFlowMap(network, DivergenceHead(network=Nothing(), baseline=problem.baseline))


def unrolling(problem, direction="both", **options):
    """An objective whose pool one batch of 64 fills, and an exact source."""
    intervals = Intervals(direction, steps=options.pop("steps", (1, 2, 4, 8)))
    options = {"starts": {"data": 1.0}, "path": problem.path, **options}
    objective = TrajectoryRegression(options.pop("nodes", 64), capacity=64, intervals=intervals, **options)
    exact = TeacherSource(problem.field, Exact())
    return objective, exact


@pytest.mark.parametrize("direction", ["both", "to_data", "to_noise"])
def test_unrolled_closed_form_costs_nothing(gaussian, direction):
    objective, source = unrolling(gaussian, direction, nodes=8)
    student, data = with_fit(gaussian), gaussian.states(64, 1.0)
    objective.loss(student, Batch(data, source))
    for steps in (1, 2, 4, 8):
        for term in objective.whole_paths(student, 16, steps):
            assert float(term) < 1e-16
    assert objective.pool(student).baseline is gaussian.baseline


@pytest.mark.parametrize("mutation", ["D flipped", "swapped directions"])
def test_unrolled_mutants_cost_where_the_divergence_depends_on_the_state(mutation):
    flow = Logistic()
    right, wrong = LogisticMap(flow), Mutant(LogisticMap(flow), mutation)
    objective = TrajectoryRegression(128, capacity=32, starts={"data": 1.0}, intervals=Intervals(steps=(2,)))
    objective.loss(right, Batch(flow.data(32), TeacherSource(flow.velocity, Exact())))
    assert float(objective.whole_paths(right, 32, 2).loss) < 1e-4
    assert float(objective.whole_paths(wrong, 32, 2).loss) > 0.1


@pytest.mark.parametrize("direction", ["both", "to_data"])
@pytest.mark.parametrize("fit", [False, True], ids=["unit variance", "fit"])
def test_unrolled_loss_is_that_of_the_whole_path(gaussian, direction, fit):
    """One trajectory: positions in standard deviations at every stop, and the whole log-likelihood, in nats."""
    wrong = Student(gaussian.field, anchored=False)
    if fit:
        network = as_flow_map(lambda x, s, t, cond: wrong(x, s, t).velocity)
        joint_map = JointFlowMap(network, DivergenceHead(network=Residual(wrong), baseline=gaussian.baseline))
    else:
        joint_map = wrong
    objective, source = unrolling(gaussian, direction, steps=(4,), nodes=8, weighting=Weighting(divergence=0.3))
    objective.capacity = 1
    data = gaussian.states(1, 1.0)
    objective.loss(joint_map, Batch(data, source))
    pool = objective.pool(joint_map)
    assert len(pool) == 1
    terms = objective.whole_paths(joint_map, 3, 4)
    to_noise = direction == "both"
    grid = [1.0, 0.75, 0.5, 0.25, 0.0] if to_noise else [0.0, 0.25, 0.5, 0.75, 1.0]
    kept = torch.stack([pool.ring["states"][:, pool.times.index(t)] for t in grid], 1)
    x, squares, moves = kept[:, 0], [], []
    for k in range(4):
        x = joint_map.jump(x, grid[k], grid[k + 1]).state
        error = (x - kept[:, k + 1]).flatten(1)
        _, covariance = gaussian.moments(torch.tensor([grid[k + 1]]))
        inverse = torch.linalg.inv(covariance[0, 0]) if fit else None
        if not fit:
            a, b, _, _ = gaussian.coefficients(torch.tensor(grid[k + 1]))
            # unit variance on the linear path, which is what a missing fit means
            a, b = torch.tensor(grid[k + 1]), 1 - torch.tensor(grid[k + 1])
            inverse = torch.eye(gaussian.dim) / (a**2 + b**2)
        squares.append((error @ inverse @ error.T).squeeze())
        moves.append((error / 0.25).square().mean())
    close(terms.velocity_loss, torch.stack(squares).mean())
    close(terms.velocity_mse, torch.stack(moves).mean())
    change = pool.ring["change"][:, -1] - pool.ring["change"][:, 0]
    if to_noise:
        noise = pool.ring["states"][:, 0].flatten(1)
        teacher = -0.5 * (noise.square().sum(-1) + gaussian.dim * math.log(2 * math.pi)) + change
        difference = log_prob(joint_map, data, 4).value - teacher
    else:
        drawn = sample(joint_map, kept[:, 0], 4, with_log_prob=True)
        noise = kept[:, 0].flatten(1)
        difference = drawn.log_prob + 0.5 * (noise.square().sum(-1) + gaussian.dim * math.log(2 * math.pi)) - change
    assert difference.abs().max() > 1e-3
    close(terms.divergence_loss, 0.3 * difference.square().mean())
    close(terms.divergence_mse, difference.square().mean())
    close(terms.loss, terms.velocity_loss + terms.divergence_loss)


class Residual(torch.nn.Module):
    """What a student's divergence is beyond the closed form's."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, x, s, t, cond):
        return self.student(x, s, t).divergence - self.student.flow(x, s, t).divergence


@pytest.mark.parametrize("part", ["velocity_loss", "divergence_loss"])
def test_gradient_of_the_unrolled_loss_against_finite_differences(part):
    problem = PROBLEMS["gaussian-vector-linear"]()
    objective, source = unrolling(problem, steps=(4,), weighting=Weighting())
    student = Student(problem.field, anchored=False)
    with torch.no_grad():
        objective.loss(student, Batch(problem.states(64, 1.0), source))

    def loss():
        torch.manual_seed(3)
        return getattr(objective.whole_paths(student, 16, 4), part)

    (gradient,) = torch.autograd.grad(loss(), student.amounts)
    for axis, slope_along in zip(torch.eye(3), gradient, strict=True):
        close(slope_along, moved(loss, student.amounts, axis), rtol=1e-5, atol=1e-6)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize(
    ("unroll", "progress", "share"), [(0.25, 0.7, 0.0), (0.25, 0.75, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 0.5)]
)
def test_phase_of_unrolling(problem, source, unroll, progress, share):
    """Every other step of the last share of training."""
    objective = TrajectoryRegression(8, capacity=8, starts={"data": 1.0}, unroll=unroll)
    data, calls = problem.states(8, 1.0), 0
    objective.loss(problem.field, Batch(data, source))
    pool = objective.pool(problem.field)
    original = pool.draw_whole

    def draw_whole(count, times, from_data=False):
        nonlocal calls
        calls += 1
        assert count == 4
        return original(count, times)

    pool.draw_whole = draw_whole
    for _ in range(60):
        objective.loss(problem.field, Batch(data, source, progress=progress))
    assert abs(calls / 60 - share) < 0.2
    assert (calls == 0) == (share == 0)


def test_pool_uses_a_fit_only_once_it_is_fitted(problem):
    fitted, empty = with_fit(problem), with_fit(problem)
    empty.head.baseline = GaussianBaseline((3,))
    plain = TrajectoryRegression(16)
    assert plain.pool(empty).baseline is None
    assert plain.pool(empty).times == even(16)
    assert plain.pool(empty) is plain.pool(fitted)
    sharp = TrajectoryRegression(16)
    assert sharp.pool(fitted).baseline is fitted.head.baseline
    assert sharp.pool(fitted).times == trajectory_times(16, (1, 2, 4, 8), fitted.head.baseline)


def test_nodes_need_not_be_a_multiple_of_the_grids(problem, source):
    objective = TrajectoryRegression(11, capacity=16, intervals=Intervals(steps=(3, 4)))
    objective.loss(problem.field, Batch(problem.states(16, 1.0), source))
    times = objective.pool(problem.field).times
    assert times == even(12)
    assert TrajectoryRegression(11, unroll=0.0, intervals=Intervals(grid=0.0)).pool(problem.field).times == even(11)


@pytest.mark.parametrize("kind", ["perturbed", "mixed"])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "levels"])
def test_starts_look_like_the_data(kind, discrete):
    """Put back on levels and dequantized afresh: whole levels plus new uniform noise, inside the range."""
    quantization = Quantization(5)
    still = TeacherSource(lambda x, t, cond: torch.zeros_like(x))
    objective = TrajectoryRegression(
        1,
        capacity=500,
        chunk=500,
        starts={kind: 1.0},
        perturbation=(1e-6, 1e-6) if kind == "perturbed" else (0.02, 0.3),
        quantization=quantization if discrete else None,
        intervals=Intervals(steps=(1,)),
    )
    # so many axes that neighbours differ along some of them
    levels = torch.randint(0, 2, (500, 12)) * 4
    data = quantization.dequantize(levels, torch.full((500, 12), 0.5))
    student = Student(with_zero_velocity())
    objective.loss(student, Batch(data, still))
    ends = objective.pool(student).ring["states"][:, -1]
    inside = (ends + 1) / quantization.width
    part = inside - inside.floor()
    if not discrete:
        assert float((part - 0.5).abs().max() if kind == "perturbed" else (part - 0.5).abs().min()) < 1e-3
        return
    assert float(ends.min()) >= -1
    assert float(ends.max()) < 1
    close(float(part.mean()), 0.5, rtol=0, atol=0.02)
    close(float(part.var()), 1 / 12, rtol=0.05, atol=0.0)
    if kind == "perturbed":
        assert torch.equal(quantization.quantize(ends), levels)
    else:
        reached = quantization.quantize(ends)
        assert bool((torch.bincount(reached.flatten(), minlength=5) > 50).all())
        assert 0.02 < float((reached != levels).double().mean()) < 0.3


def with_zero_velocity():
    class Still(JointMap):
        def joint(self, x, s, t, cond):
            return x.new_zeros(x.shape), x.new_zeros(len(x))

    return Still()


def test_conditioning_stays_with_its_state(problem):
    """Whatever the start, a trajectory is integrated with the label of the sample that it came from."""
    source = TeacherSource(lambda x, t, cond: torch.zeros_like(x) + cond[:, None])
    starts = {"data": 1, "perturbed": 1, "path": 1, "noise": 1, "wide": 1, "mixed": 1}
    objective = TrajectoryRegression(8, capacity=256, chunk=256, starts=starts)

    class Still(JointMap):
        def joint(self, x, s, t, cond):
            return problem.field(x, s, t)

    objective.loss(Still(), Batch(problem.states(256, 1.0), source, torch.arange(256) % 4))
    pool = objective.pool(Still())
    moved = (pool.ring["states"][:, -1] - pool.ring["states"][:, 0]).mean(1)
    close(moved, pool.ring["cond"].to(moved))
    drawn = pool.draw(torch.rand(100), torch.rand(100))
    close(drawn.target.velocity.mean(1), drawn.cond.to(moved))


class Moving(JointMap):
    """A student that changes while it teaches itself."""

    def __init__(self):
        super().__init__()
        self.pace = torch.nn.Parameter(torch.tensor(0.5))

    def joint(self, x, s, t, cond):
        return Joint(self.pace * torch.sin(x) + 0.1 * like(t, x), self.pace * torch.cos(x).sum(-1))


@pytest.mark.parametrize("batches", [1, 3, 7])
@pytest.mark.parametrize("changes", [False, True], ids=["teacher", "own diagonal"])
def test_an_objective_resumes(problem, source, batches, changes):
    """To the same losses. Of a student that has moved on, trajectories are kept whole; a teacher's are made again."""
    student, data = Moving(), problem.states(16, 1.0)
    source = DiagonalSource(student) if changes else source
    make = lambda: TrajectoryRegression(4, capacity=40, refresh=16.0, chunk=16, intervals=Intervals(steps=(1, 2)))  # noqa: E731
    objective, other = make(), make()
    for _ in range(batches):
        objective.loss(student, Batch(data, source))
        with torch.no_grad():
            student.pace += 0.3
    kept = objective.pool(student)
    assert ("kept" in objective.state_dict()["pool"]) == changes
    other.load_state_dict(torch.load(_saved(objective.state_dict()), weights_only=True))
    # saved again at once, as by a run that only validates
    third = make()
    third.load_state_dict(other.state_dict())
    losses = []
    for each in (objective, other, third):
        torch.manual_seed(9)
        losses.append([float(each.loss(student, Batch(data, source)).loss.detach()) for _ in range(5)])
        assert len(each.pool(student)) == len(kept)
        assert torch.equal(each.pool(student).ring["states"], kept.ring["states"])
        assert torch.equal(each.pool(student).ring["change"], kept.ring["change"])
    assert losses[0] == losses[1] == losses[2]
