"""What both Triton kernels of the gated linear recurrence compute: the convolution and the gates of one frame.

A program owns one head of some sequences (rows) and goes along their frames; a tile is `[rows, channels of the head]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, product, whole_vectors


@triton.jit
def start_of(row, N, stride_b, stride_n):
    """Offsets of frame 0 of the rows; strides in UNITs."""
    return (row // N * stride_b + row % N * stride_n) * UNIT


@triton.jit
def load_frame(x, inputs, start, row, t, N, stride_t, first, channel, exists, C: tl.constexpr, STEP: tl.constexpr):
    """Frame t of x; before 0 that of the state `inputs`, or zeros. `first` is the head's first channel.

    Masks compare vectors, as those of the interpreter must not come from single numbers.
    """
    frame = t + row * 0
    at = whole_vectors(x + start + t * stride_t * UNIT + first, channel, STEP)
    tile = tl.load(at, mask=exists & (frame >= 0)[:, None], other=0.0)
    if inputs is not None:
        kept = ((row // N * 3 + 3 + t) * N + row % N) * C + first
        before = exists & ((frame < 0) & (frame >= -3))[:, None]
        tile += tl.load(whole_vectors(inputs + kept, channel, STEP), mask=before, other=0.0)
    return tile


@triton.jit
def load_weight(weight, head, channel, ACC: tl.constexpr, D: tl.constexpr):
    """`[D, D]` of a head, inputs before outputs, with zeros around."""
    real = (channel < D)[:, None] & (channel < D)[None, :]
    return tl.load(whole_vectors(weight + (head * D + channel) * D, channel, D), mask=real, other=0.0).to(ACC)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.where(x < -87.0, 87.0, -x)))


@triton.jit
def one_minus_exp(x, power, DEGREE: tl.constexpr):
    """1 - e^x for x <= 0, with e^x in `power`. Near 0, where the difference loses its digits, by the Taylor series."""
    series = x * 0.0 + 1.0 / DEGREE
    for i in tl.static_range(1, DEGREE):
        series = (1.0 + x * series) * (1.0 / (DEGREE - i))
    return tl.where(x > -0.5, -x * series, 1.0 - power)


@triton.jit
def gates(u, input_weight, input_bias, decay_weight, decay_bias, rate, PRECISION: tl.constexpr):
    """Gate of the input, gate of the decay, factor a = exp(rate r), a^2 and 1 - a^2."""
    ACC: tl.constexpr = rate.dtype
    DEGREE: tl.constexpr = 16 if ACC == tl.float64 else 8
    zeros = tl.zeros([u.shape[0], u.shape[1]], ACC)
    opened = sigmoid(product(u, input_weight, zeros + input_bias[None, :], PRECISION))
    decays = sigmoid(product(u, decay_weight, zeros + decay_bias[None, :], PRECISION))
    log_factor = rate[None, :] * decays
    factor = tl.exp(log_factor)
    square = factor * factor
    return opened, decays, factor, square, one_minus_exp(2.0 * log_factor, square, DEGREE)
