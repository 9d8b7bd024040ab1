"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES, accumulator


def forward(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, H, D] and log-sum-exp [B, T, N, H] (float32, for float64 float64), both contiguous."""
    shape = query.shape
    out = query.new_empty(shape)
    lse = query.new_empty(shape[:-1], dtype=accumulator(query.dtype))
    if out.numel():
        _cpp.temporal_window_attention_forward(
            CPP_DTYPES[query.dtype],
            shape,
            left,
            right,
            scale,
            torch.get_num_threads(),
            (query.data_ptr(), query.stride()),
            (key.data_ptr(), key.stride()),
            (value.data_ptr(), value.stride()),
            out.data_ptr(),
            lse.data_ptr(),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous. `out` and `lse` are not read: a window is at hand at once."""
    shape = query.shape
    grad_query, grad_key, grad_value = (query.new_empty(shape) for _ in range(3))
    if grad_query.numel():
        _cpp.temporal_window_attention_backward(
            CPP_DTYPES[query.dtype],
            shape,
            left,
            right,
            scale,
            torch.get_num_threads(),
            (query.data_ptr(), query.stride()),
            (key.data_ptr(), key.stride()),
            (value.data_ptr(), value.stride()),
            (grad_out.data_ptr(), grad_out.stride()),
            grad_query.data_ptr(),
            grad_key.data_ptr(),
            grad_value.data_ptr(),
        )
    return grad_query, grad_key, grad_value
