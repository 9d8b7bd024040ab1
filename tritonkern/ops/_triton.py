"""What the Triton kernels of several operations share.

Vectors (the last axis) start on 16 bytes and have strides that are multiples of UNIT numbers (`readable`), which lets
the hardware load them in whole. Strides are passed in UNITs, so that 32 bits reach 2**34 numbers.
"""

from __future__ import annotations

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
# What `launch` has compiled, and the values of its constants in order.
_compiled: dict[tuple, tuple[Any, list]] = {}


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, with a in the type of b. Matrix units do not take float64 on every architecture."""
    if b.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a.to(b.dtype), b, total, input_precision=PRECISION)


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


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Start the programs of a kernel; `num_warps` and `num_stages` are among the constants.

    Triton finds the compiled kernel by a description of every argument, which takes longer than all else that a small
    call does. A `kernel` depends on its constants, the types of its tensors and the device alone, so its second launch
    goes straight to what the first one returned (nothing in Triton's interpreter).
    """
    if programs >= 2**31:
        raise ValueError(f"too much work for one launch of the triton backend ({programs} programs); split the batch")
    if not programs:
        return
    tensors, names = _signatures.get(kernel.fn, (0, []))
    if not tensors:
        kernel[(programs,)](*arguments, **constants)
        return
    types = [None if x is None else x.dtype for x in arguments[:tensors]]
    key = (kernel.fn, arguments[0].device.index, *types, *constants.values())
    known = _compiled.get(key)
    if known is not None:
        known[0][programs, 1, 1](*arguments, *known[1])
        return
    compiled = kernel[(programs,)](*arguments, **constants)
    if compiled is not None:
        _compiled[key] = compiled, [constants[name] for name in names]


def readable(x: Tensor, reach: int | None = None) -> tuple[Tensor, list[int]]:
    """`[..., C]` and the strides in UNITs of all axes but the last.

    The tensor is copied, with zeros up to a multiple of UNIT channels, where channels are not adjacent, vectors do not
    start on 16 bytes, or addresses span `reach` numbers or more.
    """
    whole = x.is_contiguous() and not x.shape[-1] % UNIT.value and starts_on_16_bytes(x)
    if whole and (reach is None or x.numel() <= reach):  # almost always, and much faster
        return x, [0 if n == 1 else stride // UNIT.value for n, stride in zip(x.shape, x.stride(), strict=True)][:-1]
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    span = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    missing = -x.shape[-1] % UNIT.value
    adjacent = strides[-1] == 1 and not any(stride % UNIT.value for stride in strides[:-1])
    if missing or not adjacent or not starts_on_16_bytes(x) or (reach is not None and span >= reach):
        x = aligned(torch.nn.functional.pad(x, (0, missing))) if missing else _copy(x)
        strides = list(x.stride())
    return x, [stride // UNIT.value for stride in strides[:-1]]


def aligned(x: Tensor) -> Tensor:
    """The tensor, contiguous and starting on 16 bytes."""
    return x if x.is_contiguous() and starts_on_16_bytes(x) else _copy(x)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def starts_on_16_bytes(x: Tensor) -> bool:
    # The one place in Python that looks at an address: the offset alone does not tell where a storage of others begins.
    return x.data_ptr() % 16 == 0
