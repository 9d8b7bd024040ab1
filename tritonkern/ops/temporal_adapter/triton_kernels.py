"""Launchers of the adapter's Triton kernels: what lies between the tokens and cuDNN's convolutions, in single passes.

Convolutions take and give channels-last images without a bias, which PyTorch would add in a pass of its own.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tritonkern.ops._contract import accumulator, adjacent_channels, full_precision
from tritonkern.ops.temporal_adapter import configs, triton_norm, triton_pixels
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
    """As reference.in_forward."""
    batch, frames = tokens.shape[:2]
    compute = hidden_dtype(tokens.device, dtype)
    if not tokens.numel():
        hidden = tokens.new_empty((batch, frames, rows * columns // pool**2, pool**2 * len(weight)), dtype=compute)
        mean, rstd = (tokens.new_zeros(batch, dtype=torch.float64) for _ in range(2))
        return hidden, mean, rstd
    tokens = adjacent_channels(tokens)
    mean, rstd = _statistics(tokens, rows * columns, eps)
    normed = _normalised(tokens, norm_weight, norm_bias, mean, rstd, rows, columns, compute)
    return _to_hidden(_convolved(normed, weight), tokens.shape[:2], pool, bias), mean, rstd


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
    """As reference.in_backward."""
    need_tokens, need_norm, need_conv = needs
    (batch, frames, length, channels), pixels = tokens.shape, rows * columns
    # Outputs of an operator must not share memory, not even none.
    grad_tokens = tokens.new_empty(tokens.shape if need_tokens else 0)
    grad_norm_weight, grad_norm_bias = (x.new_zeros(channels if need_norm else 0) for x in (norm_weight, norm_bias))
    grad_weight = weight.new_zeros(weight.shape if need_conv else 0)
    grad_bias = weight.new_zeros(len(weight) if need_conv else 0)
    if tokens.numel() and any(needs):
        tokens = adjacent_channels(tokens)
        grad = _from_hidden(grad_hidden, rows, columns, pool, hidden.contiguous())
        if need_conv:
            normed = _normalised(tokens, norm_weight, norm_bias, mean, rstd, rows, columns, hidden.dtype)
            grad_bias = _sums(grad.view(batch, frames, pixels, len(weight)), pixels).sum((0, 1)).to(weight.dtype)
        else:  # PyTorch wants to know its shape
            normed = grad.new_empty((batch * frames, rows, columns, channels))
        grad, of_weight = _convolution_backward(grad, normed, weight, need_tokens or need_norm, need_conv)
        if need_conv:
            grad_weight = of_weight
        if need_tokens or need_norm:
            sums = _sums(grad.view(batch, frames, pixels, channels), pixels, tokens, mean, rstd)
        if need_norm:
            grad_norm_bias = sums[:, 0].sum(0).to(norm_bias.dtype)
            grad_norm_weight = sums[:, 1].sum(0).to(norm_weight.dtype)
        if need_tokens:
            averages = (sums * norm_weight.double()).sum(2) / (frames * pixels * channels)
            tile, grid, tiles = _programs(batch * frames, length, channels, tokens.dtype)
            triton_norm.gradient_kernel[grid](
                grad, tokens, norm_weight.contiguous(), mean, rstd, averages, grad_tokens, frames, length - pixels,
                pixels, tiles, *tokens.stride()[:3], channels, tile.block, tile.rows, num_warps=configs.NUM_WARPS,
            )  # fmt: skip
    return grad_tokens, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias


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
    """As reference.out_forward."""
    (batch, frames), channels = hidden.shape[:2], len(weight)
    if tokens is None:
        result = hidden.new_empty((batch, frames, rows * columns, channels), dtype=dtype)
    else:
        tokens = adjacent_channels(tokens)
        result = tokens.new_empty(tokens.shape)
    if hidden.numel():
        update = _convolved(_from_hidden(hidden, rows, columns, pool), weight)
        length = result.shape[2]
        tile, grid, tiles = _programs(batch * frames, length, channels, update.dtype)
        strides = (0, 0, 0) if tokens is None else tokens.stride()[:3]
        triton_pixels.add_kernel[grid](
            update, bias.contiguous(), tokens, result, frames, length - rows * columns, rows * columns, tiles, *strides,
            channels, tile.block, tile.rows, num_warps=configs.NUM_WARPS,
        )  # fmt: skip
    return result


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
    """As reference.out_backward."""
    need_hidden, need_conv = needs
    (batch, frames), (channels, hidden_channels), pixels = hidden.shape[:2], weight.shape[:2], rows * columns
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = weight.new_zeros(weight.shape if need_conv else 0)
    grad_bias = weight.new_zeros(channels if need_conv else 0)
    if hidden.numel() and any(needs):
        hidden, grad_out = hidden.contiguous(), adjacent_channels(grad_out)
        patches = grad_out[:, :, grad_out.shape[2] - pixels :]
        if need_conv:
            copied = patches.dtype != hidden.dtype or not patches.is_contiguous()
            grad = hidden.new_empty(patches.shape) if copied else patches
            sums = _sums(grad_out, pixels, copy=grad if copied else None)
            grad_bias = sums.sum((0, 1)).to(weight.dtype)
            image = _from_hidden(hidden, rows, columns, pool)
        else:
            grad = patches.to(hidden.dtype).contiguous()
            image = hidden.new_empty((batch * frames, rows, columns, hidden_channels))
        grad = grad.view(batch * frames, rows, columns, channels)
        of_image, of_weight = _convolution_backward(grad, image, weight, need_hidden, need_conv)
        if need_hidden:
            grad_hidden = _to_hidden(of_image, hidden.shape[:2], pool, gate=hidden)
        if need_conv:
            grad_weight = of_weight
    return grad_hidden, grad_weight, grad_bias


def _programs(
    frames: int, rows: int, channels: int, dtype: torch.dtype, each: int = 1
) -> tuple[configs.Tile, tuple[int], int]:
    """The tile, the grid, and the programs along the `rows` of a frame, each of which walks `each` tiles."""
    tile = configs.tile(channels, dtype)
    along = triton.cdiv(rows, tile.rows * each)
    return tile, (frames * along * triton.cdiv(channels, tile.block),), along


def _statistics(tokens: Tensor, pixels: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation `[B]` of the patches, float64."""
    batch, frames, length, channels = tokens.shape
    tile, grid, chunks = _programs(batch * frames, pixels, channels, tokens.dtype, configs.EACH)
    partial = tokens.new_empty((*grid, 3), dtype=torch.float64)
    triton_norm.statistics_kernel[grid](
        tokens, partial, frames, length - pixels, pixels, chunks, *tokens.stride()[:3], channels, tile.block, tile.rows,
        configs.EACH, num_warps=configs.NUM_WARPS,
    )  # fmt: skip
    # Two tensors, not halves of one: where the second began would depend on B, and Triton compiles by alignment.
    mean, rstd = (tokens.new_empty(batch, dtype=torch.float64) for _ in range(2))
    triton_norm.moments_kernel[(batch,)](partial, mean, rstd, len(partial) // batch, eps, 256, num_warps=4)
    return mean, rstd


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
    tile, grid, chunks = _programs(batch * frames, pixels, channels, grad.dtype, configs.EACH)
    partial = grad.new_empty(
        (batch, frames * chunks, 1 if tokens is None else 2, channels), dtype=accumulator(grad.dtype)
    )
    prefix, strides = (0, (0, 0, 0)) if tokens is None else (tokens.shape[2] - pixels, tokens.stride()[:3])
    triton_norm.sums_kernel[grid](
        grad, tokens, mean, rstd, copy, partial, frames, length - pixels, prefix, pixels, chunks, *grad.stride()[:3],
        *strides, channels, tile.block, tile.rows, configs.EACH, num_warps=configs.NUM_WARPS,
    )  # fmt: skip
    return partial.sum(1, dtype=torch.float64)


def _normalised(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The patches as an image `[B * T, h, w, C]`."""
    (batch, frames, length, channels), pixels = tokens.shape, rows * columns
    normed = tokens.new_empty((batch * frames, rows, columns, channels), dtype=dtype)
    tile, grid, tiles = _programs(batch * frames, pixels, channels, tokens.dtype)
    triton_norm.normalise_kernel[grid](
        tokens, norm_weight.contiguous(), norm_bias.contiguous(), mean, rstd, normed, frames, length - pixels, pixels,
        tiles, *tokens.stride()[:3], channels, tile.block, tile.rows, num_warps=configs.NUM_WARPS,
    )  # fmt: skip
    return normed


def _to_hidden(
    image: Tensor, leading: torch.Size, pool: int, bias: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """`[B * T, h, w, O]` + bias -> `[B, T, h/p * w/p, p * p * O]`, zero where that or `gate` is not positive."""
    _, rows, columns, channels = image.shape
    hidden = image.new_empty((*leading, rows * columns // pool**2, pool**2 * channels))
    _rectify(image, bias, gate, hidden, rows, columns, pool, True)
    return hidden


def _from_hidden(hidden: Tensor, rows: int, columns: int, pool: int, gate: Tensor | None = None) -> Tensor:
    """`[B, T, h/p * w/p, p * p * O]` -> `[B * T, h, w, O]`, zero where it or `gate` is not positive."""
    batch, frames, _, width = hidden.shape
    image = hidden.new_empty((batch * frames, rows, columns, width // pool**2))
    _rectify(hidden.contiguous(), None, gate, image, rows, columns, pool, False)
    return image


def _rectify(
    source: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    result: Tensor,
    rows: int,
    columns: int,
    pool: int,
    to_hidden: bool,
) -> None:
    channels = (source if to_hidden else result).shape[-1]
    tile, grid, tiles = _programs(source.numel() // (rows * columns * channels), rows * columns, channels, source.dtype)
    triton_pixels.rectify_kernel[grid](
        source, None if bias is None else bias.contiguous(), gate, result, columns, rows * columns, tiles, pool,
        to_hidden, channels, tile.block, tile.rows, num_warps=configs.NUM_WARPS,
    )  # fmt: skip


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
