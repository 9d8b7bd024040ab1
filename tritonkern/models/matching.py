"""Trackers that match features: a backbone in front of the layer `CorrelationSoftArgmax`.

It is the head of Chrono (Kim et al., CVPR 2025) and the initialisation of TAPIR (Doersch et al., ICCV 2023) without the
convolutions. A backbone subclasses `MatchingTracker` and supplies `resolution` and `features`.
"""

from typing import cast

import torch
from torch import Tensor

from tritonkern.functional import correlation_soft_argmax
from tritonkern.models.tracker import Tracker
from tritonkern.nn.correlation import CorrelationSoftArgmax, TrackerOutput, scaled


class MatchingTracker(Tracker, CorrelationSoftArgmax):  # type: ignore[misc]  # its forward is that of Tracker
    """Base class of trackers that find a query by its cosine similarity to every cell of every frame.

    Subclasses set `resolution` and implement `features`, which returns unit-norm features `[B, T, h, w, C]`; the rest
    is described in `CorrelationSoftArgmax`. It is the base class, not a part, because official checkpoints keep its
    `occ_linear` next to the backbone.
    """

    def __init__(self) -> None:
        super().__init__(self.resolution)

    def features(self, video: Tensor) -> Tensor:
        """Unit-norm features `[B, T, h, w, C]` of a video `[B, T, H, W, 3]` in [-1, 1] at `resolution`."""
        return cast(Tensor, super().features(video))

    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """Matches `queries` against features that are already computed: `CorrelationSoftArgmax.forward`."""
        return CorrelationSoftArgmax.forward(self, queries, features)

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
