"""One's own network, tried on a few states: how it is called, and what makes a teacher and a student of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap, Adapter, ConventionError, FlowMatching, TwoTime, check_convention
from f2d2_lightning.adapters._asking import signature, undisturbed, without_zeros
from f2d2_lightning.adapters.call import Call
from f2d2_lightning.adapters.features import last_width
from f2d2_lightning.cli._calls import likely_calls
from f2d2_lightning.cli._common import imported
from f2d2_lightning.divergence.estimators import MODES
from f2d2_lightning.utils.seeding import own_random_state

SHOWN, LONGEST = 3, 160
"""Calls that an error repeats, and characters of what the network said of each."""


@dataclass(frozen=True)
class OwnNetwork:
    """What a network turned out to be."""

    teacher: dict[str, Any]
    """Flow map of the teacher, as a configuration says it."""
    student: dict[str, Any] | None
    """That of the student; ``None`` where a network of one time has no embedding that a second one can be added to."""
    two_times: bool
    mode: str  # of derivatives
    said: str


def try_network(path: str, arguments: Mapping[str, Any] | None, call: str | None, x: Tensor) -> OwnNetwork:
    """Make a network by the path of its class, and find out how it is called, unless ``call`` says it.

    It is tried on states ``x`` of the data, ``(B, ...)``, where ``B`` is none of the sides of a state. One that cannot
    be made, or answers velocities to no call, is a ``ValueError``, which says what came, and what to do.
    """
    network = _made(path, dict(arguments or {}))
    described = {"class_path": path, "init_args": dict(arguments or {})}
    calls = likely_calls(network) if call is None else [Call(call).text]
    tried: list[str] = []
    unfit: list[ConventionError] = []
    for adapter in filter(None, (_fitting(network, text, x, tried) for text in calls)):
        try:
            mode = _mode(AdaptedFlowMap(network, adapter), x)
        except ConventionError as error:
            # it answers, and not as it should; another call may be the right one
            unfit.append(error)
        else:
            return _found(network, described, adapter, mode, x)
    if unfit:
        raise unfit[0]
    raise ValueError(
        f"--network {path} gave no velocities for states of shape {tuple(x.shape)} and times of shape ({len(x)},): "
        f"{'; '.join(tried[:SHOWN]) or 'no call fits what it takes'}. It takes {signature(AdaptedFlowMap(network))}, "
        "and must answer the state's shape: let it fit the data (--network_args), or say how it is called, with x for "
        'the state and s for its time, and t for the time to go to if it takes two: --call "net(x, s)"'
    )


def _made(path: str, arguments: dict[str, Any]) -> nn.Module:
    cls = imported(path, "--network")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"--network {path} is {cls!r:.80}; the class of a torch.nn.Module is needed")
    parameters = inspect.signature(cls).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    if missing := [name for name in needed if name not in arguments]:
        form = ", ".join(f'"{name}": ...' for name in needed)
        raise ValueError(
            f"--network {path} cannot be made without {', '.join(missing)}; give its arguments: "
            f"--network_args '{{{form}}}'"
        )
    try:
        with own_random_state(torch.device("cpu")):
            return cls(**arguments)
    except Exception as error:  # whatever somebody's constructor says
        wrong = f"{arguments}: {_line(error)}; correct --network_args"
        raise ValueError(f"--network {path} cannot be made with {wrong}") from error


# --- how it is called ---


def _fitting(network: nn.Module, call: str, x: Tensor, tried: list[str]) -> Adapter | None:
    """An adapter with which the network answers the shape of ``x``, state by state; else what came goes to ``tried``.

    Times are tried with one axis, with two, and with those of the state; images with channels first and last.
    """
    family = TwoTime if "t" in Call(call).names else FlowMatching
    directions = "both" if family is TwoTime else "none"
    wrong = []
    for channels_last in (False, True)[: 1 + (x.ndim == 4)]:
        for axes in dict.fromkeys((1, 2, x.ndim)):
            arguments: dict[str, Any] = {"directions": directions, "channels_last": channels_last, "time_axes": axes}
            try:
                part = _part(AdaptedFlowMap(network, family(call, **arguments)), x)
                adapter = family(call, output=part, **arguments)
                return _by_itself(AdaptedFlowMap(network, adapter), x)
            except Exception as error:  # whatever a network says of what it does not take
                wrong.append(f"{call} gave {_line(error)}")
    tried += wrong[:1]
    return None


def _part(flow_map: AdaptedFlowMap, x: Tensor) -> int | str | None:
    """Which part of the network's answer has the state's shape; ``None`` for the answer itself."""
    answers: list[Any] = []
    note = flow_map.network.register_forward_hook(lambda module, arguments, answer: answers.append(answer))  # type: ignore[union-attr]
    try:
        with note, undisturbed(flow_map, x):
            flow_map.velocity(x, 0.4)
    except ConventionError:
        # the call fits, and the answer is of another form
        parts = list(_parts(answers[-1])) if answers else []
        shape = x.movedim(1, -1).shape if flow_map.adapter.channels_last else x.shape
        found = [name for name, value in parts if isinstance(value, Tensor) and value.shape == shape]
        if not found:
            raise
        return found[0]
    return None


def _parts(answer: Any) -> Iterable[tuple[int | str, Any]]:
    """Parts of an answer of several."""
    if isinstance(answer, (tuple, list)):
        return enumerate(answer)
    named = answer if isinstance(answer, Mapping) else getattr(answer, "__dict__", {})
    return ((name, value) for name, value in named.items() if isinstance(name, str))


def _by_itself(flow_map: AdaptedFlowMap, x: Tensor) -> Adapter:
    """The map's adapter, if what it answers for a state does not depend on the others: times may meet wrong axes."""
    few = len(x) // 2
    with undisturbed(flow_map, x), without_zeros(flow_map):
        whole, part = flow_map.velocity(x, 0.4)[:few], flow_map.velocity(x[:few], 0.4)
    if not torch.allclose(whole, part, rtol=1e-2, atol=1e-3 * float(whole.abs().max())):
        raise ConventionError("answers for a state that depend on the other states of the batch")
    return flow_map.adapter


def _mode(flow_map: AdaptedFlowMap, x: Tensor) -> str:
    """The first mode in which the network can be differentiated; what else is wrong with it is an error."""
    wrong: list[ConventionError] = []
    for mode in MODES:
        try:
            check_convention(flow_map, x, mode=mode)
        except ConventionError as error:
            wrong.append(error)
        else:
            return mode
    raise wrong[0]


# --- where a second time can be added to one of one time: found by running it ---


def _time_embeddings(flow_map: AdaptedFlowMap, x: Tensor) -> list[str]:
    """Submodules with weights whose output is of the time alone, those that run first before others, outermost."""
    network = flow_map.network
    assert isinstance(network, nn.Module)
    runs: list[dict[str, list[Any]]] = []

    def note(seen: dict[str, list[Any]], name: str, module: nn.Module, arguments: Any, answer: Any) -> None:
        seen.setdefault(name, []).append(answer)

    with undisturbed(flow_map, x), without_zeros(network):
        for states, time in ((x, 0.3), (x.flip(0) + 1, 0.3), (x, 0.8)):
            seen: dict[str, list[Any]] = {}
            with ExitStack() as hooks:
                for name, module in list(network.named_modules())[1:]:
                    hooks.enter_context(module.register_forward_hook(partial(note, seen, name)))
                flow_map.velocity(states, time)
            runs.append(seen)
    found = []
    for name in runs[0]:
        answers = [seen.get(name, []) for seen in runs]
        if any(len(one) != 1 or not isinstance(one[0], Tensor) or one[0].ndim < 2 for one in answers):
            continue
        here, moved, later = (one[0] for one in answers)
        if len(here) == len(x) and torch.equal(here, moved) and not torch.equal(here, later):
            try:
                last_width(network.get_submodule(name), name)
            except ValueError:
                continue  # without weights
            found.append(name)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _takes_interval(network: nn.Module, adapter: Adapter, name: str, x: Tensor, mode: str) -> bool:
    """Whether a second time that is added to a submodule reaches the answer."""
    try:
        flow_map = AdaptedFlowMap(network, adapter, interval=name)
        flow_map.probe(x)
        with undisturbed(flow_map, x), without_zeros(flow_map):
            reached = not torch.equal(flow_map(x, 0.3, 0.5), flow_map(x, 0.3, 0.9))
        check_convention(flow_map, x, mode=mode)
    except ValueError:
        return False
    return reached


# --- what it makes ---


def _found(network: nn.Module, described: dict[str, Any], adapter: Adapter, mode: str, x: Tensor) -> OwnNetwork:
    """Teacher and student of a network in an adapter that fits."""
    teacher = _configured(described, adapter)
    called = ", ".join([f"called as {adapter.call.text}", *(f"{n}={v!r}" for n, v in _settings(adapter).items())])
    if isinstance(adapter, TwoTime):
        AdaptedFlowMap(network, adapter).probe(x)  # what its head would read
        return OwnNetwork(teacher, teacher, True, mode, f"a network of two times, {called}")
    both = FlowMatching(adapter.call.text, directions="both", **_settings(adapter))
    for name in _time_embeddings(AdaptedFlowMap(network, adapter), x):
        if _takes_interval(network, both, name, x, mode):
            student = _configured(described, both, interval=name)
            said = f"a network of one time, {called}; the student is a copy with a second time added to its {name}"
            return OwnNetwork(teacher, student, False, mode, said)
    none = "no time embedding that a second time could be added to was found in it"
    said = f"a network of one time, {called}; {none}, and so the student is a network of this package"
    return OwnNetwork(teacher, None, False, mode, said)


def _settings(adapter: Adapter) -> dict[str, Any]:
    """What is not as it is by default."""
    usual = {"output": None, "channels_last": False, "time_axes": 1}
    return {name: getattr(adapter, name) for name, value in usual.items() if getattr(adapter, name) != value}


def _configured(network: dict[str, Any], adapter: Adapter, **more: Any) -> dict[str, Any]:
    """A network in an adapter, as a configuration says it."""
    arguments = {"call": adapter.call.text, "directions": adapter.directions.label, **_settings(adapter)}
    described = {"class_path": f"f2d2_lightning.adapters.{type(adapter).__name__}", "init_args": arguments}
    inside = {"network": network, "adapter": described, **more}
    return {"class_path": "f2d2_lightning.adapters.AdaptedFlowMap", "init_args": inside}


def _line(error: BaseException) -> str:
    """What an error says, short."""
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, ConventionError) else f"{type(error).__name__}: "
    return f"{kind}{text if len(text) <= LONGEST else text[:LONGEST] + '...'}"
