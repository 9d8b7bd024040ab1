"""Eager PyTorch, the plainest correct form; in float64 it is the oracle of the tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from tritonkern.ops._dtypes import accurate
from tritonkern.ops.gated_linear_recurrence.op import (
    LEAST_SQUARE,
    TAPS,
    Conv,
    Gate,
    Gradients,
    Recurrence,
    State,
    first_hidden,
    last_frames,
    rate_of,
    through_rate,
)


class _Terms(NamedTuple):
    """All that does not depend on the hidden states, `[B, T, N, C]`."""

    frames: Tensor  # the state's and x's, [B, 3 + T, N, C]
    u: Tensor
    input_gate: Tensor
    decay_gate: Tensor
    factor: Tensor
    rest: Tensor  # 1 - factor^2
    multiplier: Tensor


def forward(x: Tensor, conv: Conv, input_gate: Gate, decay_gate: Gate, decay: Tensor, state: State) -> Recurrence:
    terms = _terms(x, conv, input_gate, decay_gate, decay, state)
    added = terms.u * terms.input_gate * terms.multiplier
    hidden = first_hidden(terms.u[:, :1].sum(1), state)
    states = torch.empty_like(added)
    for t in range(x.shape[1]):
        hidden = terms.factor[:, t] * hidden + added[:, t]
        states[:, t] = hidden
    return Recurrence(
        states.to(x.dtype, memory_format=torch.contiguous_format),
        last_frames(x, state.inputs),
        hidden.clone(memory_format=torch.contiguous_format),
    )


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
    terms = _terms(x, conv, input_gate, decay_gate, decay, state)
    rate = rate_of(decay)
    first = first_hidden(terms.u[:, :1].sum(1), state)
    before = torch.cat([first[:, None], accurate(out)], 1)[:, :-1]
    grad = torch.empty_like(terms.u)
    carry = torch.zeros_like(first) if grad_hidden is None else grad_hidden
    for t in reversed(range(x.shape[1])):
        grad[:, t] = accurate(grad_out[:, t]) + carry
        carry = terms.factor[:, t] * grad[:, t]
    gated = terms.u * terms.input_gate
    slope = (4 * terms.rest).clamp(min=LEAST_SQUARE).rsqrt()
    through_multiplier = -2 * terms.factor.square() * slope * grad * gated
    if state.hidden is None:
        through_multiplier[:, :1] = 0
    grad_log = grad * before * terms.factor + through_multiplier
    grad_input = grad * terms.u * terms.multiplier * terms.input_gate * (1 - terms.input_gate)
    grad_decay = grad_log * rate * terms.decay_gate * (1 - terms.decay_gate)
    grad_u = grad * terms.input_gate * terms.multiplier
    grad_u = grad_u + _linear(grad_input, input_gate.weight.mT) + _linear(grad_decay, decay_gate.weight.mT)
    frames, heads = x.shape[1], input_gate.weight.shape[0]
    grad_frames = torch.zeros_like(terms.frames)
    for k in range(TAPS):
        grad_frames[:, k : k + frames] += grad_u * conv.weight[k]
    by_head = [rearrange(y, "b t n (h d) -> (b t n) h d", h=heads) for y in (terms.u, grad_input, grad_decay)]
    every = (0, 1, 2)
    made = (
        grad_frames[:, TAPS - 1 :].to(x.dtype),
        torch.stack([(grad_u * terms.frames[:, k : k + frames]).sum(every) for k in range(TAPS)]),
        grad_u.sum(every),
        torch.einsum("rhi,rhj->hij", by_head[0], by_head[1]),
        by_head[1].sum(0),
        torch.einsum("rhi,rhj->hij", by_head[0], by_head[2]),
        by_head[2].sum(0),
        through_rate((grad_log * terms.decay_gate).sum(every), decay),
        grad_frames[:, : TAPS - 1].to(x.dtype),
        carry,
    )
    return Gradients(
        *(
            grad.clone(memory_format=torch.contiguous_format) if needed else grad.new_empty(0)
            for grad, needed in zip(made, needs_grad, strict=True)
        )
    )


def _terms(x: Tensor, conv: Conv, input_gate: Gate, decay_gate: Gate, decay: Tensor, state: State) -> _Terms:
    batch, count, sequences, channels = x.shape
    past = x.new_zeros(batch, TAPS - 1, sequences, channels) if state.inputs is None else state.inputs
    frames = accurate(torch.cat([past, x], 1))
    u = conv.bias + sum(frames[:, k : k + count] * conv.weight[k] for k in range(TAPS))
    opened = torch.sigmoid(_linear(u, input_gate.weight) + input_gate.bias.flatten())
    decays = torch.sigmoid(_linear(u, decay_gate.weight) + decay_gate.bias.flatten())
    log_factor = rate_of(decay) * decays
    rest = -torch.expm1(2 * log_factor)
    multiplier = rest.sqrt()
    if state.hidden is None:
        multiplier = torch.cat([torch.ones_like(multiplier[:, :1]), multiplier[:, 1:]], 1)
    return _Terms(frames, u, opened, decays, log_factor.exp(), rest, multiplier)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """`[B, T, N, H * D]`, each head with its weight of `[H, D, D]`."""
    heads = rearrange(x, "b t n (h d) -> b t n h d", h=weight.shape[0])
    return torch.einsum("btnhi,hij->btnhj", heads, weight).flatten(-2)
