"""Checks of tensors that several operators share. They raise TypeError or ValueError that names the argument.

Arguments that are None are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonkern.ops._dtypes import DTYPES, accumulator


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a strided floating-point tensor."""
    check_strided(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}; convert it first")


def check_strided(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a strided tensor, of any dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense (strided) tensor, got a nested one; pad it with .to_padded_tensor()")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}; call .to_dense() on it")


def check_mask(name: str, x: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raise TypeError or ValueError unless `x` is a strided bool tensor of this shape on this device."""
    check_strided(name, x)
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {x.dtype}; compare probabilities with a threshold first")
    if tuple(x.shape) != tuple(shape) or x.device != device:
        raise ValueError(f"{name} must have shape {tuple(shape)} on {device}, got {tuple(x.shape)} on {x.device}")


def check_scale(scale: float, exponent: int = 64) -> None:
    """Raise ValueError unless |scale| is at most 2^exponent; larger than 2^64, scores of usual size overflow."""
    if not abs(scale) <= 2.0**exponent:
        raise ValueError(f"scale must be from -2**{exponent} to 2**{exponent}, got {scale}")


def check_eps(eps: float, dtype: torch.dtype) -> None:
    """Raise ValueError unless `eps` is a normal number in the dtype of sums of `dtype`.

    A smaller one is zero in the kernels, and equal numbers, whose variance is zero, then give NaN.
    """
    least = torch.finfo(accumulator(dtype)).tiny
    if not eps >= least:
        raise ValueError(f"eps must be a positive number, at least {least:.4g}, got {eps}")


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise unless all are strided floating-point tensors, on the device of the first one."""
    first = device = None
    for name, x in tensors.items():
        if x is None:
            continue
        if x.is_nested or x.layout != torch.strided or x.dtype not in DTYPES:
            check_dense(name, x)
        if device is None:
            first, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{name} must be on the device of {first}, {device}, got {x.device}; move one of them")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Raise TypeError unless all have the dtype of the first one."""
    (first, reference), *others = tensors.items()
    assert reference is not None
    for name, x in others:
        if x is not None and x.dtype != reference.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {reference.dtype}, got {x.dtype}; convert one")


def check_flags(needs_grad: list[bool], count: int) -> None:
    """Raise ValueError unless there are `count` flags."""
    if len(needs_grad) != count:
        raise ValueError(f"needs_grad must have {count} flags, got {needs_grad}")


def check_saved(expected: dict[str, tuple[Tensor | None, Sequence[int], torch.dtype]], device: torch.device) -> None:
    """Raise ValueError unless what a backward operator gets is what belongs to the forward one."""
    for name, (x, shape, dtype) in expected.items():
        if x is None:
            continue
        check_strided(name, x)
        if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(shape)} on {device}, "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}; pass what the forward operator returned"
            )
