"""What all trackers have in common: features of the frames, then tracks of any queries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tritonkern.nn._inputs import check_inputs
from tritonkern.nn.correlation import TrackerOutput, check_queries

Features = Tensor | tuple[Tensor, ...]
"""What `Tracker.features` returns: one tensor or several, of one batch each, with the frames in axis 1."""


class Tracker(nn.Module):
    """Base class of trackers, for `tritonkern.tracking.PointTracker` and the evaluation.

    Subclasses set `resolution` and implement `features` and `track`.
    """

    resolution: tuple[int, int]
    """(height, width) of the raster that `forward` takes and that queries and tracks are measured in."""
    context: int = 24
    """Frames at either side that the features of a frame depend on, at most."""
    span: int = 128
    """Frames of a long clip that are tracked together; fewer where the features of a frame take more memory."""

    def features(self, video: Tensor) -> Features:
        """Features of a video `[B, T, H, W, 3]` in [-1, 1] at `resolution`: `[B, T, ...]`, one tensor or several."""
        raise NotImplementedError(f"{type(self).__name__} does not implement features(video)")

    def track(self, features: Any, queries: Tensor) -> TrackerOutput:
        """Tracks `queries` `[B, N, 3]` (t, y, x), of `features` as the method of this name returns them."""
        raise NotImplementedError(f"{type(self).__name__} does not implement track(features, queries)")

    def evidence(self, features: Any, queries: Tensor) -> Tensor | None:
        """What `track` begins with and what of each frame depends on no other frame but the query's, `[B, N, T, ...]`:
        a stream keeps it, and gives it to `track` as its third argument. None: there is nothing of the kind."""
        return None

    def forward(self, video: Tensor, queries: Tensor) -> TrackerOutput:
        """Tracks `queries` through `video`.

        Args:
            video: `[B, T, H, W, 3]` floating point in [-1, 1], (H, W) equal to `resolution`.
            queries: `[B, N, 3]` rows (t, y, x), while files and `tritonkern.tracking` have t, x, y: frame index, then
                raster pixels (pixel i has its centre at i + 0.5).

        Returns:
            `TrackerOutput` for all T frames, before and after the query's own.

        Raises:
            TypeError: `video` or `queries` is not floating point.
            ValueError: a shape is not the above.
        """
        self.check_video(video)
        check_inputs(self, queries=queries)
        check_queries(queries, len(video))
        return self.track(self.features(video), queries)

    def check_video(self, video: Tensor) -> None:
        """Raise TypeError or ValueError unless it is floating point `[B, T, H, W, 3]` at `resolution`."""
        height, width = self.resolution
        if isinstance(video, Tensor) and not video.is_floating_point():
            raise TypeError(f"video must be floating point in [-1, 1], got {video.dtype}; use video / 127.5 - 1")
        check_inputs(self, video=video)
        if video.ndim != 5 or video.shape[2:] != (height, width, 3) or video.shape[1] == 0:
            raise ValueError(
                f"video must be [B, T, {height}, {width}, 3] with T >= 1, got {list(video.shape)}; "
                f"resize the frames to {height}x{width}"
            )
