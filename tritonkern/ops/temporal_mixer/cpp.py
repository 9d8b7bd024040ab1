"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import accumulator, adjacent_channels
from tritonkern.ops.temporal_mixer.op import Conv, Gradients, Mixed, State, empty_state, parameter_gradients


def forward(x: Tensor, norm_weight: Tensor, conv1: Conv, conv2: Conv, causal: bool, eps: float, state: State) -> Mixed:
    out = x.new_empty(x.shape)
    if x.shape[2] == 0 and state.normed is not None and state.hidden is not None:
        return Mixed(out, state.normed.clone(), state.hidden.clone())
    normed, hidden = (empty_state(x, before) for before in state)
    if x.numel():
        dtype = accumulator(x.dtype)
        normed_state, hidden_state = (None if before is None else before.contiguous() for before in state)
        _cpp.temporal_mixer_forward(
            adjacent_channels(x),
            norm_weight.to(dtype).contiguous(),
            *_accurate(conv1, dtype),
            *_accurate(conv2, dtype),
            causal,
            eps,
            normed_state,
            hidden_state,
            torch.get_num_threads(),
            out,
            None if normed_state is None else normed,
            None if hidden_state is None else hidden,
        )
    return Mixed(out, normed, hidden)


def backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1: Conv,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needs_grad: list[bool],
) -> Gradients:
    grad_x = x.new_empty(x.shape if needs_grad[0] else 0)
    dtype = accumulator(x.dtype)
    sums = x.new_zeros((30, x.shape[-1]), dtype=dtype) if any(needs_grad[1:]) else None
    if x.numel():
        _cpp.temporal_mixer_backward(
            adjacent_channels(grad_out),
            adjacent_channels(x),
            norm_weight.to(dtype).contiguous(),
            *_accurate(conv1, dtype),
            conv2_weight.to(dtype).contiguous(),
            causal,
            eps,
            torch.get_num_threads(),
            grad_x if needs_grad[0] else None,
            sums,
        )
    return Gradients(grad_x, *parameter_gradients(sums, x, needs_grad))


def _accurate(conv: Conv, dtype: torch.dtype) -> Conv:
    return Conv(conv.weight.to(dtype).contiguous(), conv.bias.to(dtype).contiguous())
