"""Checks, operators and gradient of temporal window attention.

Tensors in here are always `[B, T, N, H, D]`, or `[B, S, N, H, D]` of keys and values. Query frame i stands at key frame
`query_offset + i`, and key frame j is stored in row `(start + j) % S`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonkern.ops._checks import check_same_dtype, check_saved, check_scale, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "temporal_window_attention"
MAX_HEAD_DIM = 256
# Counts are added to frame numbers in the kernels; this keeps them far from overflow and beyond every clip.
MAX_WINDOW_COUNT = 2**30


def check_window(left: int, right: int) -> None:
    """Raise ValueError unless both inclusive counts are in range."""
    for side, count in (("left", left), ("right", right)):
        if not 0 <= count <= MAX_WINDOW_COUNT:
            raise ValueError(f"window must have a {side} count from 0 to 2**30 frames, got {count}")


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float, query_offset: int, start: int = 0
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    check_tensors(query=query, key=key, value=value)
    check_same_dtype(query=query, key=key, value=value)
    if query.dim() != 5:
        raise ValueError(
            f"query must have shape [B, T, N, H, D], got {tuple(query.shape)}; without N, as in [B, T, H, D], "
            "use unsqueeze(2)"
        )
    for name, x in (("key", key), ("value", value)):
        if x.dim() != 5 or x.shape[:1] != query.shape[:1] or x.shape[2:] != query.shape[2:]:
            raise ValueError(
                f"{name} must have the shape of query, {tuple(query.shape)}, but for the number of frames, got "
                f"{tuple(x.shape)}; expand() it if it is meant to be broadcast"
            )
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    frames, keys = query.shape[1], key.shape[1]
    if not 0 <= query_offset <= MAX_WINDOW_COUNT:
        raise ValueError(f"query_offset must be from 0 to 2**30, got {query_offset}")
    if query_offset + frames > keys:
        raise ValueError(
            f"key must have at least query_offset + T = {query_offset} + {frames} frames, got {keys}: query frame i "
            "stands at key frame query_offset + i"
        )
    if start and not 0 <= start < keys:
        raise ValueError(f"start must be a row of key, from 0 to {keys - 1}, got {start}")
    head_dim = query.shape[-1]
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"query must have a head dimension (last axis) that is a multiple of 8 from 8 to {MAX_HEAD_DIM}, "
            f"got {head_dim}; pad query, key and value with zeros to the next multiple and pass scale explicitly"
        )
    check_window(left, right)
    check_scale(scale)


@operator(NAME, "forward")
def temporal_window_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float, query_offset: int, start: int
) -> Results[tuple[Tensor, Tensor]]:
    """Output `[B, T, N, H, D]` and log-sum-exp of the scores `[B, T, N, H]`, both contiguous."""
    check_inputs(query, key, value, left, right, scale, query_offset, start)
    return lambda: (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype)),
    )


@operator(NAME, "backward")
def temporal_window_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
    query_offset: int,
) -> Results[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of query, key and value, contiguous."""
    check_inputs(query, key, value, left, right, scale, query_offset)
    of_query, of_lse = (query.shape, query.dtype), (query.shape[:-1], accumulator(query.dtype))
    check_saved({"grad_out": (grad_out, *of_query), "out": (out, *of_query), "lse": (lse, *of_lse)}, query.device)
    return lambda: (query.new_empty(query.shape), query.new_empty(key.shape), query.new_empty(key.shape))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, *options, start, backend = inputs
    if start:
        raise NotImplementedError(
            f"temporal_window_attention has no derivative with start={start}: a ring is read forward only. Give "
            "key.roll(-start, 1) and value.roll(-start, 1) without start, or call it under torch.no_grad()."
        )
    ctx.options = *options, backend
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _gradient(ctx: Any, grad_out: Tensor, _: Any) -> Any:
    return temporal_window_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.options)


differentiable(temporal_window_attention_fwd, _save, _gradient)
