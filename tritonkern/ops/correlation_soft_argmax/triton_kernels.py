"""The Triton backend: what is launched when, on which tiles.

Forward is one pass over all cells for the statistics (triton_statistics.py), then one over the discs (triton_discs.py).
Backward goes over the discs twice: by query, which leaves the gradients of their costs in patches, and by cell, which
reads these. Nothing is ever copied to the host, so that a CUDA graph can hold it all.
"""

import math

import torch
import triton
from torch import Tensor

from tritonkern.ops._contract import accumulator
from tritonkern.ops.correlation_soft_argmax import (
    configs,
    triton_discs,
    triton_soft_argmax,
    triton_statistics,
    triton_tiles,
)


def forward(
    query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float
) -> tuple[Tensor, ...]:
    """query `[B, N, C]`, features `[B, T, h, w, C]` -> what `op.Forward` lists."""
    B, N, _ = query.shape
    T, h, w = features.shape[1:4]
    dtype = accumulator(query.dtype)
    points = query.new_empty((B, N, T, 2), dtype=dtype)
    mean, maximum, minimum, weight = (query.new_empty((B, N, T), dtype=dtype) for _ in range(4))
    best, worst = (query.new_empty((B, N, T), dtype=torch.int32) for _ in range(2))
    query_scale = query.new_empty((B, N) if cosine else (0,), dtype=dtype)
    features_scale = query.new_empty((B, T, h, w) if cosine else (0,), dtype=dtype)
    results = points, mean, maximum, minimum, best, worst, weight, query_scale, features_scale

    (query, query_strides), (features, strides) = triton_tiles.readable(query), triton_tiles.readable(features)
    if cosine:
        _scale(query[:, :, None, None], (*query_strides, 0, 0), query_scale, eps)
        _scale(features, strides, features_scale, eps)
    if maximum.numel() == 0:
        return results
    inputs = query, features, query_scale, features_scale
    C = query.shape[-1]
    units = C // triton_tiles.UNIT.value

    tiles = configs.statistics_tiles(C, query.dtype)
    block_cells, blocks = tiles.tile_h * tiles.tile_w, triton.cdiv(N, tiles.block_n)
    steps = triton.cdiv(h * w, block_cells)
    run = triton.cdiv(steps, min(steps, triton.cdiv(configs.PROGRAMS, B * T * blocks))) * block_cells
    runs = triton.cdiv(h * w, run)
    partial = [query.new_empty((runs, B, T, N), dtype=dtype) for _ in range(3)]
    partial += [query.new_empty((runs, B, T, N), dtype=torch.int32) for _ in range(2)]
    _launch(
        triton_statistics.statistics_kernel, B * T * runs * blocks, tiles,
        *inputs, *partial, B * T, T, N, w, h * w, units, run, runs, *query_strides, *strides,
        COSINE=cosine, BLOCK_N=tiles.block_n, BLOCK_CELLS=block_cells, BLOCK_C=tiles.block_c,
        PRECISION=configs.precision(query.dtype), STAGES=tiles.num_stages,
    )  # fmt: skip
    _launch(
        triton_statistics.merge_kernel, triton.cdiv(B * T * N, 256), None,
        *partial, mean, maximum, minimum, best, worst, T, N, h * w, runs, B * T * N, BLOCK=256,
    )  # fmt: skip

    tiles = configs.points_tiles(C, query.dtype)
    limit, reach = triton_tiles.disc(radius, h, w)
    _launch(
        triton_discs.points_kernel, B * T * triton.cdiv(N, tiles.block_n), tiles,
        *inputs, torch.sort(_keys(best, w), stable=True).indices, best, maximum, points, weight,
        T, N, h, w, units, *reach, limit, temperature, *query_strides, *strides,
        COSINE=cosine, BLOCK_N=tiles.block_n, TILE_H=tiles.tile_h, TILE_W=tiles.tile_w, BLOCK_C=tiles.block_c,
        PRECISION=configs.precision(query.dtype), STAGES=tiles.num_stages,
    )  # fmt: skip
    return results


def backward(
    grad_points: Tensor | None,
    grad_mean: Tensor | None,
    grad_max: Tensor | None,
    grad_min: Tensor | None,
    query: Tensor,
    features: Tensor,
    points: Tensor,
    maximum: Tensor,
    best: Tensor,
    worst: Tensor,
    weight: Tensor,
    query_scale: Tensor,
    features_scale: Tensor,
    temperature: float,
    radius: float,
    cosine: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and features."""
    if maximum.numel() == 0:
        return query.new_zeros(query.shape), features.new_zeros(features.shape)
    B, N, T = maximum.shape
    h, w, channels = features.shape[2:]
    (query, query_strides), (features, strides) = triton_tiles.readable(query), triton_tiles.readable(features)
    points, maximum, best, worst, weight = (x.contiguous() for x in (points, maximum, best, worst, weight))
    query_scale, features_scale = query_scale.contiguous(), features_scale.contiguous()
    inputs = query, features, query_scale, features_scale
    C, dtype = query.shape[-1], maximum.dtype
    units = C // triton_tiles.UNIT.value

    grad_query = query.new_zeros((B, N, C), dtype=dtype)
    grad_frame = points  # not read without grad_mean
    if grad_mean is not None:
        # The same for all cells of a frame, so that their sum stands for them.
        share = grad_mean / (h * w)
        unit_query = query.to(dtype) * query_scale[..., None] if cosine else query.to(dtype)
        grad_frame = torch.einsum("bnt,bnc->btc", share, unit_query).contiguous()
        grad_query += torch.einsum("bnt,btc->bnc", share, _sum(features, strides, features_scale, cosine, dtype))

    # The discs, and the cells of the minima as discs of one cell.
    centres = torch.stack([best, worst] if grad_min is not None else [best])
    order, starts = _sorted(centres, h, w)
    groups = [(*triton_tiles.disc(radius, h, w), grad_points, grad_max), (1, (0, 0), None, grad_min)]
    present = [group[2] is not None or group[3] is not None for group in groups]
    patch = [(min(2 * reach_y + 1, h), min(2 * reach_x + 1, w)) for _, (reach_y, reach_x), *_ in groups]
    planes = 2 if cosine else 1
    frames = configs.MAX_PATCHES // (B * N * planes * math.prod(patch[0]))
    # A frame at a time, every query is met by one program, so that additions to its gradient have one order.
    frames = 1 if torch.are_deterministic_algorithms_enabled() else max(1, min(frames, T))
    grad_features = features.new_empty((B, T, h, w, C))
    for first in range(0, T, frames):
        count = min(frames, T - first)
        tiles = configs.query_gradient_tiles(C, query.dtype)
        sizes = [B * count * N * math.prod(size) for size in patch]
        patches = query.new_empty(planes * sum(sizes[: len(centres)]), dtype=dtype)
        for group, (limit, reach, grad_disc, grad_centre) in enumerate(groups):
            if not present[group]:
                continue
            _launch(
                triton_discs.query_gradient_kernel, B * count * triton.cdiv(N, tiles.block_n), tiles,
                *inputs, order[group], centres[group], points, maximum, weight,
                points if grad_disc is None else grad_disc.contiguous(),
                maximum if grad_centre is None else grad_centre.contiguous(),
                patches[planes * sum(sizes[:group]) :], grad_query,
                T, N, h, w, units, count, first, grad_disc is not None, grad_centre is not None,
                *reach, *patch[group], limit, sizes[group], temperature, *query_strides, *strides,
                COSINE=cosine, BLOCK_N=tiles.block_n, TILE_H=tiles.tile_h, TILE_W=tiles.tile_w, BLOCK_C=tiles.block_c,
                PRECISION=configs.precision(query.dtype), STAGES=tiles.num_stages,
            )  # fmt: skip
        tiles = configs.features_gradient_tiles(C, query.dtype)
        cell_tiles = triton.cdiv(h, tiles.tile_h) * triton.cdiv(w, tiles.tile_w)
        limit, reach, *_ = groups[0]
        # Vectors shorter than sqrt(eps) have this scale, up to rounding.
        longest_scale = eps**-0.5 * (1 - 4 * torch.finfo(dtype).eps)
        _launch(
            triton_discs.features_gradient_kernel, B * count * cell_tiles, tiles,
            *inputs, order, centres, starts, patches, grad_frame, grad_features,
            T, N, h, w, units, count, first, 0 if present[0] else 1, len(centres), grad_mean is not None,
            *reach, *patch[0], limit, B * count * N, B * T * N, B * T, longest_scale, *query_strides, *strides,
            COSINE=cosine, BAND=configs.BAND, BLOCK_N=tiles.block_n, TILE_H=tiles.tile_h, TILE_W=tiles.tile_w,
            BLOCK_C=tiles.block_c, PRECISION=configs.precision(query.dtype),
        )  # fmt: skip

    if cosine:
        accurate = query.to(dtype)
        along = (grad_query * accurate).sum(-1) * query_scale**3
        along = torch.where(accurate.square().sum(-1) < eps, 0, along)
        grad_query = grad_query * query_scale[..., None] - accurate * along[..., None]
    return grad_query.to(query.dtype)[..., :channels].contiguous(), grad_features[..., :channels].contiguous()


def soft_argmax_forward(cost: Tensor, temperature: float, radius: float) -> tuple[Tensor, ...]:
    """cost `[..., h, w]` -> points `[..., 2]`, maximum, best (flat cell, int32) and weight, all `[...]`."""
    frames, (h, w) = cost.shape[:-2], cost.shape[-2:]
    dtype = accumulator(cost.dtype)
    points, maximum, weight = (cost.new_empty(shape, dtype=dtype) for shape in ((*frames, 2), frames, frames))
    best = cost.new_empty(frames, dtype=torch.int32)
    limit, reach = triton_tiles.disc(radius, h, w)
    cost = cost.reshape(-1, h, w)
    _launch(
        triton_soft_argmax.forward_kernel, cost.shape[0], None,
        cost, points, maximum, best, weight, h, w, *reach, limit, temperature, *cost.stride(),
        **configs.SOFT_ARGMAX_TILES, **configs.DISC_TILES,
    )  # fmt: skip
    return points, maximum, best, weight


def soft_argmax_backward(
    grad_points: Tensor,
    cost: Tensor,
    points: Tensor,
    maximum: Tensor,
    best: Tensor,
    weight: Tensor,
    temperature: float,
    radius: float,
) -> Tensor:
    """Gradient of the cost volume, zero beyond the disc."""
    shape = cost.shape
    h, w = shape[-2:]
    cost = cost.reshape(-1, h, w)
    grad_cost = cost.new_empty(shape)
    saved = (x.contiguous() for x in (points, maximum, best, weight))
    limit, _ = triton_tiles.disc(radius, h, w)
    _launch(
        triton_soft_argmax.backward_kernel, cost.shape[0], None,
        grad_points.contiguous(), cost, *saved, grad_cost, h, w, limit, temperature, *cost.stride(),
        **configs.SOFT_ARGMAX_TILES,
    )  # fmt: skip
    return grad_cost


def _keys(centres: Tensor, w: int) -> Tensor:
    """`[..., T, N]` of cells `[..., N, T]`: band * w + column."""
    row = centres // w
    return (row // configs.BAND * w + centres - row * w).mT.contiguous()


def _sorted(centres: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Queries `[..., T, N]` in the order of triton_discs.py, and where each band's columns begin in it."""
    keys, order = torch.sort(_keys(centres, w), stable=True)
    boundaries = torch.arange(triton.cdiv(h, configs.BAND) * w + 1, device=keys.device, dtype=keys.dtype)
    return order, torch.searchsorted(keys, boundaries.expand(*keys.shape[:-1], -1).contiguous(), out_int32=True)


def _scale(vectors: Tensor, strides: tuple[int, ...], scale: Tensor, eps: float) -> None:
    _, T, h, w, C = vectors.shape
    block_c = min(64, configs.block_c(C))
    block = 2048 // block_c
    _launch(
        triton_statistics.scale_kernel, triton.cdiv(scale.numel(), block), None,
        vectors, scale, T, h, w, C // triton_tiles.UNIT.value, scale.numel(), eps, *strides,
        BLOCK=block, BLOCK_C=block_c,
    )  # fmt: skip


def _sum(features: Tensor, strides: tuple[int, ...], scale: Tensor, cosine: bool, dtype: torch.dtype) -> Tensor:
    """`[B, T, C]`: sum over the cells of a frame of the (normalised) features."""
    B, T, h, w, C = features.shape
    total = features.new_empty((B, T, C), dtype=dtype)
    block_c = min(64, configs.block_c(C))
    _launch(
        triton_statistics.sum_kernel, B * T * triton.cdiv(C, block_c), None,
        features, scale, total, T, h * w, w, C // triton_tiles.UNIT.value, *strides,
        COSINE=cosine, BLOCK=2048 // block_c, BLOCK_C=block_c,
    )  # fmt: skip
    return total


def _launch(kernel, programs: int, tiles: configs.Tiles | None, *arguments, **constants) -> None:
    if programs == 0:
        return
    if programs >= 2**31:
        raise ValueError(f"too much work for one launch of the triton backend ({programs} programs); split the batch")
    if tiles is not None:
        constants |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    kernel[(programs,)](*arguments, **constants)
