"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._contract import CPP_DTYPES

_View = tuple[int, tuple[int, ...]]


def readable(features: Tensor) -> Tensor:
    """With adjacent channels: every cell is read many times, and a cell whose channels lie apart is slow to read."""
    return features if features.stride(-1) == 1 else features.contiguous()


def correlate_into(
    out: Tensor, features: Tensor, support: Tensor, position: Tensor, radius: int, zeros: bool, y_first: bool
) -> None:
    """Writes the correlations into `out`, whose last two axes are adjacent, in its dtype: features' or that of sums."""
    _cpp.local_correlation_forward(*_inputs(out, features, support, position, radius, zeros, y_first))


def add_gradients(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    grad_features: Tensor | None,
    grad_support: Tensor | None,
    grad_position: Tensor | None,
) -> None:
    """Adds to the gradients that are not None; they have the dtype of sums and adjacent channels."""
    if grad_out.stride()[-2:] != (grad_out.shape[-1], 1):
        grad_out = grad_out.contiguous()
    grads = _views(grad_features, grad_support, grad_position, y_first)
    _cpp.local_correlation_backward(*_inputs(grad_out, features, support, position, radius, zeros, y_first), grads)


def _inputs(
    rows: Tensor, features: Tensor, support: Tensor, position: Tensor, radius: int, zeros: bool, y_first: bool
) -> tuple[tuple[int, ...], tuple[int, int, bool, bool, bool, int], list[_View]]:
    B, T, height, width, C = features.shape
    # The kernels have a slow and a fast axis of offsets; where x is the slow one, they see the map transposed.
    grid = (height, width) if y_first else (width, height)
    return (
        (B, T, position.shape[2], *grid, C, support.shape[-2], radius),
        (
            CPP_DTYPES[features.dtype],
            CPP_DTYPES[rows.dtype],
            zeros,
            support.dim() == 5,
            y_first,
            torch.get_num_threads(),
        ),
        [*_views(features, support, position, y_first), _view(rows)],
    )


def _views(features: Tensor | None, support: Tensor | None, position: Tensor | None, y_first: bool) -> list[_View]:
    if features is not None and not y_first:
        features = features.transpose(2, 3)
    if support is not None and support.dim() == 4:
        support = support.unsqueeze(2).expand(-1, -1, 2, -1, -1)  # every frame reads the same: a stride of 0
    return [_view(features), _view(support), _view(position)]


def _view(x: Tensor | None) -> _View:
    return (0, (0,) * 5) if x is None else (x.data_ptr(), (*x.stride(), 0)[:5])
