"""Matching: where features of queries are found in feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.functional._arguments import autocast, check_types, integer, real, softmax_scale
from tritonkern.ops._checks import check_dense, check_same_dtype, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops.correlation_soft_argmax import op as _match_op
from tritonkern.ops.local_correlation import op as _local_op


class Match(NamedTuple):
    """Where each of N queries is found in each of T frames, and statistics of its correlation with the whole frame."""

    points: Tensor
    """[B, N, T, 2] (x, y) in cells of the feature map; cell i has its centre at i + 0.5."""
    mean: Tensor
    """[B, N, T], as max and min: over all cells of the frame, of the correlation without the temperature."""
    max: Tensor
    min: Tensor


def correlation_soft_argmax(
    query: Tensor,
    features: Tensor,
    *,
    temperature: float = 20.0,
    radius: float = 5.0,
    cosine: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Match:
    """Find every query in every frame of a feature map, without storing the cost volume.

    ``cost[n, t, y, x] = query[n] . features[t, y, x]``; the softmax of ``temperature * cost`` over a frame has its
    largest value at some cell (the first one, where several are equal), and the point is the mean of the centres of the
    cells strictly closer than `radius` to that cell, weighted by the softmax::

        radius=2         . . . . .
                         . x x x .       x: cells that take part, # the best one; those beyond the grid do not exist
                         . x # x .
                         . x x x .
                         . . . . .

    Memory grows with N times T, never with N times the number of cells. The first derivative is supported; a second
    one raises RuntimeError. As the best cell moves in steps, the gradient is that of a fixed set of cells. The
    gradients of `max` and `min` go to the first extremal cell (`torch.amax` shares them out among equal cells).

    Args:
        query: ``[B, N, C]``.
        features: ``[B, T, h, w, C]`` of query's dtype and device, any strides: the patch tokens of a vision transformer
            are read in place. float64, float32, bfloat16 or float16; B, N and T may be 0. Sums are kept in
            float32 (float64 for float64). Autocast does not apply: matching in bfloat16 would round the softmax's
            logits to steps of a tenth.
        temperature: factor from correlation to softmax logit, from 1.2e-38 to 1e30.
        radius: in cells, positive; may be infinite. Above 46340 it must cover the grid.
        cosine: whether query and features are divided by ``sqrt(max(sum of squares, eps))`` along C first.
        eps: see `cosine`; without it, unused. From 1.2e-38 to 1e30.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        `Match` of float32 tensors (float64 for float64). A NaN or infinity in a frame's features reaches that frame's
        results alone; one in a query that query's alone.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, an option out of its range, or a backend that cannot
            run this call (the message lists every backend with its reason and the way out).

    It is the matching head of Chrono (Kim et al., CVPR 2025), LocoTrack (Cho et al., ECCV 2024) and TAPIR (Doersch et
    al., ICCV 2023); the disc around the arg max comes from TAPIR.
    """
    check_types(backend, query=query, features=features)
    temperature, radius, eps = real("temperature", temperature), real("radius", radius), real("eps", eps)
    if not isinstance(cosine, bool):
        raise TypeError(f"cosine must be a bool, got {type(cosine).__name__}")
    return Match(*_match_op.correlation_soft_argmax_fwd(query, features, temperature, radius, cosine, eps, backend)[:4])


def soft_argmax_2d(
    cost_volume: Tensor, *, temperature: float = 20.0, radius: float = 5.0, backend: str | None = None
) -> Tensor:
    """The softmax-weighted mean position around the maximum of every frame of a given cost volume.

    The second half of `correlation_soft_argmax`, for trackers that filter their cost volume in between (LocoTrack,
    TAPIR). One pass over the cost volume, in place of a softmax, masks and products of its size.

    Args:
        cost_volume: ``[..., h, w]``, any strides; float64, float32, bfloat16 or float16.
        temperature, radius, backend: as in `correlation_soft_argmax`.

    Returns:
        ``[..., 2]`` (x, y) in cells, centres at + 0.5, float32 (float64 for float64). A frame with a NaN, +infinity or
        nothing but -infinity gives NaN.

    Raises:
        TypeError, ValueError, NotImplementedError: as `correlation_soft_argmax`.
    """
    check_types(backend, cost_volume=cost_volume)
    temperature, radius = real("temperature", temperature), real("radius", radius)
    return _match_op.soft_argmax_2d_fwd(cost_volume, temperature, radius, backend)[0]


def local_correlation(
    features: Tensor,
    support: Tensor,
    coords: Tensor,
    *,
    radius: int = 3,
    padding: str = "border",
    align_corners: bool,
    axis_order: str = "xy",
    softmax: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dot products of each point's supports with the features on a square of samples around it, frame by frame.

    ``out[b, t, n, p, s] = support[b, n, s] . f(coords[b, t, n] + offset[p])``, where f is the feature map of frame t,
    bilinearly interpolated, and the offsets are the ``(2 radius + 1)^2`` whole steps from -radius to radius in x and y.
    The sampled patches never exist: all samples of a point share one lattice of cells, which is correlated once, and
    the correlations are interpolated. The first derivative is supported; a second one raises RuntimeError.

    Args:
        features: ``[B, T, h, w, C]``, any strides; channels that are adjacent in memory are read in place. float64,
            float32, bfloat16 or float16. Sums are kept in float32 (float64 for float64). Under autocast features and
            support are cast to the autocast dtype.
        support: ``[B, N, S, C]``, S vectors a point (49 in CoTracker3 and LocoTrack, 1 in TAPIR), or
            ``[B, N, T, S, C]`` where each frame has its own; of features' dtype and device.
        coords: ``[B, T, N, 2]`` (x, y) in cells of the map, anywhere, also outside of it. Taken in float32 (float64 for
            float64). Gradients reach them if they require grad.
        radius: from 0 to 15.
        padding: what is outside of the map: ``"border"`` repeats its edge, ``"zeros"`` are zeros.
        align_corners: where the centre of cell i is: at i if True, at i + 0.5 (as everywhere else here) if False. It
            is what the argument of this name does in `torch.nn.functional.grid_sample` when coordinates are divided by
            the size less one (True) or by the size (False).
        axis_order: which of the two axes of offsets comes first in p: ``"xy"`` has
            ``p = (dx + radius) * (2 radius + 1) + dy + radius``, ``"yx"`` has dx and dy exchanged.
        softmax: whether the result is the softmax over the samples p of ``scale`` times the products: for every support
            a distribution over the places.
        scale: of the softmax, a positive number; None is ``C ** -0.5``. Without softmax it is refused.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous ``[B, T, N, (2 radius + 1)^2, S]`` in the inputs' dtype. A NaN coordinate gives NaN at its own
        outputs and in the gradients of its own support and coordinates, and none to the features; an infinite one is
        far outside. A NaN feature reaches the samples that interpolate between its cell and others, and with softmax
        all samples of the same point and frame.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes, devices or options that do not fit, or a backend that cannot run this call (the message
            lists every backend with its reason and the way out).

    With ``padding="border", align_corners=True, axis_order="xy"`` it is the 4-D correlation of CoTracker3 (Karaev et
    al., 2024), with ``padding="zeros", align_corners=False, axis_order="yx"`` that of LocoTrack (Cho et al., "Local
    All-Pair Correspondence for Point Tracking", ECCV 2024) and, on square maps, the local correlation of TAPIR (Doersch
    et al., ICCV 2023). With a softmax it is the matching cost of DiTracker, "Repurposing Video Diffusion Transformers
    for Robust Point Tracking" (cvlab-kaist/DiTracker), whose features and supports are keys and queries.
    """
    check_types(backend, features=features, support=support, coords=coords)
    features, support = autocast(features, support)
    position = _position(features, coords, align_corners)
    samples, scales = _samples(radius, padding, axis_order), _scales([support], softmax, scale)
    of_softmax = scales[0] if scales else None
    return _local_op.local_correlation_fwd(features, support, position, *samples, of_softmax, backend)


def local_correlation_linear(
    features: Tensor | Sequence[Tensor],
    support: Tensor | Sequence[Tensor],
    coords: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    radius: int = 3,
    padding: str = "border",
    align_corners: bool,
    axis_order: str = "xy",
    softmax: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`local_correlation` followed by a linear layer, of which only a block of points is stored at a time.

    ``F.linear(local_correlation(...).flatten(-2), weight, bias)``; the backward pass computes the correlations again.
    Of several pairs of features and support, the flattened correlations are concatenated::

        flat = [local_correlation(x, y, coords, ...).flatten(-2) for x, y in zip(features, support)]
        F.linear(torch.cat(flat, -1), weight, bias)

    Args:
        features, support: as in `local_correlation`; or two sequences of as many tensors, the pairs, of one dtype and
            device. Their maps may differ in size, in C and in S; all pairs share the coords, in cells of each map.
        coords, radius, padding, align_corners, axis_order, backend: as in `local_correlation`.
        softmax, scale: as in `local_correlation`, of each pair; None is ``C ** -0.5`` with the C of the pair.
        weight: ``[O, (2 radius + 1)^2 S]``, as of `torch.nn.Linear`, of features' dtype and device. Of several pairs S
            is the sum of theirs.
        bias: ``[O]`` or None.

    Returns:
        Contiguous ``[B, T, N, O]`` in the inputs' dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as `local_correlation`.
    """
    maps, supports = _tensors("features", features), _tensors("support", support)
    check_types(backend, coords=coords, weight=weight)
    if bias is not None:
        check_types(None, bias=bias)
    *both, weight, bias = autocast(*maps, *supports, weight, bias)
    maps, supports = both[: len(maps)], both[len(maps) :]
    position = _position([*maps, weight][0], coords, align_corners)
    samples, scales = _samples(radius, padding, axis_order), _scales(supports, softmax, scale)
    return _local_op.local_correlation_linear_fwd(maps, supports, position, weight, bias, *samples, scales, backend)


def correlation_pyramid(
    features: Tensor,
    targets: Tensor,
    flow: Tensor,
    levels: int = 4,
    radius: int = 4,
    *,
    padding: str = "zeros",
    backend: str | None = None,
) -> Tensor:
    """Correlations of every cell of a map with the cells around its flow, on several resolutions of each target frame.

    On level l, target frames are averaged over 2 x 2 cells l times (an odd last row or column is dropped), and cell i
    of the source is compared with the ``(2 radius + 1)^2`` samples around ``(i + flow[i]) / 2^l``::

        out[b, t, i, l, p] = features[b, i] . targets_l[b, t]((i + flow[b, t, i]) / 2^l + offset[p]) / sqrt(C)

    The correlations of all pairs of cells are never stored; apart from the result, memory grows with the maps alone.
    The first derivative is supported; a second one raises RuntimeError.

    Args:
        features: ``[B, h, w, C]``, the source frame of each clip. float64, float32, bfloat16 or float16.
        targets: ``[B, T, H, W, C]``, of features' dtype and device; H and W at least ``2^(levels - 1)``.
        flow: ``[B, T, h, w, 2]`` (x, y), the displacement of each cell in cells of the finest level, floating point.
            Gradients reach it if it requires grad; RAFT and AllTracker pass it detached.
        levels: number of resolutions, positive.
        radius: from 0 to 15.
        padding: what is outside of a map: ``"zeros"`` as in RAFT, or ``"border"``, which repeats its edge, as in
            AllTracker.
        backend: as in `local_correlation`.

    Returns:
        ``[B, T, h, w, levels * (2 radius + 1)^2]`` in the inputs' dtype, level after level; within a level
        ``p = (dx + radius) * (2 radius + 1) + dy + radius``.

    Raises:
        TypeError, ValueError, NotImplementedError: as `local_correlation`; `levels` does not fit the maps.

    It is the correlation block of RAFT (Teed and Deng, ECCV 2020) and its successors, and of AllTracker (Harley et al.,
    ICCV 2025) on maps whose levels have even sizes: of odd ones AllTracker averages all rows and columns.
    """
    levels = integer("levels", levels)
    check_types(backend, features=features, targets=targets, flow=flow)
    check_tensors(features=features, targets=targets, flow=flow)
    for name, tensor, dims in (("features", features, 4), ("targets", targets, 5), ("flow", flow, 5)):
        if tensor.ndim != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {list(tensor.shape)}")
    batch, rows, columns, channels = features.shape
    frames = targets.shape[1]
    if targets.shape[0] != batch or targets.shape[4] != channels:
        raise ValueError(f"targets must be [{batch}, T, H, W, {channels}], got {list(targets.shape)}")
    if flow.shape != (batch, frames, rows, columns, 2):
        raise ValueError(f"flow must be {[batch, frames, rows, columns, 2]}, got {list(flow.shape)}")
    if levels < 1 or min(targets.shape[2:4]) < 2 ** (levels - 1):
        raise ValueError(
            f"levels must be positive, and H and W at least 2^(levels - 1), got levels={levels} and targets of shape "
            f"{list(targets.shape)}"
        )
    features, targets = autocast(features, targets)
    check_same_dtype(features=features, targets=targets)
    y, x = torch.meshgrid(
        *(torch.arange(n, device=flow.device, dtype=accumulator(features.dtype)) for n in (rows, columns)),
        indexing="ij",
    )
    coords = (flow + torch.stack([x, y], -1)).flatten(2, 3)  # [B, T, h * w, 2]
    support = (features * channels**-0.5).flatten(1, 2).unsqueeze(2)  # [B, h * w, 1, C]
    found = []
    for level in range(levels):
        if level:
            # [B * T, C, H, W] with adjacent channels, as the maps are
            pooled = F.avg_pool2d(targets.flatten(0, 1).movedim(-1, 1), 2).movedim(1, -1)
            targets = pooled.unflatten(0, (batch, frames))
        correlation = local_correlation(
            targets, support, coords / 2**level, radius=radius, padding=padding, align_corners=True, backend=backend
        )
        found.append(correlation.squeeze(-1).unflatten(2, (rows, columns)))
    return torch.cat(found, -1)


def _position(features: Tensor, coords: Tensor, align_corners: bool) -> Tensor:
    """Coordinates as the operators take them: in the type of sums, cell centres at whole numbers."""
    check_dense("coords", coords)  # before they are converted
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be a bool, got {type(align_corners).__name__}")
    position = coords.to(accumulator(features.dtype))
    return position if align_corners else position - 0.5


def _tensors(name: str, given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A tensor, or those of a sequence."""
    named: dict[str, Any] = {name: given}
    if isinstance(given, list | tuple):
        named = {f"{name}[{i}]": x for i, x in enumerate(given)}
    check_types(None, **named)
    return list(named.values())


def _scales(supports: list[Tensor], softmax: bool, scale: float | None) -> list[float]:
    """Of the softmax of each pair of features and support; none without one."""
    if not isinstance(softmax, bool):
        raise TypeError(f"softmax must be a bool, got {type(softmax).__name__}")
    if softmax:
        return [softmax_scale(scale, x) for x in supports]
    if scale is not None:
        raise ValueError(f"scale is that of the softmax, got {scale!r} without softmax=True; multiply support by it")
    return []


def _samples(radius: int, padding: str, axis_order: str) -> _local_op.Samples:
    radius = integer("radius", radius)
    if padding not in ("border", "zeros"):
        raise ValueError(f"padding must be 'border' or 'zeros', got {padding!r}")
    if axis_order not in ("xy", "yx"):
        raise ValueError(f"axis_order must be 'xy' or 'yx', got {axis_order!r}")
    return _local_op.Samples(radius, padding == "zeros", axis_order == "yx")
