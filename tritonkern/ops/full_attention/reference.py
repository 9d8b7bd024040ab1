"""Eager PyTorch, the plainest form; the whole matrix of weights is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision


@full_precision
def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, L, H, D]` and twice `[B, S, H, D]` -> the result `[B, L, H, D]`, log-sum-exp of the scores `[B, L, H]`."""
    scores = torch.einsum("blhd,bshd->bhls", accurate(query), accurate(key)) * scale
    out = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), accurate(value))
    lse = torch.logsumexp(scores, -1).transpose(1, 2)
    return out.to(value.dtype).contiguous(), lse.contiguous()


@full_precision
def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; out and lse are what `forward` returned."""
    grad, q, k, v, result = (accurate(x) for x in (grad_out, query, key, value, out))
    weights = (torch.einsum("blhd,bshd->blhs", q, k) * scale - lse[..., None]).exp()
    of_weights = torch.einsum("blhd,bshd->blhs", grad, v) - (grad * result).sum(-1, keepdim=True)
    grad_scores = weights * of_weights * scale
    grads = (
        torch.einsum("blhs,bshd->blhd", grad_scores, k),
        torch.einsum("blhs,blhd->bshd", grad_scores, q),
        torch.einsum("blhs,blhd->bshd", weights, grad),
    )
    grad_query, grad_key, grad_value = (x.to(query.dtype).contiguous() for x in grads)
    return grad_query, grad_key, grad_value
