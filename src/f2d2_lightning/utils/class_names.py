"""Names of classes: a label means the same class in training, in a test and on the command line.

A model keeps the names that its labels were trained with, in their order: ``["10", "2"]`` means that label 0 is the
class ``"10"``. An empty list says that its data had numbers and no names, ``None`` that nothing is known, as with
checkpoints of before names were kept. Data modules that have names offer them as ``classes: list[str]``, and number
their labels anew in ``relabel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN = 12


def labels_of(found: Sequence[str], known: Sequence[str], where: Any) -> list[int]:
    """Label of each class that data have, by its place among the model's ``known`` names; a ``ValueError`` for others.

    Of a model whose labels are numbers without names, names that are whole numbers say the label themselves.

    >>> labels_of(["2"], ["10", "2"], "a folder")
    [1]
    """
    if not known and all(name.isdecimal() for name in found):
        return [int(name) for name in found]
    if strange := [name for name in found if name not in known]:
        has = _listed(known) if known else "labels that are numbers, without names"
        raise ValueError(
            f"{where} has {'a class' if len(strange) == 1 else 'classes'} {_listed(strange)} that the model does not "
            f"know: the data have {_listed(found)}; the model has {has}. Give the folders the names of the model's "
            "classes, or leave the others out (to train for other classes, set the module's class_names to None before)"
        )
    return [list(known).index(name) for name in found]


def guessed_labels(found: Sequence[str], count: int | None, where: Any) -> tuple[list[int], str | None]:
    """Labels for a model that does not say what its labels were, and what to say of them.

    Folders of images are numbered in the order of their names as text, where all the classes are there; a folder that
    is called by a number may also stand for that label. Where there is no reason for either it is a ``ValueError``.
    Names are sorted as text, and ``count`` is that of the model's classes, if it is known.
    """
    places = list(range(len(found)))
    numbers = [int(name) for name in found] if all(name.isdecimal() for name in found) else None
    if numbers is not None and count is not None and max(numbers, default=0) >= count:
        numbers = None
    if numbers == places:
        return places, None
    unsaid = "the checkpoint does not say its classes"
    remedy = "if that is wrong, name the model's classes in the order of their labels: --classes NAME,NAME,..."
    if len(found) == count:
        shown = ", ".join(f"{name} is {place}" for name, place in list(zip(found, places, strict=True))[:SHOWN])
        said = f"{unsaid}, and their order is ambiguous; taken as text: {shown}; {remedy}"
        return places, None if numbers is None else said
    # of up to ten classes, numbers as text have the order of numbers
    if numbers is not None and count is not None and count <= 10:
        return numbers, f"{unsaid}; the folders of {where} are taken as labels: {remedy}"
    raise ValueError(
        f"{where} has the classes {_listed(found)}, and the checkpoint does not say which of the model's "
        f"{'' if count is None else f'{count} '}labels they are: their order is ambiguous. Name the model's classes in "
        "the order of their labels (--classes NAME,NAME,...), or give an .npz file with x and y"
    )


def agree_on_classes(data: Any, known: Sequence[str] | None) -> list[str] | None:
    """The names that a model keeps; labels of a data module that is set up, if there is one, follow them from now on.

    ``known`` are those that the model has, in the order of their labels; ``None`` if it has not met data yet. A class
    that the model does not know, or another order that cannot be changed, is a ``ValueError``.
    """
    found = getattr(data, "classes", None)
    if not isinstance(found, (list, tuple)) or not found or not all(type(name) is str for name in found):
        return [] if known is None else list(known)
    if known is None:
        return list(found)
    labels = labels_of(found, known, type(data).__name__)
    if hasattr(data, "relabel"):
        data.relabel(known)
    elif labels != list(range(len(found))):
        raise ValueError(
            f"{type(data).__name__} has the classes {_listed(found)} in another order than the model: "
            f"{_listed(known)}; number its labels as the model does"
        )
    return list(known)


def as_names(value: Any, where: Any) -> list[str] | None:
    """What a file says of its classes; a ``ValueError`` if that is no list of different names."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(name) is str for name in value) or len({*value}) != len(value):
        raise ValueError(f"{where} has classes {value!r:.80}; a list of different names is expected")
    return value


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f", ... ({len(names)})" if len(names) > SHOWN else "")
