"""What the Triton kernels of this operation share: addresses, scores, tiles of the cost and of its gradient.

A row is the query or key of one cell and head. A tensor is a tuple (pointer, strides of B, T, S and H in UNITs).
"""

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, product


@triton.jit
def rows_of(tensor, b, t, h, cell):
    """Addresses of rows `cell` of one frame and head."""
    pointer, stride_b, stride_t, stride_s, stride_h = tensor
    wide = tl.full([], 0, tl.int64)
    place = (wide + b) * stride_b + (wide + t) * stride_t + (wide + h) * stride_h
    return pointer + (place + cell.to(tl.int64) * stride_s) * UNIT


@triton.jit
def load_rows(rows, present, start, D, BLOCK_C: tl.constexpr):
    """`[rows, BLOCK_C]`: channels from `start` on; zero beyond D and for rows that are not present.

    Rows start on 16 bytes and are zero up to a multiple of UNIT channels (`readable`), so that vectors are loaded.
    """
    channel = start + tl.arange(0, BLOCK_C)[None, :]
    addresses = tl.multiple_of(rows[:, None] + channel, (1, 16))
    return tl.load(addresses, mask=present[:, None] & (channel < (D + UNIT - 1) // UNIT * UNIT), other=0.0)


@triton.jit
def scores(left, left_present, right, right_present, D, scale, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """scale <left_i, right_j>, `[left, right]`."""
    ACC: tl.constexpr = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([left.shape[0], right.shape[0]], ACC)
    for start in tl.range(0, D, BLOCK_C, num_stages=1):  # total: products of the channels below start
        a = load_rows(left, left_present, start, D, BLOCK_C)
        b = load_rows(right, right_present, start, D, BLOCK_C)
        total = product(a, tl.trans(b), total, PRECISION)
    return total * tl.full([], scale, ACC)


@triton.jit
def source_cells(cells, b, m, M, S, HAS_CELLS: tl.constexpr):
    """The source cells number m, and whether there are as many.

    Cells that do not exist, which nothing checks without waiting for the GPU, become the nearest ones that do.
    """
    present = m < M
    if HAS_CELLS:
        cell = tl.load(cells + b.to(tl.int64) * M + m, mask=present, other=0)
        return tl.minimum(tl.maximum(cell, 0), S - 1).to(tl.int32), present
    else:
        return tl.where(present, m, 0), present


@triton.jit
def unknown_cells(cells, b, m, M, S, HAS_CELLS: tl.constexpr):
    """Which of the source cells number m do not exist: their results are NaN."""
    if HAS_CELLS:
        cell = tl.load(cells + b.to(tl.int64) * M + m, mask=m < M, other=0)
        return (cell < 0) | (cell >= S)
    else:
        return m < 0


@triton.jit
def weights_over_targets(
    query, key, lse, b, t, h, source, cell, m, m_present, j, M, S, H, D, T, scale,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[m, j] = exp(scale <query[source, cell_m], key[t, j]> - lse_m), zero for targets beyond S."""
    left, right = rows_of(query, b, source, h, cell), rows_of(key, b, t, h, j)
    score = scores(left, m_present, right, j < S, D, scale, BLOCK_C, PRECISION)
    total = tl.load(lse + ((b * T + t).to(tl.int64) * H + h) * M + m, mask=m_present, other=0.0)
    return tl.where((j < S)[None, :] & m_present[:, None], tl.exp(score - total[:, None]), 0.0)


@triton.jit
def weights_over_sources(
    query, key, lse, b, t, h, source, cell, m_present, j, S, H, D, T, scale,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B[m, j] = exp(scale <query[t, j], key[source, cell_m]> - lse_j), zero for targets beyond S."""
    left, right = rows_of(key, b, source, h, cell), rows_of(query, b, t, h, j)
    score = scores(left, m_present, right, j < S, D, scale, BLOCK_C, PRECISION)
    total = tl.load(lse + ((b * T + t).to(tl.int64) * H + h) * S + j, mask=j < S, other=0.0)
    return tl.where((j < S)[None, :] & m_present[:, None], tl.exp(score - total[None, :]), 0.0)


@triton.jit
def gradient_of_cost(
    given, b, t, m, m_present, j, T, M, S, width, limit, COST: tl.constexpr,
):  # fmt: skip
    """G[m, j]: loaded, or made of the gradients of peak and points for the best cells."""
    first, second, index, points, weight = given
    row = (b * T + t).to(tl.int64) * M + m
    if COST:
        return tl.load(first + row[:, None] * S + j[None, :], mask=m_present[:, None] & (j < S)[None, :], other=0.0)
    else:
        best = tl.load(index + row, mask=m_present, other=0).to(tl.int32)
        total = tl.load(weight + row, mask=m_present, other=1.0)
        grad_peak = tl.load(first + row, mask=m_present, other=0.0)
        grad_x = tl.load(second + 2 * row, mask=m_present, other=0.0) / total
        grad_y = tl.load(second + 2 * row + 1, mask=m_present, other=0.0) / total
        x = tl.load(points + 2 * row, mask=m_present, other=0.0) - 0.5
        y = tl.load(points + 2 * row + 1, mask=m_present, other=0.0) - 0.5
        column, line = (j % width)[None, :], (j // width)[None, :]
        slope = grad_x[:, None] * (column - x[:, None]) + grad_y[:, None] * (line - y[:, None])
        near = squared_distance(best, j, width) < limit
        grad = tl.where(near, slope, 0.0) + tl.where(best[:, None] == j[None, :], grad_peak[:, None], 0.0)
        return tl.where((best < 0)[:, None], float("nan"), grad)


@triton.jit
def squared_distance(best, j, width):
    """`[best, j]`, of cells, as float32: exact below 2**24, and only such decide."""
    dx = ((j % width)[None, :] - (best % width)[:, None]).to(tl.float32)
    dy = ((j // width)[None, :] - (best // width)[:, None]).to(tl.float32)
    return dx * dx + dy * dy
