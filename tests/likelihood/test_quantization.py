"""Dequantization, and bits per dimension against the discrete code length."""

import math

import numpy as np
import pytest
import torch

from f2d2_lightning import Quantization, bits_per_dim
from f2d2_lightning.data.dataset import DequantizedDataset
from problems import z_score

close = torch.testing.assert_close
RANGES = [(2, -1.0, 1.0), (17, -1.0, 1.0), (256, -1.0, 1.0), (256, 0.0, 1.0), (17, 0.0, 17.0)]


@pytest.mark.parametrize(("levels", "low", "high"), RANGES)
def test_bits_of_a_density_that_is_flat_in_each_bin(levels, low, high):
    """There the bound is tight: bits per dimension are the entropy code's own."""
    quantization = Quantization(levels, low, high)
    probabilities = torch.rand(levels).softmax(0)
    k = torch.multinomial(probabilities, 5 * 7, replacement=True).reshape(5, 7)
    x = quantization.dequantize(k)
    # piecewise-constant density of a continuous variable, evaluated where x landed
    edges = torch.linspace(low, high, levels + 1)
    bins = torch.bucketize(x, edges, right=True) - 1
    density = probabilities[bins] / ((high - low) / levels)
    expected = -probabilities[k].log2().mean(-1)
    close(bits_per_dim(density.log().sum(-1), 7, levels, low, high), expected)


def test_bits_bound_the_discrete_code_of_a_gaussian():
    """Jensen: the average over U is above the code length of the binned Gaussian, and near it for fine bins."""
    normal = torch.distributions.Normal(0.1, 0.3)
    for levels, gap in ((4, 0.05), (256, 1e-4)):
        quantization = Quantization(levels)
        k = torch.arange(levels)
        edges = torch.linspace(-1, 1, levels + 1)
        probabilities = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
        u = (torch.arange(2000) + 0.5) / 2000
        bound = torch.stack(
            [bits_per_dim(normal.log_prob(quantization.dequantize(k, v.expand(levels))), 1, levels) for v in u]
        )
        excess = (bound.mean(0) + probabilities.log2()) @ probabilities
        assert 0 < float(excess) < gap * 10
        if levels == 4:
            assert float(excess) > 1e-2


def test_continuous_data_and_gradient():
    log_prob = torch.randn(3, requires_grad=True)
    close(bits_per_dim(log_prob, 5), -log_prob / 5 / math.log(2))
    (gradient,) = torch.autograd.grad(bits_per_dim(log_prob, 5, 256).sum(), log_prob)
    close(gradient, torch.full((3,), -1 / (5 * math.log(2))))


@pytest.mark.parametrize(("levels", "low", "high"), RANGES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64], ids=str)
def test_round_trip(levels, low, high, dtype):
    quantization = Quantization(levels, low, high)
    k = torch.arange(levels).to(dtype).repeat(50, 1)
    x = quantization.dequantize(k)
    assert torch.equal(quantization.quantize(x), k.long())
    assert low <= float(x.min())
    assert float(x.max()) < high
    within = (x - low) / quantization.width - k.long()
    assert z_score(within.flatten(), 0.5).abs() < 4.5
    close(float(within.var()), 1 / 12, rtol=0.3, atol=0.0)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_edges_of_the_bins(levels):
    quantization = Quantization(levels)
    k = torch.arange(levels)
    center = quantization.dequantize(k, torch.full((levels,), 0.5))
    close(center, -1 + (2 * k + 1) / levels)
    last = quantization.dequantize(k, torch.full((levels,), 1 - 2.0**-40))
    assert torch.equal(quantization.quantize(last), k)
    assert float(last.max()) < 1
    assert quantization.quantize(torch.tensor([-5.0, 5.0, 1.0, -1.0])).tolist() == [0, levels - 1, levels - 1, 0]


@pytest.mark.parametrize(("levels", "low", "high"), RANGES)
def test_edges_of_the_bins_in_single_precision(levels, low, high):
    """``k + U`` may round up to the next level; the state must not, nor in the bin that ends at zero."""
    torch.set_default_dtype(torch.float32)
    quantization = Quantization(levels, low, high)
    k = torch.arange(levels)
    x = quantization.dequantize(k, torch.full(k.shape, 1 - 2.0**-24))
    assert x.dtype == torch.float32
    assert torch.equal(quantization.quantize(x), k)
    assert float(x.max()) < high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1,), "at least two levels"), ((256, 1.0, 1.0), "low < high"), ((256, 1.0, -1.0), "low < high")],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantization(*arguments)
    with pytest.raises(ValueError, match=message):
        bits_per_dim(torch.zeros(1), 1, *arguments)


def test_16_bit_images_in_the_type_that_they_are_kept_in():
    """NumPy's and torch's uint16: of 65,536 levels, of a reader that gives them, and in draws."""
    images = np.arange(2**16, dtype=np.uint16).reshape(16, 1, 64, 64)
    quantization, k = Quantization(2**16), torch.from_numpy(images)
    quantization.check_range_of(k)
    for states in (
        DequantizedDataset(k, None, quantization).__getitems__([*range(16)]),
        DequantizedDataset(images, None, quantization).__getitems__([*range(16)]),
        *quantization.draws(k, 1, 0),
    ):
        assert torch.equal(quantization.quantize(states), k.long())


def test_bad_data():
    with pytest.raises(ValueError, match=r"quantized data have shape \(0, 3\), and so none"):
        Quantization(17).dequantize(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="hold the values 0 to 17, but levels=17"):
        Quantization(17).dequantize(torch.arange(18))
    with pytest.raises(ValueError, match="hold the values -1 to 3"):
        Quantization(17).dequantize(torch.tensor([-1, 3]))
    with pytest.raises(ValueError, match="integers 0 to 16 are expected"):
        Quantization(17).dequantize(torch.rand(3))
    with pytest.raises(ValueError, match="set levels=17"):
        Quantization(256).check_range_of(torch.arange(17))
    Quantization(17).check_range_of(torch.arange(17))
    with pytest.raises(ValueError, match="dim=0; it must be at least 1"):
        bits_per_dim(torch.zeros(1), 0)
