"""Eager PyTorch, the plainest correct form; in float64 it is what the tests believe."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._contract import accurate


def forward(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x and branch `[..., C]`, parameters `[C]` -> the sum (empty without a branch) and its LayerNorm, `[..., C]`."""
    total, result = accurate(x), x.new_empty(0)
    if branch is not None:
        total = total + (accurate(branch) if gamma is None else accurate(branch) * accurate(gamma))
        result = total.to(x.dtype, memory_format=torch.contiguous_format)
        # What is normalised is what the next block sees.
        total = accurate(result)
    normed = _standardised(total, eps)[0]
    if weight is not None:
        normed = normed * accurate(weight)
    if bias is not None:
        normed = normed + accurate(bias)
    return result, normed.to(out_dtype, memory_format=torch.contiguous_format)


def backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    eps: float,
    branch_dtype: torch.dtype,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, branch, gamma, weight and bias where `needed`, empty elsewhere; parameters' accurate."""
    standard, scale = _standardised(accurate(total), eps)
    grad = torch.zeros_like(standard) if grad_sum is None else accurate(grad_sum)
    grad_out = torch.zeros_like(standard) if grad_normed is None else accurate(grad_normed)
    weighted = grad_out if weight is None else grad_out * accurate(weight)
    if grad_normed is not None:
        slope = (weighted * standard).mean(-1, keepdim=True)
        grad = grad + scale * (weighted - weighted.mean(-1, keepdim=True) - standard * slope)
    rows = tuple(range(total.dim() - 1))
    candidates = (
        lambda: grad.to(total.dtype, memory_format=torch.contiguous_format),
        lambda: (grad if gamma is None else grad * accurate(gamma)).to(
            branch_dtype, memory_format=torch.contiguous_format
        ),
        lambda: (grad if branch is None else grad * accurate(branch)).sum(rows),
        lambda: (grad_out * standard).sum(rows),
        lambda: grad_out.sum(rows),
    )
    return [make() if need else total.new_empty(0) for make, need in zip(candidates, needed, strict=True)]


def _standardised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance along C, and the factor that made it so `[..., 1]`."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * scale, scale
