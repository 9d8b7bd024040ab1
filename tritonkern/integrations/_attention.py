"""Attention of the descendants of CoTracker (CoTracker3, AllTracker, MV-TAP), over time and between tracks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.functional import temporal_window_attention
from tritonkern.integrations import _compare
from tritonkern.integrations._patch import Replacement


def replacements(part: nn.Module, path: str) -> Iterator[Replacement]:
    """The attention layers inside `part`."""
    for name, module in part.named_modules(prefix=path):
        if {child for child, _ in module.named_children()} - {"attn_drop"} == {"to_q", "to_kv", "to_out"} and (
            isinstance(getattr(module, "heads", None), int) and isinstance(getattr(module, "scale", None), float)
        ):
            yield Replacement(name, module, "forward", (forward,), _one_sequence)


def forward(self: Any, own: Any, x: Tensor, context: Tensor | None = None, attn_bias: Tensor | None = None) -> Tensor:
    """Replaces `Attention.forward`: softmax(q k^T scale + bias) v, `[B, N, C]` -> the same shape."""
    dropout = getattr(self, "attn_drop", None)  # of MV-TAP; zero by default
    if dropout is not None and self.training and getattr(dropout, "p", 1):
        return own(x, context, attn_bias)
    query = self.to_q(x).unflatten(-1, (self.heads, -1))
    key, value = self.to_kv(x if context is None else context).unflatten(-1, (2, self.heads, -1)).unbind(2)
    if attn_bias is None and in_one_window(query, key):
        frames = x.shape[1]
        return self.to_out(temporal_window_attention(query, key, value, (frames, frames), scale=self.scale).flatten(2))
    bias = None if attn_bias is None else attn_bias.to(query.dtype)
    query, key, value = (y.transpose(1, 2) for y in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
    return self.to_out(mixed.transpose(1, 2).flatten(2))


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


def _one_sequence(module: Any, own: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The first of the sequences."""

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, Tensor) else x

    args, kwargs = tuple(map(first, args)), {name: first(x) for name, x in kwargs.items()}
    return _compare.arguments(module, own, function, *args, **kwargs)
