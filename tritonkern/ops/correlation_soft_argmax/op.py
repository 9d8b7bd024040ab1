"""Contract, operators and gradients of the correlation with soft-argmax, and of the soft-argmax alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import accumulator, check_dense, check_saved

NAME = "correlation_soft_argmax"
# Flat cell numbers are int32 in the kernels.
MAX_CELLS = 2**30


class Forward(NamedTuple):
    """What every backend's `forward` returns, contiguous, in float32 (float64 for float64) where not said otherwise."""

    points: Tensor
    """[B, N, T, 2] (x, y) in cells; cell i has its centre at i + 0.5."""
    mean: Tensor
    """[B, N, T], as maximum and minimum: over the cells of the frame."""
    maximum: Tensor
    minimum: Tensor
    best: Tensor
    """[B, N, T] int32: the first cell (row * w + column) that has the maximum; the first NaN where there is one."""
    worst: Tensor
    """[B, N, T] int32: the same for the minimum."""
    weight: Tensor
    """[B, N, T]: sum over the disc of exp(temperature * (cost - maximum)); NaN where the point is."""
    query_scale: Tensor
    """[B, N]: 1 / sqrt(max(sum of squares, eps)); [0] unless cosine."""
    features_scale: Tensor
    """[B, T, h, w]: likewise."""


class SoftArgmax(NamedTuple):
    """What every backend's `soft_argmax_forward` returns, for a cost volume `[..., h, w]`; see `Forward`."""

    points: Tensor
    maximum: Tensor
    best: Tensor
    weight: Tensor


def check_tensors(query: Tensor, features: Tensor) -> None:
    """Raise TypeError or ValueError unless the two tensors fit together."""
    for name, x, shape in (("query", query, "[B, N, C]"), ("features", features, "[B, T, h, w, C]")):
        check_dense(name, x)
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if features.dtype != query.dtype:
        raise TypeError(f"features must have the dtype of query, {query.dtype}, got {features.dtype}; convert one")
    if features.device != query.device:
        raise ValueError(f"features must be on the device of query, {query.device}, got {features.device}; move one")
    for axis, meaning in ((0, "batch size B"), (-1, "number of channels C")):
        if features.shape[axis] != query.shape[axis]:
            raise ValueError(
                f"features must have the {meaning} of query, {query.shape[axis]}, got {features.shape[axis]} "
                f"(query {tuple(query.shape)}, features {tuple(features.shape)})"
            )
    if query.shape[-1] == 0:
        raise ValueError("query must have at least one channel, got C = 0")
    _check_grid("features", features.shape[2], features.shape[3])


def check_cost_volume(cost_volume: Tensor) -> None:
    """Raise TypeError or ValueError unless this is a `[..., h, w]` with at least one cell."""
    check_dense("cost_volume", cost_volume)
    if cost_volume.dim() < 2:
        raise ValueError(f"cost_volume must have shape [..., h, w], got {tuple(cost_volume.shape)}")
    _check_grid("cost_volume", *cost_volume.shape[-2:])


def check_options(temperature: float, radius: float, eps: float = 1.0) -> None:
    """Raise ValueError unless all are positive in float32; the radius alone may be infinite."""
    # Comparisons, as torch.compile knows no math.isinf of a number that it has made a variable.
    for name, x in (("temperature", temperature), ("radius", radius), ("eps", eps)):
        if not x >= 1.2e-38 or (x == math.inf and name != "radius"):
            finite = "" if name == "radius" else " finite"
            raise ValueError(f"{name} must be a positive{finite} number, got {x}; the smallest is 1.2e-38")


def _check_grid(name: str, rows: int, columns: int) -> None:
    if rows == 0 or columns == 0:
        raise ValueError(f"{name} must have at least one cell, got a grid of {rows} x {columns}")
    if rows * columns > MAX_CELLS:
        raise ValueError(f"{name} must have at most 2**30 cells a frame, got {rows} x {columns}")


def _forward(
    query: Tensor,
    features: Tensor,
    temperature: float,
    radius: float,
    cosine: bool,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    check_tensors(query, features)
    check_options(temperature, radius, eps)
    kernels = _backends.load(NAME, query.device, backend)
    return kernels.forward(query, features, temperature, radius, cosine, eps)


def _forward_fake(
    query: Tensor,
    features: Tensor,
    temperature: float,
    radius: float,
    cosine: bool,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    check_tensors(query, features)
    check_options(temperature, radius, eps)
    pairs = (query.shape[0], query.shape[1], features.shape[1])
    dtype = accumulator(query.dtype)
    real, whole = (lambda shape: query.new_empty(shape, dtype=dtype)), torch.int32
    return Forward(
        points=real((*pairs, 2)),
        mean=real(pairs),
        maximum=real(pairs),
        minimum=real(pairs),
        best=query.new_empty(pairs, dtype=whole),
        worst=query.new_empty(pairs, dtype=whole),
        weight=real(pairs),
        query_scale=real(query.shape[:2] if cosine else (0,)),
        features_scale=real(features.shape[:4] if cosine else (0,)),
    )


def _check_backward(grads, query, features, saved, temperature, radius, cosine, eps) -> None:
    check_tensors(query, features)
    check_options(temperature, radius, eps)
    pairs, dtype = (query.shape[0], query.shape[1], features.shape[1]), accumulator(query.dtype)
    grad_points, grad_mean, grad_max, grad_min = grads
    points, maximum, best, worst, weight, query_scale, features_scale = saved
    check_saved(
        {
            "grad_points": (grad_points, (*pairs, 2), dtype),
            "grad_mean": (grad_mean, pairs, dtype),
            "grad_max": (grad_max, pairs, dtype),
            "grad_min": (grad_min, pairs, dtype),
            "points": (points, (*pairs, 2), dtype),
            "maximum": (maximum, pairs, dtype),
            "best": (best, pairs, torch.int32),
            "worst": (worst, pairs, torch.int32),
            "weight": (weight, pairs, dtype),
            "query_scale": (query_scale, tuple(query.shape[:2]) if cosine else (0,), dtype),
            "features_scale": (features_scale, tuple(features.shape[:4]) if cosine else (0,), dtype),
        },
        query.device,
    )


def _backward(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    grads = (grad_points, grad_mean, grad_max, grad_min)
    saved = (points, maximum, best, worst, weight, query_scale, features_scale)
    _check_backward(grads, query, features, saved, temperature, radius, cosine, eps)
    kernels = _backends.load(NAME, query.device, backend)
    return kernels.backward(*grads, query, features, *saved, temperature, radius, cosine, eps)


def _backward_fake(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    grads = (grad_points, grad_mean, grad_max, grad_min)
    saved = (points, maximum, best, worst, weight, query_scale, features_scale)
    _check_backward(grads, query, features, saved, temperature, radius, cosine, eps)
    return query.new_empty(query.shape), features.new_empty(features.shape)


correlation_soft_argmax_fwd = _registry.define(
    "correlation_soft_argmax_fwd(Tensor query, Tensor features, float temperature, float radius, bool cosine,"
    " float eps, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
correlation_soft_argmax_bwd = _registry.define(
    "correlation_soft_argmax_bwd(Tensor? grad_points, Tensor? grad_mean, Tensor? grad_max, Tensor? grad_min,"
    " Tensor query, Tensor features, Tensor points, Tensor maximum, Tensor best, Tensor worst, Tensor weight,"
    " Tensor query_scale, Tensor features_scale, float temperature, float radius, bool cosine, float eps,"
    " str? backend=None) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    query, features, *ctx.options = inputs
    result = Forward(*output)
    ctx.mark_non_differentiable(*result[4:])
    ctx.set_materialize_grads(False)
    saved = (result.points, result.maximum, result.best, result.worst, *result[6:])
    ctx.save_for_backward(query, features, *saved)


def _gradient(ctx, grad_points, grad_mean, grad_max, grad_min, *_):
    grads = (grad_points, grad_mean, grad_max, grad_min)
    if all(grad is None for grad in grads):
        return (None, None, *(None for _ in ctx.options))
    results = correlation_soft_argmax_bwd(*grads, *ctx.saved_tensors, *ctx.options)
    needed = (grad if need else None for grad, need in zip(results, ctx.needs_input_grad, strict=False))
    return (*needed, *(None for _ in ctx.options))


_registry.attach_gradient(correlation_soft_argmax_fwd, _setup_context, _gradient)
_registry.forbid_gradient(correlation_soft_argmax_bwd, NAME)


def _soft_argmax_forward(
    cost_volume: Tensor, temperature: float, radius: float, backend: str | None = None
) -> tuple[Tensor, ...]:
    check_cost_volume(cost_volume)
    check_options(temperature, radius)
    kernels = _backends.load(NAME, cost_volume.device, backend)
    return kernels.soft_argmax_forward(cost_volume, temperature, radius)


def _soft_argmax_forward_fake(
    cost_volume: Tensor, temperature: float, radius: float, backend: str | None = None
) -> tuple[Tensor, ...]:
    check_cost_volume(cost_volume)
    check_options(temperature, radius)
    frames, dtype = cost_volume.shape[:-2], accumulator(cost_volume.dtype)
    return SoftArgmax(
        points=cost_volume.new_empty((*frames, 2), dtype=dtype),
        maximum=cost_volume.new_empty(frames, dtype=dtype),
        best=cost_volume.new_empty(frames, dtype=torch.int32),
        weight=cost_volume.new_empty(frames, dtype=dtype),
    )


def _check_soft_argmax_backward(grad_points, cost_volume, points, maximum, best, weight, temperature, radius) -> None:
    check_cost_volume(cost_volume)
    check_options(temperature, radius)
    frames, dtype = tuple(cost_volume.shape[:-2]), accumulator(cost_volume.dtype)
    check_saved(
        {
            "grad_points": (grad_points, (*frames, 2), dtype),
            "points": (points, (*frames, 2), dtype),
            "maximum": (maximum, frames, dtype),
            "best": (best, frames, torch.int32),
            "weight": (weight, frames, dtype),
        },
        cost_volume.device,
    )


def _soft_argmax_backward(
    grad_points: Tensor,
    cost_volume: Tensor,
    points: Tensor,
    maximum: Tensor,
    best: Tensor,
    weight: Tensor,
    temperature: float,
    radius: float,
    backend: str | None = None,
) -> Tensor:
    saved = (points, maximum, best, weight)
    _check_soft_argmax_backward(grad_points, cost_volume, *saved, temperature, radius)
    kernels = _backends.load(NAME, cost_volume.device, backend)
    return kernels.soft_argmax_backward(grad_points, cost_volume, *saved, temperature, radius)


def _soft_argmax_backward_fake(
    grad_points: Tensor,
    cost_volume: Tensor,
    points: Tensor,
    maximum: Tensor,
    best: Tensor,
    weight: Tensor,
    temperature: float,
    radius: float,
    backend: str | None = None,
) -> Tensor:
    _check_soft_argmax_backward(grad_points, cost_volume, points, maximum, best, weight, temperature, radius)
    return cost_volume.new_empty(cost_volume.shape)


soft_argmax_2d_fwd = _registry.define(
    "soft_argmax_2d_fwd(Tensor cost_volume, float temperature, float radius, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _soft_argmax_forward,
    _soft_argmax_forward_fake,
)
soft_argmax_2d_bwd = _registry.define(
    "soft_argmax_2d_bwd(Tensor grad_points, Tensor cost_volume, Tensor points, Tensor maximum, Tensor best,"
    " Tensor weight, float temperature, float radius, str? backend=None) -> Tensor",
    _soft_argmax_backward,
    _soft_argmax_backward_fake,
)


def _soft_argmax_setup_context(ctx, inputs, output):
    cost_volume, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(cost_volume, *output)


def _soft_argmax_gradient(ctx, grad_points, *_):
    return (soft_argmax_2d_bwd(grad_points, *ctx.saved_tensors, *ctx.options), *(None for _ in ctx.options))


_registry.attach_gradient(soft_argmax_2d_fwd, _soft_argmax_setup_context, _soft_argmax_gradient)
_registry.forbid_gradient(soft_argmax_2d_bwd, "soft_argmax_2d")
