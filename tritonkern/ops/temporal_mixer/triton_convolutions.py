"""Triton kernels of the temporal mixer that go along time.

A program has some channels of one track, one channel per thread. Frames are read in order, and the partial sums of the
convolutions stay in registers. With BEFORE = 1, when frame t + 2 of the normalised rows h arrives (BEFORE is 2 where
the mixer is causal; then frame t + 2 is made of h0, h1 and h2, and its result is complete at once)::

    frame     t                  t + 1                                   t + 2
    h         h0                 h1                                      h2: arriving
    v                            v0, v1, v2, v3: GELU of conv1(h0..h2)
    result    complete: stored   sum0: what v of t and t + 1 has added   sum1: what v of t + 1 has added

Triton cannot index registers, so weights are numbers: aJK is tap K of the first convolution for the J-th of the four
channels, bJK of the second. Frames beyond the clip are zeros. Tracks are independent, so a NaN stays in its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, kernel
from tritonkern.ops.temporal_mixer.triton_norm import offset


@triton.jit
def _inside(t, T, channel, mask):
    """`mask` where frame t exists. Compared as a vector: the interpreter's masks must not come from single numbers."""
    t = t + channel * 0
    return mask & (t >= 0) & (t < T)


@triton.jit
def _standard(x, mean, rstd, start, row, t, T, stride_t, channel, mask):
    """(x - mean) rstd of frame t; zeros where there is no frame."""
    exists = _inside(t, T, channel, mask)
    value = tl.load(x + start + t * stride_t * UNIT + channel, mask=exists, other=0.0).to(mean.dtype.element_ty)
    average = tl.load(mean + row + t + channel * 0, mask=exists, other=0.0)
    factor = tl.load(rstd + row + t + channel * 0, mask=exists, other=0.0)
    return (value - average) * factor


@triton.jit
def _taps(conv_weight, channel, mask, j: tl.constexpr, ACC: tl.constexpr):
    """The three taps of the channel's j-th convolution."""
    at = conv_weight + (channel * 4 + j) * 3
    return (
        tl.load(at, mask=mask, other=0.0).to(ACC),
        tl.load(at + 1, mask=mask, other=0.0).to(ACC),
        tl.load(at + 2, mask=mask, other=0.0).to(ACC),
    )


@triton.jit
def _all_taps(conv_weight, channel, mask, ACC: tl.constexpr):
    """The taps of the channel's four convolutions."""
    w00, w01, w02 = _taps(conv_weight, channel, mask, 0, ACC)
    w10, w11, w12 = _taps(conv_weight, channel, mask, 1, ACC)
    w20, w21, w22 = _taps(conv_weight, channel, mask, 2, ACC)
    w30, w31, w32 = _taps(conv_weight, channel, mask, 3, ACC)
    return w00, w01, w02, w10, w11, w12, w20, w21, w22, w30, w31, w32


@triton.jit
def _load_four(at, mask, ACC: tl.constexpr):
    return (
        tl.load(at, mask=mask, other=0.0).to(ACC),
        tl.load(at + 1, mask=mask, other=0.0).to(ACC),
        tl.load(at + 2, mask=mask, other=0.0).to(ACC),
        tl.load(at + 3, mask=mask, other=0.0).to(ACC),
    )


@triton.jit
def _store_four(at, v0, v1, v2, v3, mask):
    tl.store(at, v0, mask=mask)
    tl.store(at + 1, v1, mask=mask)
    tl.store(at + 2, v2, mask=mask)
    tl.store(at + 3, v3, mask=mask)


@triton.jit
def _power(u, square):
    """e^-z of gelu(u) = u sigmoid(z), z = 2 sqrt(2 / pi) (u + 0.044715 u^3): the tanh form without its cancellation."""
    minus_z = u * (square * (-0.044715 * 1.5957691216057308) - 1.5957691216057308)
    return tl.exp(tl.where(minus_z > 87.0, 87.0, minus_z))


@triton.jit
def _gelu(u):
    return u / (1.0 + _power(u, u * u))


@kernel
def temporal_mixer_fwd_kernel(
    x, norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias, mean, rstd, normed_state, hidden_state, out,
    new_normed, new_hidden, N: tl.int64, T: tl.int64, stride_b: tl.int64, stride_n: tl.int64, stride_t: tl.int64,
    C: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = x[t] + bias + sum over j, k of bJK v[t - BEFORE + k, j],
    v[t, j] = gelu(biasJ + sum over k of aJK h[t - BEFORE + k]),   h = (x - mean) rstd norm_weight
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    track = tl.program_id(0).to(tl.int64) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    start, row = offset(track, N, stride_b, stride_n), track * T
    norm = tl.load(norm_weight + channel, mask=mask, other=0.0).to(ACC)
    a00, a01, a02, a10, a11, a12, a20, a21, a22, a30, a31, a32 = _all_taps(conv1_weight, channel, mask, ACC)
    b00, b01, b02, b10, b11, b12, b20, b21, b22, b30, b31, b32 = _all_taps(conv2_weight, channel, mask, ACC)
    bias0, bias1, bias2, bias3 = _load_four(conv1_bias + channel * 4, mask, ACC)
    v0, v1, v2, v3 = _load_four(conv2_bias + channel * 4, mask, ACC)
    bias = v0 + v1 + v2 + v3
    zero = tl.zeros([BLOCK], ACC)
    h0, h1, sum0, sum1 = zero, zero, zero, zero
    state = (track * 2 * C + channel) * 4
    if hidden_state is not None:
        h0 = tl.load(normed_state + track * 2 * C + channel, mask=mask, other=0.0)
        h1 = tl.load(normed_state + track * 2 * C + C + channel, mask=mask, other=0.0)
        v0, v1, v2, v3 = _load_four(hidden_state + state, mask, ACC)
        sum0 = b00 * v0 + b10 * v1 + b20 * v2 + b30 * v3
        v0, v1, v2, v3 = _load_four(hidden_state + state + 4 * C, mask, ACC)
        sum0 += b01 * v0 + b11 * v1 + b21 * v2 + b31 * v3
        sum1 = b00 * v0 + b10 * v1 + b20 * v2 + b30 * v3
        if T == 1:
            _store_four(new_hidden + state, v0, v1, v2, v3, mask)
    for step in tl.range(0, T + 4 - 2 * BEFORE, num_stages=1):  # h0, h1, sum0, sum1 as in the picture above
        arriving = tl.cast(step, tl.int64)  # the interpreter's ranges have numbers of Python
        h2 = _standard(x, mean, rstd, start, row, arriving, T, stride_t, channel, mask) * norm
        frame = arriving - 2 + BEFORE
        exists = _inside(frame, T, channel, mask)
        v0 = tl.where(exists, _gelu(bias0 + a00 * h0 + a01 * h1 + a02 * h2), 0.0)
        v1 = tl.where(exists, _gelu(bias1 + a10 * h0 + a11 * h1 + a12 * h2), 0.0)
        v2 = tl.where(exists, _gelu(bias2 + a20 * h0 + a21 * h1 + a22 * h2), 0.0)
        v3 = tl.where(exists, _gelu(bias3 + a30 * h0 + a31 * h1 + a32 * h2), 0.0)
        if hidden_state is not None:
            last = _inside(frame - (T - 2), 2, channel, mask)
            _store_four(new_hidden + state + (frame - (T - 2)) * C * 4, v0, v1, v2, v3, last)
        result = sum0 + (b02 * v0 + b12 * v1 + b22 * v2 + b32 * v3) + bias
        sum0 = sum1 + (b01 * v0 + b11 * v1 + b21 * v2 + b31 * v3)
        sum1 = b00 * v0 + b10 * v1 + b20 * v2 + b30 * v3
        h0, h1 = h1, h2
        done = frame - 2 + BEFORE
        ready = _inside(done, T, channel, mask)
        residual = tl.load(x + start + done * stride_t * UNIT + channel, mask=ready, other=0.0).to(ACC)
        tl.store(out + (row + done) * C + channel, (residual + result).to(out.dtype.element_ty), mask=ready)
    if hidden_state is not None:
        tl.store(new_normed + track * 2 * C + channel, h0, mask=mask)
        tl.store(new_normed + track * 2 * C + C + channel, h1, mask=mask)


@triton.jit
def _through_gelu(u, grad):
    """v = gelu(u), and the gradient of u from that of v."""
    square = u * u
    power = _power(u, square)
    sigmoid = 1.0 / (1.0 + power)
    v = u * sigmoid
    # 1 - sigmoid is computed as power * sigmoid, which is exact where it is small.
    slope = sigmoid + v * power * sigmoid * (square * (3 * 0.044715 * 1.5957691216057308) + 1.5957691216057308)
    return v, grad * slope


@kernel
def temporal_mixer_bwd_kernel_convolutions(
    grad_out, x, norm_weight, conv1_weight, conv1_bias, conv2_weight, mean, rstd, grad_normed, partial,
    tracks: tl.int64, each: tl.int64, N: tl.int64, T: tl.int64, stride_b: tl.int64, stride_n: tl.int64,
    stride_t: tl.int64, grad_stride_b: tl.int64, grad_stride_n: tl.int64, grad_stride_t: tl.int64, J: tl.constexpr,
    C: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the part of the J-th of the four channels, with g the gradient of the result:

    grad_u[s] = gelu'(u[s]) sum over k of bK g[s - k + BEFORE],   grad_h[s] += sum over k of aK grad_u[s - k + BEFORE]

    to grad_normed `[B * N * T, C]`, and writes its sums of the parameters' gradients into `partial`
    `[programs, 30, C]`. One launch per J, because the sums of all four would not fit into registers.
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    norm = tl.load(norm_weight + channel, mask=mask, other=0.0).to(ACC)
    a0, a1, a2 = _taps(conv1_weight, channel, mask, J, ACC)
    b0, b1, b2 = _taps(conv2_weight, channel, mask, J, ACC)
    bias = tl.load(conv1_bias + channel * 4 + J, mask=mask, other=0.0).to(ACC)
    zero = tl.zeros([BLOCK], ACC)
    of_a0, of_a1, of_a2, of_bias = zero, zero, zero, zero
    of_b0, of_b1, of_b2, of_bias2, of_norm = zero, zero, zero, zero, zero
    for track in tl.range(program * each, tl.minimum(tracks, (program + 1) * each), num_stages=1):
        start, row = offset(track, N, stride_b, stride_n), track * T
        grad_start = offset(track, N, grad_stride_b, grad_stride_n)
        n0, n1, g1, g2, sum0, sum1 = zero, zero, zero, zero, zero, zero
        # nK is the normalised row of frame - BEFORE + K, gK the gradient of frame - K + BEFORE; sum0 and sum1 are what
        # the frames so far have added to grad_h of the next two.
        for step in tl.range(-BEFORE, T + BEFORE, num_stages=1):
            frame = tl.cast(step, tl.int64)  # the interpreter's ranges have numbers of Python
            n2 = _standard(x, mean, rstd, start, row, frame - BEFORE + 2, T, stride_t, channel, mask)
            ahead = frame + BEFORE
            at = grad_start + ahead * grad_stride_t * UNIT + channel
            g0 = tl.load(grad_out + at, mask=_inside(ahead, T, channel, mask), other=0.0).to(ACC)
            exists = _inside(frame, T, channel, mask)
            u = bias + a0 * (n0 * norm) + a1 * (n1 * norm) + a2 * (n2 * norm)
            v, grad = _through_gelu(u, b0 * g0 + b1 * g1 + b2 * g2)
            v, grad = tl.where(exists, v, 0.0), tl.where(exists, grad, 0.0)
            done = frame - BEFORE  # its gradient is complete now
            ready = _inside(done, T, channel, mask)
            target = grad_normed + (row + done) * C + channel
            total = sum0 + a0 * grad
            if J > 0:
                total += tl.load(target, mask=ready, other=0.0)
            tl.store(target, total, mask=ready)
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
            n0, n1, g2, g1 = n1, n2, g1, g0
    if partial is not None:
        target = partial + program * 30 * C + channel
        tl.store(target + (3 * J) * C, of_a0, mask=mask)
        tl.store(target + (3 * J + 1) * C, of_a1, mask=mask)
        tl.store(target + (3 * J + 2) * C, of_a2, mask=mask)
        tl.store(target + (12 + J) * C, of_bias, mask=mask)
        tl.store(target + (16 + 3 * J) * C, of_b0, mask=mask)
        tl.store(target + (17 + 3 * J) * C, of_b1, mask=mask)
        tl.store(target + (18 + 3 * J) * C, of_b2, mask=mask)
        if J == 3:
            tl.store(target + 28 * C, of_bias2, mask=mask)
            tl.store(target + 29 * C, of_norm, mask=mask)
