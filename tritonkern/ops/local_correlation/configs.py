"""Tiles of the Triton kernels by the number of samples, supports and channels, and dtype.

Estimate, not tuned. Known from ahead-of-time compilation (tests/test_local_correlation_triton.py) is that nothing
spills on sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonkern.ops._contract import tf32_allowed as tf32_allowed


class Tile(NamedTuple):
    """Of samples, supports and channels; a program goes through all tiles of its point."""

    samples: int
    supports: int
    channels: int
    num_warps: int


def tile(samples: int, supports: int, channels: int, dtype: torch.dtype) -> Tile:
    """A matrix unit takes at least 16 of each; float64 goes without, and its products are cubes in registers."""
    if dtype == torch.float64:
        return Tile(16, 16, 8, 4)
    if dtype == torch.float32:
        return Tile(16, _power(supports, 64), 16, 4)
    return Tile(_power(samples, 32), _power(supports, 64), _power(channels, 32), 4)


def _power(n: int, most: int) -> int:
    return min(most, 1 << max(4, (n - 1).bit_length()))
