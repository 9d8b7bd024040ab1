"""Triton kernels of the temporal mixer that walk along time.

A program has some channels of one track, one channel a thread: a frame comes in, a frame goes out, and what the
convolutions are sums of stays in registers between. Frames beyond the clip are zeros. Tracks are independent, so that a
NaN stays in its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkern.ops.temporal_mixer.triton_norm import offset


@triton.jit
def _inside(t, T, channel, mask):
    """`mask` where frame t exists. Compared as a vector: the interpreter's masks must not come from single numbers."""
    t = t + channel * 0
    return mask & (t >= 0) & (t < T)


@triton.jit
def _standard(x, mean, scale, start, row, t, T, stride_t, channel, mask):
    """Frame t of the normalised rows without the weight; zeros where there is no frame."""
    exists = _inside(t, T, channel, mask)
    value = tl.load(x + start + t * stride_t + channel, mask=exists, other=0.0).to(mean.dtype.element_ty)
    average = tl.load(mean + row + t + channel * 0, mask=exists, other=0.0)
    factor = tl.load(scale + row + t + channel * 0, mask=exists, other=0.0)
    return (value - average) * factor


@triton.jit
def _weights(conv_weight, channel, mask, j: tl.constexpr, ACC: tl.constexpr):
    """The three taps of the channel's j-th convolution."""
    at = conv_weight + (channel * 4 + j) * 3
    return (
        tl.load(at, mask=mask, other=0.0).to(ACC),
        tl.load(at + 1, mask=mask, other=0.0).to(ACC),
        tl.load(at + 2, mask=mask, other=0.0).to(ACC),
    )


@triton.jit
def _power(u, square):
    """e^-z of gelu(u) = u * sigmoid(z), z = 2 sqrt(2 / pi) (u + 0.044715 u^3): the form with tanh without its
    cancellation."""
    minus_z = u * (square * (-0.044715 * 1.5957691216057308) - 1.5957691216057308)
    return tl.exp(tl.where(minus_z > 87.0, 87.0, minus_z))


@triton.jit
def _hidden(u):
    return u / (1.0 + _power(u, u * u))


@triton.jit(do_not_specialize=["N", "T"])
def forward_kernel(
    x, norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias, mean, scale, normed_state, hidden_state, out,
    new_normed, new_hidden, N: tl.int64, T: tl.int64, stride_b: tl.int64, stride_n: tl.int64, stride_t: tl.int64,
    C: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = mean.dtype.element_ty
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    track = tl.program_id(0).to(tl.int64) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    start, row = offset(track, N, stride_b, stride_n), track * T
    norm = tl.load(norm_weight + channel, mask=mask, other=0.0).to(ACC)
    a00, a01, a02 = _weights(conv1_weight, channel, mask, 0, ACC)
    a10, a11, a12 = _weights(conv1_weight, channel, mask, 1, ACC)
    a20, a21, a22 = _weights(conv1_weight, channel, mask, 2, ACC)
    a30, a31, a32 = _weights(conv1_weight, channel, mask, 3, ACC)
    b00, b01, b02 = _weights(conv2_weight, channel, mask, 0, ACC)
    b10, b11, b12 = _weights(conv2_weight, channel, mask, 1, ACC)
    b20, b21, b22 = _weights(conv2_weight, channel, mask, 2, ACC)
    b30, b31, b32 = _weights(conv2_weight, channel, mask, 3, ACC)
    bias0 = tl.load(conv1_bias + channel * 4, mask=mask, other=0.0).to(ACC)
    bias1 = tl.load(conv1_bias + channel * 4 + 1, mask=mask, other=0.0).to(ACC)
    bias2 = tl.load(conv1_bias + channel * 4 + 2, mask=mask, other=0.0).to(ACC)
    bias3 = tl.load(conv1_bias + channel * 4 + 3, mask=mask, other=0.0).to(ACC)
    bias = tl.zeros([BLOCK], ACC)
    for j in tl.static_range(4):
        bias += tl.load(conv2_bias + channel * 4 + j, mask=mask, other=0.0).to(ACC)

    h0 = tl.zeros([BLOCK], ACC)
    h1 = tl.zeros([BLOCK], ACC)
    # Of the results of the next two frames, what frames before have added.
    sum0 = tl.zeros([BLOCK], ACC)
    sum1 = tl.zeros([BLOCK], ACC)
    if hidden_state is not None:
        h0 = tl.load(normed_state + track * 2 * C + channel, mask=mask, other=0.0)
        h1 = tl.load(normed_state + track * 2 * C + C + channel, mask=mask, other=0.0)
        older = hidden_state + (track * 2 * C + channel) * 4
        newer = older + 4 * C
        v0 = tl.load(older, mask=mask, other=0.0)
        v1 = tl.load(older + 1, mask=mask, other=0.0)
        v2 = tl.load(older + 2, mask=mask, other=0.0)
        v3 = tl.load(older + 3, mask=mask, other=0.0)
        sum0 = b00 * v0 + b10 * v1 + b20 * v2 + b30 * v3
        v0 = tl.load(newer, mask=mask, other=0.0)
        v1 = tl.load(newer + 1, mask=mask, other=0.0)
        v2 = tl.load(newer + 2, mask=mask, other=0.0)
        v3 = tl.load(newer + 3, mask=mask, other=0.0)
        sum0 += b01 * v0 + b11 * v1 + b21 * v2 + b31 * v3
        sum1 = b00 * v0 + b10 * v1 + b20 * v2 + b30 * v3
        if T == 1:
            to = new_hidden + (track * 2 * C + channel) * 4
            tl.store(to, v0, mask=mask)
            tl.store(to + 1, v1, mask=mask)
            tl.store(to + 2, v2, mask=mask)
            tl.store(to + 3, v3, mask=mask)
    for step in tl.range(0, T + 4 - 2 * BEFORE, num_stages=1):
        arriving = tl.cast(step, tl.int64)  # the interpreter's ranges are of Python's numbers
        h2 = _standard(x, mean, scale, start, row, arriving, T, stride_t, channel, mask) * norm
        frame = arriving - 2 + BEFORE
        exists = _inside(frame, T, channel, mask)
        v0 = tl.where(exists, _hidden(bias0 + a00 * h0 + a01 * h1 + a02 * h2), 0.0)
        v1 = tl.where(exists, _hidden(bias1 + a10 * h0 + a11 * h1 + a12 * h2), 0.0)
        v2 = tl.where(exists, _hidden(bias2 + a20 * h0 + a21 * h1 + a22 * h2), 0.0)
        v3 = tl.where(exists, _hidden(bias3 + a30 * h0 + a31 * h1 + a32 * h2), 0.0)
        if hidden_state is not None:
            to = new_hidden + ((track * 2 + frame - (T - 2)) * C + channel) * 4
            last = _inside(frame - (T - 2), 2, channel, mask)
            tl.store(to, v0, mask=last)
            tl.store(to + 1, v1, mask=last)
            tl.store(to + 2, v2, mask=last)
            tl.store(to + 3, v3, mask=last)
        result = sum0 + (b02 * v0 + b12 * v1 + b22 * v2 + b32 * v3) + bias
        sum0 = sum1 + (b01 * v0 + b11 * v1 + b21 * v2 + b31 * v3)
        sum1 = b00 * v0 + b10 * v1 + b20 * v2 + b30 * v3
        h0 = h1
        h1 = h2
        done = frame - 2 + BEFORE
        ready = _inside(done, T, channel, mask)
        residual = tl.load(x + start + done * stride_t + channel, mask=ready, other=0.0).to(ACC)
        tl.store(out + (row + done) * C + channel, (residual + result).to(out.dtype.element_ty), mask=ready)
    if hidden_state is not None:
        tl.store(new_normed + track * 2 * C + channel, h0, mask=mask)
        tl.store(new_normed + track * 2 * C + C + channel, h1, mask=mask)


@triton.jit
def _through_gelu(u, grad):
    """v, and the gradient of u from that of v."""
    square = u * u
    power = _power(u, square)
    sigmoid = 1.0 / (1.0 + power)
    v = u * sigmoid
    # power * sigmoid is 1 - sigmoid, as exact where it is small.
    slope = sigmoid + v * power * sigmoid * (square * (3 * 0.044715 * 1.5957691216057308) + 1.5957691216057308)
    return v, grad * slope


@triton.jit(do_not_specialize=["tracks", "each", "N", "T"])
def convolutions_backward_kernel(
    grad_out, x, norm_weight, conv1_weight, conv1_bias, conv2_weight, mean, scale, grad_normed, partial,
    tracks: tl.int64, each: tl.int64, N: tl.int64, T: tl.int64, stride_b: tl.int64, stride_n: tl.int64,
    stride_t: tl.int64, grad_stride_b: tl.int64, grad_stride_n: tl.int64, grad_stride_t: tl.int64, J: tl.constexpr,
    C: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Through the J-th of the four: adds to the gradient of the normalised rows `[B * N * T, C]`, and its weights' part
    of `partial` `[programs, 30, C]`. One after the other, as twelve sums a channel would not fit into registers."""
    ACC: tl.constexpr = mean.dtype.element_ty
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    norm = tl.load(norm_weight + channel, mask=mask, other=0.0).to(ACC)
    a0, a1, a2 = _weights(conv1_weight, channel, mask, J, ACC)
    b0, b1, b2 = _weights(conv2_weight, channel, mask, J, ACC)
    bias = tl.load(conv1_bias + channel * 4 + J, mask=mask, other=0.0).to(ACC)
    zero = tl.zeros([BLOCK], ACC)
    of_a0, of_a1, of_a2, of_bias = zero, zero, zero, zero
    of_b0, of_b1, of_b2, of_bias2, of_norm = zero, zero, zero, zero, zero
    for track in tl.range(program * each, tl.minimum(tracks, (program + 1) * each), num_stages=1):
        start, row = offset(track, N, stride_b, stride_n), track * T
        grad_start = offset(track, N, grad_stride_b, grad_stride_n)
        n0, n1, g1, g2, sum0, sum1 = zero, zero, zero, zero, zero, zero
        # Beside frame, the normalised row of 2 - BEFORE frames later comes in, and the gradient of BEFORE frames later.
        for step in tl.range(-BEFORE, T + BEFORE, num_stages=1):
            frame = tl.cast(step, tl.int64)  # the interpreter's ranges are of Python's numbers
            n2 = _standard(x, mean, scale, start, row, frame - BEFORE + 2, T, stride_t, channel, mask)
            ahead = frame + BEFORE
            at = grad_start + ahead * grad_stride_t + channel
            g0 = tl.load(grad_out + at, mask=_inside(ahead, T, channel, mask), other=0.0).to(ACC)
            exists = _inside(frame, T, channel, mask)
            u = bias + a0 * (n0 * norm) + a1 * (n1 * norm) + a2 * (n2 * norm)
            v, grad = _through_gelu(u, b0 * g0 + b1 * g1 + b2 * g2)
            v, grad = tl.where(exists, v, 0.0), tl.where(exists, grad, 0.0)
            # What is complete now is the gradient of frame - BEFORE.
            done = frame - BEFORE
            ready = _inside(done, T, channel, mask)
            to = grad_normed + (row + done) * C + channel
            total = sum0 + a0 * grad
            if J > 0:
                total += tl.load(to, mask=ready, other=0.0)
            tl.store(to, total, mask=ready)
            sum0 = sum1 + a1 * grad
            sum1 = a2 * grad
            if partial is not None:
                of_a0 += grad * (n0 * norm)
                of_a1 += grad * (n1 * norm)
                of_a2 += grad * (n2 * norm)
                of_bias += grad
                of_b0 += v * g0
                of_b1 += v * g1
                of_b2 += v * g2
                if J == 3:
                    of_bias2 += tl.where(exists, g1 if BEFORE == 1 else g2, 0.0)
                    of_norm += tl.where(ready, total * n0, 0.0)
            n0 = n1
            n1 = n2
            g2 = g1
            g1 = g0
    if partial is not None:
        to = partial + program * 30 * C + channel
        tl.store(to + (3 * J) * C, of_a0, mask=mask)
        tl.store(to + (3 * J + 1) * C, of_a1, mask=mask)
        tl.store(to + (3 * J + 2) * C, of_a2, mask=mask)
        tl.store(to + (12 + J) * C, of_bias, mask=mask)
        tl.store(to + (16 + 3 * J) * C, of_b0, mask=mask)
        tl.store(to + (17 + 3 * J) * C, of_b1, mask=mask)
        tl.store(to + (18 + 3 * J) * C, of_b2, mask=mask)
        if J == 3:
            tl.store(to + 28 * C, of_bias2, mask=mask)
            tl.store(to + 29 * C, of_norm, mask=mask)
