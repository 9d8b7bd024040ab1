"""Which blocks of columns each block of rows visits: the bound of README.md, with one K for each block of columns.

Row i skips a block if, with K the largest norm of the block's keys and d2 the squared distance from the row to the box
around its columns, scale * query . key of each of its columns cannot make up for the distance:

    |scale| |query[i]| K - scale * query[i] . key[near] + ln(8 n / eps)  <  inverse_variance * (d2 - d2[i, near])

The score of the nearest column bounds the largest one from below, so a column that is skipped weighs less than
eps / (8 n) of it. A block of rows visits every block that one of its rows must visit. A NaN or an infinity fails the
comparison, so that its block is visited.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._triton import block_size, kernel, launch
from tritonkern.ops.track_attention import configs
from tritonkern.ops.track_attention import triton_geometry as geometry
from tritonkern.ops.track_attention.op import Points


@kernel
def track_attention_kernel_order(
    tracks, visible, sort_key, total: tl.int64, h: tl.int32, w: tl.int32, band: tl.float64, BLOCK: tl.constexpr
):
    """Sort key of each track: its distance along a serpentine path through bands of `band` cells; infinity for an
    invisible track."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = at < total
    is_visible = tl.load(visible + at, mask=in_range, other=0) != 0
    x = tl.load(tracks + 2 * at, mask=is_visible, other=0.0).to(tl.float32)
    y = tl.load(tracks + 2 * at + 1, mask=is_visible, other=0.0).to(tl.float32)
    x = tl.minimum(tl.maximum(x, 0.0), w.to(tl.float32))
    y = tl.minimum(tl.maximum(y, 0.0), h.to(tl.float32))
    row = tl.floor(y / tl.full([], band, tl.float32))
    backwards = row - 2 * tl.floor(row * 0.5) > 0
    place = row * w + tl.where(backwards, w - x, x)
    tl.store(sort_key + at, tl.where(is_visible, place, float("inf")), mask=in_range)


@kernel
def track_attention_kernel_nearest(
    positions, num_visible, nearest, M: tl.int32, w: tl.int32, cells: tl.int32, blocks: tl.int32,
    BLOCK: tl.constexpr, TRACKS: tl.constexpr,
):  # fmt: skip
    """Entry of the visible track nearest to each cell, the first of several; 0 if there is none."""
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    ACC: tl.constexpr = positions.dtype.element_ty
    px = (cell % w).to(ACC) + 0.5
    py = (cell // w).to(ACC) + 0.5
    count = tl.load(num_visible + frame)
    positions += 2 * frame * M
    best = tl.full([BLOCK], float("inf"), ACC)
    chosen = tl.zeros([BLOCK], tl.int32)
    # `chosen` is the first of the nearest entries before `first`, `best` its squared distance.
    for first in tl.range(0, count, TRACKS):
        entry = first + tl.arange(0, TRACKS)
        visible = entry < count
        dx = px[:, None] - tl.load(positions + 2 * entry, mask=visible, other=0.0)[None, :]
        dy = py[:, None] - tl.load(positions + 2 * entry + 1, mask=visible, other=0.0)[None, :]
        squared = tl.where(visible[None, :], dx * dx + dy * dy, float("inf"))
        least = tl.min(squared, 1)
        which = tl.min(tl.where(squared == least[:, None], entry[None, :], 2147483647), 1)
        chosen = tl.where(least < best, which, chosen)
        best = tl.minimum(best, least)
    tl.store(nearest + frame * cells + cell, chosen, mask=cell < cells)


@triton.jit
def _norm(squared, D: tl.constexpr, EPS: tl.constexpr, SMALLEST: tl.constexpr):
    """At least the norm whose square was computed as `squared`, which loses small squares. NaN becomes infinity."""
    norm = tl.sqrt(squared * (1 + 2 * D * EPS) + D * SMALLEST)
    return tl.where(norm == norm, norm, float("inf"))


@kernel
def track_attention_kernel_columns(
    key, boxes, norms, order, positions, num_visible, nearest,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, column_blocks: tl.int32,
    stride_b: tl.int64, stride_t: tl.int64, stride_y: tl.int64, stride_x: tl.int64, stride_h: tl.int64,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr, TILE_W: tl.constexpr,
    EPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """The box around each block of columns (left, right, top, bottom, in cells) and the largest norm of its keys."""
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), column_blocks, order, positions, num_visible, nearest, T, H, M, h, w
    )
    y, x, px, py, _, visible = geometry.members(block, scene, not SPLAT, COLUMNS, TILE_W)
    tensor = (key, stride_b, stride_t, stride_y, stride_x, stride_h)
    rows = geometry.vectors(geometry.frame_of(tensor, b, t, head), y, x)
    ACC: tl.constexpr = positions.dtype.element_ty
    squares = tl.zeros([COLUMNS], ACC)
    # `squares` is the sum over the channels before `start`.
    for start in tl.range(0, D, BLOCK_C):
        tile = geometry.load(rows, visible, start, D, BLOCK_C).to(ACC)
        squares += tl.sum(tile * tile, 1)
    norm = tl.where(visible, _norm(squares, D, EPS, SMALLEST), 0.0)
    tl.store(norms + place * column_blocks + block, tl.max(norm, 0))
    box = boxes + (place * column_blocks + block) * 4
    tl.store(box, tl.min(tl.where(visible, px, float("inf")), 0))
    tl.store(box + 1, tl.max(tl.where(visible, px, float("-inf")), 0))
    tl.store(box + 2, tl.min(tl.where(visible, py, float("inf")), 0))
    tl.store(box + 3, tl.max(tl.where(visible, py, float("-inf")), 0))


@kernel
def track_attention_kernel_visits(
    query, key, boxes, norms, visits, order, positions, num_visible, nearest, inverse_variance,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64, negligible: tl.float64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, TILE_W: tl.constexpr,
    EPS: tl.constexpr, SMALLEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Whether a block of rows visits each block of columns: the comparison at the top of this file."""
    ACC: tl.constexpr = positions.dtype.element_ty
    scene, block, b, t, head, place = geometry.enter(
        tl.program_id(0), row_blocks, order, positions, num_visible, nearest, T, H, M, h, w
    )
    y, x, px, py, _, visible = geometry.members(block, scene, SPLAT, ROWS, TILE_W)
    ky, kx, nx, ny = geometry.nearest_column(y, x, px, py, visible, scene, SPLAT)
    tensor = (query, stride_qb, stride_qt, stride_qy, stride_qx, stride_qh)
    q_rows = geometry.vectors(geometry.frame_of(tensor, b, t, head), y, x)
    tensor = (key, stride_kb, stride_kt, stride_ky, stride_kx, stride_kh)
    k_rows = geometry.vectors(geometry.frame_of(tensor, b, t, head), ky, kx)
    squares = tl.zeros([ROWS], ACC)
    product = tl.zeros([ROWS], ACC)
    # Sums over the channels before `start`: |query|^2, and query . key of the nearest column.
    for start in tl.range(0, D, BLOCK_C):
        q = geometry.load(q_rows, visible, start, D, BLOCK_C).to(ACC)
        k = geometry.load(k_rows, visible, start, D, BLOCK_C).to(ACC)
        squares += tl.sum(q * q, 1)
        product += tl.sum(q * k, 1)
    scale = tl.full([], scale, ACC)
    # Factors 1 + n * EPS cover the rounding of the products and of the few operations below.
    length = tl.abs(scale) * _norm(squares, D, EPS, SMALLEST) * (1 + (2 * D + 64) * EPS)
    at_least = scale * product - tl.full([], negligible, ACC)
    near = ((px - nx) * (px - nx) + (py - ny) * (py - ny)) * (1 + 16 * EPS)
    inverse_variance = tl.load(inverse_variance)
    # Blocks of columns before `first` have their entries in `visits`.
    for first in tl.range(0, column_blocks, CHUNK):
        other = first + tl.arange(0, CHUNK)
        in_range = other < column_blocks
        box = boxes + (place * column_blocks + other) * 4
        across = tl.maximum(
            tl.load(box, mask=in_range, other=0.0)[None, :] - px[:, None],
            px[:, None] - tl.load(box + 1, mask=in_range, other=0.0)[None, :],
        )
        down = tl.maximum(
            tl.load(box + 2, mask=in_range, other=0.0)[None, :] - py[:, None],
            py[:, None] - tl.load(box + 3, mask=in_range, other=0.0)[None, :],
        )
        across, down = tl.maximum(across, 0.0), tl.maximum(down, 0.0)
        squared = (across * across + down * down) * (1 - 16 * EPS)
        norm = tl.load(norms + place * column_blocks + other, mask=in_range, other=0.0)
        far = inverse_variance * (squared - near[:, None]) > length[:, None] * norm[None, :] - at_least[:, None]
        visit = tl.max(tl.where(far, 0, visible.to(tl.int32)[:, None]), 0)
        tl.store(visits + (place * row_blocks + block) * column_blocks + other, visit.to(tl.uint8), mask=in_range)


@kernel
def track_attention_kernel_lists(visits, lists, counts, others: tl.int32, CHUNK: tl.constexpr):
    """The numbers of the blocks that a block meets, in order, and how many there are."""
    block = tl.program_id(0).to(tl.int64)
    visits += block * others
    lists += block * others
    count = 0
    # `count` blocks before `first` are listed.
    for first in tl.range(0, others, CHUNK):
        other = first + tl.arange(0, CHUNK)
        visit = tl.load(visits + other, mask=other < others, other=0).to(tl.int32)
        tl.store(lists + count + tl.cumsum(visit, 0) - visit, other, mask=visit != 0)
        count += tl.sum(visit, 0)
    tl.store(counts + block, count)


class Scene(NamedTuple):
    """What the kernels read about positions, per frame (batch and time); see triton_geometry."""

    order: Tensor
    positions: Tensor
    num_visible: Tensor
    nearest: Tensor
    inverse_variance: Tensor
    frames: int
    sizes: tuple[int, int, int, int, int]  # T, H, M, h, w
    splat: bool

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.order, self.positions, self.num_visible, self.nearest

    def blocks(self, tiles: configs.Tiles) -> tuple[int, int]:
        """Blocks of rows and of columns."""
        _, _, M, h, w = self.sizes
        width = configs.tile_width(tiles.cells)
        of_cells = triton.cdiv(h, tiles.cells // width) * triton.cdiv(w, width)
        of_tracks = triton.cdiv(M, tiles.tracks)
        return (of_cells, of_tracks) if self.splat else (of_tracks, of_cells)


def scene(points: Points, heads: int, grid: Sequence[int], splat: bool) -> Scene:
    """Sort the tracks `[B, T, M, 2]`, and find each cell's nearest one where cells are rows."""
    tracks, visible = points.placed()
    B, T, M, _ = tracks.shape
    frames, (h, w) = B * T, grid
    sort_key = tracks.new_empty((frames, M), dtype=torch.float32)
    # The height at which a block of evenly spread tracks is about a square.
    band = max(1.0, math.sqrt(configs.GROUP * h * w / M))
    order_programs = triton.cdiv(frames * M, 256)
    launch(
        track_attention_kernel_order, order_programs, tracks, visible.view(torch.uint8), sort_key, frames * M, h, w,
        band, BLOCK=256,
    )  # fmt: skip
    order = sort_key.sort(dim=-1, stable=True).indices
    positions = tracks.view(frames, M, 2).gather(1, order[..., None].expand(-1, -1, 2))
    num_visible = visible.view(frames, M).sum(-1, dtype=torch.int32)
    nearest = order.new_empty((frames, h * w) if splat else 0, dtype=torch.int32)
    if splat:
        block = 256 // positions.dtype.itemsize
        blocks = triton.cdiv(h * w, block)
        launch(
            track_attention_kernel_nearest, frames * blocks, positions, num_visible, nearest, M, w, h * w, blocks,
            BLOCK=block, TRACKS=block,
        )  # fmt: skip
    sizes = T, heads, M, h, w
    return Scene(order, positions, num_visible, nearest, points.inverse_variance, frames, sizes, splat)


def visits(
    query: Tensor,
    key: Tensor,
    q_strides: list[int],
    k_strides: list[int],
    scene: Scene,
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
    boxes = scene.positions.new_empty((places, column_blocks, 4))
    norms = scene.positions.new_empty((places, column_blocks))
    number = torch.finfo(scene.positions.dtype)
    constants = dict(
        SPLAT=scene.splat, D=D, BLOCK_C=min(32, block_size(D)), TILE_W=configs.tile_width(tiles.cells),
        EPS=number.eps, SMALLEST=number.tiny,
    )  # fmt: skip
    launch(
        track_attention_kernel_columns, places * column_blocks, key, boxes, norms, *scene.arguments(), *scene.sizes,
        column_blocks, *k_strides, COLUMNS=columns, **constants,
    )  # fmt: skip
    negligible = math.log(8 * (M if scene.splat else h * w) / eps) * 1.0001 if eps else math.inf
    launch(
        track_attention_kernel_visits, places * row_blocks, query, key, boxes, norms, result, *scene.arguments(),
        scene.inverse_variance, *scene.sizes, row_blocks, column_blocks, scale, negligible, *q_strides, *k_strides,
        ROWS=rows, CHUNK=32, **constants,
    )  # fmt: skip
    return result


def lists(visits: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of axis 1 the numbers of the blocks of axis 2 that it meets, those first, and how many.

    Not by sorting, whose 8 bytes per number were most of the memory in float64, where a block has few members.
    """
    numbers, counts = (visits.new_empty(shape, dtype=torch.int32) for shape in (visits.shape, visits.shape[:2]))
    launch(
        track_attention_kernel_lists, counts.numel(), visits, numbers, counts, visits.shape[2], CHUNK=128, num_warps=1
    )
    return numbers, counts
