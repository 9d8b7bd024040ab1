"""Tile sizes and warps of the Triton kernels by (channels, dtype, architecture).

Estimates, not measured on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritonkern.ops._dtypes import on_amd
from tritonkern.ops._triton import block_size, precision, register_limit

# Of frame-local attention, whose result stays in registers.
MAX_HEAD_DIM = 256


class Tiles(NamedTuple):
    """Sizes of the blocks of a kernel."""

    rows: int
    others: int
    channels: int  # per step, and of a gradient per program
    num_warps: int
    num_stages: int


def tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernels."""
    if dtype == torch.float64:
        return Tiles(16, 16, 16, 8, 1)
    if dtype == torch.float32:
        return Tiles(32, 32, 16, 8, 1)
    return Tiles(64, 64, min(64, block_size(channels)), 8, 1 if on_amd() else 2)


def gradient_tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the backward kernels, which hold two results."""
    if dtype == torch.float64:
        return Tiles(16, 16, 16, 8, 1)
    rows = 16 if on_amd() else 32  # 32 spill on gfx942 with Triton 3.6
    return Tiles(rows, rows, 16 if dtype == torch.float32 else min(32, block_size(channels)), 8, 1)


def frame_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles of frame-local attention; all channels are in registers."""
    width = block_size(head_dim)
    if dtype == torch.float64:
        return Tiles(8, 8, width, 8, 1)
    if dtype == torch.float32:
        return Tiles(16, 16, width, 4, 1)
    return Tiles(64, 32, width, 4 if width <= 64 else 8, 1)


def constants(tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    """Launch options of every kernel, and how it multiplies inputs: 16 bits as they are."""
    given = dict(PRECISION=precision(dtype) if dtype == torch.float32 else "ieee")
    return given | dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages, **register_limit())
