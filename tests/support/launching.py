"""Commands that must end well; a script as the processes of one group, and what such a script does."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import socket
import sys
import time
import traceback
import types
import unittest
import warnings
from pathlib import Path

import pytest
import torch

from f2d2_lightning.utils.sharding import FSDP2_FROM

WITH_FSDP2 = ("ddp", "fsdp") if torch.__version__ >= FSDP2_FROM else ("ddp",)


HOUSE = Path(__file__).parents[2]
OURS = tuple(str(HOUSE / name) for name in ("tests", "benchmarks", "examples"))
IMPORTED = ["pytest", "torch", "lightning", "torchvision", "f2d2_lightning.modules", "f2d2_lightning.callbacks"]
"""Takes a fresh interpreter seven seconds. One does it for all commands of a test run, and each begins as its copy."""
_COPIES = multiprocessing.get_context("forkserver")
_COPIES.set_forkserver_preload(IMPORTED)


def start(command, folder, log, environment):
    """Python with the arguments ``-c CODE``, ``-m MODULE ...`` or ``SCRIPT ...``, as a process in a folder.

    On one thread and the CPU, without a test's imports, paths and seed. What it prints goes to the file ``log``, errors
    to ``log.err``.
    """
    environment = {**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PL_GLOBAL_SEED", None)
    process = _COPIES.Process(target=_begin, args=([str(word) for word in command], str(folder), log, environment))
    process.start()
    return process


def _begin(command, folder, log, environment):
    """In the process that was started."""
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, log), (2, log.with_name(log.name + ".err"))):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    first, *sys.argv = command if command[0] in ("-c", "-m") else ("", *command)
    home = {"-c": "", "-m": folder}.get(first, str(Path(sys.argv[0]).parent))
    own = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [home, *filter(None, own), *(path for path in sys.path if not path.startswith(OURS))]
    torch.set_num_threads(1)
    if first == "-c":
        code, sys.argv[0] = sys.argv[0], first
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def output_of(command, folder, timeout=300, **environment):
    """What Python prints with some arguments, run in a folder as by :func:`start`; it must end well."""
    log = Path(folder) / "printed"
    (code,) = ended([start(command, folder, log, os.environ | environment)], timeout)
    printed, errors = log.read_text(), log.with_name("printed.err").read_text()
    said = shlex.join(map(str, command))[:500]
    assert code == 0, f"{said}\nended with {code}\n{printed[-2000:]}\n{errors[-8000:]}"
    return printed


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
        }
        if count > 1:
            names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank}
            names |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
            environment |= {name: str(value) for name, value in names.items()}
        processes.append(start([script, folder], folder, folder / f"{count}-{rank}.log", environment))
    return processes


def ended(processes, timeout):
    """Exit codes of processes that have so many seconds together; none of them runs on."""
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    return codes


def logs(folder):
    """The ends of the processes' logs."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log*")))


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
