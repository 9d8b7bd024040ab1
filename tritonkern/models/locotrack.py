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
from tritonkern.models.chrono import Chrono
from tritonkern.models.resnet import ResNet, frame_maps, unit
from tritonkern.models.tracker import Tracker
from tritonkern.nn._inputs import check_inputs
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
from tritonkern.nn.correlation import TrackerOutput, check_queries, sample_features

SIZES = {"base": (384, 6, (64, 128, 128), (3, 3, 2), (2, 2, 2)), "small": (256, 4, (64, 128), (5, 2), (4, 2))}
"""Width and heads of the attention over time; channels, kernels and strides of the encoder of correlations."""

_LAYERS = 3
_POSITIONS = 8192
"""Points times frames that are refined together, with 40 KB each."""


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


class LocoTrackRefiner(Tracker):
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
    context, span = 0, 64
    temperature = 20.0

    def __init__(self, size: str = "base", steps: int = 4) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        width, num_heads, channels, kernels, strides = SIZES[size]
        self.steps = steps
        self.resnet_torch = ResNet()
        self.cmdtop = nn.ModuleList(_CorrelationEncoder(channels, kernels, strides) for _ in range(3))
        self.torch_pips_mixer = _TemporalMixer(2 + 3 * 2 * channels[-1] + 84, width, num_heads)
        self.cost_conv = SameConv2d(2, 1, 3)
        self.occ_linear = nn.Linear(6, 2)
        # As in the official code the gradient of a step ends at its guess, so none reaches the first match. Its layers
        # are frozen, because DistributedDataParallel refuses trainable parameters without a gradient.
        for layer in (self.cost_conv, self.occ_linear):
            layer.requires_grad_(steps == 0)

    @classmethod
    def from_checkpoint(cls, path: str | Path, size: str | None = None) -> LocoTrackRefiner:
        """The model of an official checkpoint, in evaluation mode on the CPU.

        Args:
            path: a Lightning checkpoint of the official PyTorch code (`.ckpt`), or its tensors alone (.pth,
                .safetensors), with or without the prefix `model.`.
            size: "base" or "small"; None infers it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file cannot be read, or its keys or shapes are not exactly those of the model; the message
                lists what is missing, unexpected or of another shape.
        """
        state = read_state_dict(path)
        with torch.device("meta"):
            model = cls(size or ("base" if "cmdtop.0.conv.2.0.weight" in state else "small"))
        load_strict(model, state, str(path))
        return model.eval()

    def features(self, video: Tensor) -> LocoTrackFeatures:
        """The maps of a video `[B, T, 256, 256, 3]` in [-1, 1]; frames are independent of each other."""
        return LocoTrackFeatures(*frame_maps(self.resnet_torch, video, lambda units: (units[1], units[3], units[0])))

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
        if start is not None:
            self.check_video(video)
            _check_queries(queries, start, video.shape[:2])
            return self.refine(self.features(video), queries, start)
        return super().forward(video, queries)

    def track(self, features: Sequence[Tensor], queries: Tensor) -> TrackerOutput:
        """LocoTrack: `refine` without a start, some queries at a time where no gradient is needed."""
        return self._in_parts(features, queries, None)

    def _in_parts(self, features: Sequence[Tensor], queries: Tensor, start: TrackerOutput | None) -> TrackerOutput:
        frames, points = features[0].shape[1], queries.shape[1]
        few = max(1, points) if torch.is_grad_enabled() else max(1, _POSITIONS // frames)
        parts = []
        for first in range(0, max(points, 1), few):
            rows = slice(first, first + few)
            given = None if start is None else TrackerOutput(*(x[:, rows] for x in start))
            parts.append(self.refine(features, queries[:, rows], given))
        return TrackerOutput(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

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
            check_inputs(self, **{f"features[{index}]": grid})
            _check_map(f"features[{index}]", grid)
            if grid.shape[:2] != features[0].shape[:2]:
                raise ValueError(
                    f"features[{index}] must have B and T of features[0], {list(features[0].shape[:2])}, "
                    f"got {list(grid.shape[:2])}"
                )
        check_inputs(self, queries=queries)
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
        t, y, x = (place.flatten(1) for place in (t, y, x))
        supports = sample_features(features, t, y, x, features.dtype)
        return supports.unflatten(1, (-1, 7, 7))


class ChronoLocoTrack(Tracker):
    """Chrono, whose tracks LocoTrack refines on features of its own.

    The parts are published; weights of a refiner that was trained on Chrono's features are not.

    Args:
        chrono: makes the start.
        refiner: improves it.
    """

    resolution = (256, 256)
    span = 64

    def __init__(self, chrono: Chrono, refiner: LocoTrackRefiner) -> None:
        super().__init__()
        self.chrono, self.refiner = chrono, refiner

    @classmethod
    def from_checkpoints(cls, chrono: str | Path, locotrack: str | Path) -> ChronoLocoTrack:
        """Of official checkpoints of any sizes, as `Chrono.from_checkpoint` and `LocoTrackRefiner.from_checkpoint`."""
        return cls(Chrono.from_checkpoint(chrono), LocoTrackRefiner.from_checkpoint(locotrack)).eval()

    def features(self, video: Tensor) -> tuple[Tensor, ...]:
        """Chrono's `[B, T, 64, 64, C]`, then the three maps of LocoTrack."""
        return (self.chrono.features(video), *self.refiner.features(video))

    def track(self, features: Sequence[Tensor], queries: Tensor) -> TrackerOutput:
        """`features` as the method of this name returns them."""
        return self.refiner._in_parts(features[1:], queries, self.chrono.track(features[0], queries))


def _resized(grid: Tensor, cells: int) -> Tensor:
    """`[B, T, cells, cells, C]` of unit norm."""
    if grid.shape[2:4] == (cells, cells):
        return unit(grid)
    images = rearrange(grid, "b t h w c -> (b t) c h w")
    resized = F.interpolate(images, size=(cells, cells), mode="bilinear", align_corners=False)
    return unit(rearrange(resized, "(b t) c h w -> b t h w c", b=grid.shape[0], t=grid.shape[1]))


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
    batch, frames = clip
    check_queries(queries, batch)
    expected = [*queries.shape[:2], frames, 2]
    if start is not None and list(start.tracks.shape) != expected:
        raise ValueError(f"start.tracks must be {expected}, got {list(start.tracks.shape)}")


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
