"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES, accumulator
from tritonkern.ops.temporal_mixer.op import parameter_gradients

# Stretches of a sequence whose share of the parameters' gradients is summed first; by the data alone, so that threads
# change no bit.
_CHUNK = 16


def forward(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    causal: bool,
    eps: float,
    normed_state: Tensor | None,
    hidden_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[B, N, T, C]` -> the block's output, and the states after it (empty where none came), contiguous."""
    accurate = accumulator(x.dtype)
    x, strides = _rows(x)
    parameters = [
        p.to(accurate).contiguous() for p in (norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias)
    ]
    states = [None if state is None else state.contiguous() for state in (normed_state, hidden_state)]
    out = x.new_empty(x.shape)
    # Without frames the states stay what they are.
    after = [
        x.new_empty(0, dtype=accurate) if state is None else torch.empty_like(state) if x.shape[2] else state.clone()
        for state in states
    ]
    if x.numel():
        _cpp.temporal_mixer_forward(
            CPP_DTYPES[x.dtype],
            tuple(x.shape),
            causal,
            eps,
            torch.get_num_threads(),
            (x.data_ptr(), strides),
            [p.data_ptr() for p in parameters],
            [0 if state is None else state.data_ptr() for state in states],
            (out.data_ptr(), *(0 if normed_state is None else state.data_ptr() for state in after)),
        )
    return out, after[0], after[1]


def backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x and the parameters where `needed`, empty elsewhere."""
    accurate, channels = accumulator(x.dtype), x.shape[-1]
    x, strides = _rows(x)
    grad_out, grad_strides = _rows(grad_out)
    parameters = [p.to(accurate).contiguous() for p in (norm_weight, conv1_weight, conv1_bias, conv2_weight)]
    shape = tuple(x.shape)
    grad_x = x.new_empty(shape) if needed[0] else x.new_empty(0, dtype=accurate)
    partial = None
    if any(needed[1:]):
        chunks = -(-_cpp.temporal_mixer_tasks(shape) // _CHUNK)
        partial = x.new_empty((chunks, 30, channels), dtype=accurate)
    if x.numel():
        _cpp.temporal_mixer_backward(
            CPP_DTYPES[x.dtype],
            shape,
            causal,
            eps,
            torch.get_num_threads(),
            (x.data_ptr(), strides),
            (grad_out.data_ptr(), grad_strides),
            [p.data_ptr() for p in parameters],
            (grad_x.data_ptr() if needed[0] else 0, 0 if partial is None else partial.data_ptr()),
            _CHUNK,
        )
    return [grad_x, *parameter_gradients(x, partial, needed)]


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor whose channels are adjacent, and its other strides."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x, x.stride()[:3]
