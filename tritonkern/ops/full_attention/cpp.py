"""The call into the C++ kernel. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import accumulator, adjacent_channels


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))
    if out.numel():
        query, key, value = (adjacent_channels(x) for x in (query, key, value))
        _cpp.full_attention_forward(query, key, value, scale, torch.get_num_threads(), out, lse)
    return out, lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.backward: PyTorch's kernel for CPUs, which takes exactly what the forward pass returns."""
    # It requires adjacent channels and does not check for them.
    rows = (adjacent_channels(x) for x in (grad_out, query, key, value, out, lse))
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in rows), 0.0, False, attn_mask=None, scale=scale
    )
    # Stored in this order already.
    grad_query, grad_key, grad_value = (x.transpose(1, 2).contiguous() for x in (grad_query, grad_key, grad_value))
    return grad_query, grad_key, grad_value
