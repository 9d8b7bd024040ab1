"""The launchers of the Triton kernels of query-key matching and of the two operations beside it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import launch, precision, readable
from tritonkern.ops.query_key_matching import configs
from tritonkern.ops.query_key_matching.op import Outputs, allocate, allocate_cost, disc_limit
from tritonkern.ops.query_key_matching.triton_backward import (
    query_key_matching_bwd_kernel_source,
    query_key_matching_bwd_kernel_sums,
    query_key_matching_bwd_kernel_target,
)
from tritonkern.ops.query_key_matching.triton_forward import (
    query_key_matching_fwd_kernel_cost,
    query_key_matching_fwd_kernel_lse,
    query_key_matching_fwd_kernel_match,
)
from tritonkern.ops.query_key_matching.triton_rows import (
    attention_row_statistics_fwd_kernel,
    frame_local_attention_fwd_kernel,
)

# Cells are numbered and strides counted in 32 bits.
_REACH = 2**34


class _Call:
    """Tensors with their strides, sizes and tiles, as all kernels of one call of matching take them."""

    def __init__(self, query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, choose) -> None:
        self.B, self.T, self.S, self.H, self.D = query.shape
        self.M = self.S if cells is None else cells.shape[1]
        self.dtype, self.real, self.device = query.dtype, accumulator(query.dtype), query.device
        (self.query, query_strides), (self.key, key_strides) = (readable(x, _REACH) for x in (query, key))
        self.strides = (*query_strides, *key_strides)
        self.has_cells = cells is not None
        self.cells = self.query if cells is None else cells.contiguous()  # not read without cells
        self.source, self.scale = source, scale
        self.tiles = choose(self.D, self.dtype)
        self.sizes = dict(
            ROWS=self.tiles.rows, OTHERS=self.tiles.others, BLOCK_C=self.tiles.channels,
            **configs.constants(self.tiles, self.dtype),
        )  # fmt: skip

    def new(self, *shape: int) -> Tensor:
        return self.query.new_empty(shape, dtype=self.real)

    def lse(self, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Log-sum-exps over the targets [B, T, H, M], and over the sources [B, T, H, S] if they are needed."""
        over_targets = self._lse(self.M, of_source=True, has_cells=self.has_cells)
        return over_targets, self._lse(self.S, of_source=False, has_cells=False) if symmetric else over_targets

    def _lse(self, count: int, of_source: bool, has_cells: bool) -> Tensor:
        lse = self.new(self.B, self.T, self.H, count)
        launch(
            query_key_matching_fwd_kernel_lse,
            self.B * self.T * self.H * triton.cdiv(count, self.tiles.rows),
            self.query, self.key, self.cells, self.query, lse,
            self.T, count, self.S, self.H, self.D, self.source, self.scale, *self.strides,
            OF_SOURCE=of_source, HAS_CELLS=has_cells, HAS_MASK=False, **self.sizes,
        )  # fmt: skip
        return lse


def forward(
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
    source: int,
    height: int,
    width: int,
    scale: float,
    symmetric: bool,
    radius: float,
) -> Outputs:
    """As `op.query_key_matching_fwd`."""
    outputs = allocate(query, cells)
    if outputs.peak.numel() == 0:
        return outputs
    call = _Call(query, key, cells, source, scale, configs.tiles)
    launch(
        query_key_matching_fwd_kernel_match, call.B * call.T * triton.cdiv(call.M, call.tiles.rows),
        call.query, call.key, call.cells, *call.lse(symmetric), *outputs,
        call.T, call.M, call.S, call.H, call.D, source, width, scale, disc_limit(radius), *call.strides,
        HAS_CELLS=call.has_cells, SYMMETRIC=symmetric, DISC=radius > 0, **call.sizes,
    )  # fmt: skip
    return outputs


def cost_forward(
    query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> Tensor:
    """As `op.query_key_cost_fwd`."""
    cost = allocate_cost(query, cells)
    if cost.numel() == 0:
        return cost
    call = _Call(query, key, cells, source, scale, configs.tiles)
    tiles = call.tiles
    launch(
        query_key_matching_fwd_kernel_cost,
        call.B * call.T * triton.cdiv(call.M, tiles.rows) * triton.cdiv(call.S, tiles.others),
        call.query, call.key, call.cells, *call.lse(symmetric), cost,
        call.T, call.M, call.S, call.H, call.D, source, scale, *call.strides,
        HAS_CELLS=call.has_cells, SYMMETRIC=symmetric, **call.sizes,
    )  # fmt: skip
    return cost


def backward(
    grad_peak: Tensor | None,
    grad_points: Tensor | None,
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
    index: Tensor,
    points: Tensor,
    weight: Tensor,
    source: int,
    height: int,
    width: int,
    scale: float,
    symmetric: bool,
    radius: float,
) -> tuple[Tensor, Tensor]:
    """As `op.query_key_matching_bwd`."""
    grad_peak = torch.zeros_like(weight) if grad_peak is None else grad_peak
    grad_points = torch.zeros_like(points) if grad_points is None else grad_points
    given = [x.contiguous() for x in (grad_peak, grad_points, index, points, weight)]
    return _gradients(given, query, key, cells, source, width, scale, symmetric, disc_limit(radius), False)


def cost_backward(
    grad_cost: Tensor, query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """As `op.query_key_cost_bwd`."""
    return _gradients([grad_cost.contiguous()] * 5, query, key, cells, source, 1, scale, symmetric, 0.0, True)


def _gradients(given, query, key, cells, source, width, scale, symmetric, limit, cost) -> tuple[Tensor, Tensor]:
    """The gradient of C is the first of `given` (cost), or is made of all five."""
    if given[0].numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape)
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    call = _Call(query, key, cells, source, scale, configs.gradient_tiles)
    tiles = call.tiles
    sizes = (call.T, call.M, call.S, call.H, call.D, source, width, scale, limit, *call.strides)
    lse = call.lse(symmetric)
    sums = [torch.empty_like(x) for x in lse]
    flags = dict(COST=cost, **call.sizes)
    pairs = call.B * call.T * call.H
    for over_targets, block in ((True, tiles.rows), (False, tiles.others))[: 2 if symmetric else 1]:
        kind = 0 if over_targets else 1
        launch(
            query_key_matching_bwd_kernel_sums, pairs * triton.cdiv(lse[kind].shape[-1], block),
            call.query, call.key, call.cells, lse[kind], *given, sums[kind], *sizes,
            OVER_TARGETS=over_targets, HAS_CELLS=call.has_cells, **flags,
        )  # fmt: skip
    flags |= dict(SYMMETRIC=symmetric, OF_GRADS=precision(call.dtype))
    parts = triton.cdiv(call.D, tiles.channels)
    launch(
        query_key_matching_bwd_kernel_target, pairs * triton.cdiv(call.S, tiles.others) * parts,
        call.query, call.key, call.cells, *lse, *sums, *given, grad_query, grad_key, *sizes,
        HAS_CELLS=call.has_cells, **flags,
    )  # fmt: skip

    def of_source(count: int, has_cells: bool, **kind: bool) -> list[Tensor]:
        made = [call.new(call.B, count, call.H, call.D) for _ in range(2)]
        launch(
            query_key_matching_bwd_kernel_source,
            call.B * call.H * triton.cdiv(count, tiles.rows) * parts,
            call.query, call.key, call.cells, *lse, *sums, *given, *made, call.T, count, *sizes[2:],
            HAS_CELLS=has_cells, **kind, **flags,
        )  # fmt: skip
        return made

    found = of_source(call.M, call.has_cells, QUERIES=True, GIVEN=True, SUMS=not call.has_cells)
    if cells is not None:
        where = cells.clamp(0, call.S - 1)[..., None, None].expand(-1, -1, call.H, call.D)
        spread = [call.new(call.B, call.S, call.H, call.D).zero_().scatter_add_(1, where, x) for x in found]
        if symmetric:
            spread[1] += of_source(call.S, False, QUERIES=False, GIVEN=False, SUMS=True)[1]
        found = spread
    for grad, own in zip((grad_query, grad_key), found, strict=True):
        grad[:, source] = (grad[:, source] + own).to(grad.dtype)
    return grad_query, grad_key


def row_statistics(
    rows: Tensor, key: Tensor, mask: Tensor | None, segments: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """As `op.attention_row_statistics_fwd`."""
    B, N, H, D = rows.shape
    J, G, real = key.shape[1], len(segments) // 2, accumulator(rows.dtype)
    results = rows.new_empty((B, N, G), dtype=real), rows.new_empty((B, N, G), dtype=real)
    if results[0].numel() == 0:
        return results
    tiles = configs.tiles(D, rows.dtype)
    sizes = dict(
        HAS_MASK=mask is not None, ROWS=tiles.rows, OTHERS=tiles.others, BLOCK_C=tiles.channels,
        **configs.constants(tiles, rows.dtype),
    )  # fmt: skip
    (rows, row_strides), (key, key_strides) = (readable(x[:, None], _REACH) for x in (rows, key))
    mask = rows if mask is None else mask.contiguous()  # not read without a mask
    lse = rows.new_empty((B, H, N), dtype=real)
    blocks = triton.cdiv(N, tiles.rows)
    launch(
        query_key_matching_fwd_kernel_lse, B * H * blocks,
        rows, key, rows, mask, lse, 1, N, J, H, D, 0, scale, *row_strides, *key_strides,
        OF_SOURCE=True, HAS_CELLS=False, **sizes,
    )  # fmt: skip
    for first in range(0, G, 4):
        count, bounds = min(4, G - first), segments[2 * first : 2 * first + 8]
        launch(
            attention_row_statistics_fwd_kernel, B * blocks * count,
            rows, key, mask, lse, *results, N, J, H, D, G, first, count, *bounds, *[0] * (8 - len(bounds)), scale,
            *row_strides, *key_strides, **sizes,
        )  # fmt: skip
    return results


def frame_local_attention(
    query: Tensor, key: Tensor, value: Tensor, text: int, frames: int, text_last: bool, renormalise: bool, scale: float
) -> Tensor:
    """As `op.frame_local_attention_fwd`."""
    B, n, H, D = query.shape
    if D > configs.MAX_HEAD_DIM:
        raise ValueError(f"query must have at most {configs.MAX_HEAD_DIM} channels on the triton backend, got {D}")
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    cells, tiles, dtype = (n - text) // frames, configs.frame_tiles(D, query.dtype), query.dtype
    tensors, strides = zip(*(readable(x[:, None], _REACH) for x in (query, key, value)), strict=True)
    blocks = triton.cdiv(text, tiles.rows) + frames * triton.cdiv(cells, tiles.rows)
    launch(
        frame_local_attention_fwd_kernel, B * H * blocks,
        *tensors, out, n, H, D, text, frames, cells, scale, *(x for stride in strides for x in stride),
        TEXT_LAST=text_last, RENORMALISE=renormalise, DOUBLE=dtype == torch.float64,
        ROWS=tiles.rows, OTHERS=tiles.others, BLOCK_D=tiles.channels,
        OF_VALUES=precision(dtype), **configs.constants(tiles, dtype),
    )  # fmt: skip
    return out
