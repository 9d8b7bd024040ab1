"""Tile sizes and warps of the Triton kernels by (head dim, dtype, architecture), with where each number came from.

Estimates: no GPU has run these kernels. Ahead-of-time compilation (tests/test_track_attention_triton.py, Triton 3.9)
shows that nothing spills in the tiles compiled there: 16 and 32 bits on the four targets for most head dims, and sm_80
in float64. `make aot` compiles every one.

Estimates for 37 x 37 cells, 576 tracks, D = 64, sigma = 1/2 in bfloat16, where a pair matters up to about 3.5 cells: a
tile of 8 x 8 cells matters to 15 x 15 of them. A block of 32 tracks covers about 9 x 9 cells and needs 3 x 3 tiles of
the 25; one of 64 met 4 x 3. The cost of a block falls with its size, so 32 is about even, and needs half the registers.
On sm_90 forward takes up to 155 registers and 24 KiB of shared memory, backward up to 220 and 28 KiB: three programs of
128 threads on a multiprocessor, and two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonkern.ops._dtypes import on_amd, tf32_allowed
from tritonkern.ops._triton import block_size

# Tracks are sorted so that about this many neighbours in the order make a square; see `track_attention_kernel_order`.
GROUP = 32


class Tiles(NamedTuple):
    """How the kernels cut their work; rows are blocks of tracks and columns of cells, or the other way round."""

    tracks: int
    cells: int
    block_c: int  # channels of a product at a time; all of them where tiles are held
    num_warps: int
    num_stages: int
    precision: str = "ieee"  # of products, where the inputs are float32


def forward_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernel."""
    width = block_size(head_dim)
    if dtype == torch.float64:
        return _double(width)
    if dtype == torch.float32 and not tf32_allowed():
        return Tiles(16, 16, 16, 4 if width <= 128 else 8, 1)
    wide = width * dtype.itemsize
    if wide <= 128:
        return Tiles(32, 64, width, 4, 2, "tf32")
    if wide <= 256:
        return Tiles(32, 32, width, 4, 2, "tf32")
    if wide <= 512 and not on_amd():
        return Tiles(32, 32, width, 8, 1, "tf32")
    return Tiles(16, 16, min(128, width), 4, 1, "tf32")


def backward_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles of both backward kernels, which compute the same pairs of blocks."""
    width = block_size(head_dim)
    if dtype == torch.float64:
        return _double(width)
    # TF32 spilled with the widest heads in every tile that was tried, and exact float32 on sm_100 with products of 16
    # channels (heads of 144) and of 32 (heads of 192). Up to 64 channels, tiles held whole take half the registers.
    if dtype == torch.float32 and (width > 128 or not tf32_allowed()):
        return Tiles(16, 16, min(64, width), 4 if width <= 64 else 8, 1)
    wide = width * dtype.itemsize
    if wide <= 128:
        return Tiles(32, 64, width, 4, 1, "tf32")
    if wide <= 256:
        return Tiles(32, 32, width, 4, 1, "tf32")
    # Four warps spilled 16 bytes on sm_100.
    return Tiles(16, 16, width, 4 if on_amd() else 8, 1, "tf32")


def _double(width: int) -> Tiles:
    # Not every matrix unit has float64, so a product is a tile of rows x columns x channels: 8 numbers a thread.
    tracks = 8 if width <= 16 else 4 if width <= 128 else 2
    return Tiles(tracks, max(4, 1024 // width // tracks), width, 4 if width <= 64 else 8, 1)


def tile_width(cells: int) -> int:
    """Columns of the grid in a block of cells: as many as rows, or twice as many."""
    return 1 << ((cells.bit_length()) // 2)
