"""Eager PyTorch, the plainest correct form; in float64 it is the oracle of the tests.

The only backend that stores the weights of all heads, frame by frame.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision
from tritonkern.ops.query_key_matching.op import Outputs, allocate, allocate_cost, check_range, disc_limit


@full_precision
def forward(
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
    source: int,
    height: int,
    width: int,
    scale: float,
    symmetric: bool,
    radius: float,
) -> Outputs:
    """As `op.query_key_matching_fwd`."""
    check_range(cells, query.shape[2])
    outputs = allocate(query, cells)
    for t in range(query.shape[1]):
        if t == source:
            index = _all_cells(query, cells)
            points = _centres(height, width, outputs.points)[index]
            made = Outputs(torch.ones_like(outputs.peak[:, t]), points, index, torch.ones_like(outputs.peak[:, t]))
        else:
            made = _locate(_cost(query, key, cells, source, t, scale, symmetric), height, width, radius)
        for all_frames, frame in zip(outputs, made, strict=True):
            all_frames[:, t] = frame
    return outputs


@full_precision
def backward(
    grad_peak: Tensor | None,
    grad_points: Tensor | None,
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
    index: Tensor,
    points: Tensor,
    weight: Tensor,
    source: int,
    height: int,
    width: int,
    scale: float,
    symmetric: bool,
    radius: float,
) -> tuple[Tensor, Tensor]:
    """As `op.query_key_matching_bwd`."""

    def gradient_of_cost(t: int) -> Tensor | None:
        if t == source:
            return None
        centres = _centres(height, width, points)
        grad = points.new_zeros((*index[:, t].shape, height * width))
        if grad_points is not None:
            slope = torch.einsum("bmsc,bmc->bms", centres - points[:, t, :, None], grad_points[:, t])
            grad = torch.where(_near(index[:, t], height, width, radius), slope / weight[:, t, :, None], 0.0)
        if grad_peak is not None:
            best = index[:, t, :, None] == torch.arange(height * width, device=index.device)
            grad = grad + torch.where(best, grad_peak[:, t, :, None], 0.0)
        return grad.masked_fill((index[:, t] < 0)[..., None], torch.nan)

    return _gradients(gradient_of_cost, query, key, cells, source, scale, symmetric)


@full_precision
def cost_forward(
    query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> Tensor:
    """As `op.query_key_cost_fwd`."""
    check_range(cells, query.shape[2])
    cost = allocate_cost(query, cells)
    for t in range(query.shape[1]):
        cost[:, t] = _cost(query, key, cells, source, t, scale, symmetric)
    return cost


@full_precision
def cost_backward(
    grad_cost: Tensor, query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """As `op.query_key_cost_bwd`."""
    return _gradients(lambda t: grad_cost[:, t], query, key, cells, source, scale, symmetric)


@full_precision
def row_statistics(
    rows: Tensor, key: Tensor, mask: Tensor | None, segments: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """As `op.attention_row_statistics_fwd`."""
    scores = torch.einsum("bnhd,bjhd->bhnj", accurate(rows), accurate(key)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    mean = scores.softmax(-1).mean(1)
    parts = [mean[..., start:stop] for start, stop in zip(segments[::2], segments[1::2], strict=True)]
    if not parts:
        return mean[..., :0].contiguous(), mean[..., :0].contiguous()
    return torch.stack([x.amax(-1) for x in parts], -1), torch.stack([x.sum(-1) for x in parts], -1)


@full_precision
def frame_local_attention(
    query: Tensor, key: Tensor, value: Tensor, text: int, frames: int, text_last: bool, renormalise: bool, scale: float
) -> Tensor:
    """As `op.frame_local_attention_fwd`."""
    n, cells = query.shape[1], (query.shape[1] - text) // frames
    position = torch.arange(n, device=query.device)
    is_text = position >= n - text if text_last else position < text
    frame = (position if text_last else position - text) // max(cells, 1)
    seen = is_text[:, None] | is_text | (frame[:, None] == frame)
    scores = torch.einsum("bihd,bjhd->bhij", accurate(query), accurate(key)) * scale
    if renormalise:
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    else:
        weights = scores.softmax(-1)
    # Unseen values are not multiplied, not even by zero: 0 * NaN would carry a broken frame into others.
    out = torch.zeros_like(accurate(query))
    for i in range(frames):
        inside = ~is_text & (frame == i)
        keep = inside | is_text
        out[:, inside] = torch.einsum("bhij,bjhd->bihd", weights[:, :, inside][..., keep], accurate(value[:, keep]))
    out[:, is_text] = torch.einsum("bhij,bjhd->bihd", weights[:, :, is_text], accurate(value))
    return out.to(query.dtype)


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax over keys: `[B, I, H, D]`, `[B, J, H, D]` -> `[B, H, I, J]`."""
    return (torch.einsum("bihd,bjhd->bhij", query, key) * scale).softmax(-1)


def _all_cells(query: Tensor, cells: Tensor | None) -> Tensor:
    return torch.arange(query.shape[2], device=query.device).expand(len(query), -1) if cells is None else cells


def _at(x: Tensor, cells: Tensor | None) -> Tensor:
    """`[B, S, H, D]` -> `[B, M, H, D]`."""
    return x if cells is None else x.gather(1, cells[..., None, None].expand(-1, -1, *x.shape[2:]))


def _cost(query: Tensor, key: Tensor, cells: Tensor | None, a: int, b: int, scale: float, symmetric: bool) -> Tensor:
    """C of one pair of frames as `[B, M, S]`: row m has the cells of frame b for source cell m."""
    query, key = accurate(query[:, [a, b]]), accurate(key[:, [a, b]])
    cost = reduce(_weights(_at(query[:, 0], cells), key[:, 1], scale), "b h m s -> b m s", "mean")
    if not symmetric:
        return cost
    back = reduce(_weights(query[:, 1], key[:, 0], scale), "b h t s -> b s t", "mean")
    return (cost + (back if cells is None else back.gather(1, cells[..., None].expand(-1, -1, back.shape[2])))) / 2


def _centres(height: int, width: int, like: Tensor) -> Tensor:
    """`[S, 2]` (x, y)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return rearrange([x, y], "c h w -> (h w) c").to(like.device, like.dtype) + 0.5


def _near(index: Tensor, height: int, width: int, radius: float) -> Tensor:
    """`[B, M]` -> `[B, M, S]`: which cells are strictly closer than the radius to the best one."""
    y, x = torch.arange(height, device=index.device), torch.arange(width, device=index.device)
    dy = rearrange(y, "h -> h 1") - rearrange(index // width, "b m -> b m 1 1")
    dx = x - rearrange(index % width, "b m -> b m 1 1")
    return (dx.square() + dy.square() < disc_limit(radius)).flatten(-2)


def _locate(cost: Tensor, height: int, width: int, radius: float) -> Outputs:
    peak = cost.amax(-1)
    index = (cost == peak[..., None]).to(torch.uint8).argmax(-1)
    broken = cost.isnan().any(-1)
    if radius == 0:
        points, weight = _centres(height, width, cost)[index], peak
    else:
        kept = cost * _near(index, height, width, radius)
        weight = kept.sum(-1)
        points = torch.einsum("bms,sc->bmc", kept, _centres(height, width, cost)) / weight[..., None]
    return Outputs(
        peak.masked_fill(broken, torch.nan),
        points.masked_fill(broken[..., None], torch.nan),
        index.masked_fill(broken, -1),
        weight.masked_fill(broken, torch.nan),
    )


def _gradients(gradient_of_cost, query, key, cells, a: int, scale: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Gradients of query and key from those of C, frame by frame; None for a frame that gives none."""
    check_range(cells, query.shape[2])
    q, k = accurate(query), accurate(key)
    grad_query, grad_key = torch.zeros_like(q), torch.zeros_like(k)
    every = _all_cells(query, cells)
    share = scale / (query.shape[3] * (2 if symmetric else 1))
    for b in range(query.shape[1]):
        grad = gradient_of_cost(b)
        if grad is None:
            continue
        rows = _at(q[:, a], cells)
        weights = _weights(rows, k[:, b], scale)
        inner = share * weights * (grad[:, None] - (weights * grad[:, None]).sum(-1, keepdim=True))
        where = every[..., None, None].expand(-1, -1, *q.shape[3:])
        grad_query[:, a].scatter_add_(1, where, torch.einsum("bhms,bshd->bmhd", inner, k[:, b]))
        grad_key[:, b] += torch.einsum("bhms,bmhd->bshd", inner, rows)
        if not symmetric:
            continue
        weights = _weights(q[:, b], k[:, a], scale)
        # [B, M, S of b] -> [B, S of b, S of a]
        spread = torch.zeros_like(weights[:, 0]).transpose(1, 2)
        spread = spread.scatter_add(1, every[..., None].expand_as(grad), grad).transpose(1, 2)
        inner = share * weights * (spread[:, None] - (weights * spread[:, None]).sum(-1, keepdim=True))
        grad_query[:, b] += torch.einsum("bhts,bshd->bthd", inner, k[:, a])
        grad_key[:, a] += torch.einsum("bhts,bthd->bshd", inner, q[:, b])
    return grad_query.to(query.dtype), grad_key.to(key.dtype)
