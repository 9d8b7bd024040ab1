"""The forward kernels of query-key matching.

Two passes over the scores, so that neither the weights of a head nor their mean is stored:

lse_A[n, s] = log sum_t exp(scale <query[a, s, n], key[b, t, n]>)      lse_B[n, t] likewise over s
C[t, s]     = share sum_n exp(score - lse_A[n, s]) + exp(score' - lse_B[n, t])      tile by tile, with a running arg max
"""

import triton
import triton.language as tl

from tritonkern.ops._triton import kernel
from tritonkern.ops.query_key_matching.triton_common import (
    rows_of,
    scores,
    source_cells,
    squared_distance,
    unknown_cells,
    weights_over_sources,
    weights_over_targets,
)


@kernel
def query_key_matching_fwd_kernel_lse(
    rows, others, cells, mask, lse,
    T: tl.int32, M: tl.int32, J: tl.int32, H: tl.int32, D: tl.int32, source: tl.int32, scale: tl.float64,
    stride_rb: tl.int32, stride_rt: tl.int32, stride_rs: tl.int32, stride_rh: tl.int32,  # in UNITs
    stride_ob: tl.int32, stride_ot: tl.int32, stride_os: tl.int32, stride_oh: tl.int32,
    OF_SOURCE: tl.constexpr, HAS_CELLS: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse [B, T, H, M] of the scores of ROWS rows with all J others.

    Rows are those of the source frame and others those of frame t (OF_SOURCE), or the other way round.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    blocks = tl.cdiv(M, ROWS)
    program = tl.program_id(0)
    m = program % blocks * ROWS + tl.arange(0, ROWS)
    program = program // blocks
    h = program % H
    t = program // H % T
    b = program // H // T
    cell, present = source_cells(cells, b, m, M, J, HAS_CELLS)
    row_frame, other_frame = t, source
    if OF_SOURCE:
        row_frame, other_frame = source, t
    left = rows_of((rows, stride_rb, stride_rt, stride_rs, stride_rh), b, row_frame, h, cell)
    highest = tl.full([ROWS], LOWEST, ACC)
    total = tl.zeros([ROWS], ACC)
    # Invariant: over the others before `start`, highest is the maximum and total the sum of exp(score - highest).
    for start in tl.range(0, J, OTHERS, num_stages=1):
        j = start + tl.arange(0, OTHERS)
        right = rows_of((others, stride_ob, stride_ot, stride_os, stride_oh), b, other_frame, h, j)
        score = scores(left, present, right, j < J, D, scale, BLOCK_C, PRECISION)
        seen = j < J
        if HAS_MASK:
            seen = seen & tl.load(mask + b.to(tl.int64) * J + j, mask=j < J, other=0).to(tl.int1)
        score = tl.where(seen[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(score - new_highest[:, None]), 1)
        highest = new_highest
    tl.store(lse + ((b * T + t).to(tl.int64) * H + h) * M + m, highest + tl.log(total), mask=present)


@triton.jit
def _cost(
    query, key, lse_a, lse_b, b, t, source, cell, m, m_present, j, T, M, S, H, D, scale,
    SYMMETRIC: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C[m, j], `[rows, others]`."""
    ACC: tl.constexpr = lse_a.dtype.element_ty
    total = tl.zeros([m.shape[0], j.shape[0]], ACC)
    for h in tl.range(0, H, num_stages=1):  # total: of the heads below h
        total += weights_over_targets(
            query, key, lse_a, b, t, h, source, cell, m, m_present, j, M, S, H, D, T, scale, BLOCK_C, PRECISION
        )
        if SYMMETRIC:
            total += weights_over_sources(
                query, key, lse_b, b, t, h, source, cell, m_present, j, S, H, D, T, scale, BLOCK_C, PRECISION
            )
    return total / tl.full([], H * (2 if SYMMETRIC else 1), ACC)


@kernel
def query_key_matching_fwd_kernel_match(
    query, key, cells, lse_a, lse_b, peak, points, index, weight,
    T: tl.int32, M: tl.int32, S: tl.int32, H: tl.int32, D: tl.int32, source: tl.int32, width: tl.int32,
    scale: tl.float64, limit: tl.float32,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qs: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_ks: tl.int32, stride_kh: tl.int32,
    HAS_CELLS: tl.constexpr, SYMMETRIC: tl.constexpr, DISC: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best cells, their costs and the mean positions of ROWS source cells in one frame."""
    ACC: tl.constexpr = lse_a.dtype.element_ty
    blocks = tl.cdiv(M, ROWS)
    program = tl.program_id(0)
    m = program % blocks * ROWS + tl.arange(0, ROWS)
    t = program // blocks % T
    b = program // blocks // T
    cell, present = source_cells(cells, b, m, M, S, HAS_CELLS)
    query = (query, stride_qb, stride_qt, stride_qs, stride_qh)
    key = (key, stride_kb, stride_kt, stride_ks, stride_kh)
    best = cell
    top = tl.full([ROWS], 1.0, ACC)
    total = top
    x, y = tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC)
    broken = unknown_cells(cells, b, m, M, S, HAS_CELLS).to(tl.int32)
    if t != source:  # a cell of the source frame matches itself
        best = tl.zeros([ROWS], tl.int32)
        top = tl.full([ROWS], -1.0, ACC)
        # Invariant: best is the first of the cells before `start` that has the largest cost, `top`.
        for start in tl.range(0, S, OTHERS, num_stages=1):
            j = start + tl.arange(0, OTHERS)
            cost = _cost(
                query, key, lse_a, lse_b, b, t, source, cell, m, present, j, T, M, S, H, D, scale,
                SYMMETRIC, BLOCK_C, PRECISION,
            )  # fmt: skip
            broken = tl.maximum(broken, tl.max((cost != cost).to(tl.int32), 1))
            cost = tl.where((j < S)[None, :] & (cost == cost), cost, -1.0)
            highest = tl.max(cost, 1)
            first = tl.min(tl.where(cost == highest[:, None], j[None, :], 2147483647), 1)
            best = tl.where(highest > top, first, best)
            top = tl.maximum(highest, top)
        total = top
        if DISC:
            total = tl.zeros([ROWS], ACC)
            for start in tl.range(0, S, OTHERS, num_stages=1):
                j = start + tl.arange(0, OTHERS)
                near = (squared_distance(best, j, width) < limit) & (j < S)[None, :]
                if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
                    cost = _cost(
                        query, key, lse_a, lse_b, b, t, source, cell, m, present, j, T, M, S, H, D, scale,
                        SYMMETRIC, BLOCK_C, PRECISION,
                    )  # fmt: skip
                    cost = tl.where(near, cost, 0.0)
                    total += tl.sum(cost, 1)
                    x += tl.sum(cost * ((j % width)[None, :] - (best % width)[:, None]), 1)
                    y += tl.sum(cost * ((j // width)[None, :] - (best // width)[:, None]), 1)
    row = (b * T + t).to(tl.int64) * M + m
    nan = float("nan")
    tl.store(index + row, tl.where(broken > 0, -1, best).to(tl.int64), mask=present)
    tl.store(peak + row, tl.where(broken > 0, nan, top), mask=present)
    tl.store(weight + row, tl.where(broken > 0, nan, total), mask=present)
    tl.store(points + 2 * row, tl.where(broken > 0, nan, best % width + 0.5 + x / total), mask=present)
    tl.store(points + 2 * row + 1, tl.where(broken > 0, nan, best // width + 0.5 + y / total), mask=present)


@kernel
def query_key_matching_fwd_kernel_cost(
    query, key, cells, lse_a, lse_b, out,
    T: tl.int32, M: tl.int32, S: tl.int32, H: tl.int32, D: tl.int32, source: tl.int32, scale: tl.float64,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qs: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_ks: tl.int32, stride_kh: tl.int32,
    HAS_CELLS: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C of ROWS source cells and OTHERS cells of one frame, into out [B, T, M, S]."""
    blocks, columns = tl.cdiv(M, ROWS), tl.cdiv(S, OTHERS)
    program = tl.program_id(0)
    j = program % columns * OTHERS + tl.arange(0, OTHERS)
    program = program // columns
    m = program % blocks * ROWS + tl.arange(0, ROWS)
    t = program // blocks % T
    b = program // blocks // T
    cell, present = source_cells(cells, b, m, M, S, HAS_CELLS)
    cost = _cost(
        (query, stride_qb, stride_qt, stride_qs, stride_qh), (key, stride_kb, stride_kt, stride_ks, stride_kh),
        lse_a, lse_b, b, t, source, cell, m, present, j, T, M, S, H, D, scale, SYMMETRIC, BLOCK_C, PRECISION,
    )  # fmt: skip
    cost = tl.where(unknown_cells(cells, b, m, M, S, HAS_CELLS)[:, None], float("nan"), cost)
    row = (b * T + t).to(tl.int64) * M + m
    tl.store(out + row[:, None] * S + j[None, :], cost, mask=present[:, None] & (j < S)[None, :])
