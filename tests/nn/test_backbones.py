"""Image backbones for real images (UNet, DiT), their attention, and the second time of one-time networks."""

import copy
import math

import pytest
import torch
from torch import nn

from f2d2_lightning import DivergenceHead, FlowMap, GaussianBaseline, JointFlowMap
from f2d2_lightning.checkpoints import from_pretrained, save_pretrained
from f2d2_lightning.divergence.estimators import jacobian_product
from f2d2_lightning.nn import (
    MLP,
    AddedTime,
    AngleEmbedding,
    DiT,
    GaussianPreconditioned,
    IntervalEmbedding,
    OneTimeEmbedding,
    PreconditionedMLP,
    PreconditionedUNet,
    ResNet,
    UNet,
    with_second_time,
)
from f2d2_lightning.nn._layers import attention
from problems import randomize

close = torch.testing.assert_close


def unet(shape=(3, 4, 8), **options):
    torch.manual_seed(1)
    options = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (2,), **options}
    return randomize(UNet(shape, **options), 0.2)


def dit(shape=(3, 4, 6), **options):
    torch.manual_seed(1)
    return randomize(DiT(shape, **{"width": 16, "depth": 2, "heads": 2, **options}), 0.2)


BACKBONES = {"unet": unet, "dit": dit}


@pytest.fixture(params=list(BACKBONES))
def make(request):
    return BACKBONES[request.param]


# --- attention ---


def naive(q, k, v):
    """The formula, without torch's softmax."""
    weights = (torch.einsum("bhnc,bhmc->bhnm", q, k) / math.sqrt(q.shape[-1])).exp()
    return torch.einsum("bhnm,bhmc->bhnc", weights / weights.sum(-1, keepdim=True), v)


@pytest.fixture
def qkv():
    """Queries of another number than the keys, so that no axis can be taken for another."""
    return torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused kernels."""
    calls, kernel = [], nn.functional.scaled_dot_product_attention

    def counted(*arguments):
        calls.append(len(arguments))
        return kernel(*arguments)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    return calls


def test_attention_is_the_formula(qkv, fused):
    close(attention(*qkv), naive(*qkv))
    assert len(fused) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_attention_has_a_derivative_in_forward_mode(qkv, fused, which, mode):
    at, v, h = qkv[which], torch.randn_like(qkv[which]), 1e-5

    def function(value, attend=attention):
        return attend(*(value if i == which else other for i, other in enumerate(qkv)))

    with mode():
        value, product = jacobian_product(function, at, v)
    assert not fused
    close(value, naive(*qkv))
    close(product, (function(at + h * v, naive) - function(at - h * v, naive)) / (2 * h), rtol=1e-6, atol=1e-8)
    assert product.abs().max() > 1e-2


def test_attention_in_reverse_mode_with_and_without_tangent(qkv, fused):
    """Both forms have the gradient of the formula, and a forward-mode derivative can itself be differentiated."""
    leaves = [x.clone().requires_grad_(True) for x in qkv]
    w = torch.randn(2, 3, 5, 4)
    expected = torch.autograd.grad((naive(*leaves) * w).sum(), leaves)
    close(torch.autograd.grad((attention(*leaves) * w).sum(), leaves), expected)
    assert len(fused) == 1
    q, k, v = leaves
    value, product = jacobian_product(lambda x: attention(x, k, v), q, torch.ones_like(q))
    close(torch.autograd.grad((value * w).sum(), leaves, retain_graph=True), expected)
    mixed = torch.autograd.grad((product * w).sum(), leaves)
    h, e = 1e-4, [torch.randn_like(x) for x in leaves]

    def slope(step):
        moved = [(x + step * direction).detach() for x, direction in zip(leaves, e, strict=True)]
        _, product = jacobian_product(lambda x: attention(x, *moved[1:]), moved[0], torch.ones_like(q))
        return (product * w).sum()

    along = sum((gradient * direction).sum() for gradient, direction in zip(mixed, e, strict=True))
    close(along, (slope(h) - slope(-h)) / (2 * h), rtol=1e-5, atol=1e-7)


def test_attention_in_a_transform(qkv, fused):
    q, k, v = qkv
    _, expected = jacobian_product(lambda x: attention(x, k, v), q, torch.ones_like(q))
    close(torch.func.jvp(lambda x: attention(x, k, v), (q,), (torch.ones_like(q),))[1], expected)
    # forward over reverse: a tangent inside a transform that shows none
    gradient = torch.func.grad(lambda x: attention(x, k, v).square().sum())
    _, product = torch.func.jvp(gradient, (q,), (torch.ones_like(q),))
    h = 1e-5
    close(product, (gradient(q + h) - gradient(q - h)) / (2 * h), rtol=1e-6, atol=1e-8)
    assert not fused


@pytest.mark.parametrize("tangent", [False, True])
def test_attention_in_half_precision(qkv, tangent):
    q, k, v = (x.bfloat16() for x in qkv)
    # sharp weights, where rounded ones show
    q = 4 * q
    expected, slope = jacobian_product(lambda x: naive(x, k.double(), v.double()), q.double(), k.double()[:, :, :5])
    with torch.autocast("cpu", torch.bfloat16):
        value = attention(q, k, v)
        if tangent:
            value, product = jacobian_product(lambda x: attention(x, k, v), q, k[:, :, :5])
            close(product.double(), slope, rtol=0.05, atol=0.05)
    assert value.dtype == torch.bfloat16
    close(value.double(), expected, rtol=0.02, atol=0.02)


# --- what the transformer computes ---


def test_transformer_is_the_formula():
    """Against torch's own multi-head attention and LayerNorm, tokens cut out one by one."""
    network = dit((2, 4, 6), expansion=3)
    x, s, t = torch.randn(3, 2, 4, 6), torch.rand(3), torch.rand(3)
    corners = [(row, column) for row in (0, 2) for column in (0, 2, 4)]
    h = torch.stack([network.inlet(x[:, :, i : i + 2, j : j + 2].flatten(1)) for i, j in corners], 1)
    rates = [10000 ** (-i / 4) for i in range(4)]
    for token, (row, column) in enumerate(corners):
        for half, place in enumerate((column // 2, row // 2)):
            waves = [math.sin(place * r) for r in rates] + [math.cos(place * r) for r in rates]
            h[:, token, 8 * half : 8 * half + 8] += torch.tensor(waves)
    time = nn.functional.silu(network.embedding(s, t))
    norm = nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    for block in network.blocks:
        theirs = nn.MultiheadAttention(16, 2, batch_first=True)
        theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj = block.qkv.weight, block.qkv.bias, block.mix
        parts = [part[:, None] for part in block.modulation(time).split(16, -1)]
        inner = norm(h) * (1 + parts[1]) + parts[0]
        h = h + parts[2] * theirs(inner, inner, inner)[0]
        inner = nn.GELU("tanh")(block.expand(norm(h) * (1 + parts[4]) + parts[3]))
        assert inner.shape[-1] == 48
        h = h + parts[5] * block.contract(inner)
    shift, scale = network.modulation(time)[:, None].split(16, -1)
    h = norm(h) * (1 + scale) + shift
    u, features = network.forward_features(x, s, t)
    for token, (row, column) in enumerate(corners):
        close(features[:, :, row // 2, column // 2], h[:, token])
        patch = network.outlet(h[:, token]).reshape(3, 2, 2, 2)
        close(u[:, :, row : row + 2, column : column + 2], patch)


def test_transformer_starts_at_zero_with_blocks_that_do_nothing():
    network, x = DiT((3, 4, 6), width=16, depth=2, heads=2), torch.randn(2, 3, 4, 6)
    assert torch.equal(network(x, 0.2, 0.9), torch.zeros_like(x))
    h = torch.randn(2, 6, 16)
    assert torch.equal(network.blocks[0](h, torch.randn(2, 16)), h)
    (network(x, 0.2, 0.9) - x).square().sum().backward()
    assert network.outlet.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_of_the_transformer_are_the_papers(size, millions):
    with torch.device("meta"):
        network = DiT.sized(size, (4, 32, 32), classes=1000, null_label=True)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(count) == millions
    assert network.positions.shape == (256, network.features)


def test_the_null_label():
    network = dit(classes=3, null_label=True)
    x, times = torch.randn(4, 3, 4, 6), (torch.rand(4), torch.rand(4))
    none = network(x, *times)
    assert torch.equal(none, network(x, *times, torch.full((4,), 3)))
    for label in range(3):
        assert (none - network(x, *times, torch.full((4,), label))).abs().max() > 1e-3
    none.sum().backward()
    reached = network.labels.weight.grad.abs().amax(1) > 0
    assert reached.tolist() == [False, False, False, True]


# --- any backbone ---


@pytest.mark.parametrize("shape", [(1, 4, 8), (5, 8, 4), (3, 6, 2)], ids=str)
def test_shapes(make, shape):
    """Sides that differ and odd numbers of channels; every pixel of the answer and of the state counts."""
    network = make(shape)
    x = torch.randn(2, *shape, requires_grad=True)
    u, features = network.forward_features(x, 0.3, 0.8)
    assert u.shape == x.shape
    side = getattr(network, "patch", 1)
    assert features.shape == (2, network.features, shape[1] // side, shape[2] // side)
    (gradient,) = torch.autograd.grad(u.square().sum(), x)
    assert bool((gradient.abs() > 0).all())
    assert bool((u.abs() > 0).all())


@pytest.mark.parametrize("options", [{"attention": (2, 4), "heads": 2}, {"patch": 2, "taps": (1, 3, 3, 1)}], ids=str)
def test_unet_takes_both_axes_alike(options):
    """Of a mirrored image and with mirrored kernels the answer is mirrored: no pixel is taken for a channel."""
    network, x = unet((3, 8, 8), **options), torch.randn(2, 3, 8, 8)
    u, features = network.forward_features(x, 0.3, 0.8)
    side = options.get("patch", 1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.transpose(2, 3).clone())
        # the pixels of a patch are channels, in the order of rows
        order = torch.arange(3 * side**2).reshape(3, side, side).transpose(1, 2).flatten()
        network.inlet.weight.copy_(network.inlet.weight[:, order])
        network.outlet.weight.copy_(network.outlet.weight[order])
        network.outlet.bias.copy_(network.outlet.bias[order])
    mirrored, mirrored_features = network.forward_features(x.transpose(2, 3), 0.3, 0.8)
    close(mirrored.transpose(2, 3), u)
    close(mirrored_features.transpose(2, 3), features)
    assert (mirrored - u).abs().max() > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_no_gradient(make, dropout):
    network = make(classes=3, dropout=dropout).train()
    x, s, t, cond = torch.randn(4, 3, 4, network.shape[2]), torch.rand(4), torch.rand(4), torch.tensor([2, 0, 1, 1])
    answers = []
    for checkpointing in (False, True):
        network.checkpointing = checkpointing
        network.zero_grad()
        torch.manual_seed(3)
        y = x.clone().requires_grad_(True)
        u, features = network.forward_features(y, s, t, cond)
        (u.square().mean() + features.square().mean()).backward()
        answers.append([u.detach(), y.grad, *(p.grad.clone() for p in network.parameters())])
    close(answers[1], answers[0], rtol=0, atol=1e-12)
    assert all(bool((gradient != 0).any()) for gradient in answers[0])
    if dropout:
        assert (network(x, s, t, cond) - answers[0][0]).abs().max() > 1e-3


def test_checkpointing_is_for_training_only(make):
    """Blocks run twice in a training step, and once in evaluation, without gradients and under a tangent."""
    network, kept = make(checkpointing=True).train(), make().train()
    x, calls = torch.randn(2, 3, 4, network.shape[2]), []
    blocks = network.blocks if hasattr(network, "blocks") else [*network.down, *network.middle, *network.up]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))

    def count(function):
        calls.clear()
        function()
        return len(calls) / len(blocks)

    assert count(lambda: network(x, 0.2, 0.7).sum().backward()) == 2
    with torch.no_grad():
        assert count(lambda: network(x, 0.2, 0.7)) == 1

    def forward_mode():
        _, product = jacobian_product(lambda y: network(y, 0.2, 0.7), x, torch.ones_like(x))
        product.square().sum().backward()
        close(product, jacobian_product(lambda y: kept(y, 0.2, 0.7), x, torch.ones_like(x))[1])

    assert count(forward_mode) == 1
    network.eval()
    assert count(lambda: network(x, 0.2, 0.7).sum().backward()) == 1


def test_half_precision_is_close_to_single(make):
    network = make(classes=3).float().eval()
    x, s, t, cond = torch.randn(4, 3, 4, network.shape[2]).float(), 0.3, 0.8, torch.tensor([2, 0, 1, 1])

    def answers():
        slope = jacobian_product(lambda y: network(y, s, t, cond), x, torch.ones_like(x))[1]
        return [*network.forward_features(x, s, t, cond), slope]

    with torch.no_grad():
        expected = answers()
        with torch.autocast("cpu", torch.bfloat16):
            came = answers()
    for half, single in zip(came, expected, strict=True):
        error = (half.float() - single).norm() / single.norm()
        assert 0 < error < 0.03


@pytest.mark.parametrize(
    ("network", "backend"),
    [(lambda: unet(classes=3, multipliers=(1,)), "eager"), (lambda: dit(classes=3, depth=1), "aot_eager")],
    ids=["unet", "dit"],
)
def test_compiles_without_a_break(network, backend):
    network = network()
    x, s, t, cond = torch.randn(4, 3, 4, network.shape[2]), torch.rand(4), torch.rand(4), torch.tensor([2, 0, 1, 1])
    torch.compiler.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    close(compiled(x, s, t, cond), network(x, s, t, cond))


def test_one_head_at_two_resolutions(make):
    """Head and weights take images of any size; ``D`` is the mean of what the head says at each position."""
    # a U-Net attends where images have a given height
    options = {"attention": ()} if make is unet else {}
    small, large = (make(shape, classes=3, **options) for shape in ((2, 4, 4), (2, 8, 12)))
    head = randomize(DivergenceHead(small.features))
    head.scale.fill_(3.0)
    large.load_state_dict(small.state_dict())
    s, t, cond = torch.rand(3), torch.rand(3), torch.tensor([2, 0, 1])
    for network in (small, large):
        x = torch.randn(3, *network.shape)
        divergence = JointFlowMap(network, head)(x, s, t, cond).divergence
        features = network.forward_features(x, s, t, cond)[1].flatten(2).unbind(-1)
        each = torch.stack([head(x, s, t, cond, position) for position in features])
        close(divergence, each.mean(0))
        assert each.std(0).min() > 1e-2


def test_wrong_states_and_labels_are_refused(make):
    network = make(classes=3)
    x, across = torch.randn(2, 3, 4, network.shape[2]), network.shape[2]
    for wrong in (x[:, :2], x[..., :-2], x.transpose(2, 3), x[:, :, :, 0]):
        with pytest.raises(ValueError, match=rf"the network takes \(B, 3, 4, {across}\)"):
            network(wrong, 0.2, 0.7, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"3 classes and needs cond of shape .* got none"):
        network(x, 0.2, 0.7)
    with pytest.raises(ValueError, match=r"got dtype torch\.float64"):
        network(x, 0.2, 0.7, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="direction is 'sideways'"):
        make(directions="sideways")


@pytest.mark.parametrize(("null", "labels", "said"), [(False, [0, 3], r"0, 3"), (True, [-1, 4], r"-1, 4")])
def test_labels_out_of_range_are_refused(null, labels, said):
    network = dit(classes=3, null_label=null)
    with pytest.raises(ValueError, match=rf"labels lie in \[{said}\], and the network has {4 if null else 3} classes"):
        network(torch.randn(2, 3, 4, 6), 0.2, 0.7, torch.tensor(labels))
    with pytest.raises(ValueError, match=r"got dtype torch.int64, shape \(2, 1\)"):
        network(torch.randn(2, 3, 4, 6), 0.2, 0.7, torch.tensor([[0], [1]]))
    x, labels = torch.randn(2, 3, 4, 6), torch.tensor([0, 3 if null else 2])
    answer = network(x, 0.2, 0.7, labels)
    assert answer.shape == (2, 3, 4, 6)
    for dtype in (torch.uint8, torch.int16, torch.uint16):
        assert torch.equal(network(x, 0.2, 0.7, labels.to(dtype)), answer)


SIZES = {
    r"\(3, 4, 5\).*divisible by patch=2": lambda: dit((3, 4, 5)),
    r"takes \(C, H, W\)": lambda: dit((12,)),
    "width=18 is divisible by 4": lambda: dit(width=18),
    "heads=3": lambda: dit(heads=3),
    "depth=0": lambda: dit(depth=0),
    "set classes=": lambda: dit(null_label=True),
    "'M'; it is one of 'S', 'B', 'L', 'XL'": lambda: DiT.sized("M", (4, 32, 32)),
    r"\(3, 6, 4\).*multiples of 4": lambda: unet((3, 6, 4), multipliers=(1, 2, 2)),
    "8 channels do not divide by heads=3": lambda: unet(heads=3),
    "width=0": lambda: MLP((2,), width=0),
    "blocks=-1": lambda: PreconditionedMLP((2,), blocks=-1),
    "expansion=0": lambda: MLP((2,), expansion=0),
    "classes=-1": lambda: MLP((2,), classes=-1),
    "width=-1": lambda: PreconditionedUNet((1, 4, 4), width=-1),
    "blocks=-2": lambda: ResNet((1, 4, 4), blocks=-2),
}


@pytest.mark.parametrize("said", SIZES)
def test_wrong_sizes_are_refused(said):
    with pytest.raises(ValueError, match=said):
        SIZES[said]()


# --- a second time ---


def resnet(**options):
    network = ResNet((1, 2, 4), width=8, blocks=1, **options)
    network.embedding = OneTimeEmbedding(32)
    return network


ONE_TIME = {
    "mlp": lambda **k: MLP((1, 2, 4), width=16, blocks=1, embedding=OneTimeEmbedding(8), **k),
    "resnet": resnet,
    "unet": lambda **k: unet((1, 2, 4), embedding=OneTimeEmbedding(8), **k),
    "dit": lambda **k: dit((1, 2, 4), embedding=OneTimeEmbedding(8), **k),
}


@pytest.fixture(params=list(ONE_TIME))
def teacher(request):
    """A teacher that never had a second time, frozen and in evaluation mode as they are."""
    torch.manual_seed(1)
    return randomize(ONE_TIME[request.param](classes=3), 0.2).requires_grad_(False).eval()


@pytest.fixture
def states():
    s, t = torch.tensor([0.2, 0.9, 0.5, 0.0]), torch.tensor([0.8, 0.1, 0.6, 1.0])
    return torch.randn(4, 1, 2, 4), s, t, torch.tensor([2, 0, 1, 1])


def test_the_second_time_starts_at_nothing(teacher, states):
    x, s, t, cond = states
    before = copy.deepcopy(teacher.state_dict())
    student = with_second_time(teacher)
    # the teacher stays as it was, and the student can be trained
    assert isinstance(teacher.embedding, OneTimeEmbedding)
    assert not teacher.training
    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    # bit for bit, where torch chooses the same kernels for both
    student.requires_grad_(False)
    expected = teacher.velocity(x, s, cond)
    assert torch.equal(student.velocity(x, s, cond), expected)
    assert torch.equal(student(x, s, t, cond), expected)
    assert torch.equal(student.forward_features(x, s, t, cond)[1], teacher.forward_features(x, s, s, cond)[1])
    # numbers, which take the path of one embedding for all
    assert torch.equal(student(x, 0.3, 0.9, cond), teacher.velocity(x, 0.3, cond))
    assert (expected - teacher.velocity(x, t, cond)).abs().max() > 1e-3
    close(teacher.state_dict(), before, rtol=0, atol=0)


def test_the_added_part_learns_from_the_first_step(teacher, states):
    """It alone, against other targets off the diagonal: the jumps change, the diagonal stays the teacher's."""
    x, s, t, cond = states
    student, target = with_second_time(teacher, hidden=12), torch.randn_like(x)
    student.requires_grad_(False)
    added = student.embedding
    parameters = [*added.interval.parameters(), added.added.weight]
    optimizer = torch.optim.SGD([p.requires_grad_(True) for p in parameters], lr=1e-3)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = (student(x, s, t, cond) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert added.added.weight.grad.abs().max() > 1e-4
        assert bool((added.interval.start.weight.grad != 0).any()) == (step > 0)
        optimizer.step()
    assert losses[1] < losses[0]
    there, back, diagonal = student(x, s, t, cond), student(x, t, s, cond), teacher.velocity(x, s, cond)
    assert bool(((there - diagonal).flatten(1).abs().amax(1) > 1e-9).all())
    assert (back - teacher.velocity(x, t, cond)).abs().max() > 1e-9
    assert torch.equal(student(x, s, s, cond), diagonal)


def test_a_student_is_written_and_made_again(teacher, states, tmp_path):
    """Its embedding was replaced after it was made; the folder says so."""
    x, s, t, cond = states
    student = randomize(with_second_time(teacher, hidden=5)).eval()
    save_pretrained(student, tmp_path)
    again = from_pretrained(tmp_path, FlowMap)
    assert torch.equal(again(x, s, t, cond), student(x, s, t, cond))
    assert again.embedding.interval.features == 5


def test_a_network_trained_on_the_diagonal_only(states):
    """Two times that were always the same: what it answers off the diagonal is dropped."""
    x, s, t, _ = states
    teacher = randomize(MLP((1, 2, 4), width=16, blocks=1, directions="none"))
    expected = teacher.velocity(x, s)
    assert (teacher(x, s, t) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"IntervalEmbedding answers to t.*diagonal_only=True"):
        with_second_time(teacher)
    student = with_second_time(teacher, diagonal_only=True, directions="to_noise")
    assert torch.equal(student(x, s, t), expected)
    assert student.directions.label == "to_noise"
    assert teacher.directions.label == "none"


def preconditioned(network):
    baseline = GaussianBaseline((1, 2, 4), "full")
    baseline.fit([(torch.randn(100, 8) @ torch.randn(8, 8)).reshape(100, 1, 2, 4)])
    return GaussianPreconditioned(network, baseline)


def test_inside_the_preconditioning(states):
    """The inner network starts blind; around it the Gaussian map goes where it went."""
    x, s, t, _ = states
    teacher = preconditioned(randomize(MLP((1, 2, 4), width=16, blocks=1, embedding=OneTimeEmbedding(8)), 0.2))
    student = with_second_time(teacher, directions="to_data")
    assert isinstance(student.network.embedding, AddedTime)
    assert student.directions.label == student.network.directions.label == "to_data"
    assert torch.equal(student.velocity(x, s), teacher.velocity(x, s))
    assert torch.equal(student.network(x, s, t), teacher.network.velocity(x, s))
    assert torch.equal(student(x, s, t), teacher(x, s, t))
    randomize(student.network.embedding.added)
    assert torch.equal(student.velocity(x, s), teacher.velocity(x, s))
    assert (student(x, s, t) - teacher(x, s, t)).abs().max() > 1e-3


def test_angles_are_blind_by_themselves(states):
    x, s, t, _ = states
    teacher = PreconditionedMLP((1, 2, 4), width=16, blocks=1)
    teacher.baseline.fit([torch.randn(100, 1, 2, 4)])
    randomize(teacher.network.blocks)
    randomize(teacher.network.outlet)
    student = with_second_time(teacher)
    assert isinstance(student.network.embedding, AngleEmbedding)
    assert student.network.embedding._baseline[0] is student.baseline is not teacher.baseline
    assert torch.equal(student(x, s, t), teacher(x, s, t))
    randomize(teacher.network.embedding.difference)
    with pytest.raises(ValueError, match="AngleEmbedding starts blind to t"):
        with_second_time(teacher)


class OwnEmbedding(FlowMap):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (FlowMap, "FlowMap has no attribute embedding"),
        (lambda: OwnEmbedding("sinusoids"), "OwnEmbedding has no attribute embedding, a module"),
        (lambda: OwnEmbedding(nn.Linear(2, 8)), "with an attribute features"),
        (lambda: GaussianPreconditioned(FlowMap(), GaussianBaseline((2,))), "FlowMap has no attribute embedding"),
        (lambda: with_second_time(ONE_TIME["mlp"]()), "MLP has a second time already, an AddedTime"),
    ],
    ids=["none", "no module", "no features", "preconditioned", "twice"],
)
def test_a_second_time_is_refused(network, said):
    with pytest.raises(ValueError, match=said):
        with_second_time(network())


def test_the_added_time_is_the_formula():
    embedding = randomize(AddedTime(randomize(IntervalEmbedding(6)), hidden=4))
    s, t = torch.rand(5), torch.rand(5)
    silu = nn.functional.silu
    hidden = silu(embedding.interval(s, t)) - silu(embedding.interval(s, s))
    close(embedding(s, t), embedding.embedding(s, s) + hidden @ embedding.added.weight.T)
    shared = embedding(s[:1].expand(5), t[:1].expand(5))
    assert len(shared) == 1
    close(shared, embedding(s, t)[:1])


def test_the_one_time_embedding_sees_the_state_s_time():
    embedding = randomize(OneTimeEmbedding(16))
    s, t = torch.rand(50), torch.rand(50)
    assert torch.equal(embedding(s, t), embedding(s, s))
    assert torch.pdist(embedding(torch.linspace(0, 1, 50), t)).min() > 1e-3
    assert len(embedding(s[:1].expand(5), t[:5])) == 1
    h = 1e-5
    _, product = jacobian_product(lambda a: embedding(a, t), s, torch.ones(50))
    close(product, (embedding(s + h, t) - embedding(s - h, t)) / (2 * h), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="features=0; it must be at least 1"):
        OneTimeEmbedding(0)
