"""Checks, operators and gradients of the two ends of a temporal adapter.

Tokens are `[B, T, prefix + h * w, C]`: class and register tokens, then the patches of a frame, row by row. Between the
two ends is `hidden`, an image of O channels stored patch after patch, `[B, T, h/p * w/p, p * p * O]`: a convolution
whose kernel and stride are p is a linear layer on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonkern.ops._checks import check_eps, check_flags, check_saved, check_strided, check_tensors
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "temporal_adapter"
HALF = (torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """GroupNorm with one group; weight and bias `[C]`."""

    weight: Tensor
    bias: Tensor
    eps: float


class Conv(NamedTuple):
    """3 x 3 convolution; weight `[O, C, 3, 3]`, bias `[O]`."""

    weight: Tensor
    bias: Tensor | None


class Grid(NamedTuple):
    """Patches of a frame, h x w, and the side p of the patches that `hidden` is stored in."""

    rows: int
    columns: int
    pool: int


def hidden_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of `hidden` where the convolutions have the precision of `dtype`.

    CPUs compute 16-bit convolutions in float32, and their linear layers are faster in it as well.
    """
    return torch.float32 if device.type == "cpu" and dtype in HALF else dtype


def hidden_shape(like: Tensor, grid: Grid, channels: int) -> tuple[int, int, int, int]:
    """`[B, T, h/p * w/p, p * p * O]` for `like`, which is `[B, T, ...]`."""
    rows, columns, pool = grid
    return like.shape[0], like.shape[1], rows * columns // pool**2, pool**2 * channels


@operator(NAME, "adapter_in_forward")
def adapter_in_fwd(
    tokens: Tensor, norm: Norm, conv: Conv, grid: Grid, dtype: torch.dtype, statistics: Tensor | None
) -> Results[tuple[Tensor, Tensor, Tensor]]:
    """relu(conv(norm(patches))) as `hidden`, and mean and 1 / deviation of the patches, `[B]`, float64.

    `dtype` says how precise the convolution is. `statistics` `[2, B]`, float64: a mean and a 1 / deviation to use in
    place of the patches' own.
    """
    check_inputs_in(tokens, norm, conv, grid, dtype)
    batch = tokens.shape[0]
    if statistics is not None:
        check_strided("statistics", statistics)
        if statistics.dtype != torch.float64 or statistics.shape != (2, batch) or statistics.device != tokens.device:
            raise ValueError(
                f"statistics must be float64 of shape {(2, batch)} on {tokens.device}, got {statistics.dtype} of shape "
                f"{tuple(statistics.shape)} on {statistics.device}"
            )
    return lambda: (
        tokens.new_empty(hidden_shape(tokens, grid, conv.weight.shape[0]), dtype=hidden_dtype(tokens.device, dtype)),
        tokens.new_empty((batch,), dtype=torch.float64),
        tokens.new_empty((batch,), dtype=torch.float64),
    )


@operator(NAME, "adapter_in_backward")
def adapter_in_bwd(
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
) -> Results[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of tokens (zero for the prefix), of the norm's and of the convolution's weight and bias.

    `needs_grad`: of the tokens, of the norm, of the convolution. A result that is not needed has shape `[0]`.
    """
    check_inputs_in(tokens, norm, Conv(conv_weight, None), grid, dtype)
    shape = hidden_shape(tokens, grid, conv_weight.shape[0])
    stored = hidden_dtype(tokens.device, dtype)
    expected: dict = {name: (x, shape, stored) for name, x in (("grad_hidden", grad_hidden), ("hidden", hidden))}
    expected |= {name: (x, tokens.shape[:1], torch.float64) for name, x in (("mean", mean), ("rstd", rstd))}
    check_saved(expected, tokens.device)
    check_flags(needs_grad, 3)
    of_tokens, of_norm, of_conv = needs_grad
    return lambda: (
        tokens.new_empty(tokens.shape if of_tokens else (0,)),
        norm.weight.new_empty(norm.weight.shape if of_norm else (0,)),
        norm.bias.new_empty(norm.bias.shape if of_norm else (0,)),
        conv_weight.new_empty(conv_weight.shape if of_conv else (0,)),
        conv_weight.new_empty(conv_weight.shape[:1] if of_conv else (0,)),
    )


@operator(NAME, "adapter_out_forward")
def adapter_out_fwd(
    hidden: Tensor, conv: Conv, tokens: Tensor | None, grid: Grid, dtype: torch.dtype
) -> Results[Tensor]:
    """conv(relu(hidden)) added to the patches of `tokens`, or alone, `[B, T, h * w, C]`, where there are none."""
    check_inputs_out(hidden, conv, tokens, grid, dtype)
    if tokens is not None:
        return lambda: tokens.new_empty(tokens.shape)
    return lambda: hidden.new_empty((*hidden.shape[:2], grid.rows * grid.columns, conv.weight.shape[0]), dtype=dtype)


@operator(NAME, "adapter_out_backward")
def adapter_out_bwd(
    grad_out: Tensor, hidden: Tensor, conv_weight: Tensor, grid: Grid, dtype: torch.dtype, needs_grad: list[bool]
) -> Results[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of hidden and of the convolution's weight and bias; `needs_grad`: of hidden, of the convolution."""
    check_inputs_out(hidden, Conv(conv_weight, None), None, grid, dtype)
    check_tensors(hidden=hidden, grad_out=grad_out)
    # Of the tokens, with their prefix, or of the patches alone.
    if grad_out.dim() != 4 or grad_out.shape[2] < grid.rows * grid.columns:
        raise ValueError(f"grad_out must have shape [B, T, prefix + h * w, C], got {tuple(grad_out.shape)}")
    _check_shape("grad_out", grad_out, (*hidden.shape[:2], grad_out.shape[2], conv_weight.shape[0]))
    _check_dtype(dtype, grad_out=grad_out)
    check_flags(needs_grad, 2)
    of_hidden, of_conv = needs_grad
    return lambda: (
        hidden.new_empty(hidden.shape if of_hidden else (0,)),
        conv_weight.new_empty(conv_weight.shape if of_conv else (0,)),
        conv_weight.new_empty(conv_weight.shape[:1] if of_conv else (0,)),
    )


def _save_in(ctx: Any, inputs: Any, output: Any) -> None:
    tokens, norm_weight, norm_bias, eps, conv_weight, _, *options, statistics, backend = inputs
    if statistics is not None:
        raise NotImplementedError(
            "temporal_adapter has no derivative where statistics are given; call it under torch.no_grad()"
        )
    ctx.eps, ctx.options = eps, (*options, backend)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(tokens, norm_weight, norm_bias, conv_weight, *output)


def _gradient_in(ctx: Any, grad_hidden: Tensor, *_: Any) -> Any:
    tokens, norm_weight, norm_bias, conv_weight, hidden, mean, rstd = ctx.saved_tensors
    of_tokens, of_weight, of_bias, _, of_conv_weight, of_conv_bias, *_ = ctx.needs_input_grad
    *options, backend = ctx.options
    needs_grad = [of_tokens, of_weight or of_bias, of_conv_weight or of_conv_bias]
    norm = norm_weight, norm_bias, ctx.eps
    grads = adapter_in_bwd(grad_hidden, tokens, *norm, conv_weight, hidden, mean, rstd, *options, needs_grad, backend)
    return (*grads[:3], None, *grads[3:])  # None for eps


def _save_out(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, conv_weight, _, _, *ctx.options = inputs
    ctx.save_for_backward(hidden, conv_weight)


def _gradient_out(ctx: Any, grad_out: Tensor) -> Any:
    of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
    *options, backend = ctx.options
    grads = (None, None, None)
    if of_hidden or of_weight or of_bias:
        grads = adapter_out_bwd(grad_out, *ctx.saved_tensors, *options, [of_hidden, of_weight or of_bias], backend)
    return (*grads, grad_out)


differentiable(adapter_in_fwd, _save_in, _gradient_in)
differentiable(adapter_out_fwd, _save_out, _gradient_out)


def check_inputs_in(tokens: Tensor, norm: Norm, conv: Conv, grid: Grid, dtype: torch.dtype) -> None:
    parameters = {"norm_weight": norm.weight, "norm_bias": norm.bias, "weight": conv.weight, "bias": conv.bias}
    check_tensors(tokens=tokens, **parameters)
    _check_dtype(dtype, tokens=tokens, **parameters)
    if tokens.dim() != 4:
        raise ValueError(f"tokens must have shape [B, T, prefix + h * w, C], got {tuple(tokens.shape)}")
    _check_grid(tokens.shape[2], grid)
    check_eps(norm.eps, tokens.dtype)
    channels, weight = tokens.shape[3], conv.weight
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3) or channels == 0 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [O, {channels}, 3, 3] for these tokens, got {tuple(weight.shape)}")
    _check_shape("norm_weight", norm.weight, (channels,))
    _check_shape("norm_bias", norm.bias, (channels,))
    if conv.bias is not None:
        _check_shape("bias", conv.bias, (weight.shape[0],))


def check_inputs_out(hidden: Tensor, conv: Conv, tokens: Tensor | None, grid: Grid, dtype: torch.dtype) -> None:
    weight = conv.weight
    check_tensors(hidden=hidden, weight=weight, bias=conv.bias, tokens=tokens)
    _check_dtype(dtype, weight=weight, bias=conv.bias, tokens=tokens)
    if hidden.dtype != hidden_dtype(hidden.device, dtype):
        raise TypeError(f"hidden must be {hidden_dtype(hidden.device, dtype)} here, got {hidden.dtype}; convert it")
    if hidden.dim() != 4:
        raise ValueError(f"hidden must have shape [B, T, h/pool * w/pool, pool^2 * O], got {tuple(hidden.shape)}")
    if tokens is not None and tokens.dim() != 4:
        raise ValueError(f"tokens must have shape [B, T, prefix + h * w, C], got {tuple(tokens.shape)}")
    _check_grid(grid.rows * grid.columns if tokens is None else tokens.shape[2], grid)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.numel() == 0:
        raise ValueError(f"weight must have shape [C, O, 3, 3], got {tuple(weight.shape)}")
    batch, frames = hidden.shape[:2]
    _check_shape("hidden", hidden, hidden_shape(hidden, grid, weight.shape[1]))
    if conv.bias is not None:
        _check_shape("bias", conv.bias, (weight.shape[0],))
    if tokens is not None:
        _check_shape("tokens", tokens, (batch, frames, tokens.shape[2], weight.shape[0]))


def _check_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """16-bit results accept every input but float64; otherwise every input must have the result's dtype."""
    for name, x in tensors.items():
        if x is not None and x.dtype != dtype and (dtype not in HALF or x.dtype == torch.float64):
            raise TypeError(f"{name} must be {dtype} here, got {x.dtype}; convert it, or run under autocast")


def _check_grid(length: int, grid: Grid) -> None:
    rows, columns, pool = grid
    if pool < 1 or rows < 1 or columns < 1 or rows % pool or columns % pool:
        raise ValueError(f"h and w of the tokens must be multiples of pool={pool}, got {rows} x {columns}")
    if length < rows * columns:
        raise ValueError(f"tokens must have at least h * w = {rows} * {columns} rows per frame, got {length}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
