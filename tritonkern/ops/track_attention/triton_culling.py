"""Which blocks of columns each block of rows visits: the bound of README.md, with one K for each block of columns.

Row i skips a block if, with K the largest norm of the block's keys and d2 the squared distance from the row to the box
around its columns, scale * query . key of each of its columns cannot make up for the distance:

    |scale| |query[i]| K - scale * query[i] . key[near] + ln(8 n / eps)  <  inverse_variance * (d2 - d2[i, near])

The score of the nearest column bounds the largest one from below, so a column that is skipped weighs less than
eps / (8 n) of it. A block of rows visits every block that one of its rows must visit. A NaN or an infinity fails the
comparison, so that its block is visited.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._triton import Launch, block_size, kernel
from tritonkern.ops.track_attention import configs
from tritonkern.ops.track_attention import triton_geometry as geometry
from tritonkern.ops.track_attention.op import FARTHEST, Points

_FARTHEST = tl.constexpr(FARTHEST)


@kernel
def track_attention_kernel_order(
    tracks, visible, sort_key, total: tl.int64, h: tl.int32, w: tl.int32, band: tl.float64, BLOCK: tl.constexpr
):
    """Sort key of each track: its distance along a serpentine path through bands of `band` cells; infinity for one that
    takes no part, because it is invisible or its position is not finite."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = at < total
    takes_part = in_range
    if visible is not None:
        takes_part = tl.load(visible + at, mask=in_range, other=0) != 0
    x = tl.load(tracks + 2 * at, mask=takes_part, other=0.0)
    y = tl.load(tracks + 2 * at + 1, mask=takes_part, other=0.0)
    takes_part = takes_part & (x - x == 0.0) & (y - y == 0.0)
    x = tl.minimum(tl.maximum(x.to(tl.float32), 0.0), w.to(tl.float32))
    y = tl.minimum(tl.maximum(y.to(tl.float32), 0.0), h.to(tl.float32))
    row = tl.floor(y / tl.full([], band, tl.float32))
    backwards = row - 2 * tl.floor(row * 0.5) > 0
    place = row * w + tl.where(backwards, w - x, x)
    tl.store(sort_key + at, tl.where(takes_part, place, float("inf")), mask=in_range)


@kernel
def track_attention_kernel_place(
    tracks, sorted_key, order, positions, num_visible, boxes, M: tl.int32, groups: tl.int32, GROUP: tl.constexpr
):
    """Positions of the visible tracks in order, at most FARTHEST from the origin on each axis; how many there are in a
    frame; and the box (left, right, top, bottom) around each group of GROUP of them."""
    frame = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    entry = group * GROUP + tl.arange(0, GROUP)
    sorted_key += frame * M
    visible = tl.load(sorted_key + entry, mask=entry < M, other=float("inf")) < float("inf")
    is_last = visible & (tl.load(sorted_key + entry + 1, mask=entry + 1 < M, other=float("inf")) == float("inf"))
    at = 2 * (frame * M + tl.load(order + frame * M + entry, mask=visible, other=0))
    x = tl.minimum(tl.maximum(tl.load(tracks + at, mask=visible, other=0.0), -_FARTHEST), _FARTHEST)
    y = tl.minimum(tl.maximum(tl.load(tracks + at + 1, mask=visible, other=0.0), -_FARTHEST), _FARTHEST)
    to = positions + 2 * (frame * M + entry)
    tl.store(to, x, mask=visible)
    tl.store(to + 1, y, mask=visible)
    # One entry of a frame is its last visible one, or the first is not visible.
    tl.store(num_visible + frame + entry * 0, tl.where(visible, entry + 1, 0), mask=is_last | ((entry == 0) & ~visible))
    if boxes is not None:
        box = boxes + (frame * groups + group) * 4
        tl.store(box, tl.min(tl.where(visible, x, float("inf")), 0))
        tl.store(box + 1, tl.max(tl.where(visible, x, float("-inf")), 0))
        tl.store(box + 2, tl.min(tl.where(visible, y, float("inf")), 0))
        tl.store(box + 3, tl.max(tl.where(visible, y, float("-inf")), 0))


@kernel
def track_attention_kernel_nearest(
    positions, boxes, num_visible, nearest, M: tl.int32, h: tl.int32, w: tl.int32, groups: tl.int32,
    SIDE: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Entry of the visible track nearest to each cell, the first of several; 0 if there is none.

    A program has SIDE x SIDE cells. Of CHUNK groups of tracks at a time it takes the one whose box is nearest, until
    the boxes of all others are farther away than the tracks found so far.
    """
    ACC: tl.constexpr = positions.dtype.element_ty
    across = tl.cdiv(w, SIDE)
    tiles = across * tl.cdiv(h, SIDE)
    frame = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    top, left = tile // across * SIDE, tile % across * SIDE
    y = top + tl.arange(0, SIDE * SIDE) // SIDE
    x = left + tl.arange(0, SIDE * SIDE) % SIDE
    exists = (y < h) & (x < w)
    py, px = tl.minimum(y, h - 1).to(ACC) + 0.5, tl.minimum(x, w - 1).to(ACC) + 0.5
    first_y, first_x = top.to(ACC) + 0.5, left.to(ACC) + 0.5
    last_y, last_x = tl.minimum(top + SIDE, h).to(ACC) - 0.5, tl.minimum(left + SIDE, w).to(ACC) - 0.5
    count = tl.load(num_visible + frame)
    positions += 2 * frame * M
    boxes += frame * groups * 4
    best = tl.full([SIDE * SIDE], float("inf"), ACC)
    chosen = tl.zeros([SIDE * SIDE], tl.int32)
    # Over the groups before `first`: `chosen` is the first of the nearest entries, `best` its squared distance.
    for first in tl.range(0, tl.cdiv(count, GROUP), CHUNK):
        group = first + tl.arange(0, CHUNK)
        box, in_range = boxes + 4 * group, group * GROUP < count
        aside = tl.maximum(
            tl.load(box, mask=in_range, other=0.0) - last_x, first_x - tl.load(box + 1, mask=in_range, other=0.0)
        )
        above = tl.maximum(
            tl.load(box + 2, mask=in_range, other=0.0) - last_y, first_y - tl.load(box + 3, mask=in_range, other=0.0)
        )
        aside, above = tl.maximum(aside, 0.0), tl.maximum(above, 0.0)
        gap = tl.where(in_range, (aside * aside + above * above) * (1 - 8 * EPS), float("inf"))
        least_gap = tl.min(gap, 0)
        # `gap` is infinite for the groups that have been met.
        while (least_gap < float("inf")) & (least_gap <= tl.max(best, 0)):
            met = tl.min(tl.where(gap == least_gap, group, 2147483647), 0)
            entry = met * GROUP + tl.arange(0, GROUP)
            visible = entry < count
            dx = px[:, None] - tl.load(positions + 2 * entry, mask=visible, other=0.0)[None, :]
            dy = py[:, None] - tl.load(positions + 2 * entry + 1, mask=visible, other=0.0)[None, :]
            squared = tl.where(visible[None, :], dx * dx + dy * dy, float("inf"))
            least = tl.min(squared, 1)
            which = tl.min(tl.where(squared == least[:, None], entry[None, :], 2147483647), 1)
            better = (least < best) | ((least == best) & (which < chosen))
            chosen = tl.where(better, which, chosen)
            best = tl.minimum(best, least)
            gap = tl.where(group == met, float("inf"), gap)
            least_gap = tl.min(gap, 0)
    tl.store(nearest + frame * h * w + y * w + x, chosen, mask=exists)


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
    query, key, boxes, norms, lists, counts, visits, order, positions, num_visible, nearest, inverse_variance,
    T: tl.int32, H: tl.int32, M: tl.int32, h: tl.int32, w: tl.int32, row_blocks: tl.int32, column_blocks: tl.int32,
    scale: tl.float64, negligible: tl.float64,
    stride_qb: tl.int64, stride_qt: tl.int64, stride_qy: tl.int64, stride_qx: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt: tl.int64, stride_ky: tl.int64, stride_kx: tl.int64, stride_kh: tl.int64,
    SPLAT: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, TILE_W: tl.constexpr,
    EPS: tl.constexpr, SMALLEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Lists the blocks of columns that a block of rows visits, in order: the comparison at the top of this file.

    With `visits`, `[places, column blocks, row blocks]`, it is noted there whether each pair is computed.
    """
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
    owned = place * row_blocks + block
    lists += owned * column_blocks
    count = 0
    # `count` blocks of columns before `first` are listed.
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
        visit = tl.max(tl.where(far, 0, visible.to(tl.int32)[:, None]), 0) * in_range.to(tl.int32)
        tl.store(lists + count + tl.cumsum(visit, 0) - visit, other, mask=visit != 0)
        count += tl.sum(visit, 0)
        if visits is not None:
            tl.store(visits + (place * column_blocks + other) * row_blocks + block, visit.to(tl.uint8), mask=in_range)
    tl.store(counts + owned, count)


@kernel
def track_attention_kernel_lists(visits, lists, counts, others: tl.int32, CHUNK: tl.constexpr):
    """The numbers of the blocks that a block is paired with, in order, and how many there are."""
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
        return self[:4]


class Meetings(NamedTuple):
    """For each block of rows the numbers of the blocks of columns that it is paired with, those first, and how many."""

    lists: Tensor  # [B * T * H, row blocks, column blocks], int32
    counts: Tensor  # [B * T * H, row blocks], int32
    visits: Tensor | None  # whether they are paired, [B * T * H, column blocks, row blocks]
    list_visits: Launch  # what makes of `visits` the lists of the blocks of columns; see `listed`


def blocks(sizes: tuple[int, int, int, int, int], splat: bool, tiles: configs.Tiles) -> tuple[int, int]:
    """Blocks of rows and of columns."""
    _, _, M, h, w = sizes
    width = configs.tile_width(tiles.cells)
    of_cells = triton.cdiv(h, tiles.cells // width) * triton.cdiv(w, width)
    of_tracks = triton.cdiv(M, tiles.tracks)
    return (of_cells, of_tracks) if splat else (of_tracks, of_cells)


@functools.lru_cache(maxsize=1024)
def _scene_launches(shape, grid, splat: bool, dtype, has_visibility: bool) -> tuple[Launch, Launch, Launch, int]:
    """Order, place and nearest, and the number of groups of tracks in a frame."""
    B, T, M, _ = shape
    frames, (h, w), groups = B * T, grid, triton.cdiv(M, configs.GROUP)
    # The height at which a block of evenly spread tracks is about a square.
    band = max(1.0, math.sqrt(configs.GROUP * h * w / M))
    order = Launch(track_attention_kernel_order, triton.cdiv(frames * M, 256), frames * M, h, w, band, BLOCK=256)
    place = Launch(track_attention_kernel_place, frames * groups, M, groups, GROUP=configs.GROUP, num_warps=1)
    side = 8 if dtype == torch.float32 else 4  # 8 x 8 distances in float64 spill
    tiles = triton.cdiv(h, side) * triton.cdiv(w, side)
    nearest = Launch(
        track_attention_kernel_nearest, frames * tiles, M, h, w, groups,
        SIDE=side, GROUP=configs.GROUP, CHUNK=128, EPS=torch.finfo(dtype).eps,
    )  # fmt: skip
    return order, place, nearest, groups


def scene(points: Points, heads: int, grid: Sequence[int], splat: bool) -> Scene:
    """Sort the tracks `[B, T, M, 2]`, and find each cell's nearest one where cells are rows."""
    tracks, visible = points.tracks.contiguous(), points.visible
    B, T, M, _ = tracks.shape
    frames, (h, w) = B * T, grid
    if visible is not None:
        visible = visible.contiguous().view(torch.uint8)
    order, place, find_nearest, groups = _scene_launches(tracks.shape, grid, splat, tracks.dtype, visible is not None)
    sort_key = tracks.new_empty((frames, M), dtype=torch.float32)
    order(tracks, visible, sort_key)
    sorted_key, numbers = sort_key.sort(dim=-1, stable=True)
    positions = tracks.new_empty((frames, M, 2))
    num_visible = numbers.new_empty(frames, dtype=torch.int32)
    boxes = tracks.new_empty((frames, groups, 4)) if splat else None
    place(tracks, sorted_key, numbers, positions, num_visible, boxes)
    nearest = num_visible.new_empty((frames, h * w) if splat else 0)
    if splat:
        find_nearest(positions, boxes, num_visible, nearest)
    return Scene(
        numbers, positions, num_visible, nearest, points.inverse_variance, frames, (T, heads, M, h, w), splat
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _visits_launches(
    sizes, splat: bool, places: int, D: int, dtype, real, strides, scale: float, eps: float, tiles, noted: bool
) -> tuple[Launch, Launch, Launch, tuple[int, int]]:
    """Columns, visits and lists of columns, and the numbers of blocks."""
    M, h, w = sizes[2:]
    row_blocks, column_blocks = blocks(sizes, splat, tiles)
    rows, columns = (tiles.cells, tiles.tracks) if splat else (tiles.tracks, tiles.cells)
    number = torch.finfo(real)
    constants = dict(
        SPLAT=splat, D=D, BLOCK_C=min(32, block_size(D)), TILE_W=configs.tile_width(tiles.cells),
        EPS=number.eps, SMALLEST=number.tiny,
    )  # fmt: skip
    of_columns = Launch(
        track_attention_kernel_columns, places * column_blocks, *sizes, column_blocks, *strides[1], COLUMNS=columns,
        **constants,
    )  # fmt: skip
    negligible = math.log(8 * (M if splat else h * w) / eps) * 1.0001 if eps else math.inf
    visits = Launch(
        track_attention_kernel_visits, places * row_blocks, *sizes, row_blocks, column_blocks, scale, negligible,
        *strides[0], *strides[1], ROWS=rows, CHUNK=32, **constants,
    )  # fmt: skip
    return of_columns, visits, lists_launch(places * column_blocks, row_blocks), (row_blocks, column_blocks)


def lists_launch(count: int, others: int) -> Launch:
    return Launch(track_attention_kernel_lists, count, others, CHUNK=128, num_warps=1)


def meetings(
    query: Tensor,
    key: Tensor,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    scene: Scene,
    scale: float,
    eps: float,
    tiles: configs.Tiles,
    noted: bool,
) -> Meetings:
    """Which blocks are paired; all of them if `eps` is 0. `noted`: whether `visits` are wanted."""
    heads, D = query.shape[-2:]
    places, positions = scene.frames * heads, scene.positions
    dtypes, strides = (query.dtype, positions.dtype), (q_strides, k_strides)
    find_boxes, find_visits, list_visits, (row_blocks, column_blocks) = _visits_launches(
        scene.sizes, scene.splat, places, D, *dtypes, strides, scale, eps, tiles, noted
    )
    boxes = positions.new_empty((places, column_blocks, 4))
    norms = positions.new_empty((places, column_blocks))
    arguments = scene.arguments()
    find_boxes(key, boxes, norms, *arguments)
    lists = scene.num_visible.new_empty((places, row_blocks, column_blocks))
    counts = scene.num_visible.new_empty((places, row_blocks))
    visits = query.new_empty((places, column_blocks, row_blocks), dtype=torch.uint8) if noted else None
    find_visits(query, key, boxes, norms, lists, counts, visits, *arguments, scene.inverse_variance)
    return Meetings(lists, counts, visits, list_visits)


def listed(visits: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """For each block of axis 1 the numbers of the blocks of axis 2 that it is paired with, those first, and how many.

    Not by sorting, whose 8 bytes per number were most of the memory in float64, where a block has few members.
    """
    numbers = visits.new_empty(visits.shape, dtype=torch.int32)
    counts = visits.new_empty(visits.shape[:2], dtype=torch.int32)
    launch(visits, numbers, counts)
    return numbers, counts
