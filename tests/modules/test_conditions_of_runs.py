"""Conditions of several tensors: whatever their form, every number is that of one tensor that holds them all."""

import re

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import f2d2_lightning as f2
from f2d2_lightning.adapters import FlowMatching
from f2d2_lightning.divergence import Exact
from f2d2_lightning.nn import MLP
from f2d2_lightning.utils.conditions import halves, joined, mapped, one_row, repeated, some_of, tensors
from lightning_parts import trainer, weights
from problems import LinearGaussian

close = torch.testing.assert_close
PROBLEM = LinearGaussian(seen=4)
FORMS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x[..., :1], x[..., 1:]),
    "dictionary": lambda x: {"first": x[..., :1], "rest": (x[..., 1:2], x[..., 2:])},
}


class Joined(nn.Module):
    """Somebody's embedding of conditions in any form."""

    features = 8

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(PROBLEM.seen, 8)

    def forward(self, cond):
        return torch.tanh(self.layer((torch.cat(list(tensors(cond)), -1) - 200) / 50))


class Pairs(Dataset):
    """Single pairs, which a loader's own collate function puts together."""

    def __init__(self, form, count=96):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.theta, self.x = (part.float() for part in PROBLEM.draw(count))
        self.form = form

    def __len__(self):
        return len(self.theta)

    def __getitem__(self, row):
        return self.theta[row], self.form(self.x[row])

    @property
    def cond(self):
        return self.form(self.x)


def loaders(form):
    return DataLoader(Pairs(form), 32), DataLoader(Pairs(form, 20), 20)


def network():
    torch.manual_seed(3)
    return MLP(PROBLEM.shape, width=16, blocks=1, condition=Joined())


def float32(test):
    return pytest.mark.usefixtures("single")(test)


@pytest.fixture
def single():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def run(folder, form, ckpt=None):
    """Teacher and student, trained and validated with every kind of start."""
    train, val = loaders(form)
    teacher = f2.FlowMatchingModule(network(), warmup=2, reference=f2.Reference(steps=4, probes=0))
    trainer(folder, max_epochs=1).fit(teacher, train, val)
    objective = f2.TrajectoryRegression(
        nodes=8,
        capacity=64,
        refresh=8.0,
        chunk=48,
        starts={"data": 0.3, "path": 0.2, "noise": 0.2, "student": 0.2, "mixed": 0.1},
        unroll=0.5,
    )
    student = f2.F2D2Module(
        teacher=teacher, objective=objective, reference=f2.Reference(steps=8), warmup=2, steps=(1, 2), estimator=Exact()
    )

    def keep(trainer, *_):
        if trainer.global_step == 3 and ckpt is None:
            trainer.save_checkpoint(folder / "half.ckpt")

    kept = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=keep)
    trainer(folder, max_epochs=2, callbacks=[kept]).fit(student, train, val, ckpt_path=ckpt)
    return student


def answers(model, theta, cond):
    sampled = model.sample(20, 2, cond, seed=1, with_log_prob=True)
    return {
        "log_prob": model.log_prob(theta, 2, cond, batch_size=7).value,
        "determinant": model.log_prob(theta, 2, cond, determinant="exact").value,
        "sample": sampled.state,
        "of sample": sampled.log_prob,
        "guided": model.sample(20, 2, cond, seed=1, guidance=f2.SelfGuidance(0.1)).state,
        "bar": model.error_bar(theta, 2, cond) if model.error_bars else torch.zeros(1),
    }


@float32
@pytest.mark.parametrize("form", ["tuple", "dictionary"])
def test_runs_do_not_depend_on_the_form_of_conditions(form, tmp_path):
    pairs = Pairs(FORMS["tensor"], 20)
    plain = run(tmp_path / "a", FORMS["tensor"])
    student = run(tmp_path / "b", FORMS[form])
    close(weights(student), weights(plain), rtol=0, atol=0)
    cond = FORMS[form](pairs.x)
    close(answers(student, pairs.theta, cond), answers(plain, pairs.theta, pairs.x))
    close(student.evaluation.likelihoods.results(), plain.evaluation.likelihoods.results())
    # arrays become tensors, whatever they stand in
    arrays = mapped(lambda part: part.numpy(), cond)
    close(student.log_prob(pairs.theta.numpy(), 2, arrays).value, plain.log_prob(pairs.theta, 2, pairs.x).value)
    # an interrupted run goes on as if nothing had happened
    again = run(tmp_path / "c", FORMS[form], ckpt=tmp_path / "b" / "half.ckpt")
    close(weights(again), weights(student), rtol=0, atol=0)
    told = [str(m.diagnose(pairs.theta, c)) for m, c in ((student, cond), (plain, pairs.x))]
    # the time that it took is its own
    assert re.sub(r"[\d.]+ s\.", "", told[0]) == re.sub(r"[\d.]+ s\.", "", told[1])


class Foreign(L.LightningModule):
    """Somebody's module, whose network is told its conditions as they come."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_index):
        x, cond = batch
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        state = (1 - t[:, None]) * noise + t[:, None] * x
        return (self.net(state, t, cond) - (x - noise)).square().mean()

    def validation_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.condition = Joined()
        self.times, self.first, self.last = nn.Linear(1, 16), nn.Linear(10, 16), nn.Linear(16, 2)

    def forward(self, x, t, cond):
        h = self.first(torch.cat((x, self.condition(cond)), -1)) + self.times(t[:, None])
        return self.last(nn.functional.silu(h))


def called_back(folder, form):
    torch.manual_seed(5)
    callback = f2.F2D2Callback("net", FlowMatching("net(x, s, cond)"), steps=(1, 2), interval="times")
    module = Foreign()
    trainer(folder, max_epochs=2, callbacks=[callback]).fit(module, *loaders(form))
    return callback, module


@float32
@pytest.mark.parametrize("form", ["tuple", "dictionary"])
def test_callbacks_and_adapters_take_every_form(form, tmp_path):
    pairs = Pairs(FORMS["tensor"], 20)
    plain, module = called_back(tmp_path, FORMS["tensor"])
    callback, other = called_back(tmp_path, FORMS[form])
    close(weights(other), weights(module), rtol=0, atol=0)
    close(answers(callback, pairs.theta, FORMS[form](pairs.x)), answers(plain, pairs.theta, pairs.x))


def test_what_is_no_condition_is_refused():
    module = f2.F2D2Module(network())
    theta, x = torch.zeros(3, 2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"cond holds shape \(4, 1\); a tensor whose first axis is that of the 3"):
        module.log_prob(theta, 2, (x, torch.zeros(4, 1)))
    with pytest.raises(TypeError, match="cond is a str"):
        module.log_prob(theta, 2, {"a": "b"})
    with pytest.raises(ValueError, match=r"cond holds a str; a tensor .* or a tuple or dictionary of such"):
        module.data_to_state((theta, {"a": x, "b": "text"}))


def test_the_helpers():
    cond = {"a": torch.arange(6.0).reshape(3, 2), "b": (torch.arange(3), None)}
    close(some_of(cond, torch.tensor([2, 0]))["b"][0], torch.tensor([2, 0]))
    close(joined([cond, some_of(cond, slice(1))])["a"][:, 0], torch.tensor([0.0, 2.0, 4.0, 0.0]))
    close(repeated(cond, 2)["b"][0], torch.tensor([0, 1, 2, 0, 1, 2]))
    close(repeated(cond, 2, each=True)["b"][0], torch.tensor([0, 0, 1, 1, 2, 2]))
    shared = torch.ones(1, 2).expand(3, 2)
    assert repeated(shared, 4).stride(0) == 0
    assert some_of(shared, torch.tensor([2, 0])).stride(0) == 0
    for part in (torch.arange(6.0).reshape(1, 2, 3).expand(4, 2, 3), torch.ones(1).expand(4)):
        for which in (2, slice(1, 3), [0, 3, 3], torch.tensor([2, 0]), torch.tensor([True, False, True, False])):
            assert torch.equal(some_of(part, which), part[which])
    assert one_row((shared, shared))[1].shape == (1, 2)
    assert one_row((shared, cond["a"]))[0].shape == (3, 2)
    assert halves([cond["a"], [cond["a"], cond["a"]]])[1].__class__ is tuple
    assert halves(cond["a"]) == (cond["a"], None) or halves(cond["a"])[1] is None
    assert mapped(len, None) is None
