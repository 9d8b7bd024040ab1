"""Eager PyTorch, the plainest correct form; in float64 it is what the tests believe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.ops._contract import accumulator


def forward(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    causal: bool,
    eps: float,
    normed_state: Tensor | None,
    hidden_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[B, N, T, C]` -> the block's output, and the states after it (empty where none came)."""
    taps1, bias1, taps2, bias2 = _per_channel(x, conv1_weight, conv1_bias, conv2_weight, conv2_bias)
    before = 2 if causal else 1
    standard, _ = _standardised(x, eps)
    normed = standard * norm_weight.to(standard.dtype)
    past = None if hidden_state is None else hidden_state.unflatten(-1, (-1, 4))
    hidden = F.gelu(_convolved(normed, taps1, before, normed_state) + bias1, approximate="tanh")
    mixed = (_windows(hidden, before, past) * taps2).sum((-2, -1)) + bias2.sum(-1)
    out = (x.to(mixed.dtype) + mixed).to(x.dtype, memory_format=torch.contiguous_format)
    if normed_state is None or hidden_state is None:
        return out, standard.new_empty(0), standard.new_empty(0)
    states = (
        torch.cat([normed_state, normed], 2)[:, :, -2:],
        torch.cat([hidden_state, hidden.flatten(-2)], 2)[:, :, -2:],
    )
    return out, states[0].contiguous(), states[1].contiguous()


def backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x and the parameters where `needed`, empty elsewhere; parameters' accurate."""
    taps1, bias1, taps2, _ = _per_channel(x, conv1_weight, conv1_bias, conv2_weight, conv1_bias)
    before = 2 if causal else 1
    standard, scale = _standardised(x, eps)
    norm_weight = norm_weight.to(standard.dtype)
    normed, grad = standard * norm_weight, grad_out.to(standard.dtype)
    inner = _convolved(normed, taps1, before) + bias1
    hidden = F.gelu(inner, approximate="tanh")
    # Frame s was tap k of frame s - k + before: the same windows, the other way round.
    grad_hidden = _convolved(grad, taps2.flip(-1), 2 - before)
    grad_inner = torch.ops.aten.gelu_backward(grad_hidden, inner, approximate="tanh")
    grad_normed = (_windows(grad_inner, 2 - before) * taps1.flip(-1)).sum((-2, -1))
    weighted = grad_normed * norm_weight
    slope = (weighted * standard).mean(-1, keepdim=True)
    frames = (0, 1, 2)
    candidates = (
        lambda: (grad + scale * (weighted - weighted.mean(-1, keepdim=True) - standard * slope)).to(
            x.dtype, memory_format=torch.contiguous_format
        ),
        lambda: (grad_normed * standard).sum(frames),
        lambda: (grad_inner[..., None] * _windows(normed, before)[..., None, :]).sum(frames).flatten(0, 1)[:, None],
        lambda: grad_inner.sum(frames).flatten(),
        lambda: (grad[..., None, None] * _windows(hidden, before)).sum(frames).flatten(0, 1)[:, None],
        lambda: grad.sum(frames).repeat_interleave(4),
    )
    return [make() if need else standard.new_empty(0) for make, need in zip(candidates, needed, strict=True)]


def _per_channel(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Weights as `[C, 4, 3]` and biases as `[C, 4]`: the convolutions' channel 4 c + j belongs to channel c of x."""
    accurate = accumulator(x.dtype)
    shapes = ((-1, 4, 3), (-1, 4)) * 2
    return [parameter.to(accurate).reshape(shape) for parameter, shape in zip(parameters, shapes, strict=True)]


def _windows(x: Tensor, before: int, past: Tensor | None = None) -> Tensor:
    """`[B, N, T, ...]` -> `[B, N, T, ..., 3]`: frames t - before to t - before + 2; beyond the clip past, or zeros."""
    first = x.new_zeros(*x.shape[:2], before, *x.shape[3:]) if past is None else past
    padded = torch.cat([first, x, x.new_zeros(*x.shape[:2], 2 - before, *x.shape[3:])], 2)
    return torch.stack([padded[:, :, k : k + x.shape[2]] for k in range(3)], -1)


def _convolved(x: Tensor, taps: Tensor, before: int, past: Tensor | None = None) -> Tensor:
    """`[B, N, T, C]` and taps `[C, 4, 3]` -> `[B, N, T, C, 4]`."""
    return (_windows(x, before, past)[..., None, :] * taps).sum(-1)


def _standardised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance along C, and the factor that made it so `[..., 1]`."""
    x = x.to(accumulator(x.dtype))
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * scale, scale
