"""The operators of a backend from its kernels.

The linear layer is applied block by block: the correlations of a block stay in the caches, and those of the whole call
are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accumulator, adjacent_channels, full_precision
from tritonkern.ops.local_correlation.op import Samples, result_shape

_FRAMES = 32
"""Frames per block. A kernel prepares the support of a point once for all of them."""
_BYTES = {"cpu": 12 << 20, "cuda": 256 << 20}
"""Bytes of the correlations of a block: on a CPU a part of the last-level cache; a GPU needs large products."""


class Kernels(NamedTuple):
    """What a backend computes, of a whole call or of some frames and points of it."""

    readable: Callable[[Tensor], Tensor]
    """``readable(features)``: the features in a layout that the kernels read without copying them again."""
    correlate_into: Callable[..., None]
    """``correlate_into(out, features, support, position, samples)`` writes `[B, T, N, P * S]`. out has the dtype of
    features or of sums, and an adjacent last axis."""
    add_gradients: Callable[..., None]
    """``add_gradients(grad_out, features, support, position, samples, *grads)`` adds to those of the three gradients
    that are not None; they have the dtype of sums and adjacent channels. grad_out is as out above."""
    multiply_into: Callable[[Tensor, Tensor, Tensor, bool], None]
    """``multiply_into(out, left, right, add)``: matrices in the dtype of sums; the product is written, or added."""


def forward(kernels: Kernels, features: Tensor, support: Tensor, position: Tensor, samples: Samples) -> Tensor:
    out = features.new_empty(result_shape(support, position, samples))
    kernels.correlate_into(out.flatten(3), kernels.readable(features), support, position, samples)
    return out


def backward(
    kernels: Kernels,
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    samples: Samples,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (features, support, position)
    grads = _zeros(inputs, needs_grad)
    tensors = (kernels.readable(features), support, position)
    kernels.add_gradients(adjacent_channels(grad_out.flatten(3)), *tensors, samples, *grads)
    return _results(inputs, grads)


@full_precision
def linear_forward(
    kernels: Kernels,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: Samples,
) -> Tensor:
    dtype = accumulator(features.dtype)
    out = features.new_empty((*position.shape[:3], weight.shape[0]))
    transposed = weight.to(dtype).contiguous().T
    offset = None if bias is None else bias.to(dtype)
    features = kernels.readable(features)
    for block in _blocks(features, position, weight.shape[1]):
        flat = _correlations(kernels, block.of(features, support, position), samples)
        product = flat.new_empty(len(flat), len(weight)) if offset is None else offset.repeat(len(flat), 1)
        kernels.multiply_into(product, flat, transposed, offset is not None)
        part = block.points(out)
        part.copy_(product.view(part.shape))
    return out


@full_precision
def linear_backward(
    kernels: Kernels,
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    samples: Samples,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    dtype = accumulator(features.dtype)
    inputs = (features, support, position, weight, weight[:, 0])
    grads = _zeros(inputs, needs_grad)
    of_inputs, (grad_weight, grad_bias) = grads[:3], grads[3:]
    wide = weight.to(dtype).contiguous()
    features = kernels.readable(features)
    for block in _blocks(features, position, weight.shape[1]):
        tensors = block.of(features, support, position)
        rows = block.points(grad_out).to(dtype).reshape(-1, weight.shape[0]).contiguous()
        if grad_weight is not None:
            kernels.multiply_into(grad_weight, rows.T, _correlations(kernels, tensors, samples), True)
        if grad_bias is not None:
            kernels.multiply_into(grad_bias[None], rows.new_ones(1, len(rows)), rows, True)
        if any(grad is not None for grad in of_inputs):
            grad_flat = rows.new_empty(len(rows), weight.shape[1])
            kernels.multiply_into(grad_flat, rows, wide, False)
            grad_flat = grad_flat.view(*tensors[2].shape[:3], weight.shape[1])
            kernels.add_gradients(grad_flat, *tensors, samples, *block.of(*of_inputs))
    return _results(inputs, grads)


def _correlations(kernels: Kernels, tensors: tuple, samples: Samples) -> Tensor:
    """Of a block, `[points, P * S]` in the dtype of sums."""
    _, support, position = tensors
    flat = position.new_empty((*position.shape[:3], samples.total * support.shape[-2]))
    kernels.correlate_into(flat, *tensors, samples)
    return flat.flatten(0, 2)


class _Block:
    """Some frames and points of one video."""

    def __init__(self, video: slice, frames: slice, points: slice):
        self._video, self._frames, self._points = video, frames, points

    def points(self, x: Tensor) -> Tensor:
        """The part of a tensor `[B, T, N, ...]`."""
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


def _blocks(features: Tensor, position: Tensor, columns: int) -> Iterator[_Block]:
    """Sizes depend on the shapes alone, so that results do not depend on the machine."""
    B, T, N = position.shape[:3]
    row = columns * position.dtype.itemsize
    rows = max(1, _BYTES.get(features.device.type, _BYTES["cuda"]) // row)
    frames = max(1, min(T, _FRAMES, rows))
    points = max(1, rows // frames)
    for b in range(B):
        for t in range(0, T, frames):
            for n in range(0, N, points):
                yield _Block(slice(b, b + 1), slice(t, t + frames), slice(n, n + points))


def _zeros(inputs: tuple[Tensor, ...], needs_grad: list[bool]) -> list[Tensor | None]:
    """Sums of gradients."""
    return [
        torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) if needed else None
        for x, needed in zip(inputs, needs_grad, strict=True)
    ]


def _results(inputs: tuple[Tensor, ...], grads: list[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if grad is None else grad.to(x.dtype) for x, grad in zip(inputs, grads, strict=True))
