"""Triton kernels of the gradients of queries and features, over the cells of discs; see triton_discs.py.

By query first: its discs, in all frames, leave the gradients of their costs in patches. Then by cell, which reads the
patches of all discs that hold it.
"""

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, kernel
from tritonkern.ops.correlation_soft_argmax import triton_discs as discs
from tritonkern.ops.correlation_soft_argmax.triton_common import (
    cell_addresses,
    gradient_product,
    in_disc,
    load_channels,
    touches,
)


@triton.jit
def _patch_start(row, column, reach_y, reach_x, patch_h, patch_w, h, w):
    """`[queries]`: cell (y, x) is number y * patch_w + x - start in the patch of a query.

    The patch is the part of the grid that its disc reaches.
    """
    top = tl.minimum(tl.maximum(row - reach_y, 0), h - patch_h)
    left = tl.minimum(tl.maximum(column - reach_x, 0), w - patch_w)
    return top * patch_w + left


@triton.jit
def _point_gradient(score, y, x, row, column, pair, points, maximum, weight, grad_points, temperature):
    """temperature w_i / weight (centre_i - point) . grad_point, for any cell."""
    # What belongs to a query is loaded again for each tile: kept, it would not fit into the registers.
    across = (x.to(score.dtype) + 0.5)[:, None] - tl.load(points + pair * 2)[None, :]
    down = (y.to(score.dtype) + 0.5)[:, None] - tl.load(points + pair * 2 + 1)[None, :]
    along = across * tl.load(grad_points + pair * 2)[None, :]
    along += down * tl.load(grad_points + pair * 2 + 1)[None, :]
    here = discs.weights(score, tl.load(maximum + pair), temperature, y, x, row, column)
    here = here / tl.load(weight + pair)[None, :]
    return temperature * here * along


# grad_c_i   = temperature w_i / weight (centre_i - point) . grad_point in the disc + grad_centre in its centre
# grad_query = sum over frames and cells of grad_c_i feature_i; with COSINE that of the normalised query and feature
@kernel
def correlation_soft_argmax_bwd_kernel_query(
    query, features, query_inverse_norm, features_inverse_norm, order, centres, points, maximum, weight, grad_points,
    grad_centre, patches, grad_query,
    T: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32, C: tl.int32, frames: tl.int32, first_frame: tl.int32,
    has_points: tl.int32, has_centre: tl.int32, reach_y: tl.int32, reach_x: tl.int32, patch_h: tl.int32,
    patch_w: tl.int32, limit: tl.uint32, temperature: tl.float64,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For a block of entries of one frame: stores grad_c in `patches [B, frames, N, planes, patch_h, patch_w]` and
    adds grad_query to the memory of that name. With COSINE there are two planes, and the second one has grad_c times c.
    """
    ACC: tl.constexpr = maximum.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_N)
    local_frame = tl.program_id(0) // blocks
    first = (tl.program_id(0) - local_frame * blocks) * BLOCK_N
    b = local_frame // frames
    t = first_frame + local_frame - b * frames
    frame = b * T + t
    n, pair, row, column = discs.entries(order, centres, frame, b, t, first, N, T, w, BLOCK_N)
    # The last entry is repeated: it is stored and added once.
    entry = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    in_range = first + tl.arange(0, BLOCK_N) < N
    rows = query + (b.to(tl.int64) * stride_qb + n.to(tl.int64) * stride_qn) * UNIT
    features += (b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t) * UNIT
    factors = features_inverse_norm + frame.to(tl.int64) * h * w
    row_factor = tl.zeros([BLOCK_N], ACC)
    if COSINE:
        row_factor = tl.load(query_inverse_norm + b.to(tl.int64) * N + n)
    C = C * UNIT
    grad_rows = grad_query + (b.to(tl.int64) * N + n) * C
    patch_rows = patches + (local_frame.to(tl.int64) * N + entry) * (patch_h * patch_w * (2 if COSINE else 1))
    patch_rows -= _patch_start(row, column, reach_y, reach_x, patch_h, patch_w, h, w)
    temperature = tl.full([], temperature, ACC)

    top, left, bottom, right = discs.box(row, column, reach_y, reach_x, h, w, TILE_H, TILE_W)
    for y0 in tl.range(top, bottom, TILE_H, num_stages=1):
        for x0 in tl.range(left, right, TILE_W, num_stages=1):  # patches and grad_query have the tiles before this one
            if touches(y0, x0, row, column, reach_y, reach_x, TILE_H, TILE_W):
                y, x = discs.tile(y0, x0, TILE_H, TILE_W)
                score, cells, cell_factor = discs.scores(
                    features, factors, y, x, rows, row_factor, h, w, C, stride_y, stride_x,
                    COSINE, BLOCK_C, PRECISION, STAGES,
                )  # fmt: skip
                inside = in_disc(y, x, row, column, h, w, limit)
                grad = tl.zeros(score.shape, ACC)
                if has_points:
                    grad = _point_gradient(
                        score, y, x, row, column, pair, points, maximum, weight, grad_points, temperature
                    )
                    grad = tl.where(inside, grad, 0.0)
                if has_centre:
                    centre = inside & (y[:, None] == row[None, :]) & (x[:, None] == column[None, :])
                    # A query that is not finite must not look like a finite gradient in the other kernel.
                    grad = tl.where(centre, grad + (tl.load(grad_centre + pair)[None, :] + score * 0.0), grad)
                place = patch_rows[None, :] + (y * patch_w + x)[:, None]
                stored = inside & in_range[None, :]
                tl.store(place, grad, mask=stored)
                if COSINE:
                    tl.store(place + patch_h * patch_w, grad * score, mask=stored)
                    grad = grad * cell_factor[:, None]
                for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):  # the channels below start are added
                    channel = start + tl.arange(0, BLOCK_C)
                    tile = load_channels(cells, start, C, BLOCK_C)
                    add = tl.zeros([BLOCK_N, BLOCK_C], ACC)
                    add = gradient_product(tl.trans(grad), tile, add, PRECISION)
                    mask = in_range[:, None] & (channel < C)[None, :]
                    tl.atomic_add(grad_rows[:, None] + channel[None, :], add, mask=mask, sem="relaxed")


@triton.jit
def _add_discs(
    total, total_along, cells, tile, start, entries, disc, vectors, grid,
    COSINE: tl.constexpr, BAND: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total[i, c] += sum over the discs of one frame that hold cell i of grad_c_i query[c], for channels from `start`.

    With COSINE also total_along[i] += sum over these discs of grad_c_i c_i.

    Args:
        cells: rows and columns of the cells of the tile that starts at `tile`; grid: numbers of rows and columns.
        entries: query, centre and patch of each entry of the frame, and where the columns of each band begin.
        disc: reach in y and x, patch in y and x, all in cells, and the exclusive bound of the squared distance.
        vectors: the queries, their inverse norms, the stride of queries in UNITs, and the number of channels.
    """
    y, x = cells
    y0, x0 = tile
    h, w = grid
    order, centres, patches, starts = entries
    reach_y, reach_x, patch_h, patch_w, limit = disc
    queries, inverse_norm, stride_n, C = vectors
    first_column = tl.maximum(x0 - reach_x, 0)
    last_column = tl.minimum(x0 + TILE_W - 1 + reach_x, w - 1)
    first_band = tl.maximum(y0 - reach_y, 0) // BAND
    last_band = tl.minimum(y0 + TILE_H - 1 + reach_y, h - 1) // BAND
    starts += first_column
    columns = last_column + 1 - first_column
    for band in tl.range(first_band, last_band + 1, num_stages=1):
        begin = tl.load(starts + band * w)
        stop = tl.load(starts + band * w + columns)
        for first in tl.range(begin, stop, BLOCK_N, num_stages=1):  # totals: of the entries before first
            entry = first + tl.arange(0, BLOCK_N)
            clipped = tl.minimum(entry, stop - 1)
            n = tl.load(order + clipped)
            centre = tl.load(centres + clipped)
            row = centre // w
            column = centre - row * w
            inside = in_disc(y, x, row, column, h, w, limit) & (entry < stop)[None, :]
            patch = patches + entry.to(tl.int64) * (patch_h * patch_w * (2 if COSINE else 1))
            patch -= _patch_start(row, column, reach_y, reach_x, patch_h, patch_w, h, w)
            place = patch[None, :] + (y * patch_w + x)[:, None]
            grad = tl.load(place, mask=inside, other=0.0)
            if COSINE:
                total_along += tl.sum(tl.load(place + patch_h * patch_w, mask=inside, other=0.0), 1)
                grad = grad * tl.load(inverse_norm + n)[None, :]
            rows = load_channels(queries + n * stride_n * UNIT, start, C, BLOCK_C)
            # A query with a NaN or infinity has NaN gradients in its disc, and must not reach the tile's other cells.
            rows = tl.where(rows * 0.0 == 0.0, rows, 0.0)
            total = gradient_product(grad, rows, total, PRECISION)
    return total, total_along


@triton.jit
def _disc_of_group(group, reach_y, reach_x, patch_h, patch_w, limit):
    """Reach, patch and limit of `_add_discs`: those given for group 0, of a single cell for group 1."""
    if group == 0:
        limit = limit.to(tl.uint32)
    else:
        reach_y = 0
        reach_x = 0
        patch_h = 1
        patch_w = 1
        limit = tl.full([], 1, tl.uint32)
    return reach_y, reach_x, patch_h, patch_w, limit


@triton.jit
def _inner_products_with_one(vectors, other, C, BLOCK_C: tl.constexpr):
    """`[vectors]`: their products with the vector of accumulators at `other`."""
    total = tl.zeros(vectors.shape, other.dtype.element_ty)
    for start in tl.range(0, C, BLOCK_C, num_stages=1):  # total: products of the channels below start
        channel = start + tl.arange(0, BLOCK_C)
        row = tl.load(other + channel, mask=channel < C, other=0.0)
        total += tl.sum(load_channels(vectors, start, C, BLOCK_C).to(total.dtype) * row[None, :], 1)
    return total


# grad_u_i       = sum over queries of grad_c_i query + grad_mean, with COSINE of the normalised query
# grad_feature_i = grad_u_i; with COSINE, where u_i = feature_i inverse_norm_i,
#                  (grad_u_i - u_i (u_i . grad_u_i)) inverse_norm_i,
#                  u_i . grad_u_i = sum over queries of grad_c_i c_i + u_i . grad_mean
@kernel
def correlation_soft_argmax_bwd_kernel_features(
    query, features, query_inverse_norm, features_inverse_norm, order, centres, starts, patches, grad_mean,
    grad_features,
    T: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32, C: tl.int32, frames: tl.int32, first_frame: tl.int32,
    first_group: tl.int32, groups: tl.int32, has_mean: tl.int32, reach_y: tl.int32, reach_x: tl.int32,
    patch_h: tl.int32, patch_w: tl.int32, limit: tl.uint32, minima: tl.int64, all_frames: tl.int32,
    longest: tl.float64,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BAND: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a tile of cells of one frame. grad_mean `[B, T, C]` is added to every cell of a frame.

    Entries are `[2, B, T, N]`: group 0 are the discs, group 1 the cells of the minima, which are discs of one cell.
    The patches of group 1 start `minima` numbers behind those of group 0. Features shorter than sqrt(eps) have an
    inverse norm of `longest` or more, which is constant.
    """
    ACC: tl.constexpr = grad_mean.dtype.element_ty
    tiles_x = tl.cdiv(w, TILE_W)
    tiles_y = tl.cdiv(h, TILE_H)
    local_frame = tl.program_id(0) // (tiles_y * tiles_x)
    number = tl.program_id(0) - local_frame * (tiles_y * tiles_x)
    y0 = number // tiles_x * TILE_H
    x0 = number % tiles_x * TILE_W
    b = local_frame // frames
    t = first_frame + local_frame - b * frames
    frame = b * T + t
    y, x = discs.tile(y0, x0, TILE_H, TILE_W)
    exists = (y < h) & (x < w)
    clipped_y = tl.minimum(y, h - 1)
    clipped_x = tl.minimum(x, w - 1)
    C = C * UNIT
    query += b.to(tl.int64) * stride_qb * UNIT
    query_inverse_norm += b.to(tl.int64) * N
    features += (b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t) * UNIT
    cells = cell_addresses(features, clipped_y, clipped_x, stride_y, stride_x)
    cell = frame.to(tl.int64) * h * w + clipped_y.to(tl.int64) * w + clipped_x
    grad_cells = grad_features + cell * C
    grad_mean += frame.to(tl.int64) * C
    factor = tl.zeros([TILE_H * TILE_W], ACC)
    mean_along = tl.zeros([TILE_H * TILE_W], ACC)
    if COSINE:
        factor = tl.load(features_inverse_norm + cell)
        if has_mean:
            mean_along = _inner_products_with_one(cells, grad_mean, C, BLOCK_C) * factor

    for start in tl.range(0, C, BLOCK_C, num_stages=1):  # grad_features has the channels below start
        channel = start + tl.arange(0, BLOCK_C)
        total = tl.zeros([TILE_H * TILE_W, BLOCK_C], ACC)
        if has_mean:
            total += tl.load(grad_mean + channel, mask=channel < C, other=0.0)[None, :]
        along = mean_along
        for group in tl.range(first_group, groups, num_stages=1):  # total, along: of the groups before this one
            disc = _disc_of_group(group, reach_y, reach_x, patch_h, patch_w, limit)
            # No division of 64-bit numbers here: it would spill the registers around it.
            place = (group * all_frames + frame).to(tl.int64)
            size = disc[2] * disc[3] * (2 if COSINE else 1)
            patch = patches + group * minima + local_frame.to(tl.int64) * N * size
            entries = (order + place * N, centres + place * N, patch, starts + place * (tl.cdiv(h, BAND) * w + 1))
            total, along = _add_discs(
                total, along, (y, x), (y0, x0), start, entries, disc, (query, query_inverse_norm, stride_qn, C),
                (h, w), COSINE, BAND, BLOCK_N, TILE_H, TILE_W, BLOCK_C, PRECISION,
            )  # fmt: skip
        if COSINE:
            along = tl.where(factor < tl.full([], longest, ACC), along, 0.0)
            tile = load_channels(cells, start, C, BLOCK_C).to(ACC)
            total = (total - tile * (factor * along)[:, None]) * factor[:, None]
        mask = exists[:, None] & (channel < C)[None, :]
        addresses = tl.multiple_of(grad_cells[:, None] + channel[None, :], (1, 16))
        tl.store(addresses, total.to(grad_features.dtype.element_ty), mask=mask)
