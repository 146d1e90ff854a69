"""Pickles of other people, read without running anything that is in them.

``pickle.load`` calls whatever a file names, and snapshots of research code do name their own code: those of NVlabs/edm
and what is derived from it even carry its source, to be executed. Here nothing that a file names is imported or called.
Names stand for tokens without behavior, and the few functions that weights and arrays need are functions of this
module, which check what they are given and together make no more bytes than the file accounts for.

It is Python's own unpickler in Python, not that in C, which takes extension codes from a table that others fill, makes
room for as many memoized values as a file claims, and cannot be told what a state may be set on.

The opcodes: https://docs.python.org/3/library/pickletools.html. What such files are used for: Liu et al., "The Art of
Hide and Seek: Making Pickle-Based Model Supply Chain Poisoning Stealthy Again", 2025, https://arxiv.org/abs/2508.19774.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

_PLAIN_KEYS = (str, int, float, bytes, bool, type(None))
_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("uint8", "int8", "int16", "int32", "int64", "bool"),
)
_STORAGES = {
    f"{name}Storage": getattr(torch, name.lower())
    for name in ("Half", "BFloat16", "Float", "Double", "Short", "Int", "Long", "Bool")
} | {"ByteStorage": torch.uint8, "CharStorage": torch.int8}
_NUMPY_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_EASY_DICT = "dnnlib.util.EasyDict"
_CONVERT = ". If you trust where the file comes from, convert it in its own code to a plain state_dict"


class RefusedPickleError(ValueError):
    """A file asks for something that is not read here, because it would run code."""


class Allowance:
    """Bytes that may still be made of a file of ``size``: they may come twice, as text and as the array made of it."""

    def __init__(self, size: int) -> None:
        self.left = 2 * size + 2**16

    def spend(self, size: int) -> None:
        """Count what is made; a ``ValueError`` if that is more than is left."""
        self.left -= size
        if self.left < 0:
            raise ValueError("it says that it holds more than it has bytes for")


@dataclass(eq=False)
class Record:
    """What is left of an object: the name of its class and its attributes, nothing that can be called."""

    kind: str
    """Full name of the class; the bare name for classes whose source code is in the file."""
    state: dict[str, Any] = field(default_factory=dict)
    """Attributes, as ``__dict__`` held them."""

    def __repr__(self) -> str:
        return f"Record({self.kind!r}, attributes={len(self.state)})"


def read_arrays(content: bytes, name: str, origin: str) -> dict[str, Any]:
    """The dictionary of arrays, numbers and strings in a pickle of any protocol, of Python 2 or 3.

    Keys are text, arrays of any shape, and strings of Python 2 come as bytes. ``name`` is the file's, and ``origin``
    where to get it again, for the ``ValueError`` of anything else.
    """
    again, stream = f"get it again from {origin}", io.BytesIO(content)
    try:
        found = Unpickler(stream, name, Allowance(len(content)), encoding="bytes", remedy=f": {again}").load()
        if stream.read(1):
            raise ValueError("bytes follow its end")
        if type(found) is not dict:
            raise ValueError(f"it holds a {type(found).__name__}")
        return {_text(key): value for key, value in found.items()}
    except RefusedPickleError:
        raise
    # a damaged file can lead to any of them
    except Exception as error:
        raise ValueError(
            f"{name} is no pickle of a dictionary of arrays, or is truncated or corrupt "
            f"({type(error).__name__}: {' '.join(str(error).split())}); {again}"
        ) from error


# What names in a pickle become: no opcode but the expected one accepts them.


@dataclass(frozen=True)
class _Class:
    name: str


@dataclass(frozen=True)
class _Function:
    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class StorageType:
    """A kind of ``torch`` storage, by the type of its elements."""

    dtype: torch.dtype


@dataclass(eq=False)
class _NumpyType:
    kind: str
    order: str = "<"

    def dtype(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "") + self.kind)


class _Opcodes(dict):
    def __missing__(self, code: int) -> Any:
        opcode = pickletools.code2op.get(chr(code))  # type: ignore[attr-defined]
        if opcode is None:
            raise pickle.UnpicklingError(f"there is no opcode {code}")
        return lambda unpickler: unpickler.refuse(f"the opcode {opcode.name}")


class Unpickler(pickle._Unpickler):
    """Makes plain values, arrays and tensors of numbers, and a :class:`Record` where an object of some class was.

    Ordered and attribute-like dictionaries come as ``dict``, NumPy's numbers as Python's. :meth:`load` raises
    :class:`RefusedPickleError` for anything else that is named, and any other exception for a damaged file.

    Args:
        stream: What has ``read`` and ``readline``, in memory or a map: lengths in a file are not to be believed.
        file: Its name, for errors.
        allowance: Bytes that it may make.
        classes: Full names of classes whose objects become records, beside those of ``torch.nn``.
        encoding: Of the strings of Python 2; ``"bytes"`` leaves them as they are.
        storage: Gives the tensor ``(N,)`` of a persistent identity; ``None`` where there is none beside the pickle.
        from_bytes: Gives the tensor ``(N,)`` of which ``torch.save`` made these bytes.
        remedy: What to do with a file that is refused, for errors.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        stream: Any,
        file: str,
        allowance: Allowance,
        *,
        classes: Collection[str] = (),
        encoding: str = "ASCII",
        storage: Callable[[Any], Tensor] | None = None,
        from_bytes: Callable[[bytes], Any] | None = None,
        remedy: str = _CONVERT,
    ) -> None:
        super().__init__(stream, encoding=encoding)
        self._file, self._allowance, self._classes, self._remedy = file, allowance, classes, remedy
        self._storage, self._from_bytes = storage, from_bytes

    def refuse(self, what: str) -> Any:
        raise RefusedPickleError(
            f"{self._file} asks for {what}, which reading numbers does not need: nothing of it was run{self._remedy}"
        )

    # --- names, and what may be done with them ---

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if "." not in name:
            if full in self._classes or module.startswith("torch.nn.modules.") or full in (_EASY_DICT, "numpy.ndarray"):
                return _Class(full)
            if full in _FUNCTIONS:
                return _Function(full, getattr(self, _FUNCTIONS[full]))
            if module == "torch" and name in _DTYPES:
                return getattr(torch, name)
            if module == "torch" and name in _STORAGES:
                return StorageType(_STORAGES[name])
        return self.refuse(full)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Function or type(arguments) is not tuple:
            self.refuse(f"a call of {getattr(function, 'name', type(function).__name__)}")
        self.append(function.call(*arguments))

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Class or kind.name == "numpy.ndarray" or type(arguments) is not tuple or arguments:
            self.refuse(f"an object of {getattr(kind, 'name', type(kind).__name__)} made of arguments")
        self.append({} if kind.name == _EASY_DICT else Record(kind.name))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record and not target.state and type(state) is dict and all(type(k) is str for k in state):
            target.state = state
        elif type(target) is _NumpyType and type(state) is tuple and len(state) > 1:
            target.order = {"<": "<", ">": ">", "|": "|"}[_text(state[1])]
        elif type(target) is np.ndarray and type(state) is tuple and len(state) == 5:
            self._fill(target, *state)
        elif type(target) is not dict or type(state) is not dict or set(state) != {"_metadata"}:
            # an ordered dictionary of weights has its versions as an attribute, which is dropped
            self.refuse(f"a {type(target).__name__} with a state of its own")

    def load_binpersid(self) -> None:
        if self._storage is None:
            self.refuse("a persistent identity, in a pickle that has no storages beside it")
        else:
            self.append(self._storage(self.stack.pop()))

    # --- containers, of plain keys: a tuple of tuples that refer to one another takes for ever to hash ---

    def _keys(self, keys: list[Any]) -> list[Any]:
        if any(type(key) not in _PLAIN_KEYS for key in keys):
            self.refuse("a dictionary or set of other things than plain keys")
        return keys

    def _pairs(self, items: list[Any]) -> dict[Any, Any]:
        return dict(zip(self._keys(items[::2]), items[1::2], strict=True))

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            self.refuse(f"a change of a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def load_append(self) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._top(list).extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict).update(self._pairs([key, value]))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._top(dict).update(self._pairs(items))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._top(set).update(self._keys(items))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(self._pairs(items))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(self._keys(items)))

    # --- the functions, each in the place of the one that its name stands for ---

    def _ordered_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        if type(pairs) not in (list, tuple) or any(type(p) not in (list, tuple) or len(p) != 2 for p in pairs):
            raise ValueError("an ordered dictionary is made of something that is no pairs")
        self._allowance.spend(4 * len(pairs))
        return self._pairs([value for pair in pairs for value in pair])

    def _set(self, items: Any = ()) -> set[Any]:
        if type(items) not in (list, tuple):
            raise ValueError("a set is made of something that is no list")
        self._allowance.spend(4 * len(items))
        return set(self._keys(list(items)))

    def _encoded(self, text: Any, encoding: Any) -> bytes:
        # how Python 3 writes bytes for Python 2
        if type(text) is not str or _text(encoding) != "latin1":
            raise ValueError("bytes are made of something that is no text in latin1")
        self._allowance.spend(len(text))
        return text.encode("latin1")

    def _tensor(self, flat: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        if type(flat) is not Tensor or flat.ndim != 1 or type(shape) is not tuple or type(strides) is not tuple:
            raise ValueError("a tensor is made of something that is no storage, shape and strides")
        if len(shape) != len(strides) or len(shape) > 16 or not all(map(_is_count, (offset, *shape, *strides))):
            raise ValueError("a tensor's shape, strides or offset are no sizes")
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides)) if count else 0
        if count > len(flat) or last >= max(len(flat), 1):
            raise ValueError(f"a tensor of shape {shape} does not lie within its storage of {len(flat)}")
        return flat.as_strided(shape, strides, offset) if count else flat.new_empty(shape)

    def _parameter(self, data: Any, *_: Any) -> Tensor:
        if type(data) is not Tensor:
            raise ValueError(f"a parameter is made of a {type(data).__name__}")
        return data

    def _storage_from_bytes(self, data: Any) -> Tensor:
        if self._from_bytes is None:
            self.refuse("a storage, where none is expected")
        elif type(data) is bytes:
            # they can be asked for any number of times
            self._allowance.spend(len(data))
            if type(flat := self._from_bytes(data)) is Tensor:
                return flat
        raise ValueError("a storage is made of other things than the bytes of one")

    def _device(self, kind: Any, index: Any = 0) -> str:
        return _text(kind)

    def _numpy_type(self, kind: Any, align: Any = False, copy: Any = True) -> _NumpyType:
        name = _text(kind)
        if name not in _NUMPY_KINDS:
            raise ValueError(f"an array has NumPy type {name}; {', '.join(_NUMPY_KINDS)} are expected")
        return _NumpyType(name)

    def _numpy_number(self, dtype: Any, data: Any) -> Any:
        if type(dtype) is not _NumpyType or type(data) is not bytes:
            raise ValueError("a NumPy number is made of something that is no type and bytes")
        (value,) = np.frombuffer(data, dtype.dtype())
        return value.item()

    def _array(self, kind: Any, *_: Any) -> np.ndarray:
        if type(kind) is not _Class or kind.name != "numpy.ndarray":
            raise ValueError("an array is made of another class")
        return np.empty(0)

    def _fill(self, array: np.ndarray, version: Any, shape: Any, kind: Any, fortran: Any, content: Any) -> None:
        if type(kind) is not _NumpyType or type(content) is not bytes or type(shape) is not tuple or len(shape) > 16:
            raise ValueError("an array's state is no shape, type and bytes")
        dtype = kind.dtype()
        if (
            type(fortran) not in (bool, int)
            or not all(map(_is_count, shape))
            or math.prod(shape) * dtype.itemsize != len(content)
        ):
            raise ValueError(f"an array of {kind.kind} and shape {shape} has {len(content)} bytes")
        self._allowance.spend(len(content))
        array.__setstate__((1, shape, dtype, bool(fortran), content))  # type: ignore[arg-type]

    def _persistent_object(self, meta: Any) -> Record:
        if type(meta) is not dict or type(meta.get("class_name")) is not str or type(meta.get("state")) is not dict:
            raise ValueError("a persistent object has no class_name or no state")
        return Record(meta["class_name"], meta["state"])

    dispatch: ClassVar[dict[int, Any]] = _Opcodes()


_FUNCTIONS = {
    "collections.OrderedDict": "_ordered_dict",
    "builtins.set": "_set",
    "__builtin__.set": "_set",
    "_codecs.encode": "_encoded",
    "torch._utils._rebuild_tensor": "_tensor",
    "torch._utils._rebuild_tensor_v2": "_tensor",
    "torch._utils._rebuild_parameter": "_parameter",
    "torch.storage._load_from_bytes": "_storage_from_bytes",
    "torch.device": "_device",
    "numpy.dtype": "_numpy_type",
    **{f"numpy.{core}.multiarray.scalar": "_numpy_number" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": "_array" for core in ("core", "_core")},
    "torch_utils.persistence._reconstruct_persistent_obj": "_persistent_object",
}
# beside the opcodes defined above: constants, the memo, the stack and names, as pickle has them
_THEIRS = (
    *("proto", "frame", "stop", "mark", "pop", "pop_mark", "dup", "none", "true", "false"),
    *("int", "binint", "binint1", "binint2", "long", "long1", "long4", "float", "binfloat"),
    *("string", "binstring", "short_binstring", "unicode", "binunicode", "short_binunicode", "binunicode8"),
    *("binbytes", "short_binbytes", "binbytes8", "put", "binput", "long_binput", "memoize", "get", "binget"),
    *("long_binget", "tuple", "tuple1", "tuple2", "tuple3", "empty_tuple", "list", "empty_list", "empty_dictionary"),
    *("empty_set", "global", "stack_global"),
)
for _code, _method in pickle._Unpickler.dispatch.items():
    if _method.__name__ in vars(Unpickler) or _method.__name__.removeprefix("load_") in _THEIRS:
        Unpickler.dispatch[_code] = getattr(Unpickler, _method.__name__)


def _text(value: Any) -> str:
    if type(value) not in (str, bytes):
        raise ValueError(f"a {type(value).__name__} is where a name should be")
    return value.decode("latin1") if type(value) is bytes else value


def _is_count(value: Any) -> bool:
    # type() and not isinstance(): True is no count
    return type(value) is int and 0 <= value < 2**63
