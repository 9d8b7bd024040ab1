"""Trackers that match features: a backbone in front of the layer `CorrelationSoftArgmax`.

It is the head of Chrono (Kim et al., CVPR 2025) and the initialisation of TAPIR (Doersch et al., ICCV 2023) without the
convolutions. A backbone subclasses `MatchingTracker` and supplies `resolution` and `features`.
"""

import torch
from torch import Tensor

from tritonkern.functional import correlation_soft_argmax
from tritonkern.nn.correlation import CorrelationSoftArgmax, TrackerOutput, scaled


class MatchingTracker(CorrelationSoftArgmax):
    """Base class of trackers that find a query by its cosine similarity to every cell of every frame.

    Subclasses set `resolution` and implement `features`; see `CorrelationSoftArgmax` for what follows. It is
    the base class, not a part, because official checkpoints have its `occ_linear` next to the backbone.
    """

    resolution: tuple[int, int]
    """(height, width) of the raster that `forward` takes and that queries and tracks are measured in."""

    def __init__(self) -> None:
        super().__init__(self.resolution)

    def features(self, video: Tensor) -> Tensor:
        """Unit-norm features `[B, T, h, w, C]` of a video `[B, T, H, W, 3]` in [-1, 1] at `resolution`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement features(video)")

    def forward(self, video: Tensor, queries: Tensor) -> TrackerOutput:  # type: ignore[override]
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
        height, width = self.resolution
        if not video.is_floating_point():
            raise TypeError(f"video must be floating point in [-1, 1], got {video.dtype}; use video / 127.5 - 1")
        if video.ndim != 5 or video.shape[2:] != (height, width, 3) or video.shape[1] == 0:
            raise ValueError(
                f"video must be [B, T, {height}, {width}, 3] with T >= 1, got {list(video.shape)}; "
                f"resize the frames to {height}x{width}"
            )
        return self.track(self.features(video), queries)

    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """Matches `queries` against features that are already computed: `CorrelationSoftArgmax.forward`."""
        return super().forward(queries, features)

    def way_back(self, features: Tensor, queries: Tensor, tracks: Tensor) -> Tensor:
        """Where the features at `tracks` are found in the frames of the queries: near the query, if a track is right.

        Args:
            features: `[B, T, h, w, C]`, as `features` returns them.
            queries: `[B, N, 3]` rows (t, y, x), of which the nearest frame inside the clip counts.
            tracks: `[B, N, T, 2]` (x, y) in pixels of the raster.

        Returns:
            `[B, N, T, 2]` (x, y) in pixels of the raster.
        """
        frames = features.shape[1]
        number = torch.arange(frames, device=tracks.device).expand(tracks.shape[:3]).to(tracks.dtype)
        places = torch.stack([number, tracks[..., 1], tracks[..., 0]], -1)
        back = torch.empty_like(tracks)
        own = queries[..., 0].round().long().clamp(0, frames - 1)
        for batch in range(len(features)):
            for frame in own[batch].unique().tolist():
                rows = own[batch] == frame
                found = self.query_features(features[batch : batch + 1], places[batch, rows].flatten(0, 1)[None])
                match = correlation_soft_argmax(
                    found.to(features.dtype),
                    features[batch : batch + 1, frame : frame + 1],
                    temperature=self.temperature,
                    radius=self.radius,
                )
                cells = match.points.view(-1, frames, 2)
                back[batch, rows] = scaled(
                    cells, self.resolution[1] / features.shape[3], self.resolution[0] / features.shape[2]
                ).to(back.dtype)
        return back
