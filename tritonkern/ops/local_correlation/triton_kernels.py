"""Triton kernels of local correlation, and their launchers.

A program computes one point in one frame (for the supports' gradient: one point). The samples of a tile of channels are
made in registers from the four cells around each, most of which are in the first-level cache by then, and multiplied
with the supports. Nothing is multiplied with cells, samples or positions of other points, so a NaN does not spread.

Tensors are contiguous and start on 16 bytes, which makes loads of channels wide.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._triton import Launch, aligned, kernel, launch, product, register_limit, whole_vectors
from tritonkern.ops.local_correlation import blocks, configs, reference
from tritonkern.ops.local_correlation.op import Samples


@triton.jit
def _axis(position, size, RADIUS: tl.constexpr):
    """Cell and fraction of a position. Far outside, and at infinity, all samples are the border, or zeros."""
    position = tl.where(position == position, position, 0.0)
    position = tl.minimum(tl.maximum(position, -RADIUS - 2.0), size + RADIUS + 0.0)
    cell = tl.floor(position)
    return cell.to(tl.int32), position - cell


@triton.jit
def _corner(
    cell_x, cell_y, fraction_x, fraction_y, p, height, width,
    DX: tl.constexpr, DY: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
):  # fmt: skip
    """For the samples p: index of the cell DX, DY steps after the floor, whether it exists, its weights in x and y."""
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
    """Channels c of the cells, `[p, c]`; zeros where there is no cell."""
    mask = exists[:, None] & (c < C)[None, :]
    return tl.load(whole_vectors(frame + index * C, c, C), mask=mask, other=0.0).to(ACC)


@triton.jit
def _samples(
    frame, cell_x, cell_y, fraction_x, fraction_y, p, c, height, width,
    C: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """f(position + offset[p]) = sum over the four corners of along_x along_y cell, `[p, c]`."""
    total = tl.zeros([p.shape[0], c.shape[0]], ACC)
    for corner in tl.static_range(4):
        index, exists, along_x, along_y = _corner(
            cell_x, cell_y, fraction_x, fraction_y, p, height, width, corner % 2, corner // 2, RADIUS, ZEROS, Y_FIRST
        )
        total += along_x * along_y * _cells(frame, index, exists, c, C, ACC)
    return total


@triton.jit
def _correlations(
    frame, vectors, cell_x, cell_y, fraction_x, fraction_y, p, s, height, width,
    C: tl.constexpr, S: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z[p, s] = support[s] . f(position + offset[p])"""
    total = tl.zeros([p.shape[0], s.shape[0]], ACC)
    for first_c in range(0, C, BLOCK_C):  # total: products of the channels before first_c
        c = first_c + tl.arange(0, BLOCK_C)
        sample = _samples(
            frame, cell_x, cell_y, fraction_x, fraction_y, p, c, height, width, C, RADIUS, ZEROS, Y_FIRST, ACC
        )
        mask = (s < S)[:, None] & (c < C)[None, :]
        vector = tl.load(whole_vectors(vectors + s * C, c, C), mask=mask, other=0.0)
        total = product(sample, tl.trans(vector), total, PRECISION)
    return total


@kernel
def local_correlation_fwd_kernel(
    features, support, position, out, frames: tl.int64, points: tl.int64, height: tl.int32, width: tl.int32,
    scale: tl.float64,
    C: tl.constexpr, S: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
    OWN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    SOFTMAX: tl.constexpr,
):  # fmt: skip
    """out[row, p, s] = z[p, s],   row = (b, t, n)                               OWN: supports differ by frame.

    SOFTMAX: exp(scale z[p, s] - maximum[s]) / sum[s], with both over p; z is computed again instead of stored.
    """
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
    scale = tl.full([], scale, ACC)
    for first_s in range(0, S, BLOCK_S):
        s = first_s + tl.arange(0, BLOCK_S)
        if SOFTMAX:
            # Finite, so that differences from it are numbers
            maximum = tl.full([BLOCK_S], -1e308 if ACC == tl.float64 else -3e38, ACC)
            total_weight = tl.zeros([BLOCK_S], ACC)
            for first_p in range(0, P, BLOCK_P):  # maximum, total_weight: of the samples before first_p
                p = first_p + tl.arange(0, BLOCK_P)
                z = scale * _correlations(
                    frame, vectors, cell_x, cell_y, fraction_x, fraction_y, p, s, height, width,
                    C, S, RADIUS, ZEROS, Y_FIRST, BLOCK_C, PRECISION, ACC,
                )  # fmt: skip
                z = tl.where((p < P)[:, None], z, float("-inf"))
                new_maximum = tl.maximum(maximum, tl.max(z, 0))
                total_weight *= tl.exp(maximum - new_maximum)
                total_weight += tl.sum(tl.exp(z - new_maximum[None, :]), 0)
                maximum = new_maximum
        for first_p in range(0, P, BLOCK_P):
            p = first_p + tl.arange(0, BLOCK_P)
            total = _correlations(
                frame, vectors, cell_x, cell_y, fraction_x, fraction_y, p, s, height, width,
                C, S, RADIUS, ZEROS, Y_FIRST, BLOCK_C, PRECISION, ACC,
            )  # fmt: skip
            if SOFTMAX:
                total = tl.exp(scale * total - maximum[None, :]) / total_weight[None, :]
            total = tl.where(known, total, float("nan"))
            target = whole_vectors(out + row * P * S + p * S, s, S)
            tl.store(target, total.to(out.dtype.element_ty), mask=(p < P)[:, None] & (s < S)[None, :])


@kernel
def local_correlation_bwd_kernel_features(
    grad_out, features, support, position, grad_features, grad_position, frames: tl.int64, points: tl.int64,
    height: tl.int32, width: tl.int32,
    C: tl.constexpr, S: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
    OWN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With grad[p] = sum over s of grad_out[row, p, s] support[s]:

    grad_features[cell] += sum over p of weight[p, cell] grad[p]          (atomic: points share cells)
    grad_position[row]   = sum over p, corners of slope[p, corner] cell[p, corner] . grad[p]
    """
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
    for first_p in range(0, P, BLOCK_P):  # grad_x, grad_y: sums over the samples before first_p, by place in the tile
        p = tl.where(known, first_p + tl.arange(0, BLOCK_P), P)  # a NaN position has no cells
        for first_c in range(0, C, BLOCK_C):
            c = first_c + tl.arange(0, BLOCK_C)
            grad = tl.zeros([BLOCK_P, BLOCK_C], ACC)
            for first_s in range(0, S, BLOCK_S):  # grad: products of the supports before first_s
                s = first_s + tl.arange(0, BLOCK_S)
                mask = (p < P)[:, None] & (s < S)[None, :]
                at = whole_vectors(grad_out + row * P * S + p * S, s, S)
                arriving = tl.load(at, mask=mask, other=0.0)
                mask = (s < S)[:, None] & (c < C)[None, :]
                vector = tl.load(whole_vectors(vectors + s * C, c, C), mask=mask, other=0.0)
                grad = product(arriving, vector.to(ACC), grad, PRECISION)
            for corner in tl.static_range(4):
                index, exists, along_x, along_y = _corner(
                    cell_x, cell_y, fraction_x, fraction_y, p, height, width, corner % 2, corner // 2, RADIUS, ZEROS,
                    Y_FIRST,
                )  # fmt: skip
                if grad_features is not None:
                    target = whole_vectors(grad_features + start + index * C, c, C)
                    mask = exists[:, None] & (c < C)[None, :]
                    tl.atomic_add(target, along_x * along_y * grad, mask=mask, sem="relaxed")
                if grad_position is not None:
                    value = tl.sum(_cells(features + start, index, exists, c, C, ACC) * grad, 1)
                    grad_x += value * (along_y if corner % 2 else -along_y)
                    grad_y += value * (along_x if corner // 2 else -along_x)
    if grad_position is not None:
        tl.store(grad_position + 2 * row, tl.where(known, tl.sum(grad_x, 0), float("nan")))
        tl.store(grad_position + 2 * row + 1, tl.where(known, tl.sum(grad_y, 0), float("nan")))


@kernel
def local_correlation_bwd_kernel_support(
    grad_out, features, position, grad_support, frames: tl.int64, points: tl.int64, height: tl.int32, width: tl.int32,
    C: tl.constexpr, S: tl.constexpr, RADIUS: tl.constexpr, ZEROS: tl.constexpr, Y_FIRST: tl.constexpr,
    OWN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_support[s] = sum over frames (OWN: one) and p of grad_out[row, p, s] f(position[row] + offset[p])

    A program writes a tile of supports and channels of one point.
    """
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
    for t in range(first_t, stop_t):  # total: the sum over the frames before t
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
            mask = (p < P)[:, None] & (s < S)[None, :]
            at = whole_vectors(grad_out + row * P * S + p * S, s, S)
            arriving = tl.load(at, mask=mask, other=0.0)
            total = product(tl.trans(arriving), sample, total, PRECISION)
        total = tl.where(known, total, float("nan"))
    target = whole_vectors(grad_support + owner * S * C + s * C, c, C)
    tl.store(target, total, mask=(s < S)[:, None] & (c < C)[None, :])


@kernel
def local_correlation_bwd_kernel_softmax(
    weights, grad, scale: tl.float64, P: tl.constexpr, S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """grad[row, p, s] = scale w[row, p, s] (grad[row, p, s] - sum over q of w[row, q, s] grad[row, q, s])

    A program computes a tile of supports of one row, in place.
    """
    TILES_S: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    program = tl.program_id(0).to(tl.int64)
    start = program // TILES_S * P * S
    s = (program % TILES_S * BLOCK_S).to(tl.int32) + tl.arange(0, BLOCK_S)
    scale = tl.full([], scale, grad.dtype.element_ty)
    mean = tl.zeros([BLOCK_S], grad.dtype.element_ty)
    for first_p in range(0, P, BLOCK_P):  # mean: the sum over the samples before first_p
        p = first_p + tl.arange(0, BLOCK_P)
        at, mask = start + (p * S)[:, None] + s[None, :], (p < P)[:, None] & (s < S)[None, :]
        weight, arriving = tl.load(weights + at, mask=mask, other=0.0), tl.load(grad + at, mask=mask, other=0.0)
        mean += tl.sum(weight * arriving, 0)
    for first_p in range(0, P, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        at, mask = start + (p * S)[:, None] + s[None, :], (p < P)[:, None] & (s < S)[None, :]
        weight, arriving = tl.load(weights + at, mask=mask, other=0.0), tl.load(grad + at, mask=mask, other=0.0)
        tl.store(grad + at, scale * weight * (arriving - mean[None, :]), mask=mask)


def _correlate_into(
    out: Tensor, features: Tensor, support: Tensor, position: Tensor, samples: Samples, scale: float | None
) -> None:
    shapes = (features.shape, support.shape, position.shape)
    options = (samples, configs.tf32_allowed(), (False, False), scale)
    correlate, _, _ = _launches(*shapes, features.dtype, out.dtype, *options)
    correlate(aligned(features), aligned(support), aligned(position), out)


def _softmax_backward_into(grad: Tensor, weights: Tensor, samples: Samples, scale: float) -> None:
    supports = grad.shape[-1] // samples.total
    tile = configs.softmax_tile(samples.total, supports)
    programs = grad.shape[:-1].numel() * triton.cdiv(supports, tile["BLOCK_S"])
    launch(local_correlation_bwd_kernel_softmax, programs, weights, grad, scale, P=samples.total, S=supports, **tile)


def _add_gradients(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    samples: Samples,
    grad_features: Tensor | None,
    grad_support: Tensor | None,
    grad_position: Tensor | None,
) -> None:
    if grad_features is not None and torch.are_deterministic_algorithms_enabled():
        # The atomic additions of points that share cells have no fixed order; the reference has one.
        grad = grad_out.unflatten(-1, (samples.total, -1))
        grad_features += reference.backward(grad, features, support, position, samples, None, [True, False, False])[0]
        grad_features = None
    grad_out, features, support, position = [aligned(x) for x in (grad_out, features, support, position)]
    needs_grad = (grad_features is not None, grad_position is not None)
    shapes, dtypes = (features.shape, support.shape, position.shape), (features.dtype, grad_out.dtype)
    _, of_features, of_support = _launches(*shapes, *dtypes, samples, configs.tf32_allowed(), needs_grad)
    if True in needs_grad:
        slopes = None if grad_position is None else position.new_empty(position.shape)
        of_features(grad_out, features, support, position, grad_features, slopes)
        if grad_position is not None and slopes is not None:
            grad_position += slopes
    if grad_support is not None:
        sums = position.new_empty(support.shape)
        of_support(grad_out, features, position, sums)
        grad_support += sums


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    out.addmm_(left, right, beta=int(add))


@functools.lru_cache(maxsize=1024)
def _launches(
    features, support, position, dtype, dtype_of_out, samples: Samples, tf32: bool, needs_grad: tuple[bool, bool],
    scale: float | None = None,
) -> tuple[Launch, Launch, Launch]:  # fmt: skip
    """Forward, and the gradients of features and positions, and of supports, by shapes and types. `needs_grad`: which
    of features and positions have one. `scale`: forward, of the softmax."""
    height, width, channels = features[2:]
    supports = support[-2]
    tile = configs.tile(samples.total, supports, channels, dtype)
    constants = {
        "C": channels,
        "S": supports,
        "RADIUS": samples.radius,
        "ZEROS": samples.zeros,
        "Y_FIRST": samples.y_first,
        "OWN": len(support) == 5,
        "BLOCK_P": tile.samples,
        "BLOCK_S": tile.supports,
        "BLOCK_C": tile.channels,
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": 2,
    }
    numbers = (position[1], position[2], height, width)
    of_softmax = {} if scale is None else {"SOFTMAX": True, **register_limit()}
    rows = position[:3].numel()
    tiles = triton.cdiv(channels, tile.channels) * triton.cdiv(supports, tile.supports)
    return (
        Launch(
            local_correlation_fwd_kernel, rows, *numbers, scale or 0.0, **{"SOFTMAX": False, **constants, **of_softmax}
        ),
        Launch(local_correlation_bwd_kernel_features, rows, *numbers, **constants),
        Launch(local_correlation_bwd_kernel_support, support[:-2].numel() * tiles, *numbers, **constants),
    )


# Every cell is read many times, so features are made contiguous once.
_KERNELS = blocks.Kernels(aligned, _correlate_into, _softmax_backward_into, _add_gradients, _multiply_into)
forward = functools.partial(blocks.forward, _KERNELS)
backward = functools.partial(blocks.backward, _KERNELS)
linear_forward = functools.partial(blocks.linear_forward, _KERNELS)
linear_backward = functools.partial(blocks.linear_backward, _KERNELS)
