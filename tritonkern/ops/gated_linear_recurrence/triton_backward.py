"""Backward Triton kernel of the gated linear recurrence."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkern.ops._triton import kernel, product, whole_vectors
from tritonkern.ops.gated_linear_recurrence.triton_common import gates, load_frame, load_weight, start_of


@triton.jit
def _store(to, frame, row, N, frames, first, channel, value, exists, C: tl.constexpr, STEP: tl.constexpr):
    """To a frame of a contiguous `[B, frames, N, C]`."""
    at = ((row // N * frames + frame) * N + row % N) * C + first
    tl.store(whole_vectors(to + at, channel, STEP), value.to(to.dtype.element_ty), mask=exists)


@kernel
def gated_linear_recurrence_bwd_kernel(
    grad_out, grad_new_hidden, x, conv_weight, conv_bias, input_weight, input_bias, decay_weight, decay_bias, rate,
    inputs, hidden, out, grad_x, grad_inputs, grad_hidden, partial,
    rows: tl.int64, each: tl.int64, N: tl.int64, T: tl.int64, stride_b: tl.int64, stride_t: tl.int64,
    stride_n: tl.int64, grad_stride_b: tl.int64, grad_stride_t: tl.int64, grad_stride_n: tl.int64,
    out_stride_b: tl.int64, out_stride_t: tl.int64, out_stride_n: tl.int64, MATRICES: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last frame to the first, with g[t] = grad_out[t] + a[t + 1] g[t + 1]:

    grad_log_a = g a h[t - 1] - 2 a^2 slope g i u,   slope = min(1 / (2 sqrt(1 - a^2)), 1000)
    grad_zi = g u m i (1 - i),   grad_zr = grad_log_a rate r (1 - r),   grad_u = g i m + grad_zi W_i^T + grad_zr W_r^T
    grad_x[t] = sum over k of w[k] grad_u[t + 3 - k]

    One launch computes all but grad_W, and another (MATRICES) grad_W, as the registers do not hold everything. Programs
    add up the parameters' gradients of `each` tiles of rows in `partial` `[programs, 2 BLOCK + 8, BLOCK]`.
    """
    ACC: tl.constexpr = rate.dtype.element_ty
    C: tl.constexpr = H * D
    program = tl.program_id(0)
    head = (program % H).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    first, is_channel = head * D, channel < D
    w0 = tl.load(conv_weight + first + channel, mask=is_channel, other=0.0)[None, :]
    w1 = tl.load(conv_weight + C + first + channel, mask=is_channel, other=0.0)[None, :]
    w2 = tl.load(conv_weight + 2 * C + first + channel, mask=is_channel, other=0.0)[None, :]
    w3 = tl.load(conv_weight + 3 * C + first + channel, mask=is_channel, other=0.0)[None, :]
    bias = tl.load(conv_bias + first + channel, mask=is_channel, other=0.0)[None, :]
    bias_input = tl.load(input_bias + first + channel, mask=is_channel, other=0.0)
    bias_decay = tl.load(decay_bias + first + channel, mask=is_channel, other=0.0)
    speed = tl.load(rate + first + channel, mask=is_channel, other=0.0)
    zero = tl.zeros([BLOCK], ACC)
    sum_w0, sum_w1, sum_w2, sum_w3, sum_bias, sum_input, sum_decay, sum_rate = (
        zero, zero, zero, zero, zero, zero, zero, zero,
    )  # fmt: skip
    sum_of_input, sum_of_decay = tl.zeros([BLOCK, BLOCK], ACC), tl.zeros([BLOCK, BLOCK], ACC)
    begin = (program // H).to(tl.int64) * each
    for tile in tl.range(begin, tl.minimum(begin + each, (rows + ROWS - 1) // ROWS), num_stages=1):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        exists = (row < rows)[:, None] & is_channel[None, :]
        start, kept = start_of(row, N, stride_b, stride_n), row * C + first
        grad_start = start_of(row, N, grad_stride_b, grad_stride_n)
        out_start = start_of(row, N, out_stride_b, out_stride_n)
        nothing = tl.zeros([ROWS, BLOCK], ACC)
        carry = nothing
        if grad_new_hidden is not None:
            carry += tl.load(whole_vectors(grad_new_hidden + kept, channel, STEP), mask=exists, other=0.0)
        # What the frames so far have added to the gradients of x[t], x[t - 1] and x[t - 2].
        ahead0, ahead1, ahead2 = nothing, nothing, nothing
        # x1, x2 and x3 are the frames t - 2 to t.
        x1 = load_frame(x, inputs, start, row, T - 3, N, stride_t, first, channel, exists, C, STEP).to(ACC)
        x2 = load_frame(x, inputs, start, row, T - 2, N, stride_t, first, channel, exists, C, STEP).to(ACC)
        x3 = load_frame(x, None, start, row, T - 1, N, stride_t, first, channel, exists, C, STEP).to(ACC)
        for step in tl.range(0, T, num_stages=1):
            t = T - 1 - tl.cast(step, tl.int64)
            x0 = load_frame(x, inputs, start, row, t - 3, N, stride_t, first, channel, exists, C, STEP).to(ACC)
            # For each frame, as registers do not hold them.
            of_input = load_weight(input_weight, head, channel, ACC, D)
            of_decay = load_weight(decay_weight, head, channel, ACC, D)
            u = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            opened, decays, factor, square, rest = gates(
                u, of_input, bias_input, of_decay, bias_decay, speed, PRECISION
            )
            grad = load_frame(grad_out, None, grad_start, row, t, N, grad_stride_t, first, channel, exists, C, STEP)
            grad = grad.to(ACC) + carry
            before = load_frame(out, None, out_start, row, t - 1, N, out_stride_t, first, channel, exists, C, STEP)
            before = before.to(ACC)
            begins = (t + row * 0 == 0)[:, None]
            if hidden is not None:
                before += tl.load(whole_vectors(hidden + kept, channel, STEP), mask=exists & begins, other=0.0)
            four = 4.0 * rest
            through_root = 2.0 * square / tl.sqrt(tl.where(four < 1e-6, 1e-6, four)) * (grad * u * opened)
            multiplier = tl.sqrt(rest)
            if hidden is None:
                multiplier = tl.where(begins, 1.0, multiplier)
                through_root = tl.where(begins, 0.0, through_root)
            grad_log = grad * before * factor - through_root
            grad_input = grad * u * multiplier * (opened * (1.0 - opened))
            grad_decay = grad_log * speed[None, :] * (decays * (1.0 - decays))
            carry = factor * grad
            if MATRICES:
                sum_of_input = product(tl.trans(u), grad_input, sum_of_input, PRECISION)
                sum_of_decay = product(tl.trans(u), grad_decay, sum_of_decay, PRECISION)
            else:
                grad_u = product(grad_input, tl.trans(of_input), grad * opened * multiplier, PRECISION)
                grad_u = product(grad_decay, tl.trans(of_decay), grad_u, PRECISION)
                if grad_x is not None:
                    _store(grad_x, t, row, N, T, first, channel, ahead0 + w3 * grad_u, exists, C, STEP)
                ahead0, ahead1, ahead2 = ahead1 + w2 * grad_u, ahead2 + w1 * grad_u, w0 * grad_u
                if partial is not None:
                    # Rows that do not exist have u = bias, but no gradient.
                    sum_w0 += tl.sum(grad_u * x0, 0)
                    sum_w1 += tl.sum(grad_u * x1, 0)
                    sum_w2 += tl.sum(grad_u * x2, 0)
                    sum_w3 += tl.sum(grad_u * x3, 0)
                    sum_bias += tl.sum(grad_u, 0)
                    sum_input += tl.sum(grad_input, 0)
                    sum_decay += tl.sum(grad_decay, 0)
                    sum_rate += tl.sum(grad_log * decays, 0)
            x1, x2, x3 = x0, x1, x2
        if grad_inputs is not None and not MATRICES:
            _store(grad_inputs, 2, row, N, 3, first, channel, ahead0, exists, C, STEP)
            _store(grad_inputs, 1, row, N, 3, first, channel, ahead1, exists, C, STEP)
            _store(grad_inputs, 0, row, N, 3, first, channel, ahead2, exists, C, STEP)
        if grad_hidden is not None and not MATRICES:
            tl.store(whole_vectors(grad_hidden + kept, channel, STEP), carry, mask=exists)
    if partial is not None:
        to = partial + program.to(tl.int64) * (2 * BLOCK + 8) * BLOCK
        if MATRICES:
            place = channel[:, None] * BLOCK + channel[None, :]
            tl.store(to + place, sum_of_input)
            tl.store(to + BLOCK * BLOCK + place, sum_of_decay)
        else:
            to += 2 * BLOCK * BLOCK + channel
            tl.store(to, sum_w0)
            tl.store(to + BLOCK, sum_w1)
            tl.store(to + 2 * BLOCK, sum_w2)
            tl.store(to + 3 * BLOCK, sum_w3)
            tl.store(to + 4 * BLOCK, sum_bias)
            tl.store(to + 5 * BLOCK, sum_input)
            tl.store(to + 6 * BLOCK, sum_decay)
            tl.store(to + 7 * BLOCK, sum_rate)
