"""The parts of ``examples/policy.py``: the task, densities that are those of their actions, and the commands."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from policy_maps import POLICIES, policy
from policy_task import ACTION, LENGTH, SEEN, Field

from launching import output_of

EXAMPLES = Path(__file__).parent.parent / "examples"


def made(name, seen, steps=2):
    """A policy that has learned something, whatever it is, and its answer."""
    torch.manual_seed(0)
    actor = policy(name, 8, steps, 1.0)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        return actor, actor.act(seen)


def test_a_push_moves_towards_the_goal_and_crossing_costs():
    torch.manual_seed(0)
    field = Field(3)
    field.at = torch.tensor([[-1.0, 0.0], [-0.45, 0.0], [1.0, 0.0]])
    field.goal = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    assert field.see().shape == (3, SEEN)
    reward = field.push(torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    # no faster than a force of 1; a tenth of distance, of 3 for crossing, and of a twentieth of the force's square
    torch.testing.assert_close(reward, -0.1 * torch.tensor([2 - 0.03 + 0.05 * 25, 1.45 + 3, 0.0]))
    assert field.left == LENGTH - 1


@pytest.mark.parametrize("name", POLICIES)
def test_an_action_is_as_likely_afterwards_as_when_it_was_drawn(name):
    seen = torch.randn(50, SEEN)
    actor, drawn = made(name, seen)
    told = actor.of(drawn.action, seen, drawn.noise + 0.05)
    # the ODE's midpoint forwards is not its own way back
    torch.testing.assert_close(told.log_q, drawn.log_q, rtol=0, atol=0.02 if name == "ode" else 1e-3)
    assert drawn.action.shape == (50, ACTION)
    assert told.evaluations > 0


@pytest.mark.parametrize("name", ["gaussian", "ode", "jump"])
def test_densities_integrate_to_one(name):
    actor, _ = made(name, torch.randn(1, SEEN), steps=1)
    side = torch.linspace(-6, 6, 61)
    grid = torch.cartesian_prod(side, side)
    seen = torch.randn(1, SEEN).expand(len(grid), SEEN)
    with torch.no_grad():
        density = actor.of(grid, seen, grid).log_q.exp().nan_to_num()
    assert float(density.sum()) * 0.2**2 == pytest.approx(1.0, abs=0.02)


def test_refreshing_brings_the_head_to_the_determinants():
    seen = torch.randn(200, SEEN)
    actor, drawn = made("head", seen)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss, evaluations = actor.refresh(seen, drawn.noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert evaluations == 2 * (2 + ACTION) * 200
    assert losses[-1] < 0.2 * losses[0]


def test_the_command_says_what_each_policy_did(tmp_path):
    short = ["--rounds", "1", "--envs", "8", "--epochs", "1", "--width", "8"]
    printed = output_of([EXAMPLES / "policy.py", *short], tmp_path)
    for name in POLICIES:
        said = re.search(rf"^{name}, seed 0\n  round 1: return (\S+), (\S+) million .* mean ratio (\S+)", printed, re.M)
        assert said, printed
        assert all(math.isfinite(float(number.rstrip(","))) for number in said.groups())
