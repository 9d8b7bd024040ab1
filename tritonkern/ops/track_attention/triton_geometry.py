"""Positions, pairwise distances and addresses, shared by all Triton kernels of this operation.

Both sides of the attention are numbered in blocks. A block of cells is a tile of the grid; a block of tracks is a range
of `order`, in which tracks that are near each other follow each other and the invisible ones come last. A frame's scene
is (order, sorted positions, number of visible tracks, entry of the track nearest to each cell, M, h, w).

Tensors are videos `[B, T, height, width, H, D]`, tracks a grid of height 1. Strides count UNITs of numbers; addresses
have 64 bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops import _triton
from tritonkern.ops._triton import UNIT


@triton.jit
def enter(program, blocks, order, positions, num_visible, nearest, T, H, M, h, w):
    """Scene of the program's frame; its block, batch, frame and head, and the number of (batch, frame, head)."""
    place = program // blocks
    frame = place // H
    b = frame // T
    first = frame.to(tl.int64) * M
    nearest += frame.to(tl.int64) * h * w
    scene = (order + first, positions + 2 * first, tl.load(num_visible + frame), nearest, M, h, w)
    return scene, program - place * blocks, b, frame - b * T, place - frame * H, place.to(tl.int64)


@triton.jit
def members(block, scene, GRID: tl.constexpr, BLOCK: tl.constexpr, TILE_W: tl.constexpr):
    """Row and column in the tensor and position of the members of a block; which exist, and which take part."""
    order, positions, num_visible, _, M, h, w = scene
    lane = tl.arange(0, BLOCK)
    if GRID:
        across = tl.cdiv(w, TILE_W)
        down = block // across
        y = down * (BLOCK // TILE_W) + lane // TILE_W
        x = (block - down * across) * TILE_W + lane % TILE_W
        in_range = (y < h) & (x < w)
        visible = (y < tl.minimum(num_visible, 1) * h) & (x < w)
        ACC: tl.constexpr = positions.dtype.element_ty
        return y, x, x.to(ACC) + 0.5, y.to(ACC) + 0.5, in_range, visible
    else:
        entry = block * BLOCK + lane
        visible = entry < num_visible
        x = tl.load(order + entry, mask=entry < M, other=0).to(tl.int32)
        px = tl.load(positions + 2 * entry, mask=visible, other=0.0)
        py = tl.load(positions + 2 * entry + 1, mask=visible, other=0.0)
        return x * 0, x, px, py, entry < M, visible


@triton.jit
def nearest_column(y, x, px, py, visible, scene, SPLAT: tl.constexpr):
    """Row and column in the tensor and position of the column nearest to each row."""
    order, positions, _, nearest, _, h, w = scene
    if SPLAT:
        entry = tl.load(nearest + y * w + x, mask=visible, other=0)
        nx = tl.load(positions + 2 * entry, mask=visible, other=0.0)
        ny = tl.load(positions + 2 * entry + 1, mask=visible, other=0.0)
        return y * 0, tl.load(order + entry, mask=visible, other=0).to(tl.int32), nx, ny
    else:
        cx = tl.minimum(tl.maximum(tl.floor(px), 0.0), (w - 1).to(px.dtype))
        cy = tl.minimum(tl.maximum(tl.floor(py), 0.0), (h - 1).to(px.dtype))
        return cy.to(tl.int32), cx.to(tl.int32), cx + 0.5, cy + 0.5


@triton.jit
def relative_distance(px, py, nx, ny, cx, cy):
    """|p - c|^2 - |p - n|^2 with n the nearest column, in squared cells; a product, because squares would cancel."""
    return tl.maximum((nx - cx) * ((px - nx) + (px - cx)) + (ny - cy) * ((py - ny) + (py - cy)), 0.0)


@triton.jit
def frame_of(tensor, b, t, head):
    """Pointer and strides of one head of one frame."""
    pointer, stride_b, stride_t, stride_y, stride_x, stride_h = tensor
    first = b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
    return pointer + first * UNIT, stride_y, stride_x


@triton.jit
def contiguous(pointer, place, head, y, x, scene, GRID: tl.constexpr, H, D: tl.constexpr):
    """Addresses of vectors of a contiguous tensor of the grid or of the tracks, whose y is 0."""
    _, _, _, _, M, h, w = scene
    first = (place - head) * (h * w if GRID else M) + head
    return pointer + (first + (y * w + x).to(tl.int64) * H) * D


@triton.jit
def vectors(frame, y, x):
    pointer, stride_y, stride_x = frame
    return pointer + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x) * UNIT


@triton.jit
def channels(vectors, mask, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses and mask of a tile `[vectors, WIDTH]` of the channels from `start` on."""
    channel = start + tl.arange(0, WIDTH)[None, :]
    mask = mask[:, None]
    if D % WIDTH != 0:
        mask = mask & (channel < D)
    return tl.multiple_of(vectors[:, None] + channel, (1, 16)), mask


@triton.jit
def load(vectors, visible, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """That tile, zero in vectors that do not take part and beyond D."""
    addresses, mask = channels(vectors, visible, start, D, WIDTH)
    return tl.load(addresses, mask=mask, other=0.0)


@triton.jit
def load_if(vectors, visible, D: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr):
    """All channels, or the addresses where tiles are not held."""
    if HELD:
        return load(vectors, visible, 0, D, WIDTH)
    else:
        return vectors


@triton.jit
def store(vectors, in_range, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    addresses, mask = channels(vectors, in_range, 0, D, WIDTH)
    tl.store(addresses, tile.to(vectors.dtype.element_ty), mask=mask)


def readable(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A video that kernels can read, and its strides in UNITs."""
    return _triton.readable(x if x.dim() == 6 else x.unsqueeze(2))
