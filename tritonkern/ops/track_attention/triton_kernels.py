"""Triton kernels of track attention, forward and backward, and their launchers.

A program owns one block of rows (or of columns) of one head of one frame and meets the blocks of the other side that
are on its list (triton_culling.py); cells and tracks are only two ways to number a block (triton_geometry.py), so that
sampling and splatting are the same kernels. Backward makes the softmax anew, as a rounded output or log-sum-exp is not
exact enough for sums that cancel: one kernel owns rows, keeps maximum, sum and mean of each, and makes the gradients of
queries; the other owns columns and makes those of keys and values. Nothing is added to memory twice, so the same inputs
give the same bits.

Tiles of 16-bit numbers (and of TF32) are held whole. Exact float32 goes through products of a few channels at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops.track_attention import configs
from tritonkern.ops.track_attention import triton_culling as culled
from tritonkern.ops.track_attention import triton_geometry as geometry


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. No version of Triton has float64 products on every architecture, so these go without."""
    if b.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a.to(b.dtype), b, total, input_precision=PRECISION)


@triton.jit
def _inner(
    a, b, a_vectors, b_vectors, a_present, b_present,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[len(a), len(b)]` of inner products of two tiles, or of the vectors where tiles are not held."""
    if BLOCK_C < BLOCK_D:
        total = tl.zeros([a_vectors.shape[0], b_vectors.shape[0]], tl.float32)
        for start in tl.range(0, D, BLOCK_C, num_stages=1):
            left = geometry.load(a_vectors, a_present, start, D, BLOCK_C)
            right = geometry.load(b_vectors, b_present, start, D, BLOCK_C)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
        return total
    elif a.dtype == tl.float64:
        return tl.sum(a[:, None, :] * b[None, :, :], 2)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def _weight(product, highest, penalty):
    """Of a score, product - penalty; infinite penalties are those of pairs that do not meet. Large products lose their
    common part first, which rounds nothing away."""
    return tl.exp((product - highest) - penalty)


@triton.jit(do_not_specialize=range(36))
def forward_kernel(
    query, key, value, out, lse, order, points, seen, nearest, precision, lists, counts,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64, width: tl.int32,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vy: tl.int64, stride_vx: tl.int64, stride_vh: tl.int64,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    HELD: tl.constexpr = BLOCK_C == BLOCK_D
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), row_blocks, order, points, seen, nearest, T, H, M, h, w
    )
    rows = h * w if SPLAT else M
    y, x, px, py, exists, present = geometry.members(block, scene, SPLAT, ROWS, TILE_W)
    _, _, nx, ny = geometry.nearest_column(y, x, px, py, present, scene, SPLAT)
    q_frame = geometry.frame_of((query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh), b, t, head)
    k_frame = geometry.frame_of((key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh), b, t, head)
    v_frame = geometry.frame_of((value, stride_vb, stride_vt, stride_vy, stride_vx, stride_vh), b, t, head)
    q_rows = geometry.vectors(q_frame, y, x)
    q = geometry.load_if(q_rows, present, D, BLOCK_D, HELD)
    scale = tl.full([], scale, ACC)
    steepness = tl.load(precision)
    total = tl.zeros([ROWS, BLOCK_D], ACC)
    weights = tl.zeros([ROWS], ACC)
    # Finite, so that it is never -inf - -inf where a row meets nothing of a block.
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    highest = tl.full([ROWS], LOWEST, ACC)
    owned = place * row_blocks + block
    for n in tl.range(0, tl.load(counts + owned), num_stages=STAGES):
        other = tl.load(lists + owned * column_blocks + n).to(tl.int32)
        ky, kx, cx, cy, _there, there = geometry.members(other, scene, not SPLAT, COLUMNS, TILE_W)
        k_rows = geometry.vectors(k_frame, ky, kx)
        k = geometry.load_if(k_rows, there, D, BLOCK_D, HELD)
        v = geometry.load(geometry.vectors(v_frame, ky, kx), there, 0, D, BLOCK_D)
        product = _inner(q, k, q_rows, k_rows, present, there, D, BLOCK_D, BLOCK_C, PRECISION) * scale
        distance = geometry.further(px[:, None], py[:, None], nx[:, None], ny[:, None], cx[None, :], cy[None, :])
        penalty = tl.where(there[None, :], steepness * distance, float("inf"))
        new_highest = tl.maximum(highest, tl.max(product - penalty, 1))
        weight = _weight(product, new_highest[:, None], penalty)
        fade = tl.exp(highest - new_highest)
        highest = new_highest
        weights = weights * fade + tl.sum(weight, 1)
        total = _product(weight, v, total * fade[:, None], PRECISION)
    # Rows that take part meet a column, and divide by zero only where all scores are -inf; others are zero.
    total = tl.where(present[:, None], total / tl.where(present, weights, 1.0)[:, None], 0.0)
    result = geometry.contiguous(out, place, head, rows, width, H, D)
    geometry.store(geometry.vectors(result, y, x), exists, total, D, BLOCK_D)
    number = (place - head) * rows + (y * width + x).to(tl.int64) * H + head
    tl.store(lse + number, tl.where(present, highest + tl.log(weights), float("-inf")), mask=exists)


@triton.jit(do_not_specialize=range(46))
def query_gradient_kernel(
    grad_out, query, key, value, grad_query, maxima, inverses, means, pulls, grad_precision,
    order, points, seen, nearest, precision, lists, counts,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64, width: tl.int32,
    stride_gb: tl.int64, stride_gt: tl.int64, stride_gy: tl.int64, stride_gx: tl.int64, stride_gh: tl.int64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vy: tl.int64, stride_vx: tl.int64, stride_vh: tl.int64,
    SPLAT: tl.constexpr, POSITIONS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, and each row's maximum, 1 / sum and mean gradient for the other kernel."""
    ACC: tl.constexpr = maxima.dtype.element_ty
    HELD: tl.constexpr = BLOCK_C == BLOCK_D
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), row_blocks, order, points, seen, nearest, T, H, M, h, w
    )
    rows = h * w if SPLAT else M
    y, x, px, py, exists, present = geometry.members(block, scene, SPLAT, ROWS, TILE_W)
    _, _, nx, ny = geometry.nearest_column(y, x, px, py, present, scene, SPLAT)
    g_frame = geometry.frame_of((grad_out, stride_gb, stride_gt, stride_gy, stride_gx, stride_gh), b, t, head)
    q_frame = geometry.frame_of((query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh), b, t, head)
    k_frame = geometry.frame_of((key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh), b, t, head)
    v_frame = geometry.frame_of((value, stride_vb, stride_vt, stride_vy, stride_vx, stride_vh), b, t, head)
    q_rows = geometry.vectors(q_frame, y, x)
    g_rows = geometry.vectors(g_frame, y, x)
    q = geometry.load_if(q_rows, present, D, BLOCK_D, HELD)
    g = geometry.load_if(g_rows, present, D, BLOCK_D, HELD)
    scale = tl.full([], scale, ACC)
    steepness = tl.load(precision)
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    highest = tl.full([ROWS], LOWEST, ACC)
    weights = tl.zeros([ROWS], ACC)
    mean = tl.zeros([ROWS], ACC)
    owned = place * row_blocks + block
    count = tl.load(counts + owned)
    lists += owned * column_blocks
    for n in tl.range(0, count, num_stages=STAGES):
        other = tl.load(lists + n).to(tl.int32)
        ky, kx, cx, cy, _there, there = geometry.members(other, scene, not SPLAT, COLUMNS, TILE_W)
        k_rows = geometry.vectors(k_frame, ky, kx)
        v_rows = geometry.vectors(v_frame, ky, kx)
        k = geometry.load_if(k_rows, there, D, BLOCK_D, HELD)
        v = geometry.load_if(v_rows, there, D, BLOCK_D, HELD)
        product = _inner(q, k, q_rows, k_rows, present, there, D, BLOCK_D, BLOCK_C, PRECISION) * scale
        distance = geometry.further(px[:, None], py[:, None], nx[:, None], ny[:, None], cx[None, :], cy[None, :])
        penalty = tl.where(there[None, :], steepness * distance, float("inf"))
        grad_weight = _inner(g, v, g_rows, v_rows, present, there, D, BLOCK_D, BLOCK_C, PRECISION)
        new_highest = tl.maximum(highest, tl.max(product - penalty, 1))
        weight = _weight(product, new_highest[:, None], penalty)
        fade = tl.exp(highest - new_highest)
        highest = new_highest
        weights = weights * fade + tl.sum(weight, 1)
        mean = mean * fade + tl.sum(weight * grad_weight, 1)
    inverse = 1.0 / tl.where(present, weights, 1.0)
    mean = mean * inverse

    total = tl.zeros([ROWS, BLOCK_D], ACC)
    pull_x = tl.zeros([ROWS], ACC)
    pull_y = tl.zeros([ROWS], ACC)
    widening = tl.zeros([ROWS], ACC)
    for n in tl.range(0, count, num_stages=STAGES):
        other = tl.load(lists + n).to(tl.int32)
        ky, kx, cx, cy, _there, there = geometry.members(other, scene, not SPLAT, COLUMNS, TILE_W)
        k_rows = geometry.vectors(k_frame, ky, kx)
        v_rows = geometry.vectors(v_frame, ky, kx)
        k = geometry.load(k_rows, there, 0, D, BLOCK_D)
        v = geometry.load_if(v_rows, there, D, BLOCK_D, HELD)
        product = _inner(q, k, q_rows, k_rows, present, there, D, BLOCK_D, BLOCK_C, PRECISION) * scale
        distance = geometry.further(px[:, None], py[:, None], nx[:, None], ny[:, None], cx[None, :], cy[None, :])
        penalty = tl.where(there[None, :], steepness * distance, float("inf"))
        weight = _weight(product, highest[:, None], penalty) * inverse[:, None]
        grad_weight = _inner(g, v, g_rows, v_rows, present, there, D, BLOCK_D, BLOCK_C, PRECISION)
        grad_score = weight * (grad_weight - mean[:, None])
        total = _product(grad_score, k, total, PRECISION)
        if POSITIONS:
            felt = grad_score != 0
            widening -= tl.sum(tl.where(felt, grad_score * distance, 0.0), 1)
            if not SPLAT:
                # The gradients of a row's scores sum to zero, so that distances may count from the nearest column.
                pull_x += tl.sum(tl.where(felt, grad_score * (nx[:, None] - cx[None, :]), 0.0), 1)
                pull_y += tl.sum(tl.where(felt, grad_score * (ny[:, None] - cy[None, :]), 0.0), 1)

    result = geometry.contiguous(grad_query, place, head, rows, width, H, D)
    total = tl.where(present[:, None], total * scale, 0.0)
    geometry.store(geometry.vectors(result, y, x), exists, total, D, BLOCK_D)
    number = place * rows + y * width + x
    tl.store(maxima + number, highest, mask=exists)
    tl.store(inverses + number, inverse, mask=exists)
    tl.store(means + number, mean, mask=exists)
    if POSITIONS:
        tl.store(grad_precision + number, tl.where(present, widening, 0.0), mask=exists)
        if not SPLAT:
            tl.store(pulls + 2 * number, tl.where(present, pull_x, 0.0), mask=exists)
            tl.store(pulls + 2 * number + 1, tl.where(present, pull_y, 0.0), mask=exists)


@triton.jit(do_not_specialize=range(46))
def key_value_gradient_kernel(
    grad_out, query, key, value, grad_key, grad_value, maxima, inverses, means, pulls,
    order, points, seen, nearest, precision, lists, counts,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64, width: tl.int32,
    stride_gb: tl.int64, stride_gt: tl.int64, stride_gy: tl.int64, stride_gx: tl.int64, stride_gh: tl.int64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt: tl.int64, stride_vy: tl.int64, stride_vx: tl.int64, stride_vh: tl.int64,
    SPLAT: tl.constexpr, POSITIONS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; `width` is that of the columns. Scores are `[columns, rows]` here."""
    ACC: tl.constexpr = maxima.dtype.element_ty
    HELD: tl.constexpr = BLOCK_C == BLOCK_D
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), column_blocks, order, points, seen, nearest, T, H, M, h, w
    )
    rows = h * w if SPLAT else M
    columns = M if SPLAT else h * w
    row_width = w if SPLAT else M
    ky, kx, cx, cy, exists, there = geometry.members(block, scene, not SPLAT, COLUMNS, TILE_W)
    g_frame = geometry.frame_of((grad_out, stride_gb, stride_gt, stride_gy, stride_gx, stride_gh), b, t, head)
    q_frame = geometry.frame_of((query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh), b, t, head)
    k_frame = geometry.frame_of((key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh), b, t, head)
    v_frame = geometry.frame_of((value, stride_vb, stride_vt, stride_vy, stride_vx, stride_vh), b, t, head)
    k_rows = geometry.vectors(k_frame, ky, kx)
    v_rows = geometry.vectors(v_frame, ky, kx)
    k = geometry.load_if(k_rows, there, D, BLOCK_D, HELD)
    v = geometry.load_if(v_rows, there, D, BLOCK_D, HELD)
    scale = tl.full([], scale, ACC)
    steepness = tl.load(precision)
    total_k = tl.zeros([COLUMNS, BLOCK_D], ACC)
    total_v = tl.zeros([COLUMNS, BLOCK_D], ACC)
    pull_x = tl.zeros([COLUMNS], ACC)
    pull_y = tl.zeros([COLUMNS], ACC)
    owned = place * column_blocks + block
    for n in tl.range(0, tl.load(counts + owned), num_stages=STAGES):
        other = tl.load(lists + owned * row_blocks + n).to(tl.int32)
        y, x, px, py, _, present = geometry.members(other, scene, SPLAT, ROWS, TILE_W)
        _, _, nx, ny = geometry.nearest_column(y, x, px, py, present, scene, SPLAT)
        q_rows = geometry.vectors(q_frame, y, x)
        g_rows = geometry.vectors(g_frame, y, x)
        q = geometry.load(q_rows, present, 0, D, BLOCK_D)
        g = geometry.load(g_rows, present, 0, D, BLOCK_D)
        number = place * rows + y * row_width + x
        highest = tl.load(maxima + number, mask=present, other=0.0)
        inverse = tl.load(inverses + number, mask=present, other=0.0)
        mean = tl.load(means + number, mask=present, other=0.0)
        if query.dtype.element_ty.primitive_bitwidth == 16:
            product = _inner(k, q, k_rows, q_rows, there, present, D, BLOCK_D, BLOCK_C, PRECISION) * scale
        else:
            # To the bit what the other kernel had, whose maximum is at hand: a weight of one has to be one.
            product = tl.trans(_inner(q, k, q_rows, k_rows, present, there, D, BLOCK_D, BLOCK_C, PRECISION)) * scale
        distance = geometry.further(px[None, :], py[None, :], nx[None, :], ny[None, :], cx[:, None], cy[:, None])
        penalty = tl.where(present[None, :] & there[:, None], steepness * distance, float("inf"))
        weight = _weight(product, highest[None, :], penalty) * inverse[None, :]
        total_v = _product(weight, g, total_v, PRECISION)
        grad_weight = _inner(v, g, v_rows, g_rows, there, present, D, BLOCK_D, BLOCK_C, PRECISION)
        grad_score = weight * (grad_weight - mean[None, :])
        total_k = _product(grad_score, q, total_k, PRECISION)
        if POSITIONS and SPLAT:
            felt = grad_score != 0
            pull_x += tl.sum(tl.where(felt, grad_score * (px[None, :] - cx[:, None]), 0.0), 1)
            pull_y += tl.sum(tl.where(felt, grad_score * (py[None, :] - cy[:, None]), 0.0), 1)

    # Zero, and not zero times what a spoilt row says, for columns that do not take part.
    total_k = tl.where(there[:, None], total_k * scale, 0.0)
    total_v = tl.where(there[:, None], total_v, 0.0)
    result = geometry.contiguous(grad_key, place, head, columns, width, H, D)
    geometry.store(geometry.vectors(result, ky, kx), exists, total_k, D, BLOCK_D)
    result = geometry.contiguous(grad_value, place, head, columns, width, H, D)
    geometry.store(geometry.vectors(result, ky, kx), exists, total_v, D, BLOCK_D)
    if POSITIONS and SPLAT:
        number = place * columns + kx
        tl.store(pulls + 2 * number, tl.where(there, pull_x, 0.0), mask=exists)
        tl.store(pulls + 2 * number + 1, tl.where(there, pull_y, 0.0), mask=exists)


def _constants(tiles: configs.Tiles, splat: bool, head_dim: int, dtype: torch.dtype) -> dict:
    rows, columns = (tiles.cells, tiles.tracks) if splat else (tiles.tracks, tiles.cells)
    return dict(
        SPLAT=splat, D=head_dim, BLOCK_D=configs.block_d(head_dim), BLOCK_C=tiles.block_c, ROWS=rows, COLUMNS=columns,
        TILE_W=configs.tile_width(tiles.cells), STAGES=tiles.num_stages,
        PRECISION=tiles.precision if dtype == torch.float32 else "ieee",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
) -> tuple[Tensor, Tensor]:
    """Output like query and log-sum-exp `[B, T, rows, H]`, both contiguous."""
    B, T, H, D = *query.shape[:2], *query.shape[-2:]
    out = query.new_empty(query.shape)
    lse = tracks.new_empty((B, T, query.shape[2:-2].numel(), H))
    if out.numel() == 0 or tracks.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    (query, q), (key, k), (value, v) = map(geometry.readable, (query, key, value))
    scene = culled.scene(tracks, visible, H, (query if splat else key).shape[2:4], splat)
    tiles = configs.forward_tiles(D, query.dtype)
    eps = torch.finfo(query.dtype).eps if culling else 0.0
    visits = culled.visits(query, key, q, k, scene, precision, scale, eps, tiles)
    forward_kernel[(visits.shape[0] * visits.shape[1],)](
        query, key, value, out, lse, *scene.arguments(), precision, *culled.lists(visits), *scene.sizes,
        *visits.shape[1:], scale, query.shape[3], *q, *k, *v, **_constants(tiles, splat, D, query.dtype),
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
    positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, tracks and precision; the last two are of shape [0] unless `positions`. `out` and
    `lse` are not read: a row's softmax is made anew."""
    B, T, M, H, D = *tracks.shape[:3], *query.shape[-2:]
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    if not positions:
        grad_tracks, grad_precision = tracks.new_empty(0), precision.new_empty(0)
    else:
        grad_tracks, grad_precision = tracks.new_zeros(tracks.shape), precision.new_zeros(())
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), grad_tracks, grad_precision
    (grad_out, g), (query, q), (key, k), (value, v) = map(geometry.readable, (grad_out, query, key, value))
    scene = culled.scene(tracks, visible, H, (query if splat else key).shape[2:4], splat)
    tiles = configs.backward_tiles(D, query.dtype)
    # Gradients of positions are in the accumulator's type.
    eps = torch.finfo(tracks.dtype if positions else query.dtype).eps if culling else 0.0
    visits = culled.visits(query, key, q, k, scene, precision, scale, eps, tiles)
    rows = query.shape[2:4].numel()
    saved = [tracks.new_empty((B * T, H, rows)) for _ in range(3)]
    pulls = tracks.new_empty((B * T, H, M, 2) if positions else 0)
    widening = tracks.new_empty((B * T, H, rows) if positions else 0)
    sizes, strides = (*scene.sizes, *visits.shape[1:], scale), (*g, *q, *k, *v)
    constants = dict(POSITIONS=positions, **_constants(tiles, splat, D, query.dtype))
    query_gradient_kernel[(visits.shape[0] * visits.shape[1],)](
        grad_out, query, key, value, grad_query, *saved, pulls, widening, *scene.arguments(), precision,
        *culled.lists(visits), *sizes, query.shape[3], *strides, **constants,
    )  # fmt: skip
    key_value_gradient_kernel[(visits.shape[0] * visits.shape[2],)](
        grad_out, query, key, value, grad_key, grad_value, *saved, pulls, *scene.arguments(), precision,
        *culled.lists(visits.mT.contiguous()), *sizes, key.shape[3], *strides, **constants,
    )  # fmt: skip
    if positions:
        grad_tracks = (2 if splat else -2) * precision * pulls.sum(1).view(tracks.shape)
        grad_precision = widening.sum()
    return grad_query, grad_key, grad_value, grad_tracks, grad_precision
