"""Triton kernels between tokens, images `[B * T, h, w, C]` and `hidden`, which is an image stored patch after patch."""

from __future__ import annotations

import triton.language as tl

from tritonkern.ops._triton import kernel
from tritonkern.ops.temporal_adapter.triton_norm import frame_start, pixels_at, place, tokens_at


@kernel
def temporal_adapter_kernel_rectify(
    source, bias, gate, result, columns: tl.int32, pixels: tl.int32, tiles: tl.int32, POOL: tl.constexpr,
    TO_HIDDEN: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From an image to hidden or back, and zero where the gate (hidden; without one the value itself) is not positive.

    The first is ReLU, the second its gradient; a NaN passes both.
    """
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    frame, tile, channel = place(tiles, C, BLOCK)
    row = tile * ROWS + tl.arange(0, ROWS)  # in hidden
    mask = (row < pixels)[:, None] & (channel < C)[None, :]
    patch, inner = row // (POOL * POOL), row % (POOL * POOL)
    across = columns // POOL
    y, x = patch // across * POOL + inner // POOL, patch % across * POOL + inner % POOL
    start, in_image = frame * pixels * C, y * columns + x
    at = pixels_at(source + start, in_image if TO_HIDDEN else row, channel, C)
    value = tl.load(at, mask=mask, other=0.0).to(ACC)
    if bias is not None:
        value += tl.load(bias + channel, mask=channel < C, other=0.0).to(ACC)[None, :]
    if gate is not None:
        open_or_not = tl.load(pixels_at(gate + start, row, channel, C), mask=mask, other=0.0)
        value = tl.where(open_or_not <= 0, 0.0, value)
    else:
        value = tl.where(value <= 0, 0.0, value)
    to = pixels_at(result + start, row if TO_HIDDEN else in_image, channel, C)
    tl.store(to, value.to(result.dtype.element_ty), mask=mask)


@kernel
def temporal_adapter_fwd_kernel_add(
    update, bias, tokens, result, T: tl.int32, prefix: tl.int32, pixels: tl.int32, tiles: tl.int32, stride_b: tl.int64,
    stride_t: tl.int64, stride_l: tl.int64, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All tokens `[B, T, prefix + h * w, C]`: the prefix as it is, `update + bias` added to the patches.

    Without tokens the update alone.
    """
    ACC: tl.constexpr = tl.float64 if update.dtype.element_ty == tl.float64 else tl.float32
    frame, tile, channel = place(tiles, C, BLOCK)
    row = tile * ROWS + tl.arange(0, ROWS)
    length = prefix + pixels
    mask = (row < length)[:, None] & (channel < C)[None, :]
    patch = mask & (row >= prefix)[:, None]
    at = pixels_at(update + frame * pixels * C, row - prefix, channel, C)
    value = tl.load(at, mask=patch, other=0.0).to(ACC)
    if bias is not None:
        value += tl.load(bias + channel, mask=channel < C, other=0.0).to(ACC)[None, :]
    if tokens is not None:
        tokens += frame_start(frame, T, 0, stride_b, stride_t, stride_l)
        residual = tl.load(tokens_at(tokens, row, stride_l, channel), mask=mask, other=0.0).to(ACC)
        value = tl.where(patch, residual + value, residual)
    to = pixels_at(result + frame * length * C, row, channel, C)
    tl.store(to, value.to(result.dtype.element_ty), mask=mask)
