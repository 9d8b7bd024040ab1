"""What all Triton kernels of this room share: where vectors lie in memory, their products, and discs of cells.

A vector is one query or one cell, C channels long. `readable` makes all of them start on 16 bytes, so strides and C
arrive divided by UNIT, and addresses are 64 bits wide from there on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(8)


@triton.jit
def load_channels(vectors, start, C, BLOCK_C: tl.constexpr):
    """Tile `[vectors, BLOCK_C]` of the channels from `start` on, zero beyond C."""
    channel = start + tl.arange(0, BLOCK_C)[None, :]
    addresses = tl.multiple_of(vectors[:, None] + channel, (1, 16))
    return tl.load(addresses, mask=channel < C, other=0.0)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. No version of Triton has float64 products on every architecture, so these go without."""
    if a.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def inner_products(a, b, C, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """`[len(a), len(b)]` of the vectors at addresses a and b."""
    ACC: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([a.shape[0], b.shape[0]], ACC)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        left = load_channels(a, start, C, BLOCK_C)
        right = load_channels(b, start, C, BLOCK_C)
        total = product(left, tl.trans(right), total, PRECISION)
    return total


@triton.jit
def cell_addresses(frame, y, x, stride_y, stride_x):
    return frame + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x) * UNIT


@triton.jit
def kept(y, x, row, column, h, w, limit):
    """`[cells, queries]`: which cells (y, x) exist and lie in the disc around (row, column); limit is radius squared."""
    down = (y[:, None] - row[None, :]).to(tl.int64)
    across = (x[:, None] - column[None, :]).to(tl.int64)
    return (down * down + across * across < limit) & ((y < h) & (x < w))[:, None]


@triton.jit
def touches(y0, x0, row, column, reach_y, reach_x, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Whether any disc reaches into the tile of cells that starts at (y0, x0)."""
    down = (row + reach_y >= y0) & (row - reach_y < y0 + TILE_H)
    across = (column + reach_x >= x0) & (column - reach_x < x0 + TILE_W)
    return tl.max((down & across).to(tl.int32), 0) > 0


def readable(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`[..., C]` and the strides of all axes but the last in UNITs.

    A copy with zeros up to a multiple of UNIT channels if channels are strided or vectors do not start on 16 bytes.
    """
    channels = x.shape[-1] + -x.shape[-1] % UNIT.value
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    aligned = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(s % UNIT.value for s in strides[:-1])
    if x.shape[-1] != channels or not aligned:
        x = torch.nn.functional.pad(x, (0, channels - x.shape[-1])).contiguous()
        x = x.clone() if x.data_ptr() % 16 else x
        strides = list(x.stride())
    return x, tuple(stride // UNIT.value for stride in strides[:-1])
