"""Contract, operators and gradient of attention between tracks and a grid.

The two directions share one operator: `splat=False` samples (queries are tracks `[B, T, M, H, D]`, keys and values a
grid `[B, T, h, w, H, D]`), `splat=True` splats (queries are the grid, keys and values the tracks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import accumulator, check_dense, check_saved

NAME = "track_attention"
MAX_HEAD_DIM = 256


def check_tensors(query: Tensor, key: Tensor, value: Tensor, tracks: Tensor, splat: bool) -> None:
    """Raise TypeError or ValueError unless the four tensors fit together."""
    of_tracks, of_grid = "[B, T, M, H, D]", "[B, T, h, w, H, D]"
    for name, x, shape in (
        ("query", query, of_grid if splat else of_tracks),
        ("key", key, of_tracks if splat else of_grid),
        ("value", value, of_tracks if splat else of_grid),
        ("tracks", tracks, "[B, T, M, 2]"),
    ):
        check_dense(name, x)
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {x.device}; move one of them")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}; convert one of them")
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


def _check(query, key, value, tracks, visible, precision, splat) -> None:
    check_tensors(query, key, value, tracks, splat)
    dtype = accumulator(query.dtype)
    for name, x, shape, kind in (
        ("tracks", tracks, tracks.shape, dtype),
        ("visible", visible, tracks.shape[:-1], torch.bool),
        ("precision", precision, (), dtype),
    ):
        if x.dtype != kind or tuple(x.shape) != tuple(shape) or x.device != query.device:
            raise ValueError(
                f"{name} must be {kind} of shape {tuple(shape)} on {query.device}, "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )


def _check_saved(grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor) -> None:
    rows = query.shape[2:-2].numel()
    of_lse = ((*query.shape[:2], rows, query.shape[-2]), accumulator(query.dtype))
    of_query = (query.shape, query.dtype)
    check_saved({"grad_out": (grad_out, *of_query), "out": (out, *of_query), "lse": (lse, *of_lse)}, query.device)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, tracks, visible, precision, splat)
    kernels = _backends.load(NAME, query.device, backend)
    return kernels.forward(query, key, value, tracks, visible, precision, scale, splat, culling)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, tracks, visible, precision, splat)
    rows = query.shape[2] * query.shape[3] if splat else query.shape[2]
    lse = query.new_empty((*query.shape[:2], rows, query.shape[-2]), dtype=accumulator(query.dtype))
    return query.new_empty(query.shape), lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
    positions: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(query, key, value, tracks, visible, precision, splat)
    _check_saved(grad_out, query, out, lse)
    kernels = _backends.load(NAME, query.device, backend)
    saved = (query, key, value, tracks, visible, precision, out, lse)
    return kernels.backward(grad_out, *saved, scale, splat, culling, positions)


def _backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
    positions: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(query, key, value, tracks, visible, precision, splat)
    _check_saved(grad_out, query, out, lse)
    grad_tracks, grad_precision = tracks.new_empty(tracks.shape), precision.new_empty(())
    if not positions:
        grad_tracks, grad_precision = tracks.new_empty(0), precision.new_empty(0)
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        grad_tracks,
        grad_precision,
    )


track_attention_fwd = _registry.define(
    "track_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor tracks, Tensor visible, Tensor precision,"
    " float scale, bool splat, bool culling, str? backend=None) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
"""Output like query, contiguous, and lse `[B, T, rows, H]`: the log-sum-exp of a row's scores, in which the nearest
column's distance counts as zero; -inf (and an output of 0) for a row that meets no column: an invisible track when
sampling, every cell of a frame without a visible track when splatting. `precision` is 1 / (2 sigma^2)."""

track_attention_bwd = _registry.define(
    "track_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor tracks, Tensor visible,"
    " Tensor precision, Tensor out, Tensor lse, float scale, bool splat, bool culling, bool positions,"
    " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
"""Gradients of query, key, value, tracks, precision, contiguous; the last two have shape [0] unless `positions`."""


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.splat, ctx.culling, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _gradient(ctx, grad_out, _):
    needed = ctx.needs_input_grad
    positions = needed[3] or needed[5]
    options = (ctx.scale, ctx.splat, ctx.culling, positions, ctx.backend)
    *grads, grad_tracks, grad_precision = track_attention_bwd(grad_out, *ctx.saved_tensors, *options)
    results = (*grads, grad_tracks, None, grad_precision)
    return (*(grad if need else None for grad, need in zip(results, needed, strict=False)), None, None, None, None)


_registry.attach_gradient(track_attention_fwd, _setup_context, _gradient)
_registry.forbid_gradient(track_attention_bwd, NAME)
