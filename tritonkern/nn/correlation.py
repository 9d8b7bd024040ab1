"""The matching head of refiner-free point trackers: correlation, soft-argmax, visibility from the statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import _register_namedtuple

from tritonkern.functional import correlation_soft_argmax
from tritonkern.nn._inputs import check_inputs
from tritonkern.nn._plain import input_dtype
from tritonkern.ops._dtypes import accumulator


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
        check_inputs(self, features=features, queries=queries)
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


_SAMPLED_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Maximum bytes of the corners that are gathered together, eight times as many as of their samples."""


class _Sample(torch.autograd.Function):
    """Sums over eight corners, ``(weight * features[b, t, y, x]).sum((2, 3, 4))``, some positions at a time.

    Neither the corners nor their products are stored, and in the backward pass they are gathered again. The gradient of
    PyTorch's own indexing is a sum in no fixed order on the CPU; this one has the same bits run after run, on a GPU
    under `torch.use_deterministic_algorithms`.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, dtype: torch.dtype, *index: Tensor) -> Tensor:
        ctx.save_for_backward(features, weight, *index)

        def sums(rows: slice) -> Tensor:
            return (weight[:, rows, ..., None] * features[_rows(index, rows)]).sum((2, 3, 4))

        return _in_blocks(sums, features, weight.shape[1], dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, *index = ctx.saved_tensors
        of_features, of_weight, *_ = ctx.needs_input_grad
        sums = accumulator(features.dtype)
        grad_features = features.new_zeros(features.shape, dtype=sums) if of_features else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        _, frames, height, width, channels = features.shape
        for rows in _blocks(features, weight.shape[1]):
            b, t, y, x = part = _rows(index, rows)
            # [B, n, 1, 1, 1, C]
            of_sum = grad[:, rows, None, None, None].to(weight.dtype)
            if grad_features is not None:
                cell = ((b * frames + t) * height + y) * width + x
                of_corners = (weight[:, rows, ..., None] * of_sum).to(sums).flatten(0, -2)
                grad_features.view(-1, channels).index_add_(0, cell.flatten(), of_corners)
            if grad_weight is not None:
                grad_weight[:, rows] = (of_sum * features[part]).sum(-1)
        if grad_features is not None:
            grad_features = grad_features.to(features.dtype)
        return grad_features, grad_weight, None, None, None, None, None


def _blocks(features: Tensor, count: int) -> list[slice]:
    """Which of `count` positions are sampled together: all in a graph, where the count may be a symbol."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    bound = _SAMPLED_BYTES.get(features.device.type, _SAMPLED_BYTES["cuda"])
    few = max(1, bound // (8 * 4 * features.shape[-1] * max(1, len(features))))
    return [slice(start, start + few) for start in range(0, count, few)] or [slice(None)]


def _in_blocks(function: Callable[[slice], Tensor], features: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`function(rows)` `[B, rows, C]` for all positions, in `dtype`."""
    parts = _blocks(features, count)
    if len(parts) == 1:
        return function(parts[0]).to(dtype)
    out = features.new_empty((len(features), count, features.shape[-1]), dtype=dtype)
    for rows in parts:
        out[:, rows] = function(rows)
    return out


def _rows(index: Sequence[Tensor], rows: slice) -> tuple[Tensor, ...]:
    """The part of each index `[B or 1, n or 1, ...]` that belongs to positions `rows`."""
    return tuple(x if x.shape[1] == 1 else x[:, rows] for x in index)


def sample_features(features: Tensor, t: Tensor, y: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Trilinear samples `[B, n, C]` of `[B, T, h, w, C]` at positions `[B, n]`, clamped at the border.

    t is in frames (frame i is at i), y and x are in cells (cell i has its centre at i + 0.5). Beside the result, which
    is of `dtype` (None: that of features and positions, promoted), memory does not grow with n, but for indices and
    weights where gradients are recorded. Gathered by hand, because the backward pass of the 5-D `grid_sample` is not
    deterministic, and because it would copy the features.
    """
    dtype = dtype or torch.promote_types(features.dtype, t.dtype)
    places = (t, y, x)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, *places)):
        return _interpolated(features, places, dtype)
    return _in_blocks(
        lambda rows: _interpolated(features, [place[:, rows] for place in places], dtype), features, t.shape[1], dtype
    )


def _interpolated(features: Tensor, places: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`sample_features` of t, y and x."""
    t, y, x = places
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
    # weight is [B, n, 2, 2, 2]
    if torch._C._are_functorch_transforms_active():  # they take no function with a backward pass of its own
        return (weight[..., None] * features[tuple(index)]).sum((2, 3, 4)).to(dtype)
    return _Sample.apply(features, weight, dtype, *index)
