"""The forward kernel of temporal window attention.

lse_i = log sum_j exp(scale * q_i . k_j)          i + offset - left <= j <= i + offset + right,   0 <= j < S
out_i = sum_j exp(scale * q_i . k_j - lse_i) v_j

`clips` is the place of the queries, that of the keys, the offset, and the frame that key 0 is stored as.
"""

import triton
import triton.language as tl

from tritonkern.ops._triton import kernel
from tritonkern.ops.temporal_window_attention import triton_rows as flat


@triton.jit
def poisoned(tile):
    """True if any entry is not finite."""
    # One sum over both axes: a sum of row sums crashes Triton 3.6 on sm_100.
    return tl.sum(tile * 0.0) != 0.0


@triton.jit
def _load_keys(tensor, row, in_range, clips, D: tl.constexpr, BLOCK_D: tl.constexpr, CONTINUED: tl.constexpr):
    if CONTINUED:
        return flat.load_ring(tensor, row, in_range, clips[1], clips[3], D, BLOCK_D)
    else:
        return flat.load(tensor, row, in_range, clips[1], D, BLOCK_D)


@triton.jit
def _forward_by_tile(
    tensors, t0, count, clips, left, right, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """Attention of all `count` rows from row t0 on. Returns False and stores nothing if a result is not finite."""
    query, key, value, out, lse = tensors
    place, keys, offset, _ = clips
    row = t0 + tl.arange(0, BLOCK_ROWS)
    in_range = row < t0 + count
    q = flat.load(query, row, in_range, place, D, BLOCK_D)
    _, first, last = flat.window(row, place[0], keys[0], offset, left, right, CONTINUED)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    weights = tl.zeros([BLOCK_ROWS], tl.float32)
    # Finite, so that no exponent is -inf - -inf where a row sees nothing of the first tile.
    highest = tl.full([BLOCK_ROWS], -3.4028234663852886e38, tl.float32)
    start, stop = flat.reach(t0, count, place[0], keys[0], offset, left, right, CONTINUED)
    # Invariant: over the keys before `begin`, highest = max(score), weights = sum exp(score - highest), and total is
    # the sum of exp(score - highest) * value.
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        k = _load_keys(key, other, other < stop, clips, D, BLOCK_D, CONTINUED)
        v = _load_keys(value, other, other < stop, clips, D, BLOCK_D, CONTINUED)
        seen = flat.visible(other, first, last, CONTINUED)
        score = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - new_highest[:, None])
        decay = tl.exp(highest - new_highest)
        highest = new_highest
        weights = weights * decay + tl.sum(weight, 1)
        total = tl.dot(weight.to(v.dtype), v, total * decay[:, None])
    finite = not poisoned(total)
    if finite:
        flat.store(out, row, total * (1.0 / weights)[:, None], in_range, place, D, BLOCK_D)
        tl.store(lse + flat.number(row, place), highest + tl.log(weights), mask=in_range)
    return finite


@triton.jit
def _forward_by_distance(
    tensors, row, in_range, clips, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """Attention of the rows `row` that are in range (`in_range`), one frame distance after the other."""
    query, key, value, out, lse = tensors
    place, keys, offset, _ = clips
    ACC: tl.constexpr = scale.dtype
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    same, first, last = flat.window(row, place[0], keys[0], offset, left, right, CONTINUED)
    q = flat.load(query, row, in_range, place, D, BLOCK_D).to(ACC)
    total = tl.zeros(q.shape, ACC)
    weights = tl.zeros(row.shape, ACC)
    highest = tl.full(row.shape, LOWEST, ACC)
    # Invariant: as in _forward_by_tile, over the keys at smaller distances.
    for distance in tl.range(-left, right + 1, num_stages=1):
        other = same + distance
        visible = in_range & (other >= first) & (other <= last)
        k = _load_keys(key, other, visible, clips, D, BLOCK_D, CONTINUED).to(ACC)
        v = _load_keys(value, other, visible, clips, D, BLOCK_D, CONTINUED).to(ACC)
        score = tl.where(visible, tl.sum(q * k, 1) * scale, float("-inf"))
        new_highest = tl.maximum(highest, score)
        weight = tl.exp(score - new_highest)
        decay = tl.exp(highest - new_highest)
        highest = new_highest
        weights = weights * decay + weight
        total = total * decay[:, None] + weight[:, None] * v
    flat.store(out, row, total / weights[:, None], in_range, place, D, BLOCK_D)
    tl.store(lse + flat.number(row, place), highest + tl.log(weights), mask=in_range)


@kernel
def temporal_window_attention_fwd_kernel(
    query, key, value, out, lse,
    T: tl.int32, T_multiplier: tl.uint32, T_shift: tl.uint32,  # a size and what divides by it, see flat.divisor
    N: tl.int32, N_multiplier: tl.uint32, N_shift: tl.uint32,
    H: tl.int32, H_multiplier: tl.uint32, H_shift: tl.uint32,
    S: tl.int32, S_multiplier: tl.uint32, S_shift: tl.uint32, offset: tl.int32, start: tl.int32,
    rows: tl.int32, left: tl.int32, right: tl.int32, scale: tl.float64,  # rows = B * T * N * H; left, right in frames
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qn: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_kn: tl.int32, stride_kh: tl.int32,
    stride_vb: tl.int32, stride_vt: tl.int32, stride_vn: tl.int32, stride_vh: tl.int32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_ROWS consecutive rows of flattened time. S, offset and start count where CONTINUED."""
    first = tl.program_id(0) * BLOCK_ROWS
    count = tl.minimum(rows - first, BLOCK_ROWS)
    t0, place = flat.origin(first, (T, T_multiplier, T_shift), (N, N_multiplier, N_shift), (H, H_multiplier, H_shift))
    keys = place
    if CONTINUED:
        keys = flat.with_frames((S, S_multiplier, S_shift), place)
    clips = (place, keys, offset, start)
    scale = tl.full([], scale, lse.dtype.element_ty)
    query = (query, stride_qb, stride_qt, stride_qn, stride_qh)
    key = (key, stride_kb, stride_kt, stride_kn, stride_kh)
    value = (value, stride_vb, stride_vt, stride_vn, stride_vh)
    tensors = (query, key, value, flat.contiguous(out, T, N, H, D), lse)
    done = False
    if TENSOR_CORES:
        done = _forward_by_tile(
            tensors, t0, count, clips, left, right, scale, D, BLOCK_D, BLOCK_ROWS, BLOCK_OTHERS, STAGES, CONTINUED
        )
    if not done:
        for begin in tl.range(0, count, ROWS, num_stages=1):
            row = t0 + begin + tl.arange(0, ROWS)
            _forward_by_distance(tensors, row, row < t0 + count, clips, left, right, scale, D, BLOCK_D, CONTINUED)
