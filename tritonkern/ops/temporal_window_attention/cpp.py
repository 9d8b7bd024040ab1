"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import accumulator


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int,
    scale: float,
    query_offset: int = 0,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, H, D] and log-sum-exp [B, T, N, H] (float32, for float64 float64), both contiguous."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))
    if out.numel():
        threads = torch.get_num_threads()
        _cpp.temporal_window_attention_forward(
            query, key, value, left, right, scale, query_offset, start, threads, out, lse
        )
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous. `out` and `lse` are not read: they are computed again."""
    if not query.numel():  # no query sees any key
        return query.new_empty(query.shape), query.new_zeros(key.shape), query.new_zeros(key.shape)
    grads = query.new_empty(query.shape), query.new_empty(key.shape), query.new_empty(key.shape)
    threads = torch.get_num_threads()
    _cpp.temporal_window_attention_backward(
        grad_out, query, key, value, left, right, scale, query_offset, threads, *grads
    )
    return grads
