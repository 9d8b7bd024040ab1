"""Triton kernels of temporal window attention, forward and backward, and their launchers.

Time is flattened (triton_rows.py): a program owns BLOCK_ROWS consecutive rows of all clips laid end to end, so that
several short clips fill a tile and a long clip is cut into pieces, and it meets only the rows that share a window with
its own. Neighbouring programs read neighbouring addresses, as head and position are the fastest axes of a video.

Output and gradients come in two ways. On tensor cores ("by tile"), rows meet tiles of other rows and a mask leaves the
window. Zero times NaN is NaN, so that one bad frame would poison its tile, far beyond its window; a program whose
result is not finite drops it and goes the other way. There ("by distance"), a row meets one frame distance after the
other and nothing outside its window. It is also how float64 and exact float32 go; no tensor core has both everywhere.

Scores stay in natural units: where one weight is all of a row's, backward then finds it to be exactly 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import aligned, block_size, kernel, launch, readable
from tritonkern.ops.temporal_window_attention import configs
from tritonkern.ops.temporal_window_attention import triton_rows as flat


@triton.jit
def _poisoned(tile):
    """True if any entry is not finite."""
    # One sum over both axes: a sum of row sums crashes Triton 3.6 on sm_100.
    return tl.sum(tile * 0.0) != 0.0


@triton.jit
def _forward_by_tile(
    query, key, value, out, lse, t0, count, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of all rows at once. False, and nothing is stored, if a result is not finite."""
    row = t0 + tl.arange(0, BLOCK_ROWS)
    present = row < t0 + count
    q = flat.load(query, row, present, place, D, BLOCK_D)
    first, last = flat.window(row, place[0], left, right)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    weights = tl.zeros([BLOCK_ROWS], tl.float32)
    highest = tl.full([BLOCK_ROWS], -3.4028234663852886e38, tl.float32)
    start, stop = flat.reach(t0, count, place[0], left, right)
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        k = flat.load(key, other, other < stop, place, D, BLOCK_D)
        v = flat.load(value, other, other < stop, place, D, BLOCK_D)
        score = tl.where(flat.visible(other, first, last), tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        # The maximum starts finite, so that it is never -inf - -inf where a row sees nothing of this tile.
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - new_highest[:, None])
        fade = tl.exp(highest - new_highest)
        highest = new_highest
        weights = weights * fade + tl.sum(weight, 1)
        total = tl.dot(weight.to(v.dtype), v, total * fade[:, None])
    finite = not _poisoned(total)
    if finite:
        flat.store(out, row, total * (1.0 / weights)[:, None], present, place, D, BLOCK_D)
        tl.store(lse + flat.number(row, place), highest + tl.log(weights), mask=present)
    return finite


@triton.jit
def _forward_by_distance(
    query, key, value, out, lse, row, present, place, left, right, scale, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Attention of a few rows, one frame distance after the other."""
    ACC: tl.constexpr = scale.dtype
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    first, last = flat.window(row, place[0], left, right)
    q = flat.load(query, row, present, place, D, BLOCK_D).to(ACC)
    total = tl.zeros(q.shape, ACC)
    weights = tl.zeros(row.shape, ACC)
    highest = tl.full(row.shape, LOWEST, ACC)
    for distance in tl.range(-left, right + 1, num_stages=1):
        other = row + distance
        visible = present & (other >= first) & (other <= last)
        k = flat.load(key, other, visible, place, D, BLOCK_D).to(ACC)
        v = flat.load(value, other, visible, place, D, BLOCK_D).to(ACC)
        score = tl.where(visible, tl.sum(q * k, 1) * scale, float("-inf"))
        new_highest = tl.maximum(highest, score)
        weight = tl.exp(score - new_highest)
        fade = tl.exp(highest - new_highest)
        highest = new_highest
        weights = weights * fade + weight
        total = total * fade[:, None] + weight[:, None] * v
    flat.store(out, row, total / weights[:, None], present, place, D, BLOCK_D)
    tl.store(lse + flat.number(row, place), highest + tl.log(weights), mask=present)


@kernel
def temporal_window_attention_fwd_kernel(
    query, key, value, out, lse,
    T: tl.int32, T_multiplier: tl.uint32, T_shift: tl.uint32, N: tl.int32, N_multiplier: tl.uint32, N_shift: tl.uint32,
    H: tl.int32, H_multiplier: tl.uint32, H_shift: tl.uint32, rows: tl.int32, left: tl.int32,
    right: tl.int32, scale: tl.float64,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qn: tl.int32, stride_qh: tl.int32,
    stride_kb: tl.int32, stride_kt: tl.int32, stride_kn: tl.int32, stride_kh: tl.int32,
    stride_vb: tl.int32, stride_vt: tl.int32, stride_vn: tl.int32, stride_vh: tl.int32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_ROWS
    count = tl.minimum(rows - first, BLOCK_ROWS)
    t0, place = flat.origin(first, (T, T_multiplier, T_shift), (N, N_multiplier, N_shift), (H, H_multiplier, H_shift))
    scale = tl.full([], scale, lse.dtype.element_ty)
    query = (query, stride_qb, stride_qt, stride_qn, stride_qh)
    key = (key, stride_kb, stride_kt, stride_kn, stride_kh)
    value = (value, stride_vb, stride_vt, stride_vn, stride_vh)
    out = flat.contiguous(out, T, N, H, D)
    done = False
    if TENSOR_CORES:
        done = _forward_by_tile(
            query, key, value, out, lse, t0, count, place, left, right, scale,
            D, BLOCK_D, BLOCK_ROWS, BLOCK_OTHERS, STAGES,
        )  # fmt: skip
    if not done:
        for begin in tl.range(0, count, ROWS, num_stages=1):
            row = t0 + begin + tl.arange(0, ROWS)
            present = row < t0 + count
            _forward_by_distance(query, key, value, out, lse, row, present, place, left, right, scale, D, BLOCK_D)


@triton.jit
def _query_gradient_by_tile(
    grad_out, query, key, value, out, lse, grad_query, t0, count, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of all queries at once. False, and nothing is stored, if a result is not finite."""
    row = t0 + tl.arange(0, BLOCK_ROWS)
    present = row < t0 + count
    q = flat.load(query, row, present, place, D, BLOCK_D)
    g = flat.load(grad_out, row, present, place, D, BLOCK_D)
    o = flat.load(out, row, present, place, D, BLOCK_D)
    denominator = tl.load(lse + flat.number(row, place), mask=present, other=0.0)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    first, last = flat.window(row, place[0], left, right)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    start, stop = flat.reach(t0, count, place[0], left, right)
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        k = flat.load(key, other, other < stop, place, D, BLOCK_D)
        v = flat.load(value, other, other < stop, place, D, BLOCK_D)
        score = tl.where(flat.visible(other, first, last), tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        weight = tl.exp(score - denominator[:, None])
        grad_score = weight * (tl.dot(g, tl.trans(v)) - delta[:, None])
        total = tl.dot(grad_score.to(k.dtype), k, total)
    finite = not _poisoned(total)
    if finite:
        flat.store(grad_query, row, total * scale, present, place, D, BLOCK_D)
    return finite


@triton.jit
def _key_value_gradient_by_tile(
    grad_out, query, key, value, out, lse, grad_key, grad_value, t0, count, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of all keys and values at once. False, and nothing is stored, if a result is not finite."""
    row = t0 + tl.arange(0, BLOCK_ROWS)
    present = row < t0 + count
    k = flat.load(key, row, present, place, D, BLOCK_D)
    v = flat.load(value, row, present, place, D, BLOCK_D)
    # A query looks `left` back and `right` ahead, so the queries that see a key lie the other way round.
    first, last = flat.window(row, place[0], right, left)
    total_k = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    start, stop = flat.reach(t0, count, place[0], right, left)
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        q = flat.load(query, other, other < stop, place, D, BLOCK_D)
        g = flat.load(grad_out, other, other < stop, place, D, BLOCK_D)
        o = flat.load(out, other, other < stop, place, D, BLOCK_D)
        denominator = tl.load(lse + flat.number(other, place), mask=other < stop, other=0.0)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        score = tl.where(flat.visible(other, first, last), tl.dot(k, tl.trans(q)) * scale, float("-inf"))
        weight = tl.exp(score - denominator[None, :])
        total_v = tl.dot(weight.to(g.dtype), g, total_v)
        grad_score = weight * (tl.dot(v, tl.trans(g)) - delta[None, :])
        total_k = tl.dot(grad_score.to(q.dtype), q, total_k)
    finite = not (_poisoned(total_k) | _poisoned(total_v))
    if finite:
        flat.store(grad_key, row, total_k * scale, present, place, D, BLOCK_D)
        flat.store(grad_value, row, total_v, present, place, D, BLOCK_D)
    return finite


@triton.jit
def _query_gradient_by_distance(
    grad_out, query, key, value, out, lse, grad_query, row, present, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of a few queries, one frame distance after the other."""
    ACC: tl.constexpr = scale.dtype
    first, last = flat.window(row, place[0], left, right)
    q = flat.load(query, row, present, place, D, BLOCK_D).to(ACC)
    g = flat.load(grad_out, row, present, place, D, BLOCK_D).to(ACC)
    delta = tl.sum(g * flat.load(out, row, present, place, D, BLOCK_D).to(ACC), 1)
    denominator = tl.load(lse + flat.number(row, place), mask=present, other=0.0)
    total = tl.zeros(q.shape, ACC)
    for distance in tl.range(-left, right + 1, num_stages=1):
        other = row + distance
        visible = present & (other >= first) & (other <= last)
        k = flat.load(key, other, visible, place, D, BLOCK_D).to(ACC)
        v = flat.load(value, other, visible, place, D, BLOCK_D).to(ACC)
        weight = tl.exp(tl.where(visible, tl.sum(q * k, 1) * scale, float("-inf")) - denominator)
        grad_score = tl.where(visible, weight * (tl.sum(g * v, 1) - delta), 0.0)
        total += grad_score[:, None] * k
    flat.store(grad_query, row, total * scale, present, place, D, BLOCK_D)


@triton.jit
def _key_value_gradient_by_distance(
    grad_out, query, key, value, out, lse, grad_key, grad_value, row, present, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a few keys and values, one frame distance after the other."""
    ACC: tl.constexpr = scale.dtype
    first, last = flat.window(row, place[0], right, left)
    k = flat.load(key, row, present, place, D, BLOCK_D).to(ACC)
    v = flat.load(value, row, present, place, D, BLOCK_D).to(ACC)
    total_k = tl.zeros(k.shape, ACC)
    total_v = tl.zeros(v.shape, ACC)
    for distance in tl.range(-right, left + 1, num_stages=1):
        other = row + distance
        visible = present & (other >= first) & (other <= last)
        q = flat.load(query, other, visible, place, D, BLOCK_D).to(ACC)
        g = flat.load(grad_out, other, visible, place, D, BLOCK_D).to(ACC)
        delta = tl.sum(g * flat.load(out, other, visible, place, D, BLOCK_D).to(ACC), 1)
        denominator = tl.load(lse + flat.number(other, place), mask=visible, other=0.0)
        weight = tl.exp(tl.where(visible, tl.sum(q * k, 1) * scale, float("-inf")) - denominator)
        grad_score = tl.where(visible, weight * (tl.sum(g * v, 1) - delta), 0.0)
        total_k += grad_score[:, None] * q
        total_v += weight[:, None] * g
    flat.store(grad_key, row, total_k * scale, present, place, D, BLOCK_D)
    flat.store(grad_value, row, total_v, present, place, D, BLOCK_D)


@kernel
def temporal_window_attention_bwd_kernel(
    grad_out, query, key, value, out, lse, grad_query, grad_key, grad_value,
    T: tl.int32, T_multiplier: tl.uint32, T_shift: tl.uint32, N: tl.int32, N_multiplier: tl.uint32, N_shift: tl.uint32,
    H: tl.int32, H_multiplier: tl.uint32, H_shift: tl.uint32, rows: tl.int32, left: tl.int32,
    right: tl.int32, scale: tl.float64,
    stride_gb: tl.int32, stride_gt: tl.int32, stride_gn: tl.int32, stride_gh: tl.int32,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qn: tl.int32, stride_qh: tl.int32,
    stride_kb: tl.int32, stride_kt: tl.int32, stride_kn: tl.int32, stride_kh: tl.int32,
    stride_vb: tl.int32, stride_vt: tl.int32, stride_vn: tl.int32, stride_vh: tl.int32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every program makes the three gradients of its own rows, so that nothing is added across programs."""
    first = tl.program_id(0) * BLOCK_ROWS
    count = tl.minimum(rows - first, BLOCK_ROWS)
    t0, place = flat.origin(first, (T, T_multiplier, T_shift), (N, N_multiplier, N_shift), (H, H_multiplier, H_shift))
    scale = tl.full([], scale, lse.dtype.element_ty)
    grad_out = (grad_out, stride_gb, stride_gt, stride_gn, stride_gh)
    query = (query, stride_qb, stride_qt, stride_qn, stride_qh)
    key = (key, stride_kb, stride_kt, stride_kn, stride_kh)
    value = (value, stride_vb, stride_vt, stride_vn, stride_vh)
    out = flat.contiguous(out, T, N, H, D)
    grad_query = flat.contiguous(grad_query, T, N, H, D)
    grad_key = flat.contiguous(grad_key, T, N, H, D)
    grad_value = flat.contiguous(grad_value, T, N, H, D)

    done = False
    if TENSOR_CORES:
        done = _query_gradient_by_tile(
            grad_out, query, key, value, out, lse, grad_query, t0, count, place, left, right, scale,
            D, BLOCK_D, BLOCK_ROWS, BLOCK_OTHERS, STAGES,
        )  # fmt: skip
    if not done:
        for begin in tl.range(0, count, ROWS, num_stages=1):
            row = t0 + begin + tl.arange(0, ROWS)
            present = row < t0 + count
            _query_gradient_by_distance(
                grad_out, query, key, value, out, lse, grad_query, row, present, place, left, right, scale, D, BLOCK_D
            )

    done = False
    if TENSOR_CORES:
        done = _key_value_gradient_by_tile(
            grad_out, query, key, value, out, lse, grad_key, grad_value, t0, count, place, left, right, scale,
            D, BLOCK_D, BLOCK_ROWS, BLOCK_OTHERS, STAGES,
        )  # fmt: skip
    if not done:
        for begin in tl.range(0, count, ROWS, num_stages=1):
            row = t0 + begin + tl.arange(0, ROWS)
            present = row < t0 + count
            _key_value_gradient_by_distance(
                grad_out, query, key, value, out, lse, grad_key, grad_value, row, present, place, left, right, scale,
                D, BLOCK_D,
            )  # fmt: skip


def _launch(kernel, inputs, saved, outputs, choose, left: int, right: int, scale: float) -> None:
    """Run a kernel on inputs of any strides, contiguous saved tensors and contiguous outputs."""
    B, T, N, H, D = outputs[0].shape
    rows = B * T * N * H
    if rows == 0:
        return
    if rows * D >= configs.MAX_ELEMENTS or T >= configs.MAX_FRAMES:
        raise ValueError(
            f"query must have fewer than 2**34 elements and 2**29 frames on the triton backend, got {(B, T, N, H, D)}; "
            "split the batch or the positions over several calls"
        )
    left, right = min(left, T - 1), min(right, T - 1)
    inputs, strides = zip(*(readable(x, configs.MAX_ELEMENTS) for x in inputs), strict=True)
    tiles = choose(D, left + right + 1, inputs[0].dtype)
    sizes = (*flat.divisor(T), *flat.divisor(N), *flat.divisor(H), rows, left, right, scale)
    launch(
        kernel, triton.cdiv(rows, tiles.block_rows),
        *inputs, *(aligned(x) for x in saved), *outputs, *sizes, *(stride for unit in strides for stride in unit),
        D=D, BLOCK_D=block_size(D), TENSOR_CORES=tiles.tensor_cores, BLOCK_ROWS=tiles.block_rows,
        BLOCK_OTHERS=tiles.block_others, ROWS=tiles.rows, STAGES=tiles.num_stages,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def forward(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, T, N, H, D]` three times -> out `[B, T, N, H, D]` and the log-sum-exp of the scores `[B, T, N, H]`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))
    _launch(
        temporal_window_attention_fwd_kernel,
        (query, key, value),
        (),
        (out, lse),
        configs.forward_tiles,
        left,
        right,
        scale,
    )
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each `[B, T, N, H, D]`; out and lse are what `forward` returned."""
    grads = query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)
    inputs = (grad_out, query, key, value)
    _launch(temporal_window_attention_bwd_kernel, inputs, (out, lse), grads, configs.backward_tiles, left, right, scale)
    return grads
