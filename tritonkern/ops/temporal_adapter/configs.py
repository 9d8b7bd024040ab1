"""Tiles of the Triton kernels by channels and dtype.

Estimates, not measured on a GPU. Ahead-of-time compilation (tests/test_temporal_adapter_triton.py) shows that no kernel
spills registers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

NUM_WARPS = 4

# Tiles per program in kernels that write partial sums: enough programs to fill a GPU, few enough sums to be negligible.
# Fixed, so that results do not depend on the GPU.
EACH = 16


class Tile(NamedTuple):
    """What a program loads at once: `rows` pixels of `block` channels, each a power of two."""

    rows: int
    block: int


def tile(channels: int, dtype: torch.dtype) -> Tile:
    """Sixteen numbers per thread (eight in float64).

    Blocks divide the channels where that leaves 64 or more; wider ones spilled on sm_80.
    """
    block = math.gcd(channels, 128)
    if block < 64:
        block = min(128, max(16, 1 << (channels - 1).bit_length()))
    numbers = 32 * NUM_WARPS * (8 if dtype == torch.float64 else 16)
    return Tile(numbers // block, block)
