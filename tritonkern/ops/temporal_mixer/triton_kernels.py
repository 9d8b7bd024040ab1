"""Launchers of the temporal mixer's Triton kernels: its LayerNorm, and its convolutions along time."""

from __future__ import annotations

import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator, adjacent_channels
from tritonkern.ops._triton import launch, register_limit
from tritonkern.ops.temporal_mixer import configs, triton_convolutions, triton_norm
from tritonkern.ops.temporal_mixer.op import Conv, Gradients, Mixed, State, empty_state, parameter_gradients


def forward(x: Tensor, norm_weight: Tensor, conv1: Conv, conv2: Conv, causal: bool, eps: float, state: State) -> Mixed:
    B, N, T, C = x.shape
    out = x.new_empty(x.shape)
    if T == 0 and state.normed is not None and state.hidden is not None:
        return Mixed(out, state.normed.clone(), state.hidden.clone())
    after = [empty_state(x, before) for before in state]
    if x.numel():
        x = adjacent_channels(x)
        parameters = [parameter.contiguous() for parameter in (norm_weight, *conv1, *conv2)]
        states = [None if before is None else before.contiguous() for before in state]
        results = (out, *(None if before is None else new for before, new in zip(state, after, strict=True)))
        mean, rstd = _statistics(x, eps)
        block, warps = configs.channels(C, x.dtype)
        launch(
            triton_convolutions.temporal_mixer_fwd_kernel, B * N * triton.cdiv(C, block), x, *parameters, mean, rstd,
            *states, *results, N, T, *x.stride()[:3], C=C, BEFORE=2 if causal else 1, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return Mixed(out, *after)


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
    B, N, T, C = x.shape
    grad_x = x.new_empty(x.shape if needs_grad[0] else 0)
    needs_sums = any(needs_grad[1:])
    each = triton.cdiv(B * N, configs.PARTIALS) if needs_sums else 1
    programs = triton.cdiv(B * N, each) if x.numel() else 0
    partial = x.new_empty((programs, 30, C), dtype=accumulator(x.dtype)) if needs_sums else None
    if x.numel():
        x, grad_out = adjacent_channels(x), adjacent_channels(grad_out)
        parameters = [parameter.contiguous() for parameter in (norm_weight, *conv1, conv2_weight)]
        mean, rstd = _statistics(x, eps)
        grad_normed = x.new_empty(x.shape, dtype=mean.dtype)
        strides = (*x.stride()[:3], *grad_out.stride()[:3])
        block, warps = configs.channels(C, x.dtype)
        for j in range(4):
            launch(
                triton_convolutions.temporal_mixer_bwd_kernel_convolutions, programs * triton.cdiv(C, block), grad_out,
                x, *parameters, mean, rstd, grad_normed, partial, B * N, each, N, T, *strides, J=j, C=C,
                BEFORE=2 if causal else 1, BLOCK=block, num_warps=warps, **register_limit(),
            )  # fmt: skip
        if needs_grad[0]:
            tile = configs.rows(C, x.dtype)
            launch(
                triton_norm.temporal_mixer_bwd_kernel_norm, triton.cdiv(B * N * T, tile.rows), grad_out, x,
                parameters[0], mean, rstd, grad_normed, grad_x, B * N * T, N, T, *strides, C=C, BLOCK=tile.block,
                ROWS=tile.rows, num_warps=tile.num_warps,
            )  # fmt: skip
    sums = None if partial is None else partial.sum(0)
    return Gradients(grad_x, *parameter_gradients(sums, x, needs_grad))


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    B, N, T, C = x.shape
    # Two tensors, not halves of one: the alignment of the second half would depend on B N T, and Triton compiles by it.
    mean, rstd = (x.new_empty(B * N * T, dtype=accumulator(x.dtype)) for _ in range(2))
    tile = configs.rows(C, x.dtype)
    launch(
        triton_norm.temporal_mixer_fwd_kernel_statistics, triton.cdiv(B * N * T, tile.rows), x, mean, rstd, B * N * T,
        N, T, *x.stride()[:3], eps, C=C, BLOCK=tile.block, ROWS=tile.rows, num_warps=tile.num_warps,
    )  # fmt: skip
    return mean, rstd
