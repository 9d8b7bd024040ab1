"""The Triton kernel of the points, and what all kernels share that read only the cells of discs.

A disc has up to 69 cells at the usual radius. If each query fetched its own, neighbours would fetch the same cells many
times. So the queries of each frame are sorted by the centres of their discs: by band of BAND rows, and by column inside
a band. A few queries in that order ("entries") cover a small box of cells together; the box is fetched once for all of
them, in tiles, and tensor cores multiply it. The result does not depend on the order. The entries whose disc can reach
a given tile of cells are one run in every band, whose ends are in `starts`, so that the gradient of a cell is summed by
one program, in the order of the entries, without atomic additions.

                 columns ->                         entries, sorted:   0  1  2  3  4  5 ...
     band 0   . . 0 . . . 1 . . .                   starts of band 1:  where its columns 0, 1, ... begin among them
     band 1   2 . . . 3 . . . . 4                   (entries 2 and 3 have columns below 6 in band 1)
"""

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, kernel
from tritonkern.ops.correlation_soft_argmax.triton_common import (
    cell_addresses,
    in_disc,
    inner_products,
    touches,
)


@triton.jit
def key(cell, w, BAND: tl.constexpr):
    """What queries are sorted by: band, then column, of their cell."""
    row = cell // w
    return row // BAND * w + cell - row * w


# keys[0, b, t, n] = key of best[b, n, t],   keys[1, b, t, n] = key of worst[b, n, t]
@kernel
def correlation_soft_argmax_bwd_kernel_keys(
    best, worst, keys, T: tl.int32, N: tl.int32, w: tl.int32, pairs: tl.int64, BAND: tl.constexpr, BLOCK: tl.constexpr
):
    """`pairs` is B T N; there is one group of keys where worst is None."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = at < pairs
    frame = at // N
    b = frame // T
    pair = (b * N + at - frame * N) * T + frame - b * T
    tl.store(keys + at, key(tl.load(best + pair, mask=in_range, other=0), w, BAND), mask=in_range)
    if worst is not None:
        tl.store(keys + pairs + at, key(tl.load(worst + pair, mask=in_range, other=0), w, BAND), mask=in_range)


# centres[g, b, t, i] = best or worst[b, order[g, b, t, i], t],   starts[g, b, t, k] = how many keys are below k
@kernel
def correlation_soft_argmax_bwd_kernel_starts(
    keys, order, best, worst, centres, starts,
    frames: tl.int32, T: tl.int32, N: tl.int32, boundaries: tl.int32, blocks: tl.int32, steps: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of sorted `keys [groups, B, T, N]`; `frames` is B T, and `steps` the steps that a binary search needs."""
    place = tl.program_id(0) // blocks
    at = (tl.program_id(0) - place * blocks) * BLOCK + tl.arange(0, BLOCK)
    group = place // frames
    frame = place - group * frames
    b = frame // T
    keys += place.to(tl.int64) * N
    n = tl.load(order + place.to(tl.int64) * N + at, mask=at < N, other=0)
    pair = (b.to(tl.int64) * N + n) * T + frame - b * T
    # Compared as a vector: the interpreter's masks must not come from single numbers.
    of_best = at * 0 + group == 0
    centre = tl.load(best + pair, mask=(at < N) & of_best, other=0)
    if worst is not None:
        centre += tl.load(worst + pair, mask=(at < N) & ~of_best, other=0)
    tl.store(centres + place.to(tl.int64) * N + at, centre, mask=at < N)
    low = at * 0
    high = low + N
    for _ in tl.range(0, steps, num_stages=1):  # the keys before `low` are below `at`, those from `high` on are not
        middle = (low + high) // 2
        searching = low < high
        below = searching & (tl.load(keys + middle, mask=searching, other=0) < at)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(starts + place.to(tl.int64) * boundaries + at, low, mask=at < boundaries)


@triton.jit
def entries(order, centres, frame, b, t, first, N, T, w, BLOCK_N: tl.constexpr):
    """Query, place in a `[B, N, T]`, row and column of the centre of a block of entries; the last one is repeated."""
    entry = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    n = tl.load(order + frame.to(tl.int64) * N + entry).to(tl.int32)
    pair = (b.to(tl.int64) * N + n) * T + t
    centre = tl.load(centres + pair)
    row = centre // w
    return n, pair, row, centre - row * w


@triton.jit
def tile(y0, x0, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Row and column of the cells of a tile."""
    place = tl.arange(0, TILE_H * TILE_W)
    return y0 + place // TILE_W, x0 + place % TILE_W


@triton.jit
def box(row, column, reach_y, reach_x, h, w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """First row, first column, last row + 1 and last column + 1 of the cells that the discs of a block reach.

    It begins where a tile of the whole grid does: the sums of a query then do not depend on its neighbours' discs.
    """
    top = tl.maximum(tl.min(row, 0) - reach_y, 0) // TILE_H * TILE_H
    left = tl.maximum(tl.min(column, 0) - reach_x, 0) // TILE_W * TILE_W
    bottom = tl.minimum(tl.max(row, 0) + reach_y, h - 1) + 1
    right = tl.minimum(tl.max(column, 0) + reach_x, w - 1) + 1
    return top, left, bottom, right


@triton.jit
def scores(
    frame, frame_factors, y, x, rows, row_factor, h, w, C, stride_y, stride_x,
    COSINE: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Correlation `[cells, queries]`, and addresses and factors of the cells; the last cell stands for those beyond."""
    y = tl.minimum(y, h - 1)
    x = tl.minimum(x, w - 1)
    cells = cell_addresses(frame, y, x, stride_y, stride_x)
    score = inner_products(cells, rows, C, BLOCK_C, PRECISION, STAGES)
    cell_factor = tl.zeros(y.shape, score.dtype)
    if COSINE:
        cell_factor = tl.load(frame_factors + y.to(tl.int64) * w + x)
        score = score * row_factor[None, :] * cell_factor[:, None]
    return score, cells, cell_factor


@triton.jit
def weights(score, highest, temperature, y, x, row, column):
    """`[cells, queries]`: e^(temperature (score - highest)), which is 1 for the best cells (row, column).

    `highest` was found with another order of sums: rounded scores may be larger, and that of the best cell smaller.
    """
    exponent = temperature * (score - highest[None, :])
    best = (y[:, None] == row[None, :]) & (x[:, None] == column[None, :])
    return tl.exp(tl.where((exponent > 0.0) | best, 0.0, exponent))


# weight = sum over the disc of w_i,   w_i = e^(temperature (c_i - c_best)),   c_i = query . feature_i
# points = best + 0.5 + sum over the disc of w_i (cell_i - best) / weight
@kernel
def correlation_soft_argmax_fwd_kernel_points(
    query, features, query_inverse_norm, features_inverse_norm, order, best, maximum, points, weight,
    T: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32, C: tl.int32,
    reach_y: tl.int32, reach_x: tl.int32, limit: tl.uint32, temperature: tl.float64,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For a block of entries of one frame."""
    ACC: tl.constexpr = maximum.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_N)
    frame = tl.program_id(0) // blocks
    first = (tl.program_id(0) - frame * blocks) * BLOCK_N
    b = frame // T
    t = frame - b * T
    n, pair, row, column = entries(order, best, frame, b, t, first, N, T, w, BLOCK_N)
    rows = query + (b.to(tl.int64) * stride_qb + n.to(tl.int64) * stride_qn) * UNIT
    features += (b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t) * UNIT
    factors = features_inverse_norm + frame.to(tl.int64) * h * w
    row_factor = tl.zeros([BLOCK_N], ACC)
    if COSINE:
        row_factor = tl.load(query_inverse_norm + b.to(tl.int64) * N + n)
    highest = tl.load(maximum + pair)
    temperature = tl.full([], temperature, ACC)

    # Offsets from the best cell: sums of these lose less than sums of coordinates.
    sums = highest * 0.0  # NaN where the maximum is not finite
    across = tl.zeros([BLOCK_N], ACC)
    down = tl.zeros([BLOCK_N], ACC)
    top, left, bottom, right = box(row, column, reach_y, reach_x, h, w, TILE_H, TILE_W)
    for y0 in tl.range(top, bottom, TILE_H, num_stages=1):
        for x0 in tl.range(left, right, TILE_W, num_stages=1):  # sums, across, down: of the tiles before this one
            if touches(y0, x0, row, column, reach_y, reach_x, TILE_H, TILE_W):
                y, x = tile(y0, x0, TILE_H, TILE_W)
                score, _, _ = scores(
                    features, factors, y, x, rows, row_factor, h, w, C * UNIT, stride_y, stride_x,
                    COSINE, BLOCK_C, PRECISION, STAGES,
                )  # fmt: skip
                inside = in_disc(y, x, row, column, h, w, limit)
                here = tl.where(inside, weights(score, highest, temperature, y, x, row, column), 0.0)
                sums += tl.sum(here, 0)
                across += tl.sum(here * (x[:, None] - column[None, :]).to(ACC), 0)
                down += tl.sum(here * (y[:, None] - row[None, :]).to(ACC), 0)

    in_range = first + tl.arange(0, BLOCK_N) < N
    tl.store(points + pair * 2, column.to(ACC) + 0.5 + across / sums, mask=in_range)
    tl.store(points + pair * 2 + 1, row.to(ACC) + 0.5 + down / sums, mask=in_range)
    tl.store(weight + pair, sums, mask=in_range)
