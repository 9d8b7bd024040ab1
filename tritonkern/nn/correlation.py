"""The matching head of refiner-free point trackers: correlation, soft-argmax, visibility from the statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import _register_namedtuple

from tritonkern.functional import correlation_soft_argmax
from tritonkern.nn._plain import input_dtype


class TrackerOutput(NamedTuple):
    """What a tracker predicts for N queries in a clip of T frames."""

    tracks: Tensor
    """[B, N, T, 2] positions (x, y) in pixels of the model's raster; pixel i has its centre at i + 0.5."""
    occlusion: Tensor
    """[B, N, T] logits of the point being hidden."""
    expected_distance: Tensor
    """[B, N, T] logits of the predicted position being far from the true one."""

    @property
    def confidence(self) -> Tensor:
        """[B, N, T] in 0..1: `(1 - sigmoid(occlusion)) * (1 - sigmoid(expected_distance))`, as in TAPIR."""
        return (1 - self.occlusion.sigmoid()) * (1 - self.expected_distance.sigmoid())

    @property
    def visible(self) -> Tensor:
        """[B, N, T] bool: `confidence >= 0.5`."""
        return self.confidence >= 0.5


# Without a name of its own, an exported program that returns it cannot be saved.
_register_namedtuple(TrackerOutput, serialized_type_name="tritonkern.TrackerOutput")


class CorrelationSoftArgmax(nn.Module):
    """Finds query points in every frame of a feature map, with logits of their visibility.

    The feature at the query is compared with every cell of every frame. The position is the mean of the cell centres
    strictly closer than `radius` cells to the best match, weighted by a softmax of the similarity; occlusion and
    expected distance are linear in the mean, maximum and minimum similarity of the frame, through which no gradient
    flows. The parameters are those of Chrono's head (`occ_linear`). No cost volume is stored
    (`tritonkern.correlation_soft_argmax`), so that any number of queries fits into one call.

    Args:
        resolution: (height, width) in pixels of the raster that queries and tracks are measured in.
        temperature: factor from similarity to softmax logit, positive.
        radius: of the soft-argmax in cells, positive; may exceed the grid.

    Paper: Kim et al., "Exploring Temporally-Aware Features for Point Tracking", CVPR 2025.
    """

    def __init__(self, resolution: tuple[int, int], temperature: float = 20.0, radius: float = 5.0) -> None:
        super().__init__()
        if not (isinstance(resolution, (tuple, list)) and len(resolution) == 2):
            raise TypeError(f"resolution must be a pair (height, width) in pixels, got {resolution!r}")
        if not (temperature > 0 and radius > 0):
            raise ValueError(f"temperature and radius must be positive, got {temperature} and {radius}")
        self.resolution = resolution
        self.temperature = temperature
        self.radius = radius
        self.occ_linear = nn.Linear(3, 2)

    def forward(self, queries: Tensor, features: Tensor) -> TrackerOutput:
        """Queries are independent of each other.

        Args:
            queries: `[B, N, 3]` floating-point rows (t, y, x): frame index, then raster pixels (pixel i has its centre
                at i + 0.5). A query outside the clip or the raster is matched with the nearest feature inside. In
                frame round(t), half to even, the position is the query itself.
            features: `[B, T, h, w, C]`, unit norm along C, any strides; float64, float32, bfloat16 or float16. They are
                never copied; the features at the queries are rounded to their dtype.

        Returns:
            `TrackerOutput` of float32 tensors (float64 for float64 features) for all T frames, before and after the
            query's own. Autocast does not apply: bfloat16 would round the logits of the softmax to steps of about 0.1.

        Raises:
            TypeError: `queries` is not floating point, or `features` of another dtype.
            ValueError: a shape is not the above.
        """
        if features.ndim != 5:
            raise ValueError(f"features must be [B, T, h, w, C], got {list(features.shape)}")
        if 0 in features.shape[1:]:
            raise ValueError(f"features must hold at least one frame, cell and channel, got {list(features.shape)}")
        check_queries(queries, len(features))
        with torch.autocast(features.device.type, enabled=False):
            query = self.query_features(features, queries)
        return find(query, features, queries, self.occ_linear, self.resolution, self.temperature, self.radius)

    def match(self, query: Tensor, features: Tensor) -> TrackerOutput:
        """Find query features `[B, N, C]` (`query_features`, perhaps of other frames) in `features` of T frames."""
        return find(query, features, None, self.occ_linear, self.resolution, self.temperature, self.radius)

    def query_features(self, features: Tensor, queries: Tensor) -> Tensor:
        """The features `[B, N, C]` of `[B, T, h, w, C]` at `queries` `[B, N, 3]` (t, y, x), trilinearly interpolated.

        In float32 (float64 for float64 features).
        """
        rows, columns = features.shape[2:4]
        t, y, x = queries.to(torch.promote_types(features.dtype, torch.float32)).unbind(-1)
        return sample_features(features, t, y * (rows / self.resolution[0]), x * (columns / self.resolution[1]))

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, temperature={self.temperature}, radius={self.radius}"


def check_queries(queries: Tensor, batch: int) -> None:
    """Raise TypeError or ValueError unless they are `[batch, N, 3]` and floating point."""
    if not queries.is_floating_point():
        raise TypeError(f"queries must be floating point, got {queries.dtype}; use queries.float()")
    if queries.ndim != 3 or queries.shape[2] != 3 or queries.shape[0] != batch:
        raise ValueError(f"queries must be [{batch}, N, 3] with rows (t, y, x), got {list(queries.shape)}")


def find(
    query: Tensor,
    features: Tensor,
    queries: Tensor | None,
    occ_linear: nn.Module,
    resolution: tuple[int, int],
    temperature: float = 20.0,
    radius: float = 5.0,
) -> TrackerOutput:
    """`CorrelationSoftArgmax` of query features `[B, N, C]`; without `queries` no position is overwritten."""
    (height, width), (rows, columns) = resolution, features.shape[2:4]
    with torch.autocast(features.device.type, enabled=False):
        match = correlation_soft_argmax(query.to(features.dtype), features, temperature=temperature, radius=radius)
        statistics = torch.stack([match.mean, match.max, match.min], dim=-1).detach()
        logits = occ_linear(statistics.to(input_dtype(occ_linear, torch.float32))).to(match.points.dtype)

        tracks = scaled(match.points, width / columns, height / rows)  # [B, N, T, 2]
        if queries is not None:
            tracks = put_queries(tracks, queries)
        return TrackerOutput(tracks, logits[..., 0], logits[..., 1])


def scaled(points: Tensor, x: float, y: float) -> Tensor:
    """`[..., 2]` (x, y), factor by factor: a tensor of them would have to be copied to the GPU at every call."""
    return torch.stack([points[..., 0] * x, points[..., 1] * y], -1)


def put_queries(tracks: Tensor, queries: Tensor) -> Tensor:
    """`tracks` `[B, N, T, 2]` (x, y) with `queries` `[B, N, 3]` (t, y, x) in frame round(t), half to even."""
    # Flipped, as an index made of numbers would be copied to a GPU
    place = queries[..., None, 1:].flip(-1).to(tracks.dtype)
    own_frame = queries[..., :1].detach().round() == torch.arange(tracks.shape[2], device=queries.device)
    return torch.where(own_frame[..., None], place, tracks)


class _Gather(torch.autograd.Function):
    """``features[b, t, y, x]`` of `[B, T, h, w, C]`. The gradient of PyTorch's own indexing is a sum in no fixed order
    on the CPU; this one has the same bits run after run, on a GPU under `torch.use_deterministic_algorithms`.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, *index: Tensor) -> Tensor:
        ctx.save_for_backward(*index)
        ctx.shape = features.shape
        return features[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        b, t, y, x = ctx.saved_tensors
        _, frames, rows, columns, channels = ctx.shape
        cell = ((b * frames + t) * rows + y) * columns + x
        grad_features = grad.new_zeros(ctx.shape)
        grad_features.view(-1, channels).index_add_(0, cell.flatten(), grad.flatten(0, -2))
        return grad_features, None, None, None, None


def sample_features(features: Tensor, t: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Trilinear samples `[B, n, C]` of `[B, T, h, w, C]` at positions `[B, n]`, clamped at the border.

    t is in frames (frame i is at i), y and x are in cells (cell i has its centre at i + 0.5). By indexing, because the
    backward pass of the 5-D `grid_sample` is not deterministic, and because it would copy the features.
    """
    index = [torch.arange(len(features), device=t.device).view(-1, 1, 1, 1, 1)]
    weight = torch.ones_like(t)[..., None, None, None]
    for pair, position, size in zip(
        ((2, 1, 1), (1, 2, 1), (1, 1, 2)), (t, y - 0.5, x - 0.5), features.shape[1:4], strict=True
    ):
        position = position.clamp(0, size - 1)
        # A NaN position must poison its own weights, not become an index out of bounds.
        low = position.detach().floor().nan_to_num(0).long()
        high = (low + 1).clamp(max=size - 1)
        fraction = position - low
        index.append(torch.stack([low, high], -1).view(*t.shape, *pair))
        weight = weight * torch.stack([1 - fraction, fraction], -1).view(*t.shape, *pair)
    # [B, n, 2, 2, 2, C]
    corners = _Gather.apply(features, *index)
    return (weight[..., None] * corners).sum((2, 3, 4))
