"""Tiles of the Triton kernels by the number of samples, supports and channels, and dtype.

Estimates, not tuned. Ahead-of-time compilation (tests/test_local_correlation_triton.py) shows that nothing spills.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonkern.ops._dtypes import tf32_allowed as tf32_allowed
from tritonkern.ops._triton import block_size


class Tile(NamedTuple):
    """Samples, supports and channels of a tile; a program computes all tiles of its point, one after the other."""

    samples: int
    supports: int
    channels: int
    num_warps: int


def tile(samples: int, supports: int, channels: int, dtype: torch.dtype) -> Tile:
    """A matrix unit takes at least 16 of each. float64 does not use it: its products are cubes in registers."""
    if dtype == torch.float64:
        return Tile(16, 16, 8, 4)
    if dtype == torch.float32:
        return Tile(16, min(64, block_size(supports)), 16, 4)
    return Tile(min(32, block_size(samples)), min(64, block_size(supports)), min(32, block_size(channels)), 4)


def softmax_tile(samples: int, supports: int) -> dict[str, int]:
    """Of the gradient of the softmax: a program reads its samples twice, of which the second time is from the cache."""
    return {"BLOCK_P": min(32, block_size(samples)), "BLOCK_S": min(64, block_size(supports)), "num_warps": 4}
