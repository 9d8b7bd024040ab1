"""Eager PyTorch, the plainest correct form; in float64 it is the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision
from tritonkern.ops.temporal_adapter.op import Conv, Grid, Norm, hidden_dtype


@full_precision
def adapter_in_forward(
    tokens: Tensor, norm: Norm, conv: Conv, grid: Grid, dtype: torch.dtype, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T, prefix + h * w, C]` -> relu(conv(norm(patches))) as `hidden`; mean and 1 / deviation `[B]`, float64."""
    patches = accurate(_patches(tokens, grid))
    if statistics is None:
        mean = patches.mean((1, 2, 3))
        variance = (patches - _per_entry(mean)).square().mean((1, 2, 3))
        rstd = (variance + norm.eps).rsqrt()
    else:
        mean, rstd = statistics.to(patches.dtype, copy=True).unbind()
    compute = hidden_dtype(tokens.device, dtype)
    image = _image(_normed(patches, norm, mean, rstd).to(compute), grid)
    image = _convolved(image, conv).relu()
    return _to_hidden(image, tokens.shape, grid.pool), mean.double().clone(), rstd.double().clone()


def adapter_in_backward(
    grad_hidden: Tensor,
    tokens: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens (zero for the prefix), norm and convolution, `[0]` where not needed."""
    of_tokens, of_norm, of_conv = needs_grad
    patches = accurate(_patches(tokens, grid))
    mean, rstd = (x.to(patches.dtype) for x in (mean, rstd))
    normed = _image(_normed(patches, norm, mean, rstd).to(hidden.dtype), grid)
    grad = _from_hidden(torch.where(hidden <= 0, torch.zeros_like(hidden), grad_hidden), grid)
    grad_image, grad_weight, grad_bias = _convolution_backward(
        grad, normed, conv_weight, [of_tokens or of_norm, of_conv]
    )
    # Results of an operator must not share memory, not even empty ones.
    grad_tokens, grad_norm_weight, grad_norm_bias = (x.new_empty(0) for x in (tokens, norm.weight, norm.bias))
    if of_tokens or of_norm:
        centred = (patches - _per_entry(mean)) * _per_entry(rstd)
        grad = _from_image(grad_image, tokens.shape).to(patches.dtype)
        if of_norm:
            grad_norm_weight = (grad * centred).sum((0, 1, 2)).to(norm.weight.dtype)
            grad_norm_bias = grad.sum((0, 1, 2)).to(norm.bias.dtype)
        if of_tokens:
            grad = grad * norm.weight.to(grad.dtype)
            along = (grad * centred).mean((1, 2, 3), keepdim=True)
            grad = _per_entry(rstd) * (grad - grad.mean((1, 2, 3), keepdim=True) - centred * along)
            prefix = tokens.shape[2] - grid.rows * grid.columns
            grad_tokens = F.pad(grad, (0, 0, prefix, 0)).to(tokens.dtype)
    return grad_tokens, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias


@full_precision
def adapter_out_forward(hidden: Tensor, conv: Conv, tokens: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """conv(relu(hidden)) added to the patches of `tokens`, or `[B, T, h * w, C]` alone where there are none."""
    update = _from_image(_convolved(_from_hidden(hidden.relu(), grid), conv), hidden.shape)
    if tokens is None:
        return update.to(dtype).contiguous()
    prefix = tokens.shape[2] - grid.rows * grid.columns
    return torch.cat([tokens[:, :, :prefix], (tokens[:, :, prefix:] + update).to(tokens.dtype)], dim=2)


def adapter_out_backward(
    grad_out: Tensor, hidden: Tensor, conv_weight: Tensor, grid: Grid, dtype: torch.dtype, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden and of the convolution, `[0]` where not needed."""
    grad = _image(_patches(grad_out, grid).to(hidden.dtype), grid)
    image = _from_hidden(hidden.relu(), grid)
    grad_image, grad_weight, grad_bias = _convolution_backward(grad, image, conv_weight, needs_grad)
    grad_hidden = hidden.new_empty(0)
    if needs_grad[0]:
        grad_hidden = _to_hidden(grad_image, hidden.shape, grid.pool).masked_fill_(hidden <= 0, 0)
    return grad_hidden, grad_weight, grad_bias


def _convolved(image: Tensor, conv: Conv) -> Tensor:
    bias = None if conv.bias is None else conv.bias.to(image.dtype)
    return F.conv2d(image, conv.weight.to(image.dtype), bias, padding=1)


def _convolution_backward(
    grad: Tensor, image: Tensor, weight: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the image, and of weight and bias in the weight's dtype, `[0]` where not needed."""
    of_image, of_weight, of_bias = torch.ops.aten.convolution_backward(
        # PyTorch's slow convolution of one channel refuses strided weights.
        grad, image, weight.to(image.dtype).contiguous(), weight.shape[:1], (1, 1), (1, 1), (1, 1), False, (0, 0), 1,
        (needs_grad[0], needs_grad[1], needs_grad[1]),
    )  # fmt: skip
    if not needs_grad[1]:
        return of_image, weight.new_empty(0), weight.new_empty(0)
    return of_image, of_weight.to(weight.dtype).contiguous(), of_bias.to(weight.dtype)


def _patches(tokens: Tensor, grid: Grid) -> Tensor:
    return tokens[:, :, tokens.shape[2] - grid.rows * grid.columns :]


def _per_entry(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return x[:, None, None, None]


def _normed(patches: Tensor, norm: Norm, mean: Tensor, rstd: Tensor) -> Tensor:
    centred = (patches - _per_entry(mean)) * _per_entry(rstd)
    return centred * norm.weight.to(patches.dtype) + norm.bias.to(patches.dtype)


def _image(patches: Tensor, grid: Grid) -> Tensor:
    return rearrange(patches, "b t (h w) c -> (b t) c h w", h=grid.rows)


def _from_image(image: Tensor, like: torch.Size) -> Tensor:
    """[B * T, C, h, w] -> [B, T, h * w, C]"""
    return rearrange(image, "(b t) c h w -> b t (h w) c", b=like[0], t=like[1])


def _to_hidden(image: Tensor, like: torch.Size, pool: int) -> Tensor:
    """[B * T, O, h, w] -> [B, T, h/p * w/p, p * p * O]"""
    x = rearrange(image, "(b t) o (h p) (w q) -> b t (h w) (p q o)", b=like[0], t=like[1], p=pool, q=pool)
    return x.contiguous()


def _from_hidden(hidden: Tensor, grid: Grid) -> Tensor:
    """[B, T, h/p * w/p, p * p * O] -> [B * T, O, h, w]"""
    pool = grid.pool
    return rearrange(hidden, "b t (h w) (p q o) -> (b t) o (h p) (w q)", h=grid.rows // pool, p=pool, q=pool)
