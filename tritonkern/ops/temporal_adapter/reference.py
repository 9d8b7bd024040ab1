"""Eager PyTorch, the plainest correct form; in float64 it is what the tests believe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.ops._contract import accurate, full_precision
from tritonkern.ops.temporal_adapter.op import hidden_dtype


@full_precision
def in_forward(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T, prefix + h * w, C]` -> relu(conv(norm(patches))) as `hidden`; mean and 1 / deviation `[B]`, float64."""
    patches = accurate(_patches(tokens, rows, columns))
    mean = patches.mean((1, 2, 3))
    variance = (patches - _per_entry(mean)).square().mean((1, 2, 3))
    rstd = (variance + eps).rsqrt()
    compute = hidden_dtype(tokens.device, dtype)
    normed = _normed(patches, norm_weight, norm_bias, mean, rstd).to(compute)
    image = F.conv2d(_image(normed, rows, columns), weight.to(compute), bias.to(compute), padding=1)
    return _to_hidden(image.relu(), tokens.shape[:2], pool), mean.double(), rstd.double()


def in_backward(
    grad_hidden: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens (zero for the prefix), norm_weight and norm_bias, weight and bias, or `[0]` if not needed."""
    need_tokens, need_norm, need_conv = needs
    patches = accurate(_patches(tokens, rows, columns))
    mean, rstd = (x.to(patches.dtype) for x in (mean, rstd))
    normed = _normed(patches, norm_weight, norm_bias, mean, rstd).to(hidden.dtype)
    grad = torch.where(hidden <= 0, torch.zeros_like(hidden), grad_hidden)
    grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _from_hidden(grad, rows, columns, pool), _image(normed, rows, columns), weight.to(hidden.dtype),
        weight.shape[:1], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (need_tokens or need_norm, need_conv, need_conv),
    )  # fmt: skip
    # Outputs of an operator must not share memory, not even none.
    grad_tokens = tokens.new_empty(0)
    grad_norm_weight, grad_norm_bias = norm_weight.new_empty(0), norm_bias.new_empty(0)
    if need_tokens or need_norm:
        centred = (patches - _per_entry(mean)) * _per_entry(rstd)
        grad = grad_image.movedim(1, -1).reshape(patches.shape).to(patches.dtype)
        if need_norm:
            grad_norm_weight = (grad * centred).sum((0, 1, 2)).to(norm_weight.dtype)
            grad_norm_bias = grad.sum((0, 1, 2)).to(norm_bias.dtype)
        if need_tokens:
            grad = grad * norm_weight.to(grad.dtype)
            along = (grad * centred).mean((1, 2, 3), keepdim=True)
            grad = _per_entry(rstd) * (grad - grad.mean((1, 2, 3), keepdim=True) - centred * along)
            prefix = tokens.shape[2] - rows * columns
            grad_tokens = F.pad(grad, (0, 0, prefix, 0)).to(tokens.dtype)
    return (
        grad_tokens,
        grad_norm_weight,
        grad_norm_bias,
        grad_weight.to(weight.dtype).contiguous() if need_conv else weight.new_empty(0),
        grad_bias.to(weight.dtype) if need_conv else weight.new_empty(0),
    )


@full_precision
def out_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    tokens: Tensor | None,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
) -> Tensor:
    """conv(relu(hidden)) added to the patches of `tokens`, or `[B, T, h * w, C]` alone where there are none."""
    image = _from_hidden(hidden.relu(), rows, columns, pool)
    image = F.conv2d(image, weight.to(hidden.dtype), bias.to(hidden.dtype), padding=1)
    update = image.movedim(1, -1).reshape(*hidden.shape[:2], rows * columns, len(weight))
    if tokens is None:
        return update.to(dtype)
    prefix = tokens.shape[2] - rows * columns
    return torch.cat([tokens[:, :, :prefix], (tokens[:, :, prefix:] + update).to(tokens.dtype)], dim=2)


def out_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, and of weight and bias, or `[0]` if not needed."""
    need_hidden, need_conv = needs
    grad = _image(_patches(grad_out, rows, columns).to(hidden.dtype), rows, columns)
    image = _from_hidden(hidden.relu(), rows, columns, pool)
    grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, image, weight.to(hidden.dtype),
        weight.shape[:1], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (need_hidden, need_conv, need_conv),
    )  # fmt: skip
    grad_hidden = hidden.new_empty(0)
    if need_hidden:
        grad_hidden = _to_hidden(grad_image, hidden.shape[:2], pool).masked_fill_(hidden <= 0, 0)
    return (
        grad_hidden,
        grad_weight.to(weight.dtype).contiguous() if need_conv else weight.new_empty(0),
        grad_bias.to(weight.dtype) if need_conv else weight.new_empty(0),
    )


def _patches(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens[:, :, tokens.shape[2] - rows * columns :]


def _per_entry(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return x[:, None, None, None]


def _normed(patches: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    centred = (patches - _per_entry(mean)) * _per_entry(rstd)
    return centred * weight.to(patches.dtype) + bias.to(patches.dtype)


def _image(patches: Tensor, rows: int, columns: int) -> Tensor:
    """[B, T, h * w, C] -> [B * T, C, h, w], channels last in memory"""
    return patches.flatten(0, 1).unflatten(1, (rows, columns)).movedim(-1, 1)


def _to_hidden(image: Tensor, leading: torch.Size, pool: int) -> Tensor:
    """[B * T, O, h, w] -> [B, T, h/p * w/p, p * p * O]"""
    count, channels, rows, columns = image.shape
    x = image.reshape(count, channels, rows // pool, pool, columns // pool, pool).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(*leading, rows // pool * (columns // pool), pool**2 * channels).contiguous()


def _from_hidden(hidden: Tensor, rows: int, columns: int, pool: int) -> Tensor:
    """[B, T, h/p * w/p, p * p * O] -> [B * T, O, h, w], channels last in memory"""
    x = hidden.flatten(0, 1).unflatten(1, (rows // pool, columns // pool))
    x = x.unflatten(-1, (pool, pool, hidden.shape[-1] // pool**2)).permute(0, 1, 3, 2, 4, 5)
    return x.flatten(3, 4).flatten(1, 2).movedim(-1, 1)
