"""Eager PyTorch, the plainest form; the whole matrix of weights is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision


@full_precision
def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, L, H, D]` and twice `[B, S, H, D]` -> the result `[B, L, H, D]`, log-sum-exp of the scores `[B, L, H]`."""
    query, key, values = (accurate(x).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scale
    out = (scores.softmax(-1) @ values).transpose(1, 2).to(value.dtype)
    lse = torch.logsumexp(scores, -1).transpose(1, 2)
    return out.contiguous(), lse.contiguous()


@full_precision
def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; out and lse are what `forward` returned."""
    grad, q, k, v, result = (accurate(x).transpose(1, 2) for x in (grad_out, query, key, value, out))
    weights = (q @ k.transpose(-1, -2) * scale - lse.transpose(1, 2)[..., None]).exp()
    grad_scores = weights * (grad @ v.transpose(-1, -2) - (grad * result).sum(-1, keepdim=True)) * scale
    grads = (grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
    grad_query, grad_key, grad_value = (x.transpose(1, 2).to(query.dtype).contiguous() for x in grads)
    return grad_query, grad_key, grad_value
