"""The calibration study: every recipe makes a student, one row is made and printed, and faults are found."""

import dataclasses
import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch

import calibration
import f2d2_lightning as f2
from calibration import CHOICES, PROBLEMS
from calibration_faults import PARTS, all_faults, true_path
from f2d2_lightning.flows import Joint
from f2d2_lightning.likelihood.sampling import normal_log_prob
from measuring import agreement, energy_distance
from problems import PROBLEMS as CLOSED_FORMS


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


@pytest.fixture
def problem():
    """As the study's, with a Gaussian in place of a trained teacher."""
    closed = CLOSED_FORMS["gaussian-vector-linear"]()
    x = closed.states(40, 1.0)
    answer = f2.log_prob(closed.field, x, 1)
    return SimpleNamespace(
        closed=closed, dim=3, shape=(3,), levels=None, recipe={"trajectories": {"nodes": 64}}, points=x,
        teacher=SimpleNamespace(average=closed.field), in_unit=lambda value: -value,
        reference={"value": answer.value, "noise": answer.noise},
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3])
def test_faults_with_determinants(problem, steps):
    """Its own divergence, too large by .5, takes .5 nats from every likelihood; what is left is the bent map's."""
    bent, other = (Bent(problem.closed, stretch=0.1, lift=lift) for lift in (0.5, 0.0))
    path = true_path(problem, bent, 30)
    parts, without = (all_faults(problem, joint, steps, path) for joint in (bent, other))
    assert parts.keys() == PARTS.keys()
    assert torch.allclose(parts["targets"] + parts["head"] + parts["map"], parts["all"])
    assert torch.allclose(parts["own"] + parts["exact"], parts["all"])
    for name, part in parts.items():
        raised = 0.5 if name in ("all", "head", "own", "fine") else 0.0
        assert torch.allclose(part - without[name], torch.full_like(part, raised)), name
    # along a Gaussian's linear jumps the determinant is the same everywhere
    state, volume = problem.points[:1], 0.0
    for k in range(steps):
        s, t = 1 - k / steps, 1 - (k + 1) / steps
        slope = torch.func.jacrev(lambda y, s=s, t=t: bent.jump(y[None], s, t, None).state[0])(state[0])
        volume += float(torch.linalg.slogdet(slope).logabsdet)
        state = bent.jump(state, s, t, None).state
    exact = float(normal_log_prob(state)) + volume
    assert float(parts["exact"][0]) == pytest.approx(float(problem.reference["value"][0]) - exact, abs=1e-8)


def test_agreement_is_over_points_that_have_a_value():
    reference = torch.tensor([1.0, 2.0, 4.0, 7.0])
    value = reference + torch.tensor([0.5, -0.1, 0.2, float("nan")])
    answer = agreement(value, reference)
    assert answer["share"] == 0.75
    assert answer["gap"] == pytest.approx(0.2)
    assert answer["error"] == pytest.approx(0.8 / 3)
    assert answer["gap_error"] == pytest.approx(0.3 / 3**0.5)
    assert answer["r"] == pytest.approx(float(torch.corrcoef(torch.stack((value, reference))[:, :3])[0, 1]))


def test_energy_distance_of_two_points():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert energy_distance(a, b) == pytest.approx(2 * (1 + 5 + 1 + 3) / 4 - 2 - 4)


def test_every_choice_makes_a_student():
    """Each changes something of the default, and its objective trains the directions that its queries need."""
    start = None
    for choice in CHOICES:
        problem = dataclasses.replace(PROBLEMS[choice.problems.split()[0]])
        if problem.name == "fashion":
            problem = dataclasses.replace(problem, data=lambda batch: f2.data.Checkerboard(count=100))
        problem.__dict__["teacher"] = lambda x, t, cond=None: -x
        recipe = calibration.recipe_of(problem, choice)
        start = start or recipe
        assert (recipe != start) == (choice.group != "starting point")
        module = calibration.make_module(problem, recipe, 10, None)
        wanted = f2.Direction.TO_NOISE if "" in choice.queries else f2.Direction.TO_DATA
        assert wanted in module.objective.directions


@pytest.mark.parametrize("name", ["starting point", "official recipe"])
def test_a_row_is_made_once_and_printed(tmp_path, name):
    """Through training, measures and table, on a small board with a teacher of a few steps."""
    torch.set_default_dtype(torch.float32)
    recipe = calibration.merged(
        PROBLEMS["checkerboard"].recipe, {"trajectories": {"capacity": 64, "nodes": 8, "chunk": 64}}
    )
    problem = dataclasses.replace(
        PROBLEMS["checkerboard"], data=lambda batch: f2.data.Checkerboard(count=400, batch_size=64), batch=64,
        tested=50, drawn=40, reference_steps=10, recipe=recipe, folder=tmp_path,
    )  # fmt: skip
    teacher = f2.FlowMatchingModule(problem.network(), shape=(2,), warmup=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_steps=5, accelerator="cpu", limit_val_batches=0, enable_checkpointing=False, **quiet).fit(
        teacher, problem.data(64)
    )
    problem.__dict__["teacher"] = teacher.eval().requires_grad_(False)
    (choice,) = [c for c in CHOICES if c.name == name]
    result = calibration.run(problem, choice, 0, 8)
    file = calibration.run_file(problem, f"{choice.group}--{choice.name}", 0, 8)
    written = file.stat().st_mtime_ns
    assert calibration.run(problem, choice, 0, 8) == result == json.loads(file.read_text())
    assert file.stat().st_mtime_ns == written
    assert result["milliseconds"] > 0
    rows = [line for line in calibration.table(problem, [0, 1], 8).splitlines() if name in line]
    assert len(rows) == len(choice.queries)
    gap = result["queries"][next(iter(choice.queries))]["8"]["gap"]
    assert calibration.plain(gap, "+.3f") in rows[0]
