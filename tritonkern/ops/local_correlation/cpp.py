"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops._dtypes import adjacent_channels
from tritonkern.ops.local_correlation import blocks
from tritonkern.ops.local_correlation.op import Samples


def _correlate_into(
    out: Tensor, features: Tensor, support: Tensor, position: Tensor, samples: Samples, scale: float | None
) -> None:
    if out.numel():
        options = (*samples, scale or 0.0, torch.get_num_threads())  # 0: no softmax
        _cpp.local_correlation_forward(features, support, position, *options, out)


def _softmax_backward_into(grad: Tensor, weights: Tensor, samples: Samples, scale: float) -> None:
    if grad.numel():
        _cpp.local_correlation_softmax_backward(weights, samples.total, scale, torch.get_num_threads(), grad)


def _add_gradients(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    samples: Samples,
    grad_features: Tensor | None,
    grad_support: Tensor | None,
    grad_position: Tensor | None,
) -> None:
    if grad_out.numel():
        grads = (grad_features, grad_support, grad_position)
        threads = torch.get_num_threads()
        _cpp.local_correlation_backward(grad_out, features, support, position, *samples, threads, *grads)


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    if out.numel():
        _cpp.local_correlation_multiply(left, right, add, torch.get_num_threads(), out)


# Every cell is read many times, so features are copied once where channels are not adjacent.
_KERNELS = blocks.Kernels(adjacent_channels, _correlate_into, _softmax_backward_into, _add_gradients, _multiply_into)
forward = functools.partial(blocks.forward, _KERNELS)
backward = functools.partial(blocks.backward, _KERNELS)
linear_forward = functools.partial(blocks.linear_forward, _KERNELS)
linear_backward = functools.partial(blocks.linear_backward, _KERNELS)
