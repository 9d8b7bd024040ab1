"""Attention along time and between tracks and a feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.functional._arguments import autocast, check_types, integer, real, softmax_scale, window_extent
from tritonkern.ops._checks import check_dense, check_strided
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops.temporal_window_attention import op as _window_op
from tritonkern.ops.track_attention import op as _track_op


def temporal_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | tuple[int, int] = 13,
    *,
    scale: float | None = None,
    query_offset: int = 0,
    start: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Attention over time in which every frame sees only the frames near it.

    Each position n and head h is a sequence of its own along time. Query frame i sees the key frames j with
    ``i - left <= j <= i + right`` that exist in the clip, and the softmax runs over those alone. With T = 6 and
    ``window=3`` (or ``(1, 1)``), and with ``window=(2, 0)`` (causal), query frame i sees the key frames marked 1::

        window=3    j 0 1 2 3 4 5        window=(2, 0)    j 0 1 2 3 4 5
        i = 0         1 1 . . . .        i = 0              1 . . . . .
        i = 1         1 1 1 . . .        i = 1              1 1 . . . .
        i = 2         . 1 1 1 . .        i = 2              1 1 1 . . .
        i = 3         . . 1 1 1 .        i = 3              . 1 1 1 . .
        i = 4         . . . 1 1 1        i = 4              . . 1 1 1 .
        i = 5         . . . . 1 1        i = 5              . . . 1 1 1

    Keys and values may cover more frames than the queries, as they do in a stream: query frame i stands at key frame
    ``query_offset + i``, and everything above counts from there. With T = 2 queries, S = 6 keys, ``query_offset=3`` and
    ``window=3``, query 0 sees the keys 2, 3 and 4, and query 1 the keys 3, 4 and 5.

    Time and memory grow with T times the window, never with T squared. The first derivative is supported; a second one
    raises RuntimeError.

    Args:
        query: ``[B, T, H, D]`` or ``[B, T, N, H, D]`` (batch, frames, spatial positions, heads, head dimension).
            float64, float32, bfloat16 or float16; D a multiple of 8 from 8 to 256. Any other size may be 0. Sums are
            kept in float32 (float64 for float64). Under autocast the tensors are cast to the autocast dtype, as
            `torch.nn.functional.scaled_dot_product_attention` does.
        key, value: of the shape, dtype and device of query, but for the number of frames S, which is at least
            ``query_offset + T``. All three may have any strides, so no ``permute().contiguous()`` is ever needed.
        window: odd number of frames in all (13 sees six on each side), or the inclusive counts ``(left, right)`` of
            frames before and after. Windows are cut off, not shifted, at the ends of the clip; longer than it is legal.
        scale: factor on the scores, from -2**64 to 2**64; ``D ** -0.5`` if None.
        query_offset: the key frame of query frame 0.
        start: the row of `key` and `value` in which frame 0 is stored, for keys and values in a ring: frame j is in row
            ``(start + j) % S``, so that a stream overwrites its oldest frame and never moves the others. Forward only:
            where a gradient is recorded, another start than 0 is refused.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous tensor of query's shape, in the inputs' dtype (the autocast dtype under autocast). A NaN or infinity
        in a frame reaches exactly the output frames whose window holds it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent, `torch.func` differentiates the call, or a
            gradient is recorded with a start that is not 0.
        ValueError: shapes or devices that do not fit together, a window that is even or negative, a scale, query_offset
            or start out of range, or a backend that cannot run this call (the message lists every backend with its
            reason and the way out).

    The operation is the temporal attention of Chrono (Kim et al., "Exploring Temporally-Aware Features for Point
    Tracking", CVPR 2025), which is sliding-window attention (Beltagy et al., "Longformer", 2020) along time.
    """
    left, right = window_extent(window)
    check_types(backend, query=query, key=key, value=value)
    query, key, value = autocast(query, key, value)
    scale = softmax_scale(scale, query)
    options = left, right, scale, integer("query_offset", query_offset), integer("start", start), backend
    attend = _window_op.temporal_window_attention_fwd
    if not query.dim() == key.dim() == value.dim() == 4:
        return attend(query, key, value, *options)[0]
    query, key, value = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    return attend(query, key, value, *options)[0].squeeze(2)


def track_sample_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    *,
    sigma: float | Tensor = 0.5,
    scale: float | None = None,
    visibility: Tensor | None = None,
    culling: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Every track gathers values from the feature map around it: attention with a bias on distance, within each frame.

    ``weights[i, j] = softmax over cells j of (scale * query_i . key_j - |track_i - cell_j|^2 / (2 sigma^2))``, and the
    output of track i is the sum of ``weights[i, j] * value_j``. The kernel computes the bias from the coordinates and
    stores neither biases nor weights. The first derivative is supported; a second one raises RuntimeError.

    Args:
        query: ``[B, T, M, H, D]`` (batch, frames, tracks, heads, head dimension).
        key, value: ``[B, T, h, w, H, D]``, of query's dtype and device; any strides. float64, float32, bfloat16 or
            float16; D a multiple of 8 from 8 to 256; B, T and M may be 0. Sums are kept in float32 (float64 for
            float64). Under autocast they are cast to the autocast dtype.
        tracks: ``[B, T, M, 2]`` (x, y) in cells of the map, cell i with its centre at i + 0.5. They may be outside of
            the map; beyond 2**60 cells a coordinate counts as 2**60. Converted to float32 (float64 for float64).
            Differentiable.
        sigma: width of the bias in cells, positive: a number or a 0-d tensor. A tensor is differentiable; its value is
            not checked, because reading it would wait for the GPU, and the sign of a negative one is ignored. Infinity
            means no bias, plain cross-attention.
        scale: factor on the products, from -2**64 to 2**64; ``D ** -0.5`` if None.
        visibility: ``[B, T, M]`` bool; None: all visible. The output of a track is zero in frames where it is
            invisible or has a NaN or infinite coordinate; no gradient passes through it there.
        culling: whether to skip cells whose weights change no output by half an ulp of the largest value. The norms of
            the queries and keys bound those weights. False visits every cell.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous ``[B, T, M, H, D]`` in the inputs' dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, a sigma that is not positive, a scale out of range, or
            a backend that cannot run this call (the message lists every backend with its reason and the way out).

    It is the attentional sampling of Tracktention (Lai and Vedaldi, "Tracktention: Leveraging Point Tracking to Attend
    Videos Faster and Better", CVPR 2025).
    """
    return _track_attention(False, query, key, value, tracks, sigma, scale, visibility, culling, backend)


def track_splat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    *,
    sigma: float | Tensor = 0.5,
    scale: float | None = None,
    visibility: Tensor | None = None,
    culling: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Every cell of the feature map gathers values from the tracks around it: `track_sample_attention` with the roles
    of tracks and cells exchanged.

    The softmax runs over the visible tracks of the frame: a cell far from all of them attends to the nearest ones.

    Args:
        query: ``[B, T, h, w, H, D]``.
        key, value: ``[B, T, M, H, D]``.
        tracks, sigma, scale, culling, backend: as in `track_sample_attention`.
        visibility: ``[B, T, M]`` bool; None: all visible. Tracks that are invisible in a frame, or have a NaN or
            infinite coordinate, do not take part in it. A frame without visible tracks has zero output and gradients.

    Returns:
        Contiguous ``[B, T, h, w, H, D]`` in the inputs' dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as `track_sample_attention`.
    """
    return _track_attention(True, query, key, value, tracks, sigma, scale, visibility, culling, backend)


def _track_attention(
    splat: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    sigma: float | Tensor,
    scale: float | None,
    visibility: Tensor | None,
    culling: bool,
    backend: str | None,
) -> Tensor:
    check_types(backend, query=query, key=key, value=value, tracks=tracks)
    query, key, value = autocast(query, key, value)
    check_dense("tracks", tracks)  # before they are converted
    if visibility is not None:
        check_strided("visibility", visibility)
    if not isinstance(culling, bool):
        raise TypeError(f"culling must be a bool, got {type(culling).__name__}")
    scale = softmax_scale(scale, query)
    dtype = accumulator(query.dtype)
    points = tracks.to(dtype), visibility, _inverse_variance(sigma, query.device, dtype)
    return _track_op.track_attention_fwd(query, key, value, *points, scale, splat, culling, backend)


# Limits beyond which the results stay the same to the last bit. The derivative's powers of sigma would overflow.
_SMALLEST_SIGMA, _LARGEST_SIGMA = 1e-19, 1e170


def _inverse_variance(sigma: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 / (2 sigma^2) as a 0-d tensor, computed in float64."""
    if isinstance(sigma, Tensor):
        check_dense("sigma", sigma)
        if sigma.dim() != 0 or sigma.device != device:
            raise ValueError(
                f"sigma must be a number or a 0-d tensor on {device}, got shape {tuple(sigma.shape)} on {sigma.device}"
            )
        return (0.5 / sigma.double().abs().clamp(_SMALLEST_SIGMA, _LARGEST_SIGMA).square()).to(dtype)
    sigma = real("sigma", sigma)
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}; float('inf') means no bias")
    sigma = min(max(sigma, _SMALLEST_SIGMA), _LARGEST_SIGMA)
    return torch.full((), 0.5 / (sigma * sigma), dtype=dtype, device=device)
