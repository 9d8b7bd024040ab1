"""Eager PyTorch, the plainest correct form: patches are sampled, stored and multiplied with the supports."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tritonkern.ops._contract import full_precision


@full_precision
def correlate_into(
    out: Tensor, features: Tensor, support: Tensor, position: Tensor, radius: int, zeros: bool, y_first: bool
) -> None:
    """Writes what `op` says of the forward operator, in the dtype of `out`."""
    patches = _Patches(features, position, radius, zeros, y_first)
    out.copy_(torch.einsum("btnpc,bntsc->btnps", patches.values(), _per_frame(support, position)))


@full_precision
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
    """Adds to the gradients that are not None; they have the dtype of sums."""
    patches = _Patches(features, position, radius, zeros, y_first)
    grad_out = grad_out.to(position.dtype)
    if grad_support is not None:
        grad = torch.einsum("btnps,btnpc->bntsc", grad_out, patches.values())
        grad_support += grad if support.dim() == 5 else grad.sum(2)
    if grad_features is None and grad_position is None:
        return
    grad_patches = torch.einsum("btnps,bntsc->btnpc", grad_out, _per_frame(support, position))
    if grad_features is not None:
        patches.add_transposed(grad_patches, grad_features)
    if grad_position is not None:
        slopes = torch.stack([patches.values(slope=0), patches.values(slope=1)], -1)
        grad_position += torch.einsum("btnpc,btnpcd->btnd", grad_patches, slopes)


def _per_frame(support: Tensor, position: Tensor) -> Tensor:
    """`[B, N, T, S, C]` in the dtype of sums."""
    support = support.to(position.dtype)
    return support if support.dim() == 5 else support.unsqueeze(2).expand(-1, -1, position.shape[1], -1, -1)


class _Patches:
    """Bilinear samples `[B, T, N, P, C]` at position + offset."""

    def __init__(self, features: Tensor, position: Tensor, radius: int, zeros: bool, y_first: bool):
        self.features = features.to(position.dtype)
        height, width = features.shape[2:4]
        self.unknown = position.isnan().any(-1)  # [B, T, N]
        # Beyond this, and at infinity, a patch meets the border alone, or nothing.
        far = position.new_tensor([width, height]) + radius
        position = torch.minimum(position.nan_to_num(0).clamp(min=-radius - 2), far)
        cell = position.floor()
        fraction = (position - cell)[..., None, :]
        offsets = torch.arange(-radius, radius + 1, device=position.device)
        first, second = torch.meshgrid(offsets, offsets, indexing="ij")
        offset = torch.stack([second, first] if y_first else [first, second], -1).flatten(0, 1)  # [P, 2] xy
        cell = cell.long()[..., None, :] + offset  # [B, T, N, P, 2]
        self.corners = []
        for dy in (0, 1):
            for dx in (0, 1):
                x, y = cell[..., 0] + dx, cell[..., 1] + dy
                there = (0 <= x) & (x < width) & (0 <= y) & (y < height)
                index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
                weights = [fraction[..., i] if d else 1 - fraction[..., i] for i, d in enumerate((dx, dy))]
                exists = there if zeros else torch.ones_like(there)
                self.corners.append((index, exists, weights, (2 * dx - 1, 2 * dy - 1)))

    def values(self, slope: int | None = None) -> Tensor:
        """The samples, or their derivative by x (0) or y (1)."""
        B, T, _, _, C = self.features.shape
        cells = self.features.flatten(2, 3)
        parts = []
        for index, exists, (along_x, along_y), signs in self.corners:
            flat = index.flatten(2)[..., None].expand(-1, -1, -1, C)
            value = torch.where(exists[..., None], cells.gather(2, flat).view(*index.shape, C), 0)
            weight = along_x * along_y if slope is None else signs[slope] * (along_x, along_y)[1 - slope]
            parts.append(weight[..., None] * value)
        return torch.where(self.unknown[..., None, None], torch.nan, functools.reduce(torch.add, parts))

    def add_transposed(self, grad: Tensor, grad_features: Tensor) -> None:
        """Adds grad `[B, T, N, P, C]` to the cells that were sampled; nobody knows where a NaN position was."""
        B, T, height, width, C = grad_features.shape
        total = grad_features.new_zeros(B * T * height * width, C)
        frame = torch.arange(B * T, device=grad.device).view(B, T, 1, 1) * (height * width)
        for index, exists, (along_x, along_y), _ in self.corners:
            met = exists & ~self.unknown[..., None]
            part = torch.where(met[..., None], (along_x * along_y)[..., None] * grad, 0)
            total.index_add_(0, (frame + index).flatten(), part.flatten(0, 3))
        grad_features += total.view(grad_features.shape)
