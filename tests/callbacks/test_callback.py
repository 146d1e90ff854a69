"""F2D2Callback on LightningModules that know nothing of it: each way that such a callback can silently break."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import nn

import f2d2_lightning as f2
from command_line import single_precision  # noqa: F401
from f2d2_lightning.adapters import Adapter, Consistency, FlowMatching, MeanFlow
from f2d2_lightning.callbacks._auxiliary import AddedWeights
from f2d2_lightning.callbacks._wrapping import overrides
from f2d2_lightning.checkpoints.export import make_head
from f2d2_lightning.modules import evaluation
from f2d2_lightning.objectives import Batch, Objective, Terms
from foreign import ManualModule, MeanFlowModule, MeanNet, callback, of_pytorch_lightning
from lightning_parts import Pair, same, trainer, weights
from lightning_parts import fit as train


class Record(L.Callback):
    """The module's own losses, learning rates and weights as they come."""

    def __init__(self, stop=None, fail=None):
        self.losses, self.rates, self.stop, self.fail = [], [], stop, fail

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics.get("train/loss", torch.nan)))
        if trainer.global_step == self.stop:
            trainer.should_stop = True
        if trainer.global_step == self.fail:
            raise RuntimeError("a failure in training")


def fit(folder, module, *callbacks, **kwargs):
    torch.manual_seed(0)
    return train(folder, module, *callbacks, **({"max_epochs": 3} | kwargs))


class Normed(MeanFlowModule):
    """Running statistics are state too, and forward-mode derivatives cannot pass a training one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        torch.manual_seed(5)
        self.net.middle = nn.Sequential(nn.SiLU(), nn.BatchNorm1d(32), nn.Linear(32, 32))


@pytest.mark.parametrize("make", [MeanFlowModule, ManualModule, Normed])
def test_frozen_training_is_the_same_to_the_bit_without_the_callback(tmp_path, make):
    """Weights, losses, random numbers (dropout, noise, order), and so samples."""
    plain, added, records = make(dropout=0.3), make(dropout=0.3), (Record(), Record())
    fit(tmp_path, plain, records[0])
    f2d2 = callback(frozen=True)
    fit(tmp_path, added, f2d2, records[1])
    assert same(plain, added)
    assert records[0].losses == pytest.approx(records[1].losses, nan_ok=True, abs=0)
    noise = torch.randn(4, 2)
    expected = noise - added.eval().net(noise, (torch.ones(4), torch.ones(4)))
    assert torch.equal(f2d2.sample(noise, 1).state, expected)
    assert f2d2.added.steps > 0
    assert f2d2.added.average["head"].out.weight.abs().max() > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_modules_and_trainers_of_pytorch_lightning_come_to_the_same_numbers(tmp_path, frozen):
    """``import pytorch_lightning as pl``: other classes, of the same code. Trained in one go, and resumed."""
    written = of_pytorch_lightning()
    assert issubclass(written.MeanFlowModule, pytorch_lightning.LightningModule)
    points = torch.randn(96, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 0.8], [0.0, 0.3]])
    loader = torch.utils.data.DataLoader(points, 32)

    def trained(library, base, *lengths):
        class Seeded(base):
            def on_train_batch_start(self, batch, batch_idx):
                torch.manual_seed(1000 * self.current_epoch + batch_idx)

        path = None
        for length in lengths:
            module, f2d2 = Seeded(), callback(frozen=frozen)
            run = library.Trainer(max_epochs=length, callbacks=[f2d2], default_root_dir=tmp_path, accelerator="cpu")
            run.fit(module, loader, loader, ckpt_path=path, weights_only=False)
            run.save_checkpoint(path := tmp_path / "kept.ckpt")
        assert overrides(module, "training_step")
        assert not overrides(module, "configure_model")
        return f2d2.log_prob(points, 2).value, {name: float(value) for name, value in run.callback_metrics.items()}

    value, logged = trained(L, MeanFlowModule, 2)
    assert "val/f2d2_gap_2" in logged
    for lengths in ((2,), (1, 2)):
        again, logged_again = trained(pytorch_lightning, written.MeanFlowModule, *lengths)
        assert torch.equal(again, value)
        assert logged_again == logged


class Known(Objective):
    """``mean(u^2) + mean(D^2)`` at ``(x, 0.9, 0.2)``: a gradient that can be written down."""

    def __init__(self):
        super().__init__(f2.Intervals("both"))

    def loss(self, student, batch):
        u, divergence = student(batch.data, 0.9, 0.2, batch.cond)
        loss = u.square().mean() + divergence.square().mean()
        return Terms(loss, *(loss.detach() for _ in range(4)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make", [MeanFlowModule, ManualModule, "dict"])
def test_gradients_are_those_of_the_sum_of_both_losses(tmp_path, make, frozen, accumulate):
    """Of the backbone and of the head, at one step, against autograd by hand."""
    if make is ManualModule and accumulate > 1:
        pytest.skip("manual optimisation accumulates by hand")
    module = MeanFlowModule(as_dict=True) if make == "dict" else make()
    f2d2 = callback(objective=Known(), frozen=frozen, weight=0.7, gradient_clip=None, check=False, batch_share=1.0)
    seen, batches, draws = {}, [], []
    original = module.loss

    def loss(batch):
        draws.append(torch.get_rng_state())
        batches.append(batch)
        return original(batch)

    module.loss = loss

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.update({n: p.grad.clone() for n, p in pl_module.net.named_parameters() if p.grad is not None})

    head_gradients = []
    step = AddedWeights.step

    def spy(self, *args, **kwargs):
        head_gradients.append([p.grad.clone() for p in self.parameters])
        return step(self, *args, **kwargs)

    start = {}

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                f2d2.added.live["head"].out.weight.normal_(generator=torch.Generator().manual_seed(1))
            start["net"] = copy.deepcopy(pl_module.net)
            start["head"] = copy.deepcopy(f2d2.added.live["head"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AddedWeights, "step", spy)
        extra = {} if make is ManualModule else {"accumulate_grad_batches": accumulate}
        # ours comes last: gradients are looked at before its step clears them
        fit(tmp_path, module, Gradients(), f2d2, Start(), max_epochs=1, limit_val_batches=0,
            limit_train_batches=accumulate, **extra)  # fmt: skip
    net, head = start["net"], start["head"]
    joint = f2.JointFlowMap(MeanFlow(directions="both")(net), head)
    twin = MeanFlowModule()
    twin.net = net
    total, total_own = 0.0, 0.0
    for batch, state in zip(batches, draws, strict=True):
        torch.set_rng_state(state)
        own = twin.loss(batch)
        terms = Known().loss(joint, Batch(batch, None))
        total = total + (own + 0.7 / 2 * terms.loss) / accumulate
        total_own = total_own + own / accumulate
    gradients = torch.autograd.grad(total, list(head.parameters()), retain_graph=True, allow_unused=True)
    for mine, theirs in zip(head_gradients[0], gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    backbone = torch.autograd.grad(total_own if frozen else total, list(net.parameters()))
    for (name, _), expected in zip(net.named_parameters(), backbone, strict=True):
        torch.testing.assert_close(seen[name], expected, msg=name)


@pytest.mark.parametrize(
    ("schedule", "compiled"), [(None, True), ("lambda", False), ("onecycle", True), ("cosine", False)]
)
def test_any_scheduler_and_compiled_networks(tmp_path, schedule, compiled):
    """No parameter group is added, and the head's rate follows the module's."""
    module, f2d2 = MeanFlowModule(schedule=schedule, compiled=compiled), callback()
    made = fit(tmp_path, module, f2d2, gradient_clip_val=0.5)
    optimizer = made.optimizers[0]
    mine = {id(p) for p in f2d2.added.parameters}
    assert len(optimizer.param_groups) == 1
    assert not mine & {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not mine & {id(p) for p in module.parameters()}
    assert f2d2.added.steps == made.global_step == 9
    rate = f2d2.added.optimizer.param_groups[0]["lr"] / 1e-3
    if schedule is None:
        assert rate == 1
    else:
        group = optimizer.param_groups[0]
        assert 0 < rate < 1
        assert rate == pytest.approx(group["lr"] / group.get("max_lr", group["initial_lr"]), rel=0.2)


RATES = {
    "from the lowest": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 3, cycle_momentum=False),
    "a factor above one": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 100.0 if step < 4 else 1.0),
    "on a plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.01, patience=0, threshold=10.0),
}


@pytest.mark.parametrize("schedule", RATES)
def test_the_heads_rate_is_its_own_at_the_schedules_peak(tmp_path, schedule):
    """Never above, wherever a schedule begins and whether it says its peak or not."""

    class Scheduled(MeanFlowModule):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 1e-4)
            how = {"scheduler": RATES[schedule](optimizer), "interval": "step", "monitor": "train/loss"}
            return [optimizer], [how]

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(f2d2.added.optimizer.param_groups[0]["lr"] / 1e-3)

    f2d2, seen = callback(), []
    fit(tmp_path, Scheduled(), f2d2, Rates())
    assert max(seen) == pytest.approx(1.0)
    assert seen[-1] <= 0.9 * max(seen)


def test_modules_and_networks_compiled_in_place(tmp_path):
    """The whole LightningModule compiled, and a network by its own ``compile()``: the same numbers as plain."""
    answers = []
    for how in ("plain", "module", "in place"):
        module, f2d2 = MeanFlowModule(), callback()
        if how == "in place":
            module.net.compile(backend="eager")
        fit(tmp_path, torch.compile(module, backend="eager") if how == "module" else module, f2d2)
        answers.append(f2d2.log_prob(torch.ones(2, 2), 2).value.detach())
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])


@pytest.mark.parametrize(("make", "accumulate", "steps"), [(MeanFlowModule, 3, 2), (ManualModule, 1, 6)])
def test_accumulation_and_head_steps(tmp_path, make, accumulate, steps):
    """One in each batch of manual optimisation, though two optimisers step."""
    f2d2 = callback()
    made = fit(tmp_path, make(), f2d2, accumulate_grad_batches=accumulate, max_epochs=2)
    assert f2d2.added.steps == steps
    assert make is ManualModule or made.global_step == steps


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_keeps_the_head_in_single_precision(tmp_path, precision):
    f2d2 = callback()
    made = fit(tmp_path, MeanFlowModule(), f2d2, precision=precision)
    assert {p.dtype for p in f2d2.added.live.parameters()} == {torch.float32}
    assert all(torch.isfinite(v) for v in made.callback_metrics.values())
    assert f2d2.log_prob(torch.randn(3, 2)).value.dtype == torch.float32


def test_a_gradient_scaler_is_undone_and_an_overflow_skipped():
    torch.manual_seed(0)
    twins = [AddedWeights(nn.ModuleDict({"head": nn.Linear(3, 1)}), lambda p: torch.optim.SGD(p, 0.1), 0.5, None)
             for _ in range(2)]  # fmt: skip
    twins[1].live.load_state_dict(twins[0].live.state_dict())
    twins[1].broadcast()
    twins[0].broadcast()
    x = torch.randn(5, 3)
    for added, scale in zip(twins, (1.0, 1024.0), strict=True):
        (scale * added.live["head"](x).square().mean()).backward()
        added.step(scale)
    torch.testing.assert_close(weights(twins[0].live), weights(twins[1].live))
    before = weights(twins[1].live)
    (torch.inf * twins[1].live["head"](x).sum()).backward()
    twins[1].step(1024.0)
    assert same(before, twins[1].live)
    assert twins[1].steps == twins[0].steps
    (torch.nan * twins[0].live["head"](x).sum()).backward()
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        twins[0].step()


@pytest.mark.parametrize("make", [MeanFlowModule, ManualModule])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stop", [3, 4], ids=["between epochs", "within an epoch"])
def test_a_run_resumes_to_the_same_numbers_bit_for_bit(tmp_path, make, frozen, stop):
    """With a module whose own noise is a function of the step, as the global generator is in no checkpoint."""

    class Seeded(make):
        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(1000 * self.current_epoch + batch_idx)

    per_batch = 2 if make is ManualModule else 1  # two optimisers count twice
    whole, f2d2 = Seeded(dropout=0.2), callback(frozen=frozen)
    fit(tmp_path, whole, f2d2)
    between = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    often = between if stop == 3 else {"every_n_train_steps": per_batch}
    saved = ModelCheckpoint(tmp_path / "saved", filename="x", save_top_k=1, **often)
    cut = Record(stop=stop * per_batch)
    fit(tmp_path, Seeded(dropout=0.2), callback(frozen=frozen), cut, saved, enable_checkpointing=True)
    module, again = Seeded(dropout=0.2), callback(frozen=frozen)
    fit(tmp_path, module, again, ckpt_path=str(tmp_path / "saved" / "x.ckpt"))
    assert again.added.steps == f2d2.added.steps == 9
    assert same(whole, module)
    for kind in ("live", "average"):
        assert same(getattr(f2d2.added, kind), getattr(again.added, kind))
    x = torch.randn(4, 2)
    assert torch.equal(f2d2.log_prob(x, 2).value, again.log_prob(x, 2).value)


def test_the_modules_own_checkpoints_are_as_they_were(tmp_path):
    """Loads without the callback, resumes without it, and a plain checkpoint resumes with it."""
    module, f2d2 = MeanFlowModule(), callback()
    made = fit(tmp_path, module, f2d2)
    made.save_checkpoint(tmp_path / "with.ckpt")
    assert set(module.state_dict()) == set(MeanFlowModule().state_dict())
    loaded = MeanFlowModule.load_from_checkpoint(tmp_path / "with.ckpt", weights_only=True)
    assert same(loaded, module)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        fit(tmp_path, MeanFlowModule(), ckpt_path=str(tmp_path / "with.ckpt"), max_epochs=4)
    plain = fit(tmp_path, MeanFlowModule())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    fresh = callback()
    fit(tmp_path, MeanFlowModule(), fresh, ckpt_path=str(tmp_path / "plain.ckpt"), max_epochs=4)
    assert fresh.added.steps == 3


@pytest.mark.parametrize("fail", [None, 2])
def test_methods_are_given_back(tmp_path, fail):
    module = MeanFlowModule()
    failing = pytest.raises(RuntimeError, match="a failure in training") if fail else contextlib.nullcontext()
    with failing:
        fit(tmp_path, module, callback(), Record(fail=fail))
    assert not {"training_step", "manual_backward", "on_save_checkpoint"} & set(vars(module))


def test_methods_that_two_callbacks_wrapped_are_given_back(tmp_path):
    module = MeanFlowModule()
    module.other = MeanNet(2)
    fit(tmp_path, module, callback(), callback(flow_map="other"), max_epochs=1)
    assert not {"training_step", "manual_backward", "on_save_checkpoint"} & set(vars(module))


def test_two_callbacks_log_each_under_its_network(tmp_path):
    """Under one name Lightning would average them."""
    module = MeanFlowModule()
    module.other = MeanNet(2)
    both = callback(), callback(flow_map="other", frozen=True)
    made = fit(tmp_path, module, *both, max_epochs=1)
    logged = made.callback_metrics
    assert not [name for name in logged if name.startswith(("train/f2d2_", "val/f2d2_"))]
    assert {"train/net/f2d2_loss", "train/other/f2d2_loss"} <= logged.keys()
    x = torch.cat([each.state(batch)[0] for each in both[:1] for batch in made.val_dataloaders])
    for each in both:
        for name in ("net", "other"):
            is_its_own = torch.isclose(-each.log_prob(x, 2).value.mean().float(), logged[f"val/{name}/f2d2_nll_2"])
            assert bool(is_its_own) == (name == each.flow_map)


def test_a_copy_that_is_made_meanwhile_is_a_module_of_its_own(tmp_path):
    """Not one whose step trains the module that it was copied from."""
    module, copies = MeanFlowModule(), []

    class Kept(L.Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(pl_module.cpu(), tmp_path / "module.pt")
            copies.extend([copy.deepcopy(pl_module), torch.load(tmp_path / "module.pt", weights_only=False)])

    module.other = MeanNet(2)
    module.on_load_checkpoint = own = functools.partial(dict.update, {})
    fit(tmp_path, module, callback(), callback(flow_map="other"), Kept(), max_epochs=1)
    assert module.on_load_checkpoint is own
    before = weights(module)
    for each in copies:
        assert same(each, before)
        assert isinstance(each.on_load_checkpoint, functools.partial)
        fit(tmp_path, each, max_epochs=1)
        assert not same(each, before)
        assert same(module, before)


def test_what_somebody_else_wraps_meanwhile_stays(tmp_path):
    module, f2d2, calls = MeanFlowModule(), callback(), []

    class Theirs(L.Callback):
        def on_train_start(self, trainer, pl_module):
            step = pl_module.training_step
            pl_module.training_step = functools.wraps(step)(lambda *args: calls.append(0) or step(*args))

    fit(tmp_path, module, f2d2, Theirs(), max_epochs=1)
    added = f2d2.added.steps
    assert len(calls) == added == 3
    fit(tmp_path, module, max_epochs=2)
    assert len(calls) == 9  # of theirs alone
    assert f2d2.added.steps == added


@pytest.mark.parametrize(("share", "count"), [(1.0, 32), (0.3, 10), (1e-9, 1)])
def test_the_added_loss_is_of_a_share_of_each_batch(tmp_path, share, count):
    """States with their conditions, drawn anew, none of them twice."""
    batches, asked = [], []

    class Asked(Known):
        def loss(self, student, batch):
            asked.append(batch)
            return super().loss(student, batch)

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)

    def numbered(batch):
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        return x, 2 * x[:, :1]

    adapter = MeanFlow("net(x, (s, s - t), cond)", directions="both")
    f2d2 = callback(objective=Asked(), batch_share=share, check=False, data_to_state=numbered, adapter=adapter)
    fit(tmp_path, MeanFlowModule(), f2d2, Seen(), max_epochs=1, limit_val_batches=0)
    places = []
    for batch, own in zip(batches, asked, strict=True):
        x, _ = numbered(batch)
        assert len(own.data) == count
        assert torch.equal(own.cond, 2 * own.data[:, :1])
        equal = (own.data[:, None] == x).all(-1)
        assert bool((equal.sum(1) == 1).all())
        places.append(equal.float().argmax(1))
        assert len(places[-1].unique()) == count
    assert share == 1 or not all(torch.equal(places[0], other) for other in places[1:])


def test_a_step_need_not_ask_for_its_index(tmp_path):
    """Each step has random numbers of its own all the same, those that it would have with the index."""

    class NoIndex(MeanFlowModule):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    made = []
    for cls in (MeanFlowModule, NoIndex):
        torch.manual_seed(0)
        module, f2d2 = cls(), callback()
        module.other = MeanNet(2)
        made.append((module, f2d2))
        fit(tmp_path, module, f2d2, callback(flow_map="other", frozen=True))
    assert same(made[0][0], made[1][0])
    assert same(made[0][1].added.live, made[1][1].added.live)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("function", ["test", "validate", "predict"])
def test_an_earlier_checkpoint_is_asked_with_the_head_that_it_had(tmp_path, function, weights_only):
    """In the process that trained on since, as in a new one."""
    module, f2d2 = MeanFlowModule(), callback()
    earlier = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=weights_only)
    made = fit(tmp_path, module, f2d2, earlier, enable_checkpointing=True)
    path, x = str(tmp_path / "epoch=0.ckpt"), Pair().dataset("test").values
    module.predict_step = lambda batch, batch_idx: None
    loaders = Pair().test_dataloader() if function == "predict" else Pair()
    options = {} if function == "predict" else {"verbose": False}
    run = getattr(made, function)
    run(module, loaders, ckpt_path=path, **options)
    there = f2.load(path, MeanNet())
    assert same(module.net, there.joint_map.flow_map.network)
    torch.testing.assert_close(f2d2.log_prob(x, 2).value, there.log_prob(x, 2).value)


@pytest.mark.parametrize("weights_only", [False, True])
def test_validation_of_a_checkpoint_gives_what_training_logged(tmp_path, weights_only):
    module, f2d2 = MeanFlowModule(), callback()
    made = fit(tmp_path, module, f2d2)
    logged = {name: float(v) for name, v in made.callback_metrics.items() if "f2d2" in name and "val" in name}
    assert {f"val/f2d2_{name}_{k}" for name in ("nll", "gap", "correlation") for k in (1, 2)} <= set(logged)
    made.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    again = trainer(tmp_path, callbacks=[callback()])
    if weights_only:
        with pytest.warns(UserWarning, match="no trained head"):
            again.validate(MeanFlowModule(), datamodule=Pair(), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
        return
    again.validate(MeanFlowModule(), datamodule=Pair(), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    for name, value in logged.items():
        assert float(again.callback_metrics[name]) == pytest.approx(value, abs=1e-6), name
    again.test(MeanFlowModule(), datamodule=Pair(), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    assert "test/f2d2_gap_2" in again.callback_metrics


@pytest.mark.parametrize("interval", [None, "time"])
def test_load_joint_answers_as_the_callback_does(tmp_path, interval):
    module, f2d2 = MeanFlowModule(), callback(interval=interval)
    saved = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    fit(tmp_path, module, f2d2, saved, enable_checkpointing=True).save_checkpoint(tmp_path / "whole.ckpt")
    f2d2.export(tmp_path / "export")
    if interval:
        assert f2d2.added.average["interval"].out.weight.abs().max() > 0
    assert "callbacks" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    x = torch.randn(5, 2)
    for path in (tmp_path / name for name in ("export", "whole.ckpt", "weights.ckpt")):
        joint = f2.load_joint(path, MeanNet())
        for k in (1, 3):
            assert torch.equal(f2.log_prob(joint, x, k).value, f2d2.log_prob(x, k).value)
            assert torch.equal(f2.sample(joint, x, k).state, f2d2.sample(x, k).state)
        with pytest.raises(ValueError, match="does not fit this MeanNet"):
            f2.load_joint(path, MeanNet(width=16))


class OwnHead(f2.DivergenceHead):
    """Somebody's own class."""


def test_a_head_of_somebody_elses_class_is_saved_and_given_again(tmp_path):
    module, f2d2 = MeanFlowModule(), callback(head=OwnHead(32, 8, 1))
    made = fit(tmp_path, module, f2d2)
    made.save_checkpoint(tmp_path / "x.ckpt")
    f2d2.export(tmp_path / "x")
    x = torch.randn(5, 2)
    for path in (tmp_path / "x.ckpt", tmp_path / "x"):
        joint = f2.load_joint(path, MeanNet(), head=OwnHead(32, 8, 1))
        assert torch.equal(f2.log_prob(joint, x, 2).value, f2d2.log_prob(x, 2).value)
        with pytest.raises(ValueError, match=r"saved with a test_callback\.OwnHead.*give it: head="):
            f2.load_joint(path, MeanNet())
    with pytest.raises(ValueError, match=r"give it: head="):
        make_head(f2d2.state_dict()["head"])
    again = callback(head=OwnHead(32, 8, 1))
    trainer(tmp_path, callbacks=[again]).validate(
        MeanFlowModule(), datamodule=Pair(), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False
    )
    with torch.no_grad():
        assert torch.equal(again.log_prob(x, 2).value, f2d2.log_prob(x, 2).value)


def test_what_cannot_be_described_is_told_when_it_is_read(tmp_path):
    class Path(f2.flows.LinearPath):
        pass

    head = f2.DivergenceHead(32, 8, 1, baseline=f2.GaussianBaseline((2,), path=Path()))
    made = fit(tmp_path, MeanFlowModule(), callback(head=head))
    made.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"could not be described: path of GaussianBaseline is a .*Path"):
        f2.load_joint(tmp_path / "x.ckpt", MeanNet())


def test_a_network_and_a_teacher_that_have_a_length_are_there(tmp_path):
    """A compiled module has one, or says that it has none when it is asked."""

    class Empty(MeanNet):
        def __len__(self):
            return 0

    class Falls(nn.ModuleList):
        def forward(self, x, t, cond=None):
            return -x

    module, f2d2 = MeanFlowModule(), callback(teacher=Falls())
    made = fit(tmp_path, module, f2d2, max_epochs=1)
    x = Pair().dataset("val").values
    reference = -f2d2.reference(Falls(), x).value.mean()
    assert float(made.callback_metrics["val/f2d2_reference_nll"]) == pytest.approx(float(reference), rel=1e-4)
    made.save_checkpoint(tmp_path / "theirs.ckpt")
    loaded = f2.load(tmp_path / "theirs.ckpt", Empty())
    assert torch.equal(loaded.log_prob(x, 2).value, f2d2.log_prob(x, 2).value)


def test_load_joint_refuses_what_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        f2.load_joint(tmp_path / "x.pt", MeanNet())
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        f2.load_joint(tmp_path, MeanNet())
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="holds no joint map"):
        f2.load_joint(tmp_path / "plain.ckpt", MeanNet())
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 not all of it")
    with pytest.raises(ValueError, match="cannot be read"):
        f2.load_joint(tmp_path / "torn.pt", MeanNet())


def test_a_map_to_data_only_is_inverted(tmp_path):
    f2d2 = callback(directions="to_data", frozen=True)
    made = fit(tmp_path, MeanFlowModule(), f2d2)
    assert 0 <= float(made.callback_metrics["val/f2d2_unconverged_1"]) <= 1
    answer = f2d2.log_prob(torch.zeros(2, 2), 2)
    assert answer.converged is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_a_planted_fault_is_named(tmp_path, frozen):
    """As a module's; a velocity that trains is its own teacher, by the callback's estimator."""
    f2d2 = callback(frozen=frozen, reference=f2.Reference(steps=64, probes=0), steps=(1, 2))
    fit(tmp_path, MeanFlowModule(), f2d2, max_epochs=1)
    f2d2.added.average["head"].register_forward_hook(lambda head, args, answer: answer + 50.0)
    before = torch.random.get_rng_state()
    found = f2d2.diagnose(Pair().dataset("test").values[:20])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [row.whose for row in found.rows] == ["head", "head"]
    assert found.scatter > 0
    assert "own velocity's path" in str(found)
    f2d2 = callback(frozen=True, directions="to_data", objective=f2.objectives.VolumeRegression(capacity=8, chunk=8))
    fit(tmp_path, MeanFlowModule(), f2d2, max_epochs=1)
    with pytest.raises(ValueError, match="density of the map's own jumps"):
        f2d2.diagnose(torch.zeros(2, 2))


def test_likelihoods_of_a_trained_toy_are_right(tmp_path):
    """End to end: Gaussian data, whose density is known, and the network's own reference likelihood."""
    module = MeanFlowModule(schedule="onecycle")
    objective = f2.TrajectoryRegression(nodes=12, capacity=512, refresh=32.0, chunk=128, intervals=f2.Intervals())
    f2d2 = callback(objective=objective, reference=f2.Reference(steps=20, probes=0), steps=(1, 4))
    made = trainer(tmp_path, callbacks=[f2d2], max_epochs=40, check_val_every_n_epoch=40)
    torch.manual_seed(0)
    data = Pair(count=1024)
    data.batch_size = 128
    module.hparams["total"] = 40 * 8
    made.fit(module, datamodule=data)
    mix = torch.tensor([[1.0, 0.0], [0.8, 0.3]])
    truth = torch.distributions.MultivariateNormal(torch.tensor([0.5, -1.0]), mix @ mix.T)
    x = truth.sample((400,))
    for steps, gap in ((1, 0.35), (4, 0.1)):  # after 320 steps the longest jump still falls short of the noise
        # a flipped sign of the divergence costs twice the 2.4 nats that the flow contracts volume by
        assert abs(float(made.callback_metrics[f"val/f2d2_gap_{steps}"])) < gap
        assert float(made.callback_metrics[f"val/f2d2_correlation_{steps}"]) > 0.93
        with torch.no_grad():
            value = f2d2.log_prob(x, steps).value
        assert float((value - truth.log_prob(x)).mean().abs()) < 0.4
        assert float(torch.corrcoef(torch.stack((value, truth.log_prob(x))))[0, 1]) > 0.9


@pytest.mark.parametrize("covariance", [None, "full", "diagonal"])
def test_a_network_that_has_a_gaussian_fit_shares_it_with_its_head(tmp_path, covariance):
    """A network that starts as the flow of its fit has that fit's likelihood before anything is learned."""
    still = functools.partial(torch.optim.SGD, lr=0.0)
    module = f2.FlowMatchingModule(f2.nn.PreconditionedMLP((2,), covariance, width=8), optimizer=still)
    f2d2 = f2.F2D2Callback("flow_map", optimizer=still, ema_decay=0.0, check=False)
    train(tmp_path, module, f2d2, max_steps=1)
    x = torch.randn(9, 2)
    right = module.flow_map.baseline.log_prob(x, torch.ones(9))
    with torch.no_grad():
        torch.testing.assert_close(f2d2.log_prob(x, 2).value, right)


# --- wrong use: an error before the first step ---


def refused(folder, module, *callbacks, match, kind=ValueError):
    with pytest.raises(kind, match=match):
        fit(folder, module, *callbacks)
    assert module.trainer.global_step == 0


WRONG = {
    "flow_map": ({"flow_map": "nett"}, r"no submodule 'nett'; it has 'net'"),
    "features": ({"features": "midle"}, r"'middle'"),
    "interval": ({"interval": "tiem"}, r"'time'"),
    "call": (
        {"adapter": Adapter("net(x, s, t, cond)")},
        r"was called as 'net\(x, s, t, cond\)' and raised TypeError.*It takes MeanNet.forward\(x",
    ),
    "head": ({"head": f2.DivergenceHead(features=7)}, r"DivergenceHead\(features=32\)"),
    "no velocity": (
        {"adapter": Consistency("net(x, (s, s))"), "objective": None, "check": False},
        "the teacher that it was distilled from",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_the_network(tmp_path, what):
    options, match = WRONG[what]
    refused(tmp_path, MeanFlowModule(), callback(**options), match=match)


def test_two_callbacks_on_one_model(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `F2D2Callback`"):
        fit(tmp_path, MeanFlowModule(), callback(), callback(weight=2.0))
    module = MeanFlowModule()
    module.alias = nn.ModuleDict({"net": module.net})
    named = dict(module.named_modules(remove_duplicate=False))
    assert named["alias.net"] is module.net
    refused(tmp_path, module, callback(), callback(flow_map="alias.net"), match="two F2D2Callbacks are on one network")


ANSWERS = {
    "shape": (lambda net, x, times: MeanNet.forward(net, x, times)[:, :1],
              r"answered shape \(64, 1\); the answer must have the state's shape"),
    "one time": (lambda net, x, times: MeanNet.forward(net, x, (times[0], torch.zeros_like(times[0]))),
                 "does not depend on the end time"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_cannot_be(tmp_path, name):
    answer, match = ANSWERS[name]
    module = MeanFlowModule()
    module.net.forward = types.MethodType(lambda net, x, times, aug_cond=None: answer(net, x, times), module.net)
    refused(tmp_path, module, callback(), match=match)


@pytest.mark.parametrize("wrong", ["sign", "direction"])
def test_a_wrong_sign_or_direction_of_a_trained_model(tmp_path, wrong):
    module = MeanFlowModule()
    made = trainer(tmp_path, max_epochs=40, limit_val_batches=0)
    torch.manual_seed(0)
    made.fit(module, datamodule=Pair(count=512))
    arguments = {"sign": {"velocity_scale": 1.0}, "direction": {"noise_time": 0.0, "data_time": 1.0}}[wrong]
    adapter = MeanFlow(directions="both", **arguments)
    refused(tmp_path, module, callback(adapter=adapter), match="points the wrong way.*give the adapter")
    fit(tmp_path, module, callback(), max_epochs=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adapter": MeanFlow(directions="to_data")}, "set directions of both alike"),
        ({"adapter": FlowMatching()}, "instantaneous velocity"),
        ({"frozen": True, "interval": "time"}, "frozen=True does not train it"),
        ({"batch_share": 0.0}, "batch_share=0.0; it must be positive"),
        ({"batch_share": 1.5}, r"batch_share=1.5; it must be a share, in \[0, 1\]"),
        ({"weight": 0.0}, "weight=0"),
    ],
)
def test_settings_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        callback(**options)


def test_there_is_no_head_before_training():
    with pytest.raises(RuntimeError, match="there is no divergence head yet"):
        callback().log_prob(torch.zeros(1, 2))


def test_batches_of_another_form(tmp_path):
    class Named(MeanFlowModule):
        def loss(self, batch):
            return super().loss(batch["image"])

        def states(self, batch):
            return batch["image"], None

    def run(**kwargs):
        loader = torch.utils.data.DataLoader([{"image": x} for x in torch.randn(64, 2)], batch_size=32)
        f2d2 = callback(**kwargs)
        trainer(tmp_path, callbacks=[f2d2], max_epochs=1).fit(Named(), loader)
        return f2d2

    with pytest.raises(ValueError, match=r"a batch is a dict with 'image'.*data_to_state"):
        run()
    assert run(data_to_state="states").added.steps == 2
    assert run(data_to_state=lambda batch: (batch["image"], None)).added.steps == 2
    with pytest.raises(ValueError, match="no such method"):
        run(data_to_state="stats")
    # two states are no state and its conditioning
    for answer, came in ((lambda batch: batch["image"][:2], "a Tensor"), ("loss", "a Tensor"), (tuple, "a tuple of 1")):
        with pytest.raises(ValueError, match=rf"answered {came}, .* a pair \(x, cond\)"):
            run(data_to_state=answer)


@pytest.mark.parametrize("as_list", [False, True])
def test_several_loaders_are_taken_together(tmp_path, as_list):
    """As the trainer gives their batches to a step: the head is fitted to, and trained on, the part that is said."""

    class Two(MeanFlowModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[1 if as_list else "b"], batch_idx)

    points = Pair().dataset("train").values
    loaders = [torch.utils.data.DataLoader(values, 32) for values in (100 + points[:50], points)]
    given = loaders if as_list else dict(zip("ab", loaders, strict=True))
    f2d2 = callback(data_to_state=lambda batch: (batch[1 if as_list else "b"], None))
    trainer(tmp_path, callbacks=[f2d2], max_epochs=1, limit_val_batches=0).fit(Two(), given)
    torch.testing.assert_close(f2d2.added.live["head"].baseline.mean, points.mean(0), rtol=0, atol=1e-5)
    assert f2d2.added.steps == 3


def test_a_persistent_loader_is_not_disturbed(tmp_path):
    """A second iterator of a loader with persistent workers would reset the one that training reads."""

    class Seen(MeanFlowModule):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch.clone())
            return super().training_step(batch, batch_idx)

    seen = []
    for callbacks in ([], [callback()]):
        torch.manual_seed(0)
        data = torch.arange(128.0).reshape(64, 2) / 64
        loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, num_workers=1, persistent_workers=True)
        module = Seen()
        trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module, loader)
        seen.append(torch.cat(module.seen))
    assert len(seen[0]) == 128
    assert torch.equal(seen[0], seen[1])


def test_manual_optimisation_that_the_loss_cannot_ride_on(tmp_path):
    class Own(ManualModule):
        def training_step(self, batch, batch_idx):
            _, optimizer = self.optimizers()
            self.loss(batch).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"self.manual_backward\(loss\) instead of loss.backward\(\)"):
        fit(tmp_path, Own(), callback())
    module, f2d2 = ManualModule(toggle=False), callback(backward=1)
    fit(tmp_path, module, f2d2)
    assert f2d2.added.steps == 9
    with pytest.raises(RuntimeError, match="called manual_backward 2 times"):
        fit(tmp_path, ManualModule(), callback(backward=5))


def test_steps_of_a_critic_alone_leave_network_and_head_alone(tmp_path):
    """As if the critic were not there: batches that are its own, and those in which the network's gradients grow."""

    class Gan(ManualModule):
        has_critic = True

        def training_step(self, batch, batch_idx):
            critic_optimizer, optimizer = self.optimizers()
            if self.has_critic:
                with critic_optimizer.toggle_model():
                    critic_optimizer.zero_grad()
                    self.manual_backward(self.critic(batch).square().mean())
                    critic_optimizer.step()
            if batch_idx >= 1:
                with optimizer.toggle_model():
                    self.manual_backward(self.loss(batch))
                    if batch_idx == 2:
                        optimizer.step()
                        optimizer.zero_grad()

    class Alone(Gan):
        has_critic = False

    made = []
    for cls in (Gan, Alone):
        torch.manual_seed(0)
        made.append((cls(), callback()))
        fit(tmp_path, *made[-1], max_epochs=2, limit_val_batches=0)
    assert [f2d2.added.steps for _, f2d2 in made] == [2, 2]
    assert same(made[0][0].net, made[1][0].net)
    assert same(made[0][1].added.live, made[1][1].added.live)


@pytest.mark.parametrize("module", [MeanFlowModule, ManualModule])
def test_a_step_that_writes_into_its_batch_is_refused(tmp_path, module):
    """The head would learn other states than it was fitted to."""

    class Writing(module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            batch.mul_(2)
            return loss

    with pytest.raises(RuntimeError, match=r"Writing.training_step writes into its batch"):
        fit(tmp_path, Writing(), callback())


def test_random_states_are_drawn_apart_from_the_modules_numbers(tmp_path):
    """Training as without the callback, and every validation on the same draws."""

    class Noisy(MeanFlowModule):
        def states(self, batch):
            return batch + 0.1 * torch.randn_like(batch), None

    plain, module, f2d2 = Noisy(), Noisy(), callback(frozen=True, data_to_state="states")
    fit(tmp_path, plain, max_epochs=1)
    made = fit(tmp_path, module, f2d2, max_epochs=1)
    assert same(plain, module)
    figures = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        figures.append(made.validate(module, datamodule=Pair(), verbose=False)[0]["val/f2d2_nll_2"])
    assert figures[0] == figures[1]


@pytest.mark.parametrize("how", ["sampler", "batch_sampler"])
def test_the_head_is_fitted_to_the_rows_that_are_trained_on(tmp_path, how):
    """Which a sampler may say; the others are far away."""
    points = Pair().dataset("train").values
    sampler = torch.utils.data.SubsetRandomSampler(range(len(points)))
    if how == "sampler":
        options = {"sampler": sampler, "batch_size": 32}
    else:
        options = {"batch_sampler": [list(range(start, start + 32)) for start in (0, 32, 64)]}
    loader = torch.utils.data.DataLoader(torch.cat((points, 1000 + points)), **options)
    f2d2, trained = callback(frozen=True), []
    for callbacks in ([], [f2d2]):
        sampler.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        trained.append(MeanFlowModule())
        trainer(tmp_path, callbacks=callbacks, max_epochs=1, limit_val_batches=0).fit(trained[-1], loader)
    torch.testing.assert_close(f2d2.added.live["head"].baseline.mean, points.mean(0), rtol=0, atol=1e-5)
    assert same(*trained)  # the look at the data has left the sampler's generator as it was


def test_another_head_is_refused_on_resume(tmp_path):
    made = fit(tmp_path, MeanFlowModule(), callback(head=f2.DivergenceHead(features=32, hidden=8)))
    made.save_checkpoint(tmp_path / "x.ckpt")
    other = callback(head=f2.DivergenceHead(features=32, hidden=16))
    with pytest.raises(ValueError, match="of another shape than the callback's"):
        fit(tmp_path, MeanFlowModule(), other, ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=4)


def test_networks_that_configure_model_makes(tmp_path):
    class Late(MeanFlowModule):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = MeanNet()

    f2d2 = callback()
    fit(tmp_path, Late(), f2d2)
    assert f2d2.added.steps == 9
    refused(tmp_path, Late(), callback(flow_map="nett"), match="no submodule 'nett'")


def test_a_network_of_its_own_velocity_is_compared_with_differences_once_an_evaluation(tmp_path, monkeypatch):
    calls = []
    original = evaluation.check_differentiable
    monkeypatch.setattr(evaluation, "check_differentiable", lambda *a: (calls.append(len(a[1])), original(*a))[1])
    data = Pair()
    data.eval_batch_size = 10
    f2d2 = callback()
    trainer(tmp_path, callbacks=[f2d2], max_epochs=2).fit(MeanFlowModule(), datamodule=data)
    assert calls == [10, 10]
    assert len(f2d2.agreement_values()[1]) == 50


def test_a_rate_that_is_tried_out_in_the_middle_of_a_run_costs_the_head_nothing(tmp_path):
    """Lightning goes back to a checkpoint then, while the run is under way."""

    class Find(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                before = weights(f2d2.added.live), f2d2.objective.state_dict()
                self.lr_find(trainer, pl_module)
                assert same(before[0], f2d2.added.live)
                torch.testing.assert_close(f2d2.objective.state_dict(), before[1], rtol=0, atol=0, equal_nan=True)
                assert all(p.grad is None for p in f2d2.added.parameters)

    class Compare(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.before = weights(f2d2.added.live)

        def on_validation_end(self, trainer, pl_module):
            assert same(self.before, f2d2.added.live)

    f2d2 = callback()
    made = fit(tmp_path, MeanFlowModule(), f2d2, Find(num_training_steps=2, update_attr=False), Compare())
    assert f2d2.added.steps == made.global_step == 9


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp"])
def test_a_head_that_ends_with_the_processes_of_a_run_is_told(tmp_path, strategy):
    f2d2, made = callback(), trainer(tmp_path, strategy=strategy, devices=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        f2d2.setup(made, MeanFlowModule(), "fit")
    assert any("in checkpoints only" in str(one.message) for one in told) == (strategy == "ddp_fork")


def test_a_second_run_at_a_lower_rate_leaves_the_head_its_own(tmp_path):
    """Nothing is scheduled in either."""
    module, f2d2 = MeanFlowModule(), callback()
    for rate in (1e-2, 1e-4):
        module.configure_optimizers = lambda rate=rate: torch.optim.AdamW(module.parameters(), lr=rate)
        fit(tmp_path, module, f2d2, max_epochs=1)
        assert f2d2.added.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
