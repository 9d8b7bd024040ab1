"""Launchers of the Triton kernels: which one runs when, on which tiles.

Forward is one pass over all cells for the statistics (triton_statistics.py), then one over the discs (triton_discs.py).
Backward (triton_gradients.py) runs over the discs twice: by query, which stores the gradients of their costs in
patches, and by cell, which reads these. Nothing is copied to the host, so that a CUDA graph can hold all of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tritonkern.ops._triton import UNIT, block_size, launch, precision, readable, register_limit, starts_on_16_bytes
from tritonkern.ops.correlation_soft_argmax import (
    configs,
    triton_discs,
    triton_gradients,
    triton_soft_argmax,
    triton_statistics,
)
from tritonkern.ops.correlation_soft_argmax.op import Grads, Outputs, Outputs2d, Saved, allocate, allocate_2d
from tritonkern.ops.correlation_soft_argmax.triton_common import disc


class _Inputs(NamedTuple):
    """Arguments that the kernels over queries and cells share. Sizes of channels and strides are in UNITs."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # query, features and their inverse norms
    strides: list[int]  # of the first two axes of query and the first four of features
    B: int
    T: int
    N: int
    h: int
    w: int
    C: int
    cosine: bool

    @classmethod
    def of(cls, query: Tensor, features: Tensor, inverse_norms: tuple[Tensor, Tensor], cosine: bool) -> _Inputs:
        (query, query_strides), (features, strides) = readable(query), readable(features)
        B, T, h, w, C = features.shape
        tensors = (query, features, inverse_norms[0].contiguous(), inverse_norms[1].contiguous())
        return cls(tensors, query_strides + strides, B, T, query.shape[1], h, w, C // UNIT.value, cosine)

    def constants(self, tiles: configs.Tiles) -> dict:
        """Of every kernel that multiplies queries and cells."""
        return {
            "COSINE": self.cosine,
            "BLOCK_N": tiles.block_n,
            "BLOCK_C": tiles.block_c,
            "PRECISION": precision(self.tensors[0].dtype),
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            **register_limit(),
        }


def forward(query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float) -> Outputs:
    """query `[B, N, C]`, features `[B, T, h, w, C]`; see `op.Outputs`."""
    outputs = allocate(query, features, cosine)
    inputs = _Inputs.of(query, features, outputs[7:], cosine)
    if cosine:
        query, features, *inverse_norms = inputs.tensors
        _inverse_norms(query[:, :, None, None], [*inputs.strides[:2], 0, 0], inverse_norms[0], eps)
        _inverse_norms(features, inputs.strides[2:], inverse_norms[1], eps)
    if outputs.maximum.numel():
        _statistics(inputs, outputs)
        _points(inputs, outputs, temperature, radius)
    return outputs


def _inverse_norms(vectors: Tensor, strides: list[int], inverse_norm: Tensor, eps: float) -> None:
    _, T, h, w, C = vectors.shape
    block_c = min(64, block_size(C))
    block = 2048 // block_c
    count = inverse_norm.numel()
    launch(
        triton_statistics.correlation_soft_argmax_fwd_kernel_inverse_norms, triton.cdiv(count, block),
        vectors, inverse_norm, T, h, w, C // UNIT.value, count, eps, *strides, BLOCK=block, BLOCK_C=block_c,
    )  # fmt: skip


def _statistics(inputs: _Inputs, outputs: Outputs) -> None:
    """Statistics of runs of cells, as many as fill the GPU, and their merge."""
    query, *_ = inputs.tensors
    _, strides, B, T, N, h, w, C, _ = inputs
    tiles = configs.statistics_tiles(query.shape[-1], query.dtype)
    block_cells, blocks = tiles.tile_h * tiles.tile_w, triton.cdiv(N, tiles.block_n)
    steps = triton.cdiv(h * w, block_cells)
    run = triton.cdiv(steps, min(steps, triton.cdiv(configs.PROGRAMS, B * T * blocks))) * block_cells
    runs = triton.cdiv(h * w, run)
    dtypes = (outputs.mean.dtype,) * 3 + (torch.int32,) * 2
    partial = [query.new_empty((runs, B, T, N), dtype=dtype) for dtype in dtypes]
    launch(
        triton_statistics.correlation_soft_argmax_fwd_kernel_statistics, B * T * runs * blocks,
        *inputs.tensors, *partial, B * T, T, N, w, h * w, C, run, runs, *strides,
        **inputs.constants(tiles), BLOCK_CELLS=block_cells, STAGES=tiles.num_stages,
    )  # fmt: skip
    launch(
        triton_statistics.correlation_soft_argmax_fwd_kernel_merge, triton.cdiv(B * T * N, 256),
        *partial, *outputs[1:6], T, N, h * w, runs, B * T * N, BLOCK=256,
    )  # fmt: skip


def _points(inputs: _Inputs, outputs: Outputs, temperature: float, radius: float) -> None:
    query, *_ = inputs.tensors
    _, strides, B, T, N, h, w, C, _ = inputs
    tiles = configs.points_tiles(query.shape[-1], query.dtype)
    order = torch.sort(_keys(outputs.best, w), stable=True).indices
    limit, reach = disc(radius, h, w)
    launch(
        triton_discs.correlation_soft_argmax_fwd_kernel_points, B * T * triton.cdiv(N, tiles.block_n),
        *inputs.tensors, order, outputs.best, outputs.maximum, outputs.points, outputs.weight,
        T, N, h, w, C, *reach, limit, temperature, *strides,
        **inputs.constants(tiles), TILE_H=tiles.tile_h, TILE_W=tiles.tile_w, STAGES=tiles.num_stages,
    )  # fmt: skip


class _Group(NamedTuple):
    """Discs, one per query and frame, whose cells have gradients: those of the points, or the cells of the minima."""

    centres: Tensor  # [B, N, T]: flat cells
    limit: int
    reach: tuple[int, int]
    patch: tuple[int, int]  # rows and columns of the part of the grid that a disc can cover
    grad_points: Tensor | None
    grad_centre: Tensor | None

    @classmethod
    def of(cls, centres, radius, h, w, grad_points, grad_centre) -> _Group:
        limit, reach = disc(radius, h, w)
        patch = min(2 * reach[0] + 1, h), min(2 * reach[1] + 1, w)
        grads = (None if x is None else x.contiguous() for x in (grad_points, grad_centre))
        return cls(centres, limit, reach, patch, *grads)

    @property
    def has_gradient(self) -> bool:
        return self.grad_points is not None or self.grad_centre is not None


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
    saved = Saved(*(x.contiguous() for x in saved))
    inputs = _Inputs.of(query, features, saved[5:], cosine)
    B, T, h, w = inputs.B, inputs.T, inputs.h, inputs.w
    grad_query, grad_mean = _mean_gradients(inputs, grad.mean, saved.maximum.dtype)
    grad_features = features.new_empty((B, T, h, w, inputs.tensors[1].shape[-1]))

    groups = [_Group.of(saved.best, radius, h, w, grad.points, grad.maximum)]
    if grad.minimum is not None:
        groups.append(_Group.of(saved.worst, 1.0, h, w, None, grad.minimum))
    entries = _sorted(torch.stack([group.centres for group in groups]), h, w)
    frames = _frames_per_launch(inputs, groups[0])
    for first in range(0, T, frames):
        span = (first, min(frames, T - first))
        patches = _query_gradient(inputs, groups, entries[0], saved, temperature, span, grad_query)
        _features_gradient(inputs, groups, entries, patches, grad_mean, eps, span, grad_features)
    grad_query = _through_the_norm(inputs, grad_query, eps) if cosine else grad_query
    return grad_query.to(query.dtype)[..., :channels].contiguous(), grad_features[..., :channels].contiguous()


def _frames_per_launch(inputs: _Inputs, group: _Group) -> int:
    """As many as configs.MAX_PATCHES allows.

    One in deterministic mode: each query is then in one program of a launch, so that the atomic additions to its
    gradient have one order.
    """
    if torch.are_deterministic_algorithms_enabled():
        return 1
    planes = 2 if inputs.cosine else 1
    return max(1, min(configs.MAX_PATCHES // (inputs.B * inputs.N * planes * math.prod(group.patch)), inputs.T))


def _mean_gradients(inputs: _Inputs, grad_mean: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What the gradient of the mean adds to the (normalised) queries, `[B, N, C]`, and to every cell, `[B, T, C]`."""
    query, features, query_inverse_norm, features_inverse_norm = inputs.tensors
    grad_query = query.new_zeros(query.shape, dtype=dtype)
    if grad_mean is None:
        return grad_query, None
    # The same for all cells of a frame, so one sum of features per frame is enough.
    share = grad_mean / (inputs.h * inputs.w)
    unit_query = query.to(dtype) * query_inverse_norm[..., None] if inputs.cosine else query.to(dtype)
    total = query.new_empty((inputs.B, inputs.T, query.shape[-1]), dtype=dtype)
    block_c = min(64, block_size(query.shape[-1]))
    launch(
        triton_statistics.correlation_soft_argmax_bwd_kernel_sum,
        inputs.B * inputs.T * triton.cdiv(query.shape[-1], block_c),
        features, features_inverse_norm, total, inputs.T, inputs.h * inputs.w, inputs.w, inputs.C, *inputs.strides[2:],
        COSINE=inputs.cosine, BLOCK=2048 // block_c, BLOCK_C=block_c,
    )  # fmt: skip
    grad_query += torch.einsum("bnt,btc->bnc", share, total)
    return grad_query, torch.einsum("bnt,bnc->btc", share, unit_query).contiguous()


def _query_gradient(
    inputs: _Inputs,
    groups: list[_Group],
    order: Tensor,
    saved: Saved,
    temperature: float,
    span: tuple[int, int],
    grad_query: Tensor,
) -> Tensor:
    """Adds to `grad_query`; returns the gradients of the costs in the discs, those of the second group last."""
    query, *_ = inputs.tensors
    _, strides, B, T, N, h, w, C, cosine = inputs
    first, count = span
    tiles = configs.query_gradient_tiles(query.shape[-1], query.dtype)
    sizes = [B * count * N * math.prod(group.patch) * (2 if cosine else 1) for group in groups]
    patches = query.new_empty(sum(sizes), dtype=saved.maximum.dtype)
    for group, own_order, own in zip(groups, order, patches.split(sizes), strict=True):
        if group.has_gradient:
            has_points, has_centre = group.grad_points is not None, group.grad_centre is not None
            launch(
                triton_gradients.correlation_soft_argmax_bwd_kernel_query, B * count * triton.cdiv(N, tiles.block_n),
                *inputs.tensors, own_order, group.centres, saved.points, saved.maximum, saved.weight,
                group.grad_points if has_points else saved.points,
                group.grad_centre if has_centre else saved.maximum, own, grad_query,
                T, N, h, w, C, count, first, has_points, has_centre, *group.reach, *group.patch, group.limit,
                temperature, *strides,
                **inputs.constants(tiles), TILE_H=tiles.tile_h, TILE_W=tiles.tile_w, STAGES=tiles.num_stages,
            )  # fmt: skip
    return patches


def _features_gradient(
    inputs: _Inputs,
    groups: list[_Group],
    entries: tuple[Tensor, Tensor, Tensor],
    patches: Tensor,
    grad_mean: Tensor | None,
    eps: float,
    span: tuple[int, int],
    grad_features: Tensor,
) -> None:
    """Writes the gradient of the frames of `span`."""
    query, *_ = inputs.tensors
    _, strides, B, T, N, h, w, C, cosine = inputs
    first, count = span
    discs, first_group = groups[0], 0 if groups[0].has_gradient else 1
    minima = B * count * N * math.prod(discs.patch) * (2 if cosine else 1)
    tiles = configs.features_gradient_tiles(query.shape[-1], query.dtype)
    # Vectors shorter than sqrt(eps) have this inverse norm, up to rounding.
    longest = eps**-0.5 * (1 - 4 * torch.finfo(patches.dtype).eps)
    launch(
        triton_gradients.correlation_soft_argmax_bwd_kernel_features,
        B * count * triton.cdiv(h, tiles.tile_h) * triton.cdiv(w, tiles.tile_w),
        *inputs.tensors, *entries, patches, patches if grad_mean is None else grad_mean, grad_features,
        T, N, h, w, C, count, first, first_group, len(groups), grad_mean is not None,
        *discs.reach, *discs.patch, discs.limit, minima, B * T, longest, *strides,
        **inputs.constants(tiles), BAND=configs.BAND, TILE_H=tiles.tile_h, TILE_W=tiles.tile_w,
    )  # fmt: skip


def _through_the_norm(inputs: _Inputs, grad: Tensor, eps: float) -> Tensor:
    """The gradient of the queries from that of the normalised ones; see csrc/correlation_soft_argmax/cells.h."""
    query, _, inverse_norm, _ = inputs.tensors
    accurate = query.to(grad.dtype)
    unit = accurate * inverse_norm[..., None]
    along = torch.where(accurate.square().sum(-1) < eps, 0, (grad * unit).sum(-1))
    return (grad - unit * along[..., None]) * inverse_norm[..., None]


def soft_argmax_2d_forward(cost: Tensor, temperature: float, radius: float) -> Outputs2d:
    """cost `[..., h, w]`; see `op.Outputs2d`."""
    outputs, (h, w) = allocate_2d(cost), cost.shape[-2:]
    limit, reach = disc(radius, h, w)
    cost = cost.reshape(-1, h, w)
    launch(
        triton_soft_argmax.soft_argmax_2d_fwd_kernel, cost.shape[0],
        cost, *outputs, h, w, *reach, limit, temperature, *cost.stride(), ALIGNED=_rows_aligned(cost),
        **configs.SOFT_ARGMAX_TILES, **configs.DISC_TILES,
    )  # fmt: skip
    return outputs


def soft_argmax_2d_backward(
    grad_points: Tensor, cost: Tensor, saved: Outputs2d, temperature: float, radius: float
) -> Tensor:
    """Gradient of the cost volume, zero outside of the disc."""
    h, w = cost.shape[-2:]
    grad_cost = cost.new_empty(cost.shape)
    cost = cost.reshape(-1, h, w)
    limit, reach = disc(radius, h, w)
    launch(
        triton_soft_argmax.soft_argmax_2d_bwd_kernel, cost.shape[0],
        grad_points.contiguous(), cost, *(x.contiguous() for x in saved), grad_cost,
        h, w, reach[0], limit, temperature, *cost.stride(), ALIGNED=_rows_aligned(cost),
        **configs.SOFT_ARGMAX_TILES,
    )  # fmt: skip
    return grad_cost


def _rows_aligned(cost: Tensor) -> bool:
    """Whether every row of `[frames, h, w]` starts on 16 bytes and holds whole vectors of eight adjacent numbers."""
    frame, row, column = cost.stride()
    return column == 1 and not (frame | row | cost.shape[2]) % UNIT.value and starts_on_16_bytes(cost)


def _keys(centres: Tensor, w: int) -> Tensor:
    """`[..., T, N]` of cells `[..., N, T]`: band * w + column."""
    row = centres // w
    return (row // configs.BAND * w + centres - row * w).mT.contiguous()


def _sorted(centres: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and their centres in the order of triton_discs.py, `[..., T, N]`, and where each band's columns begin."""
    keys, order = torch.sort(_keys(centres, w), stable=True)
    boundaries = torch.arange(triton.cdiv(h, configs.BAND) * w + 1, device=keys.device, dtype=keys.dtype)
    starts = torch.searchsorted(keys, boundaries.expand(*keys.shape[:-1], -1).contiguous(), out_int32=True)
    return order, centres.mT.gather(-1, order), starts
