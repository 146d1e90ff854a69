"""Every example runs in its short form and says something finite for every step count."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from launching import output_of

EXAMPLES = Path(__file__).parent.parent / "examples"
NOT_EXAMPLES = {
    "third_party_models.py",
    "posterior_tasks.py",
    "boltzmann_systems.py",
    "policy_task.py",
    "policy_maps.py",
}
OTHERWISE = {"policy.py"}
"""It has returns and no likelihoods of data: ``test_policy.py``."""
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in NOT_EXAMPLES | OTHERWISE)

NUMBER = r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf|nan))"


@pytest.mark.parametrize("name", NAMES)
def test_example_runs_in_its_short_form(name, tmp_path):
    printed = output_of([EXAMPLES / name, "--steps", "10"], tmp_path)
    lines = dict(re.findall(r"^(\d+) steps?: (.*)$", printed, re.MULTILINE))
    assert {"1", "2", "4", "8"} <= set(lines), printed
    for steps, line in lines.items():
        numbers = [float(number) for number in re.findall(rf"(?<![\w.]){NUMBER}(?![\w])", line)]
        assert numbers, (steps, line)
        assert all(math.isfinite(number) for number in numbers), (steps, line)
        assert "log p" in line, (steps, line)


def test_somebody_elses_models_know_nothing_of_this_package():
    assert "f2d2" not in (EXAMPLES / "third_party_models.py").read_text()
