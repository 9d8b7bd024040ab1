"""The kernels of attention row statistics and of frame-local attention."""

import triton
import triton.language as tl

from tritonkern.ops._triton import kernel, product
from tritonkern.ops.query_key_matching.triton_common import load_rows, rows_of, scores


@triton.jit
def _chosen(g, of_0, of_1, of_2, of_3):
    return tl.where(g == 0, of_0, tl.where(g == 1, of_1, tl.where(g == 2, of_2, of_3)))


@kernel
def attention_row_statistics_fwd_kernel(
    rows, key, mask, lse, maximum, total,
    N: tl.int32, J: tl.int32, H: tl.int32, D: tl.int32, G: tl.int32, first: tl.int32, count: tl.int32,
    begin_0: tl.int32, stop_0: tl.int32, begin_1: tl.int32, stop_1: tl.int32, begin_2: tl.int32, stop_2: tl.int32,
    begin_3: tl.int32, stop_3: tl.int32, scale: tl.float64,
    stride_rb: tl.int32, stride_rt: tl.int32, stride_rs: tl.int32, stride_rh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_ks: tl.int32, stride_kh: tl.int32,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum and sum, of one segment and ROWS rows, of P[i, j] = mean_n exp(scale <row_i, key_j> - lse_i).

    A launch has the `count` segments from `first` on, at most four of G. Their bounds are numbers and not a tensor,
    which would have to be copied from the host, and no CUDA graph could hold that.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    blocks = tl.cdiv(N, ROWS)
    program = tl.program_id(0)
    g = program % count
    i = program // count % blocks * ROWS + tl.arange(0, ROWS)
    b = program // count // blocks
    begin = _chosen(g, begin_0, begin_1, begin_2, begin_3)
    stop = _chosen(g, stop_0, stop_1, stop_2, stop_3)
    highest = tl.zeros([ROWS], ACC)
    sums = tl.zeros([ROWS], ACC)
    for start in tl.range(begin, stop, OTHERS, num_stages=1):
        j = start + tl.arange(0, OTHERS)
        seen = j < stop
        if HAS_MASK:
            seen = seen & tl.load(mask + b.to(tl.int64) * J + j, mask=j < stop, other=0).to(tl.int1)
        mean = tl.zeros([ROWS, OTHERS], ACC)
        for h in tl.range(0, H, num_stages=1):
            left = rows_of((rows, stride_rb, stride_rt, stride_rs, stride_rh), b, 0 * b, h, i)
            right = rows_of((key, stride_kb, stride_kt, stride_ks, stride_kh), b, 0 * b, h, j)
            score = scores(left, i < N, right, j < stop, D, scale, BLOCK_C, PRECISION)
            row_lse = tl.load(lse + (b.to(tl.int64) * H + h) * N + i, mask=i < N, other=0.0)
            score = tl.where(seen[None, :], score, float("-inf"))
            weight = tl.exp(score - row_lse[:, None])
            # Where no key takes part the log-sum-exp is -inf, and so is every score.
            weight = tl.where((row_lse == float("-inf"))[:, None], float("nan"), weight)
            mean += tl.where((j < stop)[None, :], weight, 0.0)
        mean = mean / tl.full([], H, ACC)
        highest = tl.maximum(highest, tl.max(tl.where(mean == mean, mean, 0.0), 1))
        sums += tl.sum(mean, 1)
    to = (b.to(tl.int64) * N + i) * G + first + g
    tl.store(maximum + to, tl.where(sums == sums, highest, sums), mask=i < N)
    tl.store(total + to, sums, mask=i < N)


@triton.jit
def _visit(
    q, key, value, b, h, begin, stop, D, scale, state,
    SEEN: tl.constexpr, OTHERS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """Adds the exponentials of the keys begin to stop to the sum and, if they are SEEN, their values to the result."""
    out, highest, total = state
    ACC: tl.constexpr = out.dtype
    # Invariant: over the keys before `start`, highest is the maximum of the scores, total the sum of
    # exp(score - highest), and out that of exp(score - highest) * value over those that are seen.
    for start in tl.range(begin, stop, OTHERS, num_stages=1):
        j = start + tl.arange(0, OTHERS)
        k = load_rows(rows_of(key, b, 0 * b, h, j), j < stop, 0, D, BLOCK_D)
        score = product(q, tl.trans(k), tl.zeros([q.shape[0], OTHERS], ACC), PRECISION) * tl.full([], scale, ACC)
        score = tl.where((j < stop)[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - new_highest[:, None])
        decay = tl.exp(highest - new_highest)
        highest = new_highest
        total = total * decay + tl.sum(weight, 1)
        out = out * decay[:, None]
        if SEEN:
            v = load_rows(rows_of(value, b, 0 * b, h, j), j < stop, 0, D, BLOCK_D).to(ACC)
            out = product(weight, v, out, OF_VALUES)
    return out, highest, total


@kernel
def frame_local_attention_fwd_kernel(
    query, key, value, out,
    n: tl.int32, H: tl.int32, D: tl.int32, text: tl.int32, frames: tl.int32, cells: tl.int32, scale: tl.float64,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qs: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_ks: tl.int32, stride_kh: tl.int32,
    stride_vb: tl.int32, stride_vt: tl.int32, stride_vs: tl.int32, stride_vh: tl.int32,
    TEXT_LAST: tl.constexpr, RENORMALISE: tl.constexpr, DOUBLE: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries of one head, all of them text or all of one frame."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    LOWEST: tl.constexpr = -1.7976931348623157e308 if DOUBLE else -3.4028234663852886e38
    text_blocks, frame_blocks = tl.cdiv(text, ROWS), tl.cdiv(cells, ROWS)
    blocks = text_blocks + frames * frame_blocks
    program = tl.program_id(0)
    block = program % blocks
    h = program // blocks % H
    b = program // blocks // H
    query = (query, stride_qb, stride_qt, stride_qs, stride_qh)
    key = (key, stride_kb, stride_kt, stride_ks, stride_kh)
    value = (value, stride_vb, stride_vt, stride_vs, stride_vh)
    text_start, video = 0, text
    if TEXT_LAST:
        text_start, video = n - text, 0
    is_text = block < text_blocks
    of_frame = tl.maximum(block - text_blocks, 0)
    begin = tl.where(is_text, text_start, video + of_frame // tl.maximum(frame_blocks, 1) * cells)
    stop = tl.where(is_text, text_start + text, begin + cells)
    i = begin + tl.where(is_text, block, of_frame % tl.maximum(frame_blocks, 1)) * ROWS + tl.arange(0, ROWS)
    q = load_rows(rows_of(query, b, 0 * b, h, i), i < stop, 0, D, BLOCK_D)
    state = (tl.zeros([ROWS, BLOCK_D], ACC), tl.full([ROWS], LOWEST, ACC), tl.zeros([ROWS], ACC))
    # Text sees the text and all frames; video the text and its own frame, and counts the others or not.
    first_seen = tl.where(is_text, video, begin)
    last_seen = tl.where(is_text, video + frames * cells, stop)
    state = _visit(
        q, key, value, b, h, text_start, text_start + text, D, scale, state,
        True, OTHERS, BLOCK_D, PRECISION, OF_VALUES,
    )  # fmt: skip
    state = _visit(
        q, key, value, b, h, first_seen, last_seen, D, scale, state, True, OTHERS, BLOCK_D, PRECISION, OF_VALUES
    )
    if not RENORMALISE:
        state = _visit(
            q, key, value, b, h, video, first_seen, D, scale, state, False, OTHERS, BLOCK_D, PRECISION, OF_VALUES
        )
        state = _visit(
            q, key, value, b, h, last_seen, video + frames * cells, D, scale, state,
            False, OTHERS, BLOCK_D, PRECISION, OF_VALUES,
        )  # fmt: skip
    result, _, total = state
    c = tl.arange(0, BLOCK_D)
    to = ((b.to(tl.int64) * n + i) * H + h)[:, None] * D + c[None, :]
    tl.store(out + to, (result / total[:, None]).to(out.dtype.element_ty), mask=(i < stop)[:, None] & (c < D)[None, :])
