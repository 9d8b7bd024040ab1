"""Tiles and warps of the Triton kernels.

Estimates, not measured. Ahead-of-time compilation (tests/test_temporal_mixer_triton.py) shows that nothing spills.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonkern.ops._triton import block_size


class Rows(NamedTuple):
    """A tile of `rows` whole rows of `block` channels, C rounded up to a power of two."""

    block: int
    rows: int
    num_warps: int


def rows(channels: int, dtype: torch.dtype) -> Rows:
    """Tiles of the LayerNorm's kernels; longer rows get more warps, up to sixteen."""
    block = block_size(channels)
    numbers = 1024 if dtype != torch.float64 else 512
    return Rows(block, max(1, numbers // block), min(16, max(4, 4 * block // numbers)))


class Channels(NamedTuple):
    """The channels of one program, one per thread, at least a warp: the weights of a channel take thirty registers."""

    block: int
    num_warps: int


def channels(count: int, dtype: torch.dtype) -> Channels:
    block = min(64 if dtype == torch.float64 else 128, block_size(count, 32))
    return Channels(block, block // 32)


# Programs along tracks of a backward pass that sums the parameters' gradients. A constant, so that every GPU gives the
# same bits.
PARTIALS = 128
