"""Tile sizes and warps of the Triton kernels by (C, dtype, architecture), with where each number came from.

Estimates, not measured on a GPU. Ahead-of-time compilation (tests/test_triton_aot.py, Triton 3.9) shows that nothing
spills on sm_80, sm_90, sm_100 and gfx942; larger tiles did.

Estimates for N = 1024, C = 768, T = 24, 64 x 64 cells in bfloat16: the statistics are 155 GFLOP; tiles of 128 x 128
read a byte of the L2 cache every 64 FLOP, 5.5 TB/s at 350 TFLOP/s. They take 230 registers on sm_90, so one program
fits on a multiprocessor, and its reductions, about a fifth of the time of its products, are not hidden; 128 x 256
spilled.
Sixteen neighbours in the order of the queries cover about 600 cells in tiles of 8 x 8, so the points add a seventh of
the products. Backward has such products three times, two of them in two parts: more than a fifth of forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonkern.ops._dtypes import on_amd, tf32_allowed
from tritonkern.ops._triton import block_size

# Rows of cells in a band of the order of the queries, see triton_discs.py. A tile of 8 rows and its reach of 4 rows on
# both sides are then exactly four bands.
BAND = 4
# A frame's cells are cut into runs until the statistics have about this many programs: eight waves of two programs on
# each of the 132 multiprocessors of an H200, so that the last wave costs little.
PROGRAMS = 2048
# Frames per launch of the backward pass: their gradients of costs in discs are at most this many numbers (256 MiB).
MAX_PATCHES = 2**26
# Sixteen rows of 64 cells of a cost volume per step; a disc of the usual radius fits into one tile.
SOFT_ARGMAX_TILES = {"TILE_H": 16, "TILE_W": 64}
DISC_TILES = {"DISC_H": 16, "DISC_W": 16}


class Tiles(NamedTuple):
    """Sizes of the blocks of a kernel."""

    block_n: int  # queries
    tile_h: int  # cells; the statistics take tile_h * tile_w cells in a row
    tile_w: int
    block_c: int  # channels per step
    num_warps: int
    num_stages: int


def statistics_tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel that reads every cell."""
    if dtype == torch.float64:
        return Tiles(16, 4, 4, 16, 4, 1)
    if dtype == torch.float32 and not tf32_allowed():
        return Tiles(64, 8, 8, 16, 8, 1 if on_amd() else 2)
    if dtype == torch.float32:
        return Tiles(64, 8, 16, min(32, block_size(channels)), 8, 3)
    return Tiles(128, 8, 16, min(64, block_size(channels)), 8, 2 if on_amd() else 3)


def points_tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel that computes the points: cells are the long side of its products."""
    if dtype == torch.float64:
        return Tiles(16, 4, 4, 16, 4, 1)
    if dtype == torch.float32 and not tf32_allowed():
        return Tiles(16, 8, 8, 16, 4, 1)
    return Tiles(16, 8, 8, min(64, block_size(channels)), 4, 2 if on_amd() else 3)


def query_gradient_tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel that computes the gradients of costs and queries."""
    if dtype == torch.float64:
        return Tiles(16, 4, 4, 16, 4, 1)
    if dtype == torch.float32 and not tf32_allowed():
        return Tiles(16, 8, 8, 16, 4, 1)
    return Tiles(16, 8, 8, min(64, block_size(channels)), 4 if on_amd() else 8, 1 if on_amd() else 2)


def features_gradient_tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel that computes the gradient of the features."""
    if dtype == torch.float64:
        return Tiles(16, 4, 4, 16, 4, 1)
    if dtype == torch.float32 and not tf32_allowed():
        return Tiles(16, 8, 8, 16, 4, 1)
    return Tiles(32, 8, 8, min(64, block_size(channels)), 4, 1)
