"""The residual network in front of TAPIR and LocoTrack, with the official names of its parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.nn._locotrack import SameConv2d
from tritonkern.nn._plain import input_dtype

_CHANNELS, _STRIDES = (64, 128, 256, 256), (1, 2, 2, 1)
_FRAMES = 10
"""Frames that pass the network together where no gradient is needed."""


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, projects: bool) -> None:
        super().__init__()
        if projects:
            self.proj_conv = SameConv2d(before, after, 1, stride, bias=False)
        self.bn_0, self.conv_0 = (
            nn.InstanceNorm2d(before, affine=True),
            SameConv2d(before, after, 3, stride, bias=False),
        )
        self.conv_1, self.bn_1 = SameConv2d(after, after, 3, bias=False), nn.InstanceNorm2d(after, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn_0(x))
        shortcut = self.proj_conv(y) if hasattr(self, "proj_conv") else x
        return shortcut + self.conv_1(F.relu(self.bn_1(self.conv_0(y))))


class _BlockGroup(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(before, after, stride, True), _Block(after, after, 1, False)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResNet(nn.Module):
    """`[M, 3, H, W]` -> the outputs of four groups of blocks: 64, 128, 256 and 256 channels, at a half, a quarter, an
    eighth and an eighth of the size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.initial_conv = SameConv2d(3, _CHANNELS[0], 7, 2, bias=False)
        before = (_CHANNELS[0], *_CHANNELS)
        self.block_groups = nn.ModuleList(map(_BlockGroup, before, _CHANNELS, _STRIDES))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        units = [self.initial_conv(images)]
        for group in self.block_groups:
            units.append(group(units[-1]))
        return tuple(units[1:])


def unit(features: Tensor) -> Tensor:
    """Scaled to unit norm along the last axis."""
    return features / features.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()


def frame_maps(
    resnet: ResNet, video: Tensor, choose: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Unit-norm maps `[B, T, h, w, C]` of a video `[B, T, H, W, 3]`; `choose` makes them of the outputs of `resnet`."""
    images = video.flatten(0, 1).movedim(-1, 1)
    images = images.to(input_dtype(resnet, images.dtype))
    parts = []
    for some in images.split(len(images) if torch.is_grad_enabled() else _FRAMES):
        # Adjacent channels, which every step of refinement reads in place
        parts.append([unit(grid.movedim(1, -1).contiguous()) for grid in choose(resnet(some))])
    return [torch.cat(grids).unflatten(0, video.shape[:2]) for grids in zip(*parts, strict=True)]
