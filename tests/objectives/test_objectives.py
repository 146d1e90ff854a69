"""Objectives: zero at the truth, far from zero at anything else, and targets that are what they say."""

import math
import statistics

import pytest
import torch

from f2d2_lightning import (
    Direction,
    DivergenceHead,
    GaussianBaseline,
    Intervals,
    JointFlowMap,
    JointMap,
    TrajectoryRegression,
    Weighting,
    as_flow_map,
)
from f2d2_lightning.divergence import Conditional, Exact
from f2d2_lightning.flows import Joint, Point, paths
from f2d2_lightning.flows.paths import like
from f2d2_lightning.nn import MLP
from f2d2_lightning.objectives import (
    Batch,
    ConditionalSource,
    Consistency,
    DiagonalSource,
    Eulerian,
    Examples,
    Lagrangian,
    Semigroup,
    TeacherSource,
)
from f2d2_lightning.objectives._pool import busy_times
from f2d2_lightning.objectives.intervals import pick
from problems import MUTATIONS, PROBLEMS, Mutant, Nothing, Student, randomize, trace, z_score

close = torch.testing.assert_close
EXACT = {
    "semigroup midpoint": lambda path: Semigroup("midpoint", path=path),
    "semigroup random": lambda path: Semigroup("random", path=path),
    "lagrangian": lambda path: Lagrangian(path=path),
    "eulerian": lambda path: Eulerian(path=path),
    "consistency": lambda path: Consistency(path=path),
}
EVERY = {**EXACT, "trajectory": lambda path: TrajectoryRegression(nodes=16, path=path, capacity=64, refresh=0.0)}


def source_of(problem):
    return TeacherSource(problem.field, Exact())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("own", [False, True], ids=["teacher", "own diagonal"])
def test_zero_at_the_closed_form(gaussian, name, own):
    source = DiagonalSource(gaussian.field) if own else source_of(gaussian)
    terms = EXACT[name](gaussian.path).loss(gaussian.field, Batch(gaussian.states(64, 1.0), source))
    for term in terms:
        assert float(term) < 1e-18


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", EVERY)
def test_far_from_zero_at_a_mutant(gaussian, name, mutation):
    terms = EVERY[name](gaussian.path).loss(
        Mutant(gaussian.field, mutation), Batch(gaussian.states(64, 1.0), source_of(gaussian))
    )
    # the semigroup's two sides flip together; only its tenth on the diagonal sees the sign
    floor = 4e-3 if mutation == "D flipped" and name.startswith("semigroup") else 0.02
    assert float(terms.loss) > floor
    if mutation == "D flipped":
        assert float(terms.divergence_loss) > floor
        assert float(terms.divergence_mse) > 0.5
    if mutation != "D flipped":
        assert float(terms.velocity_loss) > 0.02
        assert float(terms.velocity_mse) > 0.02


@pytest.fixture(params=[(3,), (1, 2, 2)], ids=str)
def bent(request):
    """A student that is wrong everywhere, and points to try it at."""
    shape = request.param
    torch.manual_seed(1)
    backbone = randomize(MLP(shape, width=16, blocks=1))
    student = JointFlowMap(backbone, randomize(DivergenceHead(features=16, hidden=8)))
    s, t = 0.1 + 0.8 * torch.rand(6), 0.1 + 0.8 * torch.rand(6)
    teacher = randomize(MLP(shape, width=16, blocks=1), seed=2)
    return student, TeacherSource(teacher, Exact()), teacher, torch.randn(6, *shape), s, t


def instant(teacher, x, t):
    return Joint(teacher.velocity(x, t).detach(), trace(lambda y: teacher.velocity(y, t), x))


def finite(function, h=1e-5):
    ahead, behind = function(h), function(-h)
    return Joint(*((a - b).detach() / (2 * h) for a, b in zip(ahead, behind, strict=True)))


def test_lagrangian_target(bent):
    student, source, teacher, x, s, t = bent
    target = Lagrangian().target(student, source, Point(x, s), t)
    v, divergence = instant(teacher, student.jump(x, s, t).state.detach(), t)
    slope_t = finite(lambda h: student(x, s, t + h))
    close(target.velocity, v - like(t - s, x) * slope_t.velocity, rtol=1e-6, atol=1e-6)
    close(target.divergence, divergence - (t - s) * slope_t.divergence, rtol=1e-6, atol=1e-6)
    assert not target.velocity.requires_grad
    assert not target.divergence.requires_grad


@pytest.mark.parametrize("kind", [Lagrangian, Eulerian])
def test_differences_in_time_drop_out_the_same_units(bent, kind):
    _, source, _, x, s, t = bent
    backbone = randomize(MLP(x.shape[1:], width=16, blocks=1, dropout=0.5)).train()
    student, targets = JointFlowMap(backbone, randomize(DivergenceHead(features=16, hidden=8))), []
    for mode in ("forward", "finite"):
        torch.manual_seed(0)
        targets.append(kind(mode=mode, step=1e-5).target(student, source, Point(x, s), t))
    close(*targets, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [Eulerian(), Consistency()], ids=["eulerian", "consistency"])
def test_eulerian_target(bent, objective):
    student, source, teacher, x, s, t = bent
    t = torch.ones_like(t) if isinstance(objective, Consistency) else t
    target = objective.target(student, source, Point(x, s), t)
    v, divergence = instant(teacher, x, s)
    slope_s = finite(lambda h: student(x + h * v, s + h, t))
    close(target.velocity, v + like(t - s, x) * slope_s.velocity, rtol=1e-6, atol=1e-6)
    close(target.divergence, divergence + (t - s) * slope_s.divergence, rtol=1e-6, atol=1e-6)
    assert not target.velocity.requires_grad
    assert not target.divergence.requires_grad


@pytest.mark.parametrize("split", ["midpoint", "random"])
def test_semigroup_target(bent, split):
    student, source, _, x, s, t = bent
    torch.manual_seed(5)
    target = Semigroup(split).target(student, source, Point(x, s), t)
    torch.manual_seed(5)
    share = torch.full((6,), 0.5) if split == "midpoint" else torch.rand(6)
    middle = s + share * (t - s)
    first = student.jump(x, s, middle)
    second = student.jump(first.state, middle, t)
    close(target.velocity, ((second.state - x) / like(t - s, x)).detach())
    close(target.divergence, (-(first.log_prob_change + second.log_prob_change) / (t - s)).detach())
    assert not target.velocity.requires_grad


@pytest.mark.parametrize("name", ["eulerian", "semigroup midpoint", "consistency"])
def test_conditional_source_gives_the_same_mean_gradient(name):
    """The pair's own velocity is noisy, but the gradient is that of the exact marginal velocity, in the mean."""
    problem = PROBLEMS["gaussian-vector-linear"]()
    student = Student(problem.field)
    objective = EXACT[name](problem.path)
    sources = (source_of(problem), ConditionalSource(student, Conditional(0.5, Exact())))
    differences, exact = [], []
    for batch in range(25):
        data, gradients = problem.states(1024, 1.0), []
        for source in sources:
            torch.manual_seed(1000 + batch)
            gradients.append(torch.autograd.grad(objective.loss(student, Batch(data, source)).loss, student.amounts)[0])
        differences.append(gradients[1] - gradients[0])
        exact.append(gradients[0])
    differences, exact = torch.stack(differences), torch.stack(exact)
    assert z_score(differences).nan_to_num().abs().max() < 4
    # and the test would see an error of a fraction of the gradient
    assert (exact.mean(0).abs() / (differences.std(0) / 25**0.5 + 1e-3)).max() > 10


@pytest.mark.parametrize("objective", [Lagrangian(), TrajectoryRegression(nodes=8)], ids=["lagrangian", "trajectory"])
def test_conditional_source_is_refused_off_its_path(objective):
    problem = PROBLEMS["gaussian-vector-linear"]()
    source = ConditionalSource(problem.field)
    with pytest.raises(ValueError, match="ConditionalSource answers on the data pair's path"):
        objective.loss(problem.field, Batch(problem.states(8, 1.0), source))


@pytest.mark.parametrize("name", EVERY)
def test_gradient_leads_back(name):
    """Descent on a perturbed closed form finds it again: every part of the loss pulls the right way."""
    problem = PROBLEMS["gaussian-vector-linear"]()
    student = Student(problem.field, anchored=name not in ("trajectory", "semigroup midpoint"))
    objective = EVERY[name](problem.path)
    if name == "semigroup midpoint":
        objective.intervals = Intervals(diagonal=0.5, grid=0.3)
    descend(objective, student, problem)
    assert student.amounts.abs().max() < 0.06


def descend(objective, student, problem, steps=60):
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        objective.loss(student, Batch(problem.states(64, 1.0), source_of(problem))).loss.backward()
        optimiser.step()


def some_examples(count, shape):
    """Predictions, and examples with times on and off the diagonal, in both directions."""
    leaf = lambda *size: torch.randn(*size).requires_grad_(True)  # noqa: E731
    s, t = torch.rand(count), torch.rand(count)
    t[::3] = s[::3]
    predicted, target = (Joint(leaf(count, *shape), leaf(count)) for _ in range(2))
    return predicted, Examples(torch.randn(count, *shape), s, t, None, target)


def check_terms(terms, predicted, examples, velocity, divergence, weights):
    """Terms against a velocity and a divergence part per sample; the latter is ``weights`` times its squared error."""
    close(terms.velocity_loss.detach(), velocity.mean())
    close(terms.divergence_loss.detach(), divergence.mean())
    close(terms.loss, terms.velocity_loss + terms.divergence_loss)
    close(terms.velocity_mse, (predicted.velocity - examples.target.velocity).detach().square().mean())
    errors = (predicted.divergence - examples.target.divergence).detach()
    close(terms.divergence_mse, errors.square().mean())
    assert torch.autograd.grad(terms.loss, examples.target, retain_graph=True, allow_unused=True) == (None, None)
    (gradient,) = torch.autograd.grad(terms.loss, predicted.divergence)
    close(gradient, weights * 2 * errors / len(errors))


@pytest.mark.parametrize("adaptive", [0.0, 0.5, 1.0])
def test_weighting_in_units_of_velocity(adaptive):
    predicted, examples = some_examples(6, (1, 2, 3))
    terms = Weighting(divergence=0.7, adaptive=adaptive, units="velocity")(predicted, examples)
    u_error = (predicted.velocity - examples.target.velocity).detach().square().sum((1, 2, 3)) / 6
    d_error = (predicted.divergence - examples.target.divergence).detach().square() * 0.7 / 6
    u_scale, d_scale = ((e + 1e-3) ** adaptive for e in (u_error, d_error))
    check_terms(terms, predicted, examples, u_error / u_scale, d_error / d_scale, 0.7 / 6 / d_scale)


@pytest.mark.parametrize("adaptive", [0.0, 0.5])
def test_weighting_in_natural_units(gaussian, adaptive):
    """Squared Mahalanobis length of the landing error under the marginal there, and squared nats."""
    predicted, examples = some_examples(9, gaussian.shape)
    s, t = examples.s, examples.t
    terms = Weighting(divergence=0.7, adaptive=adaptive, diagonal=0.4)(predicted, examples, gaussian.baseline)
    a, b, da, db = gaussian.coefficients(s)
    deviations = torch.linalg.eigvalsh(gaussian.covariances[0]).sqrt()
    # radians per unit of time, of arctan(alpha deviation / sigma)
    rates = deviations * (da * b - a * db)[:, None] / (b[:, None] ** 2 + a[:, None] ** 2 * deviations**2)
    length = torch.where(s == t, 0.4 / rates.mean(-1).clamp(min=1.0), t - s)
    missed = length[:, None] * (predicted.velocity - examples.target.velocity).detach().flatten(1)
    _, covariances = gaussian.moments(t)
    u_error = (missed[:, None] @ torch.linalg.inv(covariances[:, 0]) @ missed[..., None]).flatten()
    d_error = 0.7 * (length * (predicted.divergence - examples.target.divergence).detach()).square()
    u_scale, d_scale = ((e + 1e-3) ** adaptive for e in (u_error, d_error))
    check_terms(terms, predicted, examples, u_error / u_scale, d_error / d_scale, 0.7 * length.square() / d_scale)
    # the deviation counts where the jump lands, not where it starts
    _, elsewhere = gaussian.moments(s)
    other = (missed[:, None] @ torch.linalg.inv(elsewhere[:, 0]) @ missed[..., None]).flatten()
    assert abs(float((other / u_scale).mean() / terms.velocity_loss.detach()) - 1) > 0.02


def test_without_a_baseline_natural_units_are_those_of_unit_variance():
    problem = PROBLEMS["gaussian-vector-linear"]()
    predicted, examples = some_examples(9, (3,))
    unit = GaussianBaseline.from_covariance(torch.zeros(3), torch.eye(3))
    for a, b in zip(Weighting()(predicted, examples), Weighting()(predicted, examples, unit), strict=True):
        close(a, b)
    assert abs(float((Weighting()(predicted, examples, problem.baseline).divergence_loss / b).detach()) - 1) > 0.1


def test_an_objective_weighs_by_its_students_baseline():
    """Found at ``student.head.baseline``; the same errors count differently without it."""
    problem = PROBLEMS["gaussian-vector-linear"]()
    network = as_flow_map(lambda x, s, t, cond: problem.field(x, s, t).velocity + torch.ones_like(x))
    head = DivergenceHead(network=Nothing(), baseline=problem.baseline)
    joint_map = JointFlowMap(network, head)

    class Hidden(JointMap):
        def joint(self, x, s, t, cond):
            return joint_map(x, s, t)

    data, losses = problem.states(64, 1.0), []
    for student in (joint_map, Hidden()):
        torch.manual_seed(0)
        losses.append(float(Eulerian().loss(student, Batch(data, source_of(problem))).loss))
    assert abs(losses[0] / losses[1] - 1) > 0.2


@pytest.mark.parametrize("to_noise", [0.7, 0.0, 1.0])
@pytest.mark.parametrize("direction", ["both", "to_data", "to_noise"])
def test_intervals(direction, to_noise):
    s, t = Intervals(direction, diagonal=0.25, grid=0.5, steps=(2, 4), to_noise=to_noise).sample(20000)
    assert float(torch.cat((s, t)).min()) >= 0
    assert float(torch.cat((s, t)).max()) <= 1
    assert abs(float((s == t).double().mean()) - 0.25) < 0.02
    low, high = torch.minimum(s, t), torch.maximum(s, t)
    up = t > s
    either = torch.zeros_like(up)
    for k in (2, 4):
        on_grid = ((high - low - 1 / k).abs() < 1e-6) & ((low * k - (low * k).round()).abs() < 1e-6)
        either |= on_grid
        assert abs(float(on_grid.double().mean()) - 0.25) < 0.02
        cells = torch.bincount((low[on_grid] * k).round().long(), minlength=k).double() / on_grid.sum()
        assert (cells - 1 / k).abs().max() < 0.03
        share = {"both": 1 - to_noise, "to_data": 1.0, "to_noise": 0.0}[direction]
        assert abs(float(up[on_grid].double().mean()) - share) < 0.02
    uniform = ~either & (s != t)
    share = {"both": 0.5, "to_data": 1.0, "to_noise": 0.0}[direction]
    assert abs(float(up[uniform].double().mean()) - share) < 0.03
    diagonal = s[s == t].double()
    assert abs(float(diagonal.mean()) - 0.5) < 0.02
    assert abs(float(diagonal.std()) - math.sqrt(1 / 12)) < 0.02


def test_intervals_are_drawn_whatever_the_default_device():
    drawn = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        counts = [Intervals(diagonal=0.25).on_diagonal(2, drawn) for _ in range(100)]
        picked = {pick((1, 2, 4), drawn) for _ in range(100)}
    assert 30 < sum(counts) < 70
    assert picked == {1, 2, 4}


def test_default_intervals():
    """A tenth on the diagonal, three on grids of 1, 2, 4 and 8 steps, of those half to noise."""
    own = Intervals()
    assert (own.diagonal, own.grid, own.to_noise, own.steps) == (0.1, 0.3, 0.5, (1, 2, 4, 8))


def test_intervals_have_a_shortest_length():
    s, t = Intervals(diagonal=0.0, grid=0.0, length=0.3).sample(2000)
    assert float((t - s).abs().min()) >= 0.3 - 1e-6
    assert abs(float((t - s).abs().mean()) - 0.65) < 0.02


@pytest.mark.parametrize("name", EVERY)
def test_anchor_answers_on_the_diagonal(name):
    """Self-distillation: the anchor is asked on the diagonal only, the source off it only."""
    problem = PROBLEMS["gaussian-vector-linear"]()
    asked = []

    class Anchor(TeacherSource):
        def __call__(self, point):
            close(point.x, problem.path.sample(*point.pair, point.t))
            asked.append(len(point.x))
            v, divergence = super().__call__(point)
            return Joint(v + 1, divergence)

    objective = EVERY[name](problem.path)
    batch = Batch(problem.states(64, 1.0), source_of(problem), anchor=Anchor(problem.field, Exact()))
    # several batches: trajectory regression asks for a whole one, or for nothing
    terms = [objective.loss(problem.field, batch) for _ in range(200)]
    if name == "consistency":
        assert asked == []
        assert max(float(found.loss) for found in terms) < 1e-18
    else:
        assert 0.04 < sum(asked) / (200 * 64) <= 0.5
        error = statistics.fmean(float(found.velocity_mse) for found in terms)
        close(error, sum(asked) / (200 * 64), rtol=0.05, atol=1e-9)


def test_consistency_only_ever_asks_for_the_data():
    problem = PROBLEMS["gaussian-vector-linear"]()

    class Watched(JointMap):
        directions = Direction.TO_DATA

        def joint(self, x, s, t, cond):
            assert bool((t == 1).all())
            return problem.field(x, s, t)

    assert float(Consistency().loss(Watched(), Batch(problem.states(16, 1.0), source_of(problem))).loss) < 1e-18


@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_what_fills_up_a_part_of_a_batch_counts_for_nothing(size):
    torch.manual_seed(0)
    velocity, path = MLP((2,), width=16, blocks=1).double().velocity, paths.LinearPath()
    data, noise, t = (*torch.randn(2, size, 2, dtype=torch.float64).unbind(), torch.rand(size, dtype=torch.float64))
    point, estimator = path.point(data, noise, t), Conditional(0.5, Exact())
    together, alone = estimator(velocity, point), [estimator(velocity, point[i : i + 1]) for i in range(size)]
    close(together.velocity, torch.cat([answer.velocity for answer in alone]))
    close(together.divergence, torch.cat([answer.divergence for answer in alone]))


def test_parts_of_a_batch_come_in_few_sizes():
    masks = [torch.arange(40) < count for count in range(41)]
    found = [paths.even_rows(mask) for mask in masks]
    assert {len(rows) for rows, _ in found} == set(range(0, 41, 5))
    assert all(torch.equal(rows[:count], mask.nonzero()[:, 0]) for mask, (rows, count) in zip(masks, found))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
def test_intervals_without_length_are_their_share_and_come_in_few_counts(share):
    intervals = Intervals(diagonal=share, grid=0.0)
    counts = [intervals.on_diagonal(11) for _ in range(4_000)]
    assert set(counts) <= {math.floor(11 * share), math.ceil(11 * share)}
    assert abs(statistics.fmean(counts) / 11 - share) < 0.003
    s, t = intervals.sample(11, on_diagonal=4)
    assert (s == t).tolist() == [True] * 4 + [False] * 7


def test_steps_of_a_grid_lie_where_places_do():
    """A step is drawn as often as there are places in it, and all else is drawn as without them."""
    intervals = Intervals("to_data", diagonal=0.0, grid=1.0, steps=(4,))
    places = torch.tensor([0.1, 0.3, 0.8, 0.85, 0.9])
    torch.manual_seed(0)
    s, t = intervals.sample(20_000, places=places)
    assert torch.allclose(t - s, torch.full_like(s, 0.25))
    shares = torch.bincount((4 * s).round().long(), minlength=4) / len(s)
    assert torch.allclose(shares, torch.tensor([0.2, 0.2, 0.0, 0.6]), atol=0.01)
    mixed = Intervals(diagonal=0.1, grid=0.5)
    torch.manual_seed(1)
    even = mixed.sample(1000, on_diagonal=100)
    torch.manual_seed(1)
    placed = mixed.sample(1000, on_diagonal=100, places=(torch.arange(1024) + 0.5) / 1024)
    assert all(torch.equal(one, other) for one, other in zip(even, placed))


def test_busy_times_share_the_clock_out():
    """Of data with narrow axes, the last step of eight to data gets more than an eighth."""
    baseline = GaussianBaseline.from_covariance(torch.zeros(2), torch.diag(torch.tensor([1.0, 1e-4])))
    times = busy_times(baseline)
    shares = 0.5 * baseline.clock(times) + 0.5 * times
    assert torch.allclose(shares, (torch.arange(1024) + 0.5) / 1024, atol=1e-3)
    assert float((times > 7 / 8).float().mean()) > 0.25
    alike = busy_times(GaussianBaseline.from_covariance(torch.zeros(2), torch.eye(2)))
    assert float((alike > 7 / 8).float().mean()) == pytest.approx(1 / 8, abs=0.04)


def test_trajectories_ask_a_teacher_for_a_whole_batch_or_for_nothing():
    objective = TrajectoryRegression(intervals=Intervals(diagonal=0.25))
    objective.structure = torch.Generator().manual_seed(0)
    counts = [objective.on_diagonal(16) for _ in range(2_000)]
    assert set(counts) == {0, 16}
    assert abs(statistics.fmean(counts) / 16 - 0.25) < 0.03
