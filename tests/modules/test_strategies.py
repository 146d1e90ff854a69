"""DDP and FSDP2 in two processes: ranks equal, and equal to one process; resume and checkpoints, whole and sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launching import difference, ended, get, launch, logs

WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"
COMPARED = ("module", "module frozen", "callback", "callback frozen", "callback manual", "callback accumulating")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("strategies")
    ended(launch(WORKER, folder, 2) + launch(WORKER, folder, 1), 400)
    names = ("1-0", "2-0", "2-1")
    missing = [name for name in names if not (folder / f"{name}.pt").exists()]
    assert not missing, logs(folder)
    loaded = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}
    return loaded


@pytest.mark.parametrize("who", ["teacher", "student", "callback"])
def test_figures_do_not_depend_on_the_number_of_processes(results, who):
    one, *two = (get(results, process, f"evaluation {who}") for process in ("1-0", "2-0", "2-1"))
    assert len(one) > 4
    for other in two:
        assert one.keys() == other.keys()
        # of the test's 49 samples one is repeated in two processes, and the reference is of 13
        assert {name: other[name] for name in one} == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("who", ["teacher", "student", "callback"])
def test_processes_take_the_reference_that_the_first_one_chose(results, who):
    first, second = (get(results, f"2-{rank}", f"chosen {who}") for rank in (0, 1))
    assert first == second
    # no two processes measure the same time
    assert first["steps"] in (32, 64)
    assert first["seconds"] > 0


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_process_without_samples_takes_part_in_the_choice(results, who):
    first, second = (get(results, f"2-{rank}", f"alone {who}") for rank in (0, 1))
    assert first == second
    assert first["steps"] in (32, 64)


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_agree_with_each_other_and_with_one(results, strategy, case):
    first, second = (get(results, f"2-{rank}", f"{strategy} {case}") for rank in (0, 1))
    assert difference(first, second) == 0
    one = get(results, "1-0", f"one {case}")
    if strategy == "fsdp":
        # processes would ask a sharded network a different number of times
        assert any("own_density" in name for name in one["metrics"])
        one = one | {"metrics": {name: v for name, v in one["metrics"].items() if "own_density" not in name}}
    assert difference(first, one) < 1e-12
    assert any(name.endswith("_2") or "nll" in name for name in first["metrics"])


@pytest.mark.parametrize("case", ["module", "callback"])
def test_the_comparison_sees_what_it_should(results, case):
    """Joint and frozen differ in the backbone, and both train the head."""
    joint, frozen = (get(results, "1-0", f"one {name}") for name in (case, f"{case} frozen"))
    backbone = [name for name in joint["state"] if name.startswith(("net.", "joint.flow_map."))]
    assert difference(*({n: r["state"][n] for n in backbone} for r in (joint, frozen))) > 1e-4
    # the head starts at zero and moves away, and its average follows at a distance
    for result in (joint, frozen):
        live, average = (
            next(v for n, v in result["state"].items() if n.startswith(starts) and n.endswith("head.out.weight"))
            for starts in (("live.", "joint."), "average.")
        )
        assert min(float(v.abs().max()) for v in (live, average, live - average)) > 1e-6


@pytest.mark.parametrize("which", ["module", "callback"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp-sharded"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(results, strategy, which):
    """Within an epoch and at its end, with a pool that differs between the processes; one of them got a signal."""
    for rank in (0, 1):
        answer = get(results, f"2-{rank}", f"{strategy} resume {which}")
        assert difference(answer["uninterrupted"], answer["resumed"]) == 0
        assert answer["is_folder"] is (strategy == "fsdp-sharded")
        assert (answer["code"], answer["older"]) == (128 + 15, which == "callback")


def test_processes_draw_different_numbers(results):
    """Their pools would otherwise hold the same trajectories."""
    states = [get(results, f"2-{rank}", "ddp resume module")["first_trajectory"] for rank in (0, 1)]
    assert float((states[0] - states[1]).abs().max()) > 1e-3
