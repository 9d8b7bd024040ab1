"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import accumulator, adjacent_channels
from tritonkern.ops.query_key_matching.op import Outputs, allocate, allocate_cost, check_range, disc_limit


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


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
    if outputs.peak.numel():
        _cpp.query_key_matching_forward(
            *_inputs(query, key, cells), source, height, width, scale, symmetric, disc_limit(radius),
            torch.get_num_threads(), *outputs,
        )  # fmt: skip
    return outputs


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
    if index.numel() == 0:
        return _zeros(query, key)
    grads = query.new_empty(query.shape), key.new_empty(key.shape)
    _cpp.query_key_matching_backward(
        _contiguous(grad_peak), _contiguous(grad_points), *_inputs(query, key, cells), index.contiguous(),
        points.contiguous(), weight.contiguous(), source, height, width, scale, symmetric, disc_limit(radius),
        torch.get_num_threads(), *grads,
    )  # fmt: skip
    return grads


def cost_forward(
    query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> Tensor:
    """As `op.query_key_cost_fwd`."""
    cost = allocate_cost(query, cells)
    if cost.numel():
        threads = torch.get_num_threads()
        _cpp.query_key_cost_forward(*_inputs(query, key, cells), source, scale, symmetric, threads, cost)
    return cost


def cost_backward(
    grad_cost: Tensor, query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """As `op.query_key_cost_bwd`."""
    if grad_cost.numel() == 0:
        return _zeros(query, key)
    grads = query.new_empty(query.shape), key.new_empty(key.shape)
    threads = torch.get_num_threads()
    _cpp.query_key_cost_backward(
        grad_cost.contiguous(), *_inputs(query, key, cells), source, scale, symmetric, threads, *grads
    )
    return grads


def row_statistics(
    rows: Tensor, key: Tensor, mask: Tensor | None, segments: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """As `op.attention_row_statistics_fwd`."""
    shape, dtype = (*rows.shape[:2], len(segments) // 2), accumulator(rows.dtype)
    results = rows.new_empty(shape, dtype=dtype), rows.new_empty(shape, dtype=dtype)
    if results[0].numel():
        bounds = torch.tensor(segments, dtype=torch.int64).view(-1, 2)
        threads = torch.get_num_threads()
        _cpp.attention_row_statistics(
            adjacent_channels(rows), adjacent_channels(key), _contiguous(mask), bounds, scale, threads, *results
        )
    return results


def frame_local_attention(
    query: Tensor, key: Tensor, value: Tensor, text: int, frames: int, text_last: bool, renormalise: bool, scale: float
) -> Tensor:
    """As `op.frame_local_attention_fwd`."""
    out = query.new_empty(query.shape)
    if out.numel():
        query, key, value = (adjacent_channels(x) for x in (query, key, value))
        threads = torch.get_num_threads()
        _cpp.frame_local_attention(query, key, value, text, frames, text_last, renormalise, scale, threads, out)
    return out


def _inputs(query: Tensor, key: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    check_range(cells, query.shape[2])
    return adjacent_channels(query), adjacent_channels(key), _contiguous(cells)


def _zeros(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_zeros(query.shape), key.new_zeros(key.shape)
