"""The temporal block as one Triton kernel, and its launcher.

Time is flattened as for temporal window attention (triton_rows.py there): a program owns consecutive rows of all clips
laid end to end, so that short clips share a tile and a long clip is cut. It normalises them, with the rows of the
frames around them, once; then it goes through the heads, and nothing between x and the result touches memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops.temporal_block import composition, configs
from tritonkern.ops.temporal_window_attention import configs as window_configs
from tritonkern.ops.temporal_window_attention import triton_rows as flat

backward = functools.partial(composition.backward, "triton")

_ARGUMENTS = range(26)  # all but the constants at the end: no size, stride or address compiles again


@triton.jit
def _normalised(x, weight, bias, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    mean = tl.sum(x, 1) / C
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(weight + channel, mask=inside, other=0.0)
    bias = tl.load(bias + channel, mask=inside, other=0.0)
    return centred * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _projected(
    rows, weight, bias, begin, C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """D outputs of a linear layer from output `begin` on, `[rows, BLOCK_D]`, in the type of the rows."""
    output, channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    mask = (output < D)[:, None] & (channel < C)[None, :]
    tile = tl.load(weight + (begin + output)[:, None] * C + channel[None, :], mask=mask, other=0.0)
    result = tl.dot(rows, tl.trans(tile))
    if bias is not None:
        result += tl.load(bias + begin + output, mask=output < D, other=0.0)[None, :]
    return result.to(rows.dtype)


@triton.jit(do_not_specialize=_ARGUMENTS)
def forward_kernel(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, out,
    T: tl.int32, T_multiplier: tl.uint32, T_shift: tl.uint32, N: tl.int32, N_multiplier: tl.uint32, N_shift: tl.uint32,
    H: tl.int32, H_multiplier: tl.uint32, H_shift: tl.uint32, rows: tl.int32, own: tl.int32, left: tl.int32,
    right: tl.int32, eps: tl.float64,
    stride_b: tl.int32, stride_t: tl.int32, stride_n: tl.int32, stride_h: tl.int32,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows have all C channels: to triton_rows.py they are vectors of one head, H = 1."""
    begin = tl.program_id(0) * own
    count = tl.minimum(rows - begin, own)
    t0, place = flat.origin(begin, (T, T_multiplier, T_shift), (N, N_multiplier, N_shift), (H, H_multiplier, H_shift))
    start, stop = flat.reach(t0, count, place[0], left, right)
    row = start + tl.arange(0, ROWS)
    source = (x, stride_b, stride_t, stride_n, stride_h)
    tile = flat.load(source, row, row < stop, place, C, BLOCK_C)
    normed = _normalised(tile.to(tl.float32), norm_weight, norm_bias, tl.full([], eps, tl.float32), C, BLOCK_C).to(
        tile.dtype
    )
    first, last = flat.window(row, place[0], left, right)
    seen = flat.visible(row, first, last)

    scale = 1.0 / tl.sqrt(D + 0.0)
    channel, offset = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    mask = (channel < C)[:, None] & (offset < D)[None, :]
    total = tile.to(tl.float32)
    if proj_bias is not None:
        total += tl.load(proj_bias + channel, mask=channel < C, other=0.0)[None, :]
    for h in tl.range(0, C // D, num_stages=1):
        query = _projected(normed, qkv_weight, qkv_bias, h * D, C, D, BLOCK_C, BLOCK_D)
        key = _projected(normed, qkv_weight, qkv_bias, C + h * D, C, D, BLOCK_C, BLOCK_D)
        value = _projected(normed, qkv_weight, qkv_bias, 2 * C + h * D, C, D, BLOCK_C, BLOCK_D)
        score = tl.dot(query, tl.trans(key)) * scale
        score = tl.where(seen, score, float("-inf"))
        # The maximum is finite, so that it is never -inf - -inf.
        highest = tl.maximum(tl.max(score, 1), -3.4028234663852886e38)
        weight = tl.exp(score - highest[:, None])
        # Zero times NaN is NaN: values that are not finite are left out, and come back for the rows that see them.
        finite = value.to(tl.float32) * 0.0 == 0.0
        attended = tl.dot(weight.to(value.dtype), tl.where(finite, value, 0.0))
        attended = attended * (1.0 / tl.sum(weight, 1))[:, None]
        broken = tl.max(tl.where(finite, 0, 1), 1)
        if tl.max(broken, 0) > 0:
            meets = tl.max(tl.where(seen & (broken > 0)[None, :], 1, 0), 1)
            attended = tl.where((meets > 0)[:, None], float("nan"), attended)
        at = proj_weight + channel[:, None] * C + h * D + offset[None, :]
        part = tl.load(at, mask=mask, other=0.0)
        total = tl.dot(attended.to(part.dtype), tl.trans(part), total)

    present = (row >= t0) & (row < t0 + count)
    flat.store(flat.contiguous(out, T, N, H, C), row, total, present, place, C, BLOCK_C)


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    left: int,
    right: int,
    eps: float,
) -> Tensor:
    """`[B, T, N, C]` -> the same, contiguous."""
    B, T, N, C = x.shape
    left, right = min(left, max(T - 1, 0)), min(right, max(T - 1, 0))
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    tile = configs.tile(C, C // num_heads, left + right + 1, x.dtype)
    if tile is None or x.numel() >= window_configs.MAX_ELEMENTS:
        return composition.forward("triton", x, *parameters, num_heads, left, right, eps)
    out = x.new_empty(x.shape)
    rows, own = B * T * N, tile.rows - left - right
    if rows:
        # Products take the type of x, sums are float32.
        dtypes = (torch.float32, torch.float32, x.dtype, torch.float32, x.dtype, torch.float32)
        made = [None if p is None else p.to(d).contiguous() for p, d in zip(parameters, dtypes, strict=True)]
        source, strides = flat.readable(x.unsqueeze(3))
        forward_kernel[(triton.cdiv(rows, own),)](
            source, *made, out, *flat.divisor(T), *flat.divisor(N), *flat.divisor(1), rows, own, left, right, eps,
            *strides, C=C, D=C // num_heads, BLOCK_C=window_configs.block_d(C),
            BLOCK_D=window_configs.block_d(C // num_heads), ROWS=tile.rows, num_warps=tile.num_warps,
        )  # fmt: skip
    return out
