"""Which calls the fused Triton kernel holds, and its tiles.

Estimate, not measured: no GPU was at hand. Known from ahead-of-time compilation (tests/test_temporal_block_triton.py)
is that nothing spills on sm_80, sm_90, sm_100 and gfx942. What is left out spills: exact float32 (576 bytes a thread in
tiles of 32 rows), heads of 64 channels (on gfx942), and on sm_80 tiles of 64 rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonkern.ops._contract import on_amd

MAX_CHANNELS = 128
MAX_HEAD_DIM = 32


class Tile(NamedTuple):
    """Rows of a program, those of the frames around its own included, and its warps."""

    rows: int
    num_warps: int


def tile(channels: int, head_dim: int, window: int, dtype: torch.dtype) -> Tile | None:
    """The tile for a window of so many frames; None where the steps run one after the other."""
    if dtype.itemsize != 2 or channels > MAX_CHANNELS or head_dim > MAX_HEAD_DIM:
        return None
    chosen = Tile(32, 4) if before_hopper() else Tile(64, 8)
    # Frames around the own ones are computed again by the neighbours: they must leave a quarter of the rows.
    return chosen if 4 * (window - 1) <= 3 * chosen.rows else None


def before_hopper() -> bool:
    """Whether the current GPU is an NVIDIA one of the generations before sm_90."""
    return not on_amd() and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)
