"""The block from the kernels of other rooms and PyTorch's matrix products, one after the other.

It is the reference, what runs where a fused kernel cannot hold a call, and every backend's backward pass: two thirds of
that are the gradients of the weights and of the rows, long matrix products, which libraries do best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.ops import _backends
from tritonkern.ops._contract import accumulator, full_precision


@full_precision
def forward(
    backend: str,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
) -> Tensor:
    """`[B, T, N, C]` -> the same, contiguous; `backend` names the kernels of LayerNorm and attention."""
    rows = x.to(_compute_dtype(x, backend))
    attended = _attended(backend, rows, norm_weight, norm_bias, qkv_weight, qkv_bias, num_heads, left, right, eps)[2]
    update = _linear(attended.flatten(-2), proj_weight, proj_bias)
    return (rows + update).to(x.dtype).contiguous()


@full_precision
def backward(
    backend: str,
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x and the parameters where `needed`, empty elsewhere; parameters' in the accumulator's type."""
    dtype, accurate = _compute_dtype(x, backend), accumulator(x.dtype)
    rows, grad = x.to(dtype), grad_out.to(dtype)
    normed, qkv, attended, lse = _attended(
        backend, rows, norm_weight, norm_bias, qkv_weight, qkv_bias, num_heads, left, right, eps
    )
    results = [x.new_empty(0, dtype=x.dtype if place == 0 else accurate) for place in range(7)]
    if needed[6]:
        results[6] = _flat(grad).sum(0, dtype=accurate)
    if needed[5]:
        results[5] = (_flat(grad).mT @ _flat(attended.flatten(-2))).to(accurate)
    if not any(needed[:5]):
        return results
    grad_attended = (grad @ proj_weight.to(dtype)).reshape(attended.shape)
    attention = _backends.load("temporal_window_attention", x.device, backend)
    grads = attention.backward(grad_attended, *qkv, attended, lse, left, right, qkv[0].shape[-1] ** -0.5)
    grad_qkv = torch.stack(grads, -3).flatten(-3)
    if needed[4]:
        results[4] = _flat(grad_qkv).sum(0, dtype=accurate)
    if needed[3]:
        results[3] = (_flat(grad_qkv).mT @ _flat(normed)).to(accurate)
    if any(needed[:3]):
        norm = _backends.load("residual_norm", x.device, backend)
        wanted = [needed[0], False, False, needed[1], needed[2]]
        grad_normed = grad_qkv @ qkv_weight.to(dtype)
        # The residual's gradient is added where that of the norm is made.
        grads = norm.backward(grad, grad_normed, rows, None, None, norm_weight.to(accurate), eps, dtype, wanted)
        for place, made in ((0, 0), (1, 3), (2, 4)):
            results[place] = grads[made].to(results[place].dtype).contiguous()
    return results


def _attended(
    backend: str,
    rows: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """Normalised rows, (query, key, value), what they attend to `[B, T, N, H, D]`, its log-sum-exp."""
    norm = _backends.load("residual_norm", rows.device, backend)
    attention = _backends.load("temporal_window_attention", rows.device, backend)
    accurate = accumulator(rows.dtype)
    normed = norm.forward(rows, None, None, norm_weight.to(accurate), norm_bias.to(accurate), eps, rows.dtype)[1]
    qkv = _linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return normed, qkv, *attention.forward(*qkv, left, right, qkv[0].shape[-1] ** -0.5)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _flat(x: Tensor) -> Tensor:
    """[B, T, N, C] -> [B * T * N, C]"""
    return x.reshape(-1, x.shape[-1])


def _compute_dtype(x: Tensor, backend: str) -> torch.dtype:
    """On a GPU 16-bit numbers go to tensor cores as they are; elsewhere the accumulator's type is faster, too."""
    return x.dtype if backend == "triton" else accumulator(x.dtype)
