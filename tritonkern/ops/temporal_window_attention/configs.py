"""Tile sizes and warps of the Triton kernels by (head dim, window, dtype, architecture), and what they cannot run."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# 32-bit offsets in units of 8 numbers reach this far: 32 GiB of bfloat16.
MAX_ELEMENTS = 2**34
MAX_FRAMES = 2**29
# A window of more frames than this is worth larger tiles.
NARROW = 64


class Tiles(NamedTuple):
    """How a kernel cuts its work. A program owns `block_rows` rows and meets `block_others` rows at a time."""

    tensor_cores: bool
    block_rows: int
    block_others: int
    rows: int  # rows at a time where rows meet one frame distance after the other
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """Head dim rounded up to a power of two that a matrix unit takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward_tiles(head_dim: int, window: int, dtype: torch.dtype, tf32: bool = False) -> Tiles:
    width = block_d(head_dim)
    if not _tensor_cores(dtype, tf32):
        return _by_distance(width, dtype)
    return Tiles(True, 64, 32, 1024 // width, 4 if width <= 64 else 8, 2)


def backward_tiles(head_dim: int, window: int, dtype: torch.dtype, tf32: bool = False) -> Tiles:
    width = block_d(head_dim)
    if not _tensor_cores(dtype, tf32):
        return _by_distance(width, dtype)
    return Tiles(True, 64, 32, 1024 // width, 4 if width <= 64 else 8, 1)


def _by_distance(width: int, dtype: torch.dtype) -> Tiles:
    rows = (512 if dtype == torch.float64 else 1024) // width
    return Tiles(False, rows, 16, rows, 4, 1)


def _tensor_cores(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and tf32)


def tf32_allowed() -> bool:
    """Whether the user lets float32 products be rounded to TF32 (PyTorch's setting; off unless asked for)."""
    matmul = torch.backends.cuda.matmul
    if torch.version.hip is not None:
        return False
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
