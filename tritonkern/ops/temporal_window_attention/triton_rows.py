"""Rows of flattened time: which frame of which sequence they are, and their addresses.

Sequences (batch, position, head) follow each other, head fastest, and row `sequence * T + frame` is one vector of D
numbers. Row numbers inside a program count from the first frame of the sequence that holds its first row. `T`, `N` and
`H` are what `divisor` makes of these sizes, and a tensor is its pointer and four strides in UNITs.
"""

import functools

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT


@triton.jit
def divide(x, divisor):
    """x // divisor for 0 <= x < 2**31, without the thirty instructions of a division; see `divisor`."""
    _, multiplier, shift = divisor
    return (tl.umulhi(x.to(tl.uint32) * 2, multiplier.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def origin(first, T, N, H):
    """Frame of a flattened row, and what `locate` needs to find rows that count from the start of its sequence."""
    sequence = divide(first, T)
    position = divide(sequence, H)
    b = divide(position, N)
    return first - sequence * T[0], (T, N, H, b, position - b * N[0], sequence - position * H[0])


@triton.jit
def locate(row, place):
    """Batch, position, head and frame of rows that count from the start of the sequence of `place`."""
    T, N, H, b0, n0, h0 = place
    sequence = divide(row, T)
    position = divide(h0 + sequence, H)
    b = divide(n0 + position, N)
    return b0 + b, n0 + position - b * N[0], h0 + sequence - position * H[0], row - sequence * T[0]


@triton.jit
def pointers(tensor, row, place, BLOCK_D: tl.constexpr):
    """Addresses `[rows, BLOCK_D]`; rows start on 16 bytes. In units of 8 numbers, 32 bits reach over 2**34 of them."""
    pointer, stride_b, stride_t, stride_n, stride_h = tensor
    b, n, h, t = locate(row, place)
    units = b * stride_b + t * stride_t + n * stride_n + h * stride_h
    rows = pointer + units.to(tl.int64) * UNIT
    return tl.multiple_of(rows[:, None] + tl.arange(0, BLOCK_D)[None, :], (1, 16))


@triton.jit
def inside(in_range, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = in_range[:, None]
    if D < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return mask


@triton.jit
def load(tensor, row, in_range, place, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile `[rows, BLOCK_D]`, zero in rows that are out of range and beyond D."""
    return tl.load(pointers(tensor, row, place, BLOCK_D), mask=inside(in_range, D, BLOCK_D), other=0.0)


@triton.jit
def store(tensor, row, tile, in_range, place, D: tl.constexpr, BLOCK_D: tl.constexpr):
    tile = tile.to(tensor[0].dtype.element_ty)
    tl.store(pointers(tensor, row, place, BLOCK_D), tile, mask=inside(in_range, D, BLOCK_D))


@triton.jit
def contiguous(pointer, T, N, H, D: tl.constexpr):
    """A contiguous `[B, T, N, H, D]` tensor with its strides."""
    return pointer, T * N * H * (D // UNIT), N * H * (D // UNIT), H * (D // UNIT), D // UNIT


@triton.jit
def number(row, place):
    """Index of each row in a contiguous `[B, T, N, H]` tensor."""
    b, n, h, t = locate(row, place)
    return ((b * place[0][0] + t) * place[1][0] + n) * place[2][0] + h


@triton.jit
def reach(t0, count, T, before, after):
    """From the first row that shares a window with any of `count` rows to one past the last."""
    last = t0 + count - 1
    last_t = last - divide(last, T) * T[0]
    return t0 - tl.minimum(before, t0), last + tl.minimum(after, T[0] - 1 - last_t) + 1


@triton.jit
def window(row, T, before, after):
    """First and last row that share a window with each row, cut at the ends of its clip."""
    t = row - divide(row, T) * T[0]
    return row - tl.minimum(before, t), row + tl.minimum(after, T[0] - 1 - t)


@triton.jit
def visible(other, first, last):
    """Which of the other rows `[1, others]` lie between first and last `[rows, 1]`, in one unsigned comparison."""
    return (other[None, :] - first[:, None]).to(tl.uint32) <= (last - first).to(tl.uint32)[:, None]


@functools.lru_cache(maxsize=256)
def divisor(d: int) -> tuple[int, int, int]:
    """d and what `divide` needs: x // d == x * ceil(2**(31 + s) / d) >> (31 + s) for x < 2**31 and d <= 2**s."""
    shift = (d - 1).bit_length()
    return d, -(-(1 << (31 + shift)) // d), shift
