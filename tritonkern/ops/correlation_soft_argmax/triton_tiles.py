"""What all Triton kernels of this room share: where vectors lie in memory, their products, and discs of cells.

A vector is one query or one cell, C channels long. `readable` makes all of them start on 16 bytes, so strides and C
arrive divided by UNIT, and addresses are 64 bits wide from there on.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(8)
# The square of this, and twice that, are below 2**31 and 2**32.
_FAR = tl.constexpr(46340)


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
def gradient_product(grad, tile, total, PRECISION: tl.constexpr):
    """total + grad @ tile for float32 gradients and a tile of inputs.

    Gradients of one disc cancel, so they must not be rounded to 16 bits, and float16 would flush small ones to zero.
    They go in two parts, each of which a matrix unit takes as it is. TF32 holds every float16.
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
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        left = load_channels(a, start, C, BLOCK_C)
        right = load_channels(b, start, C, BLOCK_C)
        total = product(left, tl.trans(right), total, PRECISION)
    return total


@triton.jit
def cell_addresses(frame, y, x, stride_y, stride_x):
    return frame + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x) * UNIT


@triton.jit
def distance_squared(y, x, row, column):
    """Exact below 2**31, and not less than 2**31 - 2**17 where the truth is more; see `disc`."""
    down = tl.minimum(tl.abs(y - row), _FAR).to(tl.uint32)
    across = tl.minimum(tl.abs(x - column), _FAR).to(tl.uint32)
    return down * down + across * across


@triton.jit
def kept(y, x, row, column, h, w, limit):
    """`[cells, queries]`: which cells (y, x) exist and lie in the disc around (row, column); limit: radius squared."""
    near = distance_squared(y[:, None], x[:, None], row[None, :], column[None, :]) < limit.to(tl.uint32)
    return near & ((y < h) & (x < w))[:, None]


@triton.jit
def touches(y0, x0, row, column, reach_y, reach_x, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Whether any disc reaches into the tile of cells that starts at (y0, x0)."""
    down = (row + reach_y >= y0) & (row - reach_y < y0 + TILE_H)
    across = (column + reach_x >= x0) & (column - reach_x < x0 + TILE_W)
    return tl.max((down & across).to(tl.int32), 0) > 0


def disc(radius: float, h: int, w: int) -> tuple[int, tuple[int, int]]:
    """What `distance_squared` stays below, and the rows and columns that a disc reaches on each side."""
    squared = max(1, math.ceil(min(radius * radius, 2.0**62)))
    reach = math.isqrt(squared - 1)
    limit = squared
    if squared > _FAR.value**2:
        if squared <= (h - 1) ** 2 + (w - 1) ** 2:
            raise ValueError(
                f"radius must be at most {_FAR.value} cells on the triton backend, or cover the whole grid; "
                f"got {radius} on {h} x {w}"
            )
        limit = 2**32 - 1
    return limit, (min(reach, h - 1), min(reach, w - 1))


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
