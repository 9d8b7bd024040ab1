"""Tiles and warps of the Triton kernels.

Estimates, not measured. Ahead-of-time compilation (tests/test_gated_linear_recurrence_triton.py) shows what spills.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tritonkern.ops._dtypes import on_amd
from tritonkern.ops._triton import UNIT, block_size


class Tile(NamedTuple):
    """`rows` sequences by `block` channels, those of a head rounded up to a power of two."""

    rows: int
    block: int
    step: int
    """Channels that begin every row in memory as whole vectors."""
    num_warps: int


def tile(width: int, dtype: torch.dtype) -> Tile:
    """Matrix units take 16 rows or more; products in float64 are sums of all their terms, of which few must be."""
    return Tile(
        1 if dtype == torch.float64 else 16, block_size(width), math.gcd(UNIT.value, width), 4 if on_amd() else 8
    )


# Programs per head of a backward pass that sums the parameters' gradients. A constant, so that every GPU gives the same
# bits.
PARTIALS = 16
