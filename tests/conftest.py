"""Every test runs in double precision, from one seed, on one thread."""

import pytest
import torch

from problems import PROBLEMS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def double_precision():
    # strategies set it for the processes that they start, and for this one
    torch.set_num_threads(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def _named(prefix):
    return [name for name in PROBLEMS if name.startswith(prefix)]


@pytest.fixture(params=list(PROBLEMS))
def problem(request):
    """Every problem: Gaussians and mixtures, vectors and images, both paths."""
    return PROBLEMS[request.param]()


@pytest.fixture(params=_named("gaussian"))
def gaussian(request):
    """A rotated anisotropic Gaussian, whose flow map is known."""
    return PROBLEMS[request.param]()


@pytest.fixture(params=_named("mixture"))
def mixture(request):
    """A Gaussian mixture, whose velocity and density are known."""
    return PROBLEMS[request.param]()


@pytest.fixture(params=[name for name in PROBLEMS if name.endswith("linear")])
def linear(request):
    """The problems on the linear path."""
    return PROBLEMS[request.param]()
