"""The matching head of refiner-free point trackers: cosine cost volume, soft-argmax, visibility from its statistics.

It is the head of Chrono (Kim et al., CVPR 2025) and the initialisation of TAPIR (Doersch et al., ICCV 2023) without the
convolutions. A backbone subclasses `MatchingTracker` and supplies `resolution` and `features`.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Elements of the largest temporary: 256 MB in float32, small beside the features of any clip that needs chunking.
_COST_VOLUME_LIMIT = 1 << 26


class TrackerOutput(NamedTuple):
    """What a tracker predicts for N queries in a clip of T frames."""

    tracks: Tensor
    """[B, N, T, 2] positions (x, y) in pixels of the model's raster; pixel i has its centre at i + 0.5."""
    occlusion: Tensor
    """[B, N, T] logits of the point being hidden."""
    expected_distance: Tensor
    """[B, N, T] logits of the predicted position being far from the true one."""

    @property
    def visible(self) -> Tensor:
        """[B, N, T] bool: `(1 - sigmoid(occlusion)) * (1 - sigmoid(expected_distance)) >= 0.5`."""
        return (1 - self.occlusion.sigmoid()) * (1 - self.expected_distance.sigmoid()) >= 0.5


class MatchingTracker(nn.Module):
    """Base class of trackers that find a query by its cosine similarity to every cell of every frame.

    Subclasses set `resolution` and implement `features`. The position is the mean of the cell centres within `radius`
    cells of the best match, weighted by a softmax of the similarity; occlusion and expected distance are linear in
    the mean, maximum and minimum similarity of the frame (through which no gradient flows).

    Matching runs in float32 (float64 for float64 features) under autocast as well: bfloat16 would round the logits of
    the softmax to steps of about 0.1.
    """

    resolution: tuple[int, int]
    """(height, width) of the raster that `forward` takes and that queries and tracks are measured in."""
    temperature: float = 20.0
    """Factor from cosine similarity to softmax logit."""
    radius: int = 5
    """Cells whose centre lies strictly closer than this to the best match take part in the soft-argmax."""
    _disc: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.occ_linear = nn.Linear(3, 2)
        reach = range(-self.radius, self.radius + 1)
        disc = [(dy, dx) for dy, dx in product(reach, reach) if dy * dy + dx * dx < self.radius**2]
        self.register_buffer("_disc", torch.tensor(disc, dtype=torch.long), persistent=False)

    def features(self, video: Tensor) -> Tensor:
        """Unit-norm features `[B, T, h, w, C]` of a video `[B, T, H, W, 3]` in [-1, 1] at `resolution`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement features(video)")

    def forward(self, video: Tensor, queries: Tensor) -> TrackerOutput:
        """Tracks `queries` through `video`.

        Args:
            video: `[B, T, H, W, 3]` floating point in [-1, 1], (H, W) equal to `resolution`.
            queries: `[B, N, 3]` rows (t, y, x): frame index, then raster pixels (pixel i has its centre at i + 0.5).

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
        """Matches `queries` against features that are already computed.

        Queries are independent of each other, and are taken in chunks that bound the cost volume's memory.

        Args:
            features: `[B, T, h, w, C]`, unit norm along C, as `features` returns them.
            queries: `[B, N, 3]` rows (t, y, x) as in `forward`. A query outside the clip or the raster is matched with
                the nearest feature inside.

        Raises:
            TypeError: `queries` is not floating point.
            ValueError: a shape is not the above.
        """
        if features.ndim != 5:
            raise ValueError(f"features must be [B, T, h, w, C], got {list(features.shape)}")
        if 0 in features.shape[1:]:
            raise ValueError(f"features must hold at least one frame, cell and channel, got {list(features.shape)}")
        if not queries.is_floating_point():
            raise TypeError(f"queries must be floating point, got {queries.dtype}; use queries.float()")
        if queries.ndim != 3 or queries.shape[2] != 3 or queries.shape[0] != features.shape[0]:
            raise ValueError(
                f"queries must be [{features.shape[0]}, N, 3] with rows (t, y, x), got {list(queries.shape)}"
            )
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            queries = queries.to(features.dtype)
            num_queries = queries.shape[1]
            chunk = max(1, _COST_VOLUME_LIMIT // max(1, features[..., 0].numel()))
            parts = [
                self._track_chunk(features, queries[:, start : start + chunk])
                for start in range(0, max(num_queries, 1), chunk)
            ]
            return TrackerOutput(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))

    def query_features(self, features: Tensor, queries: Tensor) -> Tensor:
        """The features `[B, N, C]` of `[B, T, h, w, C]` at `queries` `[B, N, 3]` (t, y, x), interpolated."""
        rows, columns = features.shape[2:4]
        t, y, x = queries.unbind(-1)
        return _sample(features, t, y * (rows / self.resolution[0]), x * (columns / self.resolution[1]))

    def _track_chunk(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        frames, rows, columns = features.shape[1:4]
        height, width = self.resolution
        query_features = self.query_features(features, queries)
        t, y, x = queries.unbind(-1)

        # [B, n, T, h*w]
        cost = (query_features @ features.flatten(1, 3).mT).unflatten(-1, (frames, rows * columns))

        with torch.no_grad():
            maximum, best = cost.max(-1)
            statistics = torch.stack([cost.mean(-1), maximum, cost.amin(-1)], dim=-1)
        logits = self.occ_linear(statistics.to(self.occ_linear.weight.dtype)).to(features.dtype)

        # A softmax over the disc equals the softmax over the frame, renormalised on the disc: the normaliser cancels.
        best_y, best_x = best // columns, best % columns
        disc_y, disc_x = best_y[..., None] + self._disc[:, 0], best_x[..., None] + self._disc[:, 1]
        inside = (disc_y >= 0) & (disc_y < rows) & (disc_x >= 0) & (disc_x < columns)
        cells = torch.where(inside, disc_y * columns + disc_x, best[..., None])
        weight = (cost.gather(-1, cells) * self.temperature).masked_fill(~inside, -torch.inf).softmax(-1)
        offset = weight @ self._disc.to(weight.dtype)
        points_y = (best_y + 0.5 + offset[..., 0]) * (height / rows)
        points_x = (best_x + 0.5 + offset[..., 1]) * (width / columns)

        # [B, n, T]; torch.round is half to even, as in the official code
        own_frame = t[..., None].round() == torch.arange(frames, device=t.device)
        points = torch.stack(
            [torch.where(own_frame, x[..., None], points_x), torch.where(own_frame, y[..., None], points_y)], dim=-1
        )
        return TrackerOutput(points, logits[..., 0], logits[..., 1])


def _sample(features: Tensor, t: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Trilinear samples `[B, n, C]` of `[B, T, h, w, C]` at positions `[B, n]`, clamped at the border.

    t counts frames (frame i lies at i), y and x are cells (cell i has its centre at i + 0.5). Gathered by hand, because
    the backward pass of the 5-D `grid_sample` is not deterministic on CUDA.
    """
    batch, frames, rows, columns = features.shape[:4]
    index = torch.zeros_like(t, dtype=torch.long)[..., None]
    weight = torch.ones_like(t)[..., None]
    for position, size in ((t, frames), (y - 0.5, rows), (x - 0.5, columns)):
        position = position.clamp(0, size - 1)
        # A NaN position must poison its own weights, not become an index out of bounds.
        low = position.detach().floor().nan_to_num(0).long()
        high = (low + 1).clamp(max=size - 1)
        fraction = position - low
        index = (index[..., None] * size + torch.stack([low, high], -1)[:, :, None]).flatten(2)
        weight = (weight[..., None] * torch.stack([1 - fraction, fraction], -1)[:, :, None]).flatten(2)
    # [B, n, 8, C]
    corners = features.flatten(1, 3)[torch.arange(batch, device=t.device)[:, None, None], index]
    return (weight[..., None] * corners).sum(2)
