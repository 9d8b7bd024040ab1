"""Where the results of the C++ kernels lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import deterministic

from tritonkern import _cpp

_LARGE = 1 << 20
"""Bytes. What is smaller malloc mostly keeps by itself."""


def new_result(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """As ``like.new_empty(shape, dtype=dtype)``, but large memory is kept for the next result (kept_memory.h)."""
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    storage = torch.frombuffer(_cpp.KeptMemory(size), dtype=torch.uint8).untyped_storage()
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    result = like.new_empty(0, dtype=dtype).set_(storage, 0, shape, strides)
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        result.fill_(math.nan)
    return result
