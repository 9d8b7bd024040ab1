"""Checks, operators and gradients of local correlation, alone and followed by a linear layer.

`position` is `[B, T, N, 2]` (x, y) in the dtype of sums, in cells whose centres are whole numbers; `support` is
`[B, N, S, C]`, or `[B, N, T, S, C]` where each frame has its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonkern.ops._checks import check_flags, check_same_dtype, check_saved, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "local_correlation"
MAX_RADIUS = 15


class Samples(NamedTuple):
    """The P = (2 radius + 1)^2 samples around a position."""

    radius: int
    zeros: bool
    """Whether the map has zeros beyond its border, or the border repeated."""
    y_first: bool
    """Whether y is the slow axis of p and x the fast one, as in an image, or the other way round."""

    @property
    def total(self) -> int:
        return (2 * self.radius + 1) ** 2


def check_inputs(features: Tensor, support: Tensor, position: Tensor, samples: Samples) -> None:
    """Raise TypeError or ValueError unless the arguments fit together; users call the positions coords."""
    check_tensors(features=features, support=support, coords=position)
    check_same_dtype(features=features, support=support)
    for name, x, dims, shape in (
        ("features", features, (5,), "[B, T, h, w, C]"),
        ("support", support, (4, 5), "[B, N, S, C] or [B, N, T, S, C]"),
        ("coords", position, (4,), "[B, T, N, 2]"),
    ):
        if x.dim() not in dims:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if 0 in features.shape[2:]:
        raise ValueError(f"features must have at least one cell and channel, got {tuple(features.shape)}")
    if support.shape[-2] == 0:
        raise ValueError(f"support must have at least one vector (S), got {tuple(support.shape)}")
    if support.shape[0] != features.shape[0] or support.shape[-1] != features.shape[-1]:
        raise ValueError(f"support must have B and C of features, {tuple(features.shape)}, got {tuple(support.shape)}")
    if support.dim() == 5 and support.shape[2] != features.shape[1]:
        raise ValueError(f"support must have T of features, {features.shape[1]}, on axis 2, got {tuple(support.shape)}")
    expected = (*features.shape[:2], support.shape[1], 2)
    if tuple(position.shape) != expected:
        raise ValueError(f"coords must have shape {expected}, a position for each point, got {tuple(position.shape)}")
    if position.dtype != accumulator(features.dtype):
        raise TypeError(f"coords must be {accumulator(features.dtype)} here, got {position.dtype}")
    if not 0 <= samples.radius <= MAX_RADIUS:
        raise ValueError(f"radius must be from 0 to {MAX_RADIUS}, got {samples.radius}")


def _check_linear(features: Tensor, support: Tensor, weight: Tensor, bias: Tensor | None, samples: Samples) -> None:
    inputs = samples.total * support.shape[-2]
    check_tensors(features=features, weight=weight, bias=bias)
    check_same_dtype(features=features, weight=weight, bias=bias)
    for name, x, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if x is not None and x.dim() != dims:
            raise ValueError(f"{name} must have {dims} axes, got shape {tuple(x.shape)}")
    if weight.shape[1] != inputs:
        raise ValueError(f"weight must have (2 radius + 1)^2 S = {inputs} columns, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight has rows, got {tuple(bias.shape)}")


def result_shape(support: Tensor, position: Tensor, samples: Samples) -> tuple[int, ...]:
    """`[B, T, N, P, S]`"""
    return (*position.shape[:3], samples.total, support.shape[-2])


@operator(NAME, "forward")
def local_correlation_fwd(features: Tensor, support: Tensor, position: Tensor, samples: Samples) -> Results[Tensor]:
    """`[B, T, N, P, S]`, contiguous."""
    check_inputs(features, support, position, samples)
    return lambda: features.new_empty(result_shape(support, position, samples))


@operator(NAME, "backward")
def local_correlation_bwd(
    grad_out: Tensor, features: Tensor, support: Tensor, position: Tensor, samples: Samples, needs_grad: list[bool]
) -> Results[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of features, support and position, contiguous; of shape [0] where not needed."""
    check_inputs(features, support, position, samples)
    check_saved({"grad_out": (grad_out, result_shape(support, position, samples), features.dtype)}, features.device)
    check_flags(needs_grad, 3)
    return lambda: (_like(features, needs_grad[0]), _like(support, needs_grad[1]), _like(position, needs_grad[2]))


@operator(NAME, "linear_forward")
def local_correlation_linear_fwd(
    features: Tensor, support: Tensor, position: Tensor, weight: Tensor, bias: Tensor | None, samples: Samples
) -> Results[Tensor]:
    """`[B, T, N, O]`, contiguous."""
    check_inputs(features, support, position, samples)
    _check_linear(features, support, weight, bias, samples)
    return lambda: features.new_empty((*position.shape[:3], weight.shape[0]))


@operator(NAME, "linear_backward")
def local_correlation_linear_bwd(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    samples: Samples,
    needs_grad: list[bool],
) -> Results[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of features, support, position, weight and bias, contiguous; of shape [0] where not needed."""
    check_inputs(features, support, position, samples)
    _check_linear(features, support, weight, None, samples)
    check_saved({"grad_out": (grad_out, (*position.shape[:3], weight.shape[0]), features.dtype)}, features.device)
    check_flags(needs_grad, 5)
    return lambda: (
        _like(features, needs_grad[0]),
        _like(support, needs_grad[1]),
        _like(position, needs_grad[2]),
        _like(weight, needs_grad[3]),
        _like(weight[:, 0], needs_grad[4]),
    )


def _like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(x.shape if needed else 0)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.radius, ctx.zeros, ctx.y_first, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:4])


def _gradient(ctx: Any, grad_out: Tensor) -> Any:
    options = (ctx.radius, ctx.zeros, ctx.y_first, list(ctx.needs_input_grad[:3]), ctx.backend)
    return local_correlation_bwd(grad_out, *ctx.saved_tensors, *options)


def _linear_gradient(ctx: Any, grad_out: Tensor) -> Any:
    options = (ctx.radius, ctx.zeros, ctx.y_first, list(ctx.needs_input_grad[:5]), ctx.backend)
    return local_correlation_linear_bwd(grad_out, *ctx.saved_tensors, *options)


differentiable(local_correlation_fwd, _save, _gradient)
differentiable(local_correlation_linear_fwd, _save, _linear_gradient)
