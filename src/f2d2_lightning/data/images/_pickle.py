"""Pickles of dictionaries of numbers, strings and arrays, read without running what else a pickle may hold.

A pickle is a program (https://docs.python.org/3/library/pickle.html warns of it), and data sets of the years of
Python 2 come as pickles. Here the few names that such files call, numpy's way to make an array, stand for records that
only keep what they are given; any other name is refused before anything is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

__all__ = ["read_pickle"]

INTEGERS = {"u1": np.uint8, "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64}
FLOATS = {"f4": np.float32, "f8": np.float64}
TYPES: dict[str, Any] = {**INTEGERS, **FLOATS}
"""Array elements that are read, by numpy's name."""


def read_pickle(file: BinaryIO, name: str, origin: str) -> dict[str, Any]:
    """The dictionary in a pickle of any protocol, of Python 2 or 3: its keys as text, strings in it as bytes or text.

    Args:
        file: Open for reading.
        name: Of the file, for errors.
        origin: Where to get it again, for errors.

    Raises:
        ValueError: If the pickle is truncated or corrupt, no dictionary, or names anything but arrays; nothing that it
            names is called.
    """
    again = f"get it again from {origin}"
    reader = _Reader(file)
    try:
        found = reader.load()
        if file.read(1):
            raise ValueError("bytes follow its end")
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        plain = {_text(key): value.array() if hasattr(value, "array") else value for key, value in found.items()}
    except Exception as error:
        if reader.refused is not None:
            raise ValueError(
                f"{name} names {reader.refused}, and such a file holds arrays, numbers and strings alone; it may be "
                f"meant to run a program, and nothing of it was run: {again}"
            ) from error
        raise ValueError(
            f"{name} is no pickle of a dictionary of arrays, or is truncated or corrupt "
            f"({type(error).__name__}: {' '.join(str(error).split())}); {again}"
        ) from error
    return plain


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


class _Reader(pickle.Unpickler):
    """Knows numpy's names for arrays and nothing else."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")
        self.known = _stand_ins()
        self.refused: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        wanted = self.known.get((module.replace("numpy._core", "numpy.core"), name))
        if wanted is None:
            self.refused = f"{module}.{name}"
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return wanted


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """Records for one reading: a pickle can set attributes of what it is given, classes included."""

    class Type:
        def __init__(self, name: Any, *_: Any) -> None:
            self.name, self.order = _text(name), "|"

        def __setstate__(self, state: Any) -> None:
            self.order = _text(state[1])

        def dtype(self) -> np.dtype:
            if self.name not in TYPES:
                raise ValueError(f"an array has type {self.name}; {', '.join(TYPES)} are expected")
            return np.dtype(TYPES[self.name]).newbyteorder("=" if self.order == "|" else self.order)

    class Array:
        state: Any = None

        def __init__(self, *_: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            self.state = state

        def array(self) -> np.ndarray:
            _, shape, kind, fortran, content = self.state
            flat = np.frombuffer(content, kind.dtype())
            return flat.reshape(shape, order="F" if fortran else "C")

    def encoded(text: Any, _: Any) -> bytes:
        return text.encode("latin1")

    return {
        ("numpy.core.multiarray", "_reconstruct"): Array,
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Type,
        # how Python 3 writes bytes for Python 2
        ("_codecs", "encode"): encoded,
    }
