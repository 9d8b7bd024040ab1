"""Triton kernels of the temporal mixer's LayerNorm: a program computes a few whole rows."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkern.ops._triton import UNIT, kernel, whole_vectors


@triton.jit
def offset(track, N, stride_b, stride_n):
    """Offset of the first frame of a track; strides in UNITs."""
    return (track // N * stride_b + track % N * stride_n) * UNIT


@kernel
def temporal_mixer_fwd_kernel_statistics(
    x, mean, rstd, rows: tl.int64, N: tl.int64, T: tl.int64, stride_b: tl.int64, stride_n: tl.int64,
    stride_t: tl.int64, eps: tl.float64, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of every row of x: mean, and rstd = 1 / sqrt(mean((x - mean)^2) + eps), `[B * N * T]`."""
    ACC: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    start = offset(row // T, N, stride_b, stride_n) + row % T * stride_t * UNIT
    x_at = whole_vectors(x + start, channel, UNIT)
    value = tl.load(x_at, mask=mask, other=0.0).to(ACC)
    average = tl.sum(value, 1) / C
    centred = tl.where(mask, value - average[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / C
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, 1.0 / tl.sqrt(variance + tl.full([], eps, ACC)), mask=row < rows)


@kernel
def temporal_mixer_bwd_kernel_norm(
    grad_out, x, norm_weight, mean, rstd, grad_normed, grad_x, rows: tl.int64, N: tl.int64, T: tl.int64,
    stride_b: tl.int64, stride_n: tl.int64, stride_t: tl.int64, grad_stride_b: tl.int64, grad_stride_n: tl.int64,
    grad_stride_t: tl.int64, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_x = grad_out + rstd (g - mean(g) - n mean(g n)),   g = grad_normed norm_weight,   n = (x - mean) rstd"""
    ACC: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    start = offset(row // T, N, stride_b, stride_n) + row % T * stride_t * UNIT
    grad_start = offset(row // T, N, grad_stride_b, grad_stride_n) + row % T * grad_stride_t * UNIT
    average = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    factor = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    x_at = whole_vectors(x + start, channel, UNIT)
    value = tl.load(x_at, mask=mask, other=0.0).to(ACC)
    standard = tl.where(mask, (value - average) * factor, 0.0)
    weight = tl.load(norm_weight + channel, mask=channel < C, other=0.0).to(ACC)[None, :]
    weighted = tl.load(whole_vectors(grad_normed + row * C, channel, C), mask=mask, other=0.0) * weight
    of_mean = (tl.sum(weighted, 1) / C)[:, None]
    slope = (tl.sum(weighted * standard, 1) / C)[:, None]
    grad_at = whole_vectors(grad_out + grad_start, channel, UNIT)
    grad = tl.load(grad_at, mask=mask, other=0.0).to(ACC)
    grad += factor * (weighted - of_mean - standard * slope)
    tl.store(whole_vectors(grad_x + row * C, channel, C), grad.to(grad_x.dtype.element_ty), mask=mask)
