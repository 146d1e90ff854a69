"""Error bars: they cover what they say of points like those that they were calibrated on, and grow with doubt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from f2d2_lightning.flows import Joint, JointMap
from f2d2_lightning.likelihood import JointModel
from f2d2_lightning.likelihood.error_bars import Disagreement, ErrorBars, kept_bars, read_bars
from f2d2_lightning.metrics import LikelihoodEvaluation


def points(count: int, seed: int) -> tuple[Disagreement, torch.Tensor]:
    """Errors whose size is that of what a model disagrees with itself by, up to a factor."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(count, generator=generator).double()  # noqa: E731
    size = (0.5 * draw()).exp()
    return Disagreement(size * draw(), 0.01 * size * draw().abs()), 3.0 * size * draw()


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.98])
def test_they_cover_what_they_say(coverage):
    covered = []
    for seed in range(40):
        bars = ErrorBars.calibrated(*points(100, seed), coverage=coverage)
        disagreement, error = points(2000, 1000 + seed)
        covered.append(float((error.abs() <= bars(disagreement)).double().mean()))
    # of one calibration by a hundred points the share scatters like a beta distribution, .03 at .9
    expected = pytest.approx(coverage, abs=4 * (coverage * (1 - coverage) / 100 / 40) ** 0.5 + 1 / 101)
    assert sum(covered) / len(covered) == expected


def test_the_quantile_is_the_conformal_one():
    # without any disagreement the bar is the score of rank ceil((n + 1) coverage)
    nothing = Disagreement(torch.zeros(19), torch.zeros(19))
    bars = ErrorBars.calibrated(nothing, torch.arange(1.0, 20.0) * -1, coverage=0.9)
    assert bars(nothing)[0] == pytest.approx(18.0)
    assert bars.count == 19


def test_a_point_that_the_model_is_of_two_minds_about_has_a_wider_one():
    bars = ErrorBars.calibrated(*points(200, 0))
    usual = bars(Disagreement(torch.zeros(1), torch.zeros(1)))
    assert float(usual) == pytest.approx(bars.width)
    for unsure in (Disagreement(torch.full((1,), 30 * bars.finer), torch.zeros(1)),
                   Disagreement(torch.zeros(1), torch.full((1,), 30 * bars.round_trip))):  # fmt: skip
        assert float(bars(unsure)) == pytest.approx(bars.width * 901**0.5)


def test_points_without_a_likelihood_are_left_out():
    disagreement, error = points(64, 0)
    error[:4] = torch.nan
    assert ErrorBars.calibrated(disagreement, error) == ErrorBars.calibrated(
        Disagreement(disagreement.finer[4:], disagreement.round_trip[4:]), error[4:]
    )


def test_they_are_kept_as_plain_values():
    bars = ErrorBars.calibrated(*points(64, 0))
    assert read_bars(kept_bars({4: bars})) == {4: bars}
    assert read_bars(None) == {}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ErrorBars.calibrated(*points(10, 0)), "10 points"),
        (lambda: ErrorBars.calibrated(*points(20, 0), coverage=0.99), "coverage=0.99 of 20 points"),
        (lambda: ErrorBars.calibrated(*points(20, 0), coverage=0.0), "coverage=0.0"),
        (lambda: ErrorBars.from_dict({"width": "wide"}), "width"),
        (lambda: ErrorBars.from_dict({"width": 1.0}), "width"),
        (lambda: ErrorBars(1.0, 1.0, -1.0, 0.9, 100), "round_trip=-1.0"),
    ],
)
def test_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


class Steep(JointMap):
    """Carries far states out of all numbers."""

    def joint(self, x, s, t, cond):
        return Joint(x.pow(5) / 50, x.pow(4).sum(1) / 10)


def test_step_counts_in_any_form():
    model, x = JointModel(Steep(), (2,)), torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for steps in (np.array([1, 2]), torch.tensor([1, 2]), []):
        model.calibrate(x, steps=steps)
        assert [*model.error_bars] == [1, 2]
        assert torch.equal(model.error_bar(x, torch.tensor(2)), model.error_bar(x, 2))


def test_a_state_that_is_lost_leaves_the_others_theirs():
    model, x = JointModel(Steep(), (2,)), torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    model.calibrate(x, steps=[2])
    expected = model.error_bar(x, 2)
    found = model.error_bar(torch.cat((x, torch.full((1, 2), 1e30))), 2)
    assert torch.equal(found[:-1], expected)
    assert not found[-1].isfinite()
    gathered = LikelihoodEvaluation((2,), 2, None, x.device)
    gathered.evaluate(model.log_prob, model.sample, torch.cat((x, torch.full((1, 2), 1e30))), None, None)
    (row,) = gathered.rows()
    assert row["unconverged"] == pytest.approx(1 / 41)
    assert row["nll"] == pytest.approx(float(model.nll(x, 2).mean()))
