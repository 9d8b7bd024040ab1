"""Rows and warps of the Triton kernels by channels and dtype.

Estimate, not measured: no GPU was at hand. Known from ahead-of-time compilation (tests/test_residual_norm_triton.py) is
that nothing spills on sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What a program holds at a time: `rows` whole rows of `block` channels, C rounded up to a power of two."""

    block: int
    rows: int
    num_warps: int


def forward_tile(channels: int, dtype: torch.dtype) -> Tile:
    """`dtype` is that of the residual stream."""
    return _tile(channels, 2048 if dtype != torch.float64 else 1024)


def backward_tile(channels: int, dtype: torch.dtype) -> Tile:
    """Half the forward's: three tensors come in and up to two go out."""
    return _tile(channels, 1024 if dtype != torch.float64 else 512)


def _tile(channels: int, numbers: int) -> Tile:
    """`numbers` of a tile for four warps; a row that is longer gets more warps, up to sixteen."""
    block = 1 << max(4, (channels - 1).bit_length())
    return Tile(block, max(1, numbers // block), min(16, max(4, 4 * block // numbers)))


# Programs of a backward pass that sums the parameters' gradients: enough for every GPU, few enough that their partial
# sums are nothing beside the rows. By the data alone, so that every GPU gives the same bits.
PARTIALS = 512
