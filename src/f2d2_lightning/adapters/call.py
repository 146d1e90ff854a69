"""A call written as text, such as ``"net(x, (s, s - t), extra={'label': cond})"``, read without running any code in it.

Text, because a convention then fits into a configuration file and into a checkpoint, and because it is how the call
stands in the other author's code.
"""

from __future__ import annotations

import ast
import copy
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

NAMES = ("x", "s", "t", "cond")
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": torch.abs,
    "cat": lambda x, *more: torch.cat((x, *(part.reshape(len(part), -1).expand(len(x), -1) for part in more)), 1),
    "clamp": lambda value, low, high: value.clamp(low, high),
    "exp": torch.exp,
    "full": lambda value, like: torch.full_like(like, value),
    "log": torch.log,
    "log2": torch.log2,
    "round": torch.round,
    "sqrt": torch.sqrt,
}

_GRAMMAR = (
    "write the call as in the other author's code: net(...) or net.method(...), with the names x (state), s (start), "
    "t (end), cond, numbers, strings, None, tuples, lists, dictionaries, + - * /, and the functions "
    + ", ".join(_FUNCTIONS)
    + " (full(1.0, s) is a time-shaped tensor of ones, cat(x, s) a vector with its time beside it)"
)
LONGEST = 2000  # characters; what is deeper or longer is no call that somebody wrote

Value = Callable[[Mapping[str, Any]], Any]


def _is_general(cls: type) -> bool:
    """Whether a class is no network but what networks and modules of training derive from."""
    ours = cls.__module__.startswith("f2d2_lightning.modules.")
    return cls in (object, nn.Module) or ours or cls.__module__.partition(".")[0] in LIGHTNING


def _times(node: ast.AST) -> list[ast.AST]:
    """The largest expressions within a call that are made of s and t; ``full(1.0, s)`` has their shape only."""
    if isinstance(node, ast.Name):
        return [node] if node.id in ("s", "t") else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "full":
        return []
    inner = [found for child in ast.iter_child_nodes(node) for found in _times(child)]
    of_net = isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
    arithmetic = isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Call)) and not of_net
    others = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & {"x", "cond"}
    return [node] if inner and arithmetic and not others else inner


class ConventionError(ValueError):
    """A network is not what its adapter says: how it is called, what it answers, where its time runs."""


class Call:
    """A parsed call, ``"net(x, s, t, cond)"`` and the like.

    Text that is no call of ``net``, or holds anything but names, literals and arithmetic, is a ``ValueError``.

    >>> Call("net(x, 1000 * s)")(lambda x, s: (x, s), {"x": 1, "s": 0.5, "t": 0.0, "cond": None})
    (1, 500.0)
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ValueError(f"the call is {text!r:.80}; text of up to {LONGEST} characters is needed, and {_GRAMMAR}")
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            self._parse(self._tree)
        except SyntaxError as error:
            raise ValueError(f"the call {text!r} cannot be read ({error.msg}); {_GRAMMAR}") from error
        except (RecursionError, MemoryError) as error:  # what Python says of expressions within expressions
            raise ValueError(f"the call {text[:80]!r}... is nested too deeply; {_GRAMMAR}") from error

    def _parse(self, node: ast.expr) -> None:
        text = self.text
        if not isinstance(node, ast.Call):
            raise ValueError(f"{text!r} is no call; {_GRAMMAR}")
        self.method = self._method(node.func)
        self._arguments = [self._value(argument) for argument in node.args]
        self._keywords: dict[str, Value] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError(f"the call {text!r} has a ** argument; {_GRAMMAR}")
            if keyword.arg in self._keywords:
                raise ValueError(f"the call {text!r} gives {keyword.arg}= twice; give it once")
            self._keywords[keyword.arg] = self._value(keyword.value)
        self.names = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name)) & frozenset(NAMES)
        if "x" not in self.names:
            raise ValueError(f"the call {text!r} does not pass the state x; {_GRAMMAR}")

    def __call__(self, network: Callable[..., Any], names: Mapping[str, Any]) -> Any:
        """What ``network`` answers, called with the values of ``x``, ``s``, ``t`` and ``cond``."""
        function = network if self.method is None else getattr(network, self.method)
        arguments = [value(names) for value in self._arguments]
        return function(*arguments, **{name: value(names) for name, value in self._keywords.items()})

    @property
    def times(self) -> list[str]:
        """The arguments, or parts of them, that are made of the times, as text in their order.

        >>> Call("net(x, (1000 * s, s - t), full(1.0, s), y=cond)").times
        ['1000 * s', 's - t']
        """
        return [ast.unparse(node) for node in _times(self._tree)]

    def with_times(self, times: Sequence[str]) -> str:
        """The text of the call with others in their places.

        >>> Call("net(x, (1000 * s, s - t))").with_times(["s", "t"])
        'net(x, (s, t))'
        """
        tree = copy.deepcopy(self._tree)
        others = dict(zip(map(id, _times(tree)), times, strict=True))

        class Exchange(ast.NodeTransformer):
            def visit(self, node: ast.AST) -> ast.AST:
                if id(node) in others:
                    return ast.parse(others[id(node)], mode="eval").body
                return self.generic_visit(node)

        return ast.unparse(Exchange().visit(tree))

    def check(self, network: nn.Module) -> None:
        """Refuse, with a ``ValueError``, a network that has no such method of its own.

        What every module has (``load_state_dict``, ``apply``, ``to``, ...) is no forward pass, nor is what a library's
        base classes add to it (``save_pretrained``, ``push_to_hub``, ...), and a call that comes from a file must not
        reach either. So the method is a plain one, of a class that defines ``forward``, of one derived from that, or of
        another in the same file. A submodule may be called, as a method may.
        """
        if self.method is None or self.method in network._modules:
            return
        classes = type(network).__mro__
        owner = next((cls for cls in classes if self.method in vars(cls)), object)
        # looked at, not asked for: a property would run
        function = vars(owner).get(self.method)
        written = [cls for cls in classes if "forward" in vars(cls) and not _is_general(cls)]
        own = owner in classes[: classes.index(written[0]) + 1] if written else owner is classes[0]
        if (
            self.method.startswith("_")
            or not isinstance(function, types.FunctionType)
            or _is_general(owner)
            or not (own or owner.__module__ == classes[0].__module__)
        ):
            raise ValueError(f"{type(network).__name__} defines no method {self.method!r}, which {self.text!r} calls")

    def _method(self, function: ast.expr) -> str | None:
        if isinstance(function, ast.Name) and function.id == "net":
            return None
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "net":
            return function.attr
        raise ValueError(f"{self.text!r} does not call net; {_GRAMMAR}")

    def _value(self, node: ast.expr) -> Value:
        """The expression as a function of the names' values."""
        if isinstance(node, ast.Constant):
            constant = node.value
            return lambda names: constant
        if isinstance(node, ast.Name) and node.id in NAMES:
            name = node.id
            return lambda names: names[name]
        if isinstance(node, (ast.Tuple, ast.List)):
            items, kind = [self._value(item) for item in node.elts], tuple if isinstance(node, ast.Tuple) else list
            return lambda names: kind(item(names) for item in items)
        if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            values = [self._value(value) for value in node.values]
            return lambda names: {key: value(names) for key, value in zip(keys, values, strict=True)}
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            unary, operand = _OPERATORS[type(node.op)], self._number(node.operand)
            return lambda names: unary(operand(names))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            binary, left, right = _OPERATORS[type(node.op)], self._number(node.left), self._number(node.right)
            return lambda names: binary(left(names), right(names))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            name, takes = node.func.id, {"clamp": 3, "full": 2, "cat": max(2, len(node.args))}.get(node.func.id, 1)
            if node.keywords or len(node.args) != takes:
                raise ValueError(
                    f"in the call {self.text!r}, {name} takes {takes} argument{'s' * (takes > 1)} and no keyword, and "
                    f"got {ast.unparse(node)!r}; {_GRAMMAR}"
                )
            function, arguments = _FUNCTIONS[name], [self._number(argument) for argument in node.args]
            return lambda names: function(*(argument(names) for argument in arguments))
        raise ValueError(f"the call {self.text!r} holds {ast.unparse(node)!r}, which is not understood; {_GRAMMAR}")

    def _number(self, node: ast.expr) -> Value:
        """As :meth:`_value`, of what can be calculated with: a list times a number would be as long as it says."""
        if isinstance(node, (ast.Tuple, ast.List, ast.Dict)) or (
            isinstance(node, ast.Constant) and type(node.value) not in (int, float)
        ):
            raise ValueError(f"the call {self.text!r} calculates with {ast.unparse(node)!r}; {_GRAMMAR}")
        return self._value(node)

    def __repr__(self) -> str:
        return f"Call({self.text!r})"

    def __reduce__(self) -> tuple[type[Call], tuple[str]]:
        return Call, (self.text,)
