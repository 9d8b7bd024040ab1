"""Triton kernels of temporal window attention, forward and backward, and their launchers.

Time is flattened. Sequences (batch, position, head) are laid end to end, head fastest, and row `sequence * T + frame` of
that line is one vector of D numbers. A program owns BLOCK_ROWS consecutive rows, so that several short clips fill a tile
and a long clip is cut into pieces, and it meets only the rows that share a window with its own. Neighbouring programs
read neighbouring addresses, as head and position are the fastest axes of a video in memory.

Row numbers inside a program are int32 and count from the first frame of the sequence that holds its first row; only the
way from there to an address takes 64 bits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops.temporal_window_attention import configs

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Strides arrive divided by this: the compiler then knows that rows start on 16 bytes, whatever B, T, N and H are.
UNIT = tl.constexpr(8)


@triton.jit
def _divide(x, divisor):
    """x // divisor for 0 <= x < 2**31, without the thirty instructions of a division; see `_divisor`."""
    _, multiplier, shift = divisor
    return (tl.umulhi(x.to(tl.uint32) * 2, multiplier.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def _locate(row, place):
    """Batch, position, head and frame of rows that count from the start of the sequence of `place`."""
    T, N, H, b0, n0, h0 = place
    sequence = _divide(row, T)
    position = _divide(h0 + sequence, H)
    b = _divide(n0 + position, N)
    return b0 + b, n0 + position - b * N[0], h0 + sequence - position * H[0], row - sequence * T[0]


@triton.jit
def _pointers(tensor, row, place, BLOCK_D: tl.constexpr):
    """Addresses `[rows, BLOCK_D]`. Counted in units of 8 numbers, 32 bits reach over 2**34 of them."""
    pointer, stride_b, stride_t, stride_n, stride_h = tensor
    b, n, h, t = _locate(row, place)
    units = b * stride_b + t * stride_t + n * stride_n + h * stride_h
    return (pointer + units.to(tl.int64) * UNIT)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _inside(present, D: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = present[:, None]
    if D < BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    return inside


@triton.jit
def _load(tensor, row, present, place, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile `[rows, BLOCK_D]`, zero in rows that are not present and beyond D."""
    return tl.load(_pointers(tensor, row, place, BLOCK_D), mask=_inside(present, D, BLOCK_D), other=0.0)


@triton.jit
def _store(tensor, row, tile, present, place, D: tl.constexpr, BLOCK_D: tl.constexpr):
    tile = tile.to(tensor[0].dtype.element_ty)
    tl.store(_pointers(tensor, row, place, BLOCK_D), tile, mask=_inside(present, D, BLOCK_D))


@triton.jit
def _contiguous(pointer, T, N, H, D: tl.constexpr):
    """A contiguous `[B, T, N, H, D]` tensor with its strides."""
    return pointer, T * N * H * (D // UNIT), N * H * (D // UNIT), H * (D // UNIT), D // UNIT


@triton.jit
def _number(row, place):
    """Place of each row in a contiguous `[B, T, N, H]` tensor."""
    b, n, h, t = _locate(row, place)
    return ((b * place[0][0] + t) * place[1][0] + n) * place[2][0] + h


@triton.jit
def _reach(t0, count, T, before, after):
    """From the first row that shares a window with any of `count` rows to one past the last."""
    last = t0 + count - 1
    last_t = last - _divide(last, T) * T[0]
    return t0 - tl.minimum(before, t0), last + tl.minimum(after, T[0] - 1 - last_t) + 1


@triton.jit
def _window(row, T, before, after):
    """First and last row that share a window with each row, cut at the ends of its clip."""
    t = row - _divide(row, T) * T[0]
    return row - tl.minimum(before, t), row + tl.minimum(after, T[0] - 1 - t)


@triton.jit
def _visible(other, first, last):
    return (other[None, :] - first[:, None]).to(tl.uint32) <= (last - first).to(tl.uint32)[:, None]


@triton.jit
def _poisoned(tile):
    """True if any entry is not finite (or if finite ones overflow when added up)."""
    return tl.sum(tl.sum(tile, 1) * 0.0, 0) != 0.0


@triton.jit
def _forward_by_tile(
    query, key, value, out, lse, t0, count, place, left, right, base2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of all rows at once on tensor cores. False, and nothing is stored, if a result is not finite.

    Zero times NaN is NaN: a bad frame poisons its whole tile, rows that do not see it included.
    """
    row = t0 + tl.arange(0, BLOCK_ROWS)
    present = row < t0 + count
    q = _load(query, row, present, place, D, BLOCK_D)
    first, last = _window(row, place[0], left, right)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    weights = tl.zeros([BLOCK_ROWS], tl.float32)
    highest = tl.full([BLOCK_ROWS], -3.4028234663852886e38, tl.float32)
    start, stop = _reach(t0, count, place[0], left, right)
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        k = _load(key, other, other < stop, place, D, BLOCK_D)
        v = _load(value, other, other < stop, place, D, BLOCK_D)
        score = tl.where(_visible(other, first, last), tl.dot(q, tl.trans(k)) * base2, float("-inf"))
        # The maximum starts finite, so that it is never -inf - -inf where a row sees nothing of this tile.
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - new_highest[:, None])
        fade = tl.exp2(highest - new_highest)
        highest = new_highest
        weights = weights * fade + tl.sum(weight, 1)
        total = tl.dot(weight.to(v.dtype), v, total * fade[:, None])
    finite = not _poisoned(total)
    if finite:
        _store(out, row, total * (1.0 / weights)[:, None], present, place, D, BLOCK_D)
        tl.store(lse + _number(row, place), (highest + tl.log2(weights)) * LN_2, mask=present)
    return finite


@triton.jit
def _forward_by_distance(
    query, key, value, out, lse, row, present, place, left, right, base2, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Attention of a few rows, one frame distance after the other: no row meets a frame that it does not see."""
    ACC: tl.constexpr = base2.dtype
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    first, last = _window(row, place[0], left, right)
    q = _load(query, row, present, place, D, BLOCK_D).to(ACC)
    total = tl.zeros(q.shape, ACC)
    weights = tl.zeros(row.shape, ACC)
    highest = tl.full(row.shape, LOWEST, ACC)
    for distance in tl.range(-left, right + 1, num_stages=1):
        other = row + distance
        visible = present & (other >= first) & (other <= last)
        k = _load(key, other, visible, place, D, BLOCK_D).to(ACC)
        v = _load(value, other, visible, place, D, BLOCK_D).to(ACC)
        score = tl.where(visible, tl.sum(q * k, 1) * base2, float("-inf"))
        new_highest = tl.maximum(highest, score)
        weight = tl.exp2(score - new_highest)
        fade = tl.exp2(highest - new_highest)
        highest = new_highest
        weights = weights * fade + weight
        total = total * fade[:, None] + weight[:, None] * v
    _store(out, row, total / weights[:, None], present, place, D, BLOCK_D)
    tl.store(lse + _number(row, place), (highest + tl.log2(weights)) * LN_2, mask=present)


@triton.jit
def _place(first, T, N, H):
    """Frame of a flattened row, and what `_locate` needs to find rows that count from the start of its sequence."""
    sequence = _divide(first, T)
    position = _divide(sequence, H)
    b = _divide(position, N)
    return first - sequence * T[0], (T, N, H, b, position - b * N[0], sequence - position * H[0])


@triton.jit(do_not_specialize=[
    "T", "T_multiplier", "T_shift", "N", "N_multiplier", "N_shift", "H", "H_multiplier", "H_shift",
    "rows", "left", "right", "scale",
    "stride_qb", "stride_qt", "stride_qn", "stride_qh", "stride_kb", "stride_kt", "stride_kn", "stride_kh",
    "stride_vb", "stride_vt", "stride_vn", "stride_vh",
])
def forward_kernel(
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
    t0, place = _place(first, (T, T_multiplier, T_shift), (N, N_multiplier, N_shift), (H, H_multiplier, H_shift))
    base2 = tl.full([], scale * LOG2_E, lse.dtype.element_ty)
    query = (query, stride_qb, stride_qt, stride_qn, stride_qh)
    key = (key, stride_kb, stride_kt, stride_kn, stride_kh)
    value = (value, stride_vb, stride_vt, stride_vn, stride_vh)
    out = _contiguous(out, T, N, H, D)
    done = False
    if TENSOR_CORES:
        done = _forward_by_tile(
            query, key, value, out, lse, t0, count, place, left, right, base2,
            D, BLOCK_D, BLOCK_ROWS, BLOCK_OTHERS, STAGES,
        )  # fmt: skip
    if not done:
        for begin in tl.range(0, count, ROWS, num_stages=1):
            row = t0 + begin + tl.arange(0, ROWS)
            present = row < t0 + count
            _forward_by_distance(query, key, value, out, lse, row, present, place, left, right, base2, D, BLOCK_D)


@triton.jit
def _query_gradient_by_tile(
    grad_out, query, key, value, out, lse, grad_query, t0, count, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of all queries at once. False, and nothing is stored, if a result is not finite."""
    row = t0 + tl.arange(0, BLOCK_ROWS)
    present = row < t0 + count
    q = _load(query, row, present, place, D, BLOCK_D)
    g = _load(grad_out, row, present, place, D, BLOCK_D)
    o = _load(out, row, present, place, D, BLOCK_D)
    base2 = tl.load(lse + _number(row, place), mask=present, other=0.0) * LOG2_E
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    first, last = _window(row, place[0], left, right)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    start, stop = _reach(t0, count, place[0], left, right)
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        k = _load(key, other, other < stop, place, D, BLOCK_D)
        v = _load(value, other, other < stop, place, D, BLOCK_D)
        score = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
        weight = tl.where(_visible(other, first, last), tl.exp2(score - base2[:, None]), 0.0)
        grad_score = weight * (tl.dot(g, tl.trans(v)) - delta[:, None])
        total = tl.dot(grad_score.to(k.dtype), k, total)
    finite = not _poisoned(total)
    if finite:
        _store(grad_query, row, total * scale, present, place, D, BLOCK_D)
    return finite


@triton.jit
def _key_value_gradient_by_tile(
    grad_out, query, key, value, out, lse, grad_key, grad_value, t0, count, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of all keys and values at once. False, and nothing is stored, if a result is not finite."""
    row = t0 + tl.arange(0, BLOCK_ROWS)
    present = row < t0 + count
    k = _load(key, row, present, place, D, BLOCK_D)
    v = _load(value, row, present, place, D, BLOCK_D)
    # A query looks `left` back and `right` ahead, so the queries that see a key lie the other way round.
    first, last = _window(row, place[0], right, left)
    total_k = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    start, stop = _reach(t0, count, place[0], right, left)
    for begin in tl.range(start, stop, BLOCK_OTHERS, num_stages=STAGES):
        other = begin + tl.arange(0, BLOCK_OTHERS)
        q = _load(query, other, other < stop, place, D, BLOCK_D)
        g = _load(grad_out, other, other < stop, place, D, BLOCK_D)
        o = _load(out, other, other < stop, place, D, BLOCK_D)
        base2 = tl.load(lse + _number(other, place), mask=other < stop, other=0.0) * LOG2_E
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        score = tl.dot(k, tl.trans(q)) * (scale * LOG2_E)
        weight = tl.where(_visible(other, first, last), tl.exp2(score - base2[None, :]), 0.0)
        total_v = tl.dot(weight.to(g.dtype), g, total_v)
        grad_score = weight * (tl.dot(v, tl.trans(g)) - delta[None, :])
        total_k = tl.dot(grad_score.to(q.dtype), q, total_k)
    finite = not (_poisoned(total_k) | _poisoned(total_v))
    if finite:
        _store(grad_key, row, total_k * scale, present, place, D, BLOCK_D)
        _store(grad_value, row, total_v, present, place, D, BLOCK_D)
    return finite


@triton.jit
def _query_gradient_by_distance(
    grad_out, query, key, value, out, lse, grad_query, row, present, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of a few queries, one frame distance after the other."""
    ACC: tl.constexpr = scale.dtype
    first, last = _window(row, place[0], left, right)
    q = _load(query, row, present, place, D, BLOCK_D).to(ACC)
    g = _load(grad_out, row, present, place, D, BLOCK_D).to(ACC)
    delta = tl.sum(g * _load(out, row, present, place, D, BLOCK_D).to(ACC), 1)
    base2 = tl.load(lse + _number(row, place), mask=present, other=0.0) * LOG2_E
    total = tl.zeros(q.shape, ACC)
    for distance in tl.range(-left, right + 1, num_stages=1):
        other = row + distance
        visible = present & (other >= first) & (other <= last)
        k = _load(key, other, visible, place, D, BLOCK_D).to(ACC)
        v = _load(value, other, visible, place, D, BLOCK_D).to(ACC)
        weight = tl.exp2(tl.sum(q * k, 1) * (scale * LOG2_E) - base2)
        grad_score = tl.where(visible, weight * (tl.sum(g * v, 1) - delta), 0.0)
        total += grad_score[:, None] * k
    _store(grad_query, row, total * scale, present, place, D, BLOCK_D)


@triton.jit
def _key_value_gradient_by_distance(
    grad_out, query, key, value, out, lse, grad_key, grad_value, row, present, place, left, right, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a few keys and values, one frame distance after the other."""
    ACC: tl.constexpr = scale.dtype
    first, last = _window(row, place[0], right, left)
    k = _load(key, row, present, place, D, BLOCK_D).to(ACC)
    v = _load(value, row, present, place, D, BLOCK_D).to(ACC)
    total_k = tl.zeros(k.shape, ACC)
    total_v = tl.zeros(v.shape, ACC)
    for distance in tl.range(-right, left + 1, num_stages=1):
        other = row + distance
        visible = present & (other >= first) & (other <= last)
        q = _load(query, other, visible, place, D, BLOCK_D).to(ACC)
        g = _load(grad_out, other, visible, place, D, BLOCK_D).to(ACC)
        delta = tl.sum(g * _load(out, other, visible, place, D, BLOCK_D).to(ACC), 1)
        base2 = tl.load(lse + _number(other, place), mask=visible, other=0.0) * LOG2_E
        weight = tl.where(visible, tl.exp2(tl.sum(q * k, 1) * (scale * LOG2_E) - base2), 0.0)
        grad_score = tl.where(visible, weight * (tl.sum(g * v, 1) - delta), 0.0)
        total_k += grad_score[:, None] * q
        total_v += weight[:, None] * g
    _store(grad_key, row, total_k * scale, present, place, D, BLOCK_D)
    _store(grad_value, row, total_v, present, place, D, BLOCK_D)


@triton.jit(do_not_specialize=[
    "T", "T_multiplier", "T_shift", "N", "N_multiplier", "N_shift", "H", "H_multiplier", "H_shift",
    "rows", "left", "right", "scale",
    "stride_gb", "stride_gt", "stride_gn", "stride_gh", "stride_qb", "stride_qt", "stride_qn", "stride_qh",
    "stride_kb", "stride_kt", "stride_kn", "stride_kh", "stride_vb", "stride_vt", "stride_vn", "stride_vh",
    "stride_ob", "stride_ot", "stride_on", "stride_oh",
])
def backward_kernel(
    grad_out, query, key, value, out, lse, grad_query, grad_key, grad_value,
    T: tl.int32, T_multiplier: tl.uint32, T_shift: tl.uint32, N: tl.int32, N_multiplier: tl.uint32, N_shift: tl.uint32,
    H: tl.int32, H_multiplier: tl.uint32, H_shift: tl.uint32, rows: tl.int32, left: tl.int32,
    right: tl.int32, scale: tl.float64,
    stride_gb: tl.int32, stride_gt: tl.int32, stride_gn: tl.int32, stride_gh: tl.int32,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qn: tl.int32, stride_qh: tl.int32,
    stride_kb: tl.int32, stride_kt: tl.int32, stride_kn: tl.int32, stride_kh: tl.int32,
    stride_vb: tl.int32, stride_vt: tl.int32, stride_vn: tl.int32, stride_vh: tl.int32,
    stride_ob: tl.int32, stride_ot: tl.int32, stride_on: tl.int32, stride_oh: tl.int32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every program makes the three gradients of its own rows, so that nothing is added across programs."""
    first = tl.program_id(0) * BLOCK_ROWS
    count = tl.minimum(rows - first, BLOCK_ROWS)
    t0, place = _place(first, (T, T_multiplier, T_shift), (N, N_multiplier, N_shift), (H, H_multiplier, H_shift))
    scale = tl.full([], scale, lse.dtype.element_ty)
    grad_out = (grad_out, stride_gb, stride_gt, stride_gn, stride_gh)
    query = (query, stride_qb, stride_qt, stride_qn, stride_qh)
    key = (key, stride_kb, stride_kt, stride_kn, stride_kh)
    value = (value, stride_vb, stride_vt, stride_vn, stride_vh)
    out = (out, stride_ob, stride_ot, stride_on, stride_oh)
    grad_query = _contiguous(grad_query, T, N, H, D)
    grad_key = _contiguous(grad_key, T, N, H, D)
    grad_value = _contiguous(grad_value, T, N, H, D)

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


@functools.lru_cache(maxsize=256)
def _divisor(divisor: int) -> tuple[int, int, int]:
    """A number and what makes `_divide` by it exact: x // d == x * ceil(2**(31 + s) / d) >> (31 + s) with d <= 2**s."""
    shift = (divisor - 1).bit_length()
    return divisor, -(-(1 << (31 + shift)) // divisor), shift


def _readable(x: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor and its strides in UNITs; a copy of it if rows are strided inside, not aligned or out of reach."""
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    span = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    if strides[-1] != 1 or any(s % UNIT.value for s in strides[:-1]) or x.data_ptr() % 16 or span >= configs.MAX_ELEMENTS:
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride())
    return x, [stride // UNIT.value for stride in strides[:-1]]


def _launch(kernel, inputs, saved, outputs, choose, left: int, right: int, scale: float) -> None:
    """Run a kernel on inputs of any strides, contiguous saved tensors and contiguous outputs."""
    B, T, N, H, D = outputs[0].shape
    rows = B * T * N * H
    if rows == 0:
        return
    left, right = min(left, T - 1), min(right, T - 1)
    inputs, strides = zip(*(_readable(x) for x in inputs), strict=True)
    tiles = choose(D, left + right + 1, inputs[0].dtype, configs.tf32_allowed())
    with torch.cuda.device_of(outputs[0]):
        kernel[(triton.cdiv(rows, tiles.block_rows),)](
            *inputs, *saved, *outputs, *_divisor(T), *_divisor(N), *_divisor(H), rows, left, right, scale,
            *(stride for unit in strides for stride in unit),
            D=D, BLOCK_D=configs.block_d(D), TENSOR_CORES=tiles.tensor_cores, BLOCK_ROWS=tiles.block_rows,
            BLOCK_OTHERS=tiles.block_others, ROWS=tiles.rows, STAGES=tiles.num_stages,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip


def forward(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, T, N, H, D]` three times -> out `[B, T, N, H, D]` and the log-sum-exp of the scores `[B, T, N, H]`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
    _launch(forward_kernel, (query, key, value), (), (out, lse), configs.forward_tiles, left, right, scale)
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
    inputs = grad_out, query, key, value, out
    _launch(backward_kernel, inputs, (lse.contiguous(),), grads, configs.backward_tiles, left, right, scale)
    return grads
