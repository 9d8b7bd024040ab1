"""Contract, operator and gradient of softmax attention."""

from __future__ import annotations

from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import accumulator, check_dense

NAME = "full_attention"


def check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dense(name, tensor)
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query, {query.device}, got {tensor.device}; move one of them"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}; convert it")
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            raise ValueError(f"{name} must be [B, L, H, D] with L, H and D from 1 up, got {tuple(tensor.shape)}")
    batch, _, heads, dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != (batch, key.shape[1], heads, dim):
            raise ValueError(
                f"{name} must have shape {(batch, key.shape[1], heads, dim)} beside this query and key, "
                f"got {tuple(tensor.shape)}"
            )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    check(query, key, value)
    return _backends.load(NAME, query.device, backend).forward(query, key, value, scale)


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    check(query, key, value)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))


full_attention_fwd = _registry.define(
    "full_attention_fwd(Tensor query, Tensor key, Tensor value, float scale, str? backend=None) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _setup_context(ctx, inputs, output):
    query, key, value, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _gradient(ctx, grad_out, _):
    saved = ctx.saved_tensors
    kernels = _backends.load(NAME, grad_out.device, ctx.backend)
    return (*kernels.backward(grad_out, *saved, ctx.scale), None, None)


_registry.attach_gradient(full_attention_fwd, _setup_context, _gradient)
