"""Unpickling of NumPy arrays and built-in containers, and of nothing else.

A pickle is a program: `pickle.load` runs whatever function the file names. TAP-Vid is published as pickles, so they are
read here with an unpickler that knows the few names an array needs, each answered by a stand-in that can only build
plain arrays. NumPy's own constructors are not handed out: `numpy.ndarray(shape, object, buffer)` makes bytes pointers.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def load_arrays(path: Path) -> Any:
    """Reads a pickle of NumPy arrays, NumPy scalars, built-in containers, strings and numbers (protocols 0 to 5).

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is no pickle, is cut short, or asks for anything else; the message names the file.
    """
    with open(path, "rb") as file:
        try:
            return _ArrayUnpickler(file).load()
        # Damaged bytes make the unpickler fail with nearly any exception class (IndexError, KeyError, struct errors).
        except Exception as error:
            raise ValueError(f"{path}: not a readable pickle of arrays: {error or type(error).__name__}") from error


class _DType:
    """Stands in for `numpy.dtype`: plain numbers, bytes and lists of objects, no records and no views."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufSO":
            raise pickle.UnpicklingError(f"dtype {code!r} is refused")

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        if byte_order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Array(np.ndarray):
    """An empty array that takes its contents from the pickle, once; NumPy checks that they fit shape and dtype."""

    _filled = False

    def __setstate__(self, state: tuple) -> None:
        # New contents free the memory of the old ones, whoever else may look at it.
        if self._filled:
            raise pickle.UnpicklingError("an array is filled twice")
        self._filled = True
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, data))


def _reconstruct(kind: str, shape: tuple, code: bytes) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _frombuffer(data: bytes | bytearray, dtype: _DType, shape: tuple, order: Any) -> np.ndarray:
    return np.frombuffer(_plain_bytes(data), dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: _DType, data: bytes) -> np.generic:
    return np.frombuffer(_plain_bytes(data), dtype.dtype)[0]


def _plain_bytes(data: Any) -> bytes:
    # Any other buffer may be an array of the same pickle: one of objects, seen as numbers, is its pointers.
    if type(data) not in (bytes, bytearray):
        raise pickle.UnpicklingError(f"the contents of an array must be bytes, got {type(data).__name__}")
    return bytes(data)


def _encode(text: str, encoding: str) -> bytes:
    # Protocols 0 to 2 have no bytes of their own and spell them as latin1 text.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is refused")
    return text.encode("latin1")


_ALLOWED = {
    # A plain string: were it a class, the pickle could call it.
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _DType,
    # NumPy 2 renamed numpy.core to numpy._core; files hold the name of the NumPy that wrote them.
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; as a pickle can run any code, only arrays and containers are read"
            ) from None
