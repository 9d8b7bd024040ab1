"""The backward kernels of query-key matching; see csrc/query_key_matching/backward.h for the formula.

G is the gradient of C, `inner` that of a score; weights are computed again from the log-sum-exps:

sums:    d[n, m] = sum_j A[n, m, j] G[m, j]          e[n, j] = sum_m B[n, j, m] G[m, j]
inner:   A[n, m, j] (G[m, j] - d[n, m])              B[n, j, s] (G[s, j] - e[n, j])

With chosen cells the second inner gradient is in two parts, G in the chosen cells and -e in all of them.
"""

import triton.language as tl

from tritonkern.ops._triton import kernel, product
from tritonkern.ops.query_key_matching.triton_common import (
    gradient_of_cost,
    load_rows,
    rows_of,
    source_cells,
    weights_over_sources,
    weights_over_targets,
)


@kernel
def query_key_matching_bwd_kernel_sums(
    query, key, cells, lse, first, second, index, points, weight, out,
    T: tl.int32, M: tl.int32, S: tl.int32, H: tl.int32, D: tl.int32, source: tl.int32, width: tl.int32,
    scale: tl.float64, limit: tl.float32,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qs: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_ks: tl.int32, stride_kh: tl.int32,
    OVER_TARGETS: tl.constexpr, COST: tl.constexpr, HAS_CELLS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d [B, T, H, M] of ROWS source cells (OVER_TARGETS), or e [B, T, H, S] of OTHERS target cells."""
    ACC: tl.constexpr = lse.dtype.element_ty
    blocks = tl.cdiv(M, ROWS) if OVER_TARGETS else tl.cdiv(S, OTHERS)
    program = tl.program_id(0)
    block = program % blocks
    program = program // blocks
    h = program % H
    t = program // H % T
    b = program // H // T
    query = (query, stride_qb, stride_qt, stride_qs, stride_qh)
    key = (key, stride_kb, stride_kt, stride_ks, stride_kh)
    given = (first, second, index, points, weight)
    place = (b * T + t).to(tl.int64) * H + h
    if OVER_TARGETS:
        m = block * ROWS + tl.arange(0, ROWS)
        cell, present = source_cells(cells, b, m, M, S, HAS_CELLS)
        sums = tl.zeros([ROWS], ACC)
        for start in tl.range(0, S, OTHERS, num_stages=1):
            j = start + tl.arange(0, OTHERS)
            a = weights_over_targets(
                query, key, lse, b, t, h, source, cell, m, present, j, M, S, H, D, T, scale, BLOCK_C, PRECISION
            )
            sums += tl.sum(a * gradient_of_cost(given, b, t, m, present, j, T, M, S, width, limit, COST), 1)
        tl.store(out + place * M + m, sums, mask=present)
    else:
        j = block * OTHERS + tl.arange(0, OTHERS)
        sums = tl.zeros([OTHERS], ACC)
        for start in tl.range(0, M, ROWS, num_stages=1):
            m = start + tl.arange(0, ROWS)
            cell, present = source_cells(cells, b, m, M, S, HAS_CELLS)
            a = weights_over_sources(
                query, key, lse, b, t, h, source, cell, present, j, S, H, D, T, scale, BLOCK_C, PRECISION
            )
            sums += tl.sum(a * gradient_of_cost(given, b, t, m, present, j, T, M, S, width, limit, COST), 0)
        tl.store(out + place * S + j, sums, mask=j < S)


@kernel
def query_key_matching_bwd_kernel_source(
    query, key, cells, lse_a, lse_b, sums_a, sums_b, first, second, index, points, weight, grad_query, grad_key,
    T: tl.int32, M: tl.int32, S: tl.int32, H: tl.int32, D: tl.int32, source: tl.int32, width: tl.int32,
    scale: tl.float64, limit: tl.float32,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qs: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_ks: tl.int32, stride_kh: tl.int32,
    QUERIES: tl.constexpr, GIVEN: tl.constexpr, SUMS: tl.constexpr, SYMMETRIC: tl.constexpr, COST: tl.constexpr,
    HAS_CELLS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, OF_GRADS: tl.constexpr,
):  # fmt: skip
    """Gradients of the source frame's rows, [B, M, H, D] in the type of sums, BLOCK_C channels of ROWS source cells.

    QUERIES: the gradient of query. GIVEN and SUMS: the two parts of the inner gradient that reaches key.
    """
    ACC: tl.constexpr = grad_query.dtype.element_ty
    blocks, parts = tl.cdiv(M, ROWS), tl.cdiv(D, BLOCK_C)
    program = tl.program_id(0)
    channel = program % parts * BLOCK_C
    program = program // parts
    m = program % blocks * ROWS + tl.arange(0, ROWS)
    h = program // blocks % H
    b = program // blocks // H
    cell, present = source_cells(cells, b, m, M, S, HAS_CELLS)
    query = (query, stride_qb, stride_qt, stride_qs, stride_qh)
    key = (key, stride_kb, stride_kt, stride_ks, stride_kh)
    given = (first, second, index, points, weight)
    total_query = tl.zeros([ROWS, BLOCK_C], ACC)
    total_key = tl.zeros([ROWS, BLOCK_C], ACC)
    for t in tl.range(0, T, num_stages=1):
        if COST or t != source:
            place = (b * T + t).to(tl.int64) * H + h
            for start in tl.range(0, S, OTHERS, num_stages=1):
                j = start + tl.arange(0, OTHERS)
                grad = tl.zeros([ROWS, OTHERS], ACC)
                if GIVEN:
                    grad = gradient_of_cost(given, b, t, m, present, j, T, M, S, width, limit, COST)
                if QUERIES:
                    a = weights_over_targets(
                        query, key, lse_a, b, t, h, source, cell, m, present, j, M, S, H, D, T, scale,
                        BLOCK_C, PRECISION,
                    )  # fmt: skip
                    inner = a * (grad - tl.load(sums_a + place * M + m, mask=present, other=0.0)[:, None])
                    others = load_rows(rows_of(key, b, t, h, j), j < S, channel, D, BLOCK_C).to(ACC)
                    total_query = product(inner, others, total_query, OF_GRADS)
                if SYMMETRIC:
                    a = weights_over_sources(
                        query, key, lse_b, b, t, h, source, cell, present, j, S, H, D, T, scale, BLOCK_C, PRECISION
                    )
                    if SUMS:
                        grad = grad - tl.load(sums_b + place * S + j, mask=j < S, other=0.0)[None, :]
                    others = load_rows(rows_of(query, b, t, h, j), j < S, channel, D, BLOCK_C).to(ACC)
                    total_key = product(a * grad, others, total_key, OF_GRADS)
    share = tl.full([], scale, ACC) / tl.full([], H * (2 if SYMMETRIC else 1), ACC)
    c = channel + tl.arange(0, BLOCK_C)
    to = ((b.to(tl.int64) * M + m) * H + h)[:, None] * D + c[None, :]
    mask = present[:, None] & (c < D)[None, :]
    tl.store(grad_query + to, total_query * share, mask=mask)
    tl.store(grad_key + to, total_key * share, mask=mask)


@kernel
def query_key_matching_bwd_kernel_target(
    query, key, cells, lse_a, lse_b, sums_a, sums_b, first, second, index, points, weight, grad_query, grad_key,
    T: tl.int32, M: tl.int32, S: tl.int32, H: tl.int32, D: tl.int32, source: tl.int32, width: tl.int32,
    scale: tl.float64, limit: tl.float32,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qs: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_ks: tl.int32, stride_kh: tl.int32,
    SYMMETRIC: tl.constexpr, COST: tl.constexpr, HAS_CELLS: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, OF_GRADS: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of frame t as targets, [B, T, S, H, D], BLOCK_C channels of OTHERS cells."""
    ACC: tl.constexpr = lse_a.dtype.element_ty
    blocks, parts = tl.cdiv(S, OTHERS), tl.cdiv(D, BLOCK_C)
    program = tl.program_id(0)
    channel = program % parts * BLOCK_C
    program = program // parts
    j = program % blocks * OTHERS + tl.arange(0, OTHERS)
    program = program // blocks
    h = program % H
    t = program // H % T
    b = program // H // T
    query = (query, stride_qb, stride_qt, stride_qs, stride_qh)
    key = (key, stride_kb, stride_kt, stride_ks, stride_kh)
    given = (first, second, index, points, weight)
    place = (b * T + t).to(tl.int64) * H + h
    total_query = tl.zeros([OTHERS, BLOCK_C], ACC)
    total_key = tl.zeros([OTHERS, BLOCK_C], ACC)
    if COST or t != source:
        sum_j = tl.zeros([OTHERS], ACC)
        if SYMMETRIC:
            sum_j = tl.load(sums_b + place * S + j, mask=j < S, other=0.0)
        for start in tl.range(0, M, ROWS, num_stages=1):
            m = start + tl.arange(0, ROWS)
            cell, present = source_cells(cells, b, m, M, S, HAS_CELLS)
            grad = gradient_of_cost(given, b, t, m, present, j, T, M, S, width, limit, COST)
            a = weights_over_targets(
                query, key, lse_a, b, t, h, source, cell, m, present, j, M, S, H, D, T, scale, BLOCK_C, PRECISION
            )
            inner = a * (grad - tl.load(sums_a + place * M + m, mask=present, other=0.0)[:, None])
            rows = load_rows(rows_of(query, b, source, h, cell), present, channel, D, BLOCK_C).to(ACC)
            total_key = product(tl.trans(inner), rows, total_key, OF_GRADS)
            if SYMMETRIC:
                a = weights_over_sources(
                    query, key, lse_b, b, t, h, source, cell, present, j, S, H, D, T, scale, BLOCK_C, PRECISION
                )
                if not HAS_CELLS:
                    grad = grad - sum_j[None, :]
                rows = load_rows(rows_of(key, b, source, h, cell), present, channel, D, BLOCK_C).to(ACC)
                total_query = product(tl.trans(a * grad), rows, total_query, OF_GRADS)
        if SYMMETRIC and HAS_CELLS:
            for start in tl.range(0, S, ROWS, num_stages=1):
                s = start + tl.arange(0, ROWS)
                a = weights_over_sources(
                    query, key, lse_b, b, t, h, source, s, s < S, j, S, H, D, T, scale, BLOCK_C, PRECISION
                )
                rows = load_rows(rows_of(key, b, source, h, s), s < S, channel, D, BLOCK_C).to(ACC)
                total_query = product(tl.trans(a * -sum_j[None, :]), rows, total_query, OF_GRADS)
    share = tl.full([], scale, ACC) / tl.full([], H * (2 if SYMMETRIC else 1), ACC)
    c = channel + tl.arange(0, BLOCK_C)
    to = (((b * T + t).to(tl.int64) * S + j) * H + h)[:, None] * D + c[None, :]
    mask = (j < S)[:, None] & (c < D)[None, :]
    tl.store(grad_query + to, total_query * share, mask=mask)
    tl.store(grad_key + to, total_key * share, mask=mask)
