"""Launchers of the temporal mixer's Triton kernels: its LayerNorm, and its convolutions along time."""

from __future__ import annotations

import functools

import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import Launch, readable, register_limit
from tritonkern.ops.temporal_mixer import configs, triton_convolutions, triton_norm
from tritonkern.ops.temporal_mixer.op import Conv, Gradients, Mixed, State, empty_state, parameter_gradients


def forward(x: Tensor, norm_weight: Tensor, conv1: Conv, conv2: Conv, causal: bool, eps: float, state: State) -> Mixed:
    out = x.new_empty(x.shape)
    if x.shape[2] == 0 and state.normed is not None and state.hidden is not None:
        return Mixed(out, state.normed.clone(), state.hidden.clone())
    after = [empty_state(x, before) for before in state]
    if x.numel():
        parameters = [parameter.contiguous() for parameter in (norm_weight, *conv1, *conv2)]
        states = [None if before is None else before.contiguous() for before in state]
        results = (None, None) if state.normed is None else after
        x, strides = readable(x)
        find_statistics, mix = _forward_launches(
            out.shape, x.dtype, strides, tuple(p.dtype for p in parameters), causal, eps, state.normed is None
        )
        mean, rstd = _statistics(find_statistics, x)
        mix(x, *parameters, mean, rstd, *states, out, *results)
    return Mixed(out, *after)


@functools.lru_cache(maxsize=1024)
def _forward_launches(
    shape, dtype, strides, parameter_dtypes, causal: bool, eps: float, without_state: bool
) -> tuple[Launch, Launch]:
    """Of the statistics and of the rest, by shape and types."""
    B, N, T, C = shape
    block, warps = configs.channels(C, dtype)
    mix = Launch(
        triton_convolutions.temporal_mixer_fwd_kernel, B * N * triton.cdiv(C, block), N, T, *strides,
        C=C, BEFORE=2 if causal else 1, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return _statistics_launch(shape, dtype, strides, eps), mix


def _statistics_launch(shape, dtype, strides, eps: float) -> Launch:
    B, N, T, C = shape
    tile = configs.rows(C, dtype)
    return Launch(
        triton_norm.temporal_mixer_fwd_kernel_statistics, triton.cdiv(B * N * T, tile.rows), B * N * T, N, T, *strides,
        eps, C=C, BLOCK=tile.block, ROWS=tile.rows, num_warps=tile.num_warps,
    )  # fmt: skip


def _statistics(launch: Launch, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:3], dtype=accumulator(x.dtype)) for _ in range(2))
    launch(x, mean, rstd)
    return mean, rstd


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
    shape, dtype = x.shape, x.dtype
    grad_x = x.new_empty(shape if needs_grad[0] else 0)
    needs_sums = True in needs_grad[1:]
    programs = 0
    partial = None
    if x.numel():
        parameters = [parameter.contiguous() for parameter in (norm_weight, *conv1, conv2_weight)]
        (x, strides), (grad_out, grad_strides) = readable(x), readable(grad_out)
        programs, find_statistics, convolutions, norm = _backward_launches(
            shape, dtype, strides + grad_strides, tuple(p.dtype for p in parameters), causal, eps, needs_sums
        )
        mean, rstd = _statistics(find_statistics, x)
        grad_normed = mean.new_empty(shape)
    if needs_sums:
        partial = x.new_empty((programs, 30, shape[-1]), dtype=accumulator(dtype))
    if programs:
        for launch in convolutions:
            launch(grad_out, x, *parameters, mean, rstd, grad_normed, partial)
        if needs_grad[0]:
            norm(grad_out, x, parameters[0], mean, rstd, grad_normed, grad_x)
    sums = None if partial is None else partial.sum(0)
    return Gradients(grad_x, *parameter_gradients(sums, x, needs_grad))


@functools.lru_cache(maxsize=1024)
def _backward_launches(
    shape, dtype, strides, parameter_dtypes, causal: bool, eps: float, needs_sums: bool
) -> tuple[int, Launch, list[Launch], Launch]:
    """Programs along tracks; launches of the statistics, of the four convolutions, and of the norm."""
    B, N, T, C = shape
    each = triton.cdiv(B * N, configs.PARTIALS) if needs_sums else 1
    programs = triton.cdiv(B * N, each)
    block, warps = configs.channels(C, dtype)
    convolutions = [
        Launch(
            triton_convolutions.temporal_mixer_bwd_kernel_convolutions, programs * triton.cdiv(C, block),
            B * N, each, N, T, *strides, J=j, C=C, BEFORE=2 if causal else 1, BLOCK=block, num_warps=warps,
            **register_limit(),
        )
        for j in range(4)
    ]  # fmt: skip
    tile = configs.rows(C, dtype)
    norm = Launch(
        triton_norm.temporal_mixer_bwd_kernel_norm, triton.cdiv(B * N * T, tile.rows), B * N * T, N, T, *strides,
        C=C, BLOCK=tile.block, ROWS=tile.rows, num_warps=tile.num_warps,
    )  # fmt: skip
    return programs, _statistics_launch(shape, dtype, strides[:3], eps), convolutions, norm
