"""The call into the C++ kernel. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES, accumulator, adjacent_channels
from tritonkern.ops._results import new_result
from tritonkern.ops.temporal_block import composition

backward = functools.partial(composition.backward, "cpp")

_MAX_CHANNELS = 512
"""Weights are laid out anew in each call, which is not little beyond."""
_MAX_AROUND = 128
"""Frames. The scores of a stretch of time, four times as long as its surroundings, lie in a thread's memory."""


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
    frames, channels = x.shape[1], x.shape[3]
    if channels > _MAX_CHANNELS or min(left + right, frames - 1) > _MAX_AROUND:
        return composition.forward(
            "cpp", x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, left, right, eps
        )
    x = adjacent_channels(x)
    accurate = accumulator(x.dtype)
    given = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    parameters = [None if p is None else p.to(accurate).contiguous() for p in given]
    out = new_result(x, x.shape)
    if x.numel():
        _cpp.temporal_block_forward(
            CPP_DTYPES[x.dtype],
            (*x.shape, num_heads),
            (left, right),
            eps,
            torch.get_num_threads(),
            (x.data_ptr(), x.stride()[:3]),
            [0 if p is None else p.data_ptr() for p in parameters],
            out.data_ptr(),
        )
    return out
