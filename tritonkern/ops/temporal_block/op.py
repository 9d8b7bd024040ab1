"""Contract, operators and gradient of the temporal block."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import accumulator, check_dense

NAME = "temporal_block"
MAX_CHANNELS = 2048
MAX_HEAD_DIM = 256
# As for temporal window attention.
MAX_WINDOW_COUNT = 2**30


def check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    check_dense("x", x)
    if x.dim() != 4 or not 1 <= x.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"x must have shape [B, T, N, C] with C from 1 to {MAX_CHANNELS}, got {tuple(x.shape)}")
    channels = x.shape[-1]
    head_dim = channels // max(num_heads, 1)
    if num_heads < 1 or channels % num_heads or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"num_heads must divide the {channels} channels of x into heads of a multiple of 8 channels up to "
            f"{MAX_HEAD_DIM}, got {num_heads}"
        )
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
        ("qkv_weight", qkv_weight, (3 * channels, channels)),
        ("qkv_bias", qkv_bias, (3 * channels,)),
        ("proj_weight", proj_weight, (channels, channels)),
        ("proj_bias", proj_bias, (channels,)),
    ]
    for name, tensor, shape in expected:
        if tensor is None and name in ("qkv_bias", "proj_bias"):
            continue
        tensor = cast(Tensor, tensor)
        check_dense(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}; move one of them")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, as x has {channels} channels, got {list(tensor.shape)}"
            )
    for side, count in (("left", left), ("right", right)):
        if not 0 <= count <= MAX_WINDOW_COUNT:
            raise ValueError(f"window must have a {side} count from 0 to 2**30 frames, got {count}")
    if not eps >= 0:
        raise ValueError(f"eps must be a number from 0 up, got {eps}")


def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    call = (
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        num_heads,
        left,
        right,
        eps,
    )
    check(*call)
    return _backends.load(NAME, x.device, backend).forward(*call)


def _forward_fake(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    check(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, left, right, eps)
    return x.new_empty(x.shape)


def _check_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
    needed: list[bool],
) -> None:
    check(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, None, num_heads, left, right, eps)
    check_dense("grad_out", grad_out)
    if grad_out.shape != x.shape or grad_out.dtype != x.dtype or grad_out.device != x.device:
        raise ValueError(
            f"grad_out must be {x.dtype} of shape {tuple(x.shape)} on {x.device}, "
            f"got {grad_out.dtype} of shape {tuple(grad_out.shape)} on {grad_out.device}"
        )
    if len(needed) != 7:
        raise ValueError(f"needed must be one flag each for x and the six parameters, got {needed}")


def _backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
    needed: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    call = (
        grad_out,
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        num_heads,
        left,
        right,
        eps,
        needed,
    )
    _check_backward(*call)
    return _backends.load(NAME, x.device, backend).backward(*call)


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
    needed: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    _check_backward(
        grad_out,
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        num_heads,
        left,
        right,
        eps,
        needed,
    )
    channels = x.shape[-1]
    shapes = (channels,), (channels,), (3 * channels, channels), (3 * channels,), (channels, channels), (channels,)
    wanted = [(tuple(x.shape), x.dtype), *((shape, accumulator(x.dtype)) for shape in shapes)]
    return [x.new_empty(shape if need else 0, dtype=dtype) for (shape, dtype), need in zip(wanted, needed, strict=True)]


_ARGUMENTS = "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight"
_OPTIONS = "int num_heads, int left, int right, float eps"
temporal_block_fwd = _registry.define(
    f"temporal_block_fwd({_ARGUMENTS}, Tensor? proj_bias, {_OPTIONS}, str? backend=None) -> Tensor",
    _forward,
    _forward_fake,
)
temporal_block_bwd = _registry.define(
    f"temporal_block_bwd(Tensor grad_out, {_ARGUMENTS}, {_OPTIONS}, bool[] needed, str? backend=None) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.heads, ctx.left, ctx.right, ctx.eps, ctx.backend = inputs
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    # Everything between x and the result is made again.
    ctx.save_for_backward(*tensors[:6])


def _gradient(ctx, grad_out):
    needed = list(ctx.needs_input_grad[:7])
    options = (ctx.heads, ctx.left, ctx.right, ctx.eps, needed, ctx.backend)
    grads = temporal_block_bwd(grad_out, *ctx.saved_tensors, *options)
    results = [grad.to(dtype) if need else None for grad, need, dtype in zip(grads, needed, ctx.dtypes, strict=True)]
    return (*results, None, None, None, None, None)


_registry.attach_gradient(temporal_block_fwd, _setup_context, _gradient)
_registry.forbid_gradient(temporal_block_bwd, NAME)
