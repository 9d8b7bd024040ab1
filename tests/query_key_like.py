"""Query-key matching and its two neighbours as textbook loops (differentiable, slow) and as a user writes them."""

import math

import torch


def textbook_cost(query, key, source, cells, scale, symmetric):
    """`[B, T, M, S]`, one pair of frames, one cell, one head at a time."""
    B, T, S, H, _ = query.shape
    cost = []
    for b in range(B):
        for t in range(T):
            rows = []
            for s in range(S) if cells is None else cells[b].tolist():
                there = [softmax_over(query[b, source, s, n], key[b, t, :, n], scale) for n in range(H)]
                row = sum(there) / H
                if symmetric:
                    # Of the softmax over source cells that each target cell has, the part of cell s.
                    back = [
                        torch.stack([softmax_over(query[b, t, j, n], key[b, source, :, n], scale)[s] for j in range(S)])
                        for n in range(H)
                    ]
                    row = (row + sum(back) / H) / 2
                rows.append(row)
            cost.append(torch.stack(rows) if rows else query.new_empty(0, S))
    return torch.stack(cost).view(B, T, -1, S)


def softmax_over(row, others, scale):
    scores = scale * (others * row).sum(-1)
    weights = (scores - scores.max().detach()).exp()
    return weights / weights.sum()


def eager_cost(query, key, source, cells, scale, symmetric):
    """Step by step, all heads at once, in the inputs' dtype."""
    at = torch.arange(query.shape[2]).expand(len(query), -1) if cells is None else cells
    batch = torch.arange(len(query))[:, None]
    there = torch.einsum("bshd,btjhd->bthsj", query[batch, source, at], key) * scale
    cost = there.softmax(-1).mean(2)
    if not symmetric:
        return cost
    back = (torch.einsum("btjhd,bshd->bthsj", query, key[:, source]) * scale).softmax(3).mean(2)
    return (cost + torch.stack([x[:, at[b]] for b, x in enumerate(back)])) / 2


def located(cost, index, grid, radius):
    """Peak and points for given best cells, from the cost `[B, T, M, S]`."""
    h, w = grid
    peak = cost.gather(-1, index[..., None])[..., 0]
    y, x = (torch.arange(h * w) // w).to(cost.dtype), (torch.arange(h * w) % w).to(cost.dtype)
    centres = torch.stack([x, y], -1) + 0.5
    if radius is None:
        return peak, centres[index]
    distance = torch.cdist(centres[index].flatten(0, -2)[None].double(), centres[None].double())[0]
    near = (distance.view(*index.shape, h * w) < radius * (1 - 1e-9)) | (distance.view(*index.shape, h * w) == 0)
    kept = torch.where(near, cost, 0)
    return peak, (kept[..., None] * centres).sum(-2) / kept.sum(-1)[..., None]


def textbook_rows(rows, key, mask, segments, scale):
    """Maximum and sum `[B, N, G]`."""
    maximum, total = [], []
    for b in range(len(rows)):
        keep = torch.ones(key.shape[1], dtype=torch.bool) if mask is None else mask[b]
        for i in range(rows.shape[1]):
            mean = torch.zeros(key.shape[1], dtype=rows.dtype)
            for n in range(rows.shape[2]):
                mean[keep] += softmax_over(rows[b, i, n], key[b, keep, n], scale) / rows.shape[2]
            maximum.append(torch.stack([mean[start:stop].max() for start, stop in segments]))
            total.append(torch.stack([mean[start:stop].sum() for start, stop in segments]))
    shape = (*rows.shape[:2], len(segments))
    return torch.stack(maximum).view(shape), torch.stack(total).view(shape)


def eager_rows(rows, key, mask, segments, scale):
    scores = torch.einsum("bnhd,bjhd->bhnj", rows, key) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    mean = scores.softmax(-1).mean(1)
    return tuple(
        torch.stack([f(mean[..., a:b]) for a, b in segments], -1) for f in (lambda x: x.amax(-1), lambda x: x.sum(-1))
    )


def textbook_frames(query, key, value, text, frames, text_last, renormalise, scale):
    """One query at a time."""
    B, n, H, _ = query.shape
    cells = (n - text) // frames

    def frame(i):  # None for text
        if text_last:
            return None if i >= n - text else i // cells
        return None if i < text else (i - text) // cells

    seen = [[j for j in range(n) if frame(i) is None or frame(j) is None or frame(i) == frame(j)] for i in range(n)]
    out = torch.zeros_like(query)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                keys = seen[i] if renormalise else list(range(n))
                weights = softmax_over(query[b, i, h], key[b, keys, h], scale)
                kept = [keys.index(j) for j in seen[i]]
                out[b, i, h] = (weights[kept][:, None] * value[b, seen[i], h]).sum(0)
    return out


def eager_frames(query, key, value, text, frames, text_last, renormalise, scale):
    """With a dense mask, in the inputs' dtype."""
    n = query.shape[1]
    position = torch.arange(n) if text_last else torch.arange(n) - text
    frame = torch.div(position, max((n - text) // frames, 1), rounding_mode="floor")
    is_text = torch.arange(n) >= n - text if text_last else torch.arange(n) < text
    seen = is_text[:, None] | is_text | (frame[:, None] == frame)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1) if renormalise else scores.softmax(-1) * seen
    return torch.einsum("bhij,bjhd->bihd", weights, value)
