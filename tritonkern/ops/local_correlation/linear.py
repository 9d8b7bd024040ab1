"""Local correlation followed by a linear layer, block by block: the flat vectors of a block stay in the caches."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from tritonkern.ops._contract import accumulator

_FRAMES = 32
"""Of a block. A backend prepares the support of a point once for all of them."""
_BYTES = {"cpu": 12 << 20, "cuda": 256 << 20}
"""Of the flat vectors of a block: on a CPU a part of the last-level cache; a GPU needs large products."""


def forward(
    kernels: ModuleType,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    radius: int,
    zeros: bool,
    y_first: bool,
) -> Tensor:
    """What `op` says of the forward operator. The products are taken in the dtype of sums."""
    dtype = accumulator(features.dtype)
    out = features.new_empty((*position.shape[:3], weight.shape[0]))
    transposed = weight.to(dtype).T
    offset = None if bias is None else bias.to(dtype)
    with torch.autocast(features.device.type, enabled=False):
        for block in _blocks(features, support, position, weight.shape[1]):
            flat = _correlate(kernels, block.of(features, support, position), radius, zeros, y_first)
            product = flat @ transposed if offset is None else torch.addmm(offset, flat, transposed)
            part = block.points(out)
            part.copy_(product.view(part.shape))
    return out


def add_gradients(
    kernels: ModuleType,
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    radius: int,
    zeros: bool,
    y_first: bool,
    grads: tuple[Tensor | None, ...],
) -> None:
    """Adds to those gradients of features, support, position and weight that are not None."""
    dtype = accumulator(features.dtype)
    wide = weight.to(dtype)
    grad_features, grad_support, grad_position, grad_weight = grads
    with torch.autocast(features.device.type, enabled=False):
        for block in _blocks(features, support, position, weight.shape[1]):
            tensors = block.of(features, support, position)
            rows = block.points(grad_out).to(dtype).reshape(-1, weight.shape[0])
            if grad_weight is not None:
                grad_weight.addmm_(rows.T, _correlate(kernels, tensors, radius, zeros, y_first))
            if grad_features is None and grad_support is None and grad_position is None:
                continue
            grad_flat = (rows @ wide).view(*tensors[2].shape[:3], (2 * radius + 1) ** 2, support.shape[-2])
            parts = block.of(grad_features, grad_support, grad_position)
            kernels.add_gradients(grad_flat, *tensors, radius, zeros, y_first, *parts)


def _correlate(kernels: ModuleType, tensors: tuple, radius: int, zeros: bool, y_first: bool) -> Tensor:
    _, support, position = tensors
    shape = (*position.shape[:3], (2 * radius + 1) ** 2, support.shape[-2])
    flat = position.new_empty(shape)
    kernels.correlate_into(flat, *tensors, radius, zeros, y_first)
    return flat.view(shape[0] * shape[1] * shape[2], shape[3] * shape[4])


class _Block:
    """Some frames and points of one video."""

    def __init__(self, video: slice, frames: slice, points: slice):
        self._video, self._frames, self._points = video, frames, points

    def points(self, x: Tensor) -> Tensor:
        """Of a tensor `[B, T, N, ...]`."""
        return x[self._video, self._frames, self._points]

    def of(self, features: Tensor | None, support: Tensor | None, position: Tensor | None) -> tuple:
        """The parts that belong to the block, or None."""
        if support is not None:
            support = support[self._video, self._points]
            support = support[:, :, self._frames] if support.dim() == 5 else support
        return (
            None if features is None else features[self._video, self._frames],
            support,
            None if position is None else self.points(position),
        )


def _blocks(features: Tensor, support: Tensor, position: Tensor, columns: int) -> Iterator[_Block]:
    B, T, N = position.shape[:3]
    row = columns * position.dtype.itemsize
    rows = max(1, _BYTES.get(features.device.type, _BYTES["cuda"]) // row)
    frames = max(1, min(T, _FRAMES, rows))
    points = max(1, rows // frames)
    for b in range(B):
        for t in range(0, T, frames):
            for n in range(0, N, points):
                yield _Block(slice(b, b + 1), slice(t, t + frames), slice(n, n + points))
