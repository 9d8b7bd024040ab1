"""Checks, operators and gradients of local correlation, alone and followed by a linear layer.

`position` is `[B, T, N, 2]` (x, y) in the dtype of sums, in cells whose centres are whole numbers; `support` is
`[B, N, S, C]`, or `[B, N, T, S, C]` where each frame has its own. `scale` is that of the softmax over p, or None for no
softmax; before a linear layer there is one for each pair of features and support, or none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonkern.ops._checks import check_flags, check_same_dtype, check_saved, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "local_correlation"
MAX_RADIUS = 15
MAX_SCALE = 2.0**64


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


def check_inputs(
    features: Tensor, support: Tensor, position: Tensor, samples: Samples, scale: float | None, pair: str = ""
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together; users call the positions coords.

    Of several pairs of features and support, `pair` says which one it is.
    """
    of_features, of_support = f"features{pair}", f"support{pair}"
    check_tensors(**{of_features: features, of_support: support, "coords": position})
    check_same_dtype(**{of_features: features, of_support: support})
    for name, x, dims, shape in (
        (of_features, features, (5,), "[B, T, h, w, C]"),
        (of_support, support, (4, 5), "[B, N, S, C] or [B, N, T, S, C]"),
        ("coords", position, (4,), "[B, T, N, 2]"),
    ):
        if x.dim() not in dims:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if 0 in features.shape[2:]:
        raise ValueError(f"{of_features} must have at least one cell and channel, got {tuple(features.shape)}")
    if support.shape[-2] == 0:
        raise ValueError(f"{of_support} must have at least one vector (S), got {tuple(support.shape)}")
    got = f"got {tuple(support.shape)}"
    if support.shape[0] != features.shape[0] or support.shape[-1] != features.shape[-1]:
        raise ValueError(f"{of_support} must have B and C of {of_features}, {tuple(features.shape)}, {got}")
    if support.dim() == 5 and support.shape[2] != features.shape[1]:
        raise ValueError(f"{of_support} must have T of {of_features}, {features.shape[1]}, on axis 2, {got}")
    expected = (*features.shape[:2], support.shape[1], 2)
    if tuple(position.shape) != expected:
        raise ValueError(f"coords must have shape {expected}, a position for each point, got {tuple(position.shape)}")
    if position.dtype != accumulator(features.dtype):
        raise TypeError(f"coords must be {accumulator(features.dtype)} here, got {position.dtype}")
    if not 0 <= samples.radius <= MAX_RADIUS:
        raise ValueError(f"radius must be from 0 to {MAX_RADIUS}, got {samples.radius}")
    if scale is not None and not 0 < scale <= MAX_SCALE:
        raise ValueError(f"scale must be a positive number, at most 2**64, got {scale}")


def check_linear_inputs(
    features: list[Tensor],
    support: list[Tensor],
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: Samples,
    scales: list[float],
) -> None:
    """As `check_inputs`, of every pair, and of the linear layer."""
    if not features or len(features) != len(support):
        raise ValueError(f"features and support must be as many, at least one, got {len(features)} and {len(support)}")
    if scales and len(scales) != len(features):
        raise ValueError(f"scales must be none, or one for each of {len(features)} pairs, got {len(scales)}")
    names = [f"[{i}]" if len(features) > 1 else "" for i in range(len(features))]
    maps = {f"features{name}": x for name, x in zip(names, features, strict=True)}
    check_tensors(**maps, weight=weight, bias=bias)
    check_same_dtype(**maps, weight=weight, bias=bias)
    for i, pair in enumerate(zip(features, support, strict=True)):
        check_inputs(*pair, position, samples, scales[i] if scales else None, names[i])
    for name, x, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if x is not None and x.dim() != dims:
            raise ValueError(f"{name} must have {dims} axes, got shape {tuple(x.shape)}")
    inputs = sum(columns_of(support, samples))
    if weight.shape[1] != inputs:
        sizes = " + ".join(f"{samples.total} x {x.shape[-2]}" for x in support)
        raise ValueError(
            f"weight must have (2 radius + 1)^2 S = {sizes} = {inputs} columns, got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight has rows, got {tuple(bias.shape)}")


def columns_of(support: list[Tensor], samples: Samples) -> list[int]:
    """How many columns of the weight each pair of features and support has."""
    return [samples.total * x.shape[-2] for x in support]


def result_shape(support: Tensor, position: Tensor, samples: Samples) -> tuple[int, ...]:
    """`[B, T, N, P, S]`"""
    return (*position.shape[:3], samples.total, support.shape[-2])


@operator(NAME, "forward")
def local_correlation_fwd(
    features: Tensor, support: Tensor, position: Tensor, samples: Samples, scale: float | None
) -> Results[Tensor]:
    """`[B, T, N, P, S]`, contiguous."""
    check_inputs(features, support, position, samples, scale)
    return lambda: features.new_empty(result_shape(support, position, samples))


@operator(NAME, "backward")
def local_correlation_bwd(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    samples: Samples,
    scale: float | None,
    needs_grad: list[bool],
) -> Results[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of features, support and position, contiguous; of shape [0] where not needed."""
    check_inputs(features, support, position, samples, scale)
    check_saved({"grad_out": (grad_out, result_shape(support, position, samples), features.dtype)}, features.device)
    check_flags(needs_grad, 3)
    return lambda: (_like(features, needs_grad[0]), _like(support, needs_grad[1]), _like(position, needs_grad[2]))


@operator(NAME, "linear_forward")
def local_correlation_linear_fwd(
    features: list[Tensor],
    support: list[Tensor],
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: Samples,
    scales: list[float],
) -> Results[Tensor]:
    """`[B, T, N, O]`, contiguous."""
    check_linear_inputs(features, support, position, weight, bias, samples, scales)
    return lambda: weight.new_empty((*position.shape[:3], weight.shape[0]))


@operator(NAME, "linear_backward")
def local_correlation_linear_bwd(
    grad_out: Tensor,
    features: list[Tensor],
    support: list[Tensor],
    position: Tensor,
    weight: Tensor,
    samples: Samples,
    scales: list[float],
    needs_grad: list[bool],
) -> Results[list[Tensor]]:
    """Gradients of all features, all supports, position, weight and bias, contiguous; of shape [0] where not needed."""
    check_linear_inputs(features, support, position, weight, None, samples, scales)
    check_saved({"grad_out": (grad_out, (*position.shape[:3], weight.shape[0]), weight.dtype)}, weight.device)
    inputs = [*features, *support, position, weight, weight[:, 0]]
    check_flags(needs_grad, len(inputs))
    return lambda: [_like(x, needed) for x, needed in zip(inputs, needs_grad, strict=True)]


def _like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(x.shape if needed else 0)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.radius, ctx.zeros, ctx.y_first, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_out: Tensor) -> Any:
    options = (ctx.radius, ctx.zeros, ctx.y_first, ctx.scale, list(ctx.needs_input_grad[:3]), ctx.backend)
    return local_correlation_bwd(grad_out, *ctx.saved_tensors, *options)


def _save_linear(ctx: Any, inputs: Any, output: Any) -> None:
    features, support, position, weight, _, ctx.radius, ctx.zeros, ctx.y_first, ctx.scales, ctx.backend = inputs
    ctx.pairs = len(features)
    ctx.save_for_backward(*features, *support, position, weight)


def _linear_gradient(ctx: Any, grad_out: Tensor) -> Any:
    *pairs, position, weight = ctx.saved_tensors
    features, support = pairs[: ctx.pairs], pairs[ctx.pairs :]
    needs_grad = list(ctx.needs_input_grad[: len(pairs) + 3])
    options = (ctx.radius, ctx.zeros, ctx.y_first, ctx.scales, needs_grad, ctx.backend)
    return local_correlation_linear_bwd(grad_out, features, support, position, weight, *options)


differentiable(local_correlation_fwd, _save, _gradient)
differentiable(local_correlation_linear_fwd, _save_linear, _linear_gradient)
