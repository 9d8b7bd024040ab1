"""Launchers of the temporal mixer's Triton kernels: those around the LayerNorm, and those that walk along time."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tritonkern.ops._contract import accumulator, adjacent_channels
from tritonkern.ops.temporal_mixer import configs, triton_norm, triton_walk
from tritonkern.ops.temporal_mixer.op import parameter_gradients


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
    B, N, T, C = x.shape
    out = x.new_empty(x.shape)
    states = [None if state is None else state.contiguous() for state in (normed_state, hidden_state)]
    # Without frames the states stay what they are.
    after = [
        x.new_empty(0, dtype=accurate) if state is None else torch.empty_like(state) if T else state.clone()
        for state in states
    ]
    if x.numel():
        x = adjacent_channels(x)
        parameters = [p.contiguous() for p in (norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias)]
        mean, scale = _statistics(x, eps)
        block, warps = configs.channels(C, x.dtype)
        results = (out, *((None, None) if normed_state is None else after))
        grid = (B * N * triton.cdiv(C, block),)
        triton_walk.forward_kernel[grid](
            x, *parameters, mean, scale, *states, *results, N, T, *x.stride()[:3], C, 2 if causal else 1, block,
            num_warps=warps,
        )  # fmt: skip
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
    accurate = accumulator(x.dtype)
    B, N, T, C = x.shape
    grad_x = x.new_empty(x.shape) if needed[0] else x.new_empty(0, dtype=accurate)
    sums = any(needed[1:])
    each = triton.cdiv(B * N, configs.PARTIALS) if sums else 1
    programs = triton.cdiv(B * N, each) if x.numel() else 0
    partial = x.new_empty((programs, 30, C), dtype=accurate) if sums else None
    if x.numel():
        x, grad_out = adjacent_channels(x), adjacent_channels(grad_out)
        parameters = [p.contiguous() for p in (norm_weight, conv1_weight, conv1_bias, conv2_weight)]
        mean, scale = _statistics(x, eps)
        grad_normed = x.new_empty(x.shape, dtype=accurate)
        strides = (*x.stride()[:3], *grad_out.stride()[:3])
        block, warps = configs.channels(C, x.dtype)
        grid = (programs * triton.cdiv(C, block),)
        for j in range(4):
            triton_walk.convolutions_backward_kernel[grid](
                grad_out, x, *parameters, mean, scale, grad_normed, partial, B * N, each, N, T, *strides, j, C,
                2 if causal else 1, block, num_warps=warps,
            )  # fmt: skip
        if needed[0]:
            tile = configs.rows(C, x.dtype)
            triton_norm.norm_backward_kernel[(triton.cdiv(B * N * T, tile.rows),)](
                grad_out, x, parameters[0], mean, scale, grad_normed, grad_x, B * N * T, N, T, *strides, C,
                tile.block, tile.rows, num_warps=tile.num_warps,
            )  # fmt: skip
    return [grad_x, *parameter_gradients(x, partial, needed)]


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    B, N, T, C = x.shape
    # Two tensors, not halves of one: where the second began would depend on B N T, and Triton compiles by alignment.
    mean, scale = (x.new_empty(B * N * T, dtype=accumulator(x.dtype)) for _ in range(2))
    tile = configs.rows(C, x.dtype)
    triton_norm.statistics_kernel[(triton.cdiv(B * N * T, tile.rows),)](
        x, mean, scale, B * N * T, N, T, *x.stride()[:3], eps, C, tile.block, tile.rows, num_warps=tile.num_warps
    )
    return mean, scale
