"""The signature of CoTracker's predictors, in both directions: their objects in `PointTracker`, ours in their programs.

A predictor is called as `predictor(video, queries=...)` or `predictor(video, grid_size=...)` with `video`
`[B, T, 3, H, W]` in 0..255 and `queries` `[B, N, 3]` (t, x, y), and returns tracks `[B, T, N, 2]` (x, y) and visibility
`[B, T, N]`. Its pixel coordinates put the centre of the first pixel at (0, 0), half a pixel from ours.

Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos", ICCV 2025;
github.com/facebookresearch/co-tracker, `cotracker/predictor.py`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tritonkern.tracking.predictor import PointTracker

_PIXEL_CENTRE = 0.5


def call_predictor(model: Any, frames: Tensor, queries: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tracks and confidence of `queries` by an object with CoTracker's signature.

    The whole clip is given at once, as float32 at its full size. Queries after the first frame are followed to both
    sides if the object has the argument `backward_tracking`.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        queries: float32 `[N, 3]`, rows t, x, y in pixels of `frames` (raster convention).

    Returns:
        Tracks float32 `[N, T, 2]` (x, y) in the same pixels and confidence float32 `[N, T]` (a visibility that is bool
        becomes 0 or 1), on the CPU.

    Raises:
        ValueError: the object returns something else.
    """
    video = frames.permute(0, 3, 1, 2)[None].to(device).float()
    shifted = queries.to(device).clone()
    shifted[:, 1:] -= _PIXEL_CENTRE
    call = model.forward if isinstance(model, nn.Module) else model
    options: dict[str, Any] = {"queries": shifted[None]}
    if queries[:, 0].any() and "backward_tracking" in inspect.signature(call).parameters:
        options["backward_tracking"] = True
    result = model(video, **options)
    expected = (1, len(frames), len(queries))
    if not isinstance(result, (tuple, list)) or len(result) < 2 or not all(map(torch.is_tensor, result[:2])):
        raise ValueError(f"model must return tracks and visibility as CoTracker's predictors do, got {type(result)}")
    tracks, visibility = result[:2]
    if tuple(tracks.shape) != (*expected, 2) or tuple(visibility.shape) != expected:
        raise ValueError(
            f"model must return tracks {[*expected, 2]} and visibility {[*expected]}, got {list(tracks.shape)} and "
            f"{list(visibility.shape)}"
        )
    confidence = visibility[0].T.float().cpu()
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("model must return a visibility that is bool or a probability in 0..1")
    return tracks[0].transpose(0, 1).float().cpu() + _PIXEL_CENTRE, confidence


class Predictor(nn.Module):
    """A `PointTracker` with the signature of CoTracker's offline predictor; made by `PointTracker.as_predictor()`."""

    def __init__(self, tracker: PointTracker) -> None:
        super().__init__()
        self.model = tracker.model
        self._device = tracker.device

    @torch.no_grad()
    def forward(
        self,
        video: Tensor,
        queries: Tensor | None = None,
        segm_mask: Tensor | None = None,
        grid_size: int = 0,
        grid_query_frame: int = 0,
        backward_tracking: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tracks `[B, T, N, 2]` (x, y) and visibility bool `[B, T, N]`, on the device of `video`.

        Args:
            video: `[B, T, 3, H, W]` in 0..255; fractions are rounded.
            queries: `[B, N, 3]` rows t, x, y. Coordinates have the centre of the first pixel at (0, 0).
            segm_mask: `[B, 1, H, W]`; of the grid, only the points on pixels that are not 0.
            grid_size: points per side of a regular grid, where `queries` is not given.
            grid_query_frame: the frame in which the grid is placed.
            backward_tracking: accepted and ignored, as points are always followed to both sides.

        Raises:
            ValueError, TypeError: a shape or range is not the above, or neither `queries` nor `grid_size` is given.
        """
        from tritonkern.tracking.predictor import PointTracker

        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"video must be [B, T, 3, H, W], got {list(video.shape)}")
        if video.is_floating_point() and 0 < video.max() <= 1:
            raise ValueError("video must be in 0..255, and its largest value is at most 1: multiply it by 255")
        if (queries is None) == (grid_size == 0):
            raise ValueError("give either queries or grid_size")
        parameter = next(self.model.parameters(), None) if isinstance(self.model, nn.Module) else None
        tracker = PointTracker(self.model, device=self._device if parameter is None else parameter.device)
        tracks, visibility = [], []
        for index, clip in enumerate(video):
            frames = clip.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()
            if queries is not None:
                points = queries[index].double().cpu().numpy() + [0, _PIXEL_CENTRE, _PIXEL_CENTRE]
            else:
                points = _grid(grid_size, grid_query_frame, frames, None if segm_mask is None else segm_mask[index, 0])
            result = tracker(frames, queries=points)
            tracks.append(torch.from_numpy(result.tracks).transpose(0, 1) - _PIXEL_CENTRE)
            visibility.append(torch.from_numpy(result.visibility).T)
        return torch.stack(tracks).to(video.device), torch.stack(visibility).to(video.device)


def _grid(grid_size: int, frame: int, frames: Tensor, mask: Tensor | None) -> np.ndarray:
    from tritonkern.tracking.queries import grid_queries

    height, width = frames.shape[1:3]
    points = grid_queries(grid_size, (width, height), frame)
    if mask is not None:
        x, y = points[:, 1:].astype(int).T.clip(0, [[width - 1], [height - 1]])
        points = points[mask.cpu().numpy()[y, x] != 0]
    return points
