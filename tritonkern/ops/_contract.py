"""What the operators of all rooms ask of their tensors, and the types that they compute in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPP_DTYPES = {dtype: number for number, dtype in enumerate(DTYPES)}
"""Their numbers in csrc/common/tensor.h."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and of what is kept beside results: float32, and float64 for float64."""
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
    """`x`, copied unless the numbers along its last axis lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_amd() -> bool:
    """Whether this PyTorch is built for ROCm."""
    return torch.version.hip is not None


def tf32_allowed() -> bool:
    """Whether the user lets float32 products be rounded to TF32: PyTorch's setting, off unless asked for."""
    if on_amd():
        return False
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on; there the older flag raises once the newer one has been set.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a strided floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}; call .to_dense() on it")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}; convert it first")


def check_saved(expected: dict[str, tuple[Tensor | None, Sequence[int], torch.dtype]], device: torch.device) -> None:
    """Raise ValueError unless what is handed to a backward operator is what belongs to the forward one."""
    for name, (x, shape, dtype) in expected.items():
        if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device):
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(shape)} on {device}, "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}; pass what the forward operator returned"
            )
