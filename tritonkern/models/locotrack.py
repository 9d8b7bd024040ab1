"""LocoTrack, the tracker that refines with local 4-D correlation (Cho et al., ECCV 2024), alone or behind another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.nn._locotrack import (
    SameConv2d,
    attend_over_time,
    encode_correlation,
    match_two_maps,
    mix_over_time,
    refine,
    temporal_bias,
)
from tritonkern.nn._plain import input_dtype
from tritonkern.nn.correlation import TrackerOutput, sample_features

SIZES = {"base": (384, 6, (64, 128, 128), (3, 3, 2), (2, 2, 2)), "small": (256, 4, (64, 128), (5, 2), (4, 2))}
"""Width and heads of the attention over time; channels, kernels and strides of the encoder of correlations."""

_LAYERS, _CHANNELS, _STRIDES = 3, (64, 128, 256, 256), (1, 2, 2, 1)


class LocoTrackFeatures(NamedTuple):
    """Three unit-norm maps `[B, T, h, w, C]` of whole frames; LocoTrack's own, of frames of 256 x 256 pixels:"""

    hires: Tensor
    """[B, T, 64, 64, 128]"""
    lowres: Tensor
    """[B, T, 32, 32, 256]"""
    highest: Tensor
    """[B, T, 128, 128, 64]"""

    @classmethod
    def of(cls, grid: Tensor) -> LocoTrackFeatures:
        """The maps that another network's one map, such as `Chrono.features(video)`, makes at LocoTrack's resolutions.

        Resized bilinearly and scaled to unit norm; 64 x 64 cells stay as they are, and 32 x 32 are means of four.

        Args:
            grid: `[B, T, h, w, C]` of whole frames, floating point.

        Returns:
            Maps of 64 x 64, 32 x 32 and 128 x 128 cells and C channels: 5.25 times the memory of 64 x 64 cells.

        Raises:
            TypeError, ValueError: `grid` is something else.
        """
        _check_map("grid", grid)
        hires = _resized(grid, 64)
        return cls(hires, _resized(hires, 32), _resized(grid, 128))


class LocoTrackRefiner(nn.Module):
    """Makes the tracks of any tracker more precise, and is LocoTrack where there is none before it.

    A start, such as what Chrono returns, is improved `steps` times: the 7 x 7 surroundings of the query are correlated
    with the 7 x 7 surroundings of the point in every frame, on three maps of features, and a transformer along time
    turns the correlations into corrections. Parameters have the names of the official PyTorch code; its checkpoints
    load, and results are theirs.

    Args:
        size: "base" (11.5 M parameters) or "small" (8.2 M).
        steps: of refinement.

    Weights are random; see `from_checkpoint`.
    """

    resolution = (256, 256)
    """(height, width) of the raster that `forward` takes and that queries and tracks are measured in."""
    temperature = 20.0

    def __init__(self, size: str = "base", steps: int = 4) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        width, num_heads, channels, kernels, strides = SIZES[size]
        self.steps = steps
        self.resnet_torch = _ResNet()
        self.cmdtop = nn.ModuleList(_CorrelationEncoder(channels, kernels, strides) for _ in range(3))
        self.torch_pips_mixer = _TemporalMixer(2 + 3 * 2 * channels[-1] + 84, width, num_heads)
        self.cost_conv = SameConv2d(2, 1, 3)
        self.occ_linear = nn.Linear(6, 2)
        # As in the official code the gradient of a step ends at its guess, so none reaches the first match. Its layers
        # are frozen, because DistributedDataParallel refuses trainable parameters without a gradient.
        for layer in (self.cost_conv, self.occ_linear):
            layer.requires_grad_(steps == 0)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> LocoTrackRefiner:
        """The model of an official checkpoint of either size, in evaluation mode on the CPU.

        Args:
            path: a Lightning checkpoint of the official PyTorch code (`.ckpt`), or its tensors alone (.pth,
                .safetensors), with or without the prefix `model.`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file cannot be read, or its keys or shapes are not exactly those of the model; the message
                lists what is missing, unexpected or of another shape.
        """
        state = read_state_dict(path)
        with torch.device("meta"):
            model = cls("base" if "cmdtop.0.conv.2.0.weight" in state else "small")
        load_strict(model, state, str(path))
        return model.eval()

    def features(self, video: Tensor) -> LocoTrackFeatures:
        """The maps of a video `[B, T, 256, 256, 3]` in [-1, 1]; frames are independent of each other."""
        video = video.to(input_dtype(self.resnet_torch, video.dtype))
        batch, frames = video.shape[:2]
        units = self.resnet_torch(rearrange(video, "b t h w c -> (b t) c h w"))
        maps = (rearrange(units[i], "(b t) c h w -> b t h w c", b=batch, t=frames) for i in (1, 3, 0))
        return LocoTrackFeatures(*map(_unit, maps))

    def forward(self, video: Tensor, queries: Tensor, start: TrackerOutput | None = None) -> TrackerOutput:
        """Tracks `queries` through `video`.

        Args:
            video: `[B, T, 256, 256, 3]` floating point in [-1, 1].
            queries: `[B, N, 3]` rows (t, y, x), while files and `tritonkern.tracking` have t, x, y: frame index, then
                raster pixels (pixel i has its centre at i + 0.5).
            start: what another tracker says of these queries in this raster, such as the output of
                `tritonkern.models.Chrono`. None: the position is matched on two of the own maps first, as in LocoTrack.

        Returns:
            `TrackerOutput` for all T frames. As in the official code the visibility is that of the last step, which
            starts from the `start`'s logits.

        Raises:
            TypeError: `video` or `queries` is not floating point.
            ValueError: a shape is not the above.
        """
        height, width = self.resolution
        if not video.is_floating_point():
            raise TypeError(f"video must be floating point, got {video.dtype}")
        if video.ndim != 5 or video.shape[2:] != (height, width, 3) or video.shape[1] == 0:
            raise ValueError(f"video must be [B, T, {height}, {width}, 3] with T >= 1, got {list(video.shape)}")
        _check_queries(queries, start, video.shape[:2])
        return self.refine(self.features(video), queries, start)

    def refine(self, features: Sequence[Tensor], queries: Tensor, start: TrackerOutput | None = None) -> TrackerOutput:
        """As `forward`, of features that are already computed, by this network or by another.

        ::

            grid = chrono.features(video)
            better = refiner.refine(LocoTrackFeatures.of(grid), queries, chrono.track(grid, queries))

        Only correlations enter the network, so that any maps will do, of any numbers of cells and channels; but weights
        fit the features that they were trained on. Those of the official checkpoints are LocoTrack's own: on other
        features the refiner must be trained. Gradients reach the features.

        Args:
            features: three maps `[B, T, h, w, C]` of unit norm along C (which is not checked), each of the whole frames
                and in LocoTrack's order: `LocoTrackFeatures`, or any other sequence.
            queries, start: as in `forward`, in pixels of the 256 x 256 raster, whatever the sizes of the maps. Without
                a start the position is matched on the first two maps, of which the second is the coarse one.

        Raises:
            TypeError: `features` is one tensor, or a map or `queries` is not floating point.
            ValueError: a shape is not the above.
        """
        if isinstance(features, Tensor):
            raise TypeError("features must be three maps, got one tensor; use LocoTrackFeatures.of(features)")
        if len(features) != len(self.cmdtop):
            raise ValueError(f"features must be {len(self.cmdtop)} maps [B, T, h, w, C], got {len(features)}")
        for index, grid in enumerate(features):
            _check_map(f"features[{index}]", grid)
            if grid.shape[:2] != features[0].shape[:2]:
                raise ValueError(
                    f"features[{index}] must have B and T of features[0], {list(features[0].shape[:2])}, "
                    f"got {list(grid.shape[:2])}"
                )
        _check_queries(queries, start, features[0].shape[:2])

        supports = [self._supports(grid, queries) for grid in features]
        if start is None:
            fine, coarse = features[:2]
            if any(few > many for few, many in zip(coarse.shape[2:4], fine.shape[2:4], strict=True)):
                raise ValueError(
                    "without start, features[1] must be the coarser map, of no more cells than features[0], "
                    f"{list(fine.shape[2:4])}, got {list(coarse.shape[2:4])}"
                )
            fine_query, query = (support[:, :, 3, 3] for support in supports[:2])
            head = (self.cost_conv, self.occ_linear, self.temperature, self.resolution)
            start, _ = match_two_maps(query, coarse, *head, fine_query, fine, queries)
        guess = start
        for _ in range(self.steps):
            guess = TrackerOutput(*(x.detach() for x in guess))
            guess = refine(
                self.cmdtop, self.torch_pips_mixer, features, supports, guess, self.resolution, self.resolution
            )
        return guess

    def _supports(self, features: Tensor, queries: Tensor) -> Tensor:
        """`[B, N, 7, 7, C]` (y, x) around the queries."""
        rows, columns = features.shape[2:4]
        t, y, x = queries.to(torch.promote_types(features.dtype, torch.float32)).unbind(-1)
        offset = torch.arange(-3, 4, device=queries.device)
        y = (y * (rows / self.resolution[0]))[..., None, None] + offset[:, None]
        x = (x * (columns / self.resolution[1]))[..., None, None] + offset
        y, x, t = torch.broadcast_tensors(y, x, t[..., None, None])
        supports = sample_features(features, *(place.flatten(1) for place in (t, y, x)))
        return supports.to(features.dtype).unflatten(1, (-1, 7, 7))


def _unit(features: Tensor) -> Tensor:
    return features / features.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()


def _resized(grid: Tensor, cells: int) -> Tensor:
    """`[B, T, cells, cells, C]` of unit norm."""
    if grid.shape[2:4] == (cells, cells):
        return _unit(grid)
    images = rearrange(grid, "b t h w c -> (b t) c h w")
    resized = F.interpolate(images, size=(cells, cells), mode="bilinear", align_corners=False)
    return _unit(rearrange(resized, "(b t) c h w -> b t h w c", b=grid.shape[0], t=grid.shape[1]))


def _check_map(name: str, grid: Tensor) -> None:
    """Raise TypeError or ValueError unless it is a map of features."""
    if not isinstance(grid, Tensor) or not grid.is_floating_point():
        what = grid.dtype if isinstance(grid, Tensor) else type(grid).__name__
        raise TypeError(f"{name} must be floating point, got {what}")
    if grid.ndim != 5 or 0 in grid.shape[1:]:
        raise ValueError(
            f"{name} must be [B, T, h, w, C] with at least one frame, cell and channel, got {list(grid.shape)}"
        )


def _check_queries(queries: Tensor, start: TrackerOutput | None, clip: Sequence[int]) -> None:
    """Raise TypeError or ValueError unless both are of a clip of (B, T)."""
    if not queries.is_floating_point():
        raise TypeError(f"queries must be floating point, got {queries.dtype}")
    batch, frames = clip
    if queries.ndim != 3 or queries.shape[2] != 3 or queries.shape[0] != batch:
        raise ValueError(f"queries must be [{batch}, N, 3] with rows (t, y, x), got {list(queries.shape)}")
    expected = [*queries.shape[:2], frames, 2]
    if start is not None and list(start.tracks.shape) != expected:
        raise ValueError(f"start.tracks must be {expected}, got {list(start.tracks.shape)}")


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


class _ResNet(nn.Module):
    """`[M, 3, H, W]` -> the outputs of four groups of blocks, at half to an eighth of the size."""

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


class _CorrelationEncoder(nn.Module):
    def __init__(self, channels: tuple[int, ...], kernels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        layers = zip((49, *channels), channels, kernels, strides, strict=False)
        self.conv = nn.ModuleList(
            nn.Sequential(SameConv2d(before, after, kernel, stride), nn.GroupNorm(after // 16, after), nn.ReLU())
            for before, after, kernel, stride in layers
        )

    def forward(self, correlation: Tensor) -> Tensor:
        return encode_correlation(self.conv, correlation.to(input_dtype(self, correlation.dtype)))


class _TemporalAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_proj, self.key_proj, self.value_proj, self.final_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        projections = (self.query_proj(x), self.key_proj(x), self.value_proj(x))
        return self.final_proj(attend_over_time(*projections, bias))


class _TemporalTransformer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": _TemporalAttention(width),
                    "dense": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                    "layer_norm1": nn.LayerNorm(width),
                    "layer_norm2": nn.LayerNorm(width),
                }
            )
            for _ in range(_LAYERS)
        )
        self.ln_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        bias = temporal_bias(self.num_heads, x.shape[1], x.device)
        for layer in self.layers:
            x = x + layer["attn"](layer["layer_norm1"](x), bias)  # type: ignore[index]
            x = x + layer["dense"](layer["layer_norm2"](x))  # type: ignore[index]
        return self.ln_out(x)


class _TemporalMixer(nn.Module):
    """`[M, T, C]` -> `[M, T, 4]`; the last 384 outputs are not computed, as nothing reads them in the official code."""

    def __init__(self, channels: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.transformer = _TemporalTransformer(width, num_heads)
        self.input_proj, self.output_proj = nn.Linear(channels, width), nn.Linear(width, 4 + 128 + 256)

    def forward(self, series: Tensor) -> Tensor:
        return mix_over_time(self, series.to(input_dtype(self, series.dtype)))
