"""Every example runs in its short form and says something finite for every step count."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--steps", "10"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = dict(re.findall(r"^(\d+) steps?: (.*)$", done.stdout, re.MULTILINE))
    assert {"1", "2", "4", "8"} <= set(lines), done.stdout
    for steps, line in lines.items():
        numbers = [float(number) for number in re.findall(rf"(?<![\w.]){NUMBER}(?![\w])", line)]
        assert numbers, (steps, line)
        assert all(math.isfinite(number) for number in numbers), (steps, line)
        assert "log p" in line, (steps, line)


def test_somebody_elses_models_know_nothing_of_this_package():
    assert "f2d2" not in (EXAMPLES / "third_party_models.py").read_text()
