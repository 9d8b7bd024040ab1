"""Eager PyTorch, the plainest correct form; in float64 it is the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from tritonkern.ops._dtypes import accumulator, accurate
from tritonkern.ops.temporal_mixer.op import Conv, Gradients, Mixed, State


def forward(x: Tensor, norm_weight: Tensor, conv1: Conv, conv2: Conv, causal: bool, eps: float, state: State) -> Mixed:
    (taps1, bias1), (taps2, bias2) = _per_channel(x, conv1), _per_channel(x, conv2)
    before = 2 if causal else 1
    standard, _ = _standardised(x, eps)
    normed = standard * norm_weight.to(standard.dtype)
    past = None if state.hidden is None else rearrange(state.hidden, "b n t (c j) -> b n t c j", j=4)
    hidden = F.gelu(_convolved(normed, taps1, before, state.normed) + bias1, approximate="tanh")
    mixed = (_windows(hidden, before, past) * taps2).sum((-2, -1)) + bias2.sum(-1)
    out = (x.to(mixed.dtype) + mixed).to(x.dtype, memory_format=torch.contiguous_format)
    if state.normed is None or state.hidden is None:
        return Mixed(out, standard.new_empty(0), standard.new_empty(0))
    return Mixed(
        out,
        torch.cat([state.normed, normed], 2)[:, :, -2:].contiguous(),
        torch.cat([state.hidden, hidden.flatten(-2)], 2)[:, :, -2:].contiguous(),
    )


def backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1: Conv,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needs_grad: list[bool],
) -> Gradients:
    (taps1, bias1), (taps2, _) = _per_channel(x, conv1), _per_channel(x, Conv(conv2_weight, conv1.bias))
    before = 2 if causal else 1
    standard, rstd = _standardised(x, eps)
    norm_weight = norm_weight.to(standard.dtype)
    normed, grad = standard * norm_weight, grad_out.to(standard.dtype)
    inner = _convolved(normed, taps1, before) + bias1
    hidden = F.gelu(inner, approximate="tanh")
    # Frame s was tap k of frame s - k + before: the same windows, reversed.
    grad_hidden = _convolved(grad, taps2.flip(-1), 2 - before)
    grad_inner = torch.ops.aten.gelu_backward(grad_hidden, inner, approximate="tanh")
    grad_normed = (_windows(grad_inner, 2 - before) * taps1.flip(-1)).sum((-2, -1))
    weighted = grad_normed * norm_weight
    slope = (weighted * standard).mean(-1, keepdim=True)
    frames = (0, 1, 2)
    candidates = (
        lambda: (grad + rstd * (weighted - weighted.mean(-1, keepdim=True) - standard * slope)).to(
            x.dtype, memory_format=torch.contiguous_format
        ),
        lambda: (grad_normed * standard).sum(frames),
        lambda: (grad_inner[..., None] * _windows(normed, before)[..., None, :]).sum(frames).flatten(0, 1)[:, None],
        lambda: grad_inner.sum(frames).flatten(),
        lambda: (grad[..., None, None] * _windows(hidden, before)).sum(frames).flatten(0, 1)[:, None],
        lambda: repeat(grad.sum(frames), "c -> (c j)", j=4),
    )
    dtypes = (x.dtype, *(standard.dtype,) * 5)
    return Gradients(
        *(
            make() if needed else x.new_empty(0, dtype=dtype)
            for make, needed, dtype in zip(candidates, needs_grad, dtypes, strict=True)
        )
    )


def _per_channel(x: Tensor, conv: Conv) -> tuple[Tensor, Tensor]:
    """Weight `[C, 4, 3]` and bias `[C, 4]` in the dtype of sums."""
    dtype = accumulator(x.dtype)
    weight = rearrange(conv.weight.to(dtype), "(c j) 1 k -> c j k", j=4)
    return weight, rearrange(conv.bias.to(dtype), "(c j) -> c j", j=4)


def _windows(x: Tensor, before: int, past: Tensor | None = None) -> Tensor:
    """`[B, N, T, ...]` -> `[B, N, T, ..., 3]`: frames t - before to t - before + 2; before x `past`, else zeros."""
    first = x.new_zeros(*x.shape[:2], before, *x.shape[3:]) if past is None else past
    padded = torch.cat([first, x, x.new_zeros(*x.shape[:2], 2 - before, *x.shape[3:])], 2)
    return torch.stack([padded[:, :, k : k + x.shape[2]] for k in range(3)], -1)


def _convolved(x: Tensor, taps: Tensor, before: int, past: Tensor | None = None) -> Tensor:
    """`[B, N, T, C]` and taps `[C, 4, 3]` -> `[B, N, T, C, 4]`."""
    return (_windows(x, before, past)[..., None, :] * taps).sum(-1)


def _standardised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with zero mean and unit variance along C, and 1 / sqrt(variance + eps) `[..., 1]`."""
    x = accurate(x)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd
