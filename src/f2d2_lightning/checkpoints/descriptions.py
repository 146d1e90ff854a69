"""What a model is made of, as plain values, and back: classes of this package, and their arguments.

Objects of somebody else, such as the network of an adapter, are named in a description and given by who reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters import AdaptedFlowMap
from f2d2_lightning.checkpoints.trust import called, find_class
from f2d2_lightning.flows.maps import Direction, FlowMap, JointMap
from f2d2_lightning.nn.head import DivergenceHead, JointFlowMap
from f2d2_lightning.utils.configured import Configured, as_plain, public_name

_PACKAGE = "f2d2_lightning"
# arguments that somebody else's object may stand in, and the name that it is given under
_GIVEN: dict[tuple[type, str], str] = {
    (AdaptedFlowMap, "network"): "network",
    (AdaptedFlowMap, "adapter"): "adapter",
    (DivergenceHead, "network"): "head_network",
    (JointFlowMap, "head"): "head",
}


def describe_model(model: FlowMap | JointMap) -> dict[str, Any]:
    """Class and arguments of a model, and of parts that were put into it since.

    A part that cannot be made again from plain values, or was changed in a way that no argument says, is refused.
    """
    numbers: dict[int, int] = {}
    content = {"model": describe(model, "the model", numbers)}
    places = [(part, *place) for part in model.modules() for place in _GIVEN.items()]
    given = {name: getattr(part, argument) for part, (cls, argument), name in places if isinstance(part, cls)}
    # initial weights are no reason to draw other numbers afterwards
    with torch.random.fork_rng(devices=[]):
        again = make_model(content, given)
        content["replaced"] = _replaced(again, model, numbers)
        _check_again(make_model(content, given) if content["replaced"] else again, model)
    return content


def describe(value: Any, place: str, numbers: dict[int, int] | None = None) -> dict[str, Any]:
    """Class and arguments of an object, which errors call ``place``.

    A second mention of one object refers to the first; ``numbers`` holds the number of each so far, by its ``id``.
    Objects of classes that are none of this package's are refused.
    """
    numbers = {} if numbers is None else numbers
    if id(value) in numbers:
        return {"same_as": numbers[id(value)]}
    cls = type(value)
    name = public_name(cls)
    if not _ours(value):
        raise ValueError(
            f"{place} is a {name}; only classes of f2d2_lightning can be made again from plain values. For a network "
            "of your own use an adapter: JointFlowMap(adapter(network), head), or keep the checkpoint"
        )
    arguments: dict[str, Any] = {}
    for argument, given in value.configuration().items():
        theirs = _GIVEN.get((cls, argument))
        if theirs is not None and given is not None and (theirs == "network" or not _ours(given)):
            arguments[argument] = {"given": theirs, "class": public_name(type(given))}
        elif isinstance(given, (nn.Module, Configured)):
            arguments[argument] = describe(given, f"{argument} of {cls.__name__}", numbers)
        elif as_plain(given) is ...:
            raise ValueError(f"{argument} of {cls.__name__} ({place}) is a {type(given).__name__}, no plain value")
        else:
            arguments[argument] = as_plain(given)
    numbers[id(value)] = len(numbers)
    return {"class": name, "number": numbers[id(value)], "arguments": arguments}


def _ours(value: Any) -> bool:
    cls = type(value)
    place = public_name(cls).startswith(f"{_PACKAGE}.") and not cls.__name__.startswith("_")
    return isinstance(value, Configured) and place


def make_model(content: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Inverse of :func:`describe_model`, with fresh weights; ``given`` are objects of the reader's own, by name."""
    made: dict[int, Any] = {}
    model = make_part(content.get("model"), given, made)
    replaced = content.get("replaced") or {}
    known = isinstance(model, (FlowMap, JointMap)) and isinstance(getattr(model, "directions", None), Direction)
    if not known or not isinstance(replaced, dict):
        raise ValueError("the configuration describes no flow map or joint map")
    for name, description in replaced.items():
        part = make_part(description, given, made)
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the configuration replaces {name!r:.80}, and the model has no such part") from error
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, part)
    return model


def make_part(description: Any, given: Mapping[str, Any], made: dict[int, Any] | None = None) -> Any:
    """Inverse of :func:`describe`."""
    made = {} if made is None else made
    keys = set(description) if isinstance(description, dict) else set()
    if keys == {"same_as"}:
        number = description["same_as"]
        if not isinstance(number, (int, str)) or number not in made:
            raise ValueError(f"the configuration refers to object {number!r:.20}, which comes later")
        return made[number]
    if keys == {"given", "class"}:
        name = description["given"]
        found = given.get(name) if isinstance(name, str) else None
        if found is None:
            raise ValueError(
                f"the model was saved with a {description['class']!s:.80}, which is no part of the file; make it as it "
                f"was in training, and give it: {name!s:.20}=..."
            )
        return found
    if keys != {"class", "number", "arguments"}:
        raise ValueError(f"the configuration has {description!r:.80} where an object's class and arguments are needed")
    cls, arguments = _class(description["class"]), description["arguments"]
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {cls.__name__} are a {type(arguments).__name__}")
    objects = [name for name, value in arguments.items() if isinstance(value, dict) and {"class", "same_as"} & {*value}]
    values = arguments | {name: make_part(arguments[name], given, made) for name in objects}
    made[description["number"]] = value = called(cls, values, "the configuration")
    return value


def _class(name: Any) -> type:
    cls = find_class(name) if str(name).startswith(f"{_PACKAGE}.") else None
    if cls is None or not issubclass(cls, Configured) or cls.__name__.startswith("_"):
        raise ValueError(
            f"the configuration names the class {name!r:.120}; only networks, heads, baselines, paths and adapters of "
            "f2d2_lightning are made from a configuration"
        )
    return cls


def _replaced(plain: nn.Module, model: nn.Module, numbers: dict[int, int]) -> dict[str, Any]:
    """Parts that were put into the model after it was made."""
    made = dict(plain.named_modules(remove_duplicate=False))
    changed: dict[str, Any] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        inside = name.startswith(tuple(f"{done}." for done in changed))
        if not inside and name in made and type(part) is not type(made[name]):
            changed[name] = describe(part, name, numbers)
    return changed


def _check_again(again: FlowMap | JointMap, model: FlowMap | JointMap) -> None:
    shapes, others = ({name: tuple(value.shape) for name, value in own_state(m).items()} for m in (model, again))
    wrong = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if wrong or again.directions != model.directions:
        what = f"its weights {', '.join(wrong[:6])}" if wrong else f"its directions, {model.directions.label},"
        raise ValueError(
            f"the model was changed after it was made: {what} do not come back from the arguments of its classes; "
            "make it anew in its present form and load its state_dict"
        )
    theirs = given_places(again)
    parts = {part for name, part in again.named_modules() if not f"{name}.".startswith(theirs)}
    for part in parts:
        for held in vars(part).values():
            if isinstance(held, list) and len(held) == 1 and isinstance(held[0], nn.Module) and held[0] not in parts:
                raise ValueError(
                    f"a {type(part).__name__} of the model reads a {type(held[0]).__name__} that is no part of it and "
                    "would not be saved; save the whole that has both"
                )


def given_places(model: nn.Module) -> tuple[str, ...]:
    """Where adapted networks are, as beginnings of the names of their weights."""
    owners = [name for name, part in model.named_modules() if isinstance(part, AdaptedFlowMap)]
    return tuple(f"{name}.network.".removeprefix(".") for name in owners)


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name without those of adapted networks, which may be sharded."""
    state: dict[str, Tensor] = {}
    theirs = given_places(model)
    for name, part in model.named_modules(remove_duplicate=False):
        if not f"{name}.".startswith(theirs):
            part._save_to_state_dict(state, f"{name}.".removeprefix("."), False)
    return state
