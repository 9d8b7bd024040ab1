"""Attention within many short sequences: in one window over all frames, or by PyTorch, whichever is faster."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tritonkern.functional import temporal_window_attention


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v per sequence and head: `[N, T, H, D]` and `[N, S, H, D]` twice -> `[N, T, H, D]`.

    `bias` has a shape that `[N, H, T, S]` accepts.
    """
    if bias is None and in_one_window(query, key):
        frames = query.shape[1]
        return temporal_window_attention(query, key, value, (frames, frames), scale=scale)
    bias = None if bias is None else bias.to(query.dtype)
    query, key, value = (y.transpose(1, 2) for y in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(1, 2)


def in_one_window(query: Tensor, key: Tensor) -> bool:
    """Whether `temporal_window_attention` with one window over all frames is faster than PyTorch's attention.

    Time of `scaled_dot_product_attention` over time of the window, for float32 `[N, T, 8, 48]` without gradients on a
    CPU with AVX2 (paired runs on a machine that did other work too; two threads, then one thread):

    ==== ============ ============ ============ ============
    T    N 64         N 256        N 1024       N 4096
    ==== ============ ============ ============ ============
    8    4.24  1.53   6.95  3.25   6.45  1.69   3.01  1.29
    16   3.29  0.99   3.55  1.11   2.34  1.08   1.98  1.09
    24   2.62  0.74   1.59  1.10   1.10  1.00   1.35  0.95
    32   1.28  1.65   1.23  0.88   1.17  0.88
    48   1.06  0.66   1.12  0.78   1.10  0.80
    60   0.78  0.82   0.94  0.81   1.00  0.83
    ==== ============ ============ ============ ============

    With fewer than 64 sequences the cost of the call decides (0.4 for one sequence and one thread). On a GPU it has not
    been measured, and PyTorch's attention runs.

    Args:
        query, key: `[N, T, H, D]`, sequences, frames, heads and head dimension.
    """
    sequences, frames, _, dim = query.shape
    return (
        query.device.type == "cpu"
        and query.shape == key.shape
        and sequences >= 64
        and 1 <= frames <= 24
        and dim % 8 == 0
        and 8 <= dim <= 256
    )
