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
        if {child for child, _ in module.named_children()} == {"to_q", "to_kv", "to_out"} and (
            isinstance(getattr(module, "heads", None), int) and isinstance(getattr(module, "scale", None), float)
        ):
            yield Replacement(name, module, "forward", (forward,), _one_sequence)


def forward(self: Any, own: Any, x: Tensor, context: Tensor | None = None, attn_bias: Tensor | None = None) -> Tensor:
    """Replaces `Attention.forward`: softmax(q k^T scale + bias) v, `[B, N, C]` -> the same shape."""
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

    TABLE

    Args:
        query, key: `[N, T, H, D]`, sequences, frames, heads and head dimension.
    """
    frames, _, dim = query.shape[1:]
    return (
        query.device.type == "cpu"
        and query.shape == key.shape
        and 1 <= frames <= LONGEST
        and dim % 8 == 0
        and 8 <= dim <= 256
        and query.dtype == key.dtype
    )


LONGEST = 64
"""Frames of the longest sequence for which one window is faster on a CPU."""


def _one_sequence(module: Any, own: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The first of the sequences."""

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, Tensor) else x

    args, kwargs = tuple(map(first, args)), {name: first(x) for name, x in kwargs.items()}
    return _compare.arguments(module, own, function, *args, **kwargs)
