"""Eager PyTorch, the plainest correct form; in float64 it is the oracle of the tests.

Both directions are the same attention: rows (queries) with a position attend to columns (keys) with a position. Every
row attends to every column here; the other backends skip columns that are too far to matter if `culling` is set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision
from tritonkern.ops.track_attention.op import Points, empty_gradients


@full_precision
def forward(
    query: Tensor, key: Tensor, value: Tensor, points: Points, scale: float, splat: bool, culling: bool
) -> Tensor:
    """Output like query, contiguous."""
    tracks, visible = points.placed()
    grid = (query if splat else key).shape[2:4]
    offset, valid = _geometry(tracks, visible, grid, splat)
    queries, keys, values = _rows(query, visible, not splat), _rows(key, visible, splat), _rows(value, visible, splat)
    scores = _scores(queries, keys, offset, valid, points.inverse_variance, scale)
    out = torch.einsum("btijh,btjhd->btihd", _weights(scores, valid), values).reshape(query.shape)
    return out.to(query.dtype).contiguous()


@full_precision
def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    points: Points,
    scale: float,
    splat: bool,
    culling: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, tracks and inverse_variance; see `op.track_attention_bwd`."""
    tracks, visible = points.placed()
    grid = (query if splat else key).shape[2:4]
    offset, valid = _geometry(tracks, visible, grid, splat)
    queries, keys, values = _rows(query, visible, not splat), _rows(key, visible, splat), _rows(value, visible, splat)
    weights = _weights(_scores(queries, keys, offset, valid, points.inverse_variance, scale), valid)

    cotangent = _rows(grad_out, visible, not splat)
    grad_weights = torch.einsum("btihd,btjhd->btijh", cotangent, values)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-2, keepdim=True))
    grads = (
        scale * torch.einsum("btijh,btjhd->btihd", grad_scores, keys),
        scale * torch.einsum("btijh,btihd->btjhd", grad_scores, queries),
        torch.einsum("btijh,btihd->btjhd", weights, cotangent),
    )
    results = empty_gradients(query, key, value, points, needs_grad)
    for result, grad in zip(results, grads, strict=False):
        result.copy_(grad.reshape(result.shape))
    if any(needs_grad):
        # The gradients of a row's scores sum to zero, so that distances may count from the nearest column.
        grad_bias = grad_scores.sum(-1).double()  # [B, T, rows, columns]
        relative = _relative(offset, valid)
        if needs_grad[1]:
            results[4].copy_(-torch.where(grad_bias != 0, grad_bias * relative, 0).sum())
        if not splat and offset.shape[3]:  # that sum is rounded, and the offsets of far tracks would magnify it
            offset = offset - offset.gather(3, relative.argmin(3)[..., None, None].expand(*offset.shape[:3], 1, 2))
        grad_offset = -2 * points.inverse_variance * grad_bias[..., None] * offset  # row's position minus column's
        if needs_grad[0]:
            results[3].copy_(-grad_offset.sum(2) if splat else grad_offset.sum(3))
    return results


def _rows(x: Tensor, visible: Tensor, tracks: bool) -> Tensor:
    """`[B, T, M, H, D]` (tracks) or `[B, T, h, w, H, D]` -> `[B, T, rows, H, D]`, zero for tracks that take no part."""
    x = accurate(x.flatten(2, -3))
    return torch.where(visible[..., None, None], x, 0) if tracks else x


def _geometry(tracks: Tensor, visible: Tensor, grid: torch.Size, splat: bool) -> tuple[Tensor, Tensor]:
    """Row's position minus column's, `[B, T, rows, columns, 2]`, and which pairs count, `[B, T, rows, columns]`.

    In float64 for every dtype, because distances far outside of the grid hardly differ from each other.
    """
    tracks = tracks.double()
    y, x = (torch.arange(n, device=tracks.device, dtype=tracks.dtype) + 0.5 for n in grid)
    cell_centers = torch.stack(torch.broadcast_tensors(x, y[:, None]), -1).flatten(0, 1)
    positions = torch.where(visible[..., None], tracks, 0)
    offset = positions[:, :, :, None] - cell_centers  # [B, T, M, cells, 2]
    valid = visible[..., None].expand(offset.shape[:-1])
    return (-offset.transpose(2, 3), valid.transpose(2, 3)) if splat else (offset, valid)


def _relative(offset: Tensor, valid: Tensor) -> Tensor:
    """Squared distance minus that of the row's nearest column, which changes no softmax and keeps the nearest column's
    bias at zero however small sigma is."""
    squared = torch.where(valid, offset.square().sum(-1), torch.inf)
    nearest = squared.amin(-1, keepdim=True) if squared.shape[-1] else squared.new_zeros(*squared.shape[:-1], 1)
    return torch.where(valid, squared - nearest, torch.inf)


def _scores(
    query: Tensor, key: Tensor, offset: Tensor, valid: Tensor, inverse_variance: Tensor, scale: float
) -> Tensor:
    """`[B, T, rows, columns, H]`, -inf where a pair does not count."""
    penalty = inverse_variance * torch.where(valid, _relative(offset, valid), 0)
    bias = torch.where(valid, -penalty, -torch.inf).to(query.dtype)
    return scale * torch.einsum("btihd,btjhd->btijh", query, key) + bias[..., None]


def _weights(scores: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[..., None], scores.softmax(-2), 0)
