"""From cells of a grid to positions between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Corners(NamedTuple):
    """The four cells around each of n points, of which a position is the weighted mean."""

    cells: Tensor
    """[n, 4] row * w + column."""
    weights: Tensor
    """[n, 4] bilinear; zero for what is beyond the grid, if the border is zeros."""
    offset: Tensor
    """[n, 2] in cells: what is added to the mean of the matches."""
    size: tuple[float, float]
    """Pixels of the raster per cell in x and y."""

    @classmethod
    def of(cls, places: Tensor, grid: tuple[int, int], resolution: tuple[int, int], border: str) -> Corners:
        """`places` `[n, 2]` (x, y) in pixels of the raster."""
        (h, w), (height, width) = grid, resolution
        size = width / w, height / h
        place = places / places.new_tensor(size)
        if border == "zeros":
            # As published: cells at whole numbers, on a grid stretched so that its margin is a 64th of the width.
            margin = w / 64
            sampled = place * place.new_tensor([(w - 1) / (w - margin), (h - 1) / (h - margin)])
        else:
            sampled = place - 0.5
        low = sampled.floor()
        part = sampled - low
        x, y = (low[:, i, None] + low.new_tensor(step) for i, step in enumerate(([0, 1, 0, 1], [0, 0, 1, 1])))
        weights = torch.stack([1 - part, part], -1)
        weights = (weights[:, 1, :, None] * weights[:, 0, None, :]).flatten(1)
        column, row = x.clamp(0, w - 1), y.clamp(0, h - 1)
        cells = (row * w + column).long()
        if border == "zeros":
            weights = weights * ((column == x) & (row == y))
            # Published positions are the numbers of cells, half a cell from their centres.
            offset = -0.5 * weights.sum(-1, keepdim=True).expand_as(place)
        else:
            centre = torch.stack([(weights * (column + 0.5)).sum(-1), (weights * (row + 0.5)).sum(-1)], -1)
            offset = place - centre
        return cls(cells, weights, offset, size)

    @property
    def nearest(self) -> Tensor:
        """[n, 1]: which of the four has the largest weight."""
        return self.weights.argmax(-1, keepdim=True)

    def blend(self, points: Tensor) -> Tensor:
        """Positions `[n, T, 2]` in pixels, of matches `[T, n, 4, 2]` of the cells, in cells."""
        mean = torch.einsum("tnkc,nk->ntc", points, self.weights) + self.offset[:, None]
        return mean * mean.new_tensor(self.size)


def locate(cost: Tensor, grid: tuple[int, int], radius: float | None) -> Tensor:
    """Positions `[M, 2]` (x, y) in cells of the best cells of a cost `[M, S]`, as `query_key_matching` has them."""
    best = cost.argmax(-1)
    cell = torch.arange(cost.shape[-1], device=cost.device)
    centres = torch.stack([cell % grid[1] + 0.5, cell // grid[1] + 0.5], -1).to(cost.dtype)
    if radius is None:
        return centres[best]
    kept = cost * (torch.cdist(centres[best], centres) < radius)
    return kept @ centres / kept.sum(-1, keepdim=True)
