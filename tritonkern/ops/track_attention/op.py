"""Checks, operators and gradient of attention between tracks and a grid.

The two directions share one operator: `splat=False` samples (queries are tracks `[B, T, M, H, D]`, keys and values a
grid `[B, T, h, w, H, D]`), `splat=True` splats (queries are the grid, keys and values the tracks).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonkern.ops._checks import (
    check_flags,
    check_mask,
    check_same_dtype,
    check_saved,
    check_scale,
    check_tensors,
)
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "track_attention"
MAX_HEAD_DIM = 256
# Coordinates beyond it count as this many cells, so that no squared distance overflows in any dtype (csrc: kFarthest).
FARTHEST = 2.0**60


class Points(NamedTuple):
    """The tracks' positions and what depends on them."""

    tracks: Tensor
    """`[B, T, M, 2]` (x, y) in cells, in the type of the accumulator."""
    visible: Tensor | None
    """`[B, T, M]` bool; None: all of them. A track with a NaN or infinite coordinate is never visible."""
    inverse_variance: Tensor
    """0-d, 1 / (2 sigma^2), in the type of the accumulator."""

    def placed(self) -> tuple[Tensor, Tensor]:
        """Positions whose squares do not overflow, and the mask of the tracks that take part; both contiguous."""
        visible = visible_tracks(self.tracks, self.visible)
        return self.tracks.clamp(-FARTHEST, FARTHEST).contiguous(), visible.contiguous()


def visible_tracks(tracks: Tensor, visibility: Tensor | None) -> Tensor:
    """`[B, T, M]` bool: which tracks take part in a frame, those that are visible (None: all) at a finite position."""
    finite = tracks.isfinite().all(-1)
    return finite if visibility is None else finite & visibility


def check_inputs(query: Tensor, key: Tensor, value: Tensor, points: Points, scale: float, splat: bool) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    tracks = points.tracks
    check_tensors(query=query, key=key, value=value, tracks=tracks)
    check_same_dtype(query=query, key=key, value=value)
    of_tracks, of_grid = "[B, T, M, H, D]", "[B, T, h, w, H, D]"
    for name, x, shape in (
        ("query", query, of_grid if splat else of_tracks),
        ("key", key, of_tracks if splat else of_grid),
        ("value", value, of_tracks if splat else of_grid),
        ("tracks", tracks, "[B, T, M, 2]"),
    ):
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.shape[:2] != query.shape[:2] or x.shape[-2:] != query.shape[-2:]:
            raise ValueError(f"{name} must have the B, T, H and D of query, {tuple(query.shape)}, got {tuple(x.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    expected = (*query.shape[:2], (key if splat else query).shape[2], 2)
    if tuple(tracks.shape) != expected:
        raise ValueError(f"tracks must have shape {expected}, a position for each track, got {tuple(tracks.shape)}")
    if 0 in (query if splat else key).shape[2:4]:
        raise ValueError(f"{'query' if splat else 'key'} must have at least one cell, got h or w of 0")
    head_dim = query.shape[-1]
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"query must have a head dimension (last axis) that is a multiple of 8 from 8 to {MAX_HEAD_DIM}, "
            f"got {head_dim}; pad query, key and value with zeros to the next multiple and pass scale explicitly"
        )
    check_scale(scale)
    _check_points(points, query)


def _check_points(points: Points, query: Tensor) -> None:
    """What `functional` converts, and visibility."""
    tracks, visible, inverse_variance = points
    dtype = accumulator(query.dtype)
    if tracks.dtype != dtype:
        raise TypeError(f"tracks must be {dtype} here, got {tracks.dtype}; convert them")
    if inverse_variance.dtype != dtype or inverse_variance.dim() != 0 or inverse_variance.device != query.device:
        raise ValueError(
            f"inverse_variance must be a 0-d {dtype} tensor on {query.device}, got {inverse_variance.dtype} of shape "
            f"{tuple(inverse_variance.shape)} on {inverse_variance.device}"
        )
    if visible is not None:
        check_mask("visibility", visible, tracks.shape[:-1], tracks.device)


@operator(NAME, "forward")
def track_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, points: Points, scale: float, splat: bool, culling: bool
) -> Results[Tensor]:
    """Output of query's shape and dtype, contiguous. Rows without any column (an invisible track when sampling, every
    cell of a frame without a visible track when splatting) are 0."""
    check_inputs(query, key, value, points, scale, splat)
    return lambda: query.new_empty(query.shape)


@operator(NAME, "backward")
def track_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    points: Points,
    scale: float,
    splat: bool,
    culling: bool,
    needs_grad: list[bool],
) -> Results[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of query, key, value, tracks and inverse_variance, contiguous. `needs_grad`: whether those of the last
    two are wanted; the others have shape `[0]`."""
    check_inputs(query, key, value, points, scale, splat)
    check_saved({"grad_out": (grad_out, query.shape, query.dtype)}, query.device)
    check_flags(needs_grad, 2)
    return lambda: empty_gradients(query, key, value, points, needs_grad)


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, points: Points, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of the backward operator, uninitialised."""
    tracks, _, inverse_variance = points
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        tracks.new_empty(tracks.shape if needs_grad[0] else 0),
        inverse_variance.new_empty(() if needs_grad[1] else 0),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, scale, splat, culling, ctx.backend = inputs
    ctx.options = scale, splat, culling
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_out: Tensor) -> Any:
    needs_grad = ctx.needs_input_grad
    grads = track_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.options, [needs_grad[3], needs_grad[5]], ctx.backend)
    *grads, grad_inverse_variance = grads
    return *grads, None, grad_inverse_variance


differentiable(track_attention_fwd, _save, _gradient)
