"""Backbones: derivatives in state and both times, any order of the times, classes, features."""

import copy
import math

import pytest
import torch

from f2d2_lightning import DivergenceHead, FlowMap, GaussianBaseline, JointFlowMap
from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.flows import TrigonometricPath
from f2d2_lightning.nn import (
    MLP,
    AngleEmbedding,
    DiT,
    GaussianPreconditioned,
    IntervalEmbedding,
    OneTimeEmbedding,
    PreconditionedMLP,
    ResNet,
    UNet,
    with_second_time,
)
from f2d2_lightning.testing import FlowMapContract
from problems import PROBLEMS, randomize, rotation

close = torch.testing.assert_close


def preconditioned(network, path=None, pixels=False):
    dim = torch.Size(network.shape).numel()
    covariance = rotation(dim, 3) @ torch.diag(torch.logspace(-2, 0.5, dim)) @ rotation(dim, 3).T
    return GaussianPreconditioned(
        network, GaussianBaseline.from_covariance(torch.linspace(-1, 1, dim), covariance, path, network.shape), pixels
    )


def by_angles(shape=(3,), covariance="full", **options):
    """A preconditioned MLP whose times are embedded by angles, fitted to data of very different widths."""
    network = PreconditionedMLP(shape, covariance, width=16, **{"blocks": 1, **options})
    dim = torch.Size(shape).numel()
    widths = (
        torch.logspace(-1.5, 0.3, dim) if covariance != "full" else rotation(dim, 3) * torch.logspace(-1.5, 0.3, dim)
    )
    data = 1 + torch.randn(200, dim) @ widths.T if widths.ndim == 2 else 1 + torch.randn(200, dim) * widths
    network.baseline.fit([data.reshape(-1, *shape)])
    return network


NETWORKS = {
    "mlp vector": lambda **k: MLP((3,), width=16, blocks=2, **k),
    "mlp image": lambda **k: MLP((2, 2, 4), width=16, blocks=1, **k),
    "mlp with an added time": lambda **k: with_second_time(MLP((3,), width=16, embedding=OneTimeEmbedding(8), **k)),
    "resnet": lambda **k: ResNet((2, 2, 4), width=8, blocks=1, **k),
    "unet": lambda **k: UNet((2, 2, 4), width=8, multipliers=(1, 2), blocks=1, attention=(2,), **k),
    "dit": lambda **k: DiT((3, 2, 4), width=16, depth=2, heads=2, **k),
    "preconditioned mlp": lambda **k: preconditioned(MLP((3,), width=16, blocks=1, **k)),
    "preconditioned mlp by angles": lambda **k: by_angles(**k),
    "preconditioned image by angles": lambda **k: by_angles((1, 2, 2), "isotropic", **k),
    "preconditioned unet": lambda **k: preconditioned(
        UNet((1, 4, 4), width=8, multipliers=(1,), blocks=1, **k), pixels=True
    ),
    "preconditioned dit": lambda **k: preconditioned(DiT((1, 2, 4), width=16, depth=1, heads=2, **k)),
    "preconditioned resnet": lambda **k: preconditioned(ResNet((1, 2, 4), width=8, blocks=1, **k)),
    "dit to noise": lambda **k: DiT((1, 8, 4), 4, width=16, depth=1, heads=4, directions="to_noise", **k),
}
CASES = pytest.mark.parametrize(
    ("name", "classes"), [*((name, 3) for name in NETWORKS), ("mlp vector", 0), ("unet", 0), ("dit to noise", 0)]
)


def made(name, classes):
    torch.manual_seed(1)
    return randomize(NETWORKS[name](classes=classes), 0.2)


@CASES
class TestContract:
    """Shapes, derivatives in both modes, features, independence of samples, copies: every network alike."""

    @pytest.mark.parametrize("check", [name for name in dir(FlowMapContract) if name.startswith("test_")])
    def test(self, name, classes, check):
        contract = FlowMapContract()
        contract.has_features, contract.tolerance = True, 1e-7
        contract.make_flow_map = lambda: made(name, classes)
        shape = getattr(made(name, classes), "network", made(name, classes)).shape
        contract.make_states = lambda: torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        contract.make_conditioning = lambda: torch.tensor([2, 0, 1]) if classes else None
        contract.make_joint = lambda: JointFlowMap(
            made(name, classes), randomize(DivergenceHead(made(name, classes).features))
        )
        getattr(contract, check)()


@pytest.fixture(params=NETWORKS)
def case(request):
    network = made(request.param, 3)
    shape = getattr(network, "network", network).shape
    s, t = torch.tensor([0.2, 0.9, 0.5, 0.6]), torch.tensor([0.8, 0.1, 0.5, 0.3])
    return network, torch.randn(4, *shape), s, t, torch.tensor([2, 0, 1, 1])


def central(function, h=1e-5):
    return ((function(h) - function(-h)) / (2 * h)).detach()


@pytest.mark.parametrize("which", ["s", "t"])
def test_jvp_in_time(case, which):
    network, x, s, t, cond = case
    one = torch.ones(4)
    f = lambda a, b: network(x, a, b, cond)  # noqa: E731
    with torch.no_grad():
        if which == "s":
            _, product = jacobian_product(lambda a: f(a, t), s, one)
            expected = central(lambda h: f(s + h, t))
        else:
            _, product = jacobian_product(lambda b: f(s, b), t, one)
            expected = central(lambda h: f(s, t + h))
    close(product, expected, rtol=1e-5, atol=1e-5)
    assert product.abs().max() > 1e-3


def test_direction_matters(case):
    """Negative intervals are answered, and not as positive ones."""
    network, x, s, t, cond = case
    there, back = network(x, s, t, cond), network(x, t, s, cond)
    different = (there - back).flatten(1).abs().amax(1)
    assert bool((different[s != t] > 1e-4).all())
    assert bool((different[s == t] == 0).all())


def test_classes_matter(case):
    network, x, s, t, cond = case
    different = (network(x, s, t, cond) - network(x, s, t, (cond + 1) % 3)).flatten(1).abs().amax(1)
    assert bool((different > 1e-4).all())


def test_starts_at_zero_or_at_the_gaussian_map():
    for path in ("linear", "trigonometric"):
        problem = PROBLEMS[f"gaussian-vector-{path}"]()
        network = GaussianPreconditioned(MLP((3,), width=8, blocks=1), problem.baseline)
        s, t = torch.rand(5), torch.rand(5)
        x = problem.states_at(s)
        close(network(x, s, t), problem.field(x, s, t).velocity)
        close(network.network(x, s, t), torch.zeros_like(x))


def test_embedding_tells_pairs_of_times_apart():
    embedding = IntervalEmbedding(16)
    s, t = torch.rand(50), torch.rand(50)
    assert (embedding(s, t) - embedding(t, s)).abs().amax(1).min() > 1e-3
    assert torch.pdist(embedding(s, t)).min() > 1e-3


def test_dropout_is_for_training_only():
    network, x = randomize(MLP((3,), width=16, blocks=1, dropout=0.5)), torch.randn(4, 3)
    assert not torch.equal(network(x, 0.0, 1.0), network(x, 0.0, 1.0))
    network.eval()
    assert torch.equal(network(x, 0.0, 1.0), network(x, 0.0, 1.0))


PAIRS = [(0.2, 0.7), (0.9, 0.3), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("path", [None, TrigonometricPath()], ids=["linear", "trigonometric"])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)], ids=str)
def test_preconditioning_turns_whitened_coordinates_by_the_angle(shape, path, pair):
    """``z_t = z_s + (theta_t - theta_s) n(z_s, s, t)``, in both directions, with angles and whitening written here."""
    network = randomize(preconditioned(MLP(shape, width=16, blocks=1), path), 0.2)
    baseline, dim = network.baseline, torch.Size(shape).numel()

    def white(x, t):
        a, b = (t, 1 - t) if path is None else (math.sin(math.pi / 2 * t), math.cos(math.pi / 2 * t))
        centered = x.flatten(1) - a * torch.linspace(-1, 1, dim)
        deviations = baseline.variances.sqrt()
        angle = torch.atan2(a * deviations, b * torch.ones(dim))
        return (centered @ baseline.axes) / (b**2 + a**2 * deviations**2).sqrt(), angle

    s, t = pair
    x = torch.randn(5, *shape)
    landed = network.jump(x, s, t)
    (z_s, angle_s), (z_t, angle_t) = white(x, s), white(landed, t)
    answer = network.network(z_s.reshape(x.shape), s, t).flatten(1)
    close(z_t, z_s + (angle_t - angle_s) * answer, rtol=1e-9, atol=1e-9)
    if s != t:
        assert (z_t - z_s).abs().max() > 0.05


def test_a_copy_embeds_by_its_own_baseline():
    """The embedding holds the baseline out of sight of the module tree; a copy must not go on with the original's."""
    original = randomize(by_angles())
    copied = copy.deepcopy(original)
    assert copied.network.embedding._baseline[0] is copied.baseline
    assert copied.baseline is not original.baseline
    x, s, t = torch.randn(4, 3), torch.rand(4), torch.rand(4)
    expected = original(x, s, t)
    assert torch.equal(copied(x, s, t), expected)
    embedded = original.network.embedding(s, t)
    copied.baseline.variances.mul_(100)
    assert torch.equal(original(x, s, t), expected)
    assert torch.equal(original.network.embedding(s, t), embedded)
    assert (copied.network.embedding(s, t) - embedded).abs().max() > 1e-2


def test_a_checkpoint_holds_the_baseline_once():
    original = randomize(by_angles())
    state = original.state_dict()
    for name in ("mean", "variances", "axes", "fitted"):
        assert [key for key in state if key.split(".")[-1] == name] == [f"baseline.{name}"]
    assert [name for name, m in original.named_modules() if isinstance(m, GaussianBaseline)] == ["baseline"]
    loaded = PreconditionedMLP((3,), "full", width=16, blocks=1)
    loaded.load_state_dict(state)
    x, s, t = torch.randn(4, 3), torch.rand(4), torch.rand(4)
    assert torch.equal(loaded(x, s, t), original(x, s, t))
    # and a conversion reaches the embedding too
    single = loaded.float()(x.float(), s.float(), t.float())
    assert single.dtype == torch.float32
    close(single.double(), original(x, s, t), rtol=1e-3, atol=1e-3)


def test_a_teacher_is_unaffected_by_the_weights_of_the_difference():
    """On the diagonal the embedding sees one time; a student that starts from a teacher keeps its velocity."""
    network = by_angles()
    assert bool((network.network.embedding.difference.weight == 0).all())
    randomize(network.network.blocks)
    randomize(network.network.outlet)
    x, s, t = torch.randn(4, 3), torch.tensor([0.0, 0.4, 0.8, 1.0]), torch.tensor([0.6, 0.9, 0.1, 0.2])
    embedding = network.network.embedding
    assert torch.equal(embedding(s, t), embedding(s, s))
    diagonal, jump = network(x, s, s), network(x, s, t)
    randomize(embedding.difference)
    assert torch.equal(network(x, s, s), diagonal)
    assert bool(((network(x, s, t) - jump).abs().amax(1) > 1e-4).all())
    assert (embedding(s, t) - embedding(t, s)).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("form", ["expanded", "batch"])
def test_angle_embedding_of_shared_times(form):
    embedding = randomize(AngleEmbedding(spread_fit(), 16))
    make = {"expanded": lambda v: torch.tensor(v).expand(4), "batch": lambda v: torch.full((4,), v)}[form]
    for s, t in PAIRS:
        answer = embedding(make(s), make(t))
        assert len(answer) == (1 if form == "expanded" else 4)
        close(answer.expand(4, 16), embedding(torch.tensor([s]), torch.tensor([t])).expand(4, 16))


def spread_fit(permutation=None):
    baseline = GaussianBaseline((9,), "diagonal")
    variances = torch.logspace(-4, 2, 9)
    baseline.variances.copy_(variances if permutation is None else variances[permutation])
    return baseline


def test_angle_embedding_goes_from_the_narrowest_axis_to_the_widest():
    """Whatever the order of the axes: what it sees are cosines and sines of five angles, written here."""
    embedding = randomize(AngleEmbedding(spread_fit(), 16))
    other = AngleEmbedding(spread_fit(torch.randperm(9)), 16)
    other.load_state_dict(embedding.state_dict())
    s, t = torch.rand(6), torch.rand(6)
    close(other(s, t), embedding(s, t))

    def waves(time):
        deviations = torch.logspace(-4, 2, 9)[[0, 2, 4, 6, 8]].sqrt()
        angle = torch.atan(time[:, None] / (1 - time[:, None]) * deviations)
        one = time[:, None]
        functions = (angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin(), one, (math.pi * one).cos())
        return torch.cat(functions, 1)

    start = waves(s) @ embedding.start.weight.T + embedding.start.bias
    hidden = start + (waves(t) - waves(s)) @ embedding.difference.weight.T
    close(embedding(s, t), embedding.project(torch.nn.functional.silu(hidden)))
    # a narrow axis resolves the last thousandth
    ends = embedding(torch.tensor([0.999, 1.0]), torch.tensor([0.999, 1.0]))
    middle = embedding(torch.tensor([0.5, 0.501]), torch.tensor([0.5, 0.501]))
    assert (ends[0] - ends[1]).norm() > 5 * (middle[0] - middle[1]).norm()


class Echo(FlowMap):
    """Answers what it sees."""

    features = 1

    def forward_features(self, x, s, t, cond=None):
        return x, x[:, :1]


@pytest.mark.parametrize("pixels", [False, True])
def test_a_preconditioner_whitens_along_axes_or_by_the_symmetric_root(pixels):
    """Against matrices: a network along pixels sees ``C_s^(-1/2) (x - s m)``, and answers in the same coordinates."""
    shape, s, t = (2, 3, 2), 0.4, 0.9
    axes = rotation(12, 3)
    deviations, mean = torch.logspace(-1.5, 0.3, 12), torch.linspace(-1, 1, 12)
    baseline = GaussianBaseline.from_covariance(mean, (axes * deviations**2) @ axes.T, shape=shape)
    x = torch.randn(4, *shape)
    values = deviations.sort().values  # as a fit sorts them
    axes = axes[:, deviations.argsort()]

    def root(time):
        return ((1 - time) ** 2 + time**2 * values**2).sqrt()

    def angle(time):
        return torch.atan2(time * values, torch.full_like(values, 1 - time))

    z = (x.flatten(1) - s * mean) @ axes / root(s)
    moved = z + (angle(t) - angle(s)) * z  # whitened states move by angle times answer
    expected = moved * root(t) @ axes.T + t * mean
    made = GaussianPreconditioned(Echo(), baseline, pixels)
    u, seen = made.forward_features(x, torch.full((4,), s), torch.full((4,), t))
    torch.testing.assert_close((x + (t - s) * u).flatten(1), expected)
    white = (x.flatten(1) - s * mean) @ (axes / root(s)) @ axes.T if pixels else z
    # the sign of an axis is anybody's
    torch.testing.assert_close(seen.flatten(1).abs(), white.reshape(4, *shape)[:, :1].flatten(1).abs())


def test_waves_are_sines_and_cosines_of_fixed_directions_beside_the_state():
    network = MLP((3,), width=8, blocks=1, waves=4)
    x = torch.randn(5, 3)
    seen = []
    network.inlet.register_forward_hook(lambda module, inputs, answer: seen.append(inputs[0]))
    network(x, 0.1, 0.9)
    phases = (x[:, :, None] * network.frequencies).sum(1)
    assert torch.allclose(seen[0], torch.cat((x, phases.sin(), phases.cos()), 1))
    other = MLP((3,), width=16, blocks=2, waves=4)
    assert torch.equal(other.frequencies, network.frequencies)
    # as long on average in any number of dimensions, as documented
    assert MLP((2,), waves=4000).frequencies.square().mean().sub(1).abs() < 0.05
    assert MLP((8,), waves=4000).frequencies.square().sum(0).mean().sub(2).abs() < 0.05


@pytest.mark.parametrize(("shape", "waves"), [((2,), 32), ((8,), 32), ((9,), 0), ((1, 8, 8), 0)])
def test_few_dimensions_are_seen_with_waves(shape, waves):
    assert PreconditionedMLP(shape, width=8).network.inlet.in_features == math.prod(shape) + 2 * waves
    assert PreconditionedMLP(shape, width=8, waves=3).network.inlet.in_features == math.prod(shape) + 6


def test_waves_below_zero_are_refused():
    with pytest.raises(ValueError, match="waves=-1"):
        MLP((2,), waves=-1)
