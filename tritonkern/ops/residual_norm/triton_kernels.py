"""Triton kernels of the residual sum with its LayerNorm, and their launchers.

A program holds whole rows in registers: one read of every input, one write of every result. Rows are independent, so
that a NaN stays in its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._contract import accumulator
from tritonkern.ops.residual_norm import configs


@triton.jit
def _standardised(x, mask, eps, C: tl.constexpr):
    """Rows of zero mean and unit variance, zero beyond C, and the factors `[ROWS, 1]` that made them so."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * scale[:, None], scale[:, None]


@triton.jit
def _parameter(pointer, otherwise: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """A parameter `[1, BLOCK]`, or the number that stands for an absent one."""
    if pointer is None:
        return tl.full([1, BLOCK], otherwise, ACC)
    else:
        channel = tl.arange(0, BLOCK)
        return tl.load(pointer + channel, mask=channel < C, other=0.0).to(ACC)[None, :]


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, branch, gamma, weight, bias, total, normed, rows: tl.int64, eps: tl.float64,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    at = row[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    if branch is not None:
        update = tl.load(branch + at, mask=mask, other=0.0).to(ACC)
        # What is normalised is what the next block sees: the sum in x's dtype.
        rounded = (value + update * _parameter(gamma, 1.0, ACC, C, BLOCK)).to(x.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        value = rounded.to(ACC)
    value, _ = _standardised(value, mask, tl.full([], eps, ACC), C)
    value = value * _parameter(weight, 1.0, ACC, C, BLOCK) + _parameter(bias, 0.0, ACC, C, BLOCK)
    tl.store(normed + at, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def backward_kernel(
    grad_sum, grad_normed, total, branch, gamma, weight, grad_x, grad_branch, partial, rows: tl.int64, tiles: tl.int32,
    eps: tl.float64, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of `tiles` tiles of rows, and what they add to the parameters', `partial` `[programs, 3, C]`."""
    ACC: tl.constexpr = tl.float64 if total.dtype.element_ty == tl.float64 else tl.float32
    channel = tl.arange(0, BLOCK)
    scale_branch = _parameter(gamma, 1.0, ACC, C, BLOCK)
    scale_normed = _parameter(weight, 1.0, ACC, C, BLOCK)
    of_gamma = tl.zeros([BLOCK], ACC)
    of_weight = tl.zeros([BLOCK], ACC)
    of_bias = tl.zeros([BLOCK], ACC)
    for tile in tl.range(0, tiles, num_stages=1):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < C)[None, :]
        at = row[:, None] * C + channel[None, :]
        grad = tl.zeros([ROWS, BLOCK], ACC)
        if grad_sum is not None:
            grad = tl.load(grad_sum + at, mask=mask, other=0.0).to(ACC)
        if grad_normed is not None:
            value = tl.load(total + at, mask=mask, other=0.0).to(ACC)
            standard, scale = _standardised(value, mask, tl.full([], eps, ACC), C)
            arriving = tl.load(grad_normed + at, mask=mask, other=0.0).to(ACC)
            if partial is not None:
                of_weight += tl.sum(arriving * standard, 0)
                of_bias += tl.sum(arriving, 0)
            arriving = arriving * scale_normed
            mean = tl.sum(arriving, 1) / C
            slope = tl.sum(arriving * standard, 1) / C
            grad += scale * (arriving - mean[:, None] - standard * slope[:, None])
        if grad_x is not None:
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)
        if partial is not None:
            if branch is not None:
                update = tl.load(branch + at, mask=mask, other=0.0).to(ACC)
                of_gamma += tl.sum(tl.where(mask, grad * update, 0.0), 0)
        if grad_branch is not None:
            tl.store(grad_branch + at, (grad * scale_branch).to(grad_branch.dtype.element_ty), mask=mask)
    if partial is not None:
        to = partial + tl.program_id(0) * 3 * C + channel
        tl.store(to, of_gamma, mask=channel < C)
        tl.store(to + C, of_weight, mask=channel < C)
        tl.store(to + 2 * C, of_bias, mask=channel < C)


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
    total = x.new_empty(0 if branch is None else x.shape)
    normed = x.new_empty(x.shape, dtype=out_dtype)
    if x.numel():
        channels = x.shape[-1]
        rows, tile = x.numel() // channels, configs.forward_tile(channels, x.dtype)
        inputs = [_contiguous(tensor) for tensor in (x, branch, gamma, weight, bias)]
        results = (None if branch is None else total, normed)
        forward_kernel[(triton.cdiv(rows, tile.rows),)](
            *inputs, *results, rows, eps, channels, tile.block, tile.rows, num_warps=tile.num_warps
        )
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
    rows, tile = total.numel() // channels, configs.backward_tile(channels, total.dtype)
    sums = any(needed[2:])
    tiles = triton.cdiv(triton.cdiv(rows, tile.rows), configs.PARTIALS) if sums else 1
    programs = triton.cdiv(rows, tile.rows * tiles) if rows else 0
    grad_x = total.new_empty(total.shape) if needed[0] else total.new_empty(0)
    grad_branch = total.new_empty(total.shape, dtype=branch_dtype) if needed[1] else total.new_empty(0)
    partial = total.new_empty((programs, 3, channels), dtype=accumulator(total.dtype)) if sums else None
    if rows:
        inputs = [_contiguous(tensor) for tensor in (grad_sum, grad_normed, total, branch, gamma, weight)]
        results = (grad_x if needed[0] else None, grad_branch if needed[1] else None, partial)
        backward_kernel[(programs,)](
            *inputs, *results, rows, tiles, eps, channels, tile.block, tile.rows, num_warps=tile.num_warps
        )
    parameters = [total] * 3 if partial is None else partial.sum(0).unbind()
    kept = (grad.clone() if need else total.new_empty(0) for grad, need in zip(parameters, needed[2:], strict=True))
    return [grad_x, grad_branch, *kept]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
