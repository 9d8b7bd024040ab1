"""Matching by the queries and keys of a transformer over videos."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonkern.functional._arguments import autocast, check_types, integer, real, softmax_scale
from tritonkern.ops._checks import check_strided
from tritonkern.ops.query_key_matching import op


class QueryKeyMatch(NamedTuple):
    """Where each of M source cells is found in each of T frames. In the source frame a cell matches itself."""

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    """[B, T, M] int64: the best cell, row * w + column, the lowest among equal ones; -1 where the cost has a NaN."""
    peak: Tensor
    """[B, T, M] cost of the best cell; 1 in the source frame."""
    points: Tensor
    """[B, T, M, 2] (x, y) in cells, centres at + 0.5."""


def query_key_matching(
    query: Tensor,
    key: Tensor,
    *,
    grid: tuple[int, int],
    source: int = 0,
    cells: Tensor | None = None,
    scale: float | None = None,
    symmetric: bool = True,
    radius: float | None = None,
    backend: str | None = None,
) -> QueryKeyMatch:
    """Finds the cells of one frame in all others by the queries and keys of an attention layer.

    For source frame a and every other frame b, with heads n::

        A[n, s, t] = softmax over t of scale <query[a, s, n], key[b, t, n]>
        B[n, t, s] = softmax over s of scale <query[b, t, n], key[a, s, n]>
        C[t, s]    = (mean over n of A[n, s, t] + mean over n of B[n, t, s]) / 2

        index[s] = argmax over t of C[t, s]        peak[s] = C[index[s], s]

    The weights of single heads are never stored. The first derivative of `peak` and `points` is supported, for a fixed
    set of cells and a fixed best cell; it computes the weights again.

    Args:
        query, key: ``[B, T, S, H, D]``, any strides, of one dtype: float64, float32, bfloat16 or float16. What a
            transformer stores as ``[B, H, text + T * S, D]`` is taken without a copy as
            ``x[:, :, text:].unflatten(2, (T, S)).permute(0, 2, 3, 1, 4)``. Several layers are concatenated along D.
            Heads are averaged before the softmax with ``x.flatten(-2)[..., None, :]`` and the scale divided by H.
            Under autocast both are cast to its dtype; sums are kept in float32 (float64 for float64).
        grid: (h, w) with h * w = S.
        source: the frame a.
        cells: ``[B, M]`` int64, the source cells to find, from 0 to S - 1; None for all S of them. On a GPU their
            range is an assertion on the device, as that of PyTorch's own indices, for which nothing waits.
        scale: factor on the scores, from -2**64 to 2**64; ``D ** -0.5`` if None.
        symmetric: False leaves B out, and A counts fully.
        radius: None: `points` are the centres of the best cells. A number: means over the cells strictly closer than
            that to the best one, weighted by C; `math.inf` for all cells of the frame.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        `QueryKeyMatch`, float32 (float64 for float64). A NaN in one frame reaches the results of the pairs with that
        frame, as index -1 and NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, an option out of its range, or a backend that cannot
            run this call.

    All pairs of frames, for displacements between any two of them::

        matches = [query_key_matching(query, key, grid=grid, source=a) for a in range(query.shape[1])]

    The matching of DiffTrack (Nam et al., "Emergent Temporal Correspondences from Video Diffusion Transformers", 2025).
    """
    query, key, source, scale, symmetric = _converted(query, key, cells, source, scale, symmetric, backend)
    try:
        height, width = (operator.index(x) for x in grid)
    except (TypeError, ValueError):
        raise TypeError(f"grid must be a pair of ints (h, w), got {grid!r}") from None
    if radius is not None:
        radius = real("radius", radius)
        if not radius > 0:
            raise ValueError(f"radius must be a positive number or None, got {radius}")
    arguments = (query, key, cells, source, height, width, scale, symmetric, 0.0 if radius is None else radius)
    peak, points, index, _ = op.query_key_matching_fwd(*arguments, backend)
    return QueryKeyMatch(index, peak, points)


def query_key_cost(
    query: Tensor,
    key: Tensor,
    *,
    source: int = 0,
    cells: Tensor | None,
    scale: float | None = None,
    symmetric: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The cost C of `query_key_matching` itself, for averages over several passes and for displacements by softmax.

    The first derivative is supported.

    Args:
        query, key, source, cells, scale, symmetric, backend: as in `query_key_matching`.

    Returns:
        ``[B, T, M, S]``: C of every cell of every frame, the source frame by the same formula; float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError, NotImplementedError: as `query_key_matching`.
    """
    query, key, source, scale, symmetric = _converted(query, key, cells, source, scale, symmetric, backend)
    return op.query_key_cost_fwd(query, key, cells, source, scale, symmetric, backend)


def attention_row_statistics(
    rows: Tensor,
    key: Tensor,
    segments: Sequence[tuple[int, int]],
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Maximum and sum, in each of G segments of the keys, of the head-mean of softmax weights over all keys.

    ``P[i, j] = mean over n of softmax over j of scale <rows[i, n], key[j, n]>``; inference only.

    Args:
        rows: ``[B, N, H, D]`` queries, any strides; float64, float32, bfloat16 or float16.
        key: ``[B, J, H, D]`` of rows' dtype.
        segments: (start, stop) of each segment, not empty; they may overlap and need not cover all keys.
        scale: factor on the scores, from -2**64 to 2**64; ``D ** -0.5`` if None.
        mask: ``[B, J]`` boolean: which keys take part. Where none does, results are NaN.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        maximum and sum ``[B, N, G]``, float32 (float64 for float64). The maximum is that of the head-mean.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        NotImplementedError: an input requires a gradient; call it under `torch.no_grad`.

    The confidence and attention scores of DiffTrack (Nam et al., 2025).
    """
    check_types(backend, rows=rows, key=key)
    if mask is not None:
        check_strided("mask", mask)
    _refuse_gradients("attention_row_statistics", rows=rows, key=key)
    rows, key = autocast(rows, key)
    if not isinstance(segments, Sequence) or not all(isinstance(x, (tuple, list)) and len(x) == 2 for x in segments):
        raise TypeError(f"segments must be a list of pairs (start, stop), got {segments!r}")
    flat = [operator.index(x) for pair in segments for x in pair]
    return op.attention_row_statistics_fwd(rows, key, mask, flat, softmax_scale(scale, rows), backend)


def frame_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text: int,
    frames: int,
    text_last: bool = False,
    renormalise: bool,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention in which text sees and is seen by all positions, and video sees its own frame and the text.

    ::

                     text   frame 0  frame 1
            text      x        x        x         x: seen
            frame 0   x        x        .
            frame 1   x        .        x

    No mask is stored; inference only.

    Args:
        query, key, value: ``[B, n, H, D]`` of one dtype, any strides; n = text + frames * S.
        text: number of text positions.
        frames: number of frames, of S positions each.
        text_last: whether text comes after the video; otherwise before it.
        renormalise: True: softmax over what is seen. False: softmax over all keys, of which the weights that are not
            seen are dropped, so that weights of a row sum to less than 1.
        scale: factor on the scores, from -2**64 to 2**64; ``D ** -0.5`` if None.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        ``[B, n, H, D]`` in query's dtype (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        NotImplementedError: an input requires a gradient; call it under `torch.no_grad`.

    The perturbed attention of the cross-attention guidance of DiffTrack (Nam et al., 2025).
    """
    check_types(backend, query=query, key=key, value=value)
    _refuse_gradients("frame_local_attention", query=query, key=key, value=value)
    query, key, value = autocast(query, key, value)
    text, frames = integer("text", text), integer("frames", frames)
    for name, x in (("text_last", text_last), ("renormalise", renormalise)):
        if not isinstance(x, bool):
            raise TypeError(f"{name} must be a bool, got {type(x).__name__}")
    scale = softmax_scale(scale, query)
    return op.frame_local_attention_fwd(query, key, value, text, frames, text_last, renormalise, scale, backend)


def _converted(query, key, cells, source, scale, symmetric, backend):
    """The arguments that both operators take, as their schemas want them."""
    check_types(backend, query=query, key=key)
    query, key = autocast(query, key)
    source = integer("source", source)
    if cells is not None:
        check_strided("cells", cells)
        # The kernels of CPUs check them, so that batches and traces, which have no numbers, need not.
        if not cells.is_cpu and cells.dtype == torch.int64:
            op.check_range(cells, query.shape[2:3].numel())
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be a bool, got {type(symmetric).__name__}")
    return query, key, source, softmax_scale(scale, query), symmetric


def _refuse_gradients(function: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(
                f"{function} has no gradient and {name} requires one; call it under torch.no_grad()"
            )
