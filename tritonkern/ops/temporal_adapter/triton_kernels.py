"""Launchers of the adapter's Triton kernels, single passes before and after cuDNN's convolutions.

Convolutions take and return channels-last images without a bias, which PyTorch would add in a pass of its own.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator, full_precision
from tritonkern.ops._triton import Launch, aligned, readable, register_limit
from tritonkern.ops.temporal_adapter import configs, triton_norm, triton_pixels
from tritonkern.ops.temporal_adapter.op import Conv, Grid, Norm, hidden_dtype, hidden_shape


@full_precision
def adapter_in_forward(
    tokens: Tensor, norm: Norm, conv: Conv, grid: Grid, dtype: torch.dtype, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.adapter_in_forward`."""
    compute = hidden_dtype(tokens.device, dtype)
    if not tokens.numel():
        hidden = tokens.new_empty(hidden_shape(tokens, grid, len(conv.weight)), dtype=compute)
        mean, rstd = (tokens.new_zeros(len(tokens), dtype=torch.float64) for _ in range(2))
        return hidden, mean, rstd
    if statistics is None:
        mean, rstd = _statistics(tokens, grid.rows * grid.columns, norm.eps)
    else:
        mean, rstd = (x.clone() for x in statistics.unbind())
    image = _convolved(_normalised(tokens, norm, mean, rstd, grid, compute), conv.weight)
    return _to_hidden(image, tokens, grid, conv.bias), mean, rstd


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
    """As `reference.adapter_in_backward`."""
    of_tokens, of_norm, of_conv = needs_grad
    (batch, frames, length, channels), pixels = tokens.shape, grid.rows * grid.columns
    # Results of an operator must not share memory, not even empty ones.
    grad_tokens = tokens.new_empty(tokens.shape if of_tokens else 0)
    grad_norm_weight, grad_norm_bias = (x.new_zeros(channels if of_norm else 0) for x in (norm.weight, norm.bias))
    grad_weight = conv_weight.new_zeros(conv_weight.shape if of_conv else 0)
    grad_bias = conv_weight.new_zeros(len(conv_weight) if of_conv else 0)
    if tokens.numel() and any(needs_grad):
        mean, rstd = mean.contiguous(), rstd.contiguous()
        grad = _from_hidden(grad_hidden, grid, aligned(hidden))
        if of_conv:
            normed = _normalised(tokens, norm, mean, rstd, grid, hidden.dtype)
            sums = _sums(grad.view(batch, frames, pixels, len(conv_weight)), pixels)
            grad_bias = sums.sum((0, 1)).to(conv_weight.dtype)
        else:  # PyTorch asks for its shape
            normed = grad.new_empty((batch * frames, grid.rows, grid.columns, channels))
        grad, grad_conv = _convolution_backward(grad, normed, conv_weight, of_tokens or of_norm, of_conv)
        if of_conv:
            grad_weight = grad_conv
        if of_tokens or of_norm:
            sums = _sums(grad.view(batch, frames, pixels, channels), pixels, tokens, mean, rstd)
        if of_norm:
            grad_norm_bias = sums[:, 0].sum(0).to(norm.bias.dtype)
            grad_norm_weight = sums[:, 1].sum(0).to(norm.weight.dtype)
        if of_tokens:
            averages = (sums * norm.weight.double()).sum(2) / (frames * pixels * channels)
            tokens, strides = readable(tokens)
            given = (grad, tokens, norm.weight.contiguous(), mean, rstd, averages.contiguous(), grad_tokens)
            sizes = (frames, length - pixels, pixels)
            _launch("tokens", _types(given), batch * frames, length, sizes, strides, channels, tokens.dtype)(*given)
    return grad_tokens, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias


@full_precision
def adapter_out_forward(hidden: Tensor, conv: Conv, tokens: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """As `reference.adapter_out_forward`."""
    (batch, frames), channels, pixels = hidden.shape[:2], len(conv.weight), grid.rows * grid.columns
    if tokens is None:
        result = hidden.new_empty((batch, frames, pixels, channels), dtype=dtype)
    else:
        result = tokens.new_empty(tokens.shape)
    if hidden.numel():
        update = _convolved(_from_hidden(hidden, grid), conv.weight)
        length = result.shape[2]
        tokens, strides = (None, (0, 0, 0)) if tokens is None else readable(tokens)
        given = (update, None if conv.bias is None else conv.bias.contiguous(), tokens, result)
        sizes = (frames, length - pixels, pixels)
        _launch("add", _types(given), batch * frames, length, sizes, strides, channels, update.dtype)(*given)
    return result


def adapter_out_backward(
    grad_out: Tensor, hidden: Tensor, conv_weight: Tensor, grid: Grid, dtype: torch.dtype, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.adapter_out_backward`."""
    of_hidden, of_conv = needs_grad
    (batch, frames), (channels, hidden_channels) = hidden.shape[:2], conv_weight.shape[:2]
    pixels = grid.rows * grid.columns
    grad_hidden = hidden.new_empty(hidden.shape if of_hidden else 0)
    grad_weight = conv_weight.new_zeros(conv_weight.shape if of_conv else 0)
    grad_bias = conv_weight.new_zeros(channels if of_conv else 0)
    if hidden.numel() and any(needs_grad):
        hidden = aligned(hidden)
        patches = grad_out[:, :, grad_out.shape[2] - pixels :]
        if of_conv:
            copied = patches.dtype != hidden.dtype or not patches.is_contiguous()
            grad = hidden.new_empty(patches.shape) if copied else patches
            sums = _sums(grad_out, pixels, copy=grad if copied else None)
            grad_bias = sums.sum((0, 1)).to(conv_weight.dtype)
            image = _from_hidden(hidden, grid)
        else:
            grad = patches.to(hidden.dtype).contiguous()
            image = hidden.new_empty((batch * frames, grid.rows, grid.columns, hidden_channels))
        grad = grad.view(batch * frames, grid.rows, grid.columns, channels)
        grad_image, grad_conv = _convolution_backward(grad, image, conv_weight, of_hidden, of_conv)
        if of_hidden:
            grad_hidden = _to_hidden(grad_image, hidden, grid, gate=hidden)
        if of_conv:
            grad_weight = grad_conv
    return grad_hidden, grad_weight, grad_bias


_KERNELS = {
    "statistics": triton_norm.temporal_adapter_fwd_kernel_statistics,
    "normalise": triton_norm.temporal_adapter_fwd_kernel_normalise,
    "sums": triton_norm.temporal_adapter_bwd_kernel_sums,
    "tokens": triton_norm.temporal_adapter_bwd_kernel_tokens,
    "rectify": triton_pixels.temporal_adapter_kernel_rectify,
    "add": triton_pixels.temporal_adapter_fwd_kernel_add,
}


def _types(tensors: tuple) -> tuple:
    return tuple([None if x is None else x.dtype for x in tensors])


@functools.lru_cache(maxsize=1024)
def _launch(
    kernel: str, types: tuple, frames: int, rows: int, sizes: tuple, strides: tuple, channels: int, dtype: torch.dtype,
    each: int = 0, **constants: int
) -> Launch:  # fmt: skip
    """Of a kernel over the `rows` of `frames` frames, on tensors of `types`. Each program walks `each` tiles, or has
    one. The numbers of a kernel are `sizes`, the programs along the rows of a frame, and `strides`."""
    tile = configs.tile(channels, dtype)
    along = triton.cdiv(rows, tile.rows * (each or 1))
    walk = {"EACH": each} if each else {}
    return Launch(
        _KERNELS[kernel], frames * along * triton.cdiv(channels, tile.block), *sizes, along, *strides,
        **constants, C=channels, BLOCK=tile.block, ROWS=tile.rows, **walk, num_warps=configs.NUM_WARPS,
        **register_limit(),
    )  # fmt: skip


def _chunks(pixels: int, channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Programs of a kernel that sums: along the rows of a frame, and along its channels."""
    tile = configs.tile(channels, dtype)
    return triton.cdiv(pixels, tile.rows * configs.EACH), triton.cdiv(channels, tile.block)


def _statistics(tokens: Tensor, pixels: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation `[B]` of the patches, float64."""
    batch, frames, length, channels = tokens.shape
    dtype, programs = tokens.dtype, frames * math.prod(_chunks(pixels, channels, tokens.dtype))
    partial = tokens.new_empty((batch * programs, 3), dtype=torch.float64)
    tokens, strides = readable(tokens)
    sizes = (frames, length - pixels, pixels)
    launch = _launch("statistics", (dtype,), batch * frames, pixels, sizes, strides, channels, dtype, configs.EACH)
    launch(tokens, partial)
    mean, rstd = (tokens.new_empty(batch, dtype=torch.float64) for _ in range(2))
    _moments_launch(batch, programs, eps)(partial, mean, rstd)
    return mean, rstd


@functools.lru_cache(maxsize=1024)
def _moments_launch(batch: int, programs: int, eps: float) -> Launch:
    return Launch(triton_norm.temporal_adapter_fwd_kernel_moments, batch, programs, eps, BLOCK=256, num_warps=4)


def _sums(
    grad: Tensor,
    pixels: int,
    tokens: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """Sums over the pixels of grad `[B, T, prefix + h * w, C]` and, with tokens, of grad * their normalised patches:
    `[B, 1 or 2, C]`, float64. The patches of grad are copied to `copy` in passing."""
    batch, frames, length, channels = grad.shape
    dtype, (chunks, _) = grad.dtype, _chunks(pixels, channels, grad.dtype)
    kinds = 1 if tokens is None else 2
    partial = grad.new_empty((batch, frames * chunks, kinds, channels), dtype=accumulator(dtype))
    prefix = 0
    strides: tuple[int, ...] = (0, 0, 0)
    if tokens is not None:
        prefix, (tokens, strides) = tokens.shape[2] - pixels, readable(tokens)
    grad, grad_strides = readable(grad)
    given = (grad, tokens, mean, rstd, copy, partial)
    sizes = (frames, length - pixels, prefix, pixels)
    launch = _launch(
        "sums", _types(given), batch * frames, pixels, sizes, grad_strides + strides, channels, dtype, configs.EACH
    )
    launch(*given)
    return partial.sum(1, dtype=torch.float64)


def _normalised(tokens: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The normalised patches as an image `[B * T, h, w, C]`."""
    (batch, frames, length, channels), pixels = tokens.shape, grid.rows * grid.columns
    normed = tokens.new_empty((batch * frames, grid.rows, grid.columns, channels), dtype=dtype)
    tokens, strides = readable(tokens)
    given = (tokens, norm.weight.contiguous(), norm.bias.contiguous(), mean, rstd, normed)
    sizes = (frames, length - pixels, pixels)
    _launch("normalise", _types(given), batch * frames, pixels, sizes, strides, channels, tokens.dtype)(*given)
    return normed


def _to_hidden(
    image: Tensor, like: Tensor, grid: Grid, bias: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """`[B * T, h, w, O]` + bias -> `[B, T, h/p * w/p, p * p * O]`, zero where that or `gate` is not positive."""
    hidden = image.new_empty(hidden_shape(like, grid, image.shape[3]))
    _rectify(image, bias, gate, hidden, grid, True)
    return hidden


def _from_hidden(hidden: Tensor, grid: Grid, gate: Tensor | None = None) -> Tensor:
    """`[B, T, h/p * w/p, p * p * O]` -> `[B * T, h, w, O]`, zero where it or `gate` is not positive."""
    batch, frames, _, width = hidden.shape
    image = hidden.new_empty((batch * frames, grid.rows, grid.columns, width // grid.pool**2))
    _rectify(aligned(hidden), None, gate, image, grid, False)
    return image


def _rectify(
    source: Tensor, bias: Tensor | None, gate: Tensor | None, result: Tensor, grid: Grid, to_hidden: bool
) -> None:
    channels, pixels = (source if to_hidden else result).shape[-1], grid.rows * grid.columns
    given = (source, None if bias is None else bias.contiguous(), gate, result)
    frames = source.numel() // (pixels * channels)
    _launch(
        "rectify", _types(given), frames, pixels, (grid.columns, pixels), (), channels, source.dtype,
        POOL=grid.pool, TO_HIDDEN=to_hidden,
    )(*given)  # fmt: skip


def _convolved(image: Tensor, weight: Tensor) -> Tensor:
    """`[B * T, h, w, C]` -> `[B * T, h, w, O]`"""
    result = torch.conv2d(image.movedim(-1, 1), weight.to(image.dtype), padding=1)
    return result.movedim(1, -1).contiguous()


def _convolution_backward(
    grad: Tensor, image: Tensor, weight: Tensor, need_image: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the image `[B * T, h, w, C]` and of the weight, where needed."""
    of_image, of_weight, _ = torch.ops.aten.convolution_backward(
        grad.movedim(-1, 1), image.movedim(-1, 1), weight.to(grad.dtype), None, (1, 1), (1, 1), (1, 1), False, (0, 0),
        1, (need_image, need_weight, False),
    )  # fmt: skip
    if need_image:
        of_image = of_image.movedim(1, -1).contiguous()
    if need_weight:
        of_weight = of_weight.to(weight.dtype).contiguous()
    return of_image, of_weight
