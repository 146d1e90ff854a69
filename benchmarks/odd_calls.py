"""What becomes of odd calls: every name at the door, every argument, a table of odd values; and odd files.

    python benchmarks/odd_calls.py [--list 40]

Each call takes good arguments but for one, which is odd. What happens is one of

- ``right``: an answer, of a value that makes sense there;
- ``clear``: a ``ValueError``, ``TypeError`` or ``FileNotFoundError`` that names the argument, or what it is;
- ``unclear``: any other error, such as one of torch's own from inside a network;
- ``silent``: an answer, although the value is of no type that the argument is annotated with.

The table counts them by name. The goal is at most 2 % that are unclear or silent.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import math
import resource
import signal
import tempfile
import typing
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import f2d2_lightning as f2
from f2d2_lightning.adapters import MeanFlow
from f2d2_lightning.flows import GaussianFlow
from f2d2_lightning.likelihood.model import JointModel
from f2d2_lightning.nn import MLP
from f2d2_lightning.utils.checks import ArgumentError

OUTCOMES = ("right", "clear", "unclear", "silent")
GOAL = 0.02
MEMORY, SECONDS = 6 * 2**30, 3.0


class Odd:
    """An object of no class that anything takes."""


def odd_values() -> dict[str, Any]:
    """Values by a name."""
    x = torch.linspace(-1, 1, 8).reshape(4, 2)
    return {
        **{repr(v): v for v in (None, True, -1, 0, 1.5, 10**30, "4", "", "none", b"4", 1j, (), [], {}, {"a": 1}, [0])},
        **{repr(v): v for v in ([-1], [1.5], ["4"], [None], (1, 2, 3), [[1, 2], [3]], {1, 2})},
        **{str(v): v for v in (math.nan, math.inf, -math.inf)},
        "an object": Odd(),
        "a class": Odd,
        "a function": lambda *args: args,
        "a module": torch.nn.Linear(2, 2),
        "a generator": (i for i in range(3)),
        "a path": Path("nowhere"),
        "numpy 4": np.int64(4),
        "numpy 0.5": np.float32(0.5),
        "an array": x.numpy(),
        "an array of text": np.array(["a", "b"]),
        "an array of objects": np.array([None, 1], dtype=object),
        "a masked array": np.ma.masked_array([[1.0, 2.0]], [[True, False]]),
        "a list of states": x.tolist(),
        "a tensor": x,
        "one state": x[0],
        "a number": torch.tensor(3.0),
        "half": x.half(),
        "bfloat16": x.bfloat16(),
        "double": x.double(),
        "integers": x.long(),
        "bytes": x.abs().to(torch.uint8),
        "truth values": x > 0,
        "complex": x.to(torch.complex64),
        "sparse": x.to_sparse(),
        "on meta": x.to("meta"),
        "wide": torch.zeros(4, 3),
        "images": torch.zeros(4, 1, 2, 2),
        "of none": torch.zeros(0, 2),
        "NaN inside": torch.full((4, 2), math.nan),
        "labels": torch.tensor([0, 1, 0, 1]),
        "too few labels": torch.tensor([0, 1]),
        "labels beyond": torch.tensor([0, 1, 0, 99]),
        "huge": torch.full((4, 2), 1e38),
    }


def odd_files(folder: Path) -> dict[str, Path]:
    """Files that are not what they are taken for."""
    folder.mkdir(exist_ok=True)
    (folder / "text.ckpt").write_text("no weights\n")
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"a": 1}, folder / "dictionary.ckpt")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, folder / "foreign.ckpt")
    torch.save({"state_dict": torch.zeros(2)}, folder / "tensor.ckpt")
    whole = (folder / "foreign.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.ckpt").write_bytes(whole[:300] + bytes(b ^ 255 for b in whole[300:600]) + whole[600:])
    with zipfile.ZipFile(folder / "zip.ckpt", "w") as archive:
        archive.writestr("a", "b")
    (folder / "json").mkdir(exist_ok=True)
    (folder / "json" / "config.json").write_text("{")
    (folder / "json" / "model.safetensors").write_bytes(b"")
    (folder / "folder.ckpt").mkdir(exist_ok=True)
    (folder / "numpy.ckpt").write_bytes(_saved(np.zeros(3)))
    return {path.name: path for path in sorted(folder.iterdir())} | {"missing": folder / "nowhere.ckpt"}


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@dataclass
class Target:
    """Something that is called."""

    name: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]] = dict
    skip: tuple[str, ...] = ()
    hints: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        function = self.call.__init__ if isinstance(self.call, type) else self.call  # type: ignore[misc]
        self.hints = {k: v for k, v in typing.get_type_hints(function).items() if k != "return"}
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        parameters = inspect.signature(function).parameters.values()
        self.places = [p.name for p in parameters if p.name not in ("self", *self.skip) and p.kind not in kinds]


def targets(folder: Path) -> list[Target]:
    """All that is at the door, with good arguments for each."""
    torch.manual_seed(0)
    x, flow = torch.randn(4, 2), GaussianFlow(f2.GaussianBaseline.from_covariance(torch.zeros(2), torch.eye(2)))
    backbone = lambda **how: MLP((2,), width=8, blocks=1, **how)  # noqa: E731
    joint = lambda: f2.JointFlowMap(backbone(), f2.DivergenceHead(backbone().features))  # noqa: E731
    student, teacher = f2.F2D2Module(backbone()).eval(), f2.FlowMatchingModule(backbone()).eval()
    teacher.reference = f2.Reference(steps=4, probes=0)
    labelled = f2.F2D2Module(backbone(classes=2)).eval()
    digital = JointModel(flow, (2,), f2.Quantization(4, -2.0, 2.0))
    f2.save_pretrained(joint(), folder / "good", shape=(2,))
    found = [
        Target("log_prob", f2.log_prob, lambda: {"joint_map": flow, "x": x}),
        Target("log_prob of a network", f2.log_prob, lambda: {"joint_map": joint(), "x": x}),
        Target("sample", f2.sample, lambda: {"flow_map": flow, "noise": x}),
        Target("reference_log_prob", f2.reference_log_prob, lambda: {"velocity": flow, "x": x, "steps": 4}),
        Target("reference_sample", f2.reference_sample, lambda: {"velocity": flow, "noise": x, "steps": 4}),
        Target("bits_per_dim", f2.bits_per_dim, lambda: {"log_prob": x[:, 0], "dim": 2}),
        Target("as_flow_map", f2.as_flow_map, lambda: {"function": lambda x, s, t, cond: -x}),
        Target("load", f2.load, lambda: {"path": folder / "good"}),
        Target("load_joint", f2.load_joint, lambda: {"path": folder / "good", "network": None}),
        Target("from_pretrained", f2.from_pretrained, lambda: {"folder": folder / "good"}),
        Target(
            "save_pretrained",
            f2.save_pretrained,
            lambda: {"model": joint(), "folder": folder / "new", "shape": (2,)},
            ("folder",),
        ),
        Target("Quantization", f2.Quantization, lambda: {"levels": 4}),
        Target("Quantization.dequantize", f2.Quantization(4).dequantize, lambda: {"k": torch.tensor([[0, 3]])}),
        Target("Inversion", f2.Inversion),
        Target("Reference", f2.Reference),
        Target("SelfGuidance", f2.SelfGuidance),
        Target("guidance", f2.SelfGuidance().__call__, lambda: {"joint_map": flow, "noise": x}),
        Target("Hutchinson", f2.Hutchinson),
        Target("Intervals", f2.Intervals),
        Target("Weighting", f2.Weighting),
        Target("TrajectoryRegression", f2.TrajectoryRegression, dict, ("cache",)),
        Target("GaussianBaseline", f2.GaussianBaseline, lambda: {"shape": (2,)}),
        Target("DivergenceHead", f2.DivergenceHead, lambda: {"features": 8}),
        Target("JointFlowMap", f2.JointFlowMap, lambda: {"flow_map": backbone(), "head": f2.DivergenceHead(8)}),
        Target("F2D2Module", f2.F2D2Module, lambda: {"flow_map": backbone()}, ("trust",)),
        Target("FlowMatchingModule", f2.FlowMatchingModule, lambda: {"flow_map": backbone()}),
        Target("F2D2Callback", f2.F2D2Callback, lambda: {"flow_map": "net", "adapter": MeanFlow(directions="both")}),
        Target("Digits", f2.data.Digits),
    ]
    for name, model in {"student": student, "file": digital, "labelled": labelled, "teacher": teacher}.items():
        extra = {"cond": torch.tensor([0, 1, 0, 1])} if name == "labelled" else {}
        data = torch.tensor([[0, 3], [1, 1], [2, 0], [3, 3]]) if name == "file" else x
        steps = {"steps": 4} if name == "teacher" else {}
        for ask, of in (("log_prob", {"x": x}), ("nll", {"x": data}), ("sample", {"noise": x} | steps)):
            found.append(Target(f"{name}.{ask}", getattr(model, ask), lambda of=of, extra=extra: of | extra))
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that is annotated, told apart from the package's own way of telling."""
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, __import__("types").UnionType):
        return any(fits(value, one) for one in arguments)
    cls = typing.get_origin(hint) or hint
    if cls is float:
        return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if cls is int and not isinstance(value, bool) and isinstance(value, np.integer):
        return True
    if cls is int and isinstance(value, bool):
        return False
    if cls is typing.Literal:
        return value in arguments
    try:
        return isinstance(value, cls)
    except TypeError:
        return True


def classify(target: Target, place: str, value: Any, seconds: float = 0.0) -> tuple[str, str]:
    """Outcome of a call with one odd argument, and what was said; ``seconds`` set the alarm of the process."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            target.call(**(target.arguments() | {place: value}))
        except (ValueError, TypeError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
            return ("clear" if is_clear(error, place) else "unclear"), f"{type(error).__name__}: {error}"
        except Exception as error:
            return "unclear", f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return ("right" if fits(value, target.hints.get(place, Any)) else "silent"), ""


def is_clear(error: Exception, place: str) -> bool:
    """Whether an error is the package's own, and says what it is about."""
    if isinstance(error, ArgumentError):
        return True
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    ours = "f2d2_lightning" in frames[-1] and "site-packages" not in frames[-1]
    return ours and len(str(error)) > 20


def calls(folder: Path) -> Iterator[tuple[Target, str, str, Any]]:
    """Every target, argument and odd value, and odd files where a path is taken."""
    files = odd_files(folder / "files")
    for target in targets(folder):
        for place in target.places:
            values = odd_values()
            if place in ("path", "folder"):
                values |= {f"file {name}": path for name, path in files.items()}
            for name, value in values.items():
                yield target, place, name, value


def _too_long(*args: Any) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--list", type=int, default=40, help="calls to list that are unclear or silent")
    parser.add_argument("--only", default="", help="names that hold this")
    options = parser.parse_args()
    # a call that fills the memory is one that fails
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    counts: dict[str, Counter[str]] = {}
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for target, place, name, value in calls(Path(folder)):
            if options.only not in target.name:
                continue
            outcome, message = classify(target, place, value, SECONDS)
            if target.name not in counts:
                print(f"... {target.name}", flush=True)
            counts.setdefault(target.name, Counter())[outcome] += 1
            if outcome in ("unclear", "silent"):
                bad.append(f"{outcome:8}{target.name}({place}={name}) {' '.join(message.split())[:160]}")
    print(f"{'':28}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for name, of in counts.items():
        print(f"{name:28}" + "".join(f"{of[outcome]:9}" for outcome in OUTCOMES))
    total = sum(counts.values(), Counter())
    print(f"{'all':28}" + "".join(f"{total[outcome]:9}" for outcome in OUTCOMES))
    every = max(1, sum(total.values()))
    for outcome in ("unclear", "silent"):
        print(f"{outcome}: {100 * total[outcome] / every:.2f} % of {every}; goal {100 * GOAL:g} %")
    print("\n".join(bad[: options.list]))


if __name__ == "__main__":
    main()
