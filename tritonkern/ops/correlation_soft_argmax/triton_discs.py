"""Triton kernels that meet only the cells of discs: points, and gradients.

A disc has up to 69 cells at the usual radius, and one by one every query would fetch them all. So the queries of each
frame are sorted by where their discs lie: by band of BAND rows, and by column inside a band. A few queries in that
order ("entries") cover a small box of cells together; the box is fetched once for all of them, in tiles, and tensor
cores multiply it. Any order gives the right result; this one is fast. And the entries whose disc can reach a given tile
of cells are one run in every band, whose ends `starts` knows, so that the gradient of a cell is summed in one place,
in the order of the entries, without atomic additions.
"""

import triton
import triton.language as tl

from tritonkern.ops.correlation_soft_argmax import triton_tiles as tiles
from tritonkern.ops.correlation_soft_argmax.triton_tiles import UNIT


@triton.jit
def _entries(order, centres, frame, b, t, first, N, T, w, BLOCK_N: tl.constexpr):
    """Query, place in a `[B, N, T]`, row and column of the centre of a block of entries; the last one is repeated."""
    entry = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    n = tl.load(order + frame.to(tl.int64) * N + entry).to(tl.int32)
    pair = (b.to(tl.int64) * N + n) * T + t
    centre = tl.load(centres + pair)
    row = centre // w
    return n, pair, row, centre - row * w


@triton.jit
def _tile(y0, x0, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Row and column of the cells of a tile."""
    place = tl.arange(0, TILE_H * TILE_W)
    return y0 + place // TILE_W, x0 + place % TILE_W


@triton.jit
def _box(row, column, reach_y, reach_x, h, w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """From which rows and columns to which the discs of a block reach.

    It begins where a tile of the whole grid does: the sums of a query then do not depend on its neighbours' discs.
    """
    top = tl.maximum(tl.min(row, 0) - reach_y, 0) // TILE_H * TILE_H
    left = tl.maximum(tl.min(column, 0) - reach_x, 0) // TILE_W * TILE_W
    bottom = tl.minimum(tl.max(row, 0) + reach_y, h - 1) + 1
    right = tl.minimum(tl.max(column, 0) + reach_x, w - 1) + 1
    return top, left, bottom, right


@triton.jit
def _scores(
    frame, frame_scale, y, x, rows, row_scale, h, w, C, stride_y, stride_x,
    COSINE: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Correlation `[cells, queries]`, and the addresses and scales of the cells; cells beyond the grid are others."""
    y = tl.minimum(y, h - 1)
    x = tl.minimum(x, w - 1)
    cells = tiles.cell_addresses(frame, y, x, stride_y, stride_x)
    score = tiles.inner_products(cells, rows, C, BLOCK_C, PRECISION, STAGES)
    cell_scale = tl.zeros(y.shape, score.dtype)
    if COSINE:
        cell_scale = tl.load(frame_scale + y.to(tl.int64) * w + x)
        score = score * row_scale[None, :] * cell_scale[:, None]
    return score, cells, cell_scale


@triton.jit(do_not_specialize=range(24))
def points_kernel(
    query, features, query_scale, features_scale, order, best, maximum, points, weight,
    T: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32, C: tl.int32,
    reach_y: tl.int32, reach_x: tl.int32, limit: tl.uint32, temperature: tl.float64,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = maximum.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_N)
    frame = tl.program_id(0) // blocks
    first = (tl.program_id(0) - frame * blocks) * BLOCK_N
    b = frame // T
    t = frame - b * T
    n, pair, row, column = _entries(order, best, frame, b, t, first, N, T, w, BLOCK_N)
    rows = query + (b.to(tl.int64) * stride_qb + n.to(tl.int64) * stride_qn) * UNIT
    features += (b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t) * UNIT
    features_scale += frame.to(tl.int64) * h * w
    row_scale = tl.zeros([BLOCK_N], ACC)
    if COSINE:
        row_scale = tl.load(query_scale + b.to(tl.int64) * N + n)
    highest = tl.load(maximum + pair)
    temperature = tl.full([], temperature, ACC)

    # Offsets from the best cell: sums of these lose less than sums of coordinates.
    sums = highest * 0.0  # NaN where any cell of the frame breaks the softmax
    across = tl.zeros([BLOCK_N], ACC)
    down = tl.zeros([BLOCK_N], ACC)
    top, left, bottom, right = _box(row, column, reach_y, reach_x, h, w, TILE_H, TILE_W)
    for y0 in tl.range(top, bottom, TILE_H, num_stages=1):
        for x0 in tl.range(left, right, TILE_W, num_stages=1):
            if tiles.touches(y0, x0, row, column, reach_y, reach_x, TILE_H, TILE_W):
                y, x = _tile(y0, x0, TILE_H, TILE_W)
                score, _, _ = _scores(
                    features, features_scale, y, x, rows, row_scale, h, w, C * UNIT, stride_y, stride_x,
                    COSINE, BLOCK_C, PRECISION, STAGES,
                )  # fmt: skip
                inside = tiles.kept(y, x, row, column, h, w, limit)
                here = tl.where(inside, tl.exp(temperature * (score - highest[None, :])), 0.0)
                sums += tl.sum(here, 0)
                across += tl.sum(here * (x[:, None] - column[None, :]).to(ACC), 0)
                down += tl.sum(here * (y[:, None] - row[None, :]).to(ACC), 0)

    present = first + tl.arange(0, BLOCK_N) < N
    tl.store(points + pair * 2, column.to(ACC) + 0.5 + across / sums, mask=present)
    tl.store(points + pair * 2 + 1, row.to(ACC) + 0.5 + down / sums, mask=present)
    tl.store(weight + pair, sums, mask=present)


@triton.jit(do_not_specialize=range(35))
def query_gradient_kernel(
    query, features, query_scale, features_scale, order, centres, points, maximum, weight, grad_points, grad_centre,
    patches, grad_query,
    T: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32, C: tl.int32, frames: tl.int32, first_frame: tl.int32,
    has_points: tl.int32, has_centre: tl.int32, reach_y: tl.int32, reach_x: tl.int32, patch_h: tl.int32,
    patch_w: tl.int32, limit: tl.uint32, plane: tl.int64, temperature: tl.float64,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the costs of every disc, left in `patches [B, frames, N, patch_h, patch_w]`, and added to grad_query.

    With `cosine`, of the normalised query, and a second plane of patches has that gradient times the cost.
    """
    ACC: tl.constexpr = maximum.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_N)
    local_frame = tl.program_id(0) // blocks
    first = (tl.program_id(0) - local_frame * blocks) * BLOCK_N
    b = local_frame // frames
    t = first_frame + local_frame - b * frames
    frame = b * T + t
    n, pair, row, column = _entries(order, centres, frame, b, t, first, N, T, w, BLOCK_N)
    entry = first + tl.arange(0, BLOCK_N)
    present = entry < N
    rows = query + (b.to(tl.int64) * stride_qb + n.to(tl.int64) * stride_qn) * UNIT
    features += (b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t) * UNIT
    features_scale += frame.to(tl.int64) * h * w
    row_scale = tl.zeros([BLOCK_N], ACC)
    if COSINE:
        row_scale = tl.load(query_scale + b.to(tl.int64) * N + n)
    C = C * UNIT
    grad_rows = grad_query + (b.to(tl.int64) * N + n) * C
    patch_rows = patches + (local_frame.to(tl.int64) * N + entry) * (patch_h * patch_w)

    temperature = tl.full([], temperature, ACC)

    top, left, bottom, right = _box(row, column, reach_y, reach_x, h, w, TILE_H, TILE_W)
    for y0 in tl.range(top, bottom, TILE_H, num_stages=1):
        for x0 in tl.range(left, right, TILE_W, num_stages=1):
            if tiles.touches(y0, x0, row, column, reach_y, reach_x, TILE_H, TILE_W):
                y, x = _tile(y0, x0, TILE_H, TILE_W)
                score, cells, cell_scale = _scores(
                    features, features_scale, y, x, rows, row_scale, h, w, C, stride_y, stride_x,
                    COSINE, BLOCK_C, PRECISION, STAGES,
                )  # fmt: skip
                inside = tiles.kept(y, x, row, column, h, w, limit) & present[None, :]
                grad = tl.zeros(score.shape, ACC)
                # What belongs to a query is loaded again for each tile: kept, it would not fit into the registers.
                if has_points:
                    highest = tl.load(maximum + pair)
                    across = (x.to(ACC) + 0.5)[:, None] - tl.load(points + pair * 2)[None, :]
                    down = (y.to(ACC) + 0.5)[:, None] - tl.load(points + pair * 2 + 1)[None, :]
                    along = across * tl.load(grad_points + pair * 2)[None, :]
                    along += down * tl.load(grad_points + pair * 2 + 1)[None, :]
                    here = tl.exp(temperature * (score - highest[None, :])) / tl.load(weight + pair)[None, :]
                    grad = tl.where(inside, temperature * here * along, 0.0)
                if has_centre:
                    centre = inside & (y[:, None] == row[None, :]) & (x[:, None] == column[None, :])
                    # A query that is not finite must not look like a finite gradient in the other kernel.
                    grad = tl.where(centre, grad + (tl.load(grad_centre + pair)[None, :] + score * 0.0), grad)
                patch_y = tl.minimum(tl.maximum(row - reach_y, 0), h - patch_h)
                patch_x = tl.minimum(tl.maximum(column - reach_x, 0), w - patch_w)
                place = (y[:, None] - patch_y[None, :]) * patch_w + (x[:, None] - patch_x[None, :])
                tl.store(patch_rows[None, :] + place, grad, mask=inside)
                if COSINE:
                    tl.store(patch_rows[None, :] + plane + place, grad * score, mask=inside)
                    grad = grad * cell_scale[:, None]
                for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
                    channel = start + tl.arange(0, BLOCK_C)
                    tile = tiles.load_channels(cells, start, C, BLOCK_C)
                    add = tl.zeros([BLOCK_N, BLOCK_C], ACC)
                    add = tiles.gradient_product(tl.trans(grad), tile, add, PRECISION)
                    mask = present[:, None] & (channel < C)[None, :]
                    tl.atomic_add(grad_rows[:, None] + channel[None, :], add, mask=mask, sem="relaxed")


@triton.jit
def _add_discs(
    total, total_along, group, y, x, y0, x0, start, patches, order, centres, starts, rows, row_scale, b, t,
    frame, local_frame, all_frames, T, N, h, w, C, reach_y, reach_x, patch_h, patch_w, limit, plane, pairs, stride_n,
    COSINE: tl.constexpr, BAND: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what all discs that reach into a tile leave there, for the channels from `start` on.

    Group 0 is the discs, group 1 the cells of the minima, which are discs of one cell. `pairs` is B T N, and `plane` is
    the number of patches in this launch; no division of 64-bit numbers here, it spills the registers around it.
    """
    if group == 0:
        plane *= patch_h * patch_w
    else:
        order += pairs
        centres += pairs
        starts += all_frames.to(tl.int64) * (tl.cdiv(h, BAND) * w + 1)
        patches += plane * (patch_h * patch_w) * (2 if COSINE else 1)
        reach_y = 0
        reach_x = 0
        patch_h = 1
        patch_w = 1
        limit = tl.full([], 1, tl.uint32)
    starts += frame.to(tl.int64) * (tl.cdiv(h, BAND) * w + 1)
    first_band = tl.maximum(y0 - reach_y, 0) // BAND
    last_band = tl.minimum(y0 + TILE_H - 1 + reach_y, h - 1) // BAND
    first_column = tl.maximum(x0 - reach_x, 0)
    last_column = tl.minimum(x0 + TILE_W - 1 + reach_x, w - 1)
    for band in tl.range(first_band, last_band + 1, num_stages=1):
        begin = tl.load(starts + band * w + first_column)
        stop = tl.load(starts + band * w + last_column + 1)
        for first in tl.range(begin, stop, BLOCK_N, num_stages=1):
            n, _, row, column = _entries(order, centres, frame, b, t, first, N, T, w, BLOCK_N)
            entry = first + tl.arange(0, BLOCK_N)
            inside = tiles.kept(y, x, row, column, h, w, limit) & (entry < stop)[None, :]
            patch_y = tl.minimum(tl.maximum(row - reach_y, 0), h - patch_h)
            patch_x = tl.minimum(tl.maximum(column - reach_x, 0), w - patch_w)
            patch = patches + (local_frame.to(tl.int64) * N + entry) * (patch_h * patch_w)
            place = (y[:, None] - patch_y[None, :]) * patch_w + (x[:, None] - patch_x[None, :])
            grad = tl.load(patch[None, :] + place, mask=inside, other=0.0)
            if COSINE:
                along = tl.load(patch[None, :] + plane + place, mask=inside, other=0.0)
                total_along += tl.sum(along, 1)
                grad = grad * tl.load(row_scale + b.to(tl.int64) * N + n)[None, :]
            vectors = rows + n.to(tl.int64) * stride_n * UNIT
            tile = tiles.load_channels(vectors, start, C, BLOCK_C)
            # A query with a NaN or infinity has NaN gradients in its disc, and must not reach the tile's other cells.
            tile = tl.where(tile * 0.0 == 0.0, tile, 0.0)
            total = tiles.gradient_product(grad, tile, total, PRECISION)
    return total, total_along


@triton.jit(do_not_specialize=range(35))
def features_gradient_kernel(
    query, features, query_scale, features_scale, order, centres, starts, patches, grad_mean, grad_features,
    T: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32, C: tl.int32, frames: tl.int32, first_frame: tl.int32,
    first_group: tl.int32, groups: tl.int32, has_mean: tl.int32, reach_y: tl.int32, reach_x: tl.int32,
    patch_h: tl.int32, patch_w: tl.int32, limit: tl.uint32, plane: tl.int64, pairs: tl.int64, all_frames: tl.int32,
    longest_scale: tl.float64,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BAND: tl.constexpr, BLOCK_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the features of a tile of cells; grad_mean `[B, T, C]` is what every cell of a frame gets."""
    ACC: tl.constexpr = grad_mean.dtype.element_ty
    tiles_x = tl.cdiv(w, TILE_W)
    tiles_a_frame = tl.cdiv(h, TILE_H) * tiles_x
    local_frame = tl.program_id(0) // tiles_a_frame
    number = tl.program_id(0) - local_frame * tiles_a_frame
    y0 = number // tiles_x * TILE_H
    x0 = number % tiles_x * TILE_W
    b = local_frame // frames
    t = first_frame + local_frame - b * frames
    frame = b * T + t
    y, x = _tile(y0, x0, TILE_H, TILE_W)
    exists = (y < h) & (x < w)
    clipped_y = tl.minimum(y, h - 1)
    clipped_x = tl.minimum(x, w - 1)
    C = C * UNIT
    rows = query + b.to(tl.int64) * stride_qb * UNIT
    features += (b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t) * UNIT
    cells = tiles.cell_addresses(features, clipped_y, clipped_x, stride_y, stride_x)
    cell = frame.to(tl.int64) * h * w + clipped_y.to(tl.int64) * w + clipped_x
    grad_cells = grad_features + cell * C
    grad_mean += frame.to(tl.int64) * C
    scale = tl.zeros([TILE_H * TILE_W], ACC)
    mean_along = tl.zeros([TILE_H * TILE_W], ACC)
    if COSINE:
        scale = tl.load(features_scale + cell)
        if has_mean:
            for start in tl.range(0, C, BLOCK_C, num_stages=1):
                channel = start + tl.arange(0, BLOCK_C)
                mean = tl.load(grad_mean + channel, mask=channel < C, other=0.0)
                tile = tiles.load_channels(cells, start, C, BLOCK_C).to(ACC)
                mean_along += tl.sum(tile * mean[None, :], 1) * scale

    for start in tl.range(0, C, BLOCK_C, num_stages=1):
        channel = start + tl.arange(0, BLOCK_C)
        total = tl.zeros([TILE_H * TILE_W, BLOCK_C], ACC)
        if has_mean:
            total += tl.load(grad_mean + channel, mask=channel < C, other=0.0)[None, :]
        along = mean_along
        for group in tl.range(first_group, groups, num_stages=1):
            total, along = _add_discs(
                total, along, group, y, x, y0, x0, start, patches, order, centres, starts, rows, query_scale, b, t,
                frame, local_frame, all_frames, T, N, h, w, C, reach_y, reach_x, patch_h, patch_w, limit, plane, pairs,
                stride_qn,
                COSINE, BAND, BLOCK_N, TILE_H, TILE_W, BLOCK_C, PRECISION,
            )  # fmt: skip
        if COSINE:
            # Vectors shorter than sqrt(eps) have a constant scale.
            along = tl.where(scale < tl.full([], longest_scale, ACC), along * scale * scale, 0.0)
            tile = tiles.load_channels(cells, start, C, BLOCK_C).to(ACC)
            total = total * scale[:, None] - tile * along[:, None]
        mask = exists[:, None] & (channel < C)[None, :]
        addresses = tl.multiple_of(grad_cells[:, None] + channel[None, :], (1, 16))
        tl.store(addresses, total.to(grad_features.dtype.element_ty), mask=mask)
