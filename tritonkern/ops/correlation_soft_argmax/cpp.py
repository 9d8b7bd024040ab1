"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES, accumulator, adjacent_channels


def forward(
    query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float
) -> tuple[Tensor, ...]:
    """query `[B, N, C]`, features `[B, T, h, w, C]` -> what `op.Forward` lists."""
    query, features = adjacent_channels(query), adjacent_channels(features)
    shape = _shape(query, features)
    pairs, dtype = shape[:3], accumulator(query.dtype)
    points = query.new_empty((*pairs, 2), dtype=dtype)
    mean, maximum, minimum, weight = (query.new_empty(pairs, dtype=dtype) for _ in range(4))
    best, worst = (query.new_empty(pairs, dtype=torch.int32) for _ in range(2))
    query_scale = query.new_empty(query.shape[:2] if cosine else (0,), dtype=dtype)
    features_scale = query.new_empty(features.shape[:4] if cosine else (0,), dtype=dtype)
    results = (points, mean, maximum, minimum, best, worst, weight, query_scale, features_scale)
    _cpp.correlation_soft_argmax_forward(
        CPP_DTYPES[query.dtype],
        shape,
        temperature,
        radius,
        cosine,
        eps,
        torch.get_num_threads(),
        _strided(query, 5),
        _strided(features, 5),
        [x.data_ptr() for x in results],
    )
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
    """Gradients of query and features, contiguous."""
    query, features = adjacent_channels(query), adjacent_channels(features)
    grad_query, grad_features = query.new_empty(query.shape), features.new_empty(features.shape)
    # Gradients may be expanded from one number; they and the saved tensors are small.
    grads = [x if x is None else x.contiguous() for x in (grad_points, grad_mean, grad_max, grad_min)]
    saved = [x.contiguous() for x in (points, maximum, best, worst, weight, query_scale, features_scale)]
    address = [x.data_ptr() for x in saved]
    _cpp.correlation_soft_argmax_backward(
        CPP_DTYPES[query.dtype],
        _shape(query, features),
        temperature,
        radius,
        cosine,
        eps,
        torch.get_num_threads(),
        _strided(query, 5),
        _strided(features, 5),
        [address[0], 0, address[1], 0, *address[2:]],
        [0 if x is None else x.data_ptr() for x in grads],
        grad_query.data_ptr(),
        grad_features.data_ptr(),
    )
    return grad_query, grad_features


def soft_argmax_forward(cost: Tensor, temperature: float, radius: float) -> tuple[Tensor, ...]:
    """cost `[..., h, w]` -> points `[..., 2]`, maximum, best (flat cell, int32) and weight, all `[...]`."""
    frames, dtype = cost.shape[:-2], accumulator(cost.dtype)
    cost = _with_three_axes_of_frames(cost)
    points = cost.new_empty((*frames, 2), dtype=dtype)
    maximum, weight = (cost.new_empty(frames, dtype=dtype) for _ in range(2))
    best = cost.new_empty(frames, dtype=torch.int32)
    if best.numel():
        _cpp.soft_argmax_forward(
            CPP_DTYPES[cost.dtype],
            cost.shape,
            temperature,
            radius,
            torch.get_num_threads(),
            _strided(cost, 5),
            [x.data_ptr() for x in (points, maximum, best, weight)],
        )
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
    """Gradient of the cost volume, contiguous."""
    grad_cost = cost.new_empty(cost.shape)
    cost = _with_three_axes_of_frames(cost)
    grad_points = grad_points.contiguous()
    saved = [x.contiguous() for x in (points, maximum, best, weight)]
    if best.numel():
        _cpp.soft_argmax_backward(
            CPP_DTYPES[cost.dtype],
            cost.shape,
            temperature,
            radius,
            torch.get_num_threads(),
            _strided(cost, 5),
            [x.data_ptr() for x in saved],
            grad_points.data_ptr(),
            grad_cost.data_ptr(),
        )
    return grad_cost


def _shape(query: Tensor, features: Tensor) -> tuple[int, ...]:
    """B, N, T, h, w, C."""
    return (*query.shape[:2], *features.shape[1:])


def _with_three_axes_of_frames(cost: Tensor) -> Tensor:
    if cost.dim() > 5:
        cost = cost.flatten(0, -5)
    return cost[(None,) * (5 - cost.dim())]


def _strided(x: Tensor, axes: int) -> tuple[int, Sequence[int]]:
    return x.data_ptr(), (*x.stride(), *(0,) * (axes - x.dim()))
