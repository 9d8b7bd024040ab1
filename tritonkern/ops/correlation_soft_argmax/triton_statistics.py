"""Triton kernels over all cells: inverse norms of vectors, and maximum, minimum and sum of the correlation.

A program owns a block of queries and a run of cells of one frame. Programs that share a frame are neighbours, so that
each feature is fetched from memory once and from the L2 cache by the others.
"""

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, kernel
from tritonkern.ops.correlation_soft_argmax.triton_common import cell_addresses, inner_products, load_channels
from tritonkern.ops.correlation_soft_argmax.triton_discs import key


# inverse_norm[b, t, y, x] = 1 / sqrt(max(sum over c of vectors[b, t, y, x, c]^2, eps))
@kernel
def correlation_soft_argmax_fwd_kernel_inverse_norms(
    vectors, inverse_norm,
    T: tl.int32, h: tl.int32, w: tl.int32, C: tl.int32, total: tl.int64, eps: tl.float64,
    stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64, stride_x: tl.int64,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For BLOCK vectors of a `[B, T, h, w, C]`; `total` is the number of all of them."""
    ACC: tl.constexpr = inverse_norm.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = place < total
    number = tl.minimum(place, total - 1)
    x, rest = number % w, number // w
    y, rest = rest % h, rest // h
    t, b = rest % T, rest // T
    rows = vectors + (b * stride_b + t * stride_t + y * stride_y + x * stride_x) * UNIT
    squares = tl.zeros([BLOCK, BLOCK_C], ACC)
    for start in tl.range(0, C * UNIT, BLOCK_C):  # squares: sums over the channels below start, BLOCK_C of them
        tile = load_channels(rows, start, C * UNIT, BLOCK_C).to(ACC)
        squares += tile * tile
    # `where`, not a maximum, which would drop a NaN.
    square = tl.sum(squares, 1)
    eps = tl.full([], eps, ACC)
    square = tl.where(square < eps, eps, square)
    tl.store(inverse_norm + place, 1.0 / tl.sqrt(square), mask=in_range)


@triton.jit
def _scores(
    rows, row_factor, frame, frame_factors, cell, w, C, stride_y, stride_x,
    COSINE: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Correlation `[queries, cells]` of the queries at `rows` with the numbered cells of a frame."""
    y = cell // w
    cells = cell_addresses(frame, y, cell - y * w, stride_y, stride_x)
    score = inner_products(rows, cells, C, BLOCK_C, PRECISION, STAGES)
    if COSINE:
        score = score * row_factor[:, None] * tl.load(frame_factors + cell)[None, :]
    return score


@triton.jit
def _first_nan(
    begin, stop, rows, row_factor, frame, frame_factors, w, C, stride_y, stride_x,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The first of the cells begin..stop-1 whose correlation is NaN, for each query; `stop` where there is none."""
    first = tl.zeros([BLOCK_N], tl.int32) + stop
    for start in tl.range(begin, stop, BLOCK_CELLS, num_stages=1):  # first: among the cells below start
        cell = tl.minimum(start + tl.arange(0, BLOCK_CELLS), stop - 1)
        score = _scores(
            rows, row_factor, frame, frame_factors, cell, w, C, stride_y, stride_x, COSINE, BLOCK_C, PRECISION, 1
        )
        first = tl.minimum(first, tl.min(tl.where(score != score, cell[None, :], stop), 1))
    return first


# With c_i = query . feature_i, both times their inverse norms if COSINE, over the cells i of a run, for each query:
#   total = sum c_i,   highest = max c_i,   best = the first i with c_i = highest      (lowest and worst alike)
#   where any c_i is NaN: highest = lowest = NaN, best = worst = the first such i
@kernel
def correlation_soft_argmax_fwd_kernel_statistics(
    query, features, query_inverse_norm, features_inverse_norm, total, highest, lowest, best, worst,
    frames: tl.int32, T: tl.int32, N: tl.int32, w: tl.int32, cells: tl.int32, C: tl.int32, run: tl.int32,
    runs: tl.int32,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One run of `run` cells; results are `[runs, B, T, N]`, of which the merge kernel makes `[B, N, T]`."""
    ACC: tl.constexpr = total.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_N)
    place = tl.program_id(0) // blocks  # of the frame and the run
    frame = place // runs
    part = place - frame * runs
    b = frame // T
    first = (tl.program_id(0) - place * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Queries and cells beyond the last one are the last one again: their loads need no mask, and no extremum changes.
    n = tl.minimum(first, N - 1)
    rows = query + (b.to(tl.int64) * stride_qb + n.to(tl.int64) * stride_qn) * UNIT
    features += (b.to(tl.int64) * stride_b + (frame - b * T).to(tl.int64) * stride_t) * UNIT
    factors = features_inverse_norm + frame.to(tl.int64) * cells
    row_factor = tl.zeros([BLOCK_N], ACC)
    if COSINE:
        row_factor = tl.load(query_inverse_norm + b.to(tl.int64) * N + n)
    C = C * UNIT

    begin = part * run
    stop = tl.minimum(begin + run, cells)
    sums = tl.zeros([BLOCK_N], ACC)
    high = tl.full([BLOCK_N], float("-inf"), ACC)
    low = tl.full([BLOCK_N], float("inf"), ACC)
    high_cell = tl.zeros([BLOCK_N], tl.int32) + begin
    low_cell = high_cell
    for start in tl.range(begin, stop, BLOCK_CELLS, num_stages=1):  # sums to low_cell: of the cells below start
        column = tl.arange(0, BLOCK_CELLS)
        cell = tl.minimum(start + column, stop - 1)
        score = _scores(
            rows, row_factor, features, factors, cell, w, C, stride_y, stride_x, COSINE, BLOCK_C, PRECISION, STAGES
        )
        sums += tl.sum(tl.where((column < stop - start)[None, :], score, 0.0), 1)
        # Maximum and minimum skip NaN; the sum keeps it.
        tile_high = tl.max(score, 1)
        tile_low = tl.min(score, 1)
        # Any of the repeated last cells is that cell.
        tile_high_cell = start + tl.min(tl.where(score == tile_high[:, None], column[None, :], BLOCK_CELLS), 1)
        tile_low_cell = start + tl.min(tl.where(score == tile_low[:, None], column[None, :], BLOCK_CELLS), 1)
        high_cell = tl.where(tile_high > high, tl.minimum(tile_high_cell, stop - 1), high_cell)
        low_cell = tl.where(tile_low < low, tl.minimum(tile_low_cell, stop - 1), low_cell)
        high = tl.where(tile_high > high, tile_high, high)
        low = tl.where(tile_low < low, tile_low, low)

    if tl.max((sums != sums).to(tl.int32), 0) > 0:  # a NaN, or infinities of both signs
        nan = _first_nan(
            begin, stop, rows, row_factor, features, factors, w, C, stride_y, stride_x,
            COSINE, BLOCK_N, BLOCK_CELLS, BLOCK_C, PRECISION,
        )  # fmt: skip
        high = tl.where(nan < stop, float("nan"), high)
        low = tl.where(nan < stop, float("nan"), low)
        high_cell = tl.where(nan < stop, nan, high_cell)
        low_cell = tl.where(nan < stop, nan, low_cell)

    at = (part.to(tl.int64) * frames + frame) * N + first
    in_range = first < N
    tl.store(total + at, sums, mask=in_range)
    tl.store(highest + at, high, mask=in_range)
    tl.store(lowest + at, low, mask=in_range)
    tl.store(best + at, high_cell, mask=in_range)
    tl.store(worst + at, low_cell, mask=in_range)


# mean = sum over the runs of total / cells
# maximum = max over the runs of highest, best = its cell in the first run that has it, or the first NaN; minimum and
# worst alike
@kernel
def correlation_soft_argmax_fwd_kernel_merge(
    total, highest, lowest, high_cells, low_cells, mean, maximum, minimum, best, worst, keys,
    T: tl.int32, N: tl.int32, w: tl.int32, cells: tl.int32, runs: tl.int32, pairs: tl.int64,
    BAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`[runs, B, T, N]` -> `[B, N, T]`, and `[B, T, N]` keys of the best cells; `pairs` is B T N."""
    ACC: tl.constexpr = mean.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = at < pairs
    frame = at // N
    n = at - frame * N
    b = frame // T
    out = (b * N + n) * T + frame - b * T
    sums = tl.zeros([BLOCK], ACC)
    high = tl.load(highest + at, mask=in_range, other=0.0)
    low = tl.load(lowest + at, mask=in_range, other=0.0)
    high_cell = tl.load(high_cells + at, mask=in_range, other=0)
    low_cell = tl.load(low_cells + at, mask=in_range, other=0)
    for part in tl.range(0, runs):  # sums to low_cell: of the runs below part, and of the first one
        here = part * pairs + at
        sums += tl.load(total + here, mask=in_range, other=0.0)
        value = tl.load(highest + here, mask=in_range, other=0.0)
        better = (value > high) | ((value != value) & (high == high))
        high_cell = tl.where(better, tl.load(high_cells + here, mask=in_range, other=0), high_cell)
        high = tl.where(better, value, high)
        value = tl.load(lowest + here, mask=in_range, other=0.0)
        better = (value < low) | ((value != value) & (low == low))
        low_cell = tl.where(better, tl.load(low_cells + here, mask=in_range, other=0), low_cell)
        low = tl.where(better, value, low)
    tl.store(mean + out, sums / tl.full([], cells, ACC), mask=in_range)
    tl.store(maximum + out, high, mask=in_range)
    tl.store(minimum + out, low, mask=in_range)
    tl.store(best + out, high_cell, mask=in_range)
    tl.store(worst + out, low_cell, mask=in_range)
    tl.store(keys + at, key(high_cell, w, BAND), mask=in_range)
