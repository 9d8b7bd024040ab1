"""Which blocks of columns each block of rows visits: the proof of README.md, with one K for each block of columns.

Row i skips a block if, with K the largest norm of the block's keys and d2 the squared distance from the row to the box
around its columns, scale * query . key of each of its columns cannot make up for the distance:

    |scale| |query[i]| K - scale * query[i] . key[near] + ln(8 n / eps)  <  precision * (d2 - d2[i, near])

The score of the nearest column bounds the largest one from below, so a column that is skipped weighs less than
eps / (8 n) of it. A block of rows visits what any of its rows has to. Anything that is NaN or infinite fails the
comparison, and is visited.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops.track_attention import configs
from tritonkern.ops.track_attention import triton_geometry as geometry

# Left to itself Triton compiles again whenever an argument becomes 1 or a multiple of 16. The ranges count every
# argument but the constants at the end.


@triton.jit(do_not_specialize=range(7))
def order_kernel(
    tracks, visible, sort_key, total: tl.int64, h: tl.int32, w: tl.int32, band: tl.float64, BLOCK: tl.constexpr
):
    """Where a track stands on a way through the frame, band by band, to and fro; invisible ones at its end."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < total
    seen = tl.load(visible + at, mask=exists, other=0) != 0
    x = tl.load(tracks + 2 * at, mask=seen, other=0.0).to(tl.float32)
    y = tl.load(tracks + 2 * at + 1, mask=seen, other=0.0).to(tl.float32)
    x = tl.minimum(tl.maximum(x, 0.0), w.to(tl.float32))
    y = tl.minimum(tl.maximum(y, 0.0), h.to(tl.float32))
    row = tl.floor(y / tl.full([], band, tl.float32))
    back = row - 2 * tl.floor(row * 0.5) > 0
    place = row * w + tl.where(back, w - x, x)
    tl.store(sort_key + at, tl.where(seen, place, float("inf")), mask=exists)


@triton.jit(do_not_specialize=range(7))
def nearest_kernel(
    points, seen, nearest, M: tl.int32, w: tl.int32, cells: tl.int32, blocks: tl.int32,
    BLOCK: tl.constexpr, TRACKS: tl.constexpr,
):  # fmt: skip
    """Entry of the visible track nearest to each cell, the first of several; 0 if there is none."""
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    ACC: tl.constexpr = points.dtype.element_ty
    px = (cell % w).to(ACC) + 0.5
    py = (cell // w).to(ACC) + 0.5
    count = tl.load(seen + frame)
    points += 2 * frame * M
    best = tl.full([BLOCK], float("inf"), ACC)
    chosen = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, count, TRACKS):
        entry = first + tl.arange(0, TRACKS)
        present = entry < count
        dx = px[:, None] - tl.load(points + 2 * entry, mask=present, other=0.0)[None, :]
        dy = py[:, None] - tl.load(points + 2 * entry + 1, mask=present, other=0.0)[None, :]
        squared = tl.where(present[None, :], dx * dx + dy * dy, float("inf"))
        least = tl.min(squared, 1)
        which = tl.min(tl.where(squared == least[:, None], entry[None, :], 2147483647), 1)
        chosen = tl.where(least < best, which, chosen)
        best = tl.minimum(best, least)
    tl.store(nearest + frame * cells + cell, chosen, mask=cell < cells)


@triton.jit
def _norm(squared, D: tl.constexpr, EPS: tl.constexpr, SMALLEST: tl.constexpr):
    """No less than the norm whose square was computed as `squared`, in which small squares are lost."""
    norm = tl.sqrt(squared * (1 + 2 * D * EPS) + D * SMALLEST)
    return tl.where(norm == norm, norm, float("inf"))


@triton.jit(do_not_specialize=range(18))
def columns_kernel(
    key, boxes, norms, order, points, seen, nearest,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, column_blocks: tl.int32,
    stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64, stride_x: tl.int64, stride_h: tl.int64,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr, TILE_W: tl.constexpr,
    EPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """The box around each block of columns (left, right, top, bottom) and the largest norm of its keys."""
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), column_blocks, order, points, seen, nearest, T, H, M, h, w
    )
    y, x, px, py, _, present = geometry.members(block, scene, not SPLAT, COLUMNS, TILE_W)
    tensor = (key, stride_b, stride_t, stride_y, stride_x, stride_h)
    rows = geometry.vectors(geometry.frame_of(tensor, b, t, head), y, x)
    ACC: tl.constexpr = points.dtype.element_ty
    squares = tl.zeros([COLUMNS], ACC)
    for start in tl.range(0, D, BLOCK_C):
        tile = geometry.load(rows, present, start, D, BLOCK_C).to(ACC)
        squares += tl.sum(tile * tile, 1)
    norm = tl.where(present, _norm(squares, D, EPS, SMALLEST), 0.0)
    tl.store(norms + place * column_blocks + block, tl.max(norm, 0))
    box = boxes + (place * column_blocks + block) * 4
    tl.store(box, tl.min(tl.where(present, px, float("inf")), 0))
    tl.store(box + 1, tl.max(tl.where(present, px, float("-inf")), 0))
    tl.store(box + 2, tl.min(tl.where(present, py, float("inf")), 0))
    tl.store(box + 3, tl.max(tl.where(present, py, float("-inf")), 0))


@triton.jit(do_not_specialize=range(29))
def visits_kernel(
    query, key, boxes, norms, visits, order, points, seen, nearest, precision,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64, negligible: tl.float64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, TILE_W: tl.constexpr,
    EPS: tl.constexpr, SMALLEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Whether a block of rows visits each block of columns."""
    ACC: tl.constexpr = points.dtype.element_ty
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), row_blocks, order, points, seen, nearest, T, H, M, h, w
    )
    y, x, px, py, _, present = geometry.members(block, scene, SPLAT, ROWS, TILE_W)
    ky, kx, nx, ny = geometry.nearest_column(y, x, px, py, present, scene, SPLAT)
    tensor = (query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh)
    q_rows = geometry.vectors(geometry.frame_of(tensor, b, t, head), y, x)
    tensor = (key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh)
    k_rows = geometry.vectors(geometry.frame_of(tensor, b, t, head), ky, kx)
    squares = tl.zeros([ROWS], ACC)
    product = tl.zeros([ROWS], ACC)
    for start in tl.range(0, D, BLOCK_C):
        q = geometry.load(q_rows, present, start, D, BLOCK_C).to(ACC)
        k = geometry.load(k_rows, present, start, D, BLOCK_C).to(ACC)
        squares += tl.sum(q * q, 1)
        product += tl.sum(q * k, 1)
    scale = tl.full([], scale, ACC)
    # Rounding of the products, and of the few operations below.
    length = tl.abs(scale) * _norm(squares, D, EPS, SMALLEST) * (1 + (2 * D + 64) * EPS)
    at_least = scale * product - tl.full([], negligible, ACC)
    near = ((px - nx) * (px - nx) + (py - ny) * (py - ny)) * (1 + 16 * EPS)
    steepness = tl.load(precision)
    for first in tl.range(0, column_blocks, CHUNK):
        other = first + tl.arange(0, CHUNK)
        exists = other < column_blocks
        box = boxes + (place * column_blocks + other) * 4
        across = tl.maximum(
            tl.load(box, mask=exists, other=0.0)[None, :] - px[:, None],
            px[:, None] - tl.load(box + 1, mask=exists, other=0.0)[None, :],
        )
        down = tl.maximum(
            tl.load(box + 2, mask=exists, other=0.0)[None, :] - py[:, None],
            py[:, None] - tl.load(box + 3, mask=exists, other=0.0)[None, :],
        )
        across, down = tl.maximum(across, 0.0), tl.maximum(down, 0.0)
        squared = (across * across + down * down) * (1 - 16 * EPS)
        norm = tl.load(norms + place * column_blocks + other, mask=exists, other=0.0)
        far = steepness * (squared - near[:, None]) > length[:, None] * norm[None, :] - at_least[:, None]
        visit = tl.max(tl.where(far, 0, present.to(tl.int32)[:, None]), 0)
        tl.store(visits + (place * row_blocks + block) * column_blocks + other, visit.to(tl.uint8), mask=exists)


@triton.jit(do_not_specialize=range(4))
def lists_kernel(visits, lists, counts, others: tl.int32, CHUNK: tl.constexpr):
    """The numbers of the blocks that a block meets, in order, and how many there are."""
    block = tl.program_id(0).to(tl.int64)
    visits += block * others
    lists += block * others
    count = 0
    for first in tl.range(0, others, CHUNK):
        other = first + tl.arange(0, CHUNK)
        visit = tl.load(visits + other, mask=other < others, other=0).to(tl.int32)
        tl.store(lists + count + tl.cumsum(visit, 0) - visit, other, mask=visit != 0)
        count += tl.sum(visit, 0)
    tl.store(counts + block, count)


class Scene(NamedTuple):
    """What the kernels ask about positions, by frame (batch and time); see triton_geometry."""

    order: Tensor
    points: Tensor
    seen: Tensor
    nearest: Tensor
    frames: int
    sizes: tuple[int, int, int, int, int]  # T, H, M, h, w
    splat: bool

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.order, self.points, self.seen, self.nearest

    def blocks(self, tiles: configs.Tiles) -> tuple[int, int]:
        """Blocks of rows and of columns."""
        _, _, M, h, w = self.sizes
        width = configs.tile_width(tiles.cells)
        of_cells = triton.cdiv(h, tiles.cells // width) * triton.cdiv(w, width)
        of_tracks = triton.cdiv(M, tiles.tracks)
        return (of_cells, of_tracks) if self.splat else (of_tracks, of_cells)


def scene(tracks: Tensor, visible: Tensor, heads: int, grid: Sequence[int], splat: bool) -> Scene:
    """Sort the tracks `[B, T, M, 2]`, and find each cell's nearest one where cells are rows."""
    B, T, M, _ = tracks.shape
    frames, (h, w) = B * T, grid
    tracks, visible = tracks.contiguous(), visible.contiguous()
    sort_key = tracks.new_empty((frames, M), dtype=torch.float32)
    # So high that a block of evenly spread tracks is about as wide.
    band = max(1.0, math.sqrt(configs.GROUP * h * w / M))
    order_kernel[(triton.cdiv(frames * M, 256),)](
        tracks, visible.view(torch.uint8), sort_key, frames * M, h, w, band, BLOCK=256
    )
    order = sort_key.sort(dim=-1, stable=True).indices
    points = tracks.view(frames, M, 2).gather(1, order[..., None].expand(-1, -1, 2))
    seen = visible.view(frames, M).sum(-1, dtype=torch.int32)
    nearest = order.new_empty((frames, h * w) if splat else 0, dtype=torch.int32)
    if splat:
        block = 256 // points.dtype.itemsize
        blocks = triton.cdiv(h * w, block)
        nearest_kernel[(frames * blocks,)](points, seen, nearest, M, w, h * w, blocks, BLOCK=block, TRACKS=block)
    return Scene(order, points, seen, nearest, frames, (T, heads, M, h, w), splat)


def visits(
    query: Tensor,
    key: Tensor,
    q_strides: list[int],
    k_strides: list[int],
    scene: Scene,
    precision: Tensor,
    scale: float,
    eps: float,
    tiles: configs.Tiles,
) -> Tensor:
    """Which blocks meet, `[B * T * H, row blocks, column blocks]` of uint8; all of them if `eps` is 0."""
    heads, D = query.shape[-2:]
    M, h, w = scene.sizes[2:]
    row_blocks, column_blocks = scene.blocks(tiles)
    rows, columns = (tiles.cells, tiles.tracks) if scene.splat else (tiles.tracks, tiles.cells)
    places = scene.frames * heads
    result = query.new_empty((places, row_blocks, column_blocks), dtype=torch.uint8)
    boxes = scene.points.new_empty((places, column_blocks, 4))
    norms = scene.points.new_empty((places, column_blocks))
    number = torch.finfo(scene.points.dtype)
    constants = dict(
        SPLAT=scene.splat, D=D, BLOCK_C=min(32, configs.block_d(D)), TILE_W=configs.tile_width(tiles.cells),
        EPS=number.eps, SMALLEST=number.tiny,
    )  # fmt: skip
    columns_kernel[(places * column_blocks,)](
        key, boxes, norms, *scene.arguments(), *scene.sizes, column_blocks, *k_strides, COLUMNS=columns, **constants
    )
    negligible = math.log(8 * (M if scene.splat else h * w) / eps) * 1.0001 if eps else math.inf
    visits_kernel[(places * row_blocks,)](
        query, key, boxes, norms, result, *scene.arguments(), precision, *scene.sizes, row_blocks, column_blocks,
        scale, negligible, *q_strides, *k_strides, ROWS=rows, CHUNK=32, **constants,
    )  # fmt: skip
    return result


def lists(visits: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of axis 1 the numbers of the blocks of axis 2 that it meets, those first, and how many.

    Not by sorting: in float64, where a block has few members, 8 bytes for a number were most of the memory.
    """
    numbers, counts = (visits.new_empty(shape, dtype=torch.int32) for shape in (visits.shape, visits.shape[:2]))
    lists_kernel[(counts.numel(),)](visits, numbers, counts, visits.shape[2], CHUNK=128, num_warps=1)
    return numbers, counts
