"""The parts of ``examples/boltzmann.py``: populations with a known partition function, symmetries, alignment."""

from __future__ import annotations

import math

import pytest
import torch
from boltzmann import generator
from boltzmann_systems import SYSTEMS, System, annealed, moved

STIFF, TRAP = 0.7, 0.4
SPRINGS = System(4, 3, lambda squared: STIFF / 2 * squared, TRAP, (0.0, 0.0))
"""Its energy is that of a Gaussian: each state's square counts by all pairs' springs and the trap."""


def turned(system, x, turn, order):
    return system.states((system.positions(x) @ turn)[:, order])


@pytest.fixture(params=SYSTEMS)
def moves(request):
    """A system, states, and a reflected turn with a new order of the particles."""
    system, drawn = SYSTEMS[request.param], torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(system.axes, system.axes, generator=drawn, dtype=torch.float64))[0]
    turn = turn * torch.cat((-torch.linalg.det(turn)[None], torch.ones(system.axes - 1)))
    x = 3 * torch.randn(20, system.dim, generator=drawn, dtype=torch.float64)
    return system, x, turn, torch.randperm(system.particles, generator=drawn)


def test_populations_are_those_of_springs():
    torch.manual_seed(0)
    x, log_z = annealed(SPRINGS, 1000)
    variance = 1 / (4 * STIFF + TRAP)
    assert log_z == pytest.approx(SPRINGS.dim / 2 * math.log(2 * math.pi * variance), abs=0.1)
    assert float(x.var()) == pytest.approx(variance, rel=0.06)
    torch.testing.assert_close(SPRINGS.energy(x), x.square().sum(-1) / (2 * variance))
    x, leap = moved(SPRINGS.energy, 0.1 * x, 40, 0.1)
    assert float(x.var()) == pytest.approx(variance, rel=0.06)
    assert leap > 0.1  # the springs are soft


def test_states_are_positions_around_their_mean(moves):
    system, x, *_ = moves
    positions = system.positions(x)
    assert float(positions.mean(1).abs().max()) < 1e-12
    torch.testing.assert_close(system.states(positions + 5.0), x)
    torch.testing.assert_close(positions.square().sum((1, 2)), x.square().sum(1))


def test_energy_and_network_know_no_order_and_no_direction(moves):
    system, x, turn, order = moves
    other = turned(system, x, turn, order)
    torch.testing.assert_close(system.energy(other), system.energy(x))
    torch.manual_seed(0)
    network = generator(system, 16).double()
    (here, seen), (there, seen_there) = (network.forward_features(at, 0.2, 0.7) for at in (x, other))
    assert float((here - x).detach().std()) > 0.1
    torch.testing.assert_close(turned(system, here, turn, order), there)
    torch.testing.assert_close(seen, seen_there)


def test_aligned_noise_is_nearer_and_otherwise_the_same(moves):
    system, x, turn, _ = moves
    noise = torch.randn_like(x)
    near = system.aligned(noise, x)
    torch.testing.assert_close(system.energy(near), system.energy(noise))
    assert bool(((near - x).square().sum(1) <= (noise - x).square().sum(1) + 1e-9).all())
    # what is turned a little, in its own order, comes back
    small = torch.linalg.matrix_exp(0.1 * (turn - turn.T))
    torch.testing.assert_close(system.aligned(turned(system, x, small, torch.arange(system.particles)), x), x)
