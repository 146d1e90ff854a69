"""The calibration study's own parts: what they measure and the variants that they try."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.flows import Joint
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.objectives import Batch, Examples
from problems import PROBLEMS as CLOSED_FORMS
from problems import Student

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from calibration_study import choices, measures, report, running, variants
from calibration_study.problems import PROBLEMS, energy_distance
from calibration_study.recipes import Recipe, inverted, official, own

close = torch.testing.assert_close


class Bent(f2.JointMap):
    """The closed form, its landing points and its divergence off by known amounts."""

    def __init__(self, closed, stretch=0.0, lift=0.0):
        super().__init__()
        self.flow, self.stretch, self.lift = closed.field, stretch, lift
        self.head = torch.nn.Module()
        self.head.baseline = closed.baseline

    def joint(self, x, s, t, cond):
        u, divergence = self.flow(x, s, t)
        return Joint(u + self.stretch * x, divergence + self.lift)


class Problem:
    """As the study's, with a Gaussian in place of a trained teacher."""

    name, dim, levels, unit = "gaussian", 3, None, "nats"
    trajectories = {"nodes": 64}  # noqa: RUF012

    def __init__(self, closed, count=40):
        self.closed = closed
        x = closed.states(count, 1.0)
        answer = f2.log_prob(closed.field, x, 1)
        kept = {"value": answer.value, "noise": answer.noise}
        self.points, self.reference = {"test": x, "train": x}, {"test": kept, "train": kept}
        self.noise = torch.randn(count, 3)
        self.teacher_samples = f2.sample(closed.field, self.noise, 1).state

        class Average(torch.nn.Module):
            def velocity(self, x, t, cond=None):
                return closed.field.velocity(x, t)

        self.teacher = torch.nn.Module()
        self.teacher.average = Average()

    def in_unit(self, value):
        return -value

    def distance(self, samples):
        return energy_distance(samples, self.teacher_samples)


@pytest.fixture
def problem():
    return Problem(CLOSED_FORMS["gaussian-vector-linear"]())


def faults(problem, joint, steps, count):
    return measures.faults(problem, joint, steps, measures.true_path(problem, joint, count))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_perfect_student_has_no_fault(problem, steps):
    found = faults(problem, Bent(problem.closed), steps, 30)
    for name in measures.PARTS:
        tolerance = 2e-3 if name == "targets" else 1e-8
        assert abs(found[name].mean) < tolerance, name
        assert found[name].deviation < tolerance, name


@pytest.mark.parametrize("steps", [1, 4])
def test_a_head_that_is_off_is_found(problem, steps):
    """A divergence that is too large by .5 takes .5 nats from every likelihood, and nothing else is at fault."""
    found = faults(problem, Bent(problem.closed, lift=0.5), steps, 30)
    for name, expected in {"all": 0.5, "path": 0.5, "own": 0.5, "map": 0.0, "prior": 0.0, "off path": 0.0}.items():
        # parts are of negative log-likelihoods
        assert found[name].mean == pytest.approx(expected, abs=1e-8), name
    assert found["fine"].mean == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_map_that_is_off_is_found(problem, steps):
    """The head is right on the true path; where the student lands elsewhere, prior and determinant tell."""
    found = faults(problem, Bent(problem.closed, stretch=0.1), steps, 30)
    assert abs(found["path"].mean) < 1e-8
    assert found["prior"].deviation > 0.01
    # the head knows nothing of the stretch; its determinant, along a Gaussian's linear jumps, is the same everywhere
    x = problem.points["test"][:1]
    state, volume = x, 0.0
    for k in range(steps):
        s, t = 1 - k / steps, 1 - (k + 1) / steps
        jump = torch.func.jacrev(
            lambda y, s=s, t=t: Bent(problem.closed, stretch=0.1).jump(y[None], s, t, None).state[0]
        )
        volume += float(torch.linalg.slogdet(jump(state[0])).logabsdet)
        state = Bent(problem.closed, stretch=0.1).jump(state, s, t, None).state
    exact = normal_log_prob(state) + volume
    one = faults(problem, Bent(problem.closed, stretch=0.1), steps, 1)
    assert one["map"].mean == pytest.approx(float(problem.reference["test"]["value"][0] - exact), abs=1e-8)


@pytest.mark.parametrize("steps", [1, 3])
def test_parts_add_up(problem, steps):
    found = faults(problem, Bent(problem.closed, stretch=0.2, lift=0.3), steps, 30)
    assert found["path"].mean + found["off path"].mean + found["prior"].mean == pytest.approx(found["all"].mean)
    assert found["own"].mean + found["map"].mean == pytest.approx(found["all"].mean)


def test_likelihoods_of_a_student_that_is_off(problem):
    found = measures.likelihoods(problem, Bent(problem.closed, lift=0.25), own, 2, 2)
    assert found["gap"] == pytest.approx(0.25)
    assert found["error"] == pytest.approx(0.25)
    assert found["gap_train"] == pytest.approx(0.25)
    assert found["r"] == pytest.approx(1.0)
    assert found["gap_error"] == pytest.approx(0.0, abs=1e-8)
    assert found["round_trip"] == pytest.approx(0.0, abs=1e-8)
    assert found["noise_error"] == pytest.approx(0.0, abs=1e-8)
    assert found["share"] == 1
    assert found["evaluations"] == 2


def test_samples_are_compared_with_the_teachers_of_the_same_noise(problem):
    found = measures.judge(problem, Bent(problem.closed), (1, 2))
    assert found["1"]["apart"] == pytest.approx(0.0, abs=1e-8)
    assert found["1"]["distance"] == pytest.approx(found["teacher"]["distance"])
    worse = measures.judge(problem, Bent(problem.closed, stretch=0.5), (1,))
    expected = (0.5 * problem.noise).square().mean().sqrt()
    assert worse["1"]["apart"] == pytest.approx(float(expected))


class Uneven(f2.JointMap):
    """Right on one interval in the middle only: a learned grid must find its edges."""

    def __init__(self, closed, good):
        super().__init__()
        self.flow, self.good = closed.field, good

    def joint(self, x, s, t, cond):
        u, divergence = self.flow(x, s, t)
        right = ((s == self.good) | (t == self.good)).to(x)
        return Joint(u, divergence + (1 - right))


@pytest.mark.parametrize("good", [0.25, 0.8125])
def test_a_learned_grid_finds_the_times_that_are_right(problem, good):
    assert measures.choose_grid(problem, Uneven(problem.closed, good), 2) == [1.0, good, 0.0]
    assert measures.choose_grid(problem, Uneven(problem.closed, good), 1) == [1.0, 0.0]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_log_snr_grid(steps):
    grid = variants.log_snr_grid(steps)
    assert len(grid) == steps + 1
    assert grid[0] == 1
    assert grid[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(grid))
    # symmetric, as the logit is
    close(torch.tensor(grid) + torch.tensor(grid[::-1]), torch.ones(steps + 1))
    inner = torch.tensor(grid[1:-1]).logit()
    if len(inner) > 2:
        close(inner.diff(), inner.diff()[:1].expand(len(inner) - 1))


def test_energy_distance_of_two_normals():
    """In one dimension ``E|a - b|`` of normals is known."""
    torch.manual_seed(0)
    a, b = torch.randn(4000, 1), torch.randn(4000, 1) + 2
    same = 2 / math.sqrt(math.pi)
    apart = 2 / math.sqrt(math.pi) * math.exp(-1) + 2 * math.erf(1)
    assert energy_distance(a, b) == pytest.approx(2 * apart - 2 * same, abs=0.05)
    assert energy_distance(a, a.flip(0) * 1.0) < 0.01


# --- variants ---


def objective_parts():
    problem = CLOSED_FORMS["gaussian-vector-linear"]()
    student = Student(problem.field)
    source = f2.objectives.TeacherSource(problem.field, f2.divergence.Exact())
    return problem, student, source, problem.states(64, 1.0)


class Fixed(f2.objectives.Objective):
    """A loss that is a given number, and remembers the progress it was told."""

    def __init__(self, value):
        super().__init__()
        self.value, self.seen = value, []

    def loss(self, student, batch):
        self.seen.append(batch.progress)
        number = torch.tensor(float(self.value))
        return f2.objectives.Terms(number, number, number, number, number)


def test_a_mixture_takes_its_parts_as_often_as_it_says():
    mixture = variants.Mixture((0.2, 0.8), Fixed(0), Fixed(1))
    torch.manual_seed(0)
    share = sum(float(mixture.loss(None, Batch(None, None)).loss) for _ in range(2000)) / 2000
    assert share == pytest.approx(0.8, abs=0.03)


def test_phases_follow_one_another_with_their_own_progress():
    parts = Fixed(1), Fixed(2)
    phases = variants.Phases((0.0, 0.75), *parts)
    losses = [float(phases.loss(None, Batch(None, None, progress=p)).loss) for p in (0.0, 0.375, 0.74, 0.75, 1.0)]
    assert losses == [1, 1, 1, 2, 2]
    assert parts[0].seen == pytest.approx([0, 0.5, 0.74 / 0.75])
    assert parts[1].seen == pytest.approx([0, 1])


def test_composed_objectives_keep_their_parts_states():
    _, student, source, data = objective_parts()
    make = lambda: variants.Phases((0.0,), f2.TrajectoryRegression(6, capacity=64))  # noqa: E731
    first = make()
    first.loss(student, Batch(data, source))
    second = make()
    second.load_state_dict(first.state_dict())
    losses = []
    for each in (first, second):
        torch.manual_seed(1)
        losses.append(float(each.loss(student, Batch(data, source)).loss.detach()))
    assert losses[0] == losses[1]


def test_a_cycle_costs_what_the_way_round_misses():
    problem, _, source, data = objective_parts()
    part = Fixed(0.0)
    cycle = variants.Cycle(part, weight=0.3, share=1.0)
    assert float(cycle.loss(Bent(problem), Batch(data, source)).loss) == pytest.approx(0.0, abs=1e-8)
    cycle.intervals.steps = (1,)
    bent = Bent(problem, stretch=0.1)
    there = bent.jump(data, 1.0, 0.0, None).state
    back = bent.jump(there, 0.0, 1.0, None).state
    expected = 0.3 * problem.baseline.deviations(back - data, torch.ones(64)).square().sum(-1).mean()
    assert expected > 0.01
    assert float(cycle.loss(bent, Batch(data, source)).loss) == pytest.approx(float(expected))


def test_uncertainty_weighting_settles_where_learned_variances_do():
    """``exp(-s) L + s`` has its minimum at ``exp(-s) = 1 / L``: both parts then weigh one."""
    weighting = variants.UncertaintyWeighting(units="velocity", divergence=1.0)
    torch.manual_seed(0)
    for _ in range(400):
        x = torch.randn(64, 3)
        off = Joint(x + 0.1 * torch.randn(64, 3), 50 * torch.randn(64))
        examples = Examples(x, torch.zeros(64), torch.ones(64), None, Joint(x, torch.zeros(64)))
        terms = weighting(off, examples)
    close(weighting.means, torch.tensor([0.01, 50**2 / 3]), rtol=0.15, atol=0)
    assert float(terms.velocity_loss) == pytest.approx(1, abs=0.5)
    assert float(terms.loss) == pytest.approx(float(terms.velocity_loss + terms.divergence_loss))


def test_averaged_targets_are_the_averages():
    problem, student, source, _ = objective_parts()
    objective = variants.AveragedTargets()
    objective.average = problem.field
    s, t = torch.full((64,), 0.2), torch.full((64,), 0.9)
    x = problem.states(64, 0.2)
    found = objective.target(student, source, f2.flows.Point(x, s), t)
    # two exact halves make an exact whole, whatever the student is
    truth = problem.field(x, s, t)
    close(found.velocity, truth.velocity)
    close(found.divergence, truth.divergence)


def test_some_trajectories_start_on_the_students_own_way():
    problem, _, source, data = objective_parts()
    intervals = f2.Intervals(steps=(2,))
    objective = variants.OwnPath(8, capacity=64, starts={"student": 1.0}, intervals=intervals)
    student = Bent(problem, stretch=0.1)
    objective.loss(student, Batch(data, source))
    landed = student.jump(data, 1.0, 0.5, None).state
    pool = objective.pool(student)
    begun = pool._entries[0]["x"]
    assert pool.times[pool._entries[0]["node"]] == 0.5
    close(begun, landed)


def test_features_without_gradient():
    network = f2.nn.MLP((3,), width=8, blocks=1)
    wrapped = variants.WithoutGradient(network)
    x, t = torch.randn(5, 3), torch.rand(5)
    u, features = wrapped.forward_features(x, t, t)
    assert not features.requires_grad
    assert u.requires_grad
    close(u, network(x, t, t))


# --- choices and runs ---


@pytest.mark.parametrize("choice", choices.CHOICES, ids=lambda c: f"{c.group}-{c.name}")
def test_every_choice_makes_a_student(choice):
    """Each changes something of the default, and its objective trains the directions that its queries need."""
    if choice.group == "starting point":
        return
    problem = dataclasses.replace(PROBLEMS[choice.problems[0]])
    if problem.name == "fashion":
        problem = dataclasses.replace(problem, data=lambda batch: f2.data.Checkerboard(count=100))
    default = Recipe.of(problem)
    recipe = choice.change(default)
    assert recipe != default
    objective = recipe.make_objective(recipe)
    wanted = {own: f2.Direction.TO_NOISE, inverted: f2.Direction.TO_DATA, official: f2.Direction.TO_DATA}
    for query in choice.queries.values():
        assert wanted[query] in objective.directions
    assert isinstance(recipe.make_head(), f2.DivergenceHead)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("name", ["starting point", "official recipe"])
def test_a_run_is_made_once_and_reported(tmp_path, name):
    """Through training, measures, table and figure, on a small board with a teacher of a few steps."""
    small = {**PROBLEMS["checkerboard"].trajectories, "capacity": 64, "nodes": 8, "chunk": 64}
    problem = dataclasses.replace(
        PROBLEMS["checkerboard"], data=lambda batch: f2.data.Checkerboard(count=400, batch_size=64), batch=64,
        tested=50, drawn=40, reference_steps=10, trajectories=small, folder=tmp_path,
    )  # fmt: skip
    teacher = f2.FlowMatchingModule(problem.network(), shape=(2,), warmup=1)
    import lightning as L

    trainer = L.Trainer(
        max_steps=5, accelerator="cpu", logger=False, limit_val_batches=0, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(teacher, problem.data(64))
    problem.__dict__["teacher"] = teacher.eval().requires_grad_(False)
    (choice,) = [c for c in choices.CHOICES if c.name == name]
    found = running.run(problem, choice, 0, 8, tmp_path / "cache")
    kept = running.run_folder(problem, choice, 0, 8) / "result.json"
    assert json.loads(kept.read_text()) == found
    written = kept.stat().st_mtime_ns
    assert running.run(problem, choice, 0, 8, tmp_path / "cache") == found
    assert kept.stat().st_mtime_ns == written
    assert found["milliseconds"] > 0
    for query in choice.queries:
        assert {k: v["evaluations"] > 0 for k, v in found["queries"][query].items()} == dict.fromkeys("1248", True)
    rows = report.rows_of(problem, [0, 1], 8)
    assert rows
    if name == "starting point":
        text = report.table(rows, problem)
        assert f"{found['queries']['']['8']['gap']:+.3f}".replace("0.", ".", 1) in text
        assert len(report.figure({"checkerboard": rows}, lambda name: "nats").axes) == 1
