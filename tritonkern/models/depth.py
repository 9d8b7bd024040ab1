"""Depth from single images: DINOv2 with the head of DPT (Ranftl et al., ICCV 2021), as in Depth Anything V2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.models.dinov2 import DINOv2, DINOv2Config


class ResidualConvUnit(nn.Module):
    """Two convolutions around a skip, `[N, C, h, w]` to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class FusionBlock(nn.Module):
    """Adds a finer level to a coarser path and enlarges the sum.

    `coarsest`: whether there is no path yet. `resConfUnit1` is then unused and in official state dicts all the same; it
    is frozen, because DistributedDataParallel refuses trainable parameters that no gradient reaches.
    """

    def __init__(self, channels: int, coarsest: bool) -> None:
        super().__init__()
        self.resConfUnit1 = ResidualConvUnit(channels).requires_grad_(not coarsest)
        self.resConfUnit2 = ResidualConvUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, path: Tensor, level: Tensor | None, size: Sequence[int]) -> Tensor:
        x = path if level is None else path + self.resConfUnit1(level)
        x = F.interpolate(self.resConfUnit2(x), size=tuple(size), mode="bilinear", align_corners=True)
        return self.out_conv(x)


class Fusion(nn.Module):
    """Four feature maps, fine to coarse, become one picture; the part of the head that is called `scratch`."""

    def __init__(self, features: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(count, features, 3, padding=1, bias=False) for count in channels
        )
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = (
            FusionBlock(features, coarsest=level == 4) for level in (1, 2, 3, 4)
        )
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1), nn.ReLU(), nn.Identity()
        )

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        layers = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        one, two, three, four = (layer(x) for layer, x in zip(layers, maps, strict=True))
        path = self.refinenet4(four, None, three.shape[2:])
        path = self.refinenet3(path, three, two.shape[2:])
        path = self.refinenet2(path, two, one.shape[2:])
        path = self.refinenet1(path, one, [2 * side for side in one.shape[2:]])
        x = F.interpolate(self.output_conv1(path), size=tuple(size), mode="bilinear", align_corners=True)
        return self.output_conv2(x)[:, 0]


class DPTHead(nn.Module):
    """Four levels of patch tokens become a picture. Parameters are those of Depth Anything's `depth_head`.

    Args:
        dim: channels of the tokens.
        features: channels of the fused path.
        channels: channels of the four levels, fine to coarse.
    """

    def __init__(self, dim: int, features: int, channels: Sequence[int]) -> None:
        super().__init__()
        first, second, _, fourth = channels
        self.projects = nn.ModuleList(nn.Conv2d(dim, count, 1) for count in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(fourth, fourth, 3, stride=2, padding=1),
            ]
        )
        self.scratch = Fusion(features, channels)

    def forward(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Four token maps `[N, dim, h, w]`, shallow to deep, -> `[N, *size]`, not negative."""
        layers = zip(levels, self.projects, self.resize_layers, strict=True)
        return self.scratch([resize(project(level)) for level, project, resize in layers], size)


class DepthModel(nn.Module):
    """Relative inverse depth of images. Parameter names are those of Depth Anything V2 (`pretrained`, `depth_head`).

    Args:
        config: the backbone, a name of `DINOV2_CONFIGS` or a `DINOv2Config`.
        features: channels of the head's fused path.
        channels: channels of its four levels.
        levels: the blocks whose outputs they read, shallow to deep; None takes the last of each quarter, as published
            for "vits14" and "vitb14".

    Weights are random.
    """

    def __init__(
        self,
        config: str | DINOv2Config = "vits14",
        features: int = 64,
        channels: Sequence[int] = (48, 96, 192, 384),
        levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = DINOv2(config)
        depth = self.pretrained.config.depth
        self.levels = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)] if levels is None else list(levels)
        self.depth_head = DPTHead(self.pretrained.config.dim, features, channels)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, 3, H, W]`, ImageNet-normalised, sides multiples of the patch size, -> inverse depth `[N, H, W]`.

        Raises:
            ValueError: bad image size.
        """
        levels = partial(self.pretrained.get_intermediate_layers, n=self.levels, reshape=True)
        tokens = self.pretrained.with_hooks(levels, images)
        return self.depth_head(tokens, images.shape[2:])
