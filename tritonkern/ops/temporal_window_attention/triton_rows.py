"""Rows of flattened time: which frame of which sequence they are, and their addresses.

Sequences (batch, position, head) follow each other, head fastest, and row `sequence * T + frame` is one vector of D
numbers. Row numbers inside a program count from the first frame of the sequence that holds its first row. `T`, `N` and
`H` are what `divisor` makes of these sizes, and a tensor is its pointer and four strides in UNITs.

Keys and values may have more frames S than the queries (CONTINUED): their rows are then numbered by S, and query frame
t stands at their frame t + shift. Otherwise both sides have the same rows.
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
def with_frames(T, place):
    """`place` on the other side, which has T frames."""
    return T, place[1], place[2], place[3], place[4], place[5]


@triton.jit
def pointers(tensor, b, n, h, t, BLOCK_D: tl.constexpr):
    """Addresses `[rows, BLOCK_D]`; rows start on 16 bytes. In units of 8 numbers, 32 bits reach over 2**34 of them."""
    pointer, stride_b, stride_t, stride_n, stride_h = tensor
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
    b, n, h, t = locate(row, place)
    return tl.load(pointers(tensor, b, n, h, t, BLOCK_D), mask=inside(in_range, D, BLOCK_D), other=0.0)


@triton.jit
def load_ring(tensor, row, in_range, place, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load` of a tensor whose frame 0 is stored as frame `start`, and the others behind it in a ring."""
    b, n, h, t = locate(row, place)
    t += start
    t = tl.where(t >= place[0][0], t - place[0][0], t)
    return tl.load(pointers(tensor, b, n, h, t, BLOCK_D), mask=inside(in_range, D, BLOCK_D), other=0.0)


@triton.jit
def store(tensor, row, tile, in_range, place, D: tl.constexpr, BLOCK_D: tl.constexpr):
    tile = tile.to(tensor[0].dtype.element_ty)
    b, n, h, t = locate(row, place)
    tl.store(pointers(tensor, b, n, h, t, BLOCK_D), tile, mask=inside(in_range, D, BLOCK_D))


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
def reach(t0, count, T, S, shift, before, after, CONTINUED: tl.constexpr):
    """From the first row that shares a window with any of `count` rows to one past the last."""
    last = t0 + count - 1
    if CONTINUED:
        _, start, _ = window(t0, T, S, shift, before, after, CONTINUED)
        _, _, stop = window(last, T, S, shift, before, after, CONTINUED)
        return start, stop + 1
    else:
        last_t = last - divide(last, T) * T[0]
        return t0 - tl.minimum(before, t0), last + tl.minimum(after, T[0] - 1 - last_t) + 1


@triton.jit
def window(row, T, S, shift, before, after, CONTINUED: tl.constexpr):
    """Row of the same frame on the other side, and the first and last that share a window with each row, cut at the
    ends of its clip there. The last one is before the first one where there is none."""
    sequence = divide(row, T)
    t = row - sequence * T[0]
    if CONTINUED:
        t += shift
        begin = sequence * S[0]
        first = tl.minimum(tl.maximum(t - before, 0), S[0])
        last = tl.minimum(tl.maximum(t + after, -1), S[0] - 1)
        return begin + t, begin + first, begin + last
    else:
        return row, row - tl.minimum(before, t), row + tl.minimum(after, T[0] - 1 - t)


@triton.jit
def visible(other, first, last, CONTINUED: tl.constexpr):
    """Which of the other rows `[1, others]` lie between first and last `[rows, 1]`."""
    if CONTINUED:
        return (other[None, :] >= first[:, None]) & (other[None, :] <= last[:, None])
    else:  # in one unsigned comparison, as there is always one
        return (other[None, :] - first[:, None]).to(tl.uint32) <= (last - first).to(tl.uint32)[:, None]


@functools.lru_cache(maxsize=256)
def divisor(d: int) -> tuple[int, int, int]:
    """d and what `divide` needs: x // d == x * ceil(2**(31 + s) / d) >> (31 + s) for x < 2**31 and d <= 2**s."""
    shift = (d - 1).bit_length()
    return d, -(-(1 << (31 + shift)) // d), shift
