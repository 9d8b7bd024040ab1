"""The operators of a backend from its kernels.

The linear layer is applied block by block: the correlations of a block stay in the caches, and those of the whole call
are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonkern.ops._dtypes import accumulator, adjacent_channels, full_precision
from tritonkern.ops.local_correlation.op import Samples, columns_of, result_shape

_FRAMES = 32
"""Frames per block. A kernel prepares the support of a point once for all of them."""
_BYTES = {"cpu": 12 << 20, "cuda": 256 << 20}
"""Bytes of the correlations of a block: on a CPU a part of the last-level cache; a GPU needs large products."""


class Kernels(NamedTuple):
    """What a backend computes, of a whole call or of some frames and points of it."""

    readable: Callable[[Tensor], Tensor]
    """``readable(features)``: the features in a layout that the kernels read without copying them again."""
    correlate_into: Callable[..., None]
    """``correlate_into(out, features, support, position, samples, scale)`` writes `[B, T, N, P * S]`. out has the dtype
    of features or of sums, and an adjacent last axis."""
    softmax_backward_into: Callable[[Tensor, Tensor, Samples, float], None]
    """``softmax_backward_into(grad, weights, samples, scale)`` turns the gradient of the weights (what `correlate_into`
    writes with a scale) into that of the correlations, in place: both `[..., P * S]`, contiguous, in the dtype of sums.
    """
    add_gradients: Callable[..., None]
    """``add_gradients(grad_out, features, support, position, samples, *grads)`` adds to those of the three gradients
    that are not None; they have the dtype of sums and adjacent channels. grad_out is that of the correlations, as out
    above."""
    multiply_into: Callable[[Tensor, Tensor, Tensor, bool], None]
    """``multiply_into(out, left, right, add)``: matrices in the dtype of sums; the product is written, or added."""


def forward(
    kernels: Kernels, features: Tensor, support: Tensor, position: Tensor, samples: Samples, scale: float | None
) -> Tensor:
    out = features.new_empty(result_shape(support, position, samples))
    kernels.correlate_into(out.flatten(3), kernels.readable(features), support, position, samples, scale)
    return out


def backward(
    kernels: Kernels,
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    samples: Samples,
    scale: float | None,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (features, support, position)
    grads = _zeros(inputs, needs_grad)
    pair = _Pair(kernels, samples, kernels.readable(features), support, scale, grads[0], grads[1])
    grad_out = grad_out.flatten(3)
    blocks = [_Block(*[slice(None)] * 3)] if scale is None else _blocks(position, grad_out.shape[-1])
    for block in blocks:
        grad = block.points(grad_out)
        if scale is None:
            pair.add_gradients(block, adjacent_channels(grad), None, position, grads[2])
        else:
            grad = grad.to(position.dtype, memory_format=torch.contiguous_format, copy=True)
            pair.add_gradients(block, grad, pair.correlations(block, position), position, grads[2])
    return tuple(_results(inputs, grads))


@full_precision
def linear_forward(
    kernels: Kernels,
    features: list[Tensor],
    support: list[Tensor],
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: Samples,
    scales: list[float],
) -> Tensor:
    dtype = accumulator(weight.dtype)
    out = weight.new_empty((*position.shape[:3], weight.shape[0]))
    offset = None if bias is None else bias.to(dtype)
    pairs = _pairs(kernels, features, support, samples, scales)
    columns = columns_of(support, samples)
    weights = [part.to(dtype).contiguous() for part in weight.split(columns, 1)]
    for block in _blocks(position, max(columns)):
        rows = block.points(position).shape[:3].numel()
        product = weights[0].new_empty(rows, len(weight)) if offset is None else offset.repeat(rows, 1)
        for i, (pair, part) in enumerate(zip(pairs, weights, strict=True)):
            flat = pair.correlations(block, position).flatten(0, 2)
            kernels.multiply_into(product, flat, part.T, i > 0 or offset is not None)
        target = block.points(out)
        target.copy_(product.view(target.shape))
    return out


@full_precision
def linear_backward(
    kernels: Kernels,
    grad_out: Tensor,
    features: list[Tensor],
    support: list[Tensor],
    position: Tensor,
    weight: Tensor,
    samples: Samples,
    scales: list[float],
    needs_grad: list[bool],
) -> list[Tensor]:
    dtype = accumulator(weight.dtype)
    count, columns = len(features), columns_of(support, samples)
    weights = [part.to(dtype).contiguous() for part in weight.split(columns, 1)]
    needs_weight, needs_bias = needs_grad[-2:]
    inputs = (*features, *support, position, weight[:, 0])
    grads = _zeros(inputs, [*needs_grad[:-2], needs_bias])
    *of_pairs, grad_position, grad_bias = grads
    grad_weights = _zeros(weights, [needs_weight] * count)
    pairs = _pairs(kernels, features, support, samples, scales, of_pairs)
    for block in _blocks(position, max(columns)):
        rows = block.points(grad_out).to(dtype).reshape(-1, len(weight)).contiguous()
        if grad_bias is not None:
            kernels.multiply_into(grad_bias[None], rows.new_ones(1, len(rows)), rows, True)
        for pair, part, grad_weight in zip(pairs, weights, grad_weights, strict=True):
            pair.add_linear_gradients(block, rows, part, grad_weight, position, grad_position)
    *results, result_bias = _results(inputs, grads)
    of_weight = [grad for grad in grad_weights if grad is not None]
    result_weight = torch.cat(of_weight, 1).to(weight.dtype) if of_weight else weight.new_empty(0)
    return [*results, result_weight, result_bias]


class _Pair(NamedTuple):
    """Features and support of a call, and their gradients, to which is added."""

    kernels: Kernels
    samples: Samples
    features: Tensor
    support: Tensor
    scale: float | None
    grad_features: Tensor | None = None
    grad_support: Tensor | None = None

    def correlations(self, block: _Block, position: Tensor) -> Tensor:
        """Of a block, or their softmax: `[B, T, N, P * S]` in the dtype of sums."""
        features, support, position = block.of(self.features, self.support, position)
        flat = position.new_empty((*position.shape[:3], self.samples.total * support.shape[-2]))
        self.kernels.correlate_into(flat, features, support, position, self.samples, self.scale)
        return flat

    def add_linear_gradients(
        self,
        block: _Block,
        grad_rows: Tensor,
        weight: Tensor,
        grad_weight: Tensor | None,
        position: Tensor,
        grad_position: Tensor | None,
    ) -> None:
        """`grad_rows`: `[points, O]`, of the results of the linear layer in a block."""
        flat = None
        needed = any(grad is not None for grad in (self.grad_features, self.grad_support, grad_position))
        if grad_weight is not None or (needed and self.scale is not None):
            flat = self.correlations(block, position)
        if grad_weight is not None:
            assert flat is not None
            self.kernels.multiply_into(grad_weight, grad_rows.T, flat.flatten(0, 2), True)
        if needed:
            flat = None if self.scale is None else flat  # freed
            grad = grad_rows.new_empty((*block.points(position).shape[:3], weight.shape[1]))
            self.kernels.multiply_into(grad.flatten(0, 2), grad_rows, weight, False)
            self.add_gradients(block, grad, flat, position, grad_position)

    def add_gradients(
        self, block: _Block, grad: Tensor, flat: Tensor | None, position: Tensor, grad_position: Tensor | None
    ) -> None:
        """`grad` is that of `correlations`, and is overwritten with a softmax; then `flat` are these."""
        if self.scale is not None:
            assert flat is not None
            self.kernels.softmax_backward_into(grad, flat, self.samples, self.scale)
        tensors = block.of(self.features, self.support, position)
        grads = block.of(self.grad_features, self.grad_support, grad_position)
        self.kernels.add_gradients(grad, *tensors, self.samples, *grads)


def _pairs(
    kernels: Kernels,
    features: list[Tensor],
    support: list[Tensor],
    samples: Samples,
    scales: list[float],
    grads: Sequence[Tensor | None] = (),
) -> list[_Pair]:
    """`grads`: of all features, then of all supports."""
    count = len(features)
    return [
        _Pair(
            kernels,
            samples,
            kernels.readable(features[i]),
            support[i],
            scales[i] if scales else None,
            *(grads[i::count] if grads else ()),
        )
        for i in range(count)
    ]


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


def _blocks(position: Tensor, columns: int) -> Iterator[_Block]:
    """Sizes depend on the shapes alone, so that results do not depend on the machine."""
    B, T, N = position.shape[:3]
    row = columns * position.dtype.itemsize
    rows = max(1, _BYTES.get(position.device.type, _BYTES["cuda"]) // row)
    frames = max(1, min(T, _FRAMES, rows))
    points = max(1, rows // frames)
    for b in range(B):
        for t in range(0, T, frames):
            for n in range(0, N, points):
                yield _Block(slice(b, b + 1), slice(t, t + frames), slice(n, n + points))


def _zeros(inputs: Sequence[Tensor], needs_grad: list[bool]) -> list[Tensor | None]:
    """Sums of gradients."""
    return [
        torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) if needed else None
        for x, needed in zip(inputs, needs_grad, strict=True)
    ]


def _results(inputs: Sequence[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(0) if grad is None else grad.to(x.dtype) for x, grad in zip(inputs, grads, strict=True)]
