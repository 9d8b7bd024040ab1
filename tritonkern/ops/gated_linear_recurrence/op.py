"""Checks, operators and gradient of the gated linear recurrence. x is `[B, T, N, C]` in here.

Parameters have the dtype of sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.ops._checks import check_flags, check_saved, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "gated_linear_recurrence"
# Frames that the convolution sees.
TAPS = 4
# Channels of one head, whose weights a Triton program keeps.
MAX_WIDTH = 64
# The gradient of the square root is 1000 at most (as in the official code), where it would be infinite at 0.
LEAST_SQUARE = 1e-6


class Conv(NamedTuple):
    """A depthwise convolution along time; the last tap belongs to the frame itself."""

    weight: Tensor
    """`[4, C]`"""
    bias: Tensor
    """`[C]`"""


class Gate(NamedTuple):
    """A linear layer of each head, followed by a sigmoid."""

    weight: Tensor
    """`[H, D, D]`, inputs before outputs."""
    bias: Tensor
    """`[H, D]`"""


class State(NamedTuple):
    """What the frames before x leave, or None and None at the start of a clip."""

    inputs: Tensor | None
    """`[B, 3, N, C]`, the last frames of x, in its dtype."""
    hidden: Tensor | None
    """`[B, N, C]`, in the dtype of sums."""


class Recurrence(NamedTuple):
    out: Tensor
    inputs: Tensor
    hidden: Tensor


class Gradients(NamedTuple):
    x: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    input_gate_weight: Tensor
    input_gate_bias: Tensor
    decay_gate_weight: Tensor
    decay_gate_bias: Tensor
    decay: Tensor
    inputs: Tensor
    hidden: Tensor


def check_inputs(x: Tensor, conv: Conv, input_gate: Gate, decay_gate: Gate, decay: Tensor, state: State) -> None:
    """Raise TypeError or ValueError unless all belong to x."""
    parameters = {
        "conv_weight": conv.weight,
        "conv_bias": conv.bias,
        "input_gate_weight": input_gate.weight,
        "input_gate_bias": input_gate.bias,
        "decay_gate_weight": decay_gate.weight,
        "decay_gate_bias": decay_gate.bias,
        "decay": decay,
    }
    states = {"the first state": state.inputs, "the second state": state.hidden}
    check_tensors(x=x, **parameters, **states)
    if x.dim() != 4 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [B, T, C] or [B, T, N, C] with C of 1 or more, got {tuple(x.shape)}")
    batch, _, sequences, channels = x.shape
    weight = input_gate.weight
    if weight.dim() != 3 or not 1 <= weight.shape[1] <= MAX_WIDTH or weight.shape[0] * weight.shape[1] != channels:
        raise ValueError(
            f"input_gate_weight must have shape [H, D, D] with H * D = {channels}, the channels of x, and D up to "
            f"{MAX_WIDTH}, got {list(weight.shape)}"
        )
    heads, width = weight.shape[:2]
    dtype = accumulator(x.dtype)
    bias, gate = (heads, width), (heads, width, width)
    shapes = ((TAPS, channels), (channels,), gate, bias, gate, bias, (channels,))
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        name: (tensor, shape, dtype) for (name, tensor), shape in zip(parameters.items(), shapes, strict=True)
    }
    expected["the first state"] = state.inputs, (batch, TAPS - 1, sequences, channels), x.dtype
    expected["the second state"] = state.hidden, (batch, sequences, channels), dtype
    for name, (tensor, shape, wanted) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have shape {list(shape)}, as x has shape {list(x.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != wanted:
            raise TypeError(f"{name} must be {wanted}, as x is {x.dtype}, got {tensor.dtype}")
    if (state.inputs is None) != (state.hidden is None):
        raise ValueError("state must have two tensors, the last frames of x and the hidden state")


@operator(NAME, "forward")
def gated_linear_recurrence_fwd(
    x: Tensor, conv: Conv, input_gate: Gate, decay_gate: Gate, decay: Tensor, state: State
) -> Results[Recurrence]:
    """The hidden states in x's shape and dtype, and the state after them, contiguous."""
    check_inputs(x, conv, input_gate, decay_gate, decay, state)
    batch, _, sequences, channels = x.shape
    return lambda: Recurrence(
        x.new_empty(x.shape),
        x.new_empty((batch, TAPS - 1, sequences, channels)),
        x.new_empty((batch, sequences, channels), dtype=accumulator(x.dtype)),
    )


@operator(NAME, "backward")
def gated_linear_recurrence_bwd(
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
) -> Results[Gradients]:
    """Gradients of x and the state, in their dtypes, and of the parameters; of shape [0] where not needed."""
    check_inputs(x, conv, input_gate, decay_gate, decay, state)
    batch, _, sequences, channels = x.shape
    check_saved(
        {
            "grad_out": (grad_out, x.shape, x.dtype),
            "grad_hidden": (grad_hidden, (batch, sequences, channels), accumulator(x.dtype)),
            "out": (out, x.shape, x.dtype),
        },
        x.device,
    )
    check_flags(needs_grad, len(Gradients._fields))
    if state.inputs is None and any(needs_grad[-2:]):
        raise ValueError("needs_grad asks for the gradients of a state that is None")
    return lambda: empty_gradients(x, conv, input_gate, decay_gate, decay, state, needs_grad)


def empty_gradients(
    x: Tensor, conv: Conv, input_gate: Gate, decay_gate: Gate, decay: Tensor, state: State, needs_grad: list[bool]
) -> Gradients:
    """The results of the backward operator, not initialised."""
    wide = accumulator(x.dtype)
    parameters = (*conv, *input_gate, *decay_gate, decay)
    like: list[tuple[Any, torch.dtype]] = [(x.shape, x.dtype), *((p.shape, wide) for p in parameters)]
    like += [(None if s is None else s.shape, dtype) for s, dtype in zip(state, (x.dtype, wide), strict=True)]
    return Gradients(
        *(
            x.new_empty(shape if needed else 0, dtype=dtype)
            for (shape, dtype), needed in zip(like, needs_grad, strict=True)
        )
    )


def no_frames(grads: Gradients, grad_hidden: Tensor | None) -> Gradients:
    """The gradients of a clip without frames or sequences, whose hidden state is the one before it."""
    for grad in grads:
        grad.zero_()
    if grad_hidden is not None and grads.hidden.numel():
        grads.hidden.copy_(grad_hidden)
    return grads


def first_hidden(like: Tensor, state: State) -> Tensor:
    """The hidden state before the first frame, `[B, N, C]`."""
    return torch.zeros_like(like) if state.hidden is None else state.hidden


def rate_of(decay: Tensor) -> Tensor:
    """The logarithm of the recurrence's factor where its gate is 1: -8 softplus(decay)."""
    return -8.0 * F.softplus(decay.contiguous())


def through_rate(grad: Tensor, decay: Tensor) -> Tensor:
    """The gradient of `decay` from that of its rate."""
    return torch.ops.aten.softplus_backward(-8.0 * grad, decay.contiguous(), 1, 20)


def last_frames(x: Tensor, past: Tensor | None) -> Tensor:
    """The frames that the convolution needs of what is before the next clip, `[B, 3, N, C]`."""
    batch, frames, sequences, channels = x.shape
    kept = x.new_empty(batch, TAPS - 1, sequences, channels)
    own = min(TAPS - 1, frames)
    earlier = kept[:, : TAPS - 1 - own]
    if past is None:
        earlier.zero_()
    else:
        earlier.copy_(past[:, own:])
    kept[:, TAPS - 1 - own :] = x[:, frames - own :]
    return kept


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    # Gates and factors are computed again, and the hidden states are the result.
    ctx.save_for_backward(*tensors, output[0])


def _gradient(ctx: Any, grad_out: Tensor | None, grad_inputs: Tensor | None, grad_hidden: Tensor | None) -> Any:
    *tensors, out = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[: len(Gradients._fields)])
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = gated_linear_recurrence_bwd(grad_out, grad_hidden, *tensors, out, needs_grad, ctx.backend)
    grads: list[Tensor | None] = [grad if needed else None for grad, needed in zip(found, needs_grad, strict=True)]
    if grad_inputs is not None:  # of the last three frames of (state, x)
        count = out.shape[1]
        own = min(TAPS - 1, count)
        if grads[0] is not None and own:
            grads[0] = grads[0] + F.pad(grad_inputs[:, -own:], (0, 0, 0, 0, count - own, 0))
        if grads[-2] is not None:
            grads[-2] = grads[-2] + F.pad(grad_inputs[:, : TAPS - 1 - own], (0, 0, 0, 0, own, 0))
    return tuple(grads)


differentiable(gated_linear_recurrence_fwd, _save, _gradient)
