"""The calls into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import adjacent_channels
from tritonkern.ops.temporal_adapter.op import HALF, Conv, Grid, Norm, hidden_dtype, hidden_shape


def adapter_in_forward(
    tokens: Tensor, norm: Norm, conv: Conv, grid: Grid, dtype: torch.dtype, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.adapter_in_forward`. The normalised tokens are never stored."""
    compute = hidden_dtype(tokens.device, dtype)
    hidden = tokens.new_empty(hidden_shape(tokens, grid, len(conv.weight)), dtype=compute)
    if statistics is None:
        mean, rstd = (tokens.new_zeros(len(tokens), dtype=torch.float64) for _ in range(2))
    else:
        mean, rstd = (x.clone() for x in statistics.unbind())
    if hidden.numel():
        patches, threads = _patches(adjacent_channels(tokens), grid), torch.get_num_threads()
        if statistics is None:
            _cpp.temporal_adapter_statistics(patches, norm.eps, threads, mean, rstd)
        scale, shift = _affine(norm, mean, rstd, compute)
        out = _tiled(hidden, grid)
        weight, bias = conv.weight.to(compute), _as(conv.bias, compute)
        _cpp.temporal_adapter_conv3x3(
            patches, "affine", None, scale, shift, weight, bias, True, None, None, _tile(dtype), threads, out
        )
    return hidden, mean, rstd


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
    # Results of an operator must not share memory, not even empty ones.
    grad_tokens, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = (
        x.new_empty(0) for x in (tokens, norm.weight, norm.bias, conv_weight, conv_weight)
    )
    empty, threads, tile = hidden.numel() == 0, torch.get_num_threads(), _tile(dtype)
    tokens = adjacent_channels(tokens)
    patches = _patches(tokens, grid)
    gate, grad = _tiled(hidden.contiguous(), grid), _tiled(grad_hidden.contiguous(), grid)
    mean, rstd = mean.contiguous(), rstd.contiguous()

    if of_conv:
        grad_weight, grad_bias = hidden.new_zeros(conv_weight.shape), hidden.new_zeros(len(conv_weight))
        if not empty:
            scale, shift = _affine(norm, mean, rstd, hidden.dtype)
            _cpp.temporal_adapter_conv3x3_weight_gradient(
                patches, "affine", scale, shift, grad, gate, tile, threads, grad_weight, grad_bias
            )
        grad_weight, grad_bias = grad_weight.to(conv_weight.dtype), grad_bias.to(conv_weight.dtype)

    if of_tokens or of_norm:
        prefix = tokens.shape[2] - grid.rows * grid.columns
        if of_tokens:
            grad_tokens = tokens.new_empty(tokens.shape)
            grad_tokens[:, :, :prefix] = 0
        # The gradient of the normalised patches is written where the result will be, if that has the same dtype.
        in_place = of_tokens and tokens.dtype == hidden.dtype
        grad_normed = _patches(grad_tokens, grid) if in_place else hidden.new_empty(patches.shape)
        sums, moments = (mean.new_zeros((len(tokens), tokens.shape[3])) for _ in range(2))
        if not empty:
            flipped = conv_weight.to(hidden.dtype).transpose(0, 1).flip(2, 3)
            _cpp.temporal_adapter_conv3x3(
                grad, "masked", gate, None, None, flipped, None, False, None, None, tile, threads, grad_normed
            )
            _cpp.temporal_adapter_sums(patches, grad_normed, mean, threads, sums, moments)
        if of_norm:
            grad_norm_weight = (moments * rstd[:, None]).sum(0).to(norm.weight.dtype)
            grad_norm_bias = sums.sum(0).to(norm.bias.dtype)
        if of_tokens and not empty:
            coefficients = _coefficients(norm, mean, rstd, sums, moments, patches[0].numel(), hidden.dtype)
            result = _patches(grad_tokens, grid)
            _cpp.temporal_adapter_norm_gradient(patches, grad_normed, *coefficients, threads, result)
    return grad_tokens, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias


def adapter_out_forward(hidden: Tensor, conv: Conv, tokens: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """As `reference.adapter_out_forward`. Nothing of the size of the tokens is stored but the result."""
    residual = None
    if tokens is None:
        out = hidden.new_empty((*hidden.shape[:2], grid.rows * grid.columns, len(conv.weight)), dtype=dtype)
    else:
        tokens = adjacent_channels(tokens)
        prefix = tokens.shape[2] - grid.rows * grid.columns
        out, residual = tokens.new_empty(tokens.shape), _patches(tokens, grid)
        out[:, :, :prefix] = tokens[:, :, :prefix]
    if hidden.numel():
        source, result = _tiled(hidden.contiguous(), grid), _patches(out, grid)
        weight, bias = conv.weight.to(hidden.dtype), _as(conv.bias, hidden.dtype)
        threads, tile = torch.get_num_threads(), _tile(dtype)
        _cpp.temporal_adapter_conv3x3(
            source, "relu", None, None, None, weight, bias, False, residual, None, tile, threads, result
        )
    return out


def adapter_out_backward(
    grad_out: Tensor, hidden: Tensor, conv_weight: Tensor, grid: Grid, dtype: torch.dtype, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.adapter_out_backward`."""
    of_hidden, of_conv = needs_grad
    grad_hidden, grad_weight, grad_bias = (x.new_empty(0) for x in (hidden, conv_weight, conv_weight))
    empty, threads, tile = hidden.numel() == 0, torch.get_num_threads(), _tile(dtype)
    hidden = hidden.contiguous()
    image, grad = _tiled(hidden, grid), _patches(adjacent_channels(grad_out), grid)
    if of_hidden:
        grad_hidden = hidden.new_empty(hidden.shape)
        if not empty:
            flipped, result = conv_weight.to(hidden.dtype).transpose(0, 1).flip(2, 3), _tiled(grad_hidden, grid)
            _cpp.temporal_adapter_conv3x3(
                grad, "plain", None, None, None, flipped, None, False, None, image, tile, threads, result
            )
    if of_conv:
        grad_weight, grad_bias = hidden.new_zeros(conv_weight.shape), hidden.new_zeros(len(conv_weight))
        if not empty:
            _cpp.temporal_adapter_conv3x3_weight_gradient(
                image, "relu", None, None, grad, None, tile, threads, grad_weight, grad_bias
            )
        grad_weight, grad_bias = grad_weight.to(conv_weight.dtype), grad_bias.to(conv_weight.dtype)
    return grad_hidden, grad_weight, grad_bias


def _tile(dtype: torch.dtype) -> int:
    """Side of Winograd's tiles. Tiles of 4 need fewer products, and their error is below the rounding of 16 bits."""
    return 4 if dtype in HALF else 2


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype).contiguous()


def _affine(norm: Norm, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """GroupNorm as x * scale + shift, both `[B, C]`."""
    scale = rstd[:, None] * norm.weight.double()
    return scale.to(dtype), (norm.bias.double() - mean[:, None] * scale).to(dtype)


def _coefficients(
    norm: Norm, mean: Tensor, rstd: Tensor, sums: Tensor, moments: Tensor, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """slope `[B, C]`, scale `[B]` and shift `[B]` of grad_x = slope grad + scale x + shift; `count` = T h w C.

    With xhat = (x - mean) rstd: grad_x = rstd (weight grad - mean(weight grad) - xhat mean(weight grad xhat)).
    """
    factor = norm.weight.double()
    along = (moments * factor).sum(1) * rstd**3 / count
    slope = rstd[:, None] * factor
    shift = mean * along - rstd * (sums * factor).sum(1) / count
    return slope.to(dtype), (-along).to(dtype), shift.to(dtype)


def _patches(tokens: Tensor, grid: Grid) -> Tensor:
    """The image in tokens `[B, T, prefix + h * w, C]`: a view `[B, T, h, w, C]`."""
    return tokens[:, :, tokens.shape[2] - grid.rows * grid.columns :].unflatten(2, (grid.rows, grid.columns))


def _tiled(hidden: Tensor, grid: Grid) -> Tensor:
    """Contiguous `[B, T, h/p * w/p, p * p * O]` as the kernels take it: `[B, T, h/p, w/p, p, p * O]`."""
    rows, columns, pool = grid
    return hidden.unflatten(2, (rows // pool, columns // pool)).unflatten(4, (pool, hidden.shape[3] // pool))
