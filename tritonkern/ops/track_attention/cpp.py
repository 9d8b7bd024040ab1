"""The call into the C++ kernels. PyTorch is imported first, so that the extension shares its OpenMP runtime."""

import torch
from torch import Tensor

from tritonkern import _cpp
from tritonkern.ops.track_attention.op import Points, empty_gradients


def forward(
    query: Tensor, key: Tensor, value: Tensor, points: Points, scale: float, splat: bool, culling: bool
) -> Tensor:
    """Output like query, contiguous."""
    out = query.new_empty(query.shape)
    threads = torch.get_num_threads()
    _cpp.track_attention_forward(query, key, value, *_inputs(points), scale, splat, culling, threads, out)
    return out


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    points: Points,
    scale: float,
    splat: bool,
    culling: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, tracks and inverse_variance; see `op.track_attention_bwd`."""
    grads = empty_gradients(query, key, value, points, needs_grad)
    wanted = [grad if need else None for grad, need in zip(grads[3:], needs_grad, strict=True)]
    threads = torch.get_num_threads()
    inputs = query, key, value, *_inputs(points)
    _cpp.track_attention_backward(grad_out, *inputs, scale, splat, culling, threads, *grads[:3], wanted[0], wanted[1])
    return grads


def _inputs(points: Points) -> tuple[Tensor, Tensor | None, float]:
    tracks, visible, inverse_variance = points
    return tracks.contiguous(), None if visible is None else visible.contiguous(), float(inverse_variance)
