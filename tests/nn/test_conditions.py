"""Networks that are conditioned on vectors, and on what somebody's network embeds."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import f2d2_lightning as f2
from f2d2_lightning.checkpoints import from_pretrained, save_pretrained
from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.nn import MLP, DiT, PreconditionedMLP, PreconditionedUNet, ResNet, UNet, VectorEmbedding
from lightning_parts import trainer
from problems import LinearGaussian, moved, randomize

close = torch.testing.assert_close

NETWORKS = {
    "mlp": ((3,), lambda **k: MLP((3,), width=16, blocks=1, **k)),
    "preconditioned": ((3,), lambda **k: PreconditionedMLP((3,), width=16, blocks=1, **k)),
    "resnet": ((1, 4, 4), lambda **k: ResNet((1, 4, 4), width=8, blocks=1, **k)),
    "unet": ((1, 4, 4), lambda **k: UNet((1, 4, 4), width=8, multipliers=(1,), blocks=1, attention=(), **k)),
    "preconditioned unet": (
        (1, 4, 4),
        lambda **k: PreconditionedUNet((1, 4, 4), width=8, multipliers=(1,), blocks=1, **k),
    ),
    "dit": ((1, 4, 4), lambda **k: DiT((1, 4, 4), width=8, depth=1, heads=1, **k)),
}


class Picture(nn.Module):
    """Somebody's network, for conditions that are small images."""

    features = 6

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(2 * 2 * 3, 6))

    def forward(self, image):
        return self.layers(image)


CONDITIONS = {"vector": (lambda: 3, (3,)), "picture": (Picture, (1, 4, 5))}


@pytest.fixture(params=list(NETWORKS))
def make(request):
    shape, made = NETWORKS[request.param]

    def network(**options):
        torch.manual_seed(1)
        return randomize(made(**options), 0.2)

    network.shape = shape
    return network


@pytest.mark.parametrize("kind", list(CONDITIONS))
def test_the_condition_moves_the_answer_and_has_a_gradient(make, kind):
    condition, shape = CONDITIONS[kind]
    network = make(condition=condition()).eval()
    assert network.conditional
    x, s, t, cond = torch.randn(4, *make.shape), torch.rand(4), torch.rand(4), torch.randn(4, *shape)
    answer = network(x, s, t, cond)
    # each state by its own condition
    close(network(x.flip(0), s.flip(0), t.flip(0), cond.flip(0)), answer.flip(0))
    assert (network(x, s, t, cond.flip(0)) - answer).flatten(1).abs().amax(1).min() > 1e-3
    direction = torch.randn_like(cond)
    _, along = jacobian_product(lambda c: network(x, s, t, c), cond, direction)
    with torch.no_grad():
        expected = moved(lambda: network(x, s, t, cond), cond, direction)
    close(along, expected, rtol=1e-5, atol=1e-7)
    network(x, s, t, cond).square().sum().backward()
    inner = network.condition
    assert all(p.grad.abs().max() > 0 for p in inner.parameters())


def test_standardised_vectors_do_not_know_their_units(make):
    plain, moved_ = make(condition=3).eval(), make(condition=3).eval()
    data, scale = torch.randn(500, 3), torch.tensor([1e-2, 30.0, 1e5])
    plain.condition.fit([data[:100], data[100:]])
    moved_.condition.fit([data * scale - 7])
    close(plain.condition.center, data.mean(0))
    close(plain.condition.scale, data.std(0, correction=0))
    x = torch.randn(4, *make.shape)
    close(moved_(x, 0.2, 0.7, data[:4] * scale - 7), plain(x, 0.2, 0.7, data[:4]))


def test_a_vector_stands_beside_the_state():
    """Without blocks nothing is modulated, and the features know the vector nevertheless."""
    network, x, time = MLP((2,), width=16, blocks=0, waves=4, condition=3), torch.zeros(4, 2), torch.ones(4)
    network.condition.fit([torch.randn(50, 3) * 100 + 7])
    one, other = (network.forward_features(x, 0 * time, time, v)[1] for v in torch.randn(2, 4, 3) * 100 + 7)
    assert float((one - other).abs().mean()) > 0.1
    v = torch.randn(1, 3)
    close(
        network.forward_features(x, 0 * time, time, v.expand(4, -1))[1],
        network.forward_features(x, 0 * time, time, v.repeat(4, 1))[1],
    )


def test_a_constant_is_no_scale():
    embedding = VectorEmbedding(2).fit([torch.tensor([[5.0, 1.0], [5.0, 3.0]])])
    close(embedding.scale, torch.tensor([1.0, 1.0]))
    close(embedding.center, torch.tensor([5.0, 2.0]))


def test_what_is_no_condition_is_refused(make):
    network, x = make(condition=3), torch.randn(2, *make.shape)
    for wrong, said in (
        (None, "got none"),
        (torch.zeros(2, 4), r"got dtype torch.float64, shape \(2, 4\)"),
        (torch.zeros(2, dtype=torch.long), r"got dtype torch.int64, shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=rf"needs cond of shape \(B, 3\), floating numbers; {said}"):
            network(x, 0.2, 0.7, wrong)
    network = make(condition=Picture())
    with pytest.raises(ValueError, match="needs cond, for its Picture; got none"):
        network(x, 0.2, 0.7)
    with pytest.raises(ValueError, match=r"the Picture of condition= answered shape \(3, 6\) for 2 states"):
        network(x, 0.2, 0.7, torch.zeros(3, 1, 4, 5))
    with pytest.raises(ValueError, match=r"Flatten of condition= does not say how many numbers"):
        make(condition=nn.Flatten())
    with pytest.raises(ValueError, match=r"classes=3 and condition= are both given"):
        make(condition=2, classes=3)
    with pytest.raises(ValueError, match=r"condition=-1; it must be at least 0"):
        make(condition=-1)
    assert make(condition=nn.Sequential(nn.Flatten(), nn.Linear(8, 4))).condition[1].out_features == 4


def test_a_saved_model_keeps_its_conditions_and_their_scale(make, tmp_path):
    network = make(condition=3)
    network.condition.fit([5 + 3 * torch.randn(50, 3)])
    joint = f2.JointFlowMap(network, randomize(f2.DivergenceHead(network.features))).eval()
    save_pretrained(joint, tmp_path, shape=make.shape)
    again = from_pretrained(tmp_path)
    x, cond = torch.randn(3, *make.shape), 5 + torch.randn(3, 3)
    close(f2.log_prob(again, x, 2, cond).value, f2.log_prob(joint, x, 2, cond).value)
    other = make(condition=Picture())
    joint = f2.JointFlowMap(other, f2.DivergenceHead(other.features))
    with pytest.raises(ValueError, match=r"condition of .* is a .*Picture"):
        save_pretrained(joint, tmp_path / "b", shape=make.shape)


def test_a_network_without_conditions_is_what_it_was(make):
    """No weight has another name, so that files of before fit."""
    assert not [name for name in make().state_dict() if "condition" in name or "join" in name]
    assert make(classes=2).conditional
    assert not make().conditional


# --- the posterior of a linear-Gaussian model ---


class Halves(nn.Module):
    """Somebody's embedding of a vector: what there is in it, standardised by hand."""

    features = 24

    def __init__(self, problem):
        super().__init__()
        self.first = nn.Linear(problem.seen, 24)
        self.center, self.scale = problem.offset, 30.0

    def forward(self, x):
        return nn.functional.silu(self.first((x - self.center) / self.scale))


def fitted(folder, module, problem, steps):
    generator = DataLoader(TensorDataset(*problem.draw(4096)), batch_size=256, shuffle=True, drop_last=True)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        trainer(folder, max_steps=steps, max_epochs=-1, precision="64-true").fit(module, generator)
    return module


@pytest.mark.parametrize("condition", ["vector", "network"])
def test_a_posterior_is_learned_and_distilled(condition, tmp_path):
    problem = LinearGaussian()
    torch.manual_seed(0)
    network = PreconditionedMLP(
        problem.shape, width=48, blocks=2, condition=problem.seen if condition == "vector" else Halves(problem)
    )
    adam = lambda groups: torch.optim.AdamW(groups, lr=4e-3)  # noqa: E731
    teacher = fitted(tmp_path, f2.FlowMatchingModule(network, optimizer=adam, ema_decay=0.98, warmup=20), problem, 300)
    objective = f2.TrajectoryRegression(nodes=16, capacity=2000)
    student = f2.F2D2Module(
        teacher=teacher, objective=objective, estimator=f2.divergence.Exact(), optimizer=adam, ema_decay=0.98, warmup=20
    )
    fitted(tmp_path, student, problem, 300)
    theta, x = problem.draw(300)
    truth = problem.posterior(x).log_prob(theta)
    integrated = teacher.log_prob(theta, cond=x).value
    assert (integrated - truth).abs().mean() < 0.15
    for steps in (1, 4):
        few = student.log_prob(theta, steps, x).value
        assert (few - integrated).abs().mean() < 0.1
        assert (student.sample(300, steps, x, seed=1).state - problem.posterior(x).mean).mean(0).abs().max() < 0.15
    # the same observations of other parameters are none
    assert (student.log_prob(theta, 4, x.flip(0)).value - truth).abs().mean() > 1
    if condition == "vector":
        close(teacher.average.condition.center, x.mean(0), rtol=0.1, atol=10.0)
    run = trainer(tmp_path, max_steps=1, precision="64-true")
    run.strategy.connect(student)
    run.save_checkpoint(tmp_path / "student.ckpt")
    given = {} if condition == "vector" else {"flow_map": copy.deepcopy(student.joint.flow_map)}
    again = f2.F2D2Module.load_from_checkpoint(tmp_path / "student.ckpt", **given).double()
    close(again.log_prob(theta, 2, x).value, student.log_prob(theta, 2, x).value)


# --- one condition for many states ---


def test_one_condition_stands_for_all_and_is_embedded_once(make):
    network = make(condition=3)
    seen = []
    network.condition.register_forward_hook(lambda module, given, answer: seen.append(len(answer)))
    joint = f2.JointFlowMap(network, randomize(f2.DivergenceHead(network.features))).eval()
    model = f2.likelihood.JointModel(joint, make.shape)
    x, cond = torch.randn(6, *make.shape), torch.randn(1, 3)
    each = cond.repeat(6, 1)
    for ask in (
        lambda c: model.log_prob(x, 2, c).value,
        lambda c: model.log_prob(x, 2, c, batch_size=4).value,
        lambda c: model.log_prob(x, 2, c, determinant="exact").value,
        lambda c: model.sample(6, 2, c, seed=1).state,
        lambda c: model.sample(x, 2, c).state,
        lambda c: f2.reference_log_prob(joint, x, c, steps=2).value,
    ):
        expected = ask(each)
        seen.clear()
        close(ask(cond), expected)
        assert {*seen} == {1}
    # the gradient is that of all together
    cond.requires_grad_(True)
    model.log_prob(x, 2, cond).value.sum().backward()
    each.requires_grad_(True)
    model.log_prob(x, 2, each).value.sum().backward()
    close(cond.grad, each.grad.sum(0, keepdim=True))


def test_conditions_share_a_number_of_samples_evenly(make):
    network = make(condition=3)
    model = f2.likelihood.JointModel(f2.JointFlowMap(network, f2.DivergenceHead(network.features)).eval(), make.shape)
    cond = torch.randn(3, 3)
    shared = model.sample(6, 2, cond, seed=1)
    close(shared.state, model.sample(6, 2, cond.repeat_interleave(2, 0), seed=1).state)
    # given noise and given states are paired one by one, and nothing is guessed
    for wrong in (
        lambda: model.sample(7, 2, cond),
        lambda: model.sample(2, 2, cond),
        lambda: model.sample(shared.noise, 2, cond),
        lambda: model.log_prob(shared.state, 2, cond),
    ):
        with pytest.raises(ValueError, match=r"cond is shape \(3, 3\); a tensor whose first axis is that of the"):
            wrong()


class Turned(f2.JointMap):
    """A turn and a stretch by a complex number: of a condition ``c``, ``x`` becomes ``exp(t c) x``."""

    def __init__(self, dtype):
        super().__init__()
        self.unit = nn.Parameter(torch.ones(1, 1, dtype=torch.promote_types(torch.complex64, dtype)))
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def joint(self, x, s, t, cond):
        # a matrix product takes one dtype only
        factor = (((t - s) * cond)[:, None] @ self.unit).exp() - 1
        moved = torch.view_as_real(factor * torch.view_as_complex(x.contiguous())[:, None])[:, 0]
        return f2.flows.Joint(moved / (t - s)[:, None], 2 * cond.real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.complex64, torch.complex128])
def test_complex_conditions_have_the_precision_of_the_states(dtype, given):
    cond, x, joint = torch.randn(5, dtype=given) / 2, torch.randn(5, 2), Turned(dtype)
    value = f2.log_prob(joint, x, 3, cond.numpy()).value
    adapted = f2.adapters.Adapter("net.joint(x, s, t, cond)", output=0)(joint)
    made = f2.sample(adapted, x.double(), 3, cond).state
    torch.testing.assert_close(made, f2.sample(joint, x, 3, cond).state.double(), rtol=0, atol=1e-5)
    noise = torch.view_as_complex(x.double()) * (-cond.to(torch.complex128)).exp()
    exact = -noise.abs().square() / 2 - math.log(2 * math.pi) - 2 * cond.real
    assert value.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-5)
