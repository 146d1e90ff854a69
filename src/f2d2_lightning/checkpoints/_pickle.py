"""Reading pickles of other people without running anything that is in them.

``pickle.load`` calls whatever a file names, and snapshots of research code do name their own code: those of
NVlabs/edm and what is derived from it even carry its source, to be executed. Here a file is interpreted instead, opcode
by opcode, by a machine that imports nothing and calls nothing: what it can make are plain values, tensors that are not
read until asked for, and a :class:`Record` where an object of some class was. Everything else is refused by name.

:func:`f2d2_lightning.checkpoints.foreign.read_checkpoint` reads whole files with it.

The opcodes: Python's ``pickletools``, https://docs.python.org/3/library/pickletools.html. What such files are used for:
Liu et al., "The Art of Hide and Seek: Making Pickle-Based Model Supply Chain Poisoning Stealthy Again", 2025,
https://arxiv.org/abs/2508.19774.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["Machine", "Record", "RefusedPickleError", "Storage", "StoredTensor", "announced_storage"]

_PLAIN_KEYS = (str, int, float, bytes, type(None))
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("uint8", "int8", "int16", "int32", "int64", "bool"),
    )
}
_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
_NUMPY_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class RefusedPickleError(ValueError):
    """A file asks for something that is not read here, because it would run code."""


@dataclass(eq=False)
class Record:
    """What is left of an object: the name of its class and its attributes, nothing that can be called."""

    kind: str
    """Full name of the class; the bare name for classes whose source code is in the file."""
    state: dict[str, Any] = field(default_factory=dict)
    """Attributes, as ``__dict__`` held them."""

    def __repr__(self) -> str:
        return f"Record({self.kind!r}, attributes={len(self.state)})"


@dataclass(eq=False)
class Storage:
    """Where the values of tensors are in a file."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytes] | None = None
    """Gives the bytes; set by who knows the file."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(eq=False)
class StoredTensor:
    """A tensor of a file, not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.storage.dtype

    def tensor(self) -> Tensor:
        """The values, on the CPU.

        Raises:
            ValueError: If the file has fewer bytes for it than it says, or is damaged there.
        """
        assert self.storage.read is not None
        try:
            data = bytearray(self.storage.read())
        except (EOFError, LookupError, OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"the values of a tensor of shape {self.shape} are damaged: {error}") from error
        if len(data) != self.storage.nbytes:
            raise ValueError(f"a tensor's storage has {len(data)} bytes, but {self.storage.nbytes} were announced")
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.as_strided(self.shape, self.strides, self.offset)


def announced_storage(identity: tuple[Any, ...], storages: dict[str, Storage]) -> Storage:
    """The storage that a persistent identity ``("storage", class, key, location, numel, ...)`` speaks of.

    Args:
        identity: What the pickle says.
        storages: Those spoken of so far, by key; a new one is entered.

    Raises:
        ValueError: If it is none, or one of that key was announced with another size.
    """
    kind, dtype, key, location, numel = identity[:5]
    if kind != "storage" or type(dtype) is not _StorageClass or type(location) is not str:
        raise ValueError("a persistent identity is no storage")
    if type(key) is not str or not _is_count(numel):
        raise ValueError("a storage has no key, or its size is no number")
    found = storages.setdefault(key, Storage(dtype.dtype, numel))
    if (found.dtype, found.numel) != (dtype.dtype, numel):
        raise ValueError(f"storage {key:.20} is announced twice, with different sizes")
    return found


def _is_count(value: Any) -> bool:
    # type() and not isinstance(): True is no count
    return type(value) is int and 0 <= value < 2**63


# What names in a pickle become: tokens without behaviour, which no opcode but the expected one accepts.


@dataclass(frozen=True)
class _Class:
    name: str


@dataclass(frozen=True)
class _StorageClass:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Function:
    name: str


@dataclass(eq=False)
class _NumpyType:
    kind: str
    order: str = "<"


class Machine:
    """The stack machine of pickles, without the opcodes and without the names that would run code.

    Args:
        file: Name of the file, for errors.
        classes: Full names of classes whose objects become records.
        storage: Finds the storage of a persistent identity; ``None`` where there are none beside the pickle.
        load_bytes: Reads what ``torch.save`` made of a storage.
    """

    def __init__(
        self,
        file: str,
        classes: Collection[str] = (),
        storage: Callable[[Any], Storage] | None = None,
        load_bytes: Callable[[bytes], Any] | None = None,
    ) -> None:
        self.file, self.classes, self.storage, self.load_bytes = file, classes, storage, load_bytes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Interpret one pickle, from where the stream is up to the pickle's end.

        Raises:
            RefusedPickleError: If it asks for what would run code.
            Exception: Any of those that broken data lead to.
        """
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self.pop()
            if name in _CONSTANTS:
                self.stack.append(argument)
            elif name in _FIXED:
                self.stack.append(_FIXED[name]())
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            else:
                raise self.refuse(f"the opcode {name}")
        raise ValueError("the pickle has no end")

    def refuse(self, what: str) -> RefusedPickleError:
        return RefusedPickleError(
            f"{self.file} asks for {what}, which reading weights does not need: nothing was run. If you trust "
            "where the file comes from, convert it in its own code to a plain state_dict"
        )

    # --- stack and memo ---

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an opcode finds nothing on the stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        place = self.marks.pop()
        items = self.stack[place:]
        del self.stack[place:]
        return items

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise self.refuse(f"a change of a {type(value).__name__} as if it were a {kind.__name__}")
        return value

    def mark(self, argument: Any) -> None:
        self.marks.append(len(self.stack))

    def discard(self, argument: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def put(self, place: Any) -> None:
        self.memo[len(self.memo) if place is None else int(place)] = self.stack[-1]

    def get(self, place: Any) -> None:
        self.stack.append(self.memo[int(place)])

    # --- containers ---

    def short_tuple(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        self.top(dict).update(self.pairs(items))

    def pairs(self, items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise ValueError("a dictionary has a key without a value")
        return dict(zip(self.keys(items[::2]), items[1::2]))

    def keys(self, keys: list[Any]) -> list[Any]:
        # a tuple of tuples that refer to one another takes for ever to hash
        if any(type(key) not in (*_PLAIN_KEYS, bool) for key in keys):
            raise self.refuse("a dictionary or set of other things than plain keys")
        return keys

    # --- names and what they are called with ---

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.refuse("a name that is no text")
        full = f"{module}.{name}"
        token: Any = None
        if "." not in name:
            if full in self.classes or module.startswith("torch.nn.modules.") or full == _EASY_DICT:
                token = _Class(full)
            elif full in _FUNCTIONS:
                token = _Function(full)
            elif module == "torch":
                token = _StorageClass(_STORAGES[name]) if name in _STORAGES else _DTYPES.get(name)
        if token is None:
            raise self.refuse(full)
        self.stack.append(token)

    def stack_name(self, argument: Any) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self, argument: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Function or type(arguments) is not tuple:
            raise self.refuse(f"a call of {getattr(function, 'name', type(function).__name__)}")
        self.stack.append(_FUNCTIONS[function.name](self, *arguments))

    def new_object(self, argument: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        if type(kind) is not _Class or arguments != ():
            raise self.refuse(f"an object of {getattr(kind, 'name', type(kind).__name__)} made of arguments")
        self.stack.append({} if kind.name == _EASY_DICT else Record(kind.name))

    def build(self, argument: Any) -> None:
        state, target = self.pop(), self.stack[-1]
        if type(target) is Record and not target.state and type(state) is dict and all(type(k) is str for k in state):
            target.state.update(state)
        elif type(target) is _NumpyType and type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "|"):
            target.order = state[1]
        elif type(target) is not dict or type(state) is not dict or set(state) != {"_metadata"}:
            # an ordered dictionary of weights has its versions as an attribute, which is dropped
            raise self.refuse(f"a {type(target).__name__} with a state of its own")

    def persistent(self, argument: Any) -> None:
        if self.storage is None:
            raise self.refuse("a persistent identity, in a pickle that has no storages beside it")
        self.stack.append(self.storage(self.pop()))

    # --- the functions, each in the place of the one that its name stands for ---

    def ordered_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        if type(pairs) not in (list, tuple) or any(type(p) not in (list, tuple) or len(p) != 2 for p in pairs):
            raise ValueError("an ordered dictionary is made of something that is no pairs")
        return self.pairs([value for pair in pairs for value in pair])

    def plain_set(self, items: Any = ()) -> set[Any]:
        if type(items) not in (list, tuple):
            raise ValueError("a set is made of something that is no list")
        return set(self.keys(list(items)))

    def stored_tensor(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        grad: Any = False,
        hooks: Any = None,
        extra: Any = None,
    ) -> StoredTensor:
        if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
            raise ValueError("a tensor is made of something that is no storage, shape and strides")
        if len(shape) != len(strides) or len(shape) > 16 or not all(map(_is_count, (offset, *shape, *strides))):
            raise ValueError("a tensor's shape, strides or offset are no sizes")
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides)) if count else 0
        if count > storage.numel or last >= max(storage.numel, 1):
            raise ValueError(f"a tensor of shape {shape} does not lie within its storage of {storage.numel}")
        return StoredTensor(storage, offset if count else 0, shape, strides)

    def parameter(self, data: Any, grad: Any = False, hooks: Any = None) -> StoredTensor:
        if type(data) is not StoredTensor:
            raise ValueError(f"a parameter is made of a {type(data).__name__}")
        return data

    def storage_from_bytes(self, data: Any) -> Storage:
        if type(data) is not bytes:
            raise ValueError(f"a storage is made of a {type(data).__name__}")
        if self.load_bytes is None:
            raise self.refuse("a storage, where none is expected")
        storage = self.load_bytes(data)
        if type(storage) is not Storage:
            raise ValueError(f"the bytes of a storage hold a {type(storage).__name__}")
        return storage

    def device(self, kind: Any, index: Any = 0) -> str:
        if type(kind) is not str:
            raise ValueError("a device has no name")
        return kind

    def numpy_type(self, kind: Any, align: Any = False, copy: Any = True) -> _NumpyType:
        if kind not in _NUMPY_KINDS:
            raise self.refuse(f"the NumPy type {kind if type(kind) is str else type(kind).__name__}")
        return _NumpyType(kind)

    def numpy_number(self, dtype: Any, data: Any) -> Any:
        if type(dtype) is not _NumpyType or type(data) is not bytes:
            raise self.refuse("a NumPy number that is none")
        values = np.frombuffer(data, np.dtype(dtype.order.replace("|", "") + dtype.kind))
        if len(values) != 1:
            raise ValueError(f"a NumPy number has {len(data)} bytes")
        return values[0].item()

    def persistent_object(self, meta: Any) -> Record:
        if type(meta) is not dict or type(meta.get("class_name")) is not str or type(meta.get("state")) is not dict:
            raise ValueError("a persistent object has no class_name or no state")
        return Record(meta["class_name"], dict(meta["state"]))


_EASY_DICT = "dnnlib.util.EasyDict"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Machine.ordered_dict,
    "builtins.set": Machine.plain_set,
    "__builtin__.set": Machine.plain_set,
    "torch._utils._rebuild_tensor": Machine.stored_tensor,
    "torch._utils._rebuild_tensor_v2": Machine.stored_tensor,
    "torch._utils._rebuild_parameter": Machine.parameter,
    "torch.storage._load_from_bytes": Machine.storage_from_bytes,
    "torch.device": Machine.device,
    "numpy.dtype": Machine.numpy_type,
    "numpy.core.multiarray.scalar": Machine.numpy_number,
    "numpy._core.multiarray.scalar": Machine.numpy_number,
    "torch_utils.persistence._reconstruct_persistent_obj": Machine.persistent_object,
}
# pickletools has decoded these already
_CONSTANTS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": Machine.mark,
    "POP": Machine.discard,
    "POP_MARK": lambda m, a: m.pop_to_mark().clear(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "MEMOIZE": Machine.put,
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "GET": Machine.get,
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, a: m.short_tuple(1),
    "TUPLE2": lambda m, a: m.short_tuple(2),
    "TUPLE3": lambda m, a: m.short_tuple(3),
    "LIST": lambda m, a: m.stack.append(m.pop_to_mark()),
    "APPEND": lambda m, a: m.append([m.pop()]),
    "APPENDS": lambda m, a: m.append(m.pop_to_mark()),
    "DICT": lambda m, a: m.stack.append(m.pairs(m.pop_to_mark())),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_to_mark()),
    "ADDITEMS": lambda m, a: _add(m, m.pop_to_mark()),
    "FROZENSET": lambda m, a: m.stack.append(frozenset(m.keys(m.pop_to_mark()))),
    "GLOBAL": lambda m, a: m.name(*a.split(" ", 1)),
    "STACK_GLOBAL": Machine.stack_name,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new_object,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
}


def _add(machine: Machine, items: list[Any]) -> None:
    machine.top(set).update(machine.keys(items))
