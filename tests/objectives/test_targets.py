"""Choosing nodes and estimator: bias and noise are what they are, and the cheapest good setting is taken."""

import math

import pytest
import torch

from f2d2_lightning import F2D2Module, FlowMatchingModule, GaussianBaseline, Hutchinson, TrajectoryRegression
from f2d2_lightning.divergence import Exact
from f2d2_lightning.flows import GaussianFlow, MixtureFlow
from f2d2_lightning.modules import distillation
from f2d2_lightning.nn import MLP, PreconditionedMLP
from f2d2_lightning.objectives.targets import BIAS, NODES, NOISE, TargetChoice, choose_targets, target_log_prob
from foreign import MeanFlowModule, callback
from lightning_parts import Pair, fit, student, teacher

GRIDS = (1, 2, 4, 8)


def mixture(dim, narrow, seed=1):
    """A rotated mixture, points of it, and their Gaussian fit."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, dim, generator=generator)
    roots = torch.randn(3, dim, dim, generator=generator)
    covariances = narrow**2 * torch.eye(dim) + 0.2 * roots @ roots.mT / dim
    flow = MixtureFlow(torch.ones(3) / 3, means, covariances)
    noise = torch.randn(900, dim, generator=generator)
    x = torch.cat([m + part @ torch.linalg.cholesky(c).mT for m, c, part in zip(means, covariances, noise.split(300))])
    x = x[torch.randperm(900, generator=generator)]
    return flow, x[:64], GaussianBaseline.from_covariance(x.mean(0), x.T.cov())


@pytest.mark.parametrize(("dim", "narrow"), [(2, 0.05), (7, 0.1)])
def test_bias_is_the_distance_to_the_closed_form(dim, narrow):
    flow, x, baseline = mixture(dim, narrow)
    choice = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS)
    assert choice.good
    assert not choice.remedy()
    settings = (x, None, choice.nodes, choice.near_data, baseline, GRIDS)
    truth = flow.log_prob(x, torch.ones(64))
    off = target_log_prob(flow.velocity, Exact(), *settings, seed=0) - truth
    assert off.abs().mean() == pytest.approx(choice.bias, rel=0.05, abs=1e-4)
    assert choice.bias <= BIAS * choice.spread
    quartiles = truth.quantile(torch.tensor([0.25, 0.75]))
    assert choice.spread == pytest.approx(float(quartiles[1] - quartiles[0]) / 1.35, rel=0.02)
    if choice.nodes > NODES[0]:  # a cheaper one is not good enough
        fewer = (x, None, NODES[NODES.index(choice.nodes) - 1], choice.near_data, baseline, GRIDS)
        coarse = target_log_prob(flow.velocity, Exact(), *fewer, seed=0) - truth
        assert coarse.abs().mean() > BIAS * choice.spread


def test_a_teacher_that_learned_nothing_beyond_its_gaussian_fit_is_told():
    flow, x, baseline = mixture(2, 0.05)
    choice = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS)
    fit, truth = (log_p(x, torch.ones(64)) for log_p in (baseline.log_prob, flow.log_prob))
    assert choice.beyond_fit == pytest.approx(float((truth - fit).abs().mean()) / choice.spread, rel=0.02)
    assert not choice.only_fit
    gaussian = choose_targets(GaussianFlow(baseline).velocity, x, baseline=baseline, grids=GRIDS)
    assert gaussian.only_fit
    assert gaussian.beyond_fit < 0.005
    assert not choose_targets(flow.velocity, x, grids=GRIDS).only_fit


def test_a_callback_measures_with_the_fit_that_its_head_has(tmp_path):
    """A teacher that is the flow of this fit learned nothing beyond it; of any other fit it would have."""
    data, fitted = Pair(), GaussianBaseline((2,))
    # the callback fits to the same rows, all of them, in another order
    fitted.fit([data.splits()["train"][0]])
    f2d2 = callback(teacher=GaussianFlow(fitted).velocity, objective=TrajectoryRegression(), check=False)
    with pytest.warns(UserWarning, match="that of the Gaussian fit of the data"):
        fit(tmp_path, MeanFlowModule(), f2d2, data=data, max_steps=1, limit_val_batches=0)
    assert f2d2.objective.choice.beyond_fit < 0.005


def test_noise_is_the_scatter_of_the_estimator():
    flow, x, baseline = mixture(16, 0.3)
    choice = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS, affordable=250.0)
    assert choice.probes > 1
    settings = (x, None, choice.nodes, choice.near_data, baseline, GRIDS)
    exact = target_log_prob(flow.velocity, Exact(), *settings, seed=0)
    off = [target_log_prob(flow.velocity, choice.estimator(baseline), *settings, seed=k) - exact for k in range(4)]
    assert torch.stack(off).square().mean().sqrt() == pytest.approx(choice.noise, rel=0.3)
    enough = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS)
    assert enough.noise <= NOISE * enough.spread


@pytest.mark.parametrize("dim", [2, 16])
def test_probes_of_a_trajectory_cancel(dim):
    class Independent(Hutchinson):
        def along_path(self):
            return self

    flow, x, baseline = mixture(dim, 0.3)
    settings = (x, None, 24, 0.0, baseline, GRIDS)
    exact = target_log_prob(flow.velocity, Exact(), *settings, seed=0)
    off = {
        kind: torch.stack([target_log_prob(flow.velocity, kind(), *settings, seed=k) - exact for k in range(4)])
        for kind in (Hutchinson, Independent)
    }
    scatter = {kind: float(values.square().mean().sqrt()) for kind, values in off.items()}
    assert scatter[Hutchinson] < {2: 0.3, 16: 0.8}[dim] * scatter[Independent]
    # signs of a sample stay, and are its own
    assert abs(float(off[Hutchinson].mean())) < 4 * scatter[Hutchinson] / (4 * 64) ** 0.5


def test_many_dimensions_are_measured_with_a_probe_that_stays():
    flow, x, baseline = mixture(100, 0.3)
    truth = flow.log_prob(x, torch.ones(64))
    few = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS, affordable=3.0 * NODES[0] + 8)
    choice = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS)
    for found, factor in ((few, 2), (choice, 4)):  # what is small beside the finest grid's own error is known less well
        settings = (x, None, found.nodes, found.near_data, baseline, GRIDS)
        off = float((target_log_prob(flow.velocity, Exact(), *settings, seed=0) - truth).abs().mean())
        assert found.bias / factor < off < factor * found.bias
    assert few.bias > BIAS * few.spread >= choice.bias
    # drawn anew each time, probes scatter by several times as much
    assert choice.probes == 0 or choice.noise * choice.probes**0.5 > 3 * choice.bias


@pytest.mark.parametrize("dim", [16, 100])
@pytest.mark.parametrize("fitted", [True, False])
def test_the_spread_is_that_of_log_p_and_not_of_probes(dim, fitted):
    flow, x, baseline = mixture(dim, 0.3)
    quartiles = flow.log_prob(x, torch.ones(64)).quantile(torch.tensor([0.25, 0.75]))
    choice = choose_targets(flow.velocity, x, baseline=baseline if fitted else None, grids=GRIDS, affordable=300.0)
    assert choice.spread == pytest.approx(float(quartiles[1] - quartiles[0]) / 1.35, rel=0.1)


def test_measuring_costs_the_same_in_any_dimension():
    """A network that is slow makes it long, and not more so because an exact divergence would be affordable."""

    def rows(dim):
        flow, x, baseline = mixture(dim, 0.3)
        asked = []

        def velocity(x, t, cond):
            asked.append(len(x))
            return flow.velocity(x, t, cond)

        choose_targets(velocity, x, baseline=baseline, grids=GRIDS, estimator=Hutchinson())
        return sum(asked) / len(x)

    assert rows(64) < 2000
    assert rows(256) < 2000


def test_what_cannot_be_afforded_is_said():
    flow, x, baseline = mixture(7, 0.05)
    rich = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS)
    assert rich.good
    assert rich.cost > 80
    poor = choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS, affordable=80.0)
    assert poor.cost <= 80
    assert not poor.good
    assert "Exact()" in poor.remedy()
    assert f"{poor.noise / poor.spread:.1%}" in str(poor)
    given = choose_targets(
        flow.velocity, x, baseline=baseline, grids=GRIDS, estimator=Hutchinson(distribution="gaussian")
    )
    assert given.probes is None
    assert given.noise > NOISE * given.spread


def test_no_random_number_is_drawn_and_a_teacher_without_likelihood_is_refused():
    flow, x, baseline = mixture(2, 0.3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    choose_targets(flow.velocity, x, baseline=baseline, grids=GRIDS)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(FloatingPointError, match="finite for 0 of 64 points"):
        choose_targets(lambda x, t, c: x * math.nan, x, baseline=baseline, grids=GRIDS)


class TestRuns:
    """The module and the callback choose before the first step, keep it, and go on with it."""

    def test_module(self, tmp_path):
        module = F2D2Module(teacher=teacher(), warmup=2, reference_samples=8)
        trainer = fit(tmp_path, module, data=Pair(), max_epochs=1, enable_checkpointing=True)
        choice = module.objective.choice
        assert isinstance(choice, TargetChoice)
        assert module.objective.pool(module.joint).times[1] > 0
        assert isinstance(module.estimator, Exact if choice.probes == 0 else Hutchinson)
        assert module._targets()[1].estimator is module.estimator
        path = tmp_path / "kept.ckpt"
        trainer.save_checkpoint(path)
        again = F2D2Module(teacher=teacher(), warmup=2, reference_samples=8)
        fit(tmp_path / "again", again, data=Pair(), max_epochs=2, ckpt_path=path)
        assert again.objective.choice == choice
        assert type(again.estimator) is type(module.estimator)

    def test_a_student_of_an_untrained_teacher_is_warned(self, tmp_path):
        network = PreconditionedMLP((2,), width=8, blocks=1)
        network.baseline.fit([Pair().dataset("train").values])
        module = F2D2Module(teacher=FlowMatchingModule(network), reference_samples=8)
        with pytest.warns(UserWarning, match="teacher has not learned them"):
            fit(tmp_path, module, data=Pair(), max_epochs=1)

    @pytest.mark.parametrize(("least", "starts"), [(4, 2**24), (1_000, 2**24), (4, 30)])
    def test_as_many_trajectories_as_take_no_longer_than_training(self, tmp_path, monkeypatch, least, starts):
        monkeypatch.setattr(distillation, "CAPACITY", least)
        monkeypatch.setattr(distillation, "STARTS", starts)
        monkeypatch.setattr(distillation, "REUSED", 2)
        module = student(objective=None)
        trainer = fit(tmp_path, module, data=Pair(96), max_epochs=12)
        choice, regressed = module.objective.choice, 96 * 12
        most = min(3 * regressed / choice.cost, regressed / 2, starts / 2)
        paid = distillation.SHARE * 3 * regressed / choice.cost  # no more than this, however few
        assert choice.trajectories == int(max(min(least, paid), most))
        assert paid < 1_000
        assert module.objective.pool(module.joint).max_capacity == choice.trajectories
        path = tmp_path / "kept.ckpt"
        trainer.save_checkpoint(path)
        assert F2D2Module.load_from_checkpoint(path, teacher=teacher(), weights_only=True).objective.choice == choice
        given = student(objective=TrajectoryRegression(capacity=5))
        fit(tmp_path, given, data=Pair(96), max_epochs=1)
        assert given.objective.kept == 5

    def test_few_data_are_not_learned_by_heart(self, tmp_path):
        around, at = {"wide": 1.0}, {"data": 0.5, "noise": 0.5}
        for capacity, starts, expected in ((97, None, around), (96, None, at), (97, at, at)):
            objective = TrajectoryRegression(capacity=capacity, starts=starts)
            module = student(objective=objective)
            fit(tmp_path, module, data=Pair(96), max_epochs=1)
            assert objective.starts == expected
            again = TrajectoryRegression(capacity=capacity, starts=starts)
            again.load_state_dict(objective.state_dict())
            assert again.starts == expected

    def test_few_data_of_somebody_elses_module(self, tmp_path):
        """They are counted in the batches that it trains on, not in those that the head was fitted to."""
        for capacity, around in ((97, True), (96, False)):
            added = callback(objective=TrajectoryRegression(capacity=capacity), teacher=teacher())
            fit(tmp_path, MeanFlowModule(), added, data=Pair(96), max_epochs=1)
            assert ("wide" in added.objective.starts) == around

    def test_what_is_given_is_taken(self, tmp_path):
        module = student(estimator=Hutchinson(3))
        fit(tmp_path, module, data=Pair(), max_epochs=1)
        assert module.objective.choice is None
        assert module.estimator.probes == 3
        module = student(objective=TrajectoryRegression(capacity=64), estimator=Hutchinson(3))
        fit(tmp_path, module, data=Pair(), max_epochs=1)
        assert module.objective.choice.probes is None
        assert module.estimator.probes == 3

    def test_self_distillation_measures_nothing(self, tmp_path):
        module = F2D2Module(MLP((2,), width=16, blocks=1), (2,), warmup=2, reference_samples=8)
        fit(tmp_path, module, data=Pair(), max_epochs=1)
        assert module.objective.choice is None
