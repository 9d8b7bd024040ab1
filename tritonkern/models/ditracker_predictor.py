"""DiTracker with the signature of CoTracker's predictors, in the published coordinates or in those of this package.

The published evaluation resizes frames so that the centres of the corner pixels stay where they are, and coordinates by
(n - 1) / (m - 1). This package keeps the borders of the frame where they are: by n / m, from raster position 0 to the
width. In pixels of the frames the two differ by up to half a pixel, most at the borders.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.models.ditracker import DiTracker

_CENTRE = 0.5


class DiTrackerPredictor(nn.Module):
    """Tracks points through a whole clip of any size.

    Args:
        model: such as `DiTracker.from_folder(folder)`.
        official: frames and coordinates are resized as in the published evaluation, otherwise as by
            `tritonkern.tracking.PointTracker`.
    """

    def __init__(self, model: DiTracker, official: bool = False) -> None:
        super().__init__()
        self.model, self.official = model, official

    @torch.no_grad()
    def forward(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Tracks `[B, T, N, 2]` (x, y) and visibility bool `[B, T, N]`.

        Args:
            video: `[B, T, 3, H, W]` in 0..255, H and W at least 2.
            queries: `[B, N, 3]` rows t, x, y. Coordinates have the centre of the first pixel at (0, 0).

        Raises:
            ValueError: shapes that are not the above, or queries that are not finite or in no frame of the clip.
        """
        if video.ndim != 5 or video.shape[2] != 3 or min(video.shape) < 1 or min(video.shape[3:]) < 2:
            raise ValueError(f"video must be [B, T, 3, H, W], H and W at least 2, got {list(video.shape)}")
        if queries.ndim != 3 or queries.shape[0] != len(video) or queries.shape[2] != 3:
            raise ValueError(f"queries must be [{len(video)}, N, 3], got {list(queries.shape)}")
        frames = video.shape[1]
        if not queries.isfinite().all() or not ((queries[..., 0] >= 0) & (queries[..., 0] <= frames - 1)).all():
            raise ValueError(f"queries must be finite, with t from 0 to {frames - 1}")
        features = self.model.features(self._resized(video) / 127.5 - 1)
        t, x, y = queries.float().unbind(-1)
        inside = self._scaled(torch.stack([x, y], -1), video.shape[3:], self.model.resolution)
        output = self.model.track(features, torch.cat([t[..., None], inside.flip(-1)], -1))
        tracks = self._scaled(output.tracks, self.model.resolution, video.shape[3:], back=True)
        return tracks.transpose(1, 2), output.visible.transpose(1, 2)

    def _resized(self, video: Tensor) -> Tensor:
        """Frames `[B, T, h, w, 3]` at the resolution of the model."""
        images = rearrange(video.float(), "b t c h w -> (b t) c h w")
        if images.shape[-2:] != self.model.resolution:
            options = {"align_corners": True} if self.official else {"align_corners": False, "antialias": True}
            images = F.interpolate(images, self.model.resolution, mode="bilinear", **options)
        return rearrange(images, "(b t) c h w -> b t h w c", b=len(video))

    def _scaled(self, points: Tensor, size: Sequence[int], into: Sequence[int], back: bool = False) -> Tensor:
        """Points (x, y) of frames of (height, width) `size` in frames of `into`: from pixel centres at whole numbers to
        those of the model's raster at i + 0.5, or back."""
        old, new = points.new_tensor(size[::-1]), points.new_tensor(into[::-1])
        if self.official:
            if back:
                return (points - _CENTRE) * ((new - 1) / (old - 1))
            return points * ((new - 1) / (old - 1)) + _CENTRE
        return points * (new / old) - _CENTRE if back else (points + _CENTRE) * (new / old)
