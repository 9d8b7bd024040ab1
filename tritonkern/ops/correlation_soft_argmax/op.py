"""Checks, operators and gradients of the correlation with soft-argmax, and of the soft-argmax alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonkern.ops._checks import check_same_dtype, check_saved, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "correlation_soft_argmax"
# Flat cell numbers are int32 in the kernels.
MAX_CELLS = 2**30
# The largest distance of two cells whose square the Triton kernels compute, below 2**31.
FARTHEST = 46340
# Options in between are normal float32 numbers, and so are their products with correlations, distances and gradients.
SMALLEST, LARGEST = 1.2e-38, 1e30


class Outputs(NamedTuple):
    """Results of the forward operator, contiguous, in float32 (float64 for float64) where nothing else is said."""

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
    query_inverse_norm: Tensor
    """[B, N]: 1 / sqrt(max(sum of squares, eps)); [0] unless cosine."""
    features_inverse_norm: Tensor
    """[B, T, h, w]: likewise."""


class Saved(NamedTuple):
    """What the backward operator needs of `Outputs`."""

    points: Tensor
    maximum: Tensor
    best: Tensor
    worst: Tensor
    weight: Tensor
    query_inverse_norm: Tensor
    features_inverse_norm: Tensor


class Grads(NamedTuple):
    """Gradients of the results that have one; None where nothing depends on the result."""

    points: Tensor | None
    mean: Tensor | None
    maximum: Tensor | None
    minimum: Tensor | None


class Outputs2d(NamedTuple):
    """Results of the forward operator of `soft_argmax_2d` for a cost volume `[..., h, w]`; see `Outputs`."""

    points: Tensor
    maximum: Tensor
    best: Tensor
    weight: Tensor


def allocate(query: Tensor, features: Tensor, cosine: bool) -> Outputs:
    """Uninitialised outputs."""
    pairs, dtype = (query.shape[0], query.shape[1], features.shape[1]), accumulator(query.dtype)
    return Outputs(
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


def allocate_2d(cost_volume: Tensor) -> Outputs2d:
    """Uninitialised outputs."""
    frames, dtype = cost_volume.shape[:-2], accumulator(cost_volume.dtype)
    return Outputs2d(
        points=cost_volume.new_empty((*frames, 2), dtype=dtype),
        maximum=cost_volume.new_empty(frames, dtype=dtype),
        best=cost_volume.new_empty(frames, dtype=torch.int32),
        weight=cost_volume.new_empty(frames, dtype=dtype),
    )


def disc_limit(radius: float) -> int:
    """A squared distance of two cells, a whole number, is below radius**2 exactly if it is below this."""
    return math.ceil(min(radius * radius, 2.0**62))


def check_inputs(query: Tensor, features: Tensor, temperature: float, radius: float, eps: float) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    check_tensors(query=query, features=features)
    check_same_dtype(query=query, features=features)
    for name, x, shape in (("query", query, "[B, N, C]"), ("features", features, "[B, T, h, w, C]")):
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    for axis, meaning in ((0, "batch size B"), (-1, "number of channels C")):
        if features.shape[axis] != query.shape[axis]:
            raise ValueError(
                f"features must have the {meaning} of query, {query.shape[axis]}, got {features.shape[axis]} "
                f"(query {tuple(query.shape)}, features {tuple(features.shape)})"
            )
    if query.shape[-1] == 0:
        raise ValueError("query must have at least one channel, got C = 0")
    _check_grid("features", features.shape[2], features.shape[3], temperature, radius, eps)


def check_inputs_2d(cost_volume: Tensor, temperature: float, radius: float) -> None:
    """As `check_inputs`."""
    check_tensors(cost_volume=cost_volume)
    if cost_volume.dim() < 2:
        raise ValueError(f"cost_volume must have shape [..., h, w], got {tuple(cost_volume.shape)}")
    _check_grid("cost_volume", cost_volume.shape[-2], cost_volume.shape[-1], temperature, radius)


def _check_grid(name: str, h: int, w: int, temperature: float, radius: float, eps: float = 1.0) -> None:
    if h == 0 or w == 0:
        raise ValueError(f"{name} must have at least one cell, got a grid of {h} x {w}")
    if h * w > MAX_CELLS:
        raise ValueError(f"{name} must have at most 2**30 cells per frame, got {h} x {w}")
    for name, x in (("temperature", temperature), ("eps", eps)):
        if not SMALLEST <= x <= LARGEST:
            raise ValueError(f"{name} must be a positive finite number from {SMALLEST} to {LARGEST}, got {x}")
    if not radius >= SMALLEST:
        raise ValueError(f"radius must be a positive number, {SMALLEST} or more, got {radius}")
    if radius > FARTHEST and radius * radius <= (h - 1) ** 2 + (w - 1) ** 2:
        raise ValueError(f"radius must be at most {FARTHEST} cells or cover the whole grid, got {radius} on {h} x {w}")


@operator(NAME, "forward")
def correlation_soft_argmax_fwd(
    query: Tensor, features: Tensor, temperature: float, radius: float, cosine: bool, eps: float
) -> Results[Outputs]:
    """query `[B, N, C]`, features `[B, T, h, w, C]`; see `Outputs`."""
    check_inputs(query, features, temperature, radius, eps)
    return lambda: allocate(query, features, cosine)


@operator(NAME, "backward")
def correlation_soft_argmax_bwd(
    grad: Grads,
    query: Tensor,
    features: Tensor,
    saved: Saved,
    temperature: float,
    radius: float,
    cosine: bool,
    eps: float,
) -> Results[tuple[Tensor, Tensor]]:
    """Gradients of query and features, contiguous."""
    check_inputs(query, features, temperature, radius, eps)
    pairs, dtype = (query.shape[0], query.shape[1], features.shape[1]), accumulator(query.dtype)
    others = {  # all but [B, N, T] of the accumulator's type
        "points": ((*pairs, 2), dtype),
        "best": (pairs, torch.int32),
        "worst": (pairs, torch.int32),
        "query_inverse_norm": (query.shape[:2] if cosine else (0,), dtype),
        "features_inverse_norm": (features.shape[:4] if cosine else (0,), dtype),
    }
    expected: dict = {
        f"{group}_{name}": (x, *others.get(name, (pairs, dtype)))
        for group, tensors in (("grad", grad), ("saved", saved))
        for name, x in tensors._asdict().items()
    }
    check_saved(expected, query.device)
    return lambda: (query.new_empty(query.shape), features.new_empty(features.shape))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, features, *ctx.options = inputs
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(*outputs[4:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, features, *(getattr(outputs, name) for name in Saved._fields))


def _gradient(ctx: Any, *grads: Tensor | None) -> Any:
    if all(grad is None for grad in grads):
        return ()
    return correlation_soft_argmax_bwd(*grads[: len(Grads._fields)], *ctx.saved_tensors, *ctx.options)


differentiable(correlation_soft_argmax_fwd, _save, _gradient)


@operator(NAME, "soft_argmax_2d_forward")
def soft_argmax_2d_fwd(cost_volume: Tensor, temperature: float, radius: float) -> Results[Outputs2d]:
    """cost_volume `[..., h, w]`; see `Outputs2d`."""
    check_inputs_2d(cost_volume, temperature, radius)
    return lambda: allocate_2d(cost_volume)


@operator(NAME, "soft_argmax_2d_backward")
def soft_argmax_2d_bwd(
    grad_points: Tensor, cost_volume: Tensor, saved: Outputs2d, temperature: float, radius: float
) -> Results[Tensor]:
    """Gradient of the cost volume, contiguous."""
    check_inputs_2d(cost_volume, temperature, radius)
    frames, dtype = tuple(cost_volume.shape[:-2]), accumulator(cost_volume.dtype)
    check_saved(
        {
            "grad_points": (grad_points, (*frames, 2), dtype),
            "saved_points": (saved.points, (*frames, 2), dtype),
            "saved_maximum": (saved.maximum, frames, dtype),
            "saved_best": (saved.best, frames, torch.int32),
            "saved_weight": (saved.weight, frames, dtype),
        },
        cost_volume.device,
    )
    return lambda: cost_volume.new_empty(cost_volume.shape)


def _save_2d(ctx: Any, inputs: Any, output: Any) -> None:
    cost_volume, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(cost_volume, *output)


def _gradient_2d(ctx: Any, grad_points: Tensor, *_: Any) -> Any:
    return soft_argmax_2d_bwd(grad_points, *ctx.saved_tensors, *ctx.options)


differentiable(soft_argmax_2d_fwd, _save_2d, _gradient_2d)
