"""Eager PyTorch, the plainest correct form; in float64 the tests compare with it.

Query i is multiplied with key i + query_offset + distance, one distance of the window after the other. Frames outside
the window are never read, so a NaN in one of them cannot reach the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accurate


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int,
    scale: float,
    query_offset: int = 0,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """`[B, T, N, H, D]`, twice `[B, S, N, H, D]` -> out `[B, T, N, H, D]`, log-sum-exp of the scores `[B, T, N, H]`."""
    dtype = query.dtype
    query, key, value = accurate(query), accurate(key.roll(-start, 1)), accurate(value.roll(-start, 1))
    frames, keys = query.shape[1], key.shape[1]
    distances = _distances(frames, keys, left, right, query_offset)

    scores = query.new_full((*query.shape[:-1], len(distances)), float("-inf"))  # [B, T, N, H, window]
    for column, distance in enumerate(distances):
        i, j = _pairs(frames, keys, query_offset + distance)
        scores[:, i, ..., column] = scale * (query[:, i] * key[:, j]).sum(-1)
    peak = scores.amax(-1)
    # Unlike torch.logsumexp, an infinite score gives NaN here, and with it NaN gradients.
    lse = peak + torch.exp(scores - peak[..., None]).sum(-1).log()

    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for column, distance in enumerate(distances):
        i, j = _pairs(frames, keys, query_offset + distance)
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
    query_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes; out and lse are what `forward` returned."""
    dtype = query.dtype
    grad_out, query, key, value, out = (accurate(x) for x in (grad_out, query, key, value, out))
    delta = (grad_out * out).sum(-1)  # [B, T, N, H]

    grad_query, grad_key, grad_value = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    frames, keys = query.shape[1], key.shape[1]
    for distance in _distances(frames, keys, left, right, query_offset):
        i, j = _pairs(frames, keys, query_offset + distance)
        weight = torch.exp(scale * (query[:, i] * key[:, j]).sum(-1) - lse[:, i])
        grad_score = weight * ((grad_out[:, i] * value[:, j]).sum(-1) - delta[:, i]) * scale
        grad_query[:, i] += grad_score[..., None] * key[:, j]
        grad_key[:, j] += grad_score[..., None] * query[:, i]
        grad_value[:, j] += weight[..., None] * grad_out[:, i]
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)


def _distances(frames: int, keys: int, left: int, right: int, query_offset: int) -> range:
    """Distances in frames from a query to the keys of its window, as far as there are such pairs."""
    before, after = query_offset + frames - 1, keys - 1 - query_offset
    return range(-min(left, max(before, 0)), min(right, max(after, 0)) + 1)


def _pairs(frames: int, keys: int, shift: int) -> tuple[slice, slice]:
    """The query frames i for which there is a key frame i + shift, and those keys' frames."""
    first = max(0, -shift)
    last = max(first, min(frames, keys - shift))
    return slice(first, last), slice(first + shift, last + shift)
