"""What all Triton kernels of this operation share: addresses and products of vectors, and discs of cells.

A vector is one query or one cell, C channels long. `readable` of ops/_triton.py makes all of them start on 16 bytes, so
strides and C are passed in UNITs, and addresses are 64 bits wide.
"""

import math

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, product
from tritonkern.ops.correlation_soft_argmax.op import FARTHEST, disc_limit

_FARTHEST = tl.constexpr(FARTHEST)


@triton.jit
def load_channels(vectors, start, C, BLOCK_C: tl.constexpr):
    """Tile `[vectors, BLOCK_C]` of the channels from `start` on, zero beyond C."""
    channel = start + tl.arange(0, BLOCK_C)[None, :]
    addresses = tl.multiple_of(vectors[:, None] + channel, (1, 16))
    return tl.load(addresses, mask=channel < C, other=0.0)


@triton.jit
def gradient_product(grad, tile, total, PRECISION: tl.constexpr):
    """total + grad @ tile for float32 gradients and a tile of inputs.

    Gradients of one disc cancel, so they must not be rounded to 16 bits, and float16 would flush small ones to zero.
    They are multiplied in two parts, each exact in the format of the matrix unit. TF32 holds every float16.
    """
    if tile.dtype == tl.bfloat16:
        high = grad.to(tl.bfloat16)
        total = tl.dot(high, tile, total)
        return tl.dot((grad - high.to(tl.float32)).to(tl.bfloat16), tile, total)
    elif tile.dtype == tl.float16 and PRECISION == "tf32":
        high = (grad.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        tile = tile.to(tl.float32)
        total = tl.dot(high, tile, total, input_precision="tf32")
        return tl.dot(grad - high, tile, total, input_precision="tf32")
    else:
        return product(grad, tile.to(grad.dtype), total, PRECISION)


@triton.jit
def inner_products(a, b, C, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """`[len(a), len(b)]` of the vectors at addresses a and b."""
    ACC: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([a.shape[0], b.shape[0]], ACC)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):  # total: products of the channels below start
        left = load_channels(a, start, C, BLOCK_C)
        right = load_channels(b, start, C, BLOCK_C)
        total = product(left, tl.trans(right), total, PRECISION)
    return total


@triton.jit
def cell_addresses(frame, y, x, stride_y, stride_x):
    """Addresses of the cells (y, x) of the frame that starts at `frame`; strides in UNITs."""
    return frame + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x) * UNIT


@triton.jit
def distance_squared(y, x, row, column):
    """In cells; exact below 2**31, and at least 2**31 - 2**17 where the true one is larger; see `disc`."""
    down = tl.minimum(tl.abs(y - row), _FARTHEST).to(tl.uint32)
    across = tl.minimum(tl.abs(x - column), _FARTHEST).to(tl.uint32)
    return down * down + across * across


@triton.jit
def in_disc(y, x, row, column, h, w, limit):
    """`[cells, queries]`: which cells (y, x) exist and are in the disc around (row, column).

    limit: exclusive bound of the squared distance.
    """
    near = distance_squared(y[:, None], x[:, None], row[None, :], column[None, :]) < limit.to(tl.uint32)
    return near & ((y < h) & (x < w))[:, None]


@triton.jit
def touches(y0, x0, row, column, reach_y, reach_x, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Whether the disc of any (row, column) reaches into the tile of cells that starts at (y0, x0)."""
    down = (row + reach_y >= y0) & (row - reach_y < y0 + TILE_H)
    across = (column + reach_x >= x0) & (column - reach_x < x0 + TILE_W)
    return tl.max((down & across).to(tl.int32), 0) > 0


def disc(radius: float, h: int, w: int) -> tuple[int, tuple[int, int]]:
    """Exclusive bound of `distance_squared`; rows and columns that a disc reaches on each side of its centre."""
    limit = disc_limit(radius)
    reach = math.isqrt(limit - 1)
    # A larger radius covers the whole grid: the operator has checked it.
    limit = limit if limit <= FARTHEST**2 else 2**32 - 1
    return limit, (min(reach, h - 1), min(reach, w - 1))
