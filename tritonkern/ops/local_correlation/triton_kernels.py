"""Triton kernels of local correlation, and their launchers.

A program has one point in one frame (for the supports' gradient: one point). The samples of a tile of channels are made
in registers from the four cells around each, most of which are in the first-level cache by then, and multiplied with
the supports. Nothing is multiplied with cells, samples or positions of others, so that a NaN stays where it belongs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops.local_correlation import configs, reference


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b; matrix units do not take float64 everywhere."""
    if a.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _axis(position, size, RADIUS: tl.constexpr):
    """Cell and fraction of a position; beyond the ends, and at infinity, samples meet the border alone, or nothing."""
    position = tl.where(position == position, position, 0.0)
    position = tl.minimum(tl.maximum(position, -RADIUS - 2.0), size + RADIUS + 0.0)
    cell = tl.floor(position)
    return cell.to(tl.int32), position - cell


@triton.jit
def _corner(
    cell_x, cell_y, fraction_x, fraction_y, p, height, width,
    DX: tl.constexpr, DY: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
):  # fmt: skip
    """Of the samples p: the cell DX and DY steps after its floor, whether it exists, and its weights along x and y."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    first = p // SIDE - RADIUS
    second = p % SIDE - RADIUS
    x = cell_x + DX + (second if Y_FIRST else first)
    y = cell_y + DY + (first if Y_FIRST else second)
    exists = p < SIDE * SIDE
    if ZEROS:
        exists = exists & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x = tl.minimum(tl.maximum(x, 0), width - 1)
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    along_x = fraction_x if DX else 1.0 - fraction_x
    along_y = fraction_y if DY else 1.0 - fraction_y
    return y.to(tl.int64) * width + x, exists, along_x, along_y


@triton.jit
def _cells(frame, index, exists, c, C: tl.constexpr, ACC: tl.constexpr):
    mask = exists[:, None] & (c < C)[None, :]
    return tl.load(frame + index[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _samples(
    frame, cell_x, cell_y, fraction_x, fraction_y, p, c, height, width,
    C: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([p.shape[0], c.shape[0]], ACC)
    for corner in tl.static_range(4):
        index, exists, along_x, along_y = _corner(
            cell_x, cell_y, fraction_x, fraction_y, p, height, width, corner % 2, corner // 2, RADIUS, ZEROS, Y_FIRST
        )
        total += along_x * along_y * _cells(frame, index, exists, c, C, ACC)
    return total


@triton.jit(do_not_specialize=["frames", "points", "height", "width"])
def forward_kernel(
    features, support, position, out, frames: tl.int64, points: tl.int64, height: tl.int32, width: tl.int32,
    C: tl.constexpr, S: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
    OWN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    P: tl.constexpr = (2 * RADIUS + 1) * (2 * RADIUS + 1)
    row = tl.program_id(0).to(tl.int64)  # [B, T, N]
    t = row // points % frames
    point = row // points // frames * points + row % points
    vectors = support + (point * frames + t if OWN else point) * S * C
    frame = features + row // points * height * width * C
    x = tl.load(position + 2 * row)
    y = tl.load(position + 2 * row + 1)
    known = (x == x) & (y == y)
    cell_x, fraction_x = _axis(x, width, RADIUS)
    cell_y, fraction_y = _axis(y, height, RADIUS)
    for first_p in range(0, P, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        for first_s in range(0, S, BLOCK_S):
            s = first_s + tl.arange(0, BLOCK_S)
            total = tl.zeros([BLOCK_P, BLOCK_S], ACC)
            for first_c in range(0, C, BLOCK_C):
                c = first_c + tl.arange(0, BLOCK_C)
                sample = _samples(
                    frame, cell_x, cell_y, fraction_x, fraction_y, p, c, height, width, C, RADIUS, ZEROS, Y_FIRST, ACC
                )
                mask = (c < C)[:, None] & (s < S)[None, :]
                vector = tl.load(vectors + s[None, :] * C + c[:, None], mask=mask, other=0.0)
                total = _product(sample.to(vector.dtype), vector, total, PRECISION)
            total = tl.where(known, total, float("nan"))
            to = out + row * P * S + p[:, None] * S + s[None, :]
            tl.store(to, total.to(out.dtype.element_ty), mask=(p < P)[:, None] & (s < S)[None, :])


@triton.jit(do_not_specialize=["frames", "points", "height", "width"])
def features_kernel(
    grad_out, features, support, position, grad_features, grad_position, frames: tl.int64, points: tl.int64,
    height: tl.int32, width: tl.int32,
    C: tl.constexpr, S: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
    OWN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of the cells that a point read, and writes that of its position."""
    ACC: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    P: tl.constexpr = (2 * RADIUS + 1) * (2 * RADIUS + 1)
    row = tl.program_id(0).to(tl.int64)
    t = row // points % frames
    point = row // points // frames * points + row % points
    vectors = support + (point * frames + t if OWN else point) * S * C
    start = row // points * height * width * C
    x = tl.load(position + 2 * row)
    y = tl.load(position + 2 * row + 1)
    known = (x == x) & (y == y)
    cell_x, fraction_x = _axis(x, width, RADIUS)
    cell_y, fraction_y = _axis(y, height, RADIUS)
    grad_x = tl.zeros([BLOCK_P], ACC)
    grad_y = tl.zeros([BLOCK_P], ACC)
    for first_p in range(0, P, BLOCK_P):
        p = tl.where(known, first_p + tl.arange(0, BLOCK_P), P)  # nobody knows where a NaN position was
        for first_c in range(0, C, BLOCK_C):
            c = first_c + tl.arange(0, BLOCK_C)
            grad = tl.zeros([BLOCK_P, BLOCK_C], ACC)
            for first_s in range(0, S, BLOCK_S):
                s = first_s + tl.arange(0, BLOCK_S)
                mask = (p < P)[:, None] & (s < S)[None, :]
                arriving = tl.load(grad_out + row * P * S + p[:, None] * S + s[None, :], mask=mask, other=0.0)
                mask = (s < S)[:, None] & (c < C)[None, :]
                vector = tl.load(vectors + s[:, None] * C + c[None, :], mask=mask, other=0.0)
                grad = _product(arriving.to(ACC), vector.to(ACC), grad, PRECISION)
            for corner in tl.static_range(4):
                index, exists, along_x, along_y = _corner(
                    cell_x, cell_y, fraction_x, fraction_y, p, height, width, corner % 2, corner // 2, RADIUS, ZEROS,
                    Y_FIRST,
                )  # fmt: skip
                if grad_features is not None:
                    to = grad_features + start + index[:, None] * C + c[None, :]
                    mask = exists[:, None] & (c < C)[None, :]
                    tl.atomic_add(to, along_x * along_y * grad, mask=mask, sem="relaxed")
                if grad_position is not None:
                    value = tl.sum(_cells(features + start, index, exists, c, C, ACC) * grad, 1)
                    grad_x += value * (along_y if corner % 2 else -along_y)
                    grad_y += value * (along_x if corner // 2 else -along_x)
    if grad_position is not None:
        tl.store(grad_position + 2 * row, tl.where(known, tl.sum(grad_x, 0), float("nan")))
        tl.store(grad_position + 2 * row + 1, tl.where(known, tl.sum(grad_y, 0), float("nan")))


@triton.jit(do_not_specialize=["frames", "points", "height", "width"])
def support_kernel(
    grad_out, features, position, grad_support, frames: tl.int64, points: tl.int64, height: tl.int32, width: tl.int32,
    C: tl.constexpr, S: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
    OWN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile of the supports of one point: a sum over frames, or that of one frame."""
    ACC: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    P: tl.constexpr = (2 * RADIUS + 1) * (2 * RADIUS + 1)
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TILES_S: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    program = tl.program_id(0).to(tl.int64)
    c = (program % TILES_C * BLOCK_C).to(tl.int32) + tl.arange(0, BLOCK_C)
    s = (program // TILES_C % TILES_S * BLOCK_S).to(tl.int32) + tl.arange(0, BLOCK_S)
    owner = program // (TILES_C * TILES_S)  # [B, N] or [B, N, T]
    point = owner // frames if OWN else owner
    first_t = owner % frames if OWN else 0
    stop_t = first_t + 1 if OWN else frames
    total = tl.zeros([BLOCK_S, BLOCK_C], ACC)
    for t in range(first_t, stop_t):
        frame_number = point // points * frames + t
        row = frame_number * points + point % points
        frame = features + frame_number * height * width * C
        x = tl.load(position + 2 * row)
        y = tl.load(position + 2 * row + 1)
        known = (x == x) & (y == y)
        cell_x, fraction_x = _axis(x, width, RADIUS)
        cell_y, fraction_y = _axis(y, height, RADIUS)
        for first_p in range(0, P, BLOCK_P):
            p = first_p + tl.arange(0, BLOCK_P)
            sample = _samples(
                frame, cell_x, cell_y, fraction_x, fraction_y, p, c, height, width, C, RADIUS, ZEROS, Y_FIRST, ACC
            )
            mask = (p < P)[None, :] & (s < S)[:, None]
            arriving = tl.load(grad_out + row * P * S + p[None, :] * S + s[:, None], mask=mask, other=0.0)
            total = _product(arriving.to(ACC), sample, total, PRECISION)
        total = tl.where(known, total, float("nan"))
    to = grad_support + owner * S * C + s[:, None] * C + c[None, :]
    tl.store(to, total, mask=(s < S)[:, None] & (c < C)[None, :])


def readable(features: Tensor) -> Tensor:
    """Contiguous: every cell is read many times."""
    return features.contiguous()


def correlate_into(
    out: Tensor, features: Tensor, support: Tensor, position: Tensor, radius: int, zeros: bool, y_first: bool
) -> None:
    """Writes the correlations into the contiguous `out`, in its dtype: features' or that of sums."""
    if out.numel():
        inputs = [x.contiguous() for x in (features, support, position)]
        sizes, options, num_warps = _launch(features, support, position, radius, zeros, y_first)
        forward_kernel[(position.shape[:3].numel(),)](*inputs, out, *sizes, *options, num_warps=num_warps, num_stages=2)


def add_gradients(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    grad_features: Tensor | None,
    grad_support: Tensor | None,
    grad_position: Tensor | None,
) -> None:
    """Adds to the gradients that are not None; they have the dtype of sums, and that of features is contiguous."""
    if not grad_out.numel():
        return
    if grad_features is not None and torch.are_deterministic_algorithms_enabled():
        # Points that share cells add to them in any order here, in a fixed one there.
        slow = (grad_features, None, None)
        reference.add_gradients(grad_out, features, support, position, radius, zeros, y_first, *slow)
        grad_features = None
    arriving, *inputs = [x.contiguous() for x in (grad_out, features, support, position)]
    sizes, options, num_warps = _launch(features, support, position, radius, zeros, y_first)
    if grad_features is not None or grad_position is not None:
        places = None if grad_position is None else torch.empty_like(inputs[2])
        grid = (position.shape[:3].numel(),)
        features_kernel[grid](
            arriving, *inputs, grad_features, places, *sizes, *options, num_warps=num_warps, num_stages=2
        )
        if grad_position is not None and places is not None:
            grad_position += places
    if grad_support is not None:
        sums = torch.empty(support.shape, dtype=position.dtype, device=support.device)
        block_s, block_c = options[-3], options[-2]
        tiles = triton.cdiv(support.shape[-1], block_c) * triton.cdiv(support.shape[-2], block_s)
        grid = (support.shape[:-2].numel() * tiles,)
        support_kernel[grid](arriving, inputs[0], inputs[2], sums, *sizes, *options, num_warps=num_warps, num_stages=2)
        grad_support += sums


def _launch(
    features: Tensor, support: Tensor, position: Tensor, radius: int, zeros: bool, y_first: bool
) -> tuple[tuple[int, ...], tuple[int | bool | str, ...], int]:
    """Sizes, constants and warps of the kernels."""
    height, width, channels = features.shape[2:]
    supports = support.shape[-2]
    tile = configs.tile((2 * radius + 1) ** 2, supports, channels, features.dtype)
    blocks = (tile.samples, tile.supports, tile.channels)
    precision = "tf32" if configs.tf32_allowed() else "ieee"
    own = support.dim() == 5
    sizes = (position.shape[1], position.shape[2], height, width)
    return sizes, (channels, supports, radius, zeros, y_first, own, *blocks, precision), tile.num_warps
