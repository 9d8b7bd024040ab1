"""Unpickling of NumPy arrays and built-in containers, and of nothing else.

A pickle is a program: `pickle.load` runs whatever function the file names. TAP-Vid is published as pickles, so they are
read here with an unpickler that knows the few names an array needs, each answered by a stand-in that can only build
plain arrays. NumPy's own constructors are not handed out: `numpy.ndarray(shape, object, buffer)` makes bytes pointers.

The unpickler is the standard library's version in Python. The one in C stores memo entries in an array as long as the
largest index that the file names, so ten bytes can take gigabytes; here the memo is a dictionary. It also makes it
possible to leave out opcodes: sets, and dictionary keys other than text and numbers, can take exponential time to hash.
"""

from __future__ import annotations

import pickle
import struct
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
        if not isinstance(code, (str, bytes)):
            raise pickle.UnpicklingError(f"a dtype of {type(code).__name__} is refused")
        self.dtype = np.dtype(code.decode() if isinstance(code, bytes) else code)
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
        # New contents free the memory of the old ones, whoever else refers to it.
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


_PythonUnpickler: Any = pickle._Unpickler

# Sets, objects made without `_ALLOWED`, persistent ids and the registry of extensions.
_REFUSED_OPCODES = (
    pickle.EMPTY_SET,
    pickle.FROZENSET,
    pickle.ADDITEMS,
    pickle.INST,
    pickle.OBJ,
    pickle.NEWOBJ,
    pickle.NEWOBJ_EX,
    pickle.PERSID,
    pickle.BINPERSID,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
)


class _ArrayUnpickler(_PythonUnpickler):
    dispatch: dict[int, Any] = {
        opcode: method
        for opcode, method in _PythonUnpickler.dispatch.items()
        if opcode not in b"".join(_REFUSED_OPCODES)
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; as a pickle can run any code, only arrays and containers are read"
            ) from None

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_dict()

    dispatch[pickle.DICT[0]] = load_dict

    def load_build(self) -> None:
        # Anything else on the stack is a function or class of this module, whose attributes are not the file's to set.
        if not isinstance(self.stack[-2], (_Array, _DType)):
            raise pickle.UnpicklingError(f"the state of a {type(self.stack[-2]).__name__} is refused")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        # `bytearray(length)`, as the standard library has it, would fill the memory before it finds the file too short.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _check_key(key: Any) -> None:
    if not isinstance(key, (str, bytes, int, float)):
        raise pickle.UnpicklingError(f"a dictionary key of {type(key).__name__} is refused")
