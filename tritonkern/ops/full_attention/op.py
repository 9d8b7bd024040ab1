"""Checks, operators and gradient of softmax attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonkern.ops._checks import check_same_dtype, check_saved, check_scale, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "full_attention"


def check_inputs(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    check_tensors(query=query, key=key, value=value)
    check_same_dtype(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            raise ValueError(f"{name} must be [B, L, H, D] with L, H and D from 1 up, got {tuple(tensor.shape)}")
    batch, _, num_heads, dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != (batch, key.shape[1], num_heads, dim):
            raise ValueError(
                f"{name} must have shape {(batch, key.shape[1], num_heads, dim)} for this query and key, "
                f"got {tuple(tensor.shape)}"
            )
    # The backward pass subtracts the log-sum-exp from scores, whose rounding must not reach the range of exp.
    check_scale(scale, exponent=20)


@operator(NAME, "forward")
def full_attention_fwd(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Results[tuple[Tensor, Tensor]]:
    """Output `[B, L, H, D]` and log-sum-exp of the scores `[B, L, H]`, both contiguous."""
    check_inputs(query, key, value, scale)
    return lambda: (query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=accumulator(query.dtype)))


@operator(NAME, "backward")
def full_attention_bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Results[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of query, key and value, contiguous."""
    check_inputs(query, key, value, scale)
    of_query, of_lse = (query.shape, query.dtype), (query.shape[:3], accumulator(query.dtype))
    check_saved({"grad_out": (grad_out, *of_query), "out": (out, *of_query), "lse": (lse, *of_lse)}, query.device)
    return lambda: (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _gradient(ctx: Any, grad_out: Tensor, _: Any) -> Any:
    return full_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.options)


differentiable(full_attention_fwd, _save, _gradient)
