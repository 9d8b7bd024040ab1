"""Checks, operators and gradients of query-key matching, attention row statistics and frame-local attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tritonkern.ops._checks import (
    check_mask,
    check_same_dtype,
    check_saved,
    check_scale,
    check_strided,
    check_tensors,
)
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "query_key_matching"
# Cell numbers are int32 in the kernels, and coordinates are exact in float32.
MAX_CELLS = 2**24


class Outputs(NamedTuple):
    """Results of the forward operator, contiguous, in float32 (float64 for float64) where nothing else is said."""

    peak: Tensor
    """[B, T, M]: the maximum of C."""
    points: Tensor
    """[B, T, M, 2] (x, y) in cells, centres at + 0.5."""
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    """[B, T, M] int64: the first cell that has the maximum; -1 where a C is NaN."""
    weight: Tensor
    """[B, T, M]: sum of C over the disc around the best cell; without a disc, as peak."""


def allocate(query: Tensor, cells: Tensor | None) -> Outputs:
    """Uninitialised outputs."""
    shape, dtype = _matches(query, cells), accumulator(query.dtype)
    return Outputs(
        peak=query.new_empty(shape, dtype=dtype),
        points=query.new_empty((*shape, 2), dtype=dtype),
        index=query.new_empty(shape, dtype=torch.int64),
        weight=query.new_empty(shape, dtype=dtype),
    )


def allocate_cost(query: Tensor, cells: Tensor | None) -> Tensor:
    """The uninitialised cost `[B, T, M, S]`."""
    return query.new_empty((*_matches(query, cells), query.shape[2]), dtype=accumulator(query.dtype))


def _matches(query: Tensor, cells: Tensor | None) -> tuple[int, ...]:
    return (*query.shape[:2], query.shape[2] if cells is None else cells.shape[1])


def disc_limit(radius: float) -> float:
    """A squared distance of two cells, a whole number, is below radius**2 exactly if it is below this.

    0 for a radius of 0, which stands for none; a tiny one, whose square is rounded to 0, still holds the best cell.
    """
    return float(max(1, math.ceil(min(radius * radius, 2.0**62)))) if radius else 0.0


def check_inputs(query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float) -> None:
    """Raise TypeError or ValueError unless queries, keys, cells and source frame fit together."""
    check_tensors(query=query, key=key)
    check_same_dtype(query=query, key=key)
    check_scale(scale)
    if query.dim() != 5 or 0 in query.shape[3:]:
        raise ValueError(f"query must be [B, T, S, H, D] with H and D from 1 up, got {tuple(query.shape)}")
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}")
    frames, count = query.shape[1:3]
    if count > MAX_CELLS:
        raise ValueError(f"query must have at most 2**24 cells per frame, got {count}")
    if frames and not 0 <= source < frames:
        raise ValueError(f"source must be a frame from 0 to {frames - 1}, got {source}")
    if cells is None:
        return
    check_strided("cells", cells)
    if cells.dtype != torch.int64:
        raise TypeError(f"cells must be int64, got {cells.dtype}; convert it")
    if cells.device != query.device:
        raise ValueError(f"cells must be on the device of query, {query.device}, got {cells.device}; move one")
    if cells.dim() != 2 or cells.shape[0] != query.shape[0]:
        raise ValueError(f"cells must be [B, M] with B = {query.shape[0]}, got {tuple(cells.shape)}")


def check_range(cells: Tensor | None, count: int) -> None:
    """Raise ValueError unless all cells exist. On a GPU it is an assertion on the device, which waits for nothing."""
    if cells is None or cells.is_meta:
        return
    if cells.device.type != "cpu":
        torch._assert_async(((cells >= 0) & (cells < count)).all(), "cells must be numbers of cells of a frame")
        return
    if cells.numel() == 0:
        return
    lowest, highest = (int(x) for x in torch.aminmax(cells))
    if lowest < 0 or highest >= count:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"cells must be from 0 to {count - 1} in frames of {count} cells, got {wrong}")


def check_grid(query: Tensor, height: int, width: int, radius: float) -> None:
    """Raise ValueError unless the grid has as many cells as a frame, and the radius is 0 (none) or positive."""
    if height < 1 or width < 1 or height * width != query.shape[2]:
        raise ValueError(f"grid must be (h, w) with h * w = S = {query.shape[2]} cells of query, got {(height, width)}")
    if not radius >= 0:
        raise ValueError(f"radius must be positive, got {radius}")


@operator(NAME, "forward")
def query_key_matching_fwd(
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
    source: int,
    height: int,
    width: int,
    scale: float,
    symmetric: bool,
    radius: float,
) -> Results[Outputs]:
    """query and key `[B, T, S, H, D]`, cells `[B, M]` int64 or None for all; see `Outputs`. radius 0: the best cell."""
    check_inputs(query, key, cells, source, scale)
    check_grid(query, height, width, radius)
    return lambda: allocate(query, cells)


@operator(NAME, "backward")
def query_key_matching_bwd(
    grad_peak: Tensor | None,
    grad_points: Tensor | None,
    query: Tensor,
    key: Tensor,
    cells: Tensor | None,
    index: Tensor,
    points: Tensor,
    weight: Tensor,
    source: int,
    height: int,
    width: int,
    scale: float,
    symmetric: bool,
    radius: float,
) -> Results[tuple[Tensor, Tensor]]:
    """Gradients of query and key, contiguous, for fixed best cells."""
    check_inputs(query, key, cells, source, scale)
    check_grid(query, height, width, radius)
    shape, dtype = _matches(query, cells), accumulator(query.dtype)
    check_saved(
        {
            "grad_peak": (grad_peak, shape, dtype),
            "grad_points": (grad_points, (*shape, 2), dtype),
            "index": (index, shape, torch.int64),
            "points": (points, (*shape, 2), dtype),
            "weight": (weight, shape, dtype),
        },
        query.device,
    )
    return lambda: (query.new_empty(query.shape), key.new_empty(key.shape))


def _save(ctx, inputs, output):
    query, key, cells, *ctx.options = inputs
    _, points, index, weight = output
    ctx.mark_non_differentiable(index, weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, cells, index, points, weight)


def _gradient(ctx, grad_peak, grad_points, *_):
    if grad_peak is None and grad_points is None:
        return ()
    return query_key_matching_bwd(grad_peak, grad_points, *ctx.saved_tensors, *ctx.options)


differentiable(query_key_matching_fwd, _save, _gradient)


@operator(NAME, "cost_forward")
def query_key_cost_fwd(
    query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> Results[Tensor]:
    """C of all pairs of frames, `[B, T, M, S]`, contiguous."""
    check_inputs(query, key, cells, source, scale)
    return lambda: allocate_cost(query, cells)


@operator(NAME, "cost_backward")
def query_key_cost_bwd(
    grad_cost: Tensor, query: Tensor, key: Tensor, cells: Tensor | None, source: int, scale: float, symmetric: bool
) -> Results[tuple[Tensor, Tensor]]:
    """Gradients of query and key, contiguous."""
    check_inputs(query, key, cells, source, scale)
    shape = (*_matches(query, cells), query.shape[2])
    check_saved({"grad_cost": (grad_cost, shape, accumulator(query.dtype))}, query.device)
    return lambda: (query.new_empty(query.shape), key.new_empty(key.shape))


def _save_cost(ctx, inputs, output):
    *tensors, ctx.source, ctx.scale, ctx.symmetric, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient_cost(ctx, grad_cost):
    return query_key_cost_bwd(grad_cost, *ctx.saved_tensors, ctx.source, ctx.scale, ctx.symmetric, ctx.backend)


differentiable(query_key_cost_fwd, _save_cost, _gradient_cost)


def check_rows(rows: Tensor, key: Tensor, mask: Tensor | None, segments: list[int], scale: float) -> None:
    """Raise TypeError or ValueError unless the arguments of the row statistics fit together."""
    check_tensors(rows=rows, key=key)
    check_same_dtype(rows=rows, key=key)
    check_scale(scale)
    if rows.dim() != 4 or 0 in rows.shape[2:]:
        raise ValueError(f"rows must be [B, N, H, D] with H and D from 1 up, got {tuple(rows.shape)}")
    if key.dim() != 4 or (key.shape[0], *key.shape[2:]) != (rows.shape[0], *rows.shape[2:]):
        expected = f"[{rows.shape[0]}, J, {rows.shape[2]}, {rows.shape[3]}]"
        raise ValueError(f"key must be {expected} for these rows, got {tuple(key.shape)}")
    if len(segments) % 2:
        raise ValueError(f"segments must be start, stop, start, stop, ..., got {len(segments)} numbers")
    for start, stop in zip(segments[::2], segments[1::2], strict=True):
        if not 0 <= start < stop <= key.shape[1]:
            raise ValueError(
                f"segments must be (start, stop) with 0 <= start < stop <= J = {key.shape[1]}, got {(start, stop)}"
            )
    if mask is not None:
        check_mask("mask", mask, key.shape[:2], rows.device)


@operator(NAME, "row_statistics")
def attention_row_statistics_fwd(
    rows: Tensor, key: Tensor, mask: Tensor | None, segments: list[int], scale: float
) -> Results[tuple[Tensor, Tensor]]:
    """Maximum and sum of the head-mean weights in each segment, `[B, N, G]`; segments: start, stop, start, stop, ..."""
    check_rows(rows, key, mask, segments, scale)
    shape, dtype = (*rows.shape[:2], len(segments) // 2), accumulator(rows.dtype)
    return lambda: (rows.new_empty(shape, dtype=dtype), rows.new_empty(shape, dtype=dtype))


def check_frames(query: Tensor, key: Tensor, value: Tensor, text: int, frames: int, scale: float) -> None:
    """Raise TypeError or ValueError unless the arguments of frame-local attention fit together."""
    check_tensors(query=query, key=key, value=value)
    check_same_dtype(query=query, key=key, value=value)
    check_scale(scale)
    if query.dim() != 4 or 0 in query.shape[2:]:
        raise ValueError(f"query must be [B, n, H, D] with H and D from 1 up, got {tuple(query.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.shape != query.shape:
            raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}, got {tuple(x.shape)}")
    if not 0 <= text <= query.shape[1]:
        raise ValueError(f"text must be from 0 to n = {query.shape[1]} positions, got {text}")
    if frames < 1 or (query.shape[1] - text) % frames:
        raise ValueError(
            f"frames must be a number from 1 up that divides n - text = {query.shape[1] - text} positions, got {frames}"
        )


@operator(NAME, "frame_local_attention")
def frame_local_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: int,
    frames: int,
    text_last: bool,
    renormalise: bool,
    scale: float,
) -> Results[Tensor]:
    """`[B, n, H, D]`, contiguous, in query's dtype."""
    check_frames(query, key, value, text, frames, scale)
    return lambda: query.new_empty(query.shape)
