"""Eager PyTorch, the plainest correct form; in float64 it is what the tests believe.

Both directions are the same attention: rows (queries) with a position attend to columns (keys) with a position. Every
row meets every column here; `culling` is what the other backends do about those that are too far to matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops._contract import full_precision


@full_precision
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
) -> tuple[Tensor, Tensor]:
    """What `op` says of the forward operator: output and log-sum-exp."""
    grid = query.shape[2:4] if splat else key.shape[2:4]
    offset, valid = _geometry(tracks, visible, grid, splat)
    queries, keys, values = _rows(query, visible, not splat), _rows(key, visible, splat), _rows(value, visible, splat)
    scores = _scores(queries, keys, offset, valid, precision, scale)
    peak = (
        scores.amax(-2, keepdim=True) if scores.shape[-2] else scores.new_full((*scores.shape[:-2], 1, 1), -torch.inf)
    )
    # A row without columns has a peak of -inf, no weights and no output.
    peak = peak.expand(*scores.shape[:-2], 1, scores.shape[-1])
    lse = peak + torch.exp(scores - peak.nan_to_num(neginf=0)).sum(-2, keepdim=True).log()
    out = torch.einsum("btijh,btjhd->btihd", _weights(scores, valid), values).reshape(query.shape)
    return out.to(query.dtype).contiguous(), lse[..., 0, :].contiguous()


@full_precision
def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
    positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, tracks and precision; the last two are of shape [0] unless `positions`."""
    grid = query.shape[2:4] if splat else key.shape[2:4]
    offset, valid = _geometry(tracks, visible, grid, splat)
    queries, keys, values = _rows(query, visible, not splat), _rows(key, visible, splat), _rows(value, visible, splat)
    # Neither lse nor the stored output: both are rounded, which shows where scores are large or 16 bits wide.
    weights = _weights(_scores(queries, keys, offset, valid, precision, scale), valid)

    cotangent = _rows(grad_out, visible, not splat)
    grad_weights = torch.einsum("btihd,btjhd->btijh", cotangent, values)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-2, keepdim=True))
    grads = (
        scale * torch.einsum("btijh,btjhd->btihd", grad_scores, keys),
        scale * torch.einsum("btijh,btihd->btjhd", grad_scores, queries),
        torch.einsum("btijh,btihd->btjhd", weights, cotangent),
    )
    grad_query, grad_key, grad_value = (
        grad.reshape(x.shape).to(x.dtype).contiguous() for grad, x in zip(grads, (query, key, value), strict=True)
    )
    if not positions:
        return grad_query, grad_key, grad_value, tracks.new_empty(0), precision.new_empty(0)

    # The gradients of a row's scores sum to zero, so that the nearest column's distance needs none of its own.
    grad_bias = grad_scores.sum(-1).double()  # [B, T, rows, columns]
    relative = _relative(offset, valid)
    grad_precision = -torch.where(grad_bias != 0, grad_bias * relative, 0).sum()
    if not splat and offset.shape[3]:  # likewise; that sum is rounded, and offsets of far tracks would magnify it
        offset = offset - offset.gather(3, relative.argmin(3)[..., None, None].expand(*offset.shape[:3], 1, 2))
    grad_offset = -2 * precision * grad_bias[..., None] * offset  # row's position minus column's
    grad_tracks = -grad_offset.sum(2) if splat else grad_offset.sum(3)
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_tracks.to(tracks.dtype).contiguous(),
        grad_precision.to(precision.dtype),
    )


def _rows(x: Tensor, visible: Tensor, tracks: bool) -> Tensor:
    """`[B, T, M, H, D]` (tracks) or `[B, T, h, w, H, D]` -> `[B, T, rows, H, D]`, invisible tracks zero."""
    x = x.flatten(2, -3)
    x = x if x.dtype == torch.float64 else x.float()
    return torch.where(visible[..., None, None], x, 0) if tracks else x


def _geometry(tracks: Tensor, visible: Tensor, grid: torch.Size, splat: bool) -> tuple[Tensor, Tensor]:
    """Row's position minus column's, `[B, T, rows, columns, 2]`, and which pairs meet, `[B, T, rows, columns]`.

    In float64 whatever the dtype: distances far outside of the frame hardly differ from each other.
    """
    tracks = tracks.double()
    y, x = (torch.arange(n, device=tracks.device, dtype=tracks.dtype) + 0.5 for n in grid)
    cells = torch.stack(torch.broadcast_tensors(x, y[:, None]), -1).flatten(0, 1)
    points = torch.where(visible[..., None], tracks, 0)
    offset = points[:, :, :, None] - cells  # [B, T, M, cells, 2]
    valid = visible[..., None].expand(offset.shape[:-1])
    return (-offset.transpose(2, 3), valid.transpose(2, 3)) if splat else (offset, valid)


def _relative(offset: Tensor, valid: Tensor) -> Tensor:
    """Squared distance beyond that of the row's nearest column. The softmax cannot tell, and it is never large where
    it matters, however small sigma is."""
    squared = torch.where(valid, offset.square().sum(-1), torch.inf)
    nearest = squared.amin(-1, keepdim=True) if squared.shape[-1] else squared.new_zeros(*squared.shape[:-1], 1)
    return torch.where(valid, squared - nearest, torch.inf)


def _scores(query: Tensor, key: Tensor, offset: Tensor, valid: Tensor, precision: Tensor, scale: float) -> Tensor:
    """`[B, T, rows, columns, H]`, -inf where a pair does not meet."""
    bias = torch.where(valid, -precision * torch.where(valid, _relative(offset, valid), 0), -torch.inf).to(query.dtype)
    return scale * torch.einsum("btihd,btjhd->btijh", query, key) + bias[..., None]


def _weights(scores: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[..., None], scores.softmax(-2), 0)
