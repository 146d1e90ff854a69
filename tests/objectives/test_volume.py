"""Volume regression: a frozen map's own change of density, against closed forms and against autograd."""

import itertools

import pytest
import torch

from f2d2_lightning import DivergenceHead, Intervals, Inversion, JointFlowMap, as_flow_map, log_prob, sample
from f2d2_lightning.divergence import Exact
from f2d2_lightning.flows import Point
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.objectives import Batch, TeacherSource, VolumeRegression
from problems import Logistic, LogisticMap, Nothing


def bent(x, s, t, cond=None):
    """A map whose jumps are not the flow of its velocity: they do not compose."""
    rate = (t - s)[:, None]
    return 0.15 * torch.sin(x.flip(1) + s[:, None]) * (1 + rate) - 0.3 * x + 0.1 * x.sum(1, keepdim=True).cos()


class Bent(torch.nn.Module):
    """The same as a network with features."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, s, t, cond=None):
        return bent(x, s, t) + 0 * self.unused


def test_targets_of_a_flow_are_its_average_divergence():
    """The logistic flow's jumps are exact, so the determinant and the integral of the divergence are one number."""
    joint = LogisticMap(Logistic())
    s, t = torch.tensor([0.0, 0.2, 0.7, 0.4]), torch.tensor([1.0, 0.5, 0.7, 0.9])
    x = Logistic().data(4)
    volume = VolumeRegression().volume(joint, Point(x, s), t)
    torch.testing.assert_close(volume, joint(x, s, t).divergence, rtol=1e-8, atol=1e-8)


def test_targets_are_determinants_of_jumps_and_not_divergences_along_the_flow():
    joint = JointFlowMap(as_flow_map(bent, "to_data"), DivergenceHead(network=Nothing()))
    s, t, x = torch.tensor([0.0, 0.3]), torch.tensor([1.0, 0.8]), torch.randn(2, 3)
    divergence = VolumeRegression().volume(joint, Point(x, s), t)
    for row in range(2):
        one = slice(row, row + 1)
        jump = lambda y, one=one: (y[None] + (t - s)[one, None] * bent(y[None], s[one], t[one]))[0]  # noqa: E731
        volume = torch.linalg.slogdet(torch.autograd.functional.jacobian(jump, x[row])).logabsdet
        torch.testing.assert_close((t - s)[row] * divergence[row], volume)


@pytest.mark.parametrize(("dim", "determinant"), [(300, None), (300, "exact"), (5, "estimate"), (5, None)])
def test_volumes_are_exact_in_few_dimensions_and_estimated_in_many(dim, determinant):
    """Each number moves by itself: determinants and divergences are sums, whatever the probes' signs."""
    wave = lambda x, s, t, cond=None: 0.5 * x.sin() + 0 * cond["label"][:, None]  # noqa: E731
    joint = JointFlowMap(as_flow_map(wave), DivergenceHead(network=Nothing()))
    s, t, x = torch.tensor([0.0, 0.9, 0.4, 0.2]), torch.tensor([1.0, 0.1, 0.4, 0.3]), torch.randn(4, dim)
    volume = VolumeRegression(determinant=determinant).volume(joint, Point(x, s, {"label": torch.ones(4)}), t)
    gap, slope = (t - s)[:, None], 0.5 * x.cos()
    known = torch.where(gap == 0, slope, torch.log1p(gap * slope) / torch.where(gap == 0, 1, gap)).sum(1)
    torch.testing.assert_close(volume, known, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("directions", ["to_data", "both"])
def test_a_frozen_head_learns_the_density_of_the_samples(directions):
    """Likelihoods equal the change of variables with every jump's determinant: of samples, and of given points.

    The points' by inversion where the map goes to data alone, else by its own jumps to noise, which invert nothing.
    """
    torch.manual_seed(0)
    dim = 2
    network = torch.nn.Sequential(
        torch.nn.Linear(dim + 2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU()
    )

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = network, torch.nn.Linear(64, 1)

        def forward(self, x, s, t, cond=None):
            return self.out(self.body(torch.cat((x, s[:, None], t[:, None]), 1)))[:, 0]

    joint = JointFlowMap(as_flow_map(Bent(), directions), DivergenceHead(network=Own()), frozen=True)
    objective = VolumeRegression(capacity=4000, chunk=250, intervals=Intervals(directions, 0.1, 0.9, steps=(1, 2)))
    optimizer = torch.optim.Adam(joint.head.parameters(), lr=3e-3)
    source, data = TeacherSource(joint.velocity, Exact()), torch.randn(500, dim)
    for _ in range(600):
        optimizer.zero_grad()
        objective.loss(joint, Batch(data, source)).loss.backward()
        optimizer.step()

    @torch.no_grad()
    def change(x, steps, to_noise=False):
        """Where jumps lead, and the logarithm of their determinants."""
        total = torch.zeros(len(x))
        for a, b in itertools.pairwise(time_grid(steps, to_noise)):
            s, t = torch.full((len(x),), a), torch.full((len(x),), b)
            total = total + (t - s) * objective.volume(joint, Point(x, s), t)
            x = x + (t - s)[:, None] * joint(x, s, t).velocity
        return x, total

    for steps in (1, 2):
        noise = torch.randn(200, dim)
        x, volume = change(noise, steps)
        exact = normal_log_prob(noise) - volume
        with torch.no_grad():
            made = sample(joint, noise, steps, with_log_prob=True)
            answer = log_prob(joint, x, steps, inversion=Inversion() if directions == "to_data" else None)
        torch.testing.assert_close(made.state, x)
        assert float((made.log_prob - exact).abs().mean()) < 0.05
        if directions == "both":
            ends, volume = change(x, steps, to_noise=True)
            exact = normal_log_prob(ends) + volume
        good = torch.ones(len(x), dtype=torch.bool) if answer.converged is None else answer.converged
        assert float(good.double().mean()) > 0.9
        assert float((answer.value - exact)[good].abs().mean()) < 0.05


@pytest.mark.parametrize("directions", ["to_data", "to_noise", "both"])
def test_states_are_those_that_the_jumps_lead_to(directions):
    """With ``own_path=1``: at each time, where a grid's jumps from noise, or from the data, have come to by then."""
    growth = lambda x, s, t, cond=None: x * (torch.expm1(t - s) / (t - s))[:, None]  # noqa: E731
    joint = JointFlowMap(as_flow_map(growth, directions), DivergenceHead(network=Nothing()))
    intervals = Intervals(directions, 0.0, 0.0, steps=(4,))
    objective = VolumeRegression(capacity=400, chunk=400, intervals=intervals, own_path=1.0)
    data = torch.full((400, 1), 0.7)
    objective.loss(joint, Batch(data, TeacherSource(joint.velocity)))
    kept = objective.state_dict()["kept"]
    x, s, to_noise = kept["x"][:, 0], kept["s"], kept["s"] > kept["t"]
    assert (bool(to_noise.any()), bool((~to_noise).any())) == (directions != "to_data", directions != "to_noise")
    torch.testing.assert_close(x[to_noise], 0.7 * (s[to_noise] - 1).exp())
    begun = (x * (-s).exp())[~to_noise]
    if len(begun):  # normal, as noise is and one point of the data is not
        assert abs(float(begun.mean())) < 0.3
        assert 0.8 < float(begun.std()) < 1.2


def test_examples_are_kept_refreshed_and_restored():
    joint = JointFlowMap(as_flow_map(bent, "to_data"), DivergenceHead(network=Nothing()), frozen=True)
    objective, data = VolumeRegression(capacity=48, chunk=16, refresh=8.0), torch.randn(10, 2)
    source = TeacherSource(joint.velocity)
    for _ in range(3):
        objective.loss(joint, Batch(data, source))
    full = objective.state_dict()["kept"]
    assert len(full["x"]) == 48
    objective.loss(joint, Batch(data, source))
    assert torch.equal(objective.state_dict()["kept"]["x"], full["x"])
    objective.loss(joint, Batch(data, source))
    changed = (objective.state_dict()["kept"]["x"] != full["x"]).any(1)
    assert changed.sum() == 16
    again = VolumeRegression(capacity=48, chunk=16, refresh=8.0)
    again.load_state_dict(objective.state_dict())
    losses = []
    for one in (objective, again):
        torch.manual_seed(7)
        losses.append([float(one.loss(joint, Batch(data, source)).loss) for _ in range(5)])
    assert losses[0] == losses[1]


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="own_path=2"):
        VolumeRegression(own_path=2)
    with pytest.raises(ValueError, match="determinant is 'exactly'"):
        VolumeRegression(determinant="exactly")
