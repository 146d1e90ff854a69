"""Errors of the parser of arguments: a tree of text, of which one branch is what is wrong."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from f2d2_lightning.checkpoints.trust import takes
from f2d2_lightning.cli._configs import closest
from f2d2_lightning.cli._given import Given, find

LISTED = 8
"""Names that a message gives where none is near."""
_KEY = re.compile(r'^Parser key "([^"]*)"(?: element \d+)?:\s*(.*)$')
_CLASS = re.compile(r"^Problem with given class_path '([^']*)':\s*(.*)$")
_VALUE = re.compile(r"^Given value: (.*)$")
_GOT = re.compile(r"\. Got value: (.*)$")
_EXPECTED = re.compile(r"^Expected an? (?:<class ')?([\w.]+)'?>?$")
_NO_OPTION = re.compile(r"(?:Option|does not accept option|Key) '([^']+)'(?: is not (?:accepted|expected))?")
_NO_CLASS = re.compile(
    r"dot import path string: (.*)|Import path (\S+) does not|(?:No module named|has no attribute) '.*'|"
    r"[Uu]nable to (?:import|load)|abstract class|not correspond to a subclass"
)
_CALLABLE = re.compile(r"^Type typing\.Callable.* expects a function or a callable class: (.*)$")
_MADE = re.compile(r"Namespace\(class_path='([\w.]+)'")
_LITERAL = re.compile(r"^Expected an? typing\.Literal\[(.*)\]$")
_RANGE = re.compile(r"^Not of type \w+: .* does not conform to restriction v *(.*)$")
_POSITIVE = "Not of type PositiveInt"
_NAME = re.compile(r"(?!(?:true|false|null)$)[A-Za-z_][\w.]*$", re.IGNORECASE)
_ONE_OF = "one of "
_SKIPPED = re.compile(r"^(Does not validate against any|Subtypes:|Errors:|Given value type:|Expected a path but)")


@dataclass(frozen=True)
class Leaf:
    """Something that is wrong."""

    path: tuple[str, ...] = ()
    """Keys, ``init_args`` among them."""
    owners: tuple[str, ...] = ()
    """Classes that the keys are arguments of, from the outermost."""
    problem: str = ""
    value: str | None = None

    @property
    def key(self) -> str:
        """Full path of the key."""
        return ".".join(self.path)


def leaves(text: str) -> list[Leaf]:
    """All that is wrong by the parser's text, which tries every type of a union."""
    nodes: list[tuple[int, str]] = []
    for line in text.splitlines():
        bare = line.lstrip()
        depth = len(line) - len(bare)
        while bare.startswith("- "):
            bare, depth = bare[2:], depth + 2
        if bare:
            nodes.append((depth, bare))
    return list(_read(nodes, Leaf()))


def _read(nodes: Sequence[tuple[int, str]], within: Leaf) -> Iterator[Leaf]:
    place = 0
    values = [found[1] for _, line in nodes if (found := _VALUE.match(line))]
    while place < len(nodes):
        depth, line = nodes[place]
        end = place + 1
        while end < len(nodes) and nodes[end][0] > depth:
            end += 1
        inside = nodes[place + 1 : end]
        if found := _KEY.match(line) or _CLASS.match(line):
            if line.startswith("Parser"):
                inner = replace(within, path=(*within.path, found[1]), value=None)
            else:
                inner = _within(within, found[1])
            yield from _read([(depth + 1, found[2]), *inside] if found[2] else inside, inner)
        elif _SKIPPED.match(line):
            yield from _read(inside, replace(within, value=values[-1]) if values else within)
        elif found := _CALLABLE.match(line):
            # its class is said in the value only
            owner = next(iter(_MADE.findall(" ".join([line, *(more for _, more in inside)]))), None)
            within_it = within if owner is None else _within(within, owner)
            yield from _read([(depth, found[1]), *inside], within_it)
        elif not _VALUE.match(line):
            got = _GOT.search(line)
            rest = " ".join([_GOT.sub("", line), *(more for _, more in inside)])
            value = got[1] if got else values[-1] if values else within.value
            yield replace(within, problem=rest, value=value)
        place = end


def _within(leaf: Leaf, owner: str) -> Leaf:
    return replace(leaf, path=(*leaf.path, "init_args"), owners=(*leaf.owners, owner), value=None)


def said(text: str, options: Sequence[str], everything: Sequence[Given], roots: Mapping[str, Any]) -> str:
    """The parser's text as a line: where, what came, what is expected, and what is near it.

    ``options`` are the names of all, without hyphens; ``roots`` the types of those that take classes.
    """
    if found := re.search(r"nrecognized arguments: (\S+)", text):
        name = found[1].partition("=")[0]
        if not name.startswith("-"):
            return f"{found[1]!r} is no option, and nothing takes it; options begin with --"
        given = find(name, None, everything)
        source = f" ({given.where})" if given is not None and not given.where.startswith("-") else ""
        return f"there is no option {found[1]}{source}{_near(name.strip('-'), options, '--')}"
    if found := re.search(r"arguments are required: (.*)", text):
        names = [name.strip().partition(".")[2] or name.strip() for name in found[1].split(",")]
        configs = any(classes(roots.get(name)) for name in names)
        shown = " and ".join(name if configs else f"--{name.lstrip('-')}" for name in names)
        return f"{shown} must be given" + ("; --config NAME, of which f2d2 configs lists some" if configs else "")
    if found := re.search(r"argument ([^:]+): expected (.*)", text):
        return f"{found[1]} has no value; expected {found[2]}"
    found_leaves = leaves(text)
    deepest = max(len(leaf.path) for leaf in found_leaves)
    rest = [leaf for leaf in found_leaves if len(leaf.path) == deepest]
    types = [name for leaf in rest if (name := _type(leaf.problem)) is not None]
    others = [leaf for leaf in rest if _type(leaf.problem) is None]
    if types and not any(_NAME.match(leaf.value or "") for leaf in others):
        # a type of its union is a class, and this is no name of one
        others = [leaf for leaf in others if not _NO_CLASS.search(leaf.problem)]
    leaf = (others or rest)[0]
    if "before subcommand" in leaf.problem:
        return f"{everything[0].where if everything else 'options'} stands before the command, and belongs after it"
    if found := _NO_OPTION.search(leaf.problem):
        return _no_option(leaf, found[1], options, everything)
    wrong_class = _NO_CLASS.search(leaf.problem)
    if wrong_class and leaf.path[-1:] == ("init_args",):
        leaf = replace(leaf, path=leaf.path[:-1], owners=leaf.owners[:-1], value=leaf.owners[-1])
    elif wrong_class and (wrong_class[1] or wrong_class[2]):
        leaf = replace(leaf, value=wrong_class[1] or wrong_class[2])
    given = find(leaf.key, leaf.value, everything)
    if wrong_class:
        path = find(f"{leaf.key}.class_path", leaf.value, everything)
        if path is not None and (given is None or str(given.value) != leaf.value):
            given = path
        hint = hints_of(leaf.owners[-1]).get(leaf.path[-1]) if leaf.owners else roots.get(leaf.key)
        came = given.value if given is not None else leaf.value
        value = str(came.get("class_path") if isinstance(came, dict) else came)
        return f"{_placed(leaf, given)}: {no_class(value, classes(hint))}"
    names = list(dict.fromkeys(types))
    if not others and names:
        choices = ", ".join(name.removeprefix(_ONE_OF) for name in names if name.startswith(_ONE_OF))
        plain = [name for name in names if not name.startswith(_ONE_OF)]
        return f"{_placed(leaf, given)}: {' or '.join([*([_ONE_OF + choices] if choices else []), *plain])} is expected"
    problem = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", leaf.problem)
    return f"{_placed(leaf, given)}: {problem[:300]}"


def _type(problem: str) -> str | None:
    """Name of the type that is expected, if it is no more than that."""
    if found := _LITERAL.match(problem):
        return f"{_ONE_OF}{found[1]}"
    if found := _RANGE.match(problem):
        return f"a number {found[1]}"
    if problem.startswith(_POSITIVE):
        return "a whole number above 0"
    found = _EXPECTED.match(problem)
    name = found[1].rpartition(".")[2] if found else None
    return "None" if name == "NoneType" else name


def _placed(leaf: Leaf, given: Given | None) -> str:
    """Where, and what came."""
    if given is None:
        return leaf.key + ("" if leaf.value is None else f"={leaf.value[:80]!r}")
    if given.where.strip("-") == leaf.key:
        return f"{given.where} {given.shown}"
    return f"{leaf.key}={given.shown} ({given.where})"


def _no_option(leaf: Leaf, name: str, options: Sequence[str], everything: Sequence[Given]) -> str:
    key = ".".join((*leaf.path, name))
    given = find(key, None, everything)
    where = "" if given is None or given.where.strip("-+") == key else f" ({given.where})"
    if not leaf.owners:
        return f"there is no key {key}{where}{_near(key, options)}"
    owner = leaf.owners[-1]
    return f"there is no {key}{where}: {owner} takes no {name!r}{_near(name, list(hints_of(owner)), few=True)}"


def _near(name: str, known: Sequence[str], before: str = "", few: bool = False) -> str:
    # in another group, such as max_steps without trainer
    ends = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]]
    near = closest(name, known) or (f"; did you mean {ends[0]!r}?" if ends else "")
    if near:
        return near.replace("'", f"'{before}", 1)
    start = name.rpartition(".")[0]
    within = [one for one in known if one.rpartition(".")[0] == start and not one.endswith(("help", "+"))]
    if not (start or few) and len(within) > LISTED:
        return "; --help lists all" if before else "; f2d2 fit --print_config shows all"
    listed = ", ".join(f"{before}{one}" for one in within[:LISTED])
    return f"; there are {listed}{', ...' if len(within) > LISTED else ''}" if within else "; --help lists all"


# --- classes by their names: what a type takes, and what may be called so ---


def imported(path: str) -> Any:
    """What a dotted path names, ``None`` if nothing."""
    package, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError):
        return None


def hints_of(class_path: str) -> Mapping[str, Any]:
    """Types of the arguments of a class or function by name; none of what cannot be imported."""
    made = imported(class_path)
    if inspect.isclass(made):
        return takes(made).hints
    return {} if made is None else dict.fromkeys(inspect.signature(made).parameters) | typing.get_type_hints(made)


def classes(hint: Any) -> list[type]:
    """Classes within a type."""
    own = [hint] if inspect.isclass(hint) and hint.__module__ not in ("builtins", "collections.abc") else []
    return list(dict.fromkeys([*own, *(one for argument in typing.get_args(hint) for one in classes(argument))]))


def no_class(value: str, of: list[type]) -> str:
    """That a path is none of these classes, and which is near it."""
    needed = " or ".join(dict.fromkeys(kind.__name__ for kind in of)) or "class"
    bases = {kind.__name__ for kind in of}
    every = {path.rpartition(".")[2]: path for kind in of for path in subclasses(kind)}
    known = {name: path for name, path in every.items() if name not in bases} or every
    found = f"there is no {needed} of this name" if imported(value) is None else f"this is no {needed}"
    if imported(value) is None and (near := closest(value.rpartition(".")[2], known)):
        return found + near.replace(name := near.split("'")[1], known[name])
    listed = ", ".join(list(known.values())[:LISTED])
    return f"{found}; {f'there are {listed}, and your own by their paths' if listed else 'its path must be importable'}"


def subclasses(kind: type) -> Iterator[str]:
    """Paths of a class and of all that are derived from it, which are public and can be made."""
    path = public_path(kind)
    if path is not None and not inspect.isabstract(kind):
        yield path
    derived: list[type] = type.__subclasses__(kind)
    for one in derived:
        yield from subclasses(one)


def public_path(cls: type) -> str | None:
    """The shortest path by which a class is public, ``None`` if there is none."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        # a module may be gone, and its classes still there
        listed = getattr(sys.modules.get(module), "__all__", ())
        if cls.__name__ in listed and not any(part.startswith("_") for part in parts[:end]):
            return f"{module}.{cls.__name__}"
    private = any(part.startswith("_") for part in (*parts, cls.__name__)) or parts[0] == __name__.partition(".")[0]
    return None if private or "<locals>" in cls.__qualname__ else f"{cls.__module__}.{cls.__qualname__}"
