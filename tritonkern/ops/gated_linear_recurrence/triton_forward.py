"""Forward Triton kernel of the gated linear recurrence."""

from __future__ import annotations

import triton.language as tl

from tritonkern.ops._triton import kernel, whole_vectors
from tritonkern.ops.gated_linear_recurrence.triton_common import gates, load_frame, load_weight, start_of


@kernel
def gated_linear_recurrence_fwd_kernel(
    x, conv_weight, conv_bias, input_weight, input_bias, decay_weight, decay_bias, rate, inputs, hidden, out,
    new_hidden, rows: tl.int64, N: tl.int64, T: tl.int64, stride_b: tl.int64, stride_t: tl.int64, stride_n: tl.int64,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u[t] = bias + sum over k of w[k] x[t - 3 + k],   i = sigmoid(u W_i + b_i),   a = exp(rate sigmoid(u W_r + b_r))
    h[t] = a h[t - 1] + sqrt(1 - a^2) i u,   without the root in frame 0 where there is no state
    """
    ACC: tl.constexpr = rate.dtype.element_ty
    C: tl.constexpr = H * D
    head = (tl.program_id(0) % H).to(tl.int64)
    row = (tl.program_id(0) // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    first, is_channel = head * D, channel < D
    exists = (row < rows)[:, None] & is_channel[None, :]
    w0 = tl.load(conv_weight + first + channel, mask=is_channel, other=0.0)[None, :]
    w1 = tl.load(conv_weight + C + first + channel, mask=is_channel, other=0.0)[None, :]
    w2 = tl.load(conv_weight + 2 * C + first + channel, mask=is_channel, other=0.0)[None, :]
    w3 = tl.load(conv_weight + 3 * C + first + channel, mask=is_channel, other=0.0)[None, :]
    bias = tl.load(conv_bias + first + channel, mask=is_channel, other=0.0)[None, :]
    if ACC != tl.float64:
        of_input = load_weight(input_weight, head, channel, ACC, D)
        of_decay = load_weight(decay_weight, head, channel, ACC, D)
    bias_input = tl.load(input_bias + first + channel, mask=is_channel, other=0.0)
    bias_decay = tl.load(decay_bias + first + channel, mask=is_channel, other=0.0)
    speed = tl.load(rate + first + channel, mask=is_channel, other=0.0)
    start = start_of(row, N, stride_b, stride_n)
    kept = row * C + first
    h = tl.zeros([ROWS, BLOCK], ACC)
    if hidden is not None:
        h += tl.load(whole_vectors(hidden + kept, channel, STEP), mask=exists, other=0.0)
    # x0, x1 and x2 are the frames t - 3 to t - 1.
    x0 = load_frame(x, inputs, start, row, -3, N, stride_t, first, channel, exists, C, STEP).to(ACC)
    x1 = load_frame(x, inputs, start, row, -2, N, stride_t, first, channel, exists, C, STEP).to(ACC)
    x2 = load_frame(x, inputs, start, row, -1, N, stride_t, first, channel, exists, C, STEP).to(ACC)
    for step in tl.range(0, T, num_stages=1):
        t = tl.cast(step, tl.int64)  # the interpreter's ranges have numbers of Python
        x3 = load_frame(x, None, start, row, t, N, stride_t, first, channel, exists, C, STEP).to(ACC)
        if ACC == tl.float64:  # registers do not hold them
            of_input = load_weight(input_weight, head, channel, ACC, D)
            of_decay = load_weight(decay_weight, head, channel, ACC, D)
        u = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        opened, _, factor, _, rest = gates(u, of_input, bias_input, of_decay, bias_decay, speed, PRECISION)
        multiplier = tl.sqrt(rest)
        if hidden is None:
            multiplier = tl.where((t + row * 0 == 0)[:, None], 1.0, multiplier)
        h = factor * h + u * opened * multiplier
        target = ((row // N * T + t) * N + row % N) * C + first
        tl.store(whole_vectors(out + target, channel, STEP), h.to(out.dtype.element_ty), mask=exists)
        x0, x1, x2 = x1, x2, x3
    tl.store(whole_vectors(new_hidden + kept, channel, STEP), h, mask=exists)
