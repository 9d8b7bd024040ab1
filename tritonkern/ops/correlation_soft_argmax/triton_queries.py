"""Triton kernels of the gradients that go through the mean of a frame, and through the norm of a query."""

import triton.language as tl

from tritonkern.ops._triton import UNIT, kernel
from tritonkern.ops.correlation_soft_argmax.triton_common import cell_addresses, load_channels


# total[b, t, c]     = sum over the cells i of features[b, t, i, c]        (COSINE: times their inverse norms)
# grad_cell[b, t, c] = sum over n of grad_mean[b, n, t] / cells * query[b, n, c]       (COSINE: times inverse norms)
@kernel
def correlation_soft_argmax_bwd_kernel_mean(
    query, features, query_inverse_norm, features_inverse_norm, grad_mean, total, grad_cell,
    T: tl.int32, N: tl.int32, cells: tl.int32, w: tl.int32, C: tl.int32,
    stride_qb: tl.int64, stride_qn: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64,
    stride_x: tl.int64,
    COSINE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For BLOCK_C channels of one frame. The gradient of the mean is the same for all cells of a frame."""
    ACC: tl.constexpr = total.dtype.element_ty
    C = C * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    frame = tl.program_id(0) // blocks
    start = (tl.program_id(0) - frame * blocks) * BLOCK_C
    b = (frame // T).to(tl.int64)
    t = frame - b * T
    features += (b * stride_b + t * stride_t) * UNIT
    sums = tl.zeros([BLOCK, BLOCK_C], ACC)
    for first in tl.range(0, cells, BLOCK):  # sums: over the cells below first, BLOCK of them
        cell = first + tl.arange(0, BLOCK)
        exists = cell < cells
        cell = tl.minimum(cell, cells - 1)
        y = cell // w
        addresses = cell_addresses(features, y, cell - y * w, stride_y, stride_x)
        tile = load_channels(addresses, start, C, BLOCK_C).to(ACC)
        if COSINE:
            tile = tile * tl.load(features_inverse_norm + frame.to(tl.int64) * cells + cell)[:, None]
        sums += tl.where(exists[:, None], tile, 0.0)
    grads = tl.zeros([BLOCK, BLOCK_C], ACC)
    for first in tl.range(0, N, BLOCK):  # grads: over the queries below first, BLOCK of them
        n = first + tl.arange(0, BLOCK)
        exists = n < N
        n = tl.minimum(n, N - 1).to(tl.int64)
        tile = load_channels(query + (b * stride_qb + n * stride_qn) * UNIT, start, C, BLOCK_C).to(ACC)
        share = tl.load(grad_mean + (b * N + n) * T + t) / tl.full([], cells, ACC)
        if COSINE:
            share = share * tl.load(query_inverse_norm + b * N + n)
        grads += tl.where(exists[:, None], tile * share[:, None], 0.0)
    channel = start + tl.arange(0, BLOCK_C)
    to = frame.to(tl.int64) * C + channel
    tl.store(total + to, tl.sum(sums, 0), mask=channel < C)
    tl.store(grad_cell + to, tl.sum(grads, 0), mask=channel < C)


# grad_query[b, n, c] = sum over t of grad_mean[b, n, t] / cells * total[b, t, c]
@kernel
def correlation_soft_argmax_bwd_kernel_share(
    grad_mean, total, grad_query, T: tl.int32, N: tl.int32, cells: tl.int32, C: tl.int32, queries: tl.int64,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For BLOCK queries and BLOCK_C channels; `queries` is B N."""
    ACC: tl.constexpr = total.dtype.element_ty
    C = C * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    first = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = first + tl.arange(0, BLOCK)
    in_range = n < queries
    b = tl.minimum(n, queries - 1) // N
    sums = tl.zeros([BLOCK, BLOCK_C], ACC)
    for t in tl.range(0, T, num_stages=1):  # sums: over the frames below t
        share = tl.load(grad_mean + n * T + t, mask=in_range, other=0.0) / tl.full([], cells, ACC)
        rows = total + (b * T + t) * C
        addresses = tl.multiple_of(rows[:, None] + channel[None, :], (1, 16))
        sums += share[:, None] * tl.load(addresses, mask=(channel < C)[None, :], other=0.0)
    mask = in_range[:, None] & (channel < C)[None, :]
    tl.store(tl.multiple_of((grad_query + n * C)[:, None] + channel[None, :], (1, 16)), sums, mask=mask)


# With u = query inverse_norm:   result = (grad - u (u . grad)) inverse_norm,   without the second term where
# |query|^2 < eps, as the norm is constant there
@kernel
def correlation_soft_argmax_bwd_kernel_norm(
    grad, query, query_inverse_norm, result,
    N: tl.int32, C: tl.int32, queries: tl.int64, eps: tl.float64, stride_b: tl.int64, stride_n: tl.int64,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries from that of the normalised ones; `queries` is B N."""
    ACC: tl.constexpr = grad.dtype.element_ty
    C = C * UNIT
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = n < queries
    n = tl.minimum(n, queries - 1)
    b = n // N
    rows = query + (b * stride_b + (n - b * N) * stride_n) * UNIT
    factor = tl.load(query_inverse_norm + n)
    squares = tl.zeros([BLOCK], ACC)
    along = tl.zeros([BLOCK], ACC)
    for start in tl.range(0, C, BLOCK_C, num_stages=1):  # squares, along: over the channels below start
        vector = load_channels(rows, start, C, BLOCK_C).to(ACC)
        squares += tl.sum(vector * vector, 1)
        along += tl.sum(load_channels(grad + n * C, start, C, BLOCK_C) * (vector * factor[:, None]), 1)
    along = tl.where(squares < tl.full([], eps, ACC), 0.0, along)
    for start in tl.range(0, C, BLOCK_C, num_stages=1):
        unit = load_channels(rows, start, C, BLOCK_C).to(ACC) * factor[:, None]
        value = (load_channels(grad + n * C, start, C, BLOCK_C) - unit * along[:, None]) * factor[:, None]
        channel = start + tl.arange(0, BLOCK_C)
        addresses = tl.multiple_of((result + n * C)[:, None] + channel[None, :], (1, 16))
        tl.store(addresses, value.to(result.dtype.element_ty), mask=in_range[:, None] & (channel < C)[None, :])
