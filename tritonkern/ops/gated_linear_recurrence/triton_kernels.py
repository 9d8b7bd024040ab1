"""Launchers of the gated linear recurrence's Triton kernels."""

from __future__ import annotations

import functools

import torch
import triton
from einops import rearrange
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import Launch, aligned, precision, readable, register_limit
from tritonkern.ops.gated_linear_recurrence import configs, triton_backward, triton_forward
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
        parameters = _aligned(*conv, *input_gate, *decay_gate, rate_of(decay), *state)
        shape = tuple(x.shape)
        x, strides = readable(x)
        _forward_launch(shape, x.dtype, strides, input_gate.weight.shape[0], state.hidden is None)(
            x, *parameters, out, hidden
        )
    else:
        hidden.copy_(first_hidden(hidden, state))
    return Recurrence(out, inputs, hidden)


@functools.lru_cache(maxsize=1024)
def _forward_launch(shape: tuple[int, ...], dtype: torch.dtype, strides, heads: int, without_state: bool) -> Launch:
    B, T, N, C = shape
    rows, block, step, num_warps = configs.tile(C // heads, dtype)
    return Launch(
        triton_forward.gated_linear_recurrence_fwd_kernel, triton.cdiv(B * N, rows) * heads, B * N, N, T, *strides,
        H=heads, D=C // heads, BLOCK=block, ROWS=rows, STEP=step, PRECISION=precision(dtype), num_warps=num_warps,
        **register_limit(),
    )  # fmt: skip


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
    heads, width = input_gate.weight.shape[:2]
    parameters = _aligned(*conv, *input_gate, *decay_gate, rate_of(decay), *state)
    (carry,) = _aligned(grad_hidden)
    shape, needs_sums = tuple(x.shape), any(needs_grad[1:8])
    (x, strides), (grad_out, grad_strides), (out, out_strides) = readable(x), readable(grad_out), readable(out)
    chunks, block, launches = _backward_launches(
        shape, x.dtype, strides + grad_strides + out_strides, heads, needs_sums,
        (grad_hidden is None, state.hidden is None, *(needs_grad[i] for i in (0, 8, 9))),
    )  # fmt: skip
    partial = None
    if needs_sums:
        partial = x.new_empty((chunks, heads, 2 * block + 8, block), dtype=accumulator(x.dtype))
    wanted = [grads[i] if needs_grad[i] else None for i in (0, 8, 9)]
    for launch in launches:
        launch(grad_out, carry, x, *parameters, out, *wanted, partial)
    if partial is None:
        return grads
    sums = partial.sum(0)[..., :width]
    vectors = rearrange(sums[:, 2 * block :], "h k d -> k (h d)")
    made = (
        vectors[:4],
        vectors[4],
        sums[:, :width],
        vectors[5].view(heads, width),
        sums[:, block : block + width],
        vectors[6].view(heads, width),
        through_rate(vectors[7], decay),
    )
    of_parameters = [
        grad.contiguous() if needed else old
        for grad, old, needed in zip(made, grads[1:8], needs_grad[1:8], strict=True)
    ]
    return Gradients._make([grads.x, *of_parameters, grads.inputs, grads.hidden])


@functools.lru_cache(maxsize=1024)
def _backward_launches(
    shape: tuple[int, ...], dtype: torch.dtype, strides, heads: int, needs_sums: bool, absent: tuple[bool, ...]
) -> tuple[int, int, list[Launch]]:
    """Programs per head, channels of a tile, and the launches."""
    B, T, N, C = shape
    rows, block, step, num_warps = configs.tile(C // heads, dtype)
    tiles = triton.cdiv(B * N, rows)
    each = triton.cdiv(tiles, configs.PARTIALS) if needs_sums else 1
    chunks = triton.cdiv(tiles, each)
    launches = [
        Launch(
            triton_backward.gated_linear_recurrence_bwd_kernel, chunks * heads, B * N, each, N, T, *strides,
            MATRICES=matrices, H=heads, D=C // heads, BLOCK=block, ROWS=rows, STEP=step, PRECISION=precision(dtype),
            num_warps=num_warps, **register_limit(),
        )
        for matrices in ([False, True] if needs_sums else [False])
    ]  # fmt: skip
    return chunks, block, launches


def _aligned(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else aligned(x) for x in tensors]
