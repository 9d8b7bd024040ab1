"""The call into the C++ kernel. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES, accumulator, adjacent_channels


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    (batch, length, heads, dim), keys = query.shape, key.shape[1]
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch, length, heads), dtype=accumulator(query.dtype))
    if not out.numel():
        return out, lse
    query, key, value = (adjacent_channels(x) for x in (query, key, value))
    _cpp.full_attention_forward(
        CPP_DTYPES[query.dtype],
        (batch, length, keys, heads, dim),
        scale,
        torch.get_num_threads(),
        (query.data_ptr(), query.stride()[:3]),
        (key.data_ptr(), key.stride()[:3]),
        (value.data_ptr(), value.stride()[:3]),
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.backward: PyTorch's kernel for CPUs, which wants just what the forward pass leaves."""
    # It takes adjacent channels for granted.
    rows = (adjacent_channels(x) for x in (grad_out, query, key, value, out, lse))
    query_grad, key_grad, value_grad = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in rows), 0.0, False, attn_mask=None, scale=scale
    )
    return query_grad.transpose(1, 2), key_grad.transpose(1, 2), value_grad.transpose(1, 2)
