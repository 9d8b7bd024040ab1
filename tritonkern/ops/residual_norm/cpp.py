"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES, accumulator
from tritonkern.ops._results import new_result

# Rows whose share of the parameters' gradients is summed first; by the data alone, so that threads change no bit.
_CHUNK = 64


def forward(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x and branch `[..., C]` -> the sum (empty without a branch) and its LayerNorm, contiguous."""
    inputs = _Inputs(x, branch, gamma, weight, bias)
    total = new_result(x, (0,) if branch is None else x.shape)
    normed = new_result(x, x.shape, out_dtype)
    if x.numel():
        dtypes = (CPP_DTYPES[x.dtype], CPP_DTYPES[x.dtype if branch is None else branch.dtype], CPP_DTYPES[out_dtype])
        shape = (x.numel() // x.shape[-1], x.shape[-1])
        results = (_address(None if branch is None else total), normed.data_ptr())
        _cpp.residual_norm_forward(dtypes, shape, eps, torch.get_num_threads(), inputs.addresses, results)
    return total, normed


def backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    eps: float,
    branch_dtype: torch.dtype,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, branch, gamma, weight and bias where `needed`, empty elsewhere."""
    channels = total.shape[-1]
    rows = total.numel() // channels
    inputs = _Inputs(total, branch, gamma, weight, None)
    grads = _Inputs(grad_sum, grad_normed)
    grad_x = new_result(total, total.shape if needed[0] else (0,))
    grad_branch = new_result(total, total.shape, branch_dtype) if needed[1] else total.new_empty(0)
    partial = None
    if any(needed[2:]):
        partial = total.new_empty((-(-rows // _CHUNK), 3, channels), dtype=accumulator(total.dtype))
    if rows:
        out_dtype = total.dtype if grad_normed is None else grad_normed.dtype
        dtypes = (CPP_DTYPES[total.dtype], CPP_DTYPES[branch_dtype], CPP_DTYPES[out_dtype])
        results = (
            _address(grad_x if needed[0] else None),
            _address(grad_branch if needed[1] else None),
            _address(partial),
        )
        threads = torch.get_num_threads()
        _cpp.residual_norm_backward(
            dtypes, (rows, channels), eps, threads, inputs.addresses, grads.addresses, results, _CHUNK
        )
    parameters = [total] * 3 if partial is None else partial.sum(0).unbind()
    return [
        grad_x,
        grad_branch,
        *(grad.clone() if need else total.new_empty(0) for grad, need in zip(parameters, needed[2:], strict=True)),
    ]


class _Inputs:
    """Addresses of contiguous tensors, which live as long as this object; parameters come in the accumulator's type."""

    def __init__(self, x: Tensor | None, branch: Tensor | None, *parameters: Tensor | None) -> None:
        rows = [None if rows is None else rows.contiguous() for rows in (x, branch)]
        accurate = torch.float32 if x is None else accumulator(x.dtype)
        vectors = [None if vector is None else vector.to(accurate).contiguous() for vector in parameters]
        self._tensors = rows + vectors
        self.addresses = [_address(tensor) for tensor in self._tensors]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
