"""Training objectives: Chrono's losses with a classification loss over the cells that makes training from scratch work,
and the losses of a refiner's iterations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.models.matching import MatchingTracker
from tritonkern.nn.correlation import TrackerOutput


def cell_targets(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four cells around each point and their bilinear weights.

    `points` `[..., 2]` xy in cells (centres at +0.5) -> flat cell indices `[..., 4]` (int64) and weights `[..., 4]`
    that sum to 1.
    """
    place = points - 0.5
    x = place[..., 0].clamp(0, width - 1)
    y = place[..., 1].clamp(0, height - 1)
    left, top = x.floor().clamp(max=width - 2), y.floor().clamp(max=height - 2)
    dx, dy = x - left, y - top
    corner = (top * width + left).long()
    cells = torch.stack([corner, corner + 1, corner + width, corner + width + 1], -1)
    weights = torch.stack([(1 - dx) * (1 - dy), dx * (1 - dy), (1 - dx) * dy, dx * dy], -1)
    return cells, weights


def tracking_loss(
    model: MatchingTracker, features: Tensor, queries: Tensor, points: Tensor, occluded: Tensor
) -> dict[str, Tensor]:
    """Losses of one batch, each a scalar; their weighted sum is `total`.

    `features` `[B, T, h, w, C]` of `model`, `queries` `[B, N, 3]` (t, y, x), true `points` `[B, N, T, 2]` xy in
    pixels and `occluded` `[B, N, T]`. `points`: Huber with delta 4 px on visible frames whose match is within
    reach, weight 0.05; `occlusion` and `distance`: binary cross-entropy of "occluded" and of "further than 6 px off"
    (Chrono, section 4). `cells`: cross-entropy between the softmax over the cells of a frame and the bilinear
    position of the true point, on visible frames.
    """
    height, width = features.shape[2:4]
    scale = features.new_tensor([model.resolution[1] / width, model.resolution[0] / height])
    frames = torch.arange(points.shape[2], device=points.device)
    visible = ~occluded & (frames != queries[..., :1].round())
    share = visible.float() / visible.sum().clamp(min=1)

    # [B, N, T, h*w]
    logits = model.temperature * model.query_features(features, queries) @ features.flatten(1, 3).mT
    logits = logits.unflatten(-1, (-1, height * width))
    cells, weights = cell_targets(points / scale, height, width)
    cell_loss = ((logits.logsumexp(-1) - (logits.gather(-1, cells) * weights).sum(-1)) * share).sum()

    output = model.track(features, queries)
    error = (output.tracks - points).norm(dim=-1)
    # Beyond the soft-argmax's reach the gradient could only blur a wrong match.
    close = share * (error.detach() < model.radius * scale.max())
    point_loss = (F.huber_loss(output.tracks, points, delta=4.0, reduction="none").sum(-1) * close).sum()
    occlusion_loss = F.binary_cross_entropy_with_logits(output.occlusion, occluded.float())
    far = (error.detach() > 6).float()
    distance = F.binary_cross_entropy_with_logits(output.expected_distance, far, reduction="none")
    distance_loss = (distance * share).sum()
    total = cell_loss + 0.05 * point_loss + occlusion_loss + distance_loss
    return {
        "total": total,
        "cells": cell_loss,
        "points": point_loss,
        "occlusion": occlusion_loss,
        "distance": distance_loss,
        "within4": ((error < 4).float() * share).sum(),
    }


def iteration_losses(
    steps: Sequence[TrackerOutput], points: Tensor, occluded: Tensor, *, delta: float = 6.0, near: float = 12.0
) -> dict[str, Tensor]:
    """Losses of the iterations of a refiner, each a scalar; their weighted sum is `total`.

    `visible`: Huber with threshold `delta` on the coordinates of visible points, `hidden`: L1 on those of hidden ones,
    weights 0.05 and 0.01; both are means over points, weighted by 0.8 to the power of the iterations to come, and
    divided by the number of iterations. `visibility`: binary cross-entropy of "visible"; `confidence`: of "at most
    `near` off" on visible points, divided by the number of all points; both are means over the iterations.

    These are the losses of CoTracker3 (Karaev et al., 2024) as DiTracker trains with them.

    Args:
        steps: results of the iterations, tracks `[B, N, T, 2]`.
        points: true `[B, N, T, 2]`, in the pixels of the tracks, as are `delta` and `near`.
        occluded: bool `[B, N, T]`.
    """
    visible = (~occluded).to(points.dtype)
    losses = {name: points.new_zeros(()) for name in ("visible", "hidden", "visibility", "confidence")}
    for index, step in enumerate(steps):
        weight = 0.8 ** (len(steps) - 1 - index) / len(steps)
        huber = F.huber_loss(step.tracks, points, reduction="none", delta=delta).mean(-1)
        absolute = (step.tracks - points).abs().mean(-1)
        for name, error, share in (("visible", huber, visible), ("hidden", absolute, 1 - visible)):
            losses[name] = losses[name] + weight * (error * share).sum() / (share.sum() + 1e-6)
        close = ((step.tracks.detach() - points).square().sum(-1) <= near**2).to(points.dtype)
        seen = F.binary_cross_entropy_with_logits(-step.occlusion, visible)
        sure = F.binary_cross_entropy_with_logits(-step.expected_distance, close, reduction="none")
        losses["visibility"] = losses["visibility"] + seen / len(steps)
        losses["confidence"] = losses["confidence"] + (sure * visible).mean() / len(steps)
    total = 0.05 * losses["visible"] + 0.01 * losses["hidden"] + losses["visibility"] + losses["confidence"]
    return {"total": total, **losses}
