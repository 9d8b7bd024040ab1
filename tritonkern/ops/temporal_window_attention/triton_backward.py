"""The backward kernel of temporal window attention.

p_ij         = exp(scale * q_i . k_j - lse_i)     i + offset - left <= j <= i + offset + right,   0 <= j < S
ds_ij        = p_ij * (grad_out_i . v_j - grad_out_i . out_i)
grad_query_i = scale * sum_j ds_ij k_j
grad_key_j   = scale * sum_i ds_ij q_i,           grad_value_j = sum_i p_ij grad_out_i

`clips` is the place of the queries, that of the keys, and the offset.
"""

import triton
import triton.language as tl

from tritonkern.ops._triton import kernel
from tritonkern.ops.temporal_window_attention import triton_rows as flat
from tritonkern.ops.temporal_window_attention.triton_forward import poisoned


@triton.jit
def _query_gradient_by_tile(
    tensors, grads, t0, count, clips, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
    CONTINUED: tl.constexpr,
):  # fmt: skip
    """Gradient of all `count` queries from row t0 on. Returns False and stores nothing if one is not finite."""
    grad_out, query, key, value, out, lse = tensors
    place, keys, offset = clips
    row = t0 + tl.arange(0, BLOCK_ROWS)
    in_range = row < t0 + count
    q = flat.load(query, row, in_range, place, D, BLOCK_D)
    g = flat.load(grad_out, row, in_range, place, D, BLOCK_D)
    o = flat.load(out, row, in_range, place, D, BLOCK_D)
    denominator = tl.load(lse + flat.number(row, place), mask=in_range, other=0.0)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    _, first, last = flat.window(row, place[0], keys[0], offset, left, right, CONTINUED)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    start, stop = flat.reach(t0, count, place[0], keys[0], offset, left, right, CONTINUED)
    # Invariant: total = sum over the keys j before `begin` of ds_ij k_j.
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        k = flat.load(key, other, other < stop, keys, D, BLOCK_D)
        v = flat.load(value, other, other < stop, keys, D, BLOCK_D)
        seen = flat.visible(other, first, last, CONTINUED)
        score = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        weight = tl.exp(score - denominator[:, None])
        grad_score = weight * (tl.dot(g, tl.trans(v)) - delta[:, None])
        total = tl.dot(grad_score.to(k.dtype), k, total)
    finite = not poisoned(total)
    if finite:
        flat.store(grads[0], row, total * scale, in_range, place, D, BLOCK_D)
    return finite


@triton.jit
def _key_value_gradient_by_tile(
    tensors, grads, t0, count, clips, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
    CONTINUED: tl.constexpr,
):  # fmt: skip
    """Gradients of all `count` keys and values from row t0 on. False, and nothing stored, if one is not finite."""
    grad_out, query, key, value, out, lse = tensors
    place, keys, offset = clips
    row = t0 + tl.arange(0, BLOCK_ROWS)
    in_range = row < t0 + count
    k = flat.load(key, row, in_range, keys, D, BLOCK_D)
    v = flat.load(value, row, in_range, keys, D, BLOCK_D)
    # A query sees `left` frames back and `right` ahead, so a key is seen from `right` frames back to `left` ahead.
    _, first, last = flat.window(row, keys[0], place[0], -offset, right, left, CONTINUED)
    total_k = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    start, stop = flat.reach(t0, count, keys[0], place[0], -offset, right, left, CONTINUED)
    # Invariant: over the queries i before `begin`, total_k = sum ds_ij q_i and total_v = sum p_ij grad_out_i.
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        q = flat.load(query, other, other < stop, place, D, BLOCK_D)
        g = flat.load(grad_out, other, other < stop, place, D, BLOCK_D)
        o = flat.load(out, other, other < stop, place, D, BLOCK_D)
        denominator = tl.load(lse + flat.number(other, place), mask=other < stop, other=0.0)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        seen = flat.visible(other, first, last, CONTINUED)
        score = tl.where(seen, tl.dot(k, tl.trans(q)) * scale, float("-inf"))
        weight = tl.exp(score - denominator[None, :])
        total_v = tl.dot(weight.to(g.dtype), g, total_v)
        grad_score = weight * (tl.dot(v, tl.trans(g)) - delta[None, :])
        total_k = tl.dot(grad_score.to(q.dtype), q, total_k)
    finite = not (poisoned(total_k) | poisoned(total_v))
    if finite:
        flat.store(grads[1], row, total_k * scale, in_range, keys, D, BLOCK_D)
        flat.store(grads[2], row, total_v, in_range, keys, D, BLOCK_D)
    return finite


@triton.jit
def _query_gradient_by_distance(
    tensors, grads, row, in_range, clips, left, right, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CONTINUED: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries `row` that are in range (`in_range`), one frame distance after the other."""
    grad_out, query, key, value, out, lse = tensors
    place, keys, offset = clips
    ACC: tl.constexpr = scale.dtype
    same, first, last = flat.window(row, place[0], keys[0], offset, left, right, CONTINUED)
    q = flat.load(query, row, in_range, place, D, BLOCK_D).to(ACC)
    g = flat.load(grad_out, row, in_range, place, D, BLOCK_D).to(ACC)
    delta = tl.sum(g * flat.load(out, row, in_range, place, D, BLOCK_D).to(ACC), 1)
    denominator = tl.load(lse + flat.number(row, place), mask=in_range, other=0.0)
    total = tl.zeros(q.shape, ACC)
    # Invariant: total = sum over the keys j at smaller distances of ds_ij k_j.
    for distance in tl.range(-left, right + 1, num_stages=1):
        other = same + distance
        visible = in_range & (other >= first) & (other <= last)
        k = flat.load(key, other, visible, keys, D, BLOCK_D).to(ACC)
        v = flat.load(value, other, visible, keys, D, BLOCK_D).to(ACC)
        weight = tl.exp(tl.where(visible, tl.sum(q * k, 1) * scale, float("-inf")) - denominator)
        grad_score = tl.where(visible, weight * (tl.sum(g * v, 1) - delta), 0.0)
        total += grad_score[:, None] * k
    flat.store(grads[0], row, total * scale, in_range, place, D, BLOCK_D)


@triton.jit
def _key_value_gradient_by_distance(
    tensors, grads, row, in_range, clips, left, right, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CONTINUED: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values `row` that are in range (`in_range`), one frame distance after the other."""
    grad_out, query, key, value, out, lse = tensors
    place, keys, offset = clips
    ACC: tl.constexpr = scale.dtype
    same, first, last = flat.window(row, keys[0], place[0], -offset, right, left, CONTINUED)
    k = flat.load(key, row, in_range, keys, D, BLOCK_D).to(ACC)
    v = flat.load(value, row, in_range, keys, D, BLOCK_D).to(ACC)
    total_k = tl.zeros(k.shape, ACC)
    total_v = tl.zeros(v.shape, ACC)
    # Invariant: over the queries i at smaller distances, total_k = sum ds_ij q_i and total_v = sum p_ij grad_out_i.
    for distance in tl.range(-right, left + 1, num_stages=1):
        other = same + distance
        visible = in_range & (other >= first) & (other <= last)
        q = flat.load(query, other, visible, place, D, BLOCK_D).to(ACC)
        g = flat.load(grad_out, other, visible, place, D, BLOCK_D).to(ACC)
        delta = tl.sum(g * flat.load(out, other, visible, place, D, BLOCK_D).to(ACC), 1)
        denominator = tl.load(lse + flat.number(other, place), mask=visible, other=0.0)
        weight = tl.exp(tl.where(visible, tl.sum(q * k, 1) * scale, float("-inf")) - denominator)
        grad_score = tl.where(visible, weight * (tl.sum(g * v, 1) - delta), 0.0)
        total_k += grad_score[:, None] * q
        total_v += weight[:, None] * g
    flat.store(grads[1], row, total_k * scale, in_range, keys, D, BLOCK_D)
    flat.store(grads[2], row, total_v, in_range, keys, D, BLOCK_D)


@kernel
def temporal_window_attention_bwd_kernel(
    grad_out, query, key, value, out, lse, grad_query, grad_key, grad_value,
    T: tl.int32, T_multiplier: tl.uint32, T_shift: tl.uint32,  # a size and what divides by it, see flat.divisor
    N: tl.int32, N_multiplier: tl.uint32, N_shift: tl.uint32,
    H: tl.int32, H_multiplier: tl.uint32, H_shift: tl.uint32,
    S: tl.int32, S_multiplier: tl.uint32, S_shift: tl.uint32, offset: tl.int32,
    rows: tl.int32, left: tl.int32, right: tl.int32, scale: tl.float64,  # rows = B * T * N * H; left, right in frames
    stride_gb: tl.int32, stride_gt: tl.int32, stride_gn: tl.int32, stride_gh: tl.int32,  # in UNITs
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qn: tl.int32, stride_qh: tl.int32,
    stride_kb: tl.int32, stride_kt: tl.int32, stride_kn: tl.int32, stride_kh: tl.int32,
    stride_vb: tl.int32, stride_vt: tl.int32, stride_vn: tl.int32, stride_vh: tl.int32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The three gradients of BLOCK_ROWS consecutive rows. No program adds to the result of another.

    SIDE "both" where the queries' rows are those of the keys; otherwise the gradients of "queries" or "keys" alone, and
    `rows` are those of this side.
    """
    first = tl.program_id(0) * BLOCK_ROWS
    count = tl.minimum(rows - first, BLOCK_ROWS)
    CONTINUED: tl.constexpr = SIDE != "both"
    of_queries, of_keys = (T, T_multiplier, T_shift), (S, S_multiplier, S_shift)
    positions, heads = (N, N_multiplier, N_shift), (H, H_multiplier, H_shift)
    if SIDE == "keys":
        t0, keys = flat.origin(first, of_keys, positions, heads)
        place = flat.with_frames(of_queries, keys)
    else:
        t0, place = flat.origin(first, of_queries, positions, heads)
        keys = place
        if CONTINUED:
            keys = flat.with_frames(of_keys, place)
    clips = (place, keys, offset)
    scale = tl.full([], scale, lse.dtype.element_ty)
    grad_out = (grad_out, stride_gb, stride_gt, stride_gn, stride_gh)
    query = (query, stride_qb, stride_qt, stride_qn, stride_qh)
    key = (key, stride_kb, stride_kt, stride_kn, stride_kh)
    value = (value, stride_vb, stride_vt, stride_vn, stride_vh)
    tensors = (grad_out, query, key, value, flat.contiguous(out, T, N, H, D), lse)
    frames = T
    if CONTINUED:
        frames = S
    grad_query = flat.contiguous(grad_query, T, N, H, D)
    grads = (grad_query, flat.contiguous(grad_key, frames, N, H, D), flat.contiguous(grad_value, frames, N, H, D))

    if SIDE != "keys":
        done = False
        if TENSOR_CORES:
            done = _query_gradient_by_tile(
                tensors,
                grads,
                t0,
                count,
                clips,
                left,
                right,
                scale,
                D,
                BLOCK_D,
                BLOCK_ROWS,
                BLOCK_OTHERS,
                STAGES,
                CONTINUED,
            )
        if not done:
            for begin in tl.range(0, count, ROWS, num_stages=1):
                row = t0 + begin + tl.arange(0, ROWS)
                _query_gradient_by_distance(
                    tensors, grads, row, row < t0 + count, clips, left, right, scale, D, BLOCK_D, CONTINUED
                )

    if SIDE != "queries":
        done = False
        if TENSOR_CORES:
            done = _key_value_gradient_by_tile(
                tensors,
                grads,
                t0,
                count,
                clips,
                left,
                right,
                scale,
                D,
                BLOCK_D,
                BLOCK_ROWS,
                BLOCK_OTHERS,
                STAGES,
                CONTINUED,
            )
        if not done:
            for begin in tl.range(0, count, ROWS, num_stages=1):
                row = t0 + begin + tl.arange(0, ROWS)
                _key_value_gradient_by_distance(
                    tensors, grads, row, row < t0 + count, clips, left, right, scale, D, BLOCK_D, CONTINUED
                )
