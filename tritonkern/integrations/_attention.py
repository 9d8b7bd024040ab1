"""Attention of the descendants of CoTracker (CoTracker3, AllTracker, MV-TAP), over time and between tracks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tritonkern.integrations import _compare
from tritonkern.integrations._patch import Replacement
from tritonkern.nn._sequence_attention import attend


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
    return self.to_out(attend(query, key, value, self.scale, attn_bias).flatten(2))


def _one_sequence(module: Any, own: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The first of the sequences."""

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, Tensor) else x

    args, kwargs = tuple(map(first, args)), {name: first(x) for name, x in kwargs.items()}
    return _compare.arguments(module, own, function, *args, **kwargs)
