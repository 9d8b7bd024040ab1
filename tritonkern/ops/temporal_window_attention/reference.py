"""Eager PyTorch, the plainest correct form; in float64 the tests compare with it.

Query i is multiplied with key i + offset, one offset of the window after the other. Frames outside the window are never
read, so a NaN in one of them cannot reach the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accurate


def forward(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, T, N, H, D]` three times -> out `[B, T, N, H, D]` and the log-sum-exp of the scores `[B, T, N, H]`."""
    dtype = query.dtype
    query, key, value = (accurate(x) for x in (query, key, value))
    offsets = _offsets(query.shape[1], left, right)

    scores = query.new_full((*query.shape[:-1], len(offsets)), float("-inf"))  # [B, T, N, H, window]
    for column, offset in enumerate(offsets):
        i, j = _pairs(query.shape[1], offset)
        scores[:, i, ..., column] = scale * (query[:, i] * key[:, j]).sum(-1)
    peak = scores.amax(-1)
    # Unlike torch.logsumexp, an infinite score gives NaN here, and with it NaN gradients.
    lse = peak + torch.exp(scores - peak[..., None]).sum(-1).log()

    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for column, offset in enumerate(offsets):
        i, j = _pairs(query.shape[1], offset)
        out[:, i] += torch.exp(scores[:, i, ..., column] - lse[:, i])[..., None] * value[:, j]
    return out.to(dtype), lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each `[B, T, N, H, D]`; out and lse are what `forward` returned."""
    dtype = query.dtype
    grad_out, query, key, value, out = (accurate(x) for x in (grad_out, query, key, value, out))
    delta = (grad_out * out).sum(-1)  # [B, T, N, H]

    grad_query, grad_key, grad_value = (
        torch.zeros_like(query, memory_format=torch.contiguous_format) for _ in range(3)
    )
    for offset in _offsets(query.shape[1], left, right):
        i, j = _pairs(query.shape[1], offset)
        weight = torch.exp(scale * (query[:, i] * key[:, j]).sum(-1) - lse[:, i])
        grad_score = weight * ((grad_out[:, i] * value[:, j]).sum(-1) - delta[:, i]) * scale
        grad_query[:, i] += grad_score[..., None] * key[:, j]
        grad_key[:, j] += grad_score[..., None] * query[:, i]
        grad_value[:, j] += weight[..., None] * grad_out[:, i]
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)


def _offsets(frames: int, left: int, right: int) -> range:
    """Distances in frames from a query to the keys of its window, as far as the clip has such pairs."""
    return range(-min(left, max(frames - 1, 0)), min(right, max(frames - 1, 0)) + 1)


def _pairs(frames: int, offset: int) -> tuple[slice, slice]:
    """The query frames that have a key `offset` frames away, and those keys' frames."""
    return slice(max(0, -offset), frames - max(0, offset)), slice(max(0, offset), frames - max(0, -offset))
