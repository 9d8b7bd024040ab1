"""The types that operations take and compute in, and the precision settings of PyTorch that they follow."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and of what is saved for the backward pass: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accurate(x: Tensor) -> Tensor:
    """`x` in the type of its sums."""
    return x.to(accumulator(x.dtype))


def full_precision(function: Callable) -> Callable:
    """Without the autocast of a caller, which is still on inside an operator and would round its matrix products."""

    @functools.wraps(function)
    def run(*arguments):
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def adjacent_channels(x: Tensor) -> Tensor:
    """`x`, copied unless the numbers along its last axis are adjacent in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_amd() -> bool:
    """Whether this PyTorch is built for ROCm."""
    return torch.version.hip is not None


def tf32_allowed() -> bool:
    """Whether the user lets float32 products be rounded to TF32: PyTorch's setting, off by default."""
    if on_amd():
        return False
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on; there the older flag raises once the newer one has been set.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
