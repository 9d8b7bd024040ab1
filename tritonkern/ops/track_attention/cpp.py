"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES

_Video = tuple[int, tuple[int, ...]]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
) -> tuple[Tensor, Tensor]:
    """Output like query and log-sum-exp `[B, T, rows, H]` (float32, for float64 float64), both contiguous."""
    rows = query.shape[2:-2].numel()
    out = query.new_empty(query.shape)
    lse = query.new_empty((*query.shape[:2], rows, query.shape[-2]), dtype=tracks.dtype)
    tracks, visible = tracks.contiguous(), visible.contiguous()
    inputs = _inputs(query, key, value, tracks, visible, precision, scale, splat, culling)
    _cpp.track_attention_forward(*inputs, out.data_ptr(), lse.data_ptr())
    return out, lse


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, tracks and precision; the last two are of shape [0] unless `positions`. `out` and
    `lse` are not read: a row's weights are at hand at once."""
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    grad_tracks = tracks.new_empty(tracks.shape if positions else 0)
    grad_precision = precision.new_empty(() if positions else 0)
    tracks, visible = tracks.contiguous(), visible.contiguous()
    _cpp.track_attention_backward(
        *_inputs(query, key, value, tracks, visible, precision, scale, splat, culling),
        _video(grad_out),
        [grad.data_ptr() for grad in (grad_query, grad_key, grad_value)],
        grad_tracks.data_ptr(),
        grad_precision.data_ptr(),
    )
    return grad_query, grad_key, grad_value, grad_tracks, grad_precision


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    visible: Tensor,
    precision: Tensor,
    scale: float,
    splat: bool,
    culling: bool,
) -> tuple[int, tuple[int, ...], tuple[float, float, bool, bool, int], _Video, _Video, _Video, int, int]:
    height, width = (query if splat else key).shape[2:4]
    return (
        CPP_DTYPES[query.dtype],
        (*tracks.shape[:3], height, width, *query.shape[-2:]),
        (scale, float(precision), splat, culling, torch.get_num_threads()),
        _video(query),
        _video(key),
        _video(value),
        tracks.data_ptr(),
        visible.data_ptr(),
    )


def _video(x: Tensor) -> _Video:
    """Address and strides as `[B, T, height, width, H, D]`; tracks are a grid of height 1."""
    return x.data_ptr(), (x if x.dim() == 6 else x.unsqueeze(2)).stride()
