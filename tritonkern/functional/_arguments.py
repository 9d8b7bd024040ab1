"""Checks and conversions of arguments that operators cannot do: their schemas refuse other types in unclear words."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from tritonkern.ops._checks import check_dense

_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def check_types(backend: str | None, **tensors: Tensor) -> None:
    """Raise TypeError unless `backend` is a string or None, and the others are tensors with a shape."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.is_nested:
            check_dense(name, x)


def real(name: str, x: float) -> float:
    """A number as Python's own, those of NumPy included."""
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}; use .item() on a tensor")
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, got an integer of {int(x).bit_length()} bits") from None


def integer(name: str, x: int) -> int:
    """An int, the symbolic ones of a graph included."""
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    return x


def softmax_scale(scale: float | None, query: Tensor) -> float:
    """``D ** -0.5`` if None. The operator refuses a missing axis, and a head dimension of 0."""
    return max(query.shape[-1:].numel(), 1) ** -0.5 if scale is None else real("scale", scale)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The rule of PyTorch's own attention: all tensors but those of float64 go to the dtype of an active autocast."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.dtype in _AUTOCAST_FROM else x for x in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer would cast x to."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def window_extent(window: int | tuple[int, int]) -> tuple[int, int]:
    """Frames seen before and after a query, both inclusive: 13 -> (6, 6), (6, 0) -> (6, 0).

    Raises:
        TypeError: neither an int nor a pair of ints.
        ValueError: an even or non-positive total. The operator checks the range of the counts.
    """
    if isinstance(window, tuple | list) and len(window) == 2 and type(window[0]) is type(window[1]) is int:
        return window[0], window[1]
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an odd int or a pair of ints (left, right), got {window!r}")
    if window < 1 or window % 2 == 0:
        raise ValueError(
            f"window must be an odd number of frames, such as 13 for six on each side, got {window}; "
            "use window=(left, right) for sides that differ"
        )
    return window // 2, window // 2
