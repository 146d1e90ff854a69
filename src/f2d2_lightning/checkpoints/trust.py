"""Objects from what a file says: which classes it may name, what becomes of its values, and how large it may get.

A checkpoint's hyper-parameters are a description, ``{"class_path": ..., "init_args": {...}}`` inside one another.
Whoever made the file wrote it, so nothing of it is taken on trust: only classes of this package, of ``torch.nn`` and of
``torch.optim`` are made, and those of packages that the user trusts by name. A name is checked before its module is
imported, text stays text (it never becomes a function, a class or a file that is read), and what is made may hold no
more numbers than the file does.
"""

from __future__ import annotations

import collections.abc
import enum
import functools
import importlib
import inspect
import itertools
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from f2d2_lightning import _moved

# where classes that a file names may be, besides the packages that the user trusts
ALLOWED = ("f2d2_lightning", "torch.nn", "torch.optim")
# most values of a description, and most levels of them inside one another; those that are made here have hundreds
PARTS, DEPTH = 100_000, 60

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_LONGEST = 300  # characters of a name that is looked for

Made = TypeVar("Made")


def packages_of(*classes: type) -> tuple[str, ...]:
    """Top-level packages of classes whose objects the user hands over, and so trusts; torch and this one left out."""
    found = dict.fromkeys(cls.__module__.partition(".")[0] for cls in classes)
    return tuple(package for package in found if package not in ("torch", "f2d2_lightning"))


def find_class(name: Any, trust: Sequence[str] = ()) -> type:
    """The class at a dotted path that a file names, which is in :data:`ALLOWED` or in packages that the user trusts.

    Anything else is a ``ValueError``, and nothing outside of these packages is imported.
    """
    places = (*ALLOWED, *trust)
    if not isinstance(name, str) or len(name) > _LONGEST or not _NAME.fullmatch(name):
        raise ValueError(
            f"the file names the class {name!r:.120}; a dotted path such as package.module.Class is needed"
        )
    # __main__ of a package is a program, and runs when it is imported
    if not _inside(name, places) or "__main__" in name.split(".")[1:]:
        raise _untrusted(name, name)
    module, _, attribute = name.rpartition(".")
    module, attribute = _moved.current(module, attribute)
    try:
        found = getattr(sys.modules.get(module) or importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the file names the class {name}, which cannot be imported ({error}); install the version of its package "
            "that the file was made with"
        ) from error
    if not isinstance(found, type):
        raise ValueError(f"the file names {name}, which is no class; functions are not called from a file")
    if not _inside(home := f"{found.__module__}.{found.__qualname__}", places):
        raise _untrusted(name, home)
    return found


def _inside(name: str, places: Sequence[str]) -> bool:
    return any(name.startswith(f"{place}.") for place in places)


def _untrusted(name: str, home: str) -> ValueError:
    package = home.partition(".")[0]
    return ValueError(
        f"the file names the class {name}, and no code outside of {', '.join(ALLOWED)} is run because a file says so. "
        f"If you know where the file comes from and {package} is your own or one that you trust, say so: "
        f"trust=[{package!r}] in Python and configurations, --trust {package} on the command line"
    )


# --- from descriptions to objects ---


def check_extent(description: Any, what: str) -> None:
    """Refuse a description, plain values in a file called ``what``, of more parts, or deeper ones, than any model has.

    A few bytes can describe a list of lists of the same list, which are too many to be looked at one by one. Names that
    cannot be printed are refused as well.
    """
    waiting, seen = [(description, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        parts: list[Any] = []
        if isinstance(value, Mapping):
            # messages quote names, and a terminal obeys some characters
            if not all(isinstance(key, (str, int)) and str(key).isprintable() for key in value):
                raise ValueError(f"{what} has hyper-parameters under names that are no printable text")
            parts = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = list(value)
        seen += len(parts)
        if seen > PARTS or depth > DEPTH:
            raise ValueError(
                f"{what} describes parts within parts without end (over {PARTS:,}, or more than {DEPTH} deep); it is "
                "damaged, or meant to fill this machine's memory"
            )
        waiting += [(part, depth + 1) for part in parts]


class Takes(NamedTuple):
    """Arguments of a class: type hints, ``Any`` where there is none, and defaults by name; are other names taken?"""

    hints: dict[str, Any]
    defaults: dict[str, Any]
    others: bool


def takes(cls: type) -> Takes:
    """Arguments of a class, with those of its base classes where it takes ``**kwargs``, as configurations read them."""
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for base in cls.__mro__:
        function = vars(base).get("__init__")
        if not isinstance(function, types.FunctionType):
            continue
        function = inspect.unwrap(function)
        own = _hints(function)
        _, *places = inspect.signature(function).parameters.values()
        for place in places:
            if place.kind not in (place.VAR_POSITIONAL, place.VAR_KEYWORD):
                hints.setdefault(place.name, own.get(place.name, Any))
                defaults.setdefault(place.name, place.default)
        if not any(place.kind is place.VAR_KEYWORD for place in places):
            return Takes(hints, defaults, False)
    return Takes(hints, defaults, True)


def build_arguments(
    cls: type, description: Mapping[str, Any], trust: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments of a class from their descriptions.

    The class is trusted already: its type hints say what may stand where. Objects that are ``given`` take the place of
    what the description says. A ``ValueError`` says which value is none that a file may bring.
    """
    accepted, given = takes(cls), dict(given or {})
    description = {_moved.argument(name, accepted.hints): value for name, value in description.items()}
    if _opens_files(cls):
        # what is trusted is for the reader to say
        description = {name: value for name, value in description.items() if name != "trust"}
        given = ({"trust": tuple(trust)} if "trust" in accepted.hints else {}) | given
    unknown = [name for name in description if name not in accepted.hints and name not in given]
    if unknown and not accepted.others:
        raise ValueError(f"{cls.__name__} has no argument {unknown[0]!r:.80}; the file is of another version or class")
    made = {}
    for name in [name for name in description if name not in given]:
        value, default = description[name], accepted.defaults.get(name)
        place = f"{name!s:.80} of {cls.__name__}"
        made[name] = default if _names(value, default) else build(value, accepted.hints.get(name, Any), trust, place)
    return made | given


def _names(value: Any, default: Any) -> bool:
    """Whether text is the name of a default that is a function or a class: configurations write those down so."""
    if not isinstance(value, str) or not callable(default):
        return False
    module, _, name = value.rpartition(".")
    return getattr(sys.modules.get(module), "__dict__", {}).get(name) is default


def build(value: Any, hint: Any = Any, trust: Sequence[str] = (), place: str = "the description") -> Any:
    """A value of a file, plain, listed or ``{"class_path": ..., "init_args": {...}}``, as the object that it describes.

    Where its place, a type hint and a name for messages, needs a function that makes an object of some class, such as
    the optimiser of given parameters, a description of the class becomes that function. A class that it may not name,
    and text where an object is needed, are a ``ValueError``.
    """
    options = _options(hint)
    if isinstance(value, Mapping):
        if "class_path" in value:
            return _instance(value, options, trust, place)
        fields = next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)
        if fields is not None:
            return called(fields, build_arguments(fields, value, trust), place)
        held = [typing.get_args(option) for option in options if _holds(option, Mapping)]
        inner = next((kinds[1] for kinds in held if len(kinds) == 2), Any)
        return {key: build(item, inner, trust, f"{key!r:.80} of {place}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _sequence(value, options, trust, place)
    if isinstance(value, str):
        return _text(value, options, trust, place)
    return value


def _instance(value: Mapping[str, Any], options: Sequence[Any], trust: Sequence[str], place: str) -> Any:
    unknown = set(value) - {"class_path", "init_args", "dict_kwargs"}
    arguments = [value.get(name) or {} for name in ("init_args", "dict_kwargs")]
    if unknown or not all(isinstance(part, Mapping) for part in arguments):
        raise ValueError(f"{place} is no description of a class: it has {list(value)!r:.200}")
    cls = find_class(value["class_path"], trust)
    objects, answers = _wanted(options)
    # a class of a package that is trusted may be a function as well
    any_function = (answers is not None or _open(options)) and not _inside(f"{cls.__module__}.", ALLOWED)
    if not (any_function or issubclass(cls, (*objects, *(answers or ())))):
        wanted = " or ".join(dict.fromkeys(option.__name__ for option in (*objects, *(answers or ())))) or "no object"
        raise ValueError(f"{place} is described as a {cls.__module__}.{cls.__name__}, and {wanted} is needed there")
    if _opens_files(cls) and not any(_opens_files(option) for option in objects):
        raise ValueError(f"{place} is described as a {cls.__module__}.{cls.__name__}, which is a whole and no part")
    made = build_arguments(cls, {**arguments[0], **arguments[1]}, trust)
    if issubclass(cls, (Optimizer, LRScheduler, *(answers or ()))):
        return functools.partial(cls, **made)
    return called(cls, made, place)


def _wanted(options: Sequence[Any]) -> tuple[tuple[type, ...], tuple[type, ...] | None]:
    """Classes of objects that may stand in a place, and those that a function in it answers, ``None`` for no function.

    A function may always be a network, unless it is one that makes something else.
    """
    if _open(options):
        return (nn.Module, Optimizer, LRScheduler), None
    objects: list[type] = []
    answers: list[type] | None = None
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is collections.abc.Callable:
            answer = [part for part in _options((*typing.get_args(option), Any)[1]) if _is_class(part)]
            answers = [*(answers or []), *(part for part in answer if not issubclass(part, Tensor))]
            if not answer or any(issubclass(part, Tensor) for part in answer):
                objects.append(nn.Module)
        elif isinstance(kind, type) and kind is not types.NoneType:
            objects.append(kind)
    return tuple(objects), None if answers is None else tuple(answers)


def _opens_files(cls: type) -> bool:
    """Whether a class is a module of training, whose teacher is a file: of this package, or derived from one."""
    packages = {base.__module__.partition(".")[0] for base in cls.__mro__}
    return {"f2d2_lightning", "lightning"} <= packages and issubclass(cls, nn.Module)


def called(cls: type, arguments: Mapping[str, Any], place: str) -> Any:
    """An object of a class for a place; a ``ValueError`` if the arguments do not fit, or ask for too much."""
    if before := getattr(cls, "BEFORE", None):
        # a subclass need not take it
        arguments = {**{name: value for name, value in before.items() if name in takes(cls).hints}, **arguments}
    _check_sizes(cls, arguments)
    try:
        return make(cls, arguments)
    except _TooLargeError:
        raise
    except Exception as error:  # whatever a constructor says of arguments that are not its own
        raise ValueError(f"{place} cannot be made from the file: {cls.__name__}: {said(error)}") from error


def said(error: Exception) -> str:
    """An error's message on one line, without torch's list of its own functions."""
    return " ".join(str(error).partition("Exception raised from")[0].split())[:1000] or type(error).__name__


def _holds(option: Any, *kinds: type) -> bool:
    origin = typing.get_origin(option) or option
    return isinstance(origin, type) and issubclass(origin, kinds)


def _sequence(value: Sequence[Any], options: Sequence[Any], trust: Sequence[str], place: str) -> Any:
    fits = [o for o in options if _holds(o, Iterable) and not _holds(o, str, bytes, Mapping)] or [list]
    kinds = [typing.get_origin(option) or option for option in fits]
    # of several the one that says what is in it
    option, kind = next((pair for pair in zip(fits, kinds) if typing.get_args(pair[0])), (fits[0], kinds[0]))
    inner = typing.get_args(option)
    one_by_one = kind is tuple and inner[-1:] != (...,)
    hints = itertools.chain(inner, itertools.repeat(Any)) if one_by_one else itertools.repeat((*inner, Any)[0])
    items = [build(item, hint, trust, f"an item of {place}") for item, hint in zip(value, hints)]
    # configurations have lists only; a class that asks for something else gets that
    wanted = list if list in kinds else next((kind for kind in kinds if kind in (tuple, set, frozenset)), list)
    try:
        return tuple(items) if isinstance(value, tuple) else wanted(items)
    except TypeError as error:
        raise ValueError(f"{place} cannot be made from the file: {error}") from error


def _text(value: str, options: Sequence[Any], trust: Sequence[str], place: str) -> Any:
    for option in options:
        if _is_class(option) and issubclass(option, enum.Enum) and value in option.__members__:
            return option[value]
    if str not in options and pathlib.Path in options:
        return pathlib.Path(value)
    is_text = [typing.get_origin(o) is typing.Literal or (_is_class(o) and issubclass(o, str)) for o in options]
    if not _open(options) and not any(is_text):
        for base in (typing.get_args(option)[:1] for option in options if typing.get_origin(option) is type):
            # a class itself is asked for, and named as others are
            if issubclass(found := find_class(value, trust), base):
                return found
        raise ValueError(
            f"{place} is the text {value!r:.120}, and text from a file never becomes an object or a function; give the "
            "object when you load the file"
        )
    return value


def _is_class(option: Any) -> bool:
    # list[int] is a type as well, in Python 3.10
    return isinstance(option, type) and typing.get_origin(option) is None and option not in (Any, object)


def _open(options: Sequence[Any]) -> bool:
    """Whether a hint says nothing of what may come."""
    return Any in options or object in options or any(isinstance(option, TypeVar) for option in options)


def _hints(function: Any) -> Mapping[str, Any]:
    """Type hints that can be resolved: some names only a type checker imports."""
    names = {**vars(typing), **vars(collections.abc), **function.__globals__}
    found: dict[str, Any] = {}
    for name, hint in function.__annotations__.items():
        with suppress(NameError, TypeError, AttributeError, SyntaxError):
            found |= typing.get_type_hints(types.SimpleNamespace(__annotations__={name: hint}), names)
    return found


def _options(hint: Any) -> list[Any]:
    """The alternatives of a union; one of anything else."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    return [hint]


# --- size ---


class _TooLargeError(ValueError):
    """More is being made than the file holds."""


def stored_in(state: Mapping[Any, Any], what: str) -> tuple[int, int]:
    """How many tensors the ``state_dict`` of a file called ``what`` has, and how many numbers, each counted once.

    Values that are no plain tensors on the CPU, and names that cannot be printed, are a ``ValueError``.
    """
    storages: dict[int, int] = {}
    for name, value in state.items():
        # a terminal obeys some characters, and messages quote names
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{what} holds weights under the name {name!r:.80}; printable text is needed")
        if name.endswith("_extra_state"):
            continue
        # tensors of other kinds say that they are of any size, and hold nothing
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"{what} holds a {type(value).__name__} under {name!r:.80} that is no plain tensor on the CPU, as "
                "weights are; take it out, or save the file again"
            )
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() // value.itemsize
    return len(state), sum(storages.values())


def make(cls: type[Made], arguments: Mapping[str, Any]) -> Made:
    """An object of a class; what a class of the user's own makes besides is not for the file to pay for."""
    ours = _inside(f"{cls.__module__}.", ALLOWED)
    before = _limits.set(_limits.get() if ours else None)
    try:
        return cls(**arguments)
    finally:
        _limits.reset(before)


def within_size(make: Callable[[], Made], tensors: int, numbers: int, what: str) -> Made:
    """What ``make`` makes of a file's description, unless that has far more parameters than the file holds.

    It then stops on the way, with a ``ValueError``. Random numbers drawn on the way are not missing afterwards. Classes
    of packages that the user trusts make what they want (:func:`make`), with what they are given.
    """
    limits = _Limits(4 * tensors + 1000, 4 * numbers + 2**20, what)
    # initial weights that are written over are no reason to draw other numbers afterwards
    with torch.random.fork_rng(devices=[]), _counted(limits), _Bounded(limits):
        return make()


@dataclass
class _Limits:
    """How much may be made, and how much was."""

    tensors: int
    numbers: int
    what: str
    made: dict[str, int] = field(default_factory=lambda: {"modules": 0, "tensors": 0, "numbers": 0})

    def count(self, kind: str, more: int) -> None:
        made = self.made
        made[kind] += more
        if made["tensors"] > self.tensors or made["numbers"] > self.numbers or made["modules"] > 10 * self.tensors:
            parts = ", ".join(f"{number:,} {kind}" for kind, number in made.items())
            raise self.error(f"a model of more than {parts}")

    def error(self, of: str) -> _TooLargeError:
        return _TooLargeError(
            f"{self.what} describes {of}, far more than it holds; it is damaged, or meant to fill this machine's memory"
        )


_limits: ContextVar[_Limits | None] = ContextVar("_limits", default=None)


@contextmanager
def _counted(limits: _Limits) -> Iterator[None]:
    def registered(kind: str, module: nn.Module, name: str, value: Tensor | nn.Module | None) -> None:
        # what other threads make in the meantime is their own
        if _limits.get() is limits:
            limits.count(kind, 1)
            limits.count("numbers", value.numel() if isinstance(value, Tensor) and not is_lazy(value) else 0)

    before = _limits.set(limits)
    try:
        with (
            registration.register_module_parameter_registration_hook(functools.partial(registered, "tensors")),
            registration.register_module_buffer_registration_hook(functools.partial(registered, "tensors")),
            registration.register_module_module_registration_hook(functools.partial(registered, "modules")),
        ):
            yield
    finally:
        _limits.reset(before)


def _check_sizes(cls: type, arguments: Mapping[str, Any]) -> None:
    """Refuse more layers than :func:`within_size`, around this, allows, before a class that lists them has one."""
    limits = _limits.get()
    if limits is None or not issubclass(cls, nn.Module) or not _inside(f"{cls.__module__}.", ALLOWED):
        return
    for name, value in arguments.items():
        if type(value) is int and value > limits.numbers:
            raise limits.error(f"a {cls.__name__} of {name}={str(value)[:30]}")
    if issubclass(cls, (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)):
        layers = sum(value for name, value in arguments.items() if "layers" in name and type(value) is int)
        parts = sum(1 for part in arguments.values() if isinstance(part, nn.Module) for _ in part.modules())
        limits.count("modules", layers * max(parts, 10))


class _Bounded(TorchFunctionMode):
    """Computes everything on torch's ``meta`` device first, which takes no memory, and refuses what is too large."""

    def __init__(self, limits: _Limits) -> None:
        super().__init__()
        self.limits = limits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _limits.get() is not self.limits:
            return func(*args, **kwargs)
        # what is computed from tensors is where they are; what is made from nothing is told where
        made = "device" in kwargs or not any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs)))
        try:
            plan = func(*tree_map(_sized, args), **tree_map(_sized, kwargs) | ({"device": "meta"} if made else {}))
        except Exception:  # a function that looks at numbers finds none; what else is wrong shows below
            plan = None
        for value in tree_leaves(plan):
            if isinstance(value, Tensor) and value.numel() > self.limits.numbers:
                raise self.limits.error(f"a model with {value.numel():,} numbers in one array")
        return func(*args, **kwargs)


def _sized(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value
