"""Triton kernels of `soft_argmax_2d`, and their launchers.

A program reads one frame of the cost volume once, and its disc again.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._triton import UNIT, Launch, kernel, starts_on_16_bytes
from tritonkern.ops.correlation_soft_argmax import configs
from tritonkern.ops.correlation_soft_argmax.op import Outputs2d, allocate_2d
from tritonkern.ops.correlation_soft_argmax.triton_common import disc, distance_squared


@triton.jit
def _tile(y0, x0, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows `[TILE_H, 1]` and columns `[1, TILE_W]`."""
    return y0 + tl.arange(0, TILE_H)[:, None], x0 + tl.arange(0, TILE_W)[None, :]


@triton.jit
def _addresses(frame, y, x, stride_y, stride_x, ALIGNED: tl.constexpr):
    """ALIGNED: numbers of a row are adjacent and rows start on 16 bytes, so that eight are loaded at a time."""
    if ALIGNED:
        return tl.multiple_of(frame + y.to(tl.int64) * stride_y + x, (1, 16))
    else:
        return frame + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


# maximum = max over the cells i of cost_i, best = the first i that has it, or the first NaN
# weight  = sum over the disc of e^(temperature (cost_i - maximum)) =: sum of w_i
# points  = best + 0.5 + sum over the disc of w_i (cell_i - best) / weight
@kernel
def soft_argmax_2d_fwd_kernel(
    cost, points, maximum, best, weight,
    h: tl.int32, w: tl.int32, reach_y: tl.int32, reach_x: tl.int32, limit: tl.uint32, temperature: tl.float64,
    stride_frame: tl.int64, stride_y: tl.int64, stride_x: tl.int64,
    ALIGNED: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, DISC_H: tl.constexpr, DISC_W: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = maximum.dtype.element_ty
    frame = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        w = w // 8 * 8  # says that it is a multiple of eight, so that a vector exists as a whole or not at all
    cost += frame * stride_frame
    temperature = tl.full([], temperature, ACC)
    # Every place of the tile keeps the best of its own cells; the best of all places is found after the loops.
    high = tl.full([TILE_H, TILE_W], float("-inf"), ACC)
    high_cell = tl.zeros([TILE_H, TILE_W], tl.int32) + h * w
    for y0 in tl.range(0, h, TILE_H, num_stages=1):
        for x0 in tl.range(0, w, TILE_W, num_stages=1):  # high, high_cell: of the tiles before this one
            y, x = _tile(y0, x0, TILE_H, TILE_W)
            exists = (y < h) & (x < w)
            at = _addresses(cost, y, x, stride_y, stride_x, ALIGNED)
            value = tl.load(at, mask=exists, other=0.0).to(ACC)
            # Cells come in order, so that the first of equals stays; a NaN is larger than every number.
            better = (value > high) | (high_cell == h * w) | ((value != value) & (high == high))
            high = tl.where(exists & better, value, high)
            high_cell = tl.where(exists & better, y * w + x, high_cell)
    nan = tl.min(tl.reshape(tl.where(high != high, high_cell, h * w), [TILE_H * TILE_W]), 0)
    highest = tl.max(tl.reshape(tl.where(high != high, float("-inf"), high), [TILE_H * TILE_W]), 0)
    centre = tl.min(tl.reshape(tl.where(high == highest, high_cell, h * w), [TILE_H * TILE_W]), 0)
    centre = tl.where(nan < h * w, nan, centre)
    highest = tl.where(nan < h * w, float("nan"), highest)

    row = centre // w
    column = centre - row * w
    sums = tl.zeros([DISC_H, DISC_W], ACC)
    across = tl.zeros([DISC_H, DISC_W], ACC)
    down = tl.zeros([DISC_H, DISC_W], ACC)
    left = tl.maximum(column - reach_x, 0)
    right = tl.minimum(column + reach_x, w - 1) + 1
    for y0 in tl.range(tl.maximum(row - reach_y, 0), tl.minimum(row + reach_y, h - 1) + 1, DISC_H, num_stages=1):
        for x0 in tl.range(left, right, DISC_W, num_stages=1):  # sums, across, down: of the tiles before this one
            y, x = _tile(y0, x0, DISC_H, DISC_W)
            inside = (distance_squared(y, x, row, column) < limit) & (y < h) & (x < w)
            value = tl.load(cost + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x, mask=inside, other=0.0)
            here = tl.where(inside, tl.exp(temperature * (value.to(ACC) - highest)), 0.0)
            sums += here
            across += here * (x - column).to(ACC)
            down += here * (y - row).to(ACC)
    # NaN where the maximum is not finite
    total = tl.sum(tl.reshape(sums, [DISC_H * DISC_W]), 0) + highest * 0.0
    x = tl.sum(tl.reshape(across, [DISC_H * DISC_W]), 0) / total
    y = tl.sum(tl.reshape(down, [DISC_H * DISC_W]), 0) / total
    tl.store(points + frame * 2, column.to(ACC) + 0.5 + x)
    tl.store(points + frame * 2 + 1, row.to(ACC) + 0.5 + y)
    tl.store(maximum + frame, highest)
    tl.store(best + frame, centre)
    tl.store(weight + frame, total)


# grad_cost_i = temperature w_i / weight (centre_i - point) . grad_point in the disc, 0 outside; w_i as in the forward
@kernel
def soft_argmax_2d_bwd_kernel(
    grad_points, cost, points, maximum, best, weight, grad_cost,
    h: tl.int32, w: tl.int32, reach_y: tl.int32, limit: tl.uint32, temperature: tl.float64,
    stride_frame: tl.int64, stride_y: tl.int64, stride_x: tl.int64,
    ALIGNED: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a frame, zeros and disc, in one pass; reads the disc's rows alone of the cost volume."""
    ACC: tl.constexpr = maximum.dtype.element_ty
    frame = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        w = w // 8 * 8  # says that it is a multiple of eight, so that a vector exists as a whole or not at all
    cost += frame * stride_frame
    grad_cost += frame * h * w
    temperature = tl.full([], temperature, ACC)
    highest = tl.load(maximum + frame)
    factor = temperature / tl.load(weight + frame)
    point_x = tl.load(points + frame * 2)
    point_y = tl.load(points + frame * 2 + 1)
    grad_x = tl.load(grad_points + frame * 2)
    grad_y = tl.load(grad_points + frame * 2 + 1)
    centre = tl.load(best + frame)
    row = centre // w
    column = centre - row * w
    for y0 in tl.range(0, h, TILE_H, num_stages=1):
        for x0 in tl.range(0, w, TILE_W, num_stages=1):
            y, x = _tile(y0, x0, TILE_H, TILE_W)
            exists = (y < h) & (x < w)
            inside = (distance_squared(y, x, row, column) < limit) & exists
            # Whole rows: a vector in which the disc begins or ends cannot be loaded in one piece otherwise.
            at = _addresses(cost, y, x, stride_y, stride_x, ALIGNED)
            value = tl.load(at, mask=exists & (tl.abs(y - row) <= reach_y), other=0.0)
            here = tl.exp(temperature * (value.to(ACC) - highest)) * factor
            grad = here * ((x.to(ACC) + 0.5 - point_x) * grad_x + (y.to(ACC) + 0.5 - point_y) * grad_y)
            at = _addresses(grad_cost, y, x, w, 1, ALIGNED)
            tl.store(at, tl.where(inside, grad, 0.0).to(grad_cost.dtype.element_ty), mask=exists)


def soft_argmax_2d_forward(cost: Tensor, temperature: float, radius: float) -> Outputs2d:
    """cost `[..., h, w]`; see `op.Outputs2d`."""
    outputs = allocate_2d(cost)
    cost, launch, _ = _soft_argmax_2d(cost, temperature, radius)
    launch(cost, *outputs)
    return outputs


def soft_argmax_2d_backward(
    grad_points: Tensor, cost: Tensor, saved: Outputs2d, temperature: float, radius: float
) -> Tensor:
    """Gradient of the cost volume, zero outside of the disc."""
    grad_cost = cost.new_empty(cost.shape)
    cost, _, launch = _soft_argmax_2d(cost, temperature, radius)
    launch(grad_points.contiguous(), cost, *[x.contiguous() for x in saved], grad_cost)
    return grad_cost


def _soft_argmax_2d(cost: Tensor, temperature: float, radius: float) -> tuple[Tensor, Launch, Launch]:
    """`[frames, h, w]`, forward and backward."""
    h, w = cost.shape[-2:]
    cost = cost.reshape(-1, h, w)
    launches = _soft_argmax_2d_launches(
        cost.shape, cost.dtype, cost.stride(), starts_on_16_bytes(cost), temperature, radius
    )
    return cost, *launches


@functools.lru_cache(maxsize=1024)
def _soft_argmax_2d_launches(
    shape, dtype, strides, starts_aligned: bool, temperature: float, radius: float
) -> tuple[Launch, Launch]:
    frames, h, w = shape
    limit, reach = disc(radius, h, w)
    # Whether every row starts on 16 bytes and holds whole vectors of eight adjacent numbers.
    aligned = starts_aligned and strides[2] == 1 and not (strides[0] | strides[1] | w) % UNIT.value
    constants = dict(ALIGNED=aligned, **configs.SOFT_ARGMAX_TILES)
    forward = Launch(
        soft_argmax_2d_fwd_kernel, frames, h, w, *reach, limit, temperature, *strides,
        **constants, **configs.DISC_TILES,
    )  # fmt: skip
    backward = Launch(soft_argmax_2d_bwd_kernel, frames, h, w, reach[0], limit, temperature, *strides, **constants)
    return forward, backward
