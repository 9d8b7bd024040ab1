"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import adjacent_channels
from tritonkern.ops.correlation_soft_argmax.op import (
    Grads,
    Outputs,
    Outputs2d,
    Saved,
    allocate,
    allocate_2d,
    disc_limit,
)


def forward(query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float) -> Outputs:
    """query `[B, N, C]`, features `[B, T, h, w, C]`; see `op.Outputs`."""
    query, features = adjacent_channels(query), adjacent_channels(features)
    outputs = allocate(query, features, cosine)
    limit, threads = disc_limit(radius), torch.get_num_threads()
    _cpp.correlation_soft_argmax_forward(query, features, temperature, limit, cosine, eps, threads, *outputs)
    return outputs


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
    """Gradients of query and features, contiguous."""
    query, features = adjacent_channels(query), adjacent_channels(features)
    grad_query, grad_features = query.new_empty(query.shape), features.new_empty(features.shape)
    # Gradients may be expanded from one number; they and the saved tensors are small.
    grads = Grads(*(x if x is None else x.contiguous() for x in grad))
    kept = Saved(*(x.contiguous() for x in saved))
    limit, threads = disc_limit(radius), torch.get_num_threads()
    _cpp.correlation_soft_argmax_backward(
        *grads, query, features, *kept, temperature, limit, cosine, eps, threads, grad_query, grad_features
    )
    return grad_query, grad_features


def soft_argmax_2d_forward(cost: Tensor, temperature: float, radius: float) -> Outputs2d:
    """cost `[..., h, w]`; see `op.Outputs2d`."""
    frames, cost = cost.shape[:-2], _with_three_axes_of_frames(cost)
    outputs = allocate_2d(cost)
    _cpp.soft_argmax_2d_forward(cost, temperature, disc_limit(radius), torch.get_num_threads(), *outputs)
    if len(frames) == 3:
        return outputs
    points, *others = outputs
    return Outputs2d(points.view(*frames, 2), *(x.view(frames) for x in others))


def soft_argmax_2d_backward(
    grad_points: Tensor, cost: Tensor, saved: Outputs2d, temperature: float, radius: float
) -> Tensor:
    """Gradient of the cost volume, contiguous."""
    shape, cost = cost.shape, _with_three_axes_of_frames(cost)
    frames, grad_cost = cost.shape[:3], cost.new_empty(cost.shape)
    grad_points = grad_points.contiguous().view(*frames, 2)
    points, maximum, best, weight = (x.contiguous() for x in saved)
    kept = points.view(*frames, 2), maximum.view(frames), best.view(frames), weight.view(frames)
    limit, threads = disc_limit(radius), torch.get_num_threads()
    _cpp.soft_argmax_2d_backward(grad_points, cost, *kept, temperature, limit, threads, grad_cost)
    return grad_cost.view(shape)


def _with_three_axes_of_frames(cost: Tensor) -> Tensor:
    if cost.dim() >= 5:
        return cost.flatten(0, -5)
    return cost[(None,) * (5 - cost.dim())]
