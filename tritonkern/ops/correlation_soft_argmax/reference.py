"""Eager PyTorch, the plainest correct form; in float64 it is what the tests believe.

It is the only backend that builds the cost volume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._contract import accurate, full_precision


@full_precision
def forward(
    query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float
) -> tuple[Tensor, ...]:
    """query `[B, N, C]`, features `[B, T, h, w, C]` -> what `op.Forward` lists."""
    query, features = accurate(query), accurate(features)
    query_scale, features_scale = _scales(query, features, cosine, eps)
    cost = _cost(query, features, query_scale, features_scale)  # [B, N, T, h, w]
    points, maximum, best, weight = soft_argmax_forward(cost, temperature, radius)
    minimum, worst = _first_extremum(-cost)
    return points, cost.mean((-2, -1)), maximum, -minimum, best, worst, weight, query_scale, features_scale


@full_precision
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
    dtypes = query.dtype, features.dtype
    query, features = accurate(query), accurate(features)
    cost = _cost(query, features, query_scale, features_scale)
    grad_cost = cost.new_zeros(cost.shape)  # contiguous, so that flatten below is a view
    if grad_points is not None:
        grad_cost += soft_argmax_backward(grad_points, cost, points, maximum, best, weight, temperature, radius)
    if grad_mean is not None:
        grad_cost += (grad_mean / (cost.shape[-2] * cost.shape[-1]))[..., None, None]
    for grad, cell in ((grad_max, best), (grad_min, worst)):
        if grad is not None:
            grad_cost.flatten(-2).scatter_add_(-1, cell.long()[..., None], grad[..., None])

    if not cosine:
        grad_query = torch.einsum("bnthw,bthwc->bnc", grad_cost, features)
        grad_features = torch.einsum("bnthw,bnc->bthwc", grad_cost, query)
        return grad_query.to(dtypes[0]), grad_features.to(dtypes[1])
    unit_query, unit_features = query * query_scale[..., None], features * features_scale[..., None]
    grad_query = torch.einsum("bnthw,bthwc->bnc", grad_cost, unit_features)
    grad_features = torch.einsum("bnthw,bnc->bthwc", grad_cost, unit_query)
    grad_query = _normalize_backward(grad_query, query, query_scale, eps)
    return grad_query.to(dtypes[0]), _normalize_backward(grad_features, features, features_scale, eps).to(dtypes[1])


def soft_argmax_forward(cost: Tensor, temperature: float, radius: float) -> tuple[Tensor, ...]:
    """cost `[..., h, w]` -> points `[..., 2]`, maximum, best (flat cell, int32) and weight, all `[...]`."""
    cost = accurate(cost)
    maximum, best = _first_extremum(cost)
    kept = _disc(best, cost.shape[-2:], radius)
    weights = torch.exp(temperature * (cost - maximum[..., None, None]))
    # A broken cell breaks the softmax of its whole frame, wherever it lies.
    broken = weights.sum((-2, -1)) * 0
    weights = torch.where(kept, weights, 0)
    weight = weights.sum((-2, -1)) + broken
    points = torch.stack([(weights * centre).sum((-2, -1)) for centre in _centres(cost)], -1) / weight[..., None]
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
    dtype, cost = cost.dtype, accurate(cost)
    x, y = _centres(cost)
    kept = _disc(best, cost.shape[-2:], radius)
    weights = torch.exp(temperature * (cost - maximum[..., None, None])) / weight[..., None, None]
    across = (x - points[..., 0, None, None]) * grad_points[..., 0, None, None]
    down = (y - points[..., 1, None, None]) * grad_points[..., 1, None, None]
    return torch.where(kept, temperature * weights * (across + down), 0).to(dtype)


def _scales(query: Tensor, features: Tensor, cosine: bool, eps: float) -> tuple[Tensor, Tensor]:
    if not cosine:
        return query.new_empty(0), features.new_empty(0)
    query_scale, features_scale = (x.square().sum(-1).clamp(min=eps).rsqrt() for x in (query, features))
    return query_scale, features_scale


def _cost(query: Tensor, features: Tensor, query_scale: Tensor, features_scale: Tensor) -> Tensor:
    if query_scale.numel():
        query, features = query * query_scale[..., None], features * features_scale[..., None]
    return torch.einsum("bnc,bthwc->bnthw", query, features)


def _normalize_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Through x * scale, where scale is constant for vectors shorter than sqrt(eps)."""
    along = (grad * x).sum(-1) * scale**3
    return grad * scale[..., None] - x * torch.where(x.square().sum(-1) < eps, 0, along)[..., None]


def _first_extremum(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each frame and the first cell that has it; a NaN is larger than everything."""
    cells = cost.flatten(-2)
    maximum = cells.amax(-1)
    matches = (cells == maximum[..., None]) | cells.isnan()
    return maximum, matches.int().argmax(-1).int()


def _centres(cost: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of every cell's centre, both `[h, w]`."""
    y, x = (torch.arange(n, device=cost.device, dtype=cost.dtype) + 0.5 for n in cost.shape[-2:])
    return torch.broadcast_tensors(x, y[:, None])


def _disc(best: Tensor, grid: torch.Size, radius: float) -> Tensor:
    """`[..., h, w]`: which cells lie strictly closer than `radius` to the best one."""
    rows, columns = (torch.arange(n, device=best.device) for n in grid)
    row, column = best // grid[1], best % grid[1]
    squared = (rows[:, None] - row[..., None, None]) ** 2 + (columns - column[..., None, None]) ** 2
    return squared < radius * radius
