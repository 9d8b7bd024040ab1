"""Eager PyTorch, the plainest correct form: patches are sampled, stored and multiplied with the supports."""

from __future__ import annotations

import functools

import torch
from einops import rearrange, repeat
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision
from tritonkern.ops.local_correlation.op import Samples


@full_precision
def forward(features: Tensor, support: Tensor, position: Tensor, samples: Samples) -> Tensor:
    return _correlations(features, support, position, samples).to(features.dtype)


@full_precision
def backward(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    samples: Samples,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    patches, grad_out = _Patches(features, position, samples), accurate(grad_out)
    grad_patches = torch.einsum("btnps,bntsc->btnpc", grad_out, _per_frame(support, position))
    candidates = (
        lambda: patches.transposed(grad_patches),
        lambda: _grad_support(grad_out, patches, support),
        lambda: torch.einsum("btnpc,btnpcd->btnd", grad_patches, patches.slopes()),
    )
    inputs = (features, support, position)
    return tuple(
        make().to(x.dtype) if needed else x.new_empty(0)
        for make, x, needed in zip(candidates, inputs, needs_grad, strict=True)
    )


@full_precision
def linear_forward(
    features: Tensor, support: Tensor, position: Tensor, weight: Tensor, bias: Tensor | None, samples: Samples
) -> Tensor:
    out = _correlations(features, support, position, samples).flatten(3) @ accurate(weight).mT
    return (out if bias is None else out + accurate(bias)).to(features.dtype)


@full_precision
def linear_backward(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    weight: Tensor,
    samples: Samples,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    grad_out = accurate(grad_out)
    flat = _correlations(features, support, position, samples).flatten(3)
    grad_weight = torch.einsum("btno,btni->oi", grad_out, flat).to(weight.dtype)
    grad_bias = grad_out.sum((0, 1, 2)).to(weight.dtype)
    grad_flat = rearrange(grad_out @ accurate(weight), "b t n (p s) -> b t n p s", p=samples.total)
    grads = backward(grad_flat, features, support, position, samples, needs_grad[:3])
    layer = (
        grad if needed else weight.new_empty(0)
        for grad, needed in zip((grad_weight, grad_bias), needs_grad[3:], strict=True)
    )
    return (*grads, *layer)


def _correlations(features: Tensor, support: Tensor, position: Tensor, samples: Samples) -> Tensor:
    """`[B, T, N, P, S]` in the dtype of sums."""
    patches = _Patches(features, position, samples).values()
    return torch.einsum("btnpc,bntsc->btnps", patches, _per_frame(support, position))


def _grad_support(grad_out: Tensor, patches: _Patches, support: Tensor) -> Tensor:
    grad = torch.einsum("btnps,btnpc->bntsc", grad_out, patches.values())
    return grad if support.dim() == 5 else grad.sum(2)


def _per_frame(support: Tensor, position: Tensor) -> Tensor:
    """`[B, N, T, S, C]` in the dtype of sums."""
    support = accurate(support)
    return support if support.dim() == 5 else repeat(support, "b n s c -> b n t s c", t=position.shape[1])


class _Patches:
    """Bilinear samples `[B, T, N, P, C]` at position + offset."""

    def __init__(self, features: Tensor, position: Tensor, samples: Samples):
        self.features, radius = accurate(features), samples.radius
        height, width = features.shape[2:4]
        self.unknown = position.isnan().any(-1)  # [B, T, N]
        # Beyond this, and at infinity, a patch is the border alone, or zeros.
        far = position.new_tensor([width, height]) + radius
        position = torch.minimum(position.nan_to_num(0).clamp(min=-radius - 2), far)
        cell = position.floor()
        fraction = (position - cell)[..., None, :]
        offsets = torch.arange(-radius, radius + 1, device=position.device)
        first, second = torch.meshgrid(offsets, offsets, indexing="ij")
        offset = torch.stack([second, first] if samples.y_first else [first, second], -1).flatten(0, 1)  # [P, 2] xy
        cell = cell.long()[..., None, :] + offset  # [B, T, N, P, 2]
        self.corners = []
        for dy in (0, 1):
            for dx in (0, 1):
                x, y = cell[..., 0] + dx, cell[..., 1] + dy
                in_map = (0 <= x) & (x < width) & (0 <= y) & (y < height)
                index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
                weights = [fraction[..., i] if d else 1 - fraction[..., i] for i, d in enumerate((dx, dy))]
                exists = in_map if samples.zeros else torch.ones_like(in_map)
                self.corners.append((index, exists, weights, (2 * dx - 1, 2 * dy - 1)))

    def values(self, slope: int | None = None) -> Tensor:
        """The samples, or their derivative by x (0) or y (1)."""
        C = self.features.shape[-1]
        cells = self.features.flatten(2, 3)
        parts = []
        for index, exists, (along_x, along_y), signs in self.corners:
            flat = repeat(index, "b t n p -> b t (n p) c", c=C)
            value = torch.where(exists[..., None], cells.gather(2, flat).view(*index.shape, C), 0)
            weight = along_x * along_y if slope is None else signs[slope] * (along_x, along_y)[1 - slope]
            parts.append(weight[..., None] * value)
        return torch.where(self.unknown[..., None, None], torch.nan, functools.reduce(torch.add, parts))

    def slopes(self) -> Tensor:
        """`[B, T, N, P, C, 2]`"""
        return torch.stack([self.values(slope=0), self.values(slope=1)], -1)

    def transposed(self, grad: Tensor) -> Tensor:
        """The gradient of the features from that of the samples, `[B, T, N, P, C]`. NaN positions add nothing."""
        B, T, height, width, C = self.features.shape
        total = grad.new_zeros(B * T * height * width, C)
        frame = torch.arange(B * T, device=grad.device).view(B, T, 1, 1) * (height * width)
        for index, exists, (along_x, along_y), _ in self.corners:
            added = exists & ~self.unknown[..., None]
            part = torch.where(added[..., None], (along_x * along_y)[..., None] * grad, 0)
            total.index_add_(0, (frame + index).flatten(), part.flatten(0, 3))
        return total.view(self.features.shape)
