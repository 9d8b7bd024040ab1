"""What the functions ask of numbers and autocast."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from tritonkern.ops.temporal_window_attention import op as _window_op

_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def real(name: str, x: float) -> float:
    """A number as Python's own, those of NumPy included."""
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}; use .item() on a tensor")
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, got an integer of {int(x).bit_length()} bits") from None


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The rule PyTorch's own attention follows: everything but float64 goes to the dtype of an active autocast."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST_FROM else x for x in tensors)


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
        ValueError: an even or non-positive total, or a negative count.
    """
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1 or window % 2 == 0:
            raise ValueError(
                f"window must be an odd number of frames, such as 13 for six on each side, got {window}; "
                "use window=(left, right) for sides that differ"
            )
        left = right = window // 2
    elif isinstance(window, (tuple, list)) and [type(count) for count in window] == [int, int]:
        left, right = window
    else:
        raise TypeError(f"window must be an odd int or a pair of ints (left, right), got {window!r}")
    _window_op.check_window(left, right)
    return left, right
