"""Commands that must end well; a script as the processes of one group, and what such a script does."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import traceback
import unittest
import warnings
from pathlib import Path

import pytest
import torch

from f2d2_lightning.utils.sharding import FSDP2_FROM

WITH_FSDP2 = ("ddp", "fsdp") if torch.__version__ >= FSDP2_FROM else ("ddp",)


def output_of(command, folder, timeout=300, **environment):
    """What a command prints that is run in a folder, on one thread, and must end well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )
    said = shlex.join(map(str, command))[:500]
    assert done.returncode == 0, f"{said}\n{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(script, folder, count):
    """Start ``script FOLDER`` as ``count`` processes that form one group; each writes a log to the folder."""
    port, processes = free_port(), []
    for rank in range(count):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("PL_GLOBAL_SEED", None)
        if count > 1:
            names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank}
            names |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
            environment |= {name: str(value) for name, value in names.items()}
        log = (folder / f"{count}-{rank}.log").open("w")
        command = [sys.executable, str(script), str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


def logs(folder):
    """The ends of the processes' logs."""
    return "\n".join(path.read_text()[-3000:] for path in folder.glob("*.log"))


def run_cases(cases, folder, only=""):
    """Run ``cases(replicas)`` in a launched process, in double precision; results go to ``REPLICAS-RANK.pt``."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    replicas, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    results = {}
    for name, case in cases(replicas).items():
        if only not in name:
            continue
        try:
            results[name] = case(folder)
        except unittest.SkipTest as reason:
            results[name] = {"skipped": str(reason)}
        except Exception:
            # told to the tests; the other process is given up by the one that waits for both
            results[name] = {"error": traceback.format_exc()}
            print(name, results[name]["error"], flush=True)
            break
    torch.save(results, folder / f"{replicas}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def difference(one, other, path=""):
    """Largest absolute difference of two nested results with the same names."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), f"{path}: {one.keys() ^ other.keys()}"
        return max((difference(one[name], other[name], f"{path}/{name}") for name in one), default=0.0)
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape, path
        value = float((one.double() - other.double()).abs().max())
        assert value == value, f"{path} is NaN"
        return value
    return abs(one - other)


def get(results, process, case):
    answer = results[process][case]
    if "skipped" in answer:
        pytest.skip(answer["skipped"])
    assert "error" not in answer, answer.get("error")
    return answer
