"""Triton kernels of GroupNorm with one group over the patches of a clip, and of sums over pixels.

A program takes some pixels of one frame, and a block of channels. Sums over more than a program are finished from what
each leaves behind, in one order: no atomics. Mean and deviation, and whatever is added up across programs, are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, kernel, whole_vectors


@triton.jit
def place(tiles, C: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its frame (counted through the batch), which of the frame's tiles it has, its channels."""
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    frame = (program // BLOCKS // tiles).to(tl.int64)
    return frame, program // BLOCKS % tiles, program % BLOCKS * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def frame_start(frame, T, prefix, stride_b, stride_t, stride_l):
    """Offset of a frame's first patch in tokens `[B, T, prefix + h * w, C]`; strides in UNITs."""
    return (frame // T * stride_b + frame % T * stride_t + prefix * stride_l) * UNIT


@triton.jit
def tokens_at(frame, row, stride, channel):
    """Addresses `[rows, channels]` of tokens, whose rows start on 16 bytes."""
    return whole_vectors(frame + row.to(tl.int64) * (stride * UNIT), channel, UNIT)


@triton.jit
def pixels_at(frame, row, channel, C: tl.constexpr):
    """Addresses `[rows, channels]` in a contiguous image."""
    return whole_vectors(frame + row.to(tl.int64) * C, channel, C)


@triton.jit
def _standardised(x, mean, rstd, ACC: tl.constexpr):
    """Of zero mean and unit deviation."""
    return (x - tl.load(mean).to(ACC)) * tl.load(rstd).to(ACC)


@kernel
def temporal_adapter_fwd_kernel_statistics(
    tokens, partial, T: tl.int32, prefix: tl.int32, pixels: tl.int32, chunks: tl.int32, stride_b: tl.int64,
    stride_t: tl.int64, stride_l: tl.int64, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of EACH tiles, `[programs, 3]`.

    Deviations are summed from the first tile's mean, which cancels nothing that matters wherever the mean is.
    """
    ACC: tl.constexpr = tl.float64 if tokens.dtype.element_ty == tl.float64 else tl.float32
    frame, chunk, channel = place(chunks, C, BLOCK)
    tokens += frame_start(frame, T, prefix, stride_b, stride_t, stride_l)
    first = chunk * (EACH * ROWS)
    last = tl.minimum(first + EACH * ROWS, pixels)
    row = first + tl.arange(0, ROWS)
    mask = (row < last)[:, None] & (channel < C)[None, :]
    value = tl.load(tokens_at(tokens, row, stride_l, channel), mask=mask, other=0.0).to(ACC)
    shift = tl.sum(value) / tl.sum(mask.to(ACC))
    total = tl.zeros([ROWS, BLOCK], ACC)
    squares = tl.zeros([ROWS, BLOCK], ACC)
    for begin in tl.range(first, last, ROWS, num_stages=1):
        row = begin + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (channel < C)[None, :]
        value = tl.load(tokens_at(tokens, row, stride_l, channel), mask=mask, other=0.0).to(ACC)
        deviation = tl.where(mask, value - shift, 0.0)
        total += deviation
        squares += deviation * deviation
    count = ((last - first) * tl.sum((channel < C).to(tl.int32))).to(tl.float64)
    off = tl.sum(total.to(tl.float64)) / count
    to = partial + tl.program_id(0).to(tl.int64) * 3
    tl.store(to, count)
    tl.store(to + 1, shift.to(tl.float64) + off)
    tl.store(to + 2, tl.sum(squares.to(tl.float64)) - count * off * off)


@kernel
def temporal_adapter_fwd_kernel_moments(partial, mean, rstd, programs: tl.int64, eps: tl.float64, BLOCK: tl.constexpr):
    """Mean and 1 / deviation of each batch entry `[B]`, from the `programs` that had a part of it."""
    entry = tl.program_id(0).to(tl.int64)
    partial += entry * programs * 3
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, programs, BLOCK, num_stages=1):
        at = first + tl.arange(0, BLOCK)
        own = tl.load(partial + at * 3, mask=at < programs, other=0.0)
        count += own
        total += own * tl.load(partial + at * 3 + 1, mask=at < programs, other=0.0)
    all_count = tl.sum(count)
    average = tl.sum(total) / all_count
    squares = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, programs, BLOCK, num_stages=1):
        at = first + tl.arange(0, BLOCK)
        own = tl.load(partial + at * 3, mask=at < programs, other=0.0)
        off = tl.load(partial + at * 3 + 1, mask=at < programs, other=0.0) - average
        squares += tl.load(partial + at * 3 + 2, mask=at < programs, other=0.0) + tl.where(
            at < programs, own * off * off, 0.0
        )
    tl.store(mean + entry, average)
    tl.store(rstd + entry, 1.0 / tl.sqrt(tl.sum(squares) / all_count + tl.full([], eps, tl.float64)))


@kernel
def temporal_adapter_fwd_kernel_normalise(
    tokens, norm_weight, norm_bias, mean, rstd, normed, T: tl.int32, prefix: tl.int32, pixels: tl.int32,
    tiles: tl.int32, stride_b: tl.int64, stride_t: tl.int64, stride_l: tl.int64, C: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The patches, normalised, as the image `[B * T, h, w, C]` that the convolution takes."""
    ACC: tl.constexpr = tl.float64 if tokens.dtype.element_ty == tl.float64 else tl.float32
    frame, tile, channel = place(tiles, C, BLOCK)
    tokens += frame_start(frame, T, prefix, stride_b, stride_t, stride_l)
    row = tile * ROWS + tl.arange(0, ROWS)
    mask = (row < pixels)[:, None] & (channel < C)[None, :]
    value = tl.load(tokens_at(tokens, row, stride_l, channel), mask=mask, other=0.0).to(ACC)
    value = _standardised(value, mean + frame // T, rstd + frame // T, ACC)
    weight = tl.load(norm_weight + channel, mask=channel < C, other=0.0).to(ACC)[None, :]
    bias = tl.load(norm_bias + channel, mask=channel < C, other=0.0).to(ACC)[None, :]
    to = pixels_at(normed + frame * pixels * C, row, channel, C)
    tl.store(to, (value * weight + bias).to(normed.dtype.element_ty), mask=mask)


@kernel
def temporal_adapter_bwd_kernel_sums(
    grad, tokens, mean, rstd, image, partial, T: tl.int32, grad_prefix: tl.int32, prefix: tl.int32, pixels: tl.int32,
    chunks: tl.int32, grad_stride_b: tl.int64, grad_stride_t: tl.int64, grad_stride_l: tl.int64, stride_b: tl.int64,
    stride_t: tl.int64, stride_l: tl.int64, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Sums over pixels of grad and, with tokens, of grad * normalised patches, EACH tiles' in `partial`
    `[B * T * chunks, 1 or 2, C]`. With `image` the patches of grad are copied into it `[B * T, h, w, C]`."""
    ACC: tl.constexpr = partial.dtype.element_ty
    KINDS: tl.constexpr = 1 if tokens is None else 2
    frame, chunk, channel = place(chunks, C, BLOCK)
    grad += frame_start(frame, T, grad_prefix, grad_stride_b, grad_stride_t, grad_stride_l)
    if tokens is not None:
        tokens += frame_start(frame, T, prefix, stride_b, stride_t, stride_l)
        mean += frame // T
        rstd += frame // T
    if image is not None:
        image += frame * pixels * C
    total = tl.zeros([ROWS, BLOCK], ACC)
    moment = tl.zeros([ROWS, BLOCK], ACC)
    first = chunk * (EACH * ROWS)
    last = tl.minimum(first + EACH * ROWS, pixels)
    for begin in tl.range(first, last, ROWS, num_stages=1):
        row = begin + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (channel < C)[None, :]
        value = tl.load(tokens_at(grad, row, grad_stride_l, channel), mask=mask, other=0.0)
        if image is not None:
            tl.store(pixels_at(image, row, channel, C), value.to(image.dtype.element_ty), mask=mask)
        value = value.to(ACC)
        total += value
        if tokens is not None:
            patches = tl.load(tokens_at(tokens, row, stride_l, channel), mask=mask, other=0.0).to(ACC)
            moment += value * _standardised(patches, mean, rstd, ACC)
    to = partial + (frame * chunks + chunk) * (KINDS * C) + channel
    tl.store(to, tl.sum(total, 0), mask=channel < C)
    if tokens is not None:
        tl.store(to + C, tl.sum(moment, 0), mask=channel < C)


@kernel
def temporal_adapter_bwd_kernel_tokens(
    grad, tokens, norm_weight, mean, rstd, averages, result, T: tl.int32, prefix: tl.int32, pixels: tl.int32,
    tiles: tl.int32, stride_b: tl.int64, stride_t: tl.int64, stride_l: tl.int64, C: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """rstd * (g - mean(g) - n * mean(g n)), g = grad * norm_weight, n = the normalised patches; zero for the prefix.

    `averages` `[B, 2]` holds the two means, which run over a batch entry.
    """
    ACC: tl.constexpr = tl.float64 if tokens.dtype.element_ty == tl.float64 else tl.float32
    frame, tile, channel = place(tiles, C, BLOCK)
    tokens += frame_start(frame, T, 0, stride_b, stride_t, stride_l)
    entry = frame // T
    row = tile * ROWS + tl.arange(0, ROWS)
    length = prefix + pixels
    mask = (row < length)[:, None] & (channel < C)[None, :]
    patch = mask & (row >= prefix)[:, None]
    value = tl.load(tokens_at(tokens, row, stride_l, channel), mask=patch, other=0.0).to(ACC)
    standard = _standardised(value, mean + entry, rstd + entry, ACC)
    at = pixels_at(grad + frame * pixels * C, row - prefix, channel, C)
    value = tl.load(at, mask=patch, other=0.0).to(ACC)
    value *= tl.load(norm_weight + channel, mask=channel < C, other=0.0).to(ACC)[None, :]
    value -= tl.load(averages + entry * 2).to(ACC) + standard * tl.load(averages + entry * 2 + 1).to(ACC)
    value = tl.where(patch, value * tl.load(rstd + entry).to(ACC), 0.0)
    to = pixels_at(result + frame * length * C, row, channel, C)
    tl.store(to, value.to(result.dtype.element_ty), mask=mask)
