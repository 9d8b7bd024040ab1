"""Who is where, and what a pair's distance costs: shared by all Triton kernels of this room.

Both sides of the attention are numbered in blocks. A block of cells is a tile of the grid; a block of tracks is a
stretch of `order`, in which tracks that are near each other follow each other and the invisible ones come last. A
frame's scene is (order, sorted positions, number of visible tracks, entry of the track nearest to each cell, M, h, w).

Tensors are videos `[B, T, height, width, H, D]`, tracks a grid of height 1. `readable` makes every vector start on 16
bytes, so strides arrive divided by UNIT, and addresses are 64 bits wide from there on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(8)


@triton.jit
def enter(program, blocks, order, points, seen, nearest, T, H, M, h, w):
    """Scene of the program's frame; its block, batch, frame and head, and the place of (batch, frame, head)."""
    place = program // blocks
    frame = place // H
    b = frame // T
    first = frame.to(tl.int64) * M
    scene = (order + first, points + 2 * first, tl.load(seen + frame), nearest + frame.to(tl.int64) * h * w, M, h, w)
    return scene, program - place * blocks, b, frame - b * T, place - frame * H, place.to(tl.int64)


@triton.jit
def members(block, scene, GRID: tl.constexpr, BLOCK: tl.constexpr, TILE_W: tl.constexpr):
    """Row and column in the tensor and position of the members of a block; which exist, and which take part."""
    order, points, seen, _, M, h, w = scene
    lane = tl.arange(0, BLOCK)
    if GRID:
        across = tl.cdiv(w, TILE_W)
        down = block // across
        y = down * (BLOCK // TILE_W) + lane // TILE_W
        x = (block - down * across) * TILE_W + lane % TILE_W
        exists = (y < h) & (x < w)
        present = (y < tl.minimum(seen, 1) * h) & (x < w)
        ACC: tl.constexpr = points.dtype.element_ty
        return y, x, x.to(ACC) + 0.5, y.to(ACC) + 0.5, exists, present
    else:
        entry = block * BLOCK + lane
        present = entry < seen
        x = tl.load(order + entry, mask=entry < M, other=0).to(tl.int32)
        px = tl.load(points + 2 * entry, mask=present, other=0.0)
        py = tl.load(points + 2 * entry + 1, mask=present, other=0.0)
        return x * 0, x, px, py, entry < M, present


@triton.jit
def nearest_column(y, x, px, py, present, scene, SPLAT: tl.constexpr):
    """Row and column in the tensor and position of the column nearest to each row."""
    order, points, _, nearest, _, h, w = scene
    if SPLAT:
        entry = tl.load(nearest + y * w + x, mask=present, other=0)
        nx = tl.load(points + 2 * entry, mask=present, other=0.0)
        ny = tl.load(points + 2 * entry + 1, mask=present, other=0.0)
        return y * 0, tl.load(order + entry, mask=present, other=0).to(tl.int32), nx, ny
    else:
        cx = tl.minimum(tl.maximum(tl.floor(px), 0.0), (w - 1).to(px.dtype))
        cy = tl.minimum(tl.maximum(tl.floor(py), 0.0), (h - 1).to(px.dtype))
        return cy.to(tl.int32), cx.to(tl.int32), cx + 0.5, cy + 0.5


@triton.jit
def further(px, py, nx, ny, cx, cy):
    """Squared distance from p to c beyond that to the nearest column n, as a product: squares would cancel."""
    LARGEST: tl.constexpr = 1.7976931348623157e308 if px.dtype == tl.float64 else 3.4028234663852886e38
    squared = (nx - cx) * ((px - nx) + (px - cx)) + (ny - cy) * ((py - ny) + (py - cy))
    squared = tl.where(squared < LARGEST, squared, LARGEST)
    return tl.where(squared < 0, 0.0, squared)


@triton.jit
def frame_of(tensor, b, t, head):
    """Pointer and strides of one head of one frame."""
    pointer, stride_b, stride_t, stride_y, stride_x, stride_h = tensor
    first = b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
    return pointer + first * UNIT, stride_y, stride_x


@triton.jit
def contiguous(pointer, place, head, rows, width, H, D: tl.constexpr):
    """The same of a contiguous result `[B, T, rows, H, D]`, whose rows are a grid of this width."""
    first = (place - head) * rows + head
    return pointer + first * D, width.to(tl.int64) * H * (D // UNIT), H.to(tl.int64) * (D // UNIT)


@triton.jit
def vectors(frame, y, x):
    pointer, stride_y, stride_x = frame
    return pointer + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x) * UNIT


@triton.jit
def channels(vectors, present, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses and mask of a tile `[vectors, WIDTH]` of the channels from `start` on."""
    channel = start + tl.arange(0, WIDTH)[None, :]
    mask = present[:, None]
    if D % WIDTH != 0:
        mask = mask & (channel < D)
    return tl.multiple_of(vectors[:, None] + channel, (1, 16)), mask


@triton.jit
def load(vectors, present, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """That tile, zero in vectors that do not take part and beyond D."""
    addresses, mask = channels(vectors, present, start, D, WIDTH)
    return tl.load(addresses, mask=mask, other=0.0)


@triton.jit
def load_if(vectors, present, D: tl.constexpr, WIDTH: tl.constexpr, WANTED: tl.constexpr):
    """All channels, or nothing at all where they are not held."""
    if WANTED:
        return load(vectors, present, 0, D, WIDTH)
    else:
        return vectors


@triton.jit
def store(vectors, exists, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    addresses, mask = channels(vectors, exists, 0, D, WIDTH)
    tl.store(addresses, tile.to(vectors.dtype.element_ty), mask=mask)


def readable(x: Tensor) -> tuple[Tensor, list[int]]:
    """A video, and its strides in UNITs; a copy if channels are strided or vectors do not start on 16 bytes."""
    x = x if x.dim() == 6 else x.unsqueeze(2)
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    if strides[-1] != 1 or x.data_ptr() % 16 or any(stride % UNIT.value for stride in strides[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride())
    return x, [stride // UNIT.value for stride in strides[:-1]]
