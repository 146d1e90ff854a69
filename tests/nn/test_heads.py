"""Divergence heads: baseline plus scaled residual, frozen backbones."""

import pytest
import torch

from f2d2_lightning import Direction, DivergenceHead, GaussianBaseline, JointFlowMap, as_flow_map, log_prob, sample
from f2d2_lightning.checkpoints.descriptions import describe, make_part
from f2d2_lightning.divergence import Exact
from f2d2_lightning.nn import MLP, ResNet
from f2d2_lightning.objectives import Batch, Eulerian, Lagrangian, TeacherSource
from problems import PROBLEMS, randomize

close = torch.testing.assert_close


def own_network(x, s, t, cond):
    return x.flatten(1).square().sum(-1) + s - 2 * t


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x, s, t, cond):
        return self.gain * own_network(x, s, t, cond)


def test_zero_initialised_head_is_the_baseline(gaussian):
    image = len(gaussian.shape) == 3
    backbone = ResNet(gaussian.shape, width=8, blocks=1) if image else MLP(gaussian.shape, width=8, blocks=1)
    joint_map = JointFlowMap(randomize(backbone), DivergenceHead(features=8, hidden=8, baseline=gaussian.baseline))
    s, t = torch.rand(5), torch.rand(5)
    x = gaussian.states_at(s)
    u, divergence = joint_map(x, s, t)
    close(divergence, -gaussian.jump(x, s, t)[1] / (t - s), rtol=1e-8, atol=1e-8)
    assert torch.equal(u, backbone(x, s, t))


def test_scale_multiplies_the_residual_and_not_the_baseline(gaussian):
    head = DivergenceHead(network=Own(), baseline=gaussian.baseline)
    s, t = torch.rand(5), torch.rand(5)
    x = gaussian.states_at(s)
    expected = -gaussian.jump(x, s, t)[1] / (t - s)
    for scale in (1.0, 40.0):
        head.scale.fill_(scale)
        close(head(x, s, t), expected + scale * own_network(x, s, t, None), rtol=1e-8, atol=1e-8)


def turned(gaussian, s, t):
    """How far the fit's angles turn from ``s`` to ``t``, per unit of time, along its axes, ``(B, d)``."""
    deviations = torch.linalg.eigvalsh(gaussian.covariances[0]).sqrt()
    angle = lambda a, b: torch.atan2(a[:, None] * deviations, b[:, None].expand(-1, len(deviations)))  # noqa: E731
    start, end = (angle(*gaussian.coefficients(time)[:2]) for time in (s, t))
    return (end - start) / (t - s)[:, None]


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_per_axis_head_weighs_with_the_angles(gaussian, layers):
    """``D = D_0 + scale sum_i out_i (theta_i(t) - theta_i(s)) / (t - s)``, in both directions."""
    dim = gaussian.dim
    head = DivergenceHead(features=8, hidden=6, layers=layers, per_axis=True, baseline=gaussian.baseline)
    s, t = torch.tensor([0.0, 1.0, 0.2, 0.9]), torch.tensor([1.0, 0.0, 0.7, 0.6])
    x, h = gaussian.states_at(s), torch.randn(4, 8)
    fit = -gaussian.jump(x, s, t)[1] / (t - s)
    close(head(x, s, t, features=h), fit, rtol=1e-8, atol=1e-8)
    randomize(head)
    head.scale.fill_(3.0)
    assert head.out.weight.shape == (dim, 6 if layers else 8)
    hidden = h
    for index, layer in enumerate(head.layers):
        hidden = layer(hidden) + (head.embedding(s, t) if index == 0 else 0)
        hidden = hidden * torch.sigmoid(hidden)
    out = hidden @ head.out.weight.T + head.out.bias
    close(head(x, s, t, features=h), fit + 3 * (out * turned(gaussian, s, t)).sum(-1), rtol=1e-8, atol=1e-8)
    # on the diagonal, the derivative
    beside = head(x[2:], s[2:], s[2:] + 1e-7, features=h[2:])
    close(head(x[2:], s[2:], s[2:], features=h[2:]), beside, rtol=1e-4, atol=1e-4)


def test_per_axis_head_of_an_isotropic_fit_answers_once_per_axis():
    baseline = GaussianBaseline((3,), "isotropic")
    baseline.variances.fill_(0.2)
    full = GaussianBaseline.from_covariance(torch.zeros(3), 0.2 * torch.eye(3))
    one, other = (DivergenceHead(features=4, layers=0, per_axis=True, baseline=b) for b in (baseline, full))
    randomize(one)
    other.out.load_state_dict(one.out.state_dict())
    x, s, t, h = torch.randn(5, 3), torch.rand(5), torch.rand(5), torch.randn(5, 4)
    close(one(x, s, t, features=h), other(x, s, t, features=h))


@pytest.mark.parametrize("covariance", ["diagonal", "isotropic"])
@pytest.mark.parametrize("patch", [1, 2])
def test_per_axis_head_on_maps_answers_for_its_own_pixels(covariance, patch):
    """One number per channel and pixel, each weighted with its own pixel's angle."""
    baseline = GaussianBaseline((2, 4, 6), covariance)
    baseline.fit([torch.randn(64, 2, 4, 6) * torch.linspace(0.1, 3, 48).reshape(2, 4, 6)])
    head = randomize(DivergenceHead(features=5, layers=0, per_axis=True, patch=patch, baseline=baseline))
    assert head.out.weight.shape == (2 * patch**2, 5)
    s, t = torch.tensor([0.0, 1.0, 0.4]), torch.tensor([0.9, 0.2, 0.4])
    x, h = torch.randn(3, 2, 4, 6), torch.randn(3, 5, 4 // patch, 6 // patch)
    rate = baseline.angle_rate(s, t).expand(3, 48).reshape(3, 2, 4, 6)
    expected = baseline.divergence(s, t)
    for channel in range(2):
        for row in range(4):
            for column in range(6):
                place = channel * patch**2 + row % patch * patch + column % patch
                answer = h[:, :, row // patch, column // patch] @ head.out.weight[place] + head.out.bias[place]
                expected = expected + answer * rate[:, channel, row, column]
    close(head(x, s, t, features=h), expected)
    with pytest.raises(ValueError, match=r"maps \(B, F, "):
        head(x, s, t, features=torch.randn(3, 5, 1, 1))
    again = make_part(describe(head, "the head"), {})
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(x, s, t, features=h), head(x, s, t, features=h))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 2}, "per_axis=True with a baseline"),
        ({"patch": 2, "per_axis": True, "baseline": GaussianBaseline((1, 4, 4), "full")}, "whose axes are pixels"),
        ({"patch": 3, "per_axis": True, "baseline": GaussianBaseline((1, 4, 4), "diagonal")}, "divisible"),
        ({"patch": 1, "per_axis": True, "baseline": GaussianBaseline((16,), "diagonal")}, r"\(C, H, W\)"),
    ],
)
def test_patch_is_for_pixels(arguments, message):
    with pytest.raises(ValueError, match=message):
        DivergenceHead(features=4, **arguments)


@pytest.mark.parametrize("image", [False, True], ids=["vector", "image"])
def test_head_without_hidden_layers_is_linear(image):
    head = randomize(DivergenceHead(features=8, layers=0))
    assert sum(p.numel() for p in head.parameters()) == 9
    h = torch.randn(4, 8, 2, 3) if image else torch.randn(4, 8)
    x, s, t = torch.randn(4, 3), torch.rand(4), torch.rand(4)
    mean = h.mean((2, 3)) if image else h
    close(head(x, s, t, features=h), mean @ head.out.weight[0] + head.out.bias)
    head.scale.fill_(5.0)
    close(head(x, s, t, features=h), 5 * (mean @ head.out.weight[0] + head.out.bias))


def test_head_depends_on_everything_it_reads():
    head = randomize(DivergenceHead(features=8, hidden=16))
    x, h, s, t = torch.randn(4, 3), torch.randn(4, 8), torch.full((4,), 0.3), torch.full((4,), 0.8)
    here = head(x, s, t, features=h)
    for other in (head(x, s, t, features=h + 0.1), head(x, s - 0.1, t, features=h), head(x, t, s, features=h)):
        assert (here - other).abs().min() > 1e-5


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_own_network_needs_no_features(shape):
    """With it any function is a backbone."""
    joint_map = JointFlowMap(as_flow_map(lambda x, s, t, cond: -x, "to_data"), DivergenceHead(network=Own()))
    assert joint_map.directions is Direction.TO_DATA
    x, s, t = torch.randn(4, *shape), torch.rand(4) / 2, 0.5 + torch.rand(4) / 2
    u, divergence = joint_map(x, s, t)
    close(u, -x)
    close(divergence, own_network(x, s, t, None))


def trained(joint_map, steps=5):
    problem = PROBLEMS["gaussian-vector-linear"]()
    parameters = [p for p in joint_map.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        source = TeacherSource(problem.field, Exact())
        for objective in (Eulerian(), Lagrangian()):
            objective.loss(joint_map, Batch(problem.states(16, 1.0), source)).loss.backward()
        optimiser.step()


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_backbone_is_kept_bit_for_bit(frozen):
    backbone = randomize(MLP((3,), width=8, blocks=1, dropout=0.3))
    joint_map = JointFlowMap(backbone, DivergenceHead(features=8, hidden=8), frozen=frozen)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    noise = torch.randn(4, 3)
    torch.manual_seed(0)
    samples = sample(joint_map, noise, 4).state
    head = joint_map.head.out.weight.clone()
    joint_map.train()
    assert joint_map.head.training
    assert backbone.training is not frozen
    trained(joint_map)
    same = all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert same is frozen
    assert not torch.equal(joint_map.head.out.weight, head)
    if frozen:
        assert torch.equal(sample(joint_map, noise, 4).state, samples)
        assert all(not p.requires_grad for p in backbone.parameters())
        assert all(p.grad is None for p in backbone.parameters())


def test_checkpoint_keeps_scale_and_baseline(gaussian):
    make = lambda b: JointFlowMap(  # noqa: E731
        MLP(gaussian.shape, width=8, blocks=1), DivergenceHead(features=8, hidden=8, baseline=b)
    )
    original = randomize(make(gaussian.baseline))
    original.head.scale.fill_(7.0)
    loaded = make(type(gaussian.baseline)(gaussian.shape, path=gaussian.path))
    loaded.load_state_dict(original.state_dict())
    x = gaussian.states(4, 1.0)
    assert torch.equal(log_prob(loaded, x, 2).value, log_prob(original, x, 2).value)
    assert float(loaded.head.scale) == 7.0


def test_conditioning_reaches_backbone_and_head():
    joint_map = randomize(JointFlowMap(MLP((3,), width=8, blocks=1, classes=2), DivergenceHead(features=8, hidden=8)))
    x = torch.randn(2, 3)
    zero, one = (joint_map(x, 0.1, 0.9, torch.full((2,), c)) for c in (0, 1))
    assert (zero.velocity - one.velocity).abs().max() > 1e-3
    assert (zero.divergence - one.divergence).abs().min() > 1e-6
