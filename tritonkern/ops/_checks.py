"""Checks of tensors that several operators share. They raise TypeError or ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonkern.ops._dtypes import DTYPES


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a strided floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense (strided) tensor, got a nested one; pad it with .to_padded_tensor()")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}; call .to_dense() on it")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}; convert it first")


def check_saved(expected: dict[str, tuple[Tensor | None, Sequence[int], torch.dtype]], device: torch.device) -> None:
    """Raise ValueError unless what a backward operator gets is what belongs to the forward one."""
    for name, (x, shape, dtype) in expected.items():
        if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device):
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(shape)} on {device}, "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}; pass what the forward operator returned"
            )
