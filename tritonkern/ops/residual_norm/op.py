"""Contract, operators and gradient of the residual sum with its LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import accumulator, check_dense

NAME = "residual_norm"
# A row is one tile of a Triton program; the gradients of wider ones spill registers.
MAX_CHANNELS, MAX_CHANNELS_FLOAT64 = 4096, 2048


def check(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    check_dense("x", x)
    for name, tensor in (("branch", branch), ("gamma", gamma), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}; move one of them")
    limit = MAX_CHANNELS_FLOAT64 if x.dtype == torch.float64 else MAX_CHANNELS
    if x.dim() < 1 or not 1 <= x.shape[-1] <= limit:
        raise ValueError(f"x must have shape [..., C] with C from 1 to {limit}, got {tuple(x.shape)}")
    for name, tensor in (("gamma", gamma), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have the shape of x's channels, [{x.shape[-1]}], got {tuple(tensor.shape)}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}")
    if gamma is not None and branch is None:
        raise ValueError("gamma scales branch, and there is none; pass branch, or leave gamma out")
    _check_narrow("branch", None if branch is None else branch.dtype, x)
    _check_narrow("out_dtype", out_dtype, x)
    if not eps >= 0:
        raise ValueError(f"eps must be a number from 0 up, got {eps}")


def _check_narrow(name: str, dtype: torch.dtype | None, x: Tensor) -> None:
    """Branch and result are x's dtype, or 16-bit beside a float32 residual stream, as under autocast."""
    narrower = (torch.bfloat16, torch.float16) if x.dtype == torch.float32 else ()
    if dtype not in (None, x.dtype, *narrower):
        also = ", bfloat16 or float16" if narrower else ""
        raise TypeError(f"{name} must be {x.dtype}{also}, as x is {x.dtype}, got {dtype}")


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    check(x, branch, gamma, weight, bias, eps, out_dtype)
    return _backends.load(NAME, x.device, backend).forward(x, branch, gamma, weight, bias, eps, out_dtype)


def _forward_fake(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    check(x, branch, gamma, weight, bias, eps, out_dtype)
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=out_dtype)


def _check_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    eps: float,
    branch_dtype: torch.dtype,
    needed: list[bool],
) -> None:
    out_dtype = total.dtype if grad_normed is None else grad_normed.dtype
    # Without the gradient of gamma the branch is absent; gamma, a vector like a bias, is checked as one.
    check(total, branch, None, weight, gamma, eps, out_dtype)
    if branch is not None and branch.dtype != branch_dtype:
        raise TypeError(f"branch_dtype must be that of branch, {branch.dtype}, got {branch_dtype}")
    _check_narrow("branch_dtype", branch_dtype, total)
    for name, grad, dtype in (("grad_sum", grad_sum, total.dtype), ("grad_normed", grad_normed, out_dtype)):
        if grad is not None and (grad.shape != total.shape or grad.dtype != dtype or grad.device != total.device):
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(total.shape)} on {total.device}, "
                f"got {grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
            )
    if len(needed) != 5:
        raise ValueError(f"needed must be one flag each for x, branch, gamma, weight and bias, got {needed}")
    if needed[2] and branch is None:
        raise ValueError("branch must be given where the gradient of gamma is needed")


def _backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    eps: float,
    branch_dtype: torch.dtype,
    needed: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    _check_backward(grad_sum, grad_normed, total, branch, gamma, weight, eps, branch_dtype, needed)
    kernels = _backends.load(NAME, total.device, backend)
    return kernels.backward(grad_sum, grad_normed, total, branch, gamma, weight, eps, branch_dtype, needed)


def _backward_fake(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    eps: float,
    branch_dtype: torch.dtype,
    needed: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    _check_backward(grad_sum, grad_normed, total, branch, gamma, weight, eps, branch_dtype, needed)
    accurate = accumulator(total.dtype)
    wanted = [(total.shape, total.dtype), (total.shape, branch_dtype), *[(total.shape[-1:], accurate)] * 3]
    return [
        total.new_empty(shape, dtype=dtype) if need else total.new_empty(0)
        for (shape, dtype), need in zip(wanted, needed, strict=True)
    ]


residual_norm_fwd = _registry.define(
    "residual_norm_fwd(Tensor x, Tensor? branch, Tensor? gamma, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType out_dtype, str? backend=None) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
residual_norm_bwd = _registry.define(
    "residual_norm_bwd(Tensor? grad_sum, Tensor? grad_normed, Tensor total, Tensor? branch, Tensor? gamma,"
    " Tensor? weight, float eps, ScalarType branch_dtype, bool[] needed, str? backend=None) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, branch, gamma, weight, bias, ctx.eps, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = x.dtype if branch is None else branch.dtype
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in (gamma, weight, bias)]
    # The mean and the variance are made again from the sum, which a backward pass has to read anyway.
    ctx.has_branch = branch is not None
    kept = branch if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(x if branch is None else output[0], kept, gamma, weight)


def _gradient(ctx, grad_sum, grad_normed):
    needed = list(ctx.needs_input_grad[:5])
    if grad_sum is None and grad_normed is None:
        return (None,) * 8
    if not ctx.has_branch:
        grad_sum = None  # the empty tensor's
    total, branch, gamma, weight = ctx.saved_tensors
    # Without gamma, and in one dtype, the gradient of the branch is that of x.
    shared = needed[0] and needed[1] and gamma is None and ctx.branch_dtype == total.dtype
    asked = [needed[0], needed[1] and not shared, *needed[2:]]
    grads = residual_norm_bwd(
        grad_sum, grad_normed, total, branch, gamma, weight, ctx.eps, ctx.branch_dtype, asked, ctx.backend
    )
    if shared:
        grads[1] = grads[0]
    dtypes = (total.dtype, ctx.branch_dtype, *ctx.dtypes)
    results = [grad.to(dtype) if need else None for grad, need, dtype in zip(grads, needed, dtypes, strict=True)]
    return (*results, None, None, None)


_registry.attach_gradient(residual_norm_fwd, _setup_context, _gradient)
_registry.forbid_gradient(residual_norm_bwd, NAME)
