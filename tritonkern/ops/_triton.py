"""What the Triton kernels of several operations share.

Vectors (the last axis) start on 16 bytes and have strides that are multiples of UNIT numbers (`readable`), which lets
the hardware load them in whole. Strides are passed in UNITs, so that 32 bits reach 2**34 numbers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._dtypes import on_amd, tf32_allowed

UNIT = tl.constexpr(8)


def kernel(function: Callable) -> Any:
    """`triton.jit` of a kernel that is compiled again for no argument but its constants (``tl.constexpr``).

    Left to itself Triton compiles again whenever an argument becomes 1 or a multiple of 16, and on AMD when a tensor
    passes 2 GiB; there its addressing of smaller ones also takes more scalar registers. This is also why strides are
    arguments of their own and not tuples, which would be shorter: Triton 3.9 specialises every number inside a tuple,
    whatever `do_not_specialize` says, and so compiles for every shape.
    """
    parameters = inspect.signature(function).parameters.values()
    changing = [p.name for p in parameters if p.annotation not in (tl.constexpr, "tl.constexpr")]
    constants = [p.name for p in parameters][len(changing) :]
    if set(changing) & set(constants):
        raise TypeError(f"{function.__name__} must have its constants last")
    tensors = sum(p.annotation is inspect.Parameter.empty for p in parameters)
    _signatures[function] = tensors, constants
    return triton.jit(function, do_not_specialize=changing)


# Of every `kernel`: how many of its first arguments are tensors (or None), and the names of its constants.
_signatures: dict[Callable, tuple[int, list[str]]] = {}
# What Triton has compiled, by kernel, device, types of the tensors, and constants.
_compiled: dict[tuple, Any] = {}


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, with a in the type of b. Matrix units do not take float64 on every architecture."""
    if b.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a.to(b.dtype), b, total, input_precision=PRECISION)


@triton.jit
def whole_vectors(rows, column, LENGTH: tl.constexpr):
    """Addresses `[rows, columns]`; rows begin any number of times LENGTH numbers after 16 bytes.

    This lets the hardware move several numbers at a time, if LENGTH does. Triton keeps `multiple_of` on the result of
    an operation alone, not on what a function is given.
    """
    BYTES: tl.constexpr = LENGTH * (rows.dtype.element_ty.primitive_bitwidth // 8)
    if BYTES % 16 == 0:
        return tl.multiple_of(rows[:, None] + column[None, :], (1, 16))
    elif BYTES % 8 == 0:
        return tl.multiple_of(rows[:, None] + column[None, :], (1, 8))
    elif BYTES % 4 == 0:
        return tl.multiple_of(rows[:, None] + column[None, :], (1, 4))
    else:
        return rows[:, None] + column[None, :]


def block_size(count: int, least: int = 16) -> int:
    """The smallest power of two from `count` and `least` up; matrix units take no fewer than 16 rows or columns."""
    return max(least, 1 << (count - 1).bit_length())


def register_limit() -> dict[str, int]:
    """Launch options on NVIDIA: ptxas spills some bytes to fit one more program unless it has a limit."""
    return {} if on_amd() else {"maxnreg": 255}


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied where the inputs are `dtype`. TF32 holds every float16 and bfloat16."""
    half = dtype.itemsize == 2
    return "tf32" if (half or tf32_allowed()) and not on_amd() else "ieee"


class Launch:
    """A `kernel` and all that it is given but tensors; `num_warps` and `num_stages` are among the constants.

    A launcher keeps these by shapes, strides, dtypes and options (`functools.lru_cache`), so that another call like one
    before makes tensors and passes them on, and nothing else. Triton finds a compiled kernel by a description of every
    argument, which takes longer than all else that a small call does. A `kernel` depends on its constants, the types
    of its tensors and the device alone, so the second launch goes straight to what the first one returned (nothing in
    Triton's interpreter).
    """

    def __init__(self, kernel: Any, programs: int, *numbers: Any, **constants: Any) -> None:
        if programs >= 2**31:
            raise ValueError(
                f"too much work for one launch of the triton backend ({programs} programs); split the batch"
            )
        self._kernel, self._programs, self._numbers, self._constants = kernel, programs, numbers, constants
        self._others = (*numbers, *(constants[name] for name in _signatures[kernel.fn][1]))
        self._on_device: dict[int | None, Callable] = {}

    def __call__(self, *tensors: Any) -> None:
        """Start the programs. Tensors of other types, or None in another place, need a `Launch` of their own."""
        device = tensors[0].device.index
        if device in self._on_device:
            self._on_device[device](*tensors, *self._others)
        elif self._programs:
            types = [None if x is None else x.dtype for x in tensors]
            key = (self._kernel.fn, device, *types, *self._constants.items())
            if key in _compiled:
                self._on_device[device] = _compiled[key][self._programs, 1, 1]
                self._on_device[device](*tensors, *self._others)
                return
            compiled = self._kernel[(self._programs,)](*tensors, *self._numbers, **self._constants)
            if compiled is not None:
                _compiled[key] = compiled
                self._on_device[device] = compiled[self._programs, 1, 1]


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Start the programs of a kernel once, without keeping the `Launch`."""
    count, _ = _signatures[kernel.fn]
    Launch(kernel, programs, *arguments[count:], **constants)(*arguments[:count])


def readable(x: Tensor, reach: int | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """`[..., C]` and the strides in UNITs of all axes but the last.

    The tensor is copied, with zeros up to a multiple of UNIT channels, where channels are not adjacent, vectors do not
    start on 16 bytes, or addresses span `reach` numbers or more.
    """
    strides = _unit_strides(x.shape, x.stride(), reach)
    if strides is None or not starts_on_16_bytes(x):
        missing = -x.shape[-1] % UNIT.value
        x = aligned(torch.nn.functional.pad(x, (0, missing))) if missing else _copy(x)
        strides = _unit_strides(x.shape, x.stride(), None)
        assert strides is not None
    return x, strides


@functools.lru_cache(maxsize=1024)
def _unit_strides(shape: torch.Size, strides: tuple[int, ...], reach: int | None) -> tuple[int, ...] | None:
    """What `readable` returns, or None where the tensor must be copied wherever it starts."""
    strides = tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    adjacent = strides[-1] == 1 and not any(stride % UNIT.value for stride in strides[:-1])
    if shape[-1] % UNIT.value or not adjacent or (reach is not None and span >= reach):
        return None
    return tuple(stride // UNIT.value for stride in strides[:-1])


def aligned(x: Tensor) -> Tensor:
    """The tensor, contiguous and starting on 16 bytes."""
    return x if x.is_contiguous() and starts_on_16_bytes(x) else _copy(x)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def starts_on_16_bytes(x: Tensor) -> bool:
    # The one place in Python that reads an address: the offset does not say where the storage of others begins.
    return x.data_ptr() % 16 == 0
