"""A diagnosis names the fault that was planted, on a flow whose map and density are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.divergence import Exact
from f2d2_lightning.flows import Joint
from f2d2_lightning.likelihood import Inversion, JointModel
from f2d2_lightning.metrics.diagnosis import KEPT, Taught, diagnose, faults, taught_path
from f2d2_lightning.objectives import DiagonalSource, TeacherSource
from f2d2_lightning.objectives.integrator import integrate, trajectory_times
from problems import Logistic, LogisticMap, ToData

FLOW = Logistic()
FINE, COARSE = trajectory_times(64, (1, 2, 4, 8)), trajectory_times(2, (1, 2))


class Bent(f2.JointMap):
    """The closed form with a stretch of its jumps, a lift of its divergence, or a ripple of it, by trajectory."""

    def __init__(self, stretch=0.0, lift=0.0, ripple=0.0):
        super().__init__()
        self.closed, self.stretch, self.lift, self.ripple = LogisticMap(FLOW), stretch, lift, ripple

    def joint(self, x, s, t, cond):
        u, divergence = self.closed(x, s, t)
        noise = torch.sin(1e5 * self.closed.jump(x, s, 0.0).state.sum(-1))
        return Joint(u + self.stretch * x, divergence + self.lift + self.ripple * noise)


class Learned(f2.JointMap):
    """Has learned to the last digit what trajectories of some nodes say."""

    def __init__(self, source, times):
        super().__init__()
        self.source, self.times = source, times

    def joint(self, x, s, t, cond):
        low, high = sorted((float(s[0]), float(t[0])))
        times = [time for time in self.times if low <= time <= high]
        states, change = integrate(self.source, x, times if s[0] < t[0] else times[::-1])
        return Joint((states[:, -1] - x) / (t - s)[:, None], -change[:, -1] / (t - s))


class Euler(f2.JointMap):
    """Goes on as it began: right in many steps only."""

    def joint(self, x, s, t, cond):
        return TeacherSource(FLOW.velocity, Exact())(f2.flows.paths.Point(x, s, None))


def exact(times=FINE, nodes=64):
    return Taught(TeacherSource(FLOW.velocity, Exact()), times, nodes)


def diagnosed(joint, taught=None, count=32, steps=(1, 2), levels=None, shift=0.0):
    x = FLOW.data(count)
    model = JointModel(joint, (3,), levels and f2.Quantization(levels), Inversion(method="newton"))
    reference = model.nll_of(FLOW.solve(x)[1]) + shift
    return diagnose(model, taught or exact(), x, reference, steps=steps)


CASES = {
    "a perfect student": (Bent(), None, "nothing"),
    "a lift of the divergence": (Bent(lift=0.7), None, "head"),
    "a lift, asked by inversion": (ToData(Bent(lift=0.7)), None, "head"),
    "a stretch of the map": (Bent(stretch=1.0), None, "map"),
    "a stretch, asked by inversion": (ToData(Bent(stretch=1.0)), None, "map"),
    "coarse targets": (Learned(TeacherSource(FLOW.velocity, Exact()), COARSE), exact(COARSE, 2), "targets"),
    "few steps": (Euler(), None, "grid"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_planted_is_named(case):
    joint, taught, whose = CASES[case]
    found = diagnosed(joint, taught, steps=(1,) if whose in ("targets", "grid") else (1, 2))
    assert {row.whose for row in found.rows} == {whose}
    for row in found.rows:
        named = {"targets": row.targets, "head": row.head, "map": row.map}
        others = [size for name, size in named.items() if name != whose]
        if whose in named:
            # nothing else is at fault, but for the head off the path, where the map leads
            assert named[whose] == pytest.approx(row.error, rel=0.05)
            assert max(others) < 0.05 * row.error


def test_noise_that_a_student_kept_is_that_of_its_probes(monkeypatch):
    """A head that is off at random by as much as is left of one probe's scatter; with exact targets it is its own."""
    monkeypatch.setattr("f2d2_lightning.metrics.diagnosis.GOAL", 1e-3)
    noisy = Taught(TeacherSource(FLOW.velocity, f2.Hutchinson(1, "gaussian")), FINE, 64)
    scatter = diagnosed(Bent(), noisy).scatter
    student = Bent(ripple=KEPT * scatter * math.pi / 2)  # the mean size of a sine is 2 / pi
    (found,) = diagnosed(student, noisy, count=200, steps=(1,)).rows
    assert (found.whose, found.probes) == ("probes", pytest.approx(KEPT * scatter, rel=0.2))
    (found,) = diagnosed(student, exact(), count=200, steps=(1,)).rows
    assert (found.whose, found.probes) == ("head", 0.0)


def test_scatter_is_that_of_one_trajectory():
    """Beside trajectories drawn many times from one point."""
    noisy, x = TeacherSource(FLOW.velocity, f2.Hutchinson(1)), FLOW.data(1).expand(2000, -1)
    path = taught_path(Taught(noisy, FINE, 64), x)
    drawn = integrate(noisy, x, FINE[::-1])[1][:, -1]
    assert float(path.scatter.std()) == pytest.approx(float(drawn.std()), rel=0.1)
    assert float(path.scatter.mean().abs()) < 4 * float(path.scatter.std()) / 2000**0.5


@pytest.mark.parametrize("dim", [3, 20])
def test_error_of_the_nodes(dim):
    """Against the closed form; above a few dimensions one probe that is kept tells it, on average over points."""
    flow = Logistic(dim)
    x = flow.data(100)
    nodes = trajectory_times(8, (1, 2, 4, 8))
    taught = Taught(TeacherSource(flow.velocity, Exact()), nodes, 8)
    found = taught_path(taught, x)
    change = integrate(taught.source, x, nodes[::-1])
    truth = flow.solve(x)[1]
    normal = torch.distributions.Normal(0.0, 1.0)
    off = normal.log_prob(change[0][:, -1]).sum(-1) - change[1][:, -1] - truth
    # the finer solution has a ninth of the error
    assert float(found.off.mean()) == pytest.approx(float(off.mean()), rel=0.2)
    assert (found.fine is None) == (dim > 16)
    if dim == 3:
        assert torch.allclose(found.fine, truth, atol=0.2 * float(off.abs().max()))


def test_own_diagonal_that_teaches_is_judged_by_the_reference():
    """Self-distillation from a diagonal whose divergence is off by .5: the student has learned just that."""
    student = Bent(lift=0.5)
    found = diagnosed(student, Taught(DiagonalSource(student), FINE, 64))
    assert [row.whose for row in found.rows] == ["targets"] * 2
    assert "own diagonal" in str(found)
    assert found.rows[0].targets == pytest.approx(0.5, rel=0.02)


def test_parts_add_up_and_bits_are_nats():
    joint, x = Bent(stretch=0.2, lift=0.3), FLOW.data(20)
    model, reference = JointModel(joint, (3,)), -FLOW.solve(x)[1]
    path = taught_path(exact(), x)
    parts = faults(model, path, reference, 2)
    assert torch.allclose(parts["targets"] + parts["head"] + parts["map"], parts["all"])
    assert torch.allclose(parts["all"], -f2.log_prob(joint, x, 2).value - reference)
    bits = JointModel(joint, (3,), f2.Quantization(17))
    for name, part in faults(bits, path, bits.nll_of(-reference), 2).items():
        assert torch.allclose(part * 3 * math.log(2), parts[name]), name


def test_a_reference_that_is_off_is_named():
    """In few dimensions a second solution with the exact divergence tells."""
    found = diagnosed(Bent(), shift=0.4)
    assert {row.whose for row in found.rows} == {"reference"}
    assert found.reference_error == pytest.approx(0.4, rel=0.02)


def test_points_without_a_value_are_left_out():
    x = FLOW.data(6)
    model, reference = JointModel(Bent(lift=0.5), (3,)), -FLOW.solve(x)[1]
    reference[2:4] = math.nan
    assert diagnose(model, exact(), x, reference, steps=(1,)).points == 4
    reference[1:] = math.nan
    with pytest.raises(ValueError, match="1 of 6 points have a likelihood"):
        diagnose(model, exact(), x, reference, steps=(1,))


def test_it_draws_nothing_and_is_the_same_again():
    before = torch.random.get_rng_state()
    noisy = Taught(TeacherSource(FLOW.velocity, f2.Hutchinson(1)), FINE, 64)
    x = FLOW.data(8)
    model, reference, after = JointModel(Bent(lift=0.5), (3,)), -FLOW.solve(x)[1], torch.random.get_rng_state()
    one, other = (diagnose(model, noisy, x, reference, steps=(1, 2)) for _ in range(2))
    assert one.rows == other.rows
    assert torch.equal(torch.random.get_rng_state(), after)
    assert not torch.equal(before, after)


def test_words_have_the_numbers_and_the_next_thing_to_do():
    found = diagnosed(CASES["coarse targets"][0], exact(COARSE, 2), steps=(1,))
    text = str(found)
    assert f"In 1 step log p is off by {found.rows[0].error:.3g} nats a point" in text
    assert f"most of it is in the targets, which are off by {found.rows[0].targets:.3g}" in text
    assert "Next: raise nodes to " in text
    assert "32 points" in text
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["whose"] == "targets"
    lifted = str(diagnosed(Bent(lift=0.7)))
    assert lifted.startswith("In 1 / 2 steps log p is off by 0.7 / 0.7 nats a point")
    assert "Next: train longer" in lifted


def test_nodes_that_are_asked_for_suffice():
    """The remedy: as many nodes as bring a student that learns from them within the goal."""
    found = diagnosed(CASES["coarse targets"][0], exact(COARSE, 2), steps=(1,))
    nodes = int(found.remedies["targets"].split()[-1])
    times = trajectory_times(nodes, (1, 2))
    again = diagnosed(Learned(exact().source, times), exact(times, nodes), steps=(1,))
    assert again.rows[0].whose == "nothing"
