"""Contract, operators and gradients of local correlation, alone and followed by a linear layer.

`position` is `[B, T, N, 2]` (x, y) with cell centres at whole numbers, in the dtype of sums; `support` is
`[B, N, S, C]`, or `[B, N, T, S, C]` where each frame has its own. A backend has two functions, for any block of a call:
`correlate_into` and `add_gradients`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import accumulator, check_dense, check_saved
from tritonkern.ops.local_correlation import linear

NAME = "local_correlation"
MAX_RADIUS = 15


def check_tensors(features: Tensor, support: Tensor, coords: Tensor) -> None:
    """Raise TypeError or ValueError unless the three tensors fit together."""
    for name, x, dims, shape in (
        ("features", features, (5,), "[B, T, h, w, C]"),
        ("support", support, (4, 5), "[B, N, S, C] or [B, N, T, S, C]"),
        ("coords", coords, (4,), "[B, T, N, 2]"),
    ):
        check_dense(name, x)
        if x.dim() not in dims:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if x.device != features.device:
            raise ValueError(f"{name} must be on the device of features, {features.device}, got {x.device}")
    if support.dtype != features.dtype:
        raise TypeError(f"support must have the dtype of features, {features.dtype}, got {support.dtype}; convert one")
    if 0 in features.shape[2:]:
        raise ValueError(f"features must have at least one cell and channel, got {tuple(features.shape)}")
    if support.shape[-2] == 0:
        raise ValueError(f"support must have at least one vector (S), got {tuple(support.shape)}")
    if support.shape[0] != features.shape[0] or support.shape[-1] != features.shape[-1]:
        raise ValueError(f"support must have B and C of features, {tuple(features.shape)}, got {tuple(support.shape)}")
    if support.dim() == 5 and support.shape[2] != features.shape[1]:
        raise ValueError(f"support must have T of features, {features.shape[1]}, on axis 2, got {tuple(support.shape)}")
    expected = (*features.shape[:2], support.shape[1], 2)
    if tuple(coords.shape) != expected:
        raise ValueError(f"coords must have shape {expected}, a position for each point, got {tuple(coords.shape)}")


def check_radius(radius: int) -> None:
    """Raise TypeError or ValueError unless `radius` is a whole number from 0 to MAX_RADIUS."""
    if isinstance(radius, bool) or not isinstance(radius, (int, torch.SymInt)):
        raise TypeError(f"radius must be an int, got {type(radius).__name__}")
    if not 0 <= radius <= MAX_RADIUS:
        raise ValueError(f"radius must be from 0 to {MAX_RADIUS}, got {radius}")


def check_linear(features: Tensor, support: Tensor, weight: Tensor, bias: Tensor | None, radius: int) -> None:
    """Raise TypeError or ValueError unless weight and bias follow the correlation."""
    inputs = (2 * radius + 1) ** 2 * support.shape[-2]
    for name, x, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if x is None:
            continue
        check_dense(name, x)
        if x.dtype != features.dtype:
            raise TypeError(f"{name} must have the dtype of features, {features.dtype}, got {x.dtype}; convert one")
        if x.device != features.device:
            raise ValueError(f"{name} must be on the device of features, {features.device}, got {x.device}")
        if x.dim() != dims:
            raise ValueError(f"{name} must have {dims} axes, got shape {tuple(x.shape)}")
    if weight.shape[1] != inputs:
        raise ValueError(f"weight must have (2 radius + 1)^2 S = {inputs} columns, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight has rows, got {tuple(bias.shape)}")


def _check(features: Tensor, support: Tensor, position: Tensor, radius: int) -> None:
    check_tensors(features, support, position)
    check_radius(radius)
    if position.dtype != accumulator(features.dtype):
        raise ValueError(f"position must be {accumulator(features.dtype)}, got {position.dtype}")


def _shape(support: Tensor, position: Tensor, radius: int) -> tuple[int, ...]:
    return (*position.shape[:3], (2 * radius + 1) ** 2, support.shape[-2])


def _check_grad(grad_out: Tensor, shape: tuple[int, ...], features: Tensor) -> None:
    check_saved({"grad_out": (grad_out, shape, features.dtype)}, features.device)


def _zeros(x: Tensor, wanted: bool) -> Tensor | None:
    return torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) if wanted else None


def _results(inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if grad is None else grad.to(x.dtype) for x, grad in zip(inputs, grads, strict=True))


def _fake_results(inputs: tuple[Tensor, ...], wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=True))


def _forward(
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    backend: str | None = None,
) -> Tensor:
    _check(features, support, position, radius)
    kernels = _backends.load(NAME, features.device, backend)
    out = features.new_empty(_shape(support, position, radius))
    kernels.correlate_into(out, kernels.readable(features), support, position, radius, zeros, y_first)
    return out


def _forward_fake(
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    backend: str | None = None,
) -> Tensor:
    _check(features, support, position, radius)
    return features.new_empty(_shape(support, position, radius))


def _backward(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    wanted: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    _check(features, support, position, radius)
    _check_grad(grad_out, _shape(support, position, radius), features)
    inputs = (features, support, position)
    kernels = _backends.load(NAME, features.device, backend)
    grads = tuple(_zeros(x, want) for x, want in zip(inputs, wanted, strict=True))
    tensors = (kernels.readable(features), support, position)
    kernels.add_gradients(grad_out, *tensors, radius, zeros, y_first, *grads)
    return _results(inputs, grads)


def _backward_fake(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    wanted: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    _check(features, support, position, radius)
    _check_grad(grad_out, _shape(support, position, radius), features)
    return _fake_results((features, support, position), wanted)


def _linear_forward(
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    radius: int,
    zeros: bool,
    y_first: bool,
    backend: str | None = None,
) -> Tensor:
    _check(features, support, position, radius)
    check_linear(features, support, weight, bias, radius)
    kernels = _backends.load(NAME, features.device, backend)
    return linear.forward(kernels, kernels.readable(features), support, position, weight, bias, radius, zeros, y_first)


def _linear_forward_fake(
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    radius: int,
    zeros: bool,
    y_first: bool,
    backend: str | None = None,
) -> Tensor:
    _check(features, support, position, radius)
    check_linear(features, support, weight, bias, radius)
    return features.new_empty((*position.shape[:3], weight.shape[0]))


def _linear_backward(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    wanted: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    _check(features, support, position, radius)
    check_linear(features, support, weight, None, radius)
    _check_grad(grad_out, (*position.shape[:3], weight.shape[0]), features)
    inputs = (features, support, position, weight)
    kernels = _backends.load(NAME, features.device, backend)
    grads = tuple(_zeros(x, want) for x, want in zip(inputs, wanted, strict=True))
    tensors = (kernels.readable(features), support, position, weight)
    linear.add_gradients(kernels, grad_out, *tensors, radius, zeros, y_first, grads)
    return _results(inputs, grads)


def _linear_backward_fake(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    wanted: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    _check(features, support, position, radius)
    check_linear(features, support, weight, None, radius)
    _check_grad(grad_out, (*position.shape[:3], weight.shape[0]), features)
    return _fake_results((features, support, position, weight), wanted)


_OPTIONS = "int radius, bool zeros, bool y_first"

local_correlation_fwd = _registry.define(
    f"local_correlation_fwd(Tensor features, Tensor support, Tensor position, {_OPTIONS}, str? backend=None) -> Tensor",
    _forward,
    _forward_fake,
)
"""`[B, T, N, P, S]`, contiguous. `y_first`: the offsets of P move x fastest, as in an image."""

local_correlation_bwd = _registry.define(
    f"local_correlation_bwd(Tensor grad_out, Tensor features, Tensor support, Tensor position, {_OPTIONS},"
    " bool[] wanted, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
"""Gradients of features, support and position, contiguous; of shape [0] where not `wanted`."""

local_correlation_linear_fwd = _registry.define(
    "local_correlation_linear_fwd(Tensor features, Tensor support, Tensor position, Tensor weight, Tensor? bias,"
    f" {_OPTIONS}, str? backend=None) -> Tensor",
    _linear_forward,
    _linear_forward_fake,
)
"""`[B, T, N, O]`, contiguous."""

local_correlation_linear_bwd = _registry.define(
    "local_correlation_linear_bwd(Tensor grad_out, Tensor features, Tensor support, Tensor position, Tensor weight,"
    f" {_OPTIONS}, bool[] wanted, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
"""Gradients of features, support, position and weight, contiguous; of shape [0] where not `wanted`."""


def _setup_context(ctx, inputs, output):
    *tensors, ctx.radius, ctx.zeros, ctx.y_first, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _wanted(ctx, grads):
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))


def _gradient(ctx, grad_out):
    options = (ctx.radius, ctx.zeros, ctx.y_first, list(ctx.needs_input_grad[:3]), ctx.backend)
    grads = local_correlation_bwd(grad_out, *ctx.saved_tensors, *options)
    return (*_wanted(ctx, grads), None, None, None, None)


def _linear_gradient(ctx, grad_out):
    *tensors, _ = ctx.saved_tensors
    options = (ctx.radius, ctx.zeros, ctx.y_first, list(ctx.needs_input_grad[:4]), ctx.backend)
    grads = local_correlation_linear_bwd(grad_out, *tensors, *options)
    grad_bias = grad_out.sum((0, 1, 2)) if ctx.needs_input_grad[4] else None
    return (*_wanted(ctx, grads), grad_bias, None, None, None, None)


_registry.attach_gradient(local_correlation_fwd, _setup_context, _gradient)
_registry.attach_gradient(local_correlation_linear_fwd, _setup_context, _linear_gradient)
_registry.forbid_gradient(local_correlation_bwd, NAME)
_registry.forbid_gradient(local_correlation_linear_bwd, f"{NAME}_linear")
