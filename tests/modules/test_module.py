"""LightningModules: what is trained, what is kept, what is logged, and that an interruption changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
import types

import pytest
import torch

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.modules.ema import update_average
from f2d2_lightning.nn import MLP, AddedTime, GaussianPreconditioned, OneTimeEmbedding
from lightning_parts import Pair, fit, same, student, teacher, trainer
from problems import randomize


def test_the_teacher_learns_a_gaussian(tmp_path):
    flow_map = GaussianPreconditioned(MLP((2,), width=16, blocks=1), f2.GaussianBaseline((2,), "full"))
    module = f2.FlowMatchingModule(flow_map, warmup=2)
    data = Pair()
    run = fit(tmp_path, module, data=data, max_epochs=2)
    # the baseline was fitted to the data that it saw
    train = data.dataset("train").values
    assert torch.allclose(module.flow_map.baseline.mean, train.mean(0), atol=1e-5)
    exact = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T))
    x = data.dataset("test").values
    assert torch.allclose(f2.reference_log_prob(module.average, x).value, exact.log_prob(x), atol=0.5)
    predicted = torch.cat(run.predict(module, torch.utils.data.DataLoader(x, 40)))
    assert torch.allclose(predicted, exact.log_prob(x), atol=0.5)


def test_coupled_with_itself_data_do_not_move(tmp_path):
    """A network that begins at zero velocity is then right, in training and in validation."""
    losses = {}
    for name, coupling in (("independent", None), ("itself", lambda noise, x: x)):
        module = f2.FlowMatchingModule(MLP((2,), width=8, blocks=1), warmup=2, coupling=coupling)
        run = fit(tmp_path / name, module, max_epochs=1)
        losses[name] = [float(run.callback_metrics[key]) for key in ("train/loss", "val/loss")]
    assert losses["itself"] == [0.0, 0.0]
    assert min(losses["independent"]) > 0.5
    run.save_checkpoint(tmp_path / "teacher.ckpt")
    assert f2.load(tmp_path / "teacher.ckpt").coupling is None  # of training alone
    for wrong, came in ((lambda noise, x: x[:1], r"shape \(1, 2\)"), (lambda noise, x: (noise, x), "tuple")):
        module = f2.FlowMatchingModule(MLP((2,), width=8, blocks=1), coupling=wrong)
        with pytest.raises(ValueError, match=rf"coupling\(noise, data\) answered {came}"):
            fit(tmp_path, module, max_epochs=1)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_trained(tmp_path, frozen):
    # a flow map in both directions, as it would be without a likelihood
    torch.manual_seed(0)
    flow_map = MLP((2,), width=16, blocks=1)
    with torch.no_grad():
        flow_map.outlet.weight.normal_(0, 0.1)
    before = copy.deepcopy(flow_map.state_dict())
    module = student(flow_map=flow_map, frozen=frozen, warm_start=False)
    noise = torch.randn(5, 2)
    samples = f2.sample(flow_map.eval(), noise, 2).state
    flow_map.train()
    fit(tmp_path, module, max_epochs=2)
    same = [torch.equal(a, before[name]) for name, a in module.joint.flow_map.state_dict().items()]
    assert all(same) if frozen else not any(same[1:3])
    assert float(module.joint.head.out.weight.abs().sum()) > 0
    if frozen:
        assert torch.equal(module.sample(noise, 2).state, samples)
        assert torch.equal(f2.sample(flow_map, noise, 2).state, samples)
        # frozen, the average shares the backbone and keeps no second copy in memory
        assert module.average.flow_map is module.joint.flow_map


@pytest.mark.parametrize("directions", ["to_data", "to_noise", "both"])
def test_intervals_go_where_the_map_goes(directions):
    """Unless they were given directions, which are then not changed."""
    flow_map = MLP((2,), width=8, blocks=1, directions=directions)
    settings = {"warm_start": False, "flow_map": flow_map}
    module = student(**settings)
    assert module.objective.directions == flow_map.directions
    s, t = module.objective.intervals.sample(50)
    assert (bool((s < t).any()), bool((s > t).any())) == (directions != "to_noise", directions != "to_data")
    module.objective = f2.objectives.Semigroup()
    assert module.objective.directions == flow_map.directions
    for other in {"to_data", "to_noise", "both"} - {directions}:
        with pytest.raises(ValueError, match="set directions of both alike"):
            student(**settings, objective=f2.TrajectoryRegression(intervals=f2.Intervals(other)))


def test_modules_of_one_objective_keep_their_own_teachers_trajectories_and_directions():
    objective, modules = f2.TrajectoryRegression(nodes=16, capacity=16), []
    for deviation, directions in ((2.0, "both"), (1.0, "to_data")):
        flow = f2.flows.GaussianFlow(f2.GaussianBaseline.from_covariance(torch.zeros(2), deviation**2 * torch.eye(2)))
        network = MLP((2,), width=8, blocks=1, directions=directions)
        modules.append(f2.F2D2Module(network, teacher=flow, objective=objective))
    for module, deviation in zip(modules, (2.0, 1.0), strict=True):
        assert module.objective.directions == module.joint.directions
        source = f2.objectives.TeacherSource(module.teacher)
        module.objective.loss(module.joint, f2.objectives.Batch(torch.randn(16, 2), source))
        states = module.objective.pool(module.joint).ring["states"]
        torch.testing.assert_close(states[:, -1], deviation * states[:, 0], rtol=0.1, atol=0.1)


def test_modules_of_one_objective_keep_their_own_levels():
    objective, network = f2.TrajectoryRegression(), MLP((2,), width=8, blocks=1)
    made = [f2.F2D2Module(network, levels=levels, objective=objective).objective for levels in (17, 9)]
    assert [one.quantization.levels for one in made] == [17, 9]


def test_a_trained_student_goes_on_with_its_head(tmp_path):
    """Such as to its own density: samples stay, the head begins with the answers that it had, and the first is kept."""
    first = student()
    fit(tmp_path / "first", first, max_epochs=2)
    state = copy.deepcopy(first.state_dict())
    noise, times = torch.randn(5, 2), (torch.tensor(0.2), torch.tensor(0.9))
    objective = f2.objectives.VolumeRegression(capacity=64, chunk=32)
    settings = {"frozen": True, "objective": objective, "reference_samples": 0}
    held = f2.F2D2Module(first.average, **settings, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fit(tmp_path / "held", held, max_epochs=1)
    torch.testing.assert_close(held(noise, *times), first(noise, *times))
    second = f2.F2D2Module(first.average, **settings)
    fit(tmp_path / "second", second, max_epochs=1)
    assert torch.equal(second.sample(noise, 2).state, first.sample(noise, 2).state)
    assert not torch.allclose(second(noise, *times).divergence, first(noise, *times).divergence)
    for name, value in first.state_dict().items():
        assert torch.equal(value, state[name]), name
    # a head that is given takes the place of the trained one
    fresh = f2.DivergenceHead(first.joint.flow_map.features)
    assert f2.F2D2Module(first.average, head=fresh, **settings).joint.head is fresh


@pytest.mark.parametrize("whose", ["map", "head", "targets"])
def test_a_planted_fault_is_named(tmp_path, whose):
    """Jumps that are shifted, a divergence that is lifted, and a diagonal that teaches and is lifted."""
    module = student(steps=(1, 2), reference=f2.Reference(steps=64, probes=0), frozen=whose == "map")
    if whose == "targets":
        module = f2.F2D2Module(MLP((2,), width=16, blocks=1), (2,), steps=(1, 2), reference=module.reference)
    fit(tmp_path, module, limit_train_batches=1)
    if whose == "map":
        with torch.no_grad():
            module.average.flow_map.outlet.bias.add_(4.0)
    else:
        module.average.head.register_forward_hook(lambda head, args, answer: answer + 50.0)
    found = module.diagnose(Pair().dataset("test").values)
    assert [row.whose for row in found.rows] == [whose, whose]
    remedy = {
        "map": "train the backbone as well",
        "head": "train longer",
        "targets": "train longer, or give a teacher",
    }[whose]
    assert f"Next: {remedy}" in str(found)
    with pytest.raises(ValueError, match="was not distilled here"):
        teacher().diagnose(torch.zeros(2, 2))


def test_warm_start_scale_and_baseline(tmp_path):
    of = teacher()
    with torch.no_grad():
        of.average.outlet.weight.normal_()
    module = student(of)
    fit(tmp_path, module, limit_train_batches=1)
    x = torch.randn(4, 2)
    start = student(of)
    start.trainer = trainer(tmp_path)
    assert torch.allclose(start.joint.flow_map(x, 0.3, 0.3), of.average(x, 0.3, 0.3))
    assert bool(module.joint.head.baseline.fitted)
    assert float(module.joint.head.scale) != 1.0
    assert torch.equal(module.joint.head.scale, module.average.head.scale)


def test_a_student_with_a_second_time_starts_as_its_one_time_teacher(tmp_path):
    def backbone(two_times):
        embedding = OneTimeEmbedding(16)
        return MLP((2,), width=16, blocks=1, embedding=AddedTime(embedding) if two_times else embedding)

    of = f2.FlowMatchingModule(backbone(False), shape=(2,), warmup=2)
    randomize(of.average)
    module = student(of, flow_map=backbone(True), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit(tmp_path, module, limit_train_batches=1)
    x, s, t = torch.randn(4, 2), torch.rand(4), torch.rand(4)
    for trained in (module.joint.flow_map, module.average.flow_map):
        torch.testing.assert_close(trained(x, s, s), of.average(x, s, s), rtol=0, atol=1e-6)
        # blind to the end at first, whatever it is
        torch.testing.assert_close(trained(x, s, t), of.average(x, s, s), rtol=0, atol=1e-6)
    assert (of.average(x, s, s) - of.average(x, t, t)).abs().max() > 1e-3


@pytest.mark.parametrize("off_diagonal", ["teacher", "student"])
def test_who_teaches_off_the_diagonal(off_diagonal):
    """The teacher anchors the diagonal either way; intervals ask it, or the student's own diagonal."""
    of = teacher()
    randomize(of.average)
    module = student(
        of, objective=f2.objectives.Lagrangian(), estimator=f2.divergence.Exact(), off_diagonal=off_diagonal
    )
    randomize(module.joint)
    x, t = torch.randn(4, 2), torch.rand(4)
    source, anchor = module.make_source()
    exact = f2.divergence.Exact()(of.average.velocity, f2.flows.Point(x, t))
    expected = exact[:2] if off_diagonal == "teacher" else tuple(module.joint(x, t, t))
    for answer, known in ((anchor(f2.flows.Point(x, t)), exact[:2]), (source(f2.flows.Point(x, t)), expected)):
        for mine, theirs in zip(answer, known, strict=True):
            torch.testing.assert_close(mine, theirs.detach())
    with pytest.raises(ValueError, match="off_diagonal is 'nobody'"):
        student(of, off_diagonal="nobody")


def test_the_teacher_is_not_in_the_checkpoint(tmp_path):
    of = teacher()
    weights = copy.deepcopy(of.state_dict())
    module = student(of)
    fit(tmp_path, module).save_checkpoint(tmp_path / "student.ckpt")
    names = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in names} == {"joint", "average"}
    assert all(torch.equal(a, weights[name]) for name, a in of.state_dict().items())
    loaded = f2.F2D2Module.load_from_checkpoint(
        tmp_path / "student.ckpt", flow_map=MLP((2,), width=16, blocks=1), shape=(2,)
    )
    x = Pair().dataset("test").values
    for steps in (1, 4):
        assert torch.equal(loaded.log_prob(x, steps).value, module.log_prob(x, steps).value)


def own_student(of, objective, **kwargs):
    """Of something that is no teacher of this package."""
    settings = {"objective": objective, "reference": f2.Reference(steps=8, probes=0)}
    return f2.F2D2Module(MLP((2,), width=16, blocks=1), (2,), of, **settings, **kwargs)


KINDS = {
    "module": student,
    "function": lambda: own_student(
        f2.flows.MixtureFlow(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]), f2.objectives.Eulerian()
    ),
    "none": lambda: own_student(None, f2.objectives.Semigroup()),
}


@pytest.mark.parametrize("of", KINDS)
def test_logged_metrics_are_those_of_the_answers(tmp_path, of):
    """Of the last evaluation: without a teacher the reference follows the student."""
    module = KINDS[of]()
    logged = fit(tmp_path, module, max_epochs=2).callback_metrics
    x = Pair().dataset("val").values
    with torch.no_grad():
        reference = f2.reference_log_prob(module.teacher_velocity(), x, steps=8).value
        assert float(logged["val/reference_nll"]) == pytest.approx(-float(reference.mean()), rel=1e-5)
        for steps in (1, 2, 4, 8):
            value = module.log_prob(x, steps).value
            assert float(logged[f"val/nll_{steps}"]) == pytest.approx(-float(value.mean()), rel=1e-4)
            assert float(logged[f"val/gap_{steps}"]) == pytest.approx(float((reference - value).mean()), abs=1e-4)
            r = float(torch.corrcoef(torch.stack((reference, value)))[0, 1])
            assert float(logged[f"val/correlation_{steps}"]) == pytest.approx(r, abs=1e-3)
    assert {"train/velocity_mse", "train/divergence_mse", "train/loss"} <= set(logged)


@pytest.mark.parametrize(("count", "calls"), [(None, [40, 10]), (5, [5])])
def test_the_reference_is_computed_once_of_a_fixed_subset(tmp_path, count, calls):
    """Two validation batches, in two epochs."""
    module, found = student(reference_samples=count), []
    original = module.reference
    module.reference = lambda velocity, x, cond: found.append(len(x)) or original(velocity, x, cond)
    logged = fit(tmp_path, module, max_epochs=2).callback_metrics
    assert found == calls
    x = Pair().dataset("val").values
    with torch.no_grad():
        value = module.log_prob(x, 2).value
        reference = original(module.teacher_velocity(), x[:count], None).value
    assert float(logged["val/nll_2"]) == pytest.approx(-float(value.mean()), rel=1e-4)
    assert float(logged["val/gap_2"]) == pytest.approx(float((reference - value[:count]).mean()), abs=1e-4)
    assert len(module.agreement_values()[1]) == len(reference)


@pytest.mark.parametrize("make", [teacher, student])
def test_manual_optimisation_trains_the_average_too(tmp_path, make):
    """Bit for bit as the same steps in automatic optimisation, and once a step in a second run as well."""

    def by_hand(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(type(self).training_step(self, batch, batch_idx))
        optimizer.step()
        self.lr_schedulers().step()

    made = []
    for manual in (False, True):
        module = make()
        if manual:
            module.automatic_optimization = False
            module.training_step = types.MethodType(by_hand, module)
        for seed in (0, 1):
            torch.manual_seed(seed)
            fit(tmp_path, module, limit_val_batches=0, limit_train_batches=2)
        made.append(module)
    assert made[1]._averaged_steps == 4
    assert not made[1]._followed  # or it could not be pickled
    assert same(made[0].live, made[1].live)
    assert same(made[0].average, made[1].average)


@pytest.mark.parametrize("make", [teacher, student])
def test_a_module_is_pickled_after_a_validation(tmp_path, make):
    """Without its trainer, of which a deep copy would copy the data as well."""
    module = make()
    assert fit(tmp_path, module, limit_train_batches=1).logged_metrics.keys() & {"val/loss", "val/nll_2"}
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert same(twin, module)
        assert twin.attached is None


def test_average_follows_and_shares():
    live = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = copy.deepcopy(live)
    with torch.no_grad():
        live[0].weight.add_(1.0)
        live[1].running_mean.add_(3.0)
    expected = 0.9 * average[0].weight + 0.1 * live[0].weight
    update_average(average, live, 0.9)
    assert torch.allclose(average[0].weight, expected)
    assert torch.equal(average[1].running_mean, live[1].running_mean)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_networks_whose_weights_are_computed_are_copied(tmp_path, norm):
    """By a hook before each call, in a tensor that torch itself refuses to copy."""
    network = MLP((2,), width=8, blocks=1)
    linear = next(part for part in network.modules() if isinstance(part, torch.nn.Linear))
    norm(linear)
    network(x := torch.randn(3, 2), 0.0, 1.0)
    made = f2.FlowMatchingModule(network)
    with torch.no_grad():
        linear.bias.add_(1.0)
        update_average(made.average, network.eval(), 0.0)
    assert torch.equal(made.average(x, 0.0, 1.0), network(x, 0.0, 1.0))
    assert same(student(of=made).average.flow_map, made.average)


def test_inference_evaluates_the_average_in_evaluation_mode():
    module = student(flow_map=MLP((2,), width=16, blocks=1, dropout=0.5), warm_start=False)
    module.train()
    with torch.no_grad():
        for p in module.average.parameters():
            p.normal_(0, 0.2)
    x = torch.randn(3, 2)
    assert torch.equal(module.log_prob(x, 2).value, module.log_prob(x, 2).value)
    assert torch.equal(module(x, 0.0, 1.0).velocity, module.average(x, 0.0, 1.0).velocity)


def test_gradients_reach_the_input():
    module = student()
    x = torch.randn(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(module.log_prob(x, 2).value.sum(), x)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().sum()) > 0


class Wrong(Pair):
    shape = (3,)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (
            lambda p: student(objective=f2.objectives.Semigroup(intervals=f2.Intervals("to_data"))),
            "directions of both alike",
        ),
        (lambda p: f2.F2D2Module(), "flow_map is needed"),
        (lambda p: student(ema_decay=1.0), r"ema_decay=1.0; it lies in \[0, 1\)"),
        (lambda p: fit(p, student(), data=Wrong()), r"shape=\(2,\), but Wrong has shape=\(3,\)"),
        (lambda p: fit(p, student(levels=17), data=f2.data.Digits()), "make them agree"),
        (lambda p: fit(p, f2.F2D2Module(MLP((2,)), (2,), str(p / "none.ckpt"))), "there is no checkpoint at"),
        (lambda p: fit(p, student(flow_map=MLP((2,), width=8))), "cannot start from the teacher's weights"),
        (lambda p: f2.F2D2Module(MLP((2,)), (2,), 3), "the teacher is a int"),
        (lambda p: f2.F2D2Module(MLP((2,)).requires_grad_(False), (2,), lambda x, t, cond: -x), "requires gradients"),
        (lambda p: student().data_to_state(torch.zeros(2, 5)), r"shape \(2, 5\), but the module was made for \(B, 2\)"),
        (lambda p: student().sample(0), "samples=0; it must be at least 1"),
    ],
)
def test_errors(tmp_path, make_it, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_it(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    fit(tmp_path, teacher()).save_checkpoint(tmp_path / "teacher.ckpt")
    other = f2.FlowMatchingModule(MLP((2,), width=8, blocks=1), shape=(2,))
    with pytest.raises(ValueError, match="checkpoint is of another model"):
        fit(tmp_path, other, ckpt_path=tmp_path / "teacher.ckpt")


def test_the_default_student_drops_nothing():
    """A copy of a teacher that was trained with dropout; a network that is given stays as it is."""
    network = MLP((2,), width=16, blocks=1, dropout=0.3)
    of = f2.FlowMatchingModule(network, shape=(2,))
    rates = lambda module: {part.p for part in module.modules() if isinstance(part, torch.nn.Dropout)}  # noqa: E731
    assert rates(student(of).joint) == {0.0}
    assert rates(of) == {0.3}
    assert rates(student(of, flow_map=copy.deepcopy(network)).joint.flow_map) == {0.3}


@pytest.mark.parametrize("levels", [None, 16])
def test_the_head_is_compared_with_the_maps_own_density(tmp_path, levels):
    """Of the first samples, in the unit of likelihoods; one tenth more divergence is a tenth of a nat above."""
    module = f2.F2D2Module(f2.nn.PreconditionedMLP((2,), width=8), levels=levels, low=-9.0, high=9.0, steps=(1, 2))
    run = trainer(tmp_path)
    metrics = []
    for lift in (0.0, 0.1):
        torch.nn.init.constant_(module.average.head.out.bias, lift / float(module.average.head.scale))
        metrics.append(run.validate(module, datamodule=Pair(), verbose=False)[0])
    x = Pair().dataset("val").values
    unit = 1.0 if levels is None else 2 * math.log(2)
    for k in (1, 2):
        above = module.log_prob(x, k, determinant="exact").value - module.log_prob(x, k).value
        assert metrics[1][f"val/own_density_gap_{k}"] == pytest.approx(float(above.detach().mean()) / unit, abs=1e-5)
        error = metrics[1][f"val/own_density_error_{k}"]
        assert error == pytest.approx(float(above.detach().abs().mean()) / unit, abs=1e-5)
        # to noise the elapsed time is -1
        assert metrics[1][f"val/own_density_gap_{k}"] - metrics[0][f"val/own_density_gap_{k}"] == pytest.approx(
            0.1 / unit, abs=1e-5
        )


def test_a_short_run_does_not_pay_for_estimates_of_its_own_density(tmp_path):
    """Above 256 dimensions they cost what many steps of training do; a validation by itself makes them."""
    data = torch.randn(8, 1, 17, 17)
    loaders = [torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)]
    network = f2.nn.PreconditionedUNet((1, 17, 17), width=4, multipliers=(1,), blocks=1)
    objective = f2.TrajectoryRegression(nodes=2, capacity=8, unroll=0.0)
    module = f2.F2D2Module(network, objective=objective, steps=(1,), reference=f2.Reference(steps=1, probes=1))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, *loaders)
    assert "val/nll_1" in run.callback_metrics
    assert not any("own_density" in name for name in run.callback_metrics)
    assert "val/own_density_gap_1" in run.validate(module, loaders[1], verbose=False)[0]


def test_a_validation_calibrates_error_bars_and_a_test_counts_what_they_cover(tmp_path):
    of = teacher()
    fit(tmp_path, of)
    module = f2.F2D2Module(teacher=of, steps=(1, 2), reference=f2.Reference(steps=16))
    with pytest.raises(ValueError, match="no error bars for 2 steps"):
        module.error_bar(torch.randn(3, 2), 2)
    run = fit(tmp_path, module)
    run.validate(module, datamodule=Pair(), verbose=False)
    x = Pair().dataset("val").values
    # by hand, on the points of the validation
    of_validation = dict(module.error_bars)
    module.calibrate(x)
    for k in (1, 2):
        assert module.error_bars[k].width == pytest.approx(of_validation[k].width, rel=1e-3)
        off = (module.log_prob(x, k).value - module.reference_log_prob(of.average.velocity, x).value).abs()
        assert float((off <= module.error_bar(x, k, batch_size=7)).double().mean()) >= 0.9
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = f2.load(tmp_path / "a.ckpt")
    assert again.error_bars == module.error_bars
    # of a model from a folder, which says no step counts of its own
    kept = {"shape": (2,), "error_bars": module.error_bars}
    folder = f2.load(f2.save_pretrained(module.average, tmp_path / "folder", **kept))
    folder.calibrate(x)
    assert list(folder.error_bars) == [1, 2]
    folder.error_bars = {}
    with pytest.raises(ValueError, match=r"calibrate\(x, steps=\[1, 2, 4, 8\]\)"):
        folder.calibrate(x)
    metrics = run.test(module, datamodule=Pair(), verbose=False)[0]
    unseen = Pair().dataset("test").values
    off = module.log_prob(unseen, 2).value - module.reference_log_prob(of.average.velocity, unseen).value
    bar = module.error_bar(unseen, 2)
    assert metrics["test/error_covered_2"] == pytest.approx(float((off.abs() <= bar).float().mean()), abs=1e-6)
    assert metrics["test/error_bar_2"] == pytest.approx(float(bar.mean()), rel=1e-4)
