"""Tiles of the Triton kernels by channels and dtype.

Estimate, not measured: no GPU was at hand. Known from ahead-of-time compilation (tests/test_temporal_adapter_triton.py)
is that nothing spills on sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

NUM_WARPS = 4

# Tiles that a program walks which leaves sums behind: enough programs for a GPU, few enough sums to be nothing beside
# the tokens. A constant, so that every GPU gives the same bits.
EACH = 16


class Tile(NamedTuple):
    """What a program holds at a time: `rows` pixels of `block` channels, a power of two each."""

    rows: int
    block: int


def tile(channels: int, dtype: torch.dtype) -> Tile:
    """Sixteen numbers a thread (eight in float64). Blocks divide the channels where that leaves 64 or more; wider ones
    spilled on sm_80."""
    block = math.gcd(channels, 128)
    if block < 64:
        block = min(128, max(16, 1 << (channels - 1).bit_length()))
    numbers = 32 * NUM_WARPS * (8 if dtype == torch.float64 else 16)
    return Tile(numbers // block, block)
