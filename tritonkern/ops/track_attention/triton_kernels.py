"""Triton kernels of track attention, forward and backward, and their launchers.

A program owns one block of rows (or of columns) of one head of one frame and reads the blocks of the other side that
are on its list (triton_culling.py). Cells and tracks differ only in how a block is numbered (triton_geometry.py), so
that sampling and splatting are the same kernels. With rows i, columns j and n(i) the column nearest to row i:

    distance[i, j] = |P[i] - C[j]|^2 - |P[i] - C[n(i)]|^2                                    squared cells, at least 0
    p[i, :]        = softmax_j(scale * query[i] . key[j] - inverse_variance * distance[i, j])

Backward computes the softmax again, because a rounded output or log-sum-exp is not exact enough for sums that cancel.
One kernel owns rows: it finds the maximum, sum and mean gradient of each, and computes the gradients of queries. The
other owns columns and computes those of keys and values. Every number is written by one program, in a fixed order, so
that the same inputs give the same bits.

16-bit tiles and TF32 tiles are held whole. Exact float32 goes through products of a few channels at a time.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._triton import Launch, aligned, block_size, kernel, product, register_limit
from tritonkern.ops.track_attention import configs
from tritonkern.ops.track_attention import triton_culling as culled
from tritonkern.ops.track_attention import triton_geometry as geometry
from tritonkern.ops.track_attention.op import Points, empty_gradients


@triton.jit
def _inner(
    a, b, a_vectors, b_vectors, a_visible, b_visible,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[len(a), len(b)]` of inner products of two tiles, or of the vectors where tiles are not held."""
    if BLOCK_C < BLOCK_D:
        total = tl.zeros([a_vectors.shape[0], b_vectors.shape[0]], tl.float32)
        # `total` is the sum over the channels before `start`.
        for start in tl.range(0, D, BLOCK_C, num_stages=1):
            left = geometry.load(a_vectors, a_visible, start, D, BLOCK_C)
            right = geometry.load(b_vectors, b_visible, start, D, BLOCK_C)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
        return total
    elif a.dtype == tl.float64:
        return tl.sum(a[:, None, :] * b[None, :, :], 2)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def _weight(score, maximum, penalty):
    """exp(score - penalty - maximum). Large scores lose their common part first, which rounds nothing away."""
    return tl.exp((score - maximum) - penalty)


@triton.jit
def _lowest(ROWS: tl.constexpr, ACC: tl.constexpr):
    """Start of a running maximum. Finite, because -inf - -inf is NaN where a row takes nothing of a block."""
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    return tl.full([ROWS], LOWEST, ACC)


@triton.jit
def _rows(block, scene, SPLAT: tl.constexpr, ROWS: tl.constexpr, TILE_W: tl.constexpr):
    """Row and column in the tensor, which exist, and (position, position of the nearest column, which take part)."""
    y, x, px, py, in_range, visible = geometry.members(block, scene, SPLAT, ROWS, TILE_W)
    _, _, nx, ny = geometry.nearest_column(y, x, px, py, visible, scene, SPLAT)
    return y, x, in_range, (px, py, nx, ny, visible)


@triton.jit
def _penalty(rows, cx, cy, visible, inverse_variance):
    """distance and inverse_variance * distance, `[rows, columns]`; infinite for columns that take no part."""
    px, py, nx, ny, _ = rows
    distance = geometry.relative_distance(px[:, None], py[:, None], nx[:, None], ny[:, None], cx[None, :], cy[None, :])
    return distance, tl.where(visible[None, :], inverse_variance * distance, float("inf"))


# out[i] = sum_j p[i, j] value[j], with an online softmax.
@kernel
def track_attention_fwd_kernel(
    query, key, value, out, order, positions, num_visible, nearest, inverse_variance, lists, counts,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vy: tl.int64, stride_vx: tl.int64, stride_vh: tl.int64,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = positions.dtype.element_ty
    HELD: tl.constexpr = BLOCK_C == BLOCK_D
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), row_blocks, order, positions, num_visible, nearest, T, H, M, h, w
    )
    y, x, in_range, rows = _rows(block, scene, SPLAT, ROWS, TILE_W)
    visible = rows[4]
    q_frame = geometry.frame_of((query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh), b, t, head)
    k_frame = geometry.frame_of((key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh), b, t, head)
    v_frame = geometry.frame_of((value, stride_vb, stride_vt, stride_vy, stride_vx, stride_vh), b, t, head)
    q_rows = geometry.vectors(q_frame, y, x)
    q = geometry.load_if(q_rows, visible, D, BLOCK_D, HELD)
    scale = tl.full([], scale, ACC)
    inverse_variance = tl.load(inverse_variance)
    total = tl.zeros([ROWS, BLOCK_D], ACC)
    weights = tl.zeros([ROWS], ACC)
    maximum = _lowest(ROWS, ACC)
    owned = place * row_blocks + block
    # Over the blocks before n: `maximum` of the scores, `weights` = sum of exp(score - maximum), `total` = the same sum
    # of exp(score - maximum) * value.
    for n in tl.range(0, tl.load(counts + owned), num_stages=STAGES):
        other = tl.load(lists + owned * column_blocks + n).to(tl.int32)
        ky, kx, cx, cy, _, other_visible = geometry.members(other, scene, not SPLAT, COLUMNS, TILE_W)
        k_rows = geometry.vectors(k_frame, ky, kx)
        k = geometry.load_if(k_rows, other_visible, D, BLOCK_D, HELD)
        v = geometry.load(geometry.vectors(v_frame, ky, kx), other_visible, 0, D, BLOCK_D)
        score = _inner(q, k, q_rows, k_rows, visible, other_visible, D, BLOCK_D, BLOCK_C, PRECISION) * scale
        _, penalty = _penalty(rows, cx, cy, other_visible, inverse_variance)
        new_maximum = tl.maximum(maximum, tl.max(score - penalty, 1))
        weight = _weight(score, new_maximum[:, None], penalty)
        rescale = tl.exp(maximum - new_maximum)
        maximum = new_maximum
        weights = weights * rescale + tl.sum(weight, 1)
        total = product(weight, v, total * rescale[:, None], PRECISION)
    # Rows that take part have a column, and divide by zero only where all scores are -inf; others are zero.
    total = tl.where(visible[:, None], total / tl.where(visible, weights, 1.0)[:, None], 0.0)
    geometry.store(geometry.contiguous(out, place, head, y, x, scene, SPLAT, H, D), in_range, total, D, BLOCK_D)


@triton.jit
def _pairs(
    other, scene, rows, row_tensors, column_frames, scale, inverse_variance,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of columns is to a block of rows: score, penalty, distance and grad_out . value, each
    `[rows, columns]`; positions, keys (or their addresses where tiles are not held) and their mask."""
    HELD: tl.constexpr = BLOCK_C == BLOCK_D
    q, g, q_rows, g_rows = row_tensors
    k_frame, v_frame = column_frames
    ky, kx, cx, cy, _, other_visible = geometry.members(other, scene, not SPLAT, COLUMNS, TILE_W)
    k_rows = geometry.vectors(k_frame, ky, kx)
    v_rows = geometry.vectors(v_frame, ky, kx)
    k = geometry.load_if(k_rows, other_visible, D, BLOCK_D, HELD)
    v = geometry.load_if(v_rows, other_visible, D, BLOCK_D, HELD)
    score = _inner(q, k, q_rows, k_rows, rows[4], other_visible, D, BLOCK_D, BLOCK_C, PRECISION) * scale
    distance, penalty = _penalty(rows, cx, cy, other_visible, inverse_variance)
    grad_weight = _inner(g, v, g_rows, v_rows, rows[4], other_visible, D, BLOCK_D, BLOCK_C, PRECISION)
    return score, penalty, distance, grad_weight, cx, cy, k, other_visible


@triton.jit
def _statistics(
    lists, count, scene, rows, row_tensors, column_frames, scale, inverse_variance,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each row's largest score, 1 / sum of exp(score - maximum), and mean[i] = sum_j p[i, j] grad_out[i] . value[j]."""
    ACC: tl.constexpr = scale.dtype
    maximum = _lowest(ROWS, ACC)
    weights = tl.zeros([ROWS], ACC)
    mean = tl.zeros([ROWS], ACC)
    # The three over the blocks before n; `mean` not yet divided by `weights`.
    for n in tl.range(0, count, num_stages=STAGES):
        score, penalty, _, grad_weight, _, _, _, _ = _pairs(
            tl.load(lists + n).to(tl.int32), scene, rows, row_tensors, column_frames, scale, inverse_variance,
            SPLAT, D, BLOCK_D, BLOCK_C, COLUMNS, TILE_W, PRECISION,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(score - penalty, 1))
        weight = _weight(score, new_maximum[:, None], penalty)
        rescale = tl.exp(maximum - new_maximum)
        maximum = new_maximum
        weights = weights * rescale + tl.sum(weight, 1)
        mean = mean * rescale + tl.sum(weight * grad_weight, 1)
    inverse = 1.0 / tl.where(rows[4], weights, 1.0)
    return maximum, inverse, mean * inverse


# grad_score[i, j] = p[i, j] (grad_out[i] . value[j] - mean[i]),   grad_query[i] = scale * sum_j grad_score[i, j] key[j]
# distance_sums[i] = -sum_j grad_score[i, j] distance[i, j]        of one head, for the gradient of the inverse variance
# offset_sums[i]   =  sum_j grad_score[i, j] (C[n(i)] - C[j])      of one head, for the gradient of tracks when sampling
@kernel
def track_attention_bwd_kernel_query(
    grad_out, query, key, value, grad_query, statistics, offset_sums, distance_sums,
    order, positions, num_visible, nearest, inverse_variance, lists, counts,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vy: tl.int64, stride_vx: tl.int64, stride_vh: tl.int64,
    SPLAT: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Also stores each row's statistics (maximum, 1 / sum, mean) for the other kernel. `POINTS`: whether gradients of
    tracks or the inverse variance are wanted."""
    ACC: tl.constexpr = positions.dtype.element_ty
    HELD: tl.constexpr = BLOCK_C == BLOCK_D
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), row_blocks, order, positions, num_visible, nearest, T, H, M, h, w
    )
    y, x, in_range, rows = _rows(block, scene, SPLAT, ROWS, TILE_W)
    _, _, nx, ny, visible = rows
    q_frame = geometry.frame_of((query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh), b, t, head)
    k_frame = geometry.frame_of((key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh), b, t, head)
    v_frame = geometry.frame_of((value, stride_vb, stride_vt, stride_vy, stride_vx, stride_vh), b, t, head)
    q_rows = geometry.vectors(q_frame, y, x)
    g_rows = geometry.contiguous(grad_out, place, head, y, x, scene, SPLAT, H, D)
    q = geometry.load_if(q_rows, visible, D, BLOCK_D, HELD)
    g = geometry.load_if(g_rows, visible, D, BLOCK_D, HELD)
    row_tensors, column_frames = (q, g, q_rows, g_rows), (k_frame, v_frame)
    scale = tl.full([], scale, ACC)
    inverse_variance = tl.load(inverse_variance)
    owned = place * row_blocks + block
    count = tl.load(counts + owned)
    lists += owned * column_blocks
    maximum, inverse, mean = _statistics(
        lists, count, scene, rows, row_tensors, column_frames, scale, inverse_variance,
        SPLAT, D, BLOCK_D, BLOCK_C, ROWS, COLUMNS, TILE_W, PRECISION, STAGES,
    )  # fmt: skip

    total = tl.zeros([ROWS, BLOCK_D], ACC)
    offset_x = tl.zeros([ROWS], ACC)
    offset_y = tl.zeros([ROWS], ACC)
    distances = tl.zeros([ROWS], ACC)
    # The sums of the formulas over the blocks before n.
    for n in tl.range(0, count, num_stages=STAGES):
        score, penalty, distance, grad_weight, cx, cy, k, other_visible = _pairs(
            tl.load(lists + n).to(tl.int32), scene, rows, row_tensors, column_frames, scale, inverse_variance,
            SPLAT, D, BLOCK_D, BLOCK_C, COLUMNS, TILE_W, PRECISION,
        )  # fmt: skip
        if not HELD:
            k = geometry.load(k, other_visible, 0, D, BLOCK_D)
        grad_score = _weight(score, maximum[:, None], penalty) * inverse[:, None] * (grad_weight - mean[:, None])
        total = product(grad_score, k, total, PRECISION)
        if POINTS:
            distances -= tl.sum(grad_score * distance, 1)
            if not SPLAT:
                # The gradients of a row's scores sum to zero, so that offsets may count from the nearest column.
                offset_x += tl.sum(grad_score * (nx[:, None] - cx[None, :]), 1)
                offset_y += tl.sum(grad_score * (ny[:, None] - cy[None, :]), 1)

    total = tl.where(visible[:, None], total * scale, 0.0)
    geometry.store(geometry.contiguous(grad_query, place, head, y, x, scene, SPLAT, H, D), in_range, total, D, BLOCK_D)
    number = place * (h * w if SPLAT else M) + y * w + x  # y is 0 for tracks
    tl.store(statistics + 3 * number, maximum, mask=in_range)
    tl.store(statistics + 3 * number + 1, inverse, mask=in_range)
    tl.store(statistics + 3 * number + 2, mean, mask=in_range)
    if POINTS:
        tl.store(distance_sums + number, tl.where(visible, distances, 0.0), mask=in_range)
        if not SPLAT:
            tl.store(offset_sums + 2 * number, tl.where(visible, offset_x, 0.0), mask=in_range)
            tl.store(offset_sums + 2 * number + 1, tl.where(visible, offset_y, 0.0), mask=in_range)


# grad_key[j]    = scale * sum_i grad_score[i, j] query[i],   grad_value[j] = sum_i p[i, j] grad_out[i]
# offset_sums[j] = sum_i grad_score[i, j] (P[i] - C[j])         of one head, for the gradient of tracks when splatting
@kernel
def track_attention_bwd_kernel_key_value(
    grad_out, query, key, value, grad_key, grad_value, statistics, offset_sums,
    order, positions, num_visible, nearest, inverse_variance, lists, counts,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vy: tl.int64, stride_vx: tl.int64, stride_vh: tl.int64,
    SPLAT: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns a block of columns and reads blocks of rows; scores are `[columns, rows]` here."""
    ACC: tl.constexpr = positions.dtype.element_ty
    HELD: tl.constexpr = BLOCK_C == BLOCK_D
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), column_blocks, order, positions, num_visible, nearest, T, H, M, h, w
    )
    ky, kx, cx, cy, in_range, visible = geometry.members(block, scene, not SPLAT, COLUMNS, TILE_W)
    q_frame = geometry.frame_of((query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh), b, t, head)
    k_frame = geometry.frame_of((key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh), b, t, head)
    v_frame = geometry.frame_of((value, stride_vb, stride_vt, stride_vy, stride_vx, stride_vh), b, t, head)
    k_rows = geometry.vectors(k_frame, ky, kx)
    v_rows = geometry.vectors(v_frame, ky, kx)
    k = geometry.load_if(k_rows, visible, D, BLOCK_D, HELD)
    v = geometry.load_if(v_rows, visible, D, BLOCK_D, HELD)
    scale = tl.full([], scale, ACC)
    inverse_variance = tl.load(inverse_variance)
    total_k = tl.zeros([COLUMNS, BLOCK_D], ACC)
    total_v = tl.zeros([COLUMNS, BLOCK_D], ACC)
    offset_x = tl.zeros([COLUMNS], ACC)
    offset_y = tl.zeros([COLUMNS], ACC)
    owned = place * column_blocks + block
    # The sums of the formulas over the blocks before n.
    for n in tl.range(0, tl.load(counts + owned), num_stages=STAGES):
        other = tl.load(lists + owned * row_blocks + n).to(tl.int32)
        y, x, _, rows = _rows(other, scene, SPLAT, ROWS, TILE_W)
        px, py, nx, ny, other_visible = rows
        q_rows = geometry.vectors(q_frame, y, x)
        g_rows = geometry.contiguous(grad_out, place, head, y, x, scene, SPLAT, H, D)
        q = geometry.load(q_rows, other_visible, 0, D, BLOCK_D)
        g = geometry.load(g_rows, other_visible, 0, D, BLOCK_D)
        number = 3 * (place * (h * w if SPLAT else M) + y * w + x)
        maximum = tl.load(statistics + number, mask=other_visible, other=0.0)
        inverse = tl.load(statistics + number + 1, mask=other_visible, other=0.0)
        mean = tl.load(statistics + number + 2, mask=other_visible, other=0.0)
        if query.dtype.element_ty.primitive_bitwidth == 16:
            score = _inner(k, q, k_rows, q_rows, visible, other_visible, D, BLOCK_D, BLOCK_C, PRECISION) * scale
            grad_weight = _inner(v, g, v_rows, g_rows, visible, other_visible, D, BLOCK_D, BLOCK_C, PRECISION)
        else:
            # Equal to the other kernel's to the bit, because its maximum and mean are used: a weight of one must be one
            # and have a gradient of zero, because a tiny sigma would magnify any other.
            score = (
                tl.trans(_inner(q, k, q_rows, k_rows, other_visible, visible, D, BLOCK_D, BLOCK_C, PRECISION)) * scale
            )
            grad_weight = tl.trans(_inner(g, v, g_rows, v_rows, other_visible, visible, D, BLOCK_D, BLOCK_C, PRECISION))
        distance = geometry.relative_distance(
            px[None, :], py[None, :], nx[None, :], ny[None, :], cx[:, None], cy[:, None]
        )
        penalty = tl.where(other_visible[None, :] & visible[:, None], inverse_variance * distance, float("inf"))
        weight = _weight(score, maximum[None, :], penalty) * inverse[None, :]
        total_v = product(weight, g, total_v, PRECISION)
        grad_score = weight * (grad_weight - mean[None, :])
        total_k = product(grad_score, q, total_k, PRECISION)
        if POINTS and SPLAT:
            offset_x += tl.sum(grad_score * (px[None, :] - cx[:, None]), 1)
            offset_y += tl.sum(grad_score * (py[None, :] - cy[:, None]), 1)

    # `where` and not a product, which would carry a NaN of the rows to columns that take no part.
    total_k = tl.where(visible[:, None], total_k * scale, 0.0)
    total_v = tl.where(visible[:, None], total_v, 0.0)
    result = geometry.contiguous(grad_key, place, head, ky, kx, scene, not SPLAT, H, D)
    geometry.store(result, in_range, total_k, D, BLOCK_D)
    result = geometry.contiguous(grad_value, place, head, ky, kx, scene, not SPLAT, H, D)
    geometry.store(result, in_range, total_v, D, BLOCK_D)
    if POINTS and SPLAT:
        number = place * M + kx
        tl.store(offset_sums + 2 * number, tl.where(visible, offset_x, 0.0), mask=in_range)
        tl.store(offset_sums + 2 * number + 1, tl.where(visible, offset_y, 0.0), mask=in_range)


def _constants(tiles: configs.Tiles, splat: bool, head_dim: int, dtype: torch.dtype) -> dict:
    rows, columns = (tiles.cells, tiles.tracks) if splat else (tiles.tracks, tiles.cells)
    return dict(
        SPLAT=splat, D=head_dim, BLOCK_D=block_size(head_dim), BLOCK_C=tiles.block_c, ROWS=rows, COLUMNS=columns,
        TILE_W=configs.tile_width(tiles.cells), STAGES=tiles.num_stages,
        PRECISION=tiles.precision if dtype == torch.float32 else "ieee",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **register_limit(),
    )  # fmt: skip


def forward(
    query: Tensor, key: Tensor, value: Tensor, points: Points, scale: float, splat: bool, culling: bool
) -> Tensor:
    """Output like query, contiguous."""
    H, D = query.shape[-2:]
    out = query.new_empty(query.shape)
    if out.numel() == 0 or points.tracks.shape[2] == 0:
        return out.zero_()
    (query, q), (key, k), (value, v) = map(geometry.readable, (query, key, value))
    scene = culled.scene(points, H, (query if splat else key).shape[2:4], splat)
    eps = torch.finfo(query.dtype).eps if culling else 0.0
    tf32 = query.dtype == torch.float32 and configs.tf32_allowed()
    tiles, attend = _forward_launch(scene.sizes, splat, scene.frames, D, query.dtype, tf32, (q, k, v), scale)
    met = culled.meetings(query, key, q, k, scene, scale, eps, tiles, False)
    attend(query, key, value, out, *scene.arguments(), scene.inverse_variance, met.lists, met.counts)
    return out


@functools.lru_cache(maxsize=1024)
def _forward_launch(
    sizes, splat: bool, frames: int, head_dim: int, dtype, tf32: bool, strides, scale: float
) -> tuple[configs.Tiles, Launch]:
    tiles = configs.forward_tiles(head_dim, dtype)
    row_blocks, column_blocks = culled.blocks(sizes, splat, tiles)
    (q, k, v), heads = strides, sizes[1]
    return tiles, Launch(
        track_attention_fwd_kernel, frames * heads * row_blocks,
        *sizes, row_blocks, column_blocks, scale, *q, *k, *v, **_constants(tiles, splat, head_dim, dtype),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _backward_launches(
    sizes, splat: bool, frames: int, head_dim: int, dtype, tf32: bool, strides, scale: float, points: bool
) -> tuple[configs.Tiles, Launch, Launch]:
    """Of the gradients of queries, and of keys and values."""
    tiles = configs.backward_tiles(head_dim, dtype)
    row_blocks, column_blocks = culled.blocks(sizes, splat, tiles)
    (q, k, v), heads = strides, sizes[1]
    numbers = (*sizes, row_blocks, column_blocks, scale, *q, *k, *v)
    constants = dict(POINTS=points, **_constants(tiles, splat, head_dim, dtype))
    of_query = Launch(track_attention_bwd_kernel_query, frames * heads * row_blocks, *numbers, **constants)
    of_key = Launch(track_attention_bwd_kernel_key_value, frames * heads * column_blocks, *numbers, **constants)
    return tiles, of_query, of_key


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    points: Points,
    scale: float,
    splat: bool,
    culling: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, tracks and inverse_variance; see `op.track_attention_bwd`."""
    B, T, M, H, D = *points.tracks.shape[:3], *query.shape[-2:]
    grads = empty_gradients(query, key, value, points, needs_grad)
    if query.numel() == 0 or key.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_query, grad_key, grad_value, grad_tracks, grad_inverse_variance = grads
    grad_out = aligned(grad_out)
    (query, q), (key, k), (value, v) = map(geometry.readable, (query, key, value))
    scene = culled.scene(points, H, (query if splat else key).shape[2:4], splat)
    of_points = True in needs_grad
    # The gradients of positions are in the accumulator's type.
    eps = torch.finfo((points.tracks if of_points else query).dtype).eps if culling else 0.0
    tf32 = query.dtype == torch.float32 and configs.tf32_allowed()
    tiles, query_gradient, key_value_gradient = _backward_launches(
        scene.sizes, splat, scene.frames, D, query.dtype, tf32, (q, k, v), scale, of_points
    )
    lists, counts, visits, list_visits = culled.meetings(query, key, q, k, scene, scale, eps, tiles, True)
    rows = query.shape[2] * query.shape[3]
    statistics = scene.positions.new_empty((B * T, H, rows, 3))
    offset_sums = scene.positions.new_empty((B * T, H, M, 2) if of_points else 0)
    distance_sums = scene.positions.new_empty((B * T, H, rows) if of_points else 0)
    where = (*scene.arguments(), scene.inverse_variance)
    query_gradient(
        grad_out, query, key, value, grad_query, statistics, offset_sums, distance_sums, *where, lists, counts
    )
    assert visits is not None
    del lists, counts  # in float64 they are most of the memory
    key_value_gradient(
        grad_out, query, key, value, grad_key, grad_value, statistics, offset_sums, *where,
        *culled.listed(visits, list_visits),
    )  # fmt: skip
    if needs_grad[0]:
        slope = (2 if splat else -2) * points.inverse_variance
        grad_tracks.copy_(slope * offset_sums.sum(1).view(points.tracks.shape))
    if needs_grad[1]:
        grad_inverse_variance.copy_(distance_sums.sum())
    return grads
