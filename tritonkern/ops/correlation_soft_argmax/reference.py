"""Eager PyTorch, the plainest correct form; in float64 it is the oracle of the tests.

The only backend that builds the cost volume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision
from tritonkern.ops.correlation_soft_argmax.op import Grads, Outputs, Outputs2d, Saved, disc_limit


@full_precision
def forward(query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float) -> Outputs:
    """query `[B, N, C]`, features `[B, T, h, w, C]`; see `op.Outputs`."""
    query, features = accurate(query), accurate(features)
    inverse_norms = [x.square().sum(-1).clamp(min=eps).rsqrt() if cosine else x.new_empty(0) for x in (query, features)]
    cost = _cost(_unit(query, inverse_norms[0]), _unit(features, inverse_norms[1]))
    points, maximum, best, weight = soft_argmax_2d_forward(cost, temperature, radius)
    minimum, worst = _first_extremum(-cost)
    return Outputs(points, cost.mean((-2, -1)), maximum, -minimum, best, worst, weight, *inverse_norms)


@full_precision
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
    dtype, query, features = query.dtype, accurate(query), accurate(features)
    unit_query, unit_features = _unit(query, saved.query_inverse_norm), _unit(features, saved.features_inverse_norm)
    cost = _cost(unit_query, unit_features)
    rows, columns = cost.shape[-2:]
    number = torch.arange(rows * columns, device=cost.device).view(rows, columns)
    grad_cost = torch.zeros_like(cost)
    if grad.points is not None:
        peak = Outputs2d(saved.points, saved.maximum, saved.best, saved.weight)
        grad_cost += soft_argmax_2d_backward(grad.points, cost, peak, temperature, radius)
    if grad.mean is not None:
        grad_cost += (grad.mean / (rows * columns))[..., None, None]
    for grad_extremum, cell in ((grad.maximum, saved.best), (grad.minimum, saved.worst)):
        if grad_extremum is not None:
            grad_cost += torch.where(cell[..., None, None] == number, grad_extremum[..., None, None], 0)

    grad_query = torch.einsum("bnthw,bthwc->bnc", grad_cost, unit_features)
    grad_features = torch.einsum("bnthw,bnc->bthwc", grad_cost, unit_query)
    if cosine:
        grad_query = _normalize_backward(grad_query, query, saved.query_inverse_norm, eps)
        grad_features = _normalize_backward(grad_features, features, saved.features_inverse_norm, eps)
    return grad_query.to(dtype), grad_features.to(dtype)


def soft_argmax_2d_forward(cost: Tensor, temperature: float, radius: float) -> Outputs2d:
    """cost `[..., h, w]`; see `op.Outputs2d`."""
    cost = accurate(cost)
    maximum, best = _first_extremum(cost)
    weights = torch.exp(temperature * (cost - maximum[..., None, None]))
    # A cell that is not finite spoils the softmax of its whole frame, also from outside of the disc.
    poison = weights.sum((-2, -1)) * 0
    weights = torch.where(_disc(best, cost.shape[-2:], radius), weights, 0)
    weight = weights.sum((-2, -1)) + poison
    points = torch.stack([(weights * centre).sum((-2, -1)) for centre in _centres(cost)], -1) / weight[..., None]
    return Outputs2d(points, maximum, best, weight)


def soft_argmax_2d_backward(
    grad_points: Tensor, cost: Tensor, saved: Outputs2d, temperature: float, radius: float
) -> Tensor:
    """Gradient of the cost volume, zero outside of the disc."""
    dtype, cost = cost.dtype, accurate(cost)
    x, y = _centres(cost)
    weights = torch.exp(temperature * (cost - saved.maximum[..., None, None])) / saved.weight[..., None, None]
    across = (x - saved.points[..., 0, None, None]) * grad_points[..., 0, None, None]
    down = (y - saved.points[..., 1, None, None]) * grad_points[..., 1, None, None]
    disc = _disc(saved.best, cost.shape[-2:], radius)
    return torch.where(disc, temperature * weights * (across + down), 0).to(dtype)


def _unit(x: Tensor, inverse_norm: Tensor) -> Tensor:
    """`x`, with cosine normalised; without it the inverse norms have shape `[0]`."""
    return x if inverse_norm.shape == (0,) else x * inverse_norm[..., None]


def _cost(query: Tensor, features: Tensor) -> Tensor:
    return torch.einsum("bnc,bthwc->bnthw", query, features)


def _normalize_backward(grad: Tensor, x: Tensor, inverse_norm: Tensor, eps: float) -> Tensor:
    """Through u = x * inverse_norm, where the factor is constant for vectors shorter than sqrt(eps)."""
    unit = x * inverse_norm[..., None]
    along = torch.where(x.square().sum(-1) < eps, 0, (grad * unit).sum(-1))
    return (grad - unit * along[..., None]) * inverse_norm[..., None]


def _first_extremum(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each frame and the first cell that has it; a NaN is larger than every number."""
    cells = cost.flatten(-2)
    maximum = cells.amax(-1)
    matches = (cells == maximum[..., None]) | cells.isnan()
    return maximum, matches.int().argmax(-1).int()


def _centres(cost: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of every cell's centre, both `[h, w]`."""
    y, x = (torch.arange(n, device=cost.device, dtype=cost.dtype) + 0.5 for n in cost.shape[-2:])
    return torch.broadcast_tensors(x, y[:, None])


def _disc(best: Tensor, grid: torch.Size, radius: float) -> Tensor:
    """`[..., h, w]`: which cells are strictly closer than `radius` to the best one."""
    rows, columns = (torch.arange(n, device=best.device) for n in grid)
    row, column = best // grid[1], best % grid[1]
    squared = (rows[:, None] - row[..., None, None]) ** 2 + (columns - column[..., None, None]) ** 2
    return squared < disc_limit(radius)
