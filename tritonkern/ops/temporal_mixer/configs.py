"""Tiles and warps of the Triton kernels.

Estimate, not measured: no GPU was at hand. Known from ahead-of-time compilation (tests/test_temporal_mixer_triton.py)
is that nothing spills on sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """A tile of `rows` whole rows of `block` channels, C rounded up to a power of two."""

    block: int
    rows: int
    num_warps: int


def rows(channels: int, dtype: torch.dtype) -> Rows:
    """Of the kernels around the LayerNorm; a row that is longer gets more warps, up to sixteen."""
    block = 1 << max(4, (channels - 1).bit_length())
    numbers = 1024 if dtype != torch.float64 else 512
    return Rows(block, max(1, numbers // block), min(16, max(4, 4 * block // numbers)))


class Channels(NamedTuple):
    """The channels of one program, one each thread (and one warp at least): its weights are some thirty registers."""

    block: int
    num_warps: int


def channels(count: int, dtype: torch.dtype) -> Channels:
    block = min(64 if dtype == torch.float64 else 128, 1 << max(5, (count - 1).bit_length()))
    return Channels(block, block // 32)


# Programs along tracks of a backward pass that sums the parameters' gradients. By the data alone, so that every GPU
# gives the same bits.
PARTIALS = 128
