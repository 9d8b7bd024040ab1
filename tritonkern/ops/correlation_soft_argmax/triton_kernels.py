"""Launchers of the Triton kernels: which one runs when, on which tiles.

Forward is one pass over all cells for the statistics (triton_statistics.py), then one over the discs (triton_discs.py).
Backward runs over the discs twice (triton_gradients.py): by query, which stores the gradients of its costs in patches,
and by cell, which reads these. What goes through the means and the norms is in triton_queries.py. Nothing is copied to
the host, so that a CUDA graph can hold all of it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import UNIT, Launch, block_size, precision, readable, register_limit
from tritonkern.ops.correlation_soft_argmax import (
    configs,
    triton_discs,
    triton_gradients,
    triton_queries,
    triton_statistics,
)
from tritonkern.ops.correlation_soft_argmax.op import Grads, Outputs, Saved, allocate
from tritonkern.ops.correlation_soft_argmax.triton_common import disc
from tritonkern.ops.correlation_soft_argmax.triton_soft_argmax import soft_argmax_2d_backward as soft_argmax_2d_backward
from tritonkern.ops.correlation_soft_argmax.triton_soft_argmax import soft_argmax_2d_forward as soft_argmax_2d_forward


class _Sizes(NamedTuple):
    """What the launches of a call depend on, apart from options. Sizes of channels and strides are in UNITs."""

    strides: tuple[int, ...]  # of the first two axes of query and the first four of features
    B: int
    T: int
    N: int
    h: int
    w: int
    C: int
    dtype: torch.dtype
    cosine: bool
    tf32: bool  # whether tiles of float32 are multiplied so

    def constants(self, tiles: configs.Tiles) -> dict:
        """Of every kernel that multiplies queries and cells."""
        return {
            "COSINE": self.cosine,
            "BLOCK_N": tiles.block_n,
            "BLOCK_C": tiles.block_c,
            "PRECISION": precision(self.dtype),
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            **register_limit(),
        }


def _inputs(query: Tensor, features: Tensor, cosine: bool) -> tuple[Tensor, Tensor, _Sizes]:
    """Query and features that kernels can read, and their sizes."""
    (query, query_strides), (features, strides) = readable(query), readable(features)
    B, T, h, w, C = features.shape
    dtype = query.dtype
    tf32 = dtype == torch.float32 and configs.tf32_allowed()
    return query, features, _Sizes(
        query_strides + strides, B, T, query.shape[1], h, w, C // UNIT.value, dtype, cosine, tf32
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _norm_launches(sizes: _Sizes, eps: float) -> tuple[Launch, Launch]:
    """Of query and features."""
    strides, B, T, N, h, w, C, *_ = sizes
    block_c = min(64, block_size(C * UNIT.value))
    block = 2048 // block_c

    def launch(count: int, *numbers: float) -> Launch:
        kernel = triton_statistics.correlation_soft_argmax_fwd_kernel_inverse_norms
        return Launch(kernel, triton.cdiv(count, block), *numbers, BLOCK=block, BLOCK_C=block_c)

    queries, cells = B * N, B * T * h * w
    of_query = launch(queries, N, 1, 1, C, queries, eps, *strides[:2], 0, 0)
    return of_query, launch(cells, T, h, w, C, cells, eps, *strides[2:])


class _Forward(NamedTuple):
    statistics: Launch
    merge: Launch
    points: Launch
    partial: tuple[int, int, int, int]  # runs of cells, as many as fill the GPU, B, T, N


@functools.lru_cache(maxsize=1024)
def _forward_launches(sizes: _Sizes, temperature: float, radius: float) -> _Forward:
    strides, B, T, N, h, w, C, dtype, *_ = sizes
    tiles = configs.statistics_tiles(C * UNIT.value, dtype)
    block_cells, blocks = tiles.tile_h * tiles.tile_w, triton.cdiv(N, tiles.block_n)
    steps = triton.cdiv(h * w, block_cells)
    run = triton.cdiv(steps, min(steps, triton.cdiv(configs.PROGRAMS, B * T * blocks))) * block_cells
    runs = triton.cdiv(h * w, run)
    statistics = Launch(
        triton_statistics.correlation_soft_argmax_fwd_kernel_statistics, B * T * runs * blocks,
        B * T, T, N, w, h * w, C, run, runs, *strides,
        **sizes.constants(tiles), BLOCK_CELLS=block_cells, STAGES=tiles.num_stages,
    )  # fmt: skip
    merge = Launch(
        triton_statistics.correlation_soft_argmax_fwd_kernel_merge, triton.cdiv(B * T * N, 256),
        T, N, w, h * w, runs, B * T * N, BAND=configs.BAND, BLOCK=256,
    )  # fmt: skip
    tiles = configs.points_tiles(C * UNIT.value, dtype)
    limit, reach = disc(radius, h, w)
    points = Launch(
        triton_discs.correlation_soft_argmax_fwd_kernel_points, B * T * triton.cdiv(N, tiles.block_n),
        T, N, h, w, C, *reach, limit, temperature, *strides,
        **sizes.constants(tiles), TILE_H=tiles.tile_h, TILE_W=tiles.tile_w, STAGES=tiles.num_stages,
    )  # fmt: skip
    return _Forward(statistics, merge, points, (runs, B, T, N))


def forward(query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float) -> Outputs:
    """query `[B, N, C]`, features `[B, T, h, w, C]`; see `op.Outputs`."""
    outputs = allocate(query, features, cosine)
    query, features, sizes = _inputs(query, features, cosine)
    inverse_norms = outputs[7:]
    if cosine:
        of_query, of_features = _norm_launches(sizes, eps)
        of_query(query, inverse_norms[0])
        of_features(features, inverse_norms[1])
    if outputs.maximum.numel():
        launches = _forward_launches(sizes, temperature, radius)
        totals = [query.new_empty(launches.partial, dtype=outputs.mean.dtype) for _ in range(3)]
        cells = [query.new_empty(launches.partial, dtype=torch.int32) for _ in range(2)]
        keys = query.new_empty(launches.partial[1:], dtype=torch.int32)
        launches.statistics(query, features, *inverse_norms, *totals, *cells)
        launches.merge(*totals, *cells, *outputs[1:6], keys)
        order = keys.sort(stable=True)[1]
        launches.points(
            query, features, *inverse_norms, order, outputs.best, outputs.maximum, outputs.points, outputs.weight
        )
    return outputs


class _Backward(NamedTuple):
    keys: Launch
    starts: Launch
    mean: tuple[Launch, Launch]  # sums over cells and queries, and the share of the queries
    norm: Launch
    spans: list[tuple[list[int], list[Launch], Launch]]  # of frames: sizes of patches, by query and group, by cell
    first_group: int
    boundaries: int


@functools.lru_cache(maxsize=1024)
def _backward_launches(
    sizes: _Sizes, temperature: float, radius: float, eps: float, given: tuple[bool, bool, bool, bool], most: int
) -> _Backward:
    """`given`: which of the gradients of points, mean, maximum and minimum there are; `most`: numbers in patches of a
    launch, of at least one frame."""
    strides, B, T, N, h, w, C, dtype, cosine, _ = sizes
    has_points, has_mean, has_maximum, has_minimum = given
    channels, pairs, planes = C * UNIT.value, B * T * N, 2 if cosine else 1
    # Discs, one per query and frame, whose cells have gradients: around the maxima, and the cells of the minima.
    groups = [(*disc(radius, h, w), has_points, has_maximum)]
    if has_minimum:
        groups.append((*disc(1.0, h, w), False, True))
    boundaries = triton.cdiv(h, configs.BAND) * w + 1
    keys = Launch(
        triton_discs.correlation_soft_argmax_bwd_kernel_keys, triton.cdiv(pairs, 256), T, N, w, pairs,
        BAND=configs.BAND, BLOCK=256,
    )  # fmt: skip
    blocks = triton.cdiv(max(N, boundaries), 256)
    starts = Launch(
        triton_discs.correlation_soft_argmax_bwd_kernel_starts, len(groups) * B * T * blocks,
        B * T, T, N, boundaries, blocks, N.bit_length(), BLOCK=256,
    )  # fmt: skip
    block_c = min(64, block_size(channels))
    tile = dict(BLOCK=2048 // block_c, BLOCK_C=block_c)
    along = triton.cdiv(channels, block_c)
    mean = Launch(
        triton_queries.correlation_soft_argmax_bwd_kernel_mean, B * T * along, T, N, h * w, w, C, *strides,
        COSINE=cosine, **tile,
    )  # fmt: skip
    share = Launch(
        triton_queries.correlation_soft_argmax_bwd_kernel_share, triton.cdiv(B * N, tile["BLOCK"]) * along,
        T, N, h * w, C, B * N, **tile,
    )  # fmt: skip
    norm = Launch(
        triton_queries.correlation_soft_argmax_bwd_kernel_norm, triton.cdiv(B * N, tile["BLOCK"]),
        N, C, B * N, eps, *strides[:2], **tile,
    )  # fmt: skip

    patches = [(min(2 * reach[0] + 1, h), min(2 * reach[1] + 1, w)) for _, reach, *_ in groups]
    frames = max(1, min(most // (B * N * planes * math.prod(patches[0])), T))
    by_query, by_cell = (choose(channels, dtype) for choose in (
        configs.query_gradient_tiles, configs.features_gradient_tiles
    ))  # fmt: skip
    # Vectors shorter than sqrt(eps) have this inverse norm, up to rounding.
    longest = eps**-0.5 * (1 - 4 * torch.finfo(accumulator(dtype)).eps)
    first_group = 0 if has_points or has_maximum else 1
    spans = []
    for first in range(0, T, frames):
        count = min(frames, T - first)
        numbers = [B * count * N * math.prod(patch) * planes for patch in patches]
        of_groups = []
        for (limit, reach, of_points, of_centre), patch in zip(groups, patches, strict=True):
            of_group = Launch(
                triton_gradients.correlation_soft_argmax_bwd_kernel_query, B * count * triton.cdiv(N, by_query.block_n),
                T, N, h, w, C, count, first, of_points, of_centre, *reach, *patch, limit, temperature, *strides,
                **sizes.constants(by_query), TILE_H=by_query.tile_h, TILE_W=by_query.tile_w,
                STAGES=by_query.num_stages,
            )  # fmt: skip
            of_groups.append(of_group)
        of_cells = Launch(
            triton_gradients.correlation_soft_argmax_bwd_kernel_features,
            B * count * triton.cdiv(h, by_cell.tile_h) * triton.cdiv(w, by_cell.tile_w),
            T, N, h, w, C, count, first, first_group, len(groups), has_mean, *groups[0][1], *patches[0], groups[0][0],
            numbers[0], B * T, longest, *strides,
            **sizes.constants(by_cell), BAND=configs.BAND, TILE_H=by_cell.tile_h, TILE_W=by_cell.tile_w,
        )  # fmt: skip
        spans.append((numbers, of_groups, of_cells))
    return _Backward(keys, starts, (mean, share), norm, spans, first_group, boundaries)


def backward(
    grad: Grads,
    query: Tensor,
    features: Tensor,
    saved: Saved,
    temperature: float,
    radius: float,
    cosine: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and features."""
    if saved.maximum.numel() == 0:
        return query.new_zeros(query.shape), features.new_zeros(features.shape)
    channels = features.shape[-1]
    points, maximum, best, worst, weight, *inverse_norms = [x.contiguous() for x in saved]
    of_points, of_mean, of_maximum, of_minimum = [None if x is None else x.contiguous() for x in grad]
    query, features, sizes = _inputs(query, features, cosine)
    B, T, N, padded, real = sizes.B, sizes.T, sizes.N, query.shape[-1], maximum.dtype
    given = (of_points is not None, of_mean is not None, of_maximum is not None, of_minimum is not None)
    # In deterministic mode one frame at a time: each query is then in one program of a launch, so that the additions to
    # its gradient have one order.
    most = 0 if torch.are_deterministic_algorithms_enabled() else configs.MAX_PATCHES
    launches = _backward_launches(sizes, temperature, radius, eps, given, most)
    inputs = (query, features, *inverse_norms)

    minima = None if of_minimum is None else worst
    groups = [(best, of_points, of_maximum), (worst, None, of_minimum)][: 1 if minima is None else 2]
    keys = best.new_empty((len(groups), B, T, N))
    launches.keys(best, minima, keys)
    keys, order = keys.sort(stable=True)
    centres, starts = best.new_empty(keys.shape), best.new_empty((len(groups), B, T, launches.boundaries))
    launches.starts(keys, order, best, minima, centres, starts)

    # Of the queries, with `cosine` the normalised ones.
    grad_query = query.new_empty(query.shape, dtype=real)
    grad_cell = maximum  # not read without a gradient of the mean
    if of_mean is None:
        grad_query.zero_()
    else:
        total, grad_cell = query.new_empty((2, B, T, padded), dtype=real).unbind()
        launches.mean[0](*inputs, of_mean, total, grad_cell)
        launches.mean[1](of_mean, total, grad_query)

    grad_features = features.new_empty(features.shape)
    for numbers, by_query, by_cell in launches.spans:
        patches = maximum.new_empty(sum(numbers))
        for g in range(launches.first_group, len(groups)):
            centres_of_group, of_points, of_centre = groups[g]
            by_query[g](
                *inputs, order[g], centres_of_group, points, maximum, weight,
                points if of_points is None else of_points, maximum if of_centre is None else of_centre,
                patches[numbers[0] :] if g else patches, grad_query,
            )  # fmt: skip
        by_cell(*inputs, order, centres, starts, patches, grad_cell, grad_features)

    if cosine:
        normalised, grad_query = grad_query, query.new_empty(query.shape)
        launches.norm(normalised, query, inverse_norms[0], grad_query)
    grad_query = grad_query.to(query.dtype)
    if padded == channels:
        return grad_query, grad_features
    return grad_query[..., :channels].contiguous(), grad_features[..., :channels].contiguous()
