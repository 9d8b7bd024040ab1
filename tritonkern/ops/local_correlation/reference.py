"""Eager PyTorch, the plainest correct form: patches are sampled, stored and multiplied with the supports."""

from __future__ import annotations

import functools

import torch
from einops import rearrange, repeat
from torch import Tensor

from tritonkern.ops._dtypes import accurate, full_precision
from tritonkern.ops.local_correlation.op import Samples, columns_of


@full_precision
def forward(features: Tensor, support: Tensor, position: Tensor, samples: Samples, scale: float | None) -> Tensor:
    patches = _Patches(features, position, samples)
    return _correlations(patches, support, position, scale).to(features.dtype)


@full_precision
def backward(
    grad_out: Tensor,
    features: Tensor,
    support: Tensor,
    position: Tensor,
    samples: Samples,
    scale: float | None,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    patches, grad_out = _Patches(features, position, samples), accurate(grad_out)
    if scale is not None:
        weights = _correlations(patches, support, position, scale)
        grad_out = scale * weights * (grad_out - (weights * grad_out).sum(-2, keepdim=True))
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
    features: list[Tensor],
    support: list[Tensor],
    position: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: Samples,
    scales: list[float],
) -> Tensor:
    out = _flat(features, support, position, samples, scales) @ accurate(weight).mT
    return (out if bias is None else out + accurate(bias)).to(weight.dtype)


@full_precision
def linear_backward(
    grad_out: Tensor,
    features: list[Tensor],
    support: list[Tensor],
    position: Tensor,
    weight: Tensor,
    samples: Samples,
    scales: list[float],
    needs_grad: list[bool],
) -> list[Tensor]:
    grad_out, count = accurate(grad_out), len(features)
    flat = _flat(features, support, position, samples, scales)
    grad_weight = torch.einsum("btno,btni->oi", grad_out, flat)
    grad_flat = (grad_out @ accurate(weight)).split(columns_of(support, samples), -1)
    grads, grad_position = [], torch.zeros_like(position)
    for i, (pair, grad) in enumerate(zip(zip(features, support, strict=True), grad_flat, strict=True)):
        grad = rearrange(grad, "b t n (p s) -> b t n p s", p=samples.total)
        scale, wanted = scales[i] if scales else None, [needs_grad[i], needs_grad[count + i], True]
        *of_pair, of_position = backward(grad, *pair, position, samples, scale, wanted)
        grads.append(of_pair)
        grad_position += of_position
    of_layer = (grad_position, grad_weight.to(weight.dtype), grad_out.sum((0, 1, 2)).to(weight.dtype))
    needed = (x if needs else x.new_empty(0) for x, needs in zip(of_layer, needs_grad[2 * count :], strict=True))
    return [*(x for x, _ in grads), *(x for _, x in grads), *needed]


def _flat(
    features: list[Tensor], support: list[Tensor], position: Tensor, samples: Samples, scales: list[float]
) -> Tensor:
    """The correlations of all pairs, or their softmax, one after the other: `[B, T, N, sum of P * S]`."""
    parts = [
        _correlations(_Patches(x, position, samples), y, position, scales[i] if scales else None).flatten(3)
        for i, (x, y) in enumerate(zip(features, support, strict=True))
    ]
    return torch.cat(parts, -1)


def _correlations(patches: _Patches, support: Tensor, position: Tensor, scale: float | None) -> Tensor:
    """`[B, T, N, P, S]` in the dtype of sums, or their softmax over p."""
    product = torch.einsum("btnpc,bntsc->btnps", patches.values(), _per_frame(support, position))
    return product if scale is None else (scale * product).softmax(-2)


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
