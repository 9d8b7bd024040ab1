"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import accumulator, adjacent_channels
from tritonkern.ops.correlation_soft_argmax.op import Grads, Outputs, Outputs2d, Saved, disc_limit


def forward(query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float) -> Outputs:
    """query `[B, N, C]`, features `[B, T, h, w, C]`; see `op.Outputs`."""
    query, features = adjacent_channels(query), adjacent_channels(features)
    pairs, dtype = (*query.shape[:2], features.shape[1]), accumulator(query.dtype)
    outputs = Outputs(
        points=query.new_empty((*pairs, 2), dtype=dtype),
        mean=query.new_empty(pairs, dtype=dtype),
        maximum=query.new_empty(pairs, dtype=dtype),
        minimum=query.new_empty(pairs, dtype=dtype),
        best=query.new_empty(pairs, dtype=torch.int32),
        worst=query.new_empty(pairs, dtype=torch.int32),
        weight=query.new_empty(pairs, dtype=dtype),
        query_inverse_norm=query.new_empty(query.shape[:2] if cosine else (0,), dtype=dtype),
        features_inverse_norm=query.new_empty(features.shape[:4] if cosine else (0,), dtype=dtype),
    )
    options = temperature, disc_limit(radius), cosine, eps, torch.get_num_threads()
    _cpp.correlation_soft_argmax_forward(query, features, *options, *outputs)
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
    grads = [x if x is None else x.contiguous() for x in grad]
    kept = [x.contiguous() for x in saved]
    options = temperature, disc_limit(radius), cosine, eps, torch.get_num_threads()
    _cpp.correlation_soft_argmax_backward(*grads, query, features, *kept, *options, grad_query, grad_features)
    return grad_query, grad_features


def soft_argmax_2d_forward(cost: Tensor, temperature: float, radius: float) -> Outputs2d:
    """cost `[..., h, w]`; see `op.Outputs2d`."""
    frames, dtype = cost.shape[:-2], accumulator(cost.dtype)
    cost = _with_three_axes_of_frames(cost)
    three = cost.shape[:3]
    points = cost.new_empty((*three, 2), dtype=dtype)
    maximum, weight = cost.new_empty(three, dtype=dtype), cost.new_empty(three, dtype=dtype)
    best = cost.new_empty(three, dtype=torch.int32)
    options = temperature, disc_limit(radius), torch.get_num_threads()
    _cpp.soft_argmax_2d_forward(cost, *options, points, maximum, best, weight)
    return Outputs2d(points.view(*frames, 2), maximum.view(frames), best.view(frames), weight.view(frames))


def soft_argmax_2d_backward(
    grad_points: Tensor, cost: Tensor, saved: Outputs2d, temperature: float, radius: float
) -> Tensor:
    """Gradient of the cost volume, contiguous."""
    shape = cost.shape
    cost = _with_three_axes_of_frames(cost)
    three = cost.shape[:3]
    grad_cost = cost.new_empty(cost.shape)
    points, maximum, best, weight = (x.contiguous() for x in saved)
    options = temperature, disc_limit(radius), torch.get_num_threads()
    _cpp.soft_argmax_2d_backward(
        grad_points.contiguous().view(*three, 2),
        cost,
        points.view(*three, 2),
        maximum.view(three),
        best.view(three),
        weight.view(three),
        *options,
        grad_cost,
    )
    return grad_cost.view(shape)


def _with_three_axes_of_frames(cost: Tensor) -> Tensor:
    if cost.dim() > 5:
        cost = cost.flatten(0, -5)
    return cost[(None,) * (5 - cost.dim())]
