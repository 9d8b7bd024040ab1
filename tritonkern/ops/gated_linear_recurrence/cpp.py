"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import adjacent_channels
from tritonkern.ops.gated_linear_recurrence.op import (
    Conv,
    Gate,
    Gradients,
    Recurrence,
    State,
    empty_gradients,
    first_hidden,
    last_frames,
    no_frames,
    rate_of,
    through_rate,
)


def forward(x: Tensor, conv: Conv, input_gate: Gate, decay_gate: Gate, decay: Tensor, state: State) -> Recurrence:
    out, inputs = x.new_empty(x.shape), last_frames(x, state.inputs)
    hidden = decay.new_empty(x.shape[0], *x.shape[2:])
    if x.numel():
        arguments: list[Any] = [
            adjacent_channels(x),
            *_contiguous(*conv, *input_gate, *decay_gate, rate_of(decay), *state),
            torch.get_num_threads(),
            out,
            hidden,
        ]
        _cpp.gated_linear_recurrence_forward(*arguments)
    else:
        hidden.copy_(first_hidden(hidden, state))
    return Recurrence(out, inputs, hidden)


def backward(
    grad_out: Tensor,
    grad_hidden: Tensor | None,
    x: Tensor,
    conv: Conv,
    input_gate: Gate,
    decay_gate: Gate,
    decay: Tensor,
    state: State,
    out: Tensor,
    needs_grad: list[bool],
) -> Gradients:
    grads = empty_gradients(x, conv, input_gate, decay_gate, decay, state, needs_grad)
    if not x.numel():
        return no_frames(grads, grad_hidden)
    parameters = _contiguous(*conv, *input_gate, *decay_gate, rate_of(decay), *state)
    wanted = [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]
    arguments: list[Any] = [
        adjacent_channels(grad_out),
        *_contiguous(grad_hidden),
        adjacent_channels(x),
        *parameters,
        adjacent_channels(out),
        torch.get_num_threads(),
        *wanted,
    ]
    _cpp.gated_linear_recurrence_backward(*arguments)
    return grads._replace(decay=through_rate(grads.decay, decay)) if needs_grad[7] else grads


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]
