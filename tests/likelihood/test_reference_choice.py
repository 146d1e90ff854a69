"""A reference that chooses its own solver: as far off as it says, on densities that are known."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.flows import GaussianFlow
from f2d2_lightning.likelihood import ReferenceChoice, reference

Reference = f2.Reference


def gaussian(dim, narrow=-0.5, wide=0.3, count=96):
    """A rotated Gaussian with axes from ``10 ** narrow`` to ``10 ** wide``: its velocity, data, and their log p."""
    torch.manual_seed(dim)
    axes = torch.linalg.qr(torch.randn(dim, dim)).Q * torch.logspace(narrow, wide, dim)
    baseline = f2.GaussianBaseline.from_covariance(torch.randn(dim), axes @ axes.T)
    x = torch.randn(count, dim) @ axes.T + baseline.mean
    return GaussianFlow(baseline).velocity, x, baseline.log_prob(x, torch.ones(count))


@pytest.mark.parametrize(("dim", "narrow"), [(3, -0.5), (3, -2.5), (20, -0.5)])
def test_the_error_is_at_most_what_is_said(dim, narrow):
    velocity, x, exact = gaussian(dim, narrow)
    choice = Reference().chosen(velocity, x)
    answer = choice.reference(velocity, x)
    assert choice.good
    assert choice.reference.probes == 0
    assert choice.evaluations == answer.evaluations <= 1000
    assert float((answer.value - exact).abs().mean()) < choice.error < 0.005 * choice.spread
    assert choice.spread == pytest.approx(float(exact.std()), rel=0.4)
    assert torch.equal(Reference()(velocity, x).value, answer.value)


@pytest.mark.parametrize(("dim", "narrow", "enough"), [(24, -0.02, True), (80, -0.1, False)])
def test_probes_are_as_many_as_their_error_needs(dim, narrow, enough):
    velocity, x, exact = gaussian(dim, narrow, -narrow)
    choice = Reference().chosen(velocity, x)
    off = (choice.reference(velocity, x).value - exact).abs().mean()
    assert (
        0 < choice.reference.probes < reference.MOST_PROBES
        if enough
        else choice.reference.probes == reference.MOST_PROBES
    )
    # the mean absolute value of normal errors is .8 of their deviation
    assert 0.5 < float(off) / choice.error < 1.1
    assert choice.good == enough
    assert enough or eval(choice.remedy()).probes > reference.MOST_PROBES


def test_a_stiff_flow_takes_more_steps_or_steps_near_the_data():
    even = [Reference(near_data=0.0).chosen(*gaussian(3, narrow)[:2]) for narrow in (-0.5, -2.0)]
    assert even[0].reference.steps < even[1].reference.steps
    free = Reference().chosen(*gaussian(3, -2.0)[:2])
    assert free.reference.near_data == 0.5
    assert free.reference.steps < even[1].reference.steps


def test_it_is_bounded_and_says_what_is_left(monkeypatch):
    assert reference.MOST_EVALUATIONS == 1000
    monkeypatch.setattr(reference, "MOST_EVALUATIONS", 200)
    velocity, x, exact = gaussian(3, -2.0)
    choice = Reference(near_data=0.0).chosen(velocity, x)
    with pytest.warns(UserWarning, match="finer would be Reference") as caught:
        answer = Reference(near_data=0.0)(velocity, x)
    assert answer.evaluations == choice.evaluations == 200
    assert not choice.good
    assert f"{100 * choice.error / choice.spread:.2g} % of the spread" in str(caught[0].message)
    off = float((answer.value - exact).abs().mean())
    assert off < choice.error
    finer = eval(choice.remedy())
    assert finer.steps == 2 * choice.reference.steps
    assert float((finer(velocity, x).value - exact).abs().mean()) < 0.005 * choice.spread


@pytest.mark.parametrize("dim", [3, 24])
def test_what_is_given_stays(dim):
    velocity, x, _ = gaussian(dim)
    as_before = f2.reference_log_prob(
        velocity, x, divergence=f2.divergence.Exact() if dim < 16 else f2.Hutchinson(), method="heun2", steps=20, seed=0
    )
    assert torch.equal(Reference(steps=20)(velocity, x).value, as_before.value)
    for given in (Reference(steps=20), Reference("dopri5")):
        assert given.chosen(velocity, x).reference is given
    given = {"method": "midpoint", "probes": 3, "near_data": 0.25, "seed": 5, "batch": 10}
    choice = Reference(**given).chosen(velocity, x)
    assert {name: getattr(choice.reference, name) for name in given} == given
    assert choice.evaluations == choice.reference(velocity, x).evaluations
    # parts of the batch change rounding alone
    whole = Reference(**given | {"steps": choice.reference.steps, "batch": None})(velocity, x)
    parts = choice.reference(velocity, x)
    assert torch.allclose(whole.value, parts.value)
    assert torch.allclose(whole.standard_error, parts.standard_error)


@pytest.mark.parametrize("mode", ["forward", "reverse", "finite"])
def test_states_of_any_kind(mode):
    """With ``cond``, point masses, in single precision; and nothing is drawn from the global generator."""
    velocity, x, _ = gaussian(3)
    cond = torch.arange(96) % 2
    x[:48] = x[0]

    def conditional(x, t, cond):
        return velocity(x, t) * (1 + 0.1 * cond[:, None].to(x))

    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.float64):
        choice = Reference(mode=mode).chosen(conditional, x.to(dtype), cond)
        assert choice.good
        assert choice.reference.mode == mode
        assert choice.reference(conditional, x.to(dtype), cond).value.dtype == dtype
    assert torch.equal(before, torch.get_rng_state())
    velocity = GaussianFlow(f2.GaussianBaseline((3,))).velocity
    assert Reference().chosen(velocity, torch.zeros(20, 3)).good  # all of the same log p


@pytest.mark.parametrize("finite", [True, False])
def test_few_states_say_too_little(finite):
    velocity, x, exact = gaussian(3, count=3 if finite else 20)
    known = (finite | (torch.arange(len(x)) < 3)).double()
    choice = Reference(near_data=0.2).chosen(lambda x, t, cond: velocity(x, t) / cond[:, None], x, known)
    assert choice.reference == Reference("heun2", 500, near_data=0.2)
    assert f"cannot be told from {len(x)} states" in str(choice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(Reference()(velocity, x[:3]).value, exact[:3], atol=1e-3)


def test_a_choice_in_a_file_and_in_words():
    choice = ReferenceChoice(Reference("rk4", 32, 0, near_data=0.5), 64, 0.001, 0.0, 1.0, 0.04)
    assert ReferenceChoice.from_dict(choice.to_dict(), Reference()) == choice
    assert ReferenceChoice.from_dict(None, Reference()) is None
    # where nothing is left open, nothing was chosen
    assert ReferenceChoice.from_dict(choice.to_dict(), Reference(steps=3)) is None
    assert choice.said(300) == (
        "reference: 32 steps of rk4 (128 evaluations), 50% of them near the data, exact divergence: off by 0.1 % of "
        "the spread of log p (0.001 of 1 nats); about 12 s for 300 samples"
    )
    assert "about 2 minutes for 6,000 samples" in choice.said(6000, processes=2)
    assert "about" not in choice.said(float("inf"))


@dataclass(frozen=True)
class Halved(Reference):
    """Somebody's own."""

    share: float = 0.5


def test_a_choice_of_a_subclass_in_a_file():
    velocity, x, _ = gaussian(3)
    given = Halved(share=0.25, seed=3)
    choice = given.chosen(velocity, x)
    kept = choice.to_dict()
    assert ReferenceChoice.from_dict(kept, given) == choice
    assert set(kept["reference"]) == {"method", "steps", "probes", "near_data", "batch"}
    settings = kept["reference"]
    wrong = [5, {}, kept | {"reference": 5}, kept | {"states": "a"}, kept | {"moved": None}, kept | {"identity": 3}]
    bad = [{"method": "foo"}, {"steps": "a"}, {"steps": 0}, {"steps": True}, {"probes": -1}, {"near_data": 1.5}]
    wrong += [kept | {"reference": settings | one} for one in (*bad, {"near_data": "b"}, {"batch": 0}, {"batch": 0.5})]
    for values in wrong:
        with pytest.raises(
            ValueError, match=r"the choice of a reference in a file|method|steps|probes|near_data|batch"
        ):
            ReferenceChoice.from_dict(values, given)


def growing(dim, wave, rate=1.0):
    """``v = rate (1 + cos(2 pi wave t)) x``: even steps that take every wave at its crest see twice the growth."""

    def velocity(x, t, cond=None):
        return rate * (1 + torch.cos(2 * math.pi * wave * t)).reshape(-1, *(1,) * (x.dim() - 1)) * x

    torch.manual_seed(0)
    x = torch.randn(64, dim, dtype=torch.float64)
    exact = -0.5 * (x * math.exp(-rate)).square().sum(1) - dim * (0.5 * math.log(2 * math.pi) + rate)
    return velocity, x, exact


def test_a_doubling_that_moves_little_by_accident_is_not_believed():
    velocity, x, exact = growing(3, wave=96)
    first = [Reference("rk4", steps, near_data=0.0)(velocity, x).value for steps in (16, 32)]
    assert torch.allclose(*first)
    assert float((first[0] - exact).abs().mean()) > 1
    choice = Reference().chosen(velocity, x)
    assert choice.good
    assert float((choice.reference(velocity, x).value - exact).abs().mean()) < choice.error


@pytest.mark.parametrize(("dim", "probes"), [(16, None), (100, 50), (64, 0)])
def test_a_search_needs_little_memory(monkeypatch, dim, probes):
    tangents, rows = probes or min(dim, 32), []
    monkeypatch.setattr(reference, "NUMBERS", 20 * dim * tangents)

    def counting(x, t, cond=None):
        rows.append(len(x))
        return 0.1 * x

    for batch, most in ((None, 20), (3, 3)):
        rows.clear()
        assert Reference(probes=probes, batch=batch).chosen(counting, torch.randn(64, dim)).good
        assert max(rows) == most * tangents


@pytest.mark.parametrize("dim", [10, 40])
def test_probes_do_not_widen_the_spread(dim):
    """There and back, without a trace: log p is that of the prior, and probes scatter as much as it is wide."""
    generator = torch.Generator().manual_seed(0)
    mix = 8 / dim * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    mix = (mix + mix.T) * (1 - torch.eye(dim)) / 2**0.5
    x, wide = (torch.randn(64, size, generator=generator, dtype=torch.float64) for size in (dim, 1))
    x = x / x.norm(dim=1, keepdim=True) * (dim + 2 * wide.clamp(-2, 2)).sqrt()

    def velocity(x, t, cond=None):
        return torch.cos(2 * math.pi * t).reshape(-1, 1) * (x @ mix)

    choice, exact = Reference().chosen(velocity, x), reference._spread(-x.square().sum(1) / 2)
    pilot = reference._spread(Reference("rk4", choice.reference.steps, 1)(velocity, x).value)
    assert pilot > 1.2 * exact
    assert choice.spread == pytest.approx(exact, rel=1e-3 if dim <= 16 else 0.1)
