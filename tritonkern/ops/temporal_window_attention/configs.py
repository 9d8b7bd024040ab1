"""Tile sizes and warps of the Triton kernels by (head dim, window, dtype, architecture), and their limits.

Estimated, not measured on a GPU. Known from ahead-of-time compilation (tests/test_triton_aot.py, Triton 3.9)
is that nothing spills on sm_80, sm_90, sm_100 and gfx942. The tiles are the largest of those tried that do not spill,
but narrow windows take 32 rows of key and value at a time: 64 + 12 rows then cost 96 columns of scores, not 128.

Estimates for query `[B * N = 4096, T = 64, H = 8, D = 64]` in bfloat16, which is 2.1 million rows of 128 bytes:
forward reads 3 and writes 1 tensor and 4 bytes of log-sum-exp a row, 1.08 GB, 0.23 ms at 4.8 TB/s; backward reads 5 and
writes 3, 2.16 GB, 0.45 ms. Tiles of 64 rows coincide with clips of 64 frames, so there is no halo. Other lengths read
up to 12 rows of key and value more for every 64, from L2 where a neighbour has just brought them. On sm_90 the forward
kernel takes 94 registers and 24 KiB of shared memory, five programs on a multiprocessor with up to 24 KiB under way
each; 4.8 TB/s and a latency of 800 ns ask for 29 KiB in all. The backward kernel takes 128 registers,
four programs; with 32 other rows at a time it took 160 to 175, two or three.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from tritonkern.ops._dtypes import on_amd, tf32_allowed
from tritonkern.ops._triton import block_size

# 32-bit offsets in units of 8 numbers reach this far: 32 GiB of bfloat16.
MAX_ELEMENTS = 2**34
# Row numbers count from the start of a clip and go a window and a tile beyond it.
MAX_FRAMES = 2**29
NARROW = 64  # frames
# From so many query frames on, tiles are used where keys have other frames than queries. A tile of shorter clips has
# many sequences, and the mask removes nearly all products of its rows with what they share windows with. Estimated.
TILE_FRAMES = 16
# Whether forward uses the kernel of triton_tma.py where it can; off until a GPU has timed both. Triton 3.9 compiles it
# without spills for sm_90, sm_100 and sm_120 (147 to 232 registers); Triton 3.6 fails inside its passes. Its tiles have
# TMA_FRAMES rows, and see TMA_HALO frames on each side of them.
DESCRIPTORS = False
TMA_FRAMES, TMA_HALO = 64, 32


class Tiles(NamedTuple):
    """How a kernel cuts its work: a program owns `block_rows` rows."""

    tensor_cores: bool
    block_rows: int
    block_others: int  # rows of the other side per step, on tensor cores
    rows: int  # rows at a time without them
    num_warps: int
    num_stages: int


# Widest head: (block_rows, block_others, num_warps, num_stages)
_FORWARD = {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (64, 16, 8, 2)}
_FORWARD_WIDE_WINDOW = {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (64, 16, 8, 2)}
_FORWARD_TF32 = {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)}
_BACKWARD = {64: (64, 16, 4, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)}
_BACKWARD_SM120 = {**_BACKWARD, 64: (64, 32, 4, 1)}  # 16 other rows at a time spilled 16 bytes in Triton 3.9
_BACKWARD_AMD = {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 8, 1)}
_BACKWARD_TF32 = {32: (32, 32, 4, 1), 64: (32, 16, 4, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)}


def forward_tiles(head_dim: int, window: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernel; `window` in frames."""
    return _choose(_FORWARD if window <= NARROW else _FORWARD_WIDE_WINDOW, _FORWARD_TF32, head_dim, dtype)


def backward_tiles(head_dim: int, window: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the backward kernel, which are the same for every window."""
    half = _BACKWARD_AMD if on_amd() else _BACKWARD_SM120 if on_sm120() else _BACKWARD
    return _choose(half, _BACKWARD_TF32, head_dim, dtype)


@functools.cache
def on_sm120() -> bool:
    """Whether the GPU is an RTX Blackwell."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 12


@functools.cache
def has_descriptors() -> bool:
    """Whether the GPU loads tiles by descriptors: Hopper and Blackwell."""
    return not on_amd() and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def _choose(half: dict, single: dict, head_dim: int, dtype: torch.dtype) -> Tiles:
    width = block_size(head_dim)
    # Eight numbers of every tile a thread with four warps; float64 takes two registers each.
    rows = (512 if dtype == torch.float64 else 1024) // width
    if dtype == torch.float64 or (dtype == torch.float32 and not tf32_allowed()):
        return Tiles(False, rows, 16, rows, 4, 1)
    table = single if dtype == torch.float32 else half
    block_rows, block_others, num_warps, num_stages = table[min(w for w in table if w >= width)]
    return Tiles(True, block_rows, block_others, rows, num_warps, num_stages)
