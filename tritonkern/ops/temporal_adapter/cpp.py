"""The calls into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES, adjacent_channels
from tritonkern.ops.temporal_adapter.op import HALF, hidden_dtype

# How a pixel is loaded, see csrc/temporal_adapter/call.h.
_PLAIN, _AFFINE, _RELU, _MASKED = range(4)


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
    """As reference.in_forward. The normalised tokens are never stored."""
    (batch, frames), channels, out_channels = tokens.shape[:2], tokens.shape[3], len(weight)
    compute = hidden_dtype(tokens.device, dtype)
    hidden = tokens.new_empty((batch, frames, rows * columns // pool**2, pool**2 * out_channels), dtype=compute)
    mean, rstd = (tokens.new_zeros(batch, dtype=torch.float64) for _ in range(2))
    if not hidden.numel():
        return hidden, mean, rstd
    call = (batch, frames, rows, columns), torch.get_num_threads()
    tokens = adjacent_channels(tokens)
    image = _token_image(tokens, rows, columns)
    _cpp.group_norm_statistics(*call, channels, eps, image, mean.data_ptr(), rstd.data_ptr())
    scale, shift = _affine(norm_weight, norm_bias, mean, rstd, compute)
    weight, bias = weight.to(compute), bias.to(compute).contiguous()
    _cpp.conv3x3(
        *call,
        channels,
        out_channels,
        _tile(dtype),
        (image, _AFFINE, None, scale.data_ptr(), shift.data_ptr()),
        weight.data_ptr(),
        weight.stride(),
        bias.data_ptr(),
        True,
        None,
        None,
        _hidden_image(hidden, columns, pool),
    )
    return hidden, mean, rstd


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
    (batch, frames, length, channels), out_channels = tokens.shape, len(weight)
    empty = hidden.numel() == 0
    # Outputs of an operator must not share memory, not even none.
    grad_tokens, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = (
        x.new_empty(0) for x in (tokens, norm_weight, norm_bias, weight, weight)
    )
    call = (batch, frames, rows, columns), torch.get_num_threads()
    tokens, grad_hidden, hidden = adjacent_channels(tokens), grad_hidden.contiguous(), hidden.contiguous()
    image = _token_image(tokens, rows, columns)
    mask = _hidden_image(hidden, columns, pool)
    masked = (_hidden_image(grad_hidden, columns, pool), _MASKED, mask, 0, 0)

    if need_conv:
        grad_weight = hidden.new_zeros(weight.shape)
        grad_bias = hidden.new_zeros(out_channels)
        if not empty:
            scale, shift = _affine(norm_weight, norm_bias, mean, rstd, hidden.dtype)
            normed = (image, _AFFINE, None, scale.data_ptr(), shift.data_ptr())
            results = grad_weight.data_ptr(), grad_bias.data_ptr()
            _cpp.conv3x3_weight_gradient(*call, channels, out_channels, _tile(dtype), normed, masked, *results)
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)

    if need_tokens or need_norm:
        if need_tokens:
            grad_tokens = tokens.new_empty((batch, frames, length, channels))
            grad_tokens[:, :, : length - rows * columns] = 0
        # The gradient of the normalised tokens, where the result will be if it fits there.
        in_place = need_tokens and tokens.dtype == hidden.dtype
        grad = grad_tokens if in_place else hidden.new_empty((batch, frames, rows * columns, channels))
        grad_image = _token_image(grad, rows, columns)
        sums, moments = (mean.new_zeros((batch, channels)) for _ in range(2))
        if not empty:
            flipped = weight.to(hidden.dtype).transpose(0, 1).flip(2, 3)
            _cpp.conv3x3(
                *call,
                out_channels,
                channels,
                _tile(dtype),
                masked,
                flipped.data_ptr(),
                flipped.stride(),
                0,
                False,
                None,
                None,
                grad_image,
            )
            results = sums.data_ptr(), moments.data_ptr()
            _cpp.group_norm_sums(*call, channels, image, grad_image, mean.data_ptr(), *results)
        if need_norm:
            grad_norm_weight = (moments * rstd[:, None]).sum(0).to(norm_weight.dtype)
            grad_norm_bias = sums.sum(0).to(norm_bias.dtype)
        if need_tokens and not empty:
            count = frames * rows * columns * channels
            factor = norm_weight.double()
            along = (moments * factor).sum(1) * rstd**3 / count
            slope = (rstd[:, None] * factor).to(hidden.dtype)
            scale = (-along).to(hidden.dtype)
            shift = (mean * along - rstd * (sums * factor).sum(1) / count).to(hidden.dtype)
            coefficients = slope.data_ptr(), scale.data_ptr(), shift.data_ptr()
            result = _token_image(grad_tokens, rows, columns)
            _cpp.group_norm_gradient(*call, channels, image, grad_image, *coefficients, result)
    return grad_tokens, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias


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
    """As reference.out_forward. Nothing of the size of the tokens is stored but the result."""
    (batch, frames), channels = hidden.shape[:2], len(weight)
    if tokens is None:
        out = hidden.new_empty((batch, frames, rows * columns, channels), dtype=dtype)
    else:
        tokens = adjacent_channels(tokens)
        prefix = tokens.shape[2] - rows * columns
        out = tokens.new_empty(tokens.shape)
        out[:, :, :prefix] = tokens[:, :, :prefix]
    if not hidden.numel():
        return out
    hidden, weight, bias = hidden.contiguous(), weight.to(hidden.dtype), bias.to(hidden.dtype).contiguous()
    _cpp.conv3x3(
        (batch, frames, rows, columns),
        torch.get_num_threads(),
        weight.shape[1],
        channels,
        _tile(dtype),
        (_hidden_image(hidden, columns, pool), _RELU, None, 0, 0),
        weight.data_ptr(),
        weight.stride(),
        bias.data_ptr(),
        False,
        None if tokens is None else _token_image(tokens, rows, columns),
        None,
        _token_image(out, rows, columns),
    )
    return out


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
    (batch, frames), (channels, hidden_channels) = hidden.shape[:2], weight.shape[:2]
    grad_hidden, grad_weight, grad_bias = (x.new_empty(0) for x in (hidden, weight, weight))
    call = (batch, frames, rows, columns), torch.get_num_threads()
    grad_out, hidden = adjacent_channels(grad_out), hidden.contiguous()
    image = _hidden_image(hidden, columns, pool)
    grad = (_token_image(grad_out, rows, columns), _PLAIN, None, 0, 0)
    if need_hidden:
        grad_hidden = hidden.new_empty(hidden.shape)
        if hidden.numel():
            flipped = weight.to(hidden.dtype).transpose(0, 1).flip(2, 3)
            _cpp.conv3x3(
                *call,
                channels,
                hidden_channels,
                _tile(dtype),
                grad,
                flipped.data_ptr(),
                flipped.stride(),
                0,
                False,
                None,
                image,
                _hidden_image(grad_hidden, columns, pool),
            )
    if need_conv:
        grad_weight, grad_bias = hidden.new_zeros(weight.shape), hidden.new_zeros(channels)
        if hidden.numel():
            source, results = (image, _RELU, None, 0, 0), (grad_weight.data_ptr(), grad_bias.data_ptr())
            _cpp.conv3x3_weight_gradient(*call, hidden_channels, channels, _tile(dtype), source, grad, *results)
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return grad_hidden, grad_weight, grad_bias


def _tile(dtype: torch.dtype) -> int:
    """Side of Winograd's tiles. Those of 4 need fewer products, and err less than 16-bit numbers round."""
    return 4 if dtype in HALF else 2


def _affine(weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """GroupNorm as x * scale + shift, both [B, C]."""
    scale = rstd[:, None] * weight.double()
    return scale.to(dtype), (bias.double() - mean[:, None] * scale).to(dtype)


def _token_image(tokens: Tensor, rows: int, columns: int) -> tuple:
    """The patches of [B, T, prefix + h * w, C]."""
    batch, frame, token, _ = tokens.stride()
    first = tokens.data_ptr() + (tokens.shape[2] - rows * columns) * token * tokens.element_size()
    return first, (batch, frame, columns * token, 0, token, 0), 1, CPP_DTYPES[tokens.dtype]


def _hidden_image(hidden: Tensor, columns: int, pool: int) -> tuple:
    """Contiguous [B, T, h/p * w/p, p * p * O]."""
    batch, frame, patch, _ = hidden.stride()
    channels = patch // pool**2
    strides = (batch, frame, columns // pool * patch, pool * channels, patch, channels)
    return hidden.data_ptr(), strides, pool, CPP_DTYPES[hidden.dtype]
