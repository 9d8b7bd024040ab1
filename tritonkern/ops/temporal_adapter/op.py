"""Contract, operators and gradients of the two ends of a temporal adapter.

Tokens are `[B, T, prefix + h * w, C]`: class and register tokens, then the patches of a frame, row by row. What lies
between the two ends is `hidden`, an image of O channels stored patch after patch, `[B, T, h/p * w/p, p * p * O]`: a
convolution whose kernel and stride are p is a linear layer on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import check_dense, check_saved

NAME = "temporal_adapter"
HALF = (torch.bfloat16, torch.float16)


def hidden_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What `hidden` is stored in where the convolutions are to have the precision of `dtype`.

    CPUs compute 16-bit convolutions in float32, and their linear layers are faster in it as well.
    """
    return torch.float32 if device.type == "cpu" and dtype in HALF else dtype


def _check_tensors(device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None:
            continue
        check_dense(name, x)
        if x.device != device:
            raise ValueError(f"{name} must be on the device of the tokens, {device}, got {x.device}; move one of them")


def _check_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Results in 16 bits may come from anything but float64; others have the dtype of all that they are made of."""
    for name, x in tensors.items():
        if x is not None and x.dtype != dtype and (dtype not in HALF or x.dtype == torch.float64):
            raise TypeError(f"{name} must be {dtype} here, got {x.dtype}; convert it, or run under autocast")


def _check_grid(length: int, rows: int, columns: int, pool: int) -> None:
    if pool < 1 or rows < 1 or columns < 1 or rows % pool or columns % pool:
        raise ValueError(f"h and w of the tokens must be multiples of pool={pool}, got {rows} x {columns}")
    if length < rows * columns:
        raise ValueError(f"tokens must have at least h * w = {rows} * {columns} rows a frame, got {length}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def check_in(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
) -> None:
    """Raise TypeError or ValueError unless the arguments of `adapter_in_fwd` fit together."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a torch.Tensor, got {type(tokens).__name__}")
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight, "bias": bias}
    _check_tensors(tokens.device, tokens=tokens, **parameters)
    _check_dtype(dtype, tokens=tokens, **parameters)
    if tokens.dim() != 4:
        raise ValueError(f"tokens must have shape [B, T, prefix + h * w, C], got {tuple(tokens.shape)}")
    _check_grid(tokens.shape[2], rows, columns, pool)
    channels = tokens.shape[3]
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3) or channels == 0 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [O, {channels}, 3, 3] for these tokens, got {tuple(weight.shape)}")
    _check_shape("norm_weight", norm_weight, (channels,))
    _check_shape("norm_bias", norm_bias, (channels,))
    if bias is not None:
        _check_shape("bias", bias, (weight.shape[0],))


def check_out(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor | None,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
) -> None:
    """Raise TypeError or ValueError unless the arguments of `adapter_out_fwd` fit together."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a torch.Tensor, got {type(hidden).__name__}")
    _check_tensors(hidden.device, hidden=hidden, weight=weight, bias=bias, tokens=tokens)
    _check_dtype(dtype, weight=weight, bias=bias, tokens=tokens)
    if hidden.dtype != hidden_dtype(hidden.device, dtype):
        raise TypeError(f"hidden must be {hidden_dtype(hidden.device, dtype)} here, got {hidden.dtype}; convert it")
    if hidden.dim() != 4:
        raise ValueError(f"hidden must have shape [B, T, h/pool * w/pool, pool^2 * O], got {tuple(hidden.shape)}")
    _check_grid(rows * columns if tokens is None else tokens.shape[2], rows, columns, pool)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.numel() == 0:
        raise ValueError(f"weight must have shape [C, O, 3, 3], got {tuple(weight.shape)}")
    batch, frames = hidden.shape[:2]
    _check_shape("hidden", hidden, (batch, frames, rows * columns // pool**2, pool**2 * weight.shape[1]))
    if bias is not None:
        _check_shape("bias", bias, (weight.shape[0],))
    if tokens is not None:
        _check_shape("tokens", tokens, (batch, frames, tokens.shape[2], weight.shape[0]))


def _check_in_backward(
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
) -> None:
    check_in(tokens, norm_weight, norm_bias, weight, None, rows, columns, pool, dtype)
    batch, frames = tokens.shape[:2]
    shape = (batch, frames, rows * columns // pool**2, pool**2 * weight.shape[0])
    stored = hidden_dtype(tokens.device, dtype)
    expected: dict = {name: (x, shape, stored) for name, x in (("grad_hidden", grad_hidden), ("hidden", hidden))}
    expected |= {name: (x, (batch,), torch.float64) for name, x in (("mean", mean), ("rstd", rstd))}
    check_saved(expected, tokens.device)
    _check_needs(needs, 3)


def _check_out_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> None:
    check_out(hidden, weight, None, None, rows, columns, pool, dtype)
    _check_tensors(hidden.device, grad_out=grad_out)
    # Of the tokens, with their prefix, or of the patches alone.
    if grad_out.dim() != 4 or grad_out.shape[2] < rows * columns:
        raise ValueError(f"grad_out must have shape [B, T, prefix + h * w, C], got {tuple(grad_out.shape)}")
    _check_shape("grad_out", grad_out, (*hidden.shape[:2], grad_out.shape[2], weight.shape[0]))
    _check_dtype(dtype, grad_out=grad_out)
    _check_needs(needs, 2)


def _check_needs(needs: list[bool], count: int) -> None:
    if len(needs) != count:
        raise ValueError(f"needs must have {count} entries, got {len(needs)}")


def _in_fwd(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_in(tokens, norm_weight, norm_bias, weight, bias, rows, columns, pool, dtype)
    kernels = _backends.load(NAME, tokens.device, backend)
    return kernels.in_forward(tokens, norm_weight, norm_bias, eps, weight, bias, rows, columns, pool, dtype)


def _in_fwd_fake(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_in(tokens, norm_weight, norm_bias, weight, bias, rows, columns, pool, dtype)
    batch, frames = tokens.shape[:2]
    shape = (batch, frames, rows * columns // pool**2, pool**2 * weight.shape[0])
    hidden = tokens.new_empty(shape, dtype=hidden_dtype(tokens.device, dtype))
    mean, rstd = (tokens.new_empty((batch,), dtype=torch.float64) for _ in range(2))
    return hidden, mean, rstd


def _in_bwd(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        grad_hidden,
        tokens,
        norm_weight,
        norm_bias,
        weight,
        hidden,
        mean,
        rstd,
        rows,
        columns,
        pool,
        dtype,
        needs,
    )
    _check_in_backward(*arguments)
    return _backends.load(NAME, tokens.device, backend).in_backward(*arguments)


def _in_bwd_fake(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_tokens, grad_norm, grad_conv = needs
    return (
        tokens.new_empty(tokens.shape if grad_tokens else (0,)),
        norm_weight.new_empty(norm_weight.shape if grad_norm else (0,)),
        norm_bias.new_empty(norm_bias.shape if grad_norm else (0,)),
        weight.new_empty(weight.shape if grad_conv else (0,)),
        weight.new_empty(weight.shape[:1] if grad_conv else (0,)),
    )


def _out_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    tokens: Tensor | None,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    check_out(hidden, weight, bias, tokens, rows, columns, pool, dtype)
    return _backends.load(NAME, hidden.device, backend).out_forward(
        hidden, weight, bias, tokens, rows, columns, pool, dtype
    )


def _out_fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    tokens: Tensor | None,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    check_out(hidden, weight, bias, tokens, rows, columns, pool, dtype)
    if tokens is not None:
        return tokens.new_empty(tokens.shape)
    return hidden.new_empty((*hidden.shape[:2], rows * columns, weight.shape[0]), dtype=dtype)


def _out_bwd(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
    needs: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_out_backward(grad_out, hidden, weight, rows, columns, pool, dtype, needs)
    return _backends.load(NAME, hidden.device, backend).out_backward(
        grad_out, hidden, weight, rows, columns, pool, dtype, needs
    )


def _out_bwd_fake(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: int,
    columns: int,
    pool: int,
    dtype: torch.dtype,
    needs: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden, grad_conv = needs
    return (
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_conv else (0,)),
        weight.new_empty(weight.shape[:1] if grad_conv else (0,)),
    )


adapter_in_fwd = _registry.define(
    "adapter_in_fwd(Tensor tokens, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor bias,"
    " SymInt rows, SymInt columns, SymInt pool, ScalarType dtype, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _in_fwd,
    _in_fwd_fake,
)
adapter_in_bwd = _registry.define(
    "adapter_in_bwd(Tensor grad_hidden, Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor weight,"
    " Tensor hidden, Tensor mean, Tensor rstd, SymInt rows, SymInt columns, SymInt pool, ScalarType dtype,"
    " bool[] needs, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _in_bwd,
    _in_bwd_fake,
)
adapter_out_fwd = _registry.define(
    "adapter_out_fwd(Tensor hidden, Tensor weight, Tensor bias, Tensor? tokens, SymInt rows, SymInt columns,"
    " SymInt pool, ScalarType dtype, str? backend=None) -> Tensor",
    _out_fwd,
    _out_fwd_fake,
)
adapter_out_bwd = _registry.define(
    "adapter_out_bwd(Tensor grad_out, Tensor hidden, Tensor weight, SymInt rows, SymInt columns, SymInt pool,"
    " ScalarType dtype, bool[] needs, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _out_bwd,
    _out_bwd_fake,
)


def _in_setup(ctx, inputs, output):
    tokens, norm_weight, norm_bias, _, weight, _, *ctx.options = inputs
    hidden, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, hidden, mean, rstd)


def _in_gradient(ctx, grad_hidden, *_):
    tokens, norm_weight, norm_bias, _, weight, bias, *_ = ctx.needs_input_grad
    *options, backend = ctx.options
    needs = [tokens, norm_weight or norm_bias, weight or bias]
    grads = list(adapter_in_bwd(grad_hidden, *ctx.saved_tensors, *options, needs, backend))
    grads.insert(3, None)  # eps
    needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
    return (*needed, *(None for _ in ctx.options))


def _out_setup(ctx, inputs, output):
    hidden, weight, _, _, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight)


def _out_gradient(ctx, grad_out):
    hidden, weight, bias, tokens, *_ = ctx.needs_input_grad
    *options, backend = ctx.options
    grads = (None, None, None)
    if hidden or weight or bias:
        grads = adapter_out_bwd(grad_out, *ctx.saved_tensors, *options, [hidden, weight or bias], backend)
    needed = (grad if need else None for grad, need in zip((*grads, grad_out), ctx.needs_input_grad, strict=False))
    return (*needed, *(None for _ in ctx.options))


_registry.attach_gradient(adapter_in_fwd, _in_setup, _in_gradient)
_registry.attach_gradient(adapter_out_fwd, _out_setup, _out_gradient)
_registry.forbid_gradient(adapter_in_bwd, NAME)
_registry.forbid_gradient(adapter_out_bwd, NAME)
