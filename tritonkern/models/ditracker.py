"""DiTracker: points tracked by the matching cost of a video diffusion transformer, refined as CoTracker3 does.

"Repurposing Video Diffusion Transformers for Robust Point Tracking". Written from a description of the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.functional import local_correlation, local_correlation_linear
from tritonkern.models._ditracker import (
    STRIDE,
    FrameNetwork,
    Perceptron,
    UpdateFormer,
    motion_code,
    resized_table,
    time_table,
)
from tritonkern.models.tracker import Tracker
from tritonkern.nn._inputs import check_inputs
from tritonkern.nn._plain import input_dtype, is_plain
from tritonkern.nn.correlation import TrackerOutput, check_queries, sample_features

Pair = tuple[Tensor, Tensor]
Layers = Tensor | Sequence[Tensor]
"""Maps `[B, T, h, w, C]` of one layer, or of several, whose matching costs are averaged."""

_POSITIONS = 8192
"""Points times frames that are refined together where no gradient is needed, but at least `_TOGETHER` points."""
_TOGETHER = 32
_FLOOR = 1e-12
# Logit of the distance that leaves all of the confidence to the other logit.
_NEAR = -30.0


class Evidence(NamedTuple):
    """What the iterations read of one network at every level: maps `[B, T, h, w, C]` and supports `[B, N, S, C]`."""

    maps: list[Tensor]
    supports: list[Tensor]


class DiTrackerHead(nn.Module):
    """Refines tracks that start where their queries are, by local 4-D matching costs at four scales.

    For a point n, a frame t and a scale i, with queries Q around the point in its own frame and keys K around its
    present position, (2 radius + 1)^2 of each::

        V[p, s] = softmax over p of <K[p], Q[s]> / sqrt(C)
        cost    = fc2(gelu(fc1(V of the transformer | V of a small convolutional network)))

    The costs of all scales, the motion and the present logits make a token per point and frame; a transformer over time
    and points turns tokens into steps. Positions are detached at the start of each iteration. With the default sizes
    the parameters are those of the published checkpoint.

    Args:
        resolution: (height, width) in pixels of the frames and of queries and tracks, both multiples of 4.
        channels: of the convolutional network's map.
        fuse: how the two costs are combined. "concat": side by side; "add": their mean; None: there is no network.
        cost: of the network. "softmax" as above; "cosine": dot products of vectors of unit norm.
        radius: of the windows, in cells.
        levels: number of scales, each half as fine as the one before.
        cost_dims: widths of fc1 and fc2.
        dim, num_heads, rounds, virtual_tracks: of the transformer over time and points.
        frames: of the table of times, which is resized linearly to clips of another length.

    Weights are random.
    """

    time_emb: Tensor

    def __init__(
        self,
        resolution: tuple[int, int] = (480, 720),
        channels: int = 64,
        *,
        fuse: str | None = "concat",
        cost: str = "softmax",
        radius: int = 3,
        levels: int = 4,
        cost_dims: tuple[int, int] = (384, 256),
        dim: int = 384,
        num_heads: int = 8,
        rounds: int = 3,
        virtual_tracks: int = 64,
        frames: int = 60,
    ) -> None:
        super().__init__()
        if fuse not in ("concat", "add", None):
            raise ValueError(f'fuse must be "concat", "add" or None, got {fuse!r}')
        if cost not in ("softmax", "cosine"):
            raise ValueError(f'cost must be "softmax" or "cosine", got {cost!r}')
        if any(side % STRIDE or side < STRIDE << (levels - 1) for side in resolution):
            raise ValueError(
                f"resolution must be multiples of {STRIDE}, at least {STRIDE << (levels - 1)} for {levels} levels, "
                f"got {resolution}"
            )
        self.resolution, self.fuse, self.cost = resolution, fuse, cost
        self.radius, self.levels, self.cells = radius, levels, (2 * radius + 1) ** 2
        self.fnet = FrameNetwork(channels) if fuse is not None else None
        tokens = 2 + levels * cost_dims[1] + 84
        self.updateformer = UpdateFormer(tokens, dim, num_heads, rounds, virtual_tracks)
        self.corr_mlp = Perceptron(self.cells**2 * (2 if fuse == "concat" else 1), *cost_dims, "none")
        self.register_buffer("time_emb", time_table(frames, tokens))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the finest map."""
        return self.resolution[0] // STRIDE, self.resolution[1] // STRIDE

    def forward(
        self, query_maps: Layers, key_maps: Layers, video: Tensor, queries: Tensor, iterations: int = 6
    ) -> TrackerOutput:
        """Tracks `queries`.

        Args:
            query_maps, key_maps: `[B, T, h, w, C]`, queries and keys of a layer of a video transformer, of whole frames
                and any number of cells; or a sequence of such maps, one per layer.
            video: `[B, T, H, W, 3]` in [-1, 1], (H, W) equal to `resolution`.
            queries: `[B, N, 3]` rows (t, y, x): frame index, then pixels of `resolution` (pixel i has its centre at
                i + 0.5).
            iterations: at least 1.

        Returns:
            `TrackerOutput` in pixels of `resolution`.

        Raises:
            TypeError: an input is not floating point.
            ValueError: a shape is not the above, or `iterations` below 1.
        """
        check_inputs(self, video=video, queries=queries)
        if video.ndim != 5 or video.shape[2:] != (*self.resolution, 3):
            raise ValueError(
                f"video must be [B, T, {self.resolution[0]}, {self.resolution[1]}, 3], got {list(video.shape)}"
            )
        self._check_maps(query_maps, key_maps, video.shape[:2])
        check_queries(queries, len(video))
        _check_places(queries, video.shape[1])
        return self.refine(query_maps, key_maps, self.network_maps(video), queries, iterations)[-1]

    def network_maps(self, video: Tensor) -> Tensor | None:
        """The convolutional network's map `[B, T, H / 4, W / 4, C]` of a video as in `forward`; None without it."""
        if self.fnet is None:
            return None
        images = rearrange((video + 1) / 2, "b t h w c -> (b t) c h w").to(input_dtype(self.fnet, video.dtype))
        # Frame by frame where no gradient is needed: the network works at half of the resolution inside.
        parts = [images] if torch.is_grad_enabled() else images.split(4)
        maps = torch.cat([self.fnet(part).contiguous(memory_format=torch.channels_last) for part in parts])
        return rearrange(maps, "(b t) c h w -> b t h w c", b=len(video))

    def refine(
        self,
        query_maps: Layers,
        key_maps: Layers,
        network_maps: Tensor | None,
        queries: Tensor,
        iterations: int = 6,
    ) -> list[TrackerOutput]:
        """The result of every iteration, with `network_maps` of the method of this name, otherwise as `forward`."""
        if iterations < 1:
            raise ValueError(f"iterations must be 1 or more, got {iterations}")
        if (network_maps is None) != (self.fuse is None):
            raise ValueError(
                f"network_maps must be {'None' if self.fuse is None else 'those of the network'}, as fuse is "
                f"{self.fuse!r}"
            )
        check_queries(queries, len(queries))
        query_layers, key_layers = _layers(query_maps), _layers(key_maps)
        frames = key_layers[0].shape[1]
        queries = queries.to(torch.promote_types(input_dtype(self, queries.dtype), torch.float32))
        evidence = [self._evidence(*pair, queries) for pair in zip(query_layers, key_layers, strict=True)]
        if network_maps is not None:
            evidence.append(self._evidence(network_maps, network_maps, queries))
        # In cells of the finest map, whose centres are at whole numbers, as published.
        positions = ((queries[..., 1:].flip(-1) - 0.5) / STRIDE)[:, None].expand(-1, frames, -1, -1)
        logits = positions.new_zeros(*positions.shape[:-1], 2)
        table = resized_table(self.time_emb, frames)[:, None].to(positions.dtype)
        results = []
        for _ in range(iterations):
            positions = positions.detach()
            costs = [self._cost(level, evidence, positions) for level in range(self.levels)]
            motion = motion_code(positions, (self.grid[1], self.grid[0]))
            tokens = torch.cat([logits, *(cost.to(positions.dtype) for cost in costs), motion], -1)
            update = self.updateformer(rearrange(tokens, "b t n c -> b n t c") + table).to(positions.dtype)
            step, change = rearrange(update, "b n t c -> b t n c").split(2, -1)
            positions, logits = positions + step, logits + change
            visible, certain = (-logits.transpose(1, 2)).unbind(-1)
            results.append(TrackerOutput(STRIDE * positions.transpose(1, 2) + 0.5, visible, certain))
        return results

    def _evidence(self, query_maps: Tensor, key_maps: Tensor, queries: Tensor) -> Evidence:
        dtype = input_dtype(self.corr_mlp, key_maps.dtype)
        keys = self._pyramid(key_maps.to(dtype))
        own = keys if query_maps is key_maps else self._pyramid(query_maps.to(dtype))
        return Evidence(keys, [self._support(maps, queries, level) for level, maps in enumerate(own)])

    def _pyramid(self, maps: Tensor) -> list[Tensor]:
        """`[B, T, h, w, C]` at each scale: cells of 4 pixels, then means of 2 x 2, which drop an odd last column."""
        images = rearrange(maps, "b t h w c -> (b t) c h w")
        if images.shape[-2:] != self.grid:
            images = F.interpolate(images, self.grid, mode="bilinear", align_corners=False)
        levels = [images]
        for _ in range(1, self.levels):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return [rearrange(level, "(b t) c h w -> b t h w c", b=len(maps)) for level in levels]

    def _support(self, maps: Tensor, queries: Tensor, level: int) -> Tensor:
        """`[B, N, (2 radius + 1)^2, C]`, x before y, around the queries in their own frames."""
        t, y, x = queries.unbind(-1)
        offset = torch.arange(-self.radius, self.radius + 1, device=queries.device)
        x, y = (((place - 0.5) / (STRIDE << level))[..., None, None] + 0.5 for place in (x, y))
        x, y, t = torch.broadcast_tensors(x + offset[:, None], y + offset, t.round()[..., None, None])
        samples = sample_features(maps, t.flatten(1), y.flatten(1), x.flatten(1), maps.dtype)
        return samples.unflatten(1, (-1, self.cells))

    def _cost(self, level: int, evidence: Sequence[Evidence], positions: Tensor) -> Tensor:
        """`[B, T, N, cost_dims[1]]`."""
        coords = positions / 2**level
        pairs = [(x.maps[level], x.supports[level]) for x in evidence]
        network = pairs.pop() if self.fuse is not None else None
        if is_plain(self.corr_mlp, Perceptron) and is_plain(self.corr_mlp.fc1, nn.Linear):
            return self.corr_mlp.after_first(self._first_layer(pairs, network, coords))
        return self.corr_mlp(self._volume(pairs, network, coords))

    def _first_layer(self, pairs: list[Pair], network: Pair | None, coords: Tensor) -> Tensor:
        """`fc1(self._volume(...))`, of which nothing else is stored."""
        weight, bias = self.corr_mlp.fc1.weight, self.corr_mlp.fc1.bias
        own, other = weight.chunk(2, 1) if self.fuse == "concat" else (weight, weight)
        share = 1 / len(pairs) / (2 if self.fuse == "add" else 1)
        weights = [own if share == 1 else own * share] * len(pairs)
        if network is not None and self.cost == "softmax":
            pairs, weights = [*pairs, network], [*weights, other if self.fuse == "concat" else other / 2]
        maps, supports = zip(*pairs, strict=True)
        joined = weight if len(pairs) == 2 and self.fuse == "concat" and share == 1 else torch.cat(weights, 1)
        hidden = local_correlation_linear(maps, supports, coords, joined, bias, **self._window, softmax=True)
        if network is not None and self.cost == "cosine":
            cosine = F.linear(_cosine(*network, coords, self.radius), other)
            hidden = hidden + (cosine if self.fuse == "concat" else cosine / 2)
        return hidden

    def _volume(self, pairs: list[Pair], network: Pair | None, coords: Tensor) -> Tensor:
        """What fc1 reads, `[B, T, N, cells^2]` or twice as many."""

        def matched(maps: Tensor, support: Tensor) -> Tensor:
            return local_correlation(maps, support, coords, **self._window, softmax=True).flatten(-2)

        volume = torch.stack([matched(*pair) for pair in pairs]).mean(0)
        if network is None:
            return volume
        other = matched(*network) if self.cost == "softmax" else _cosine(*network, coords, self.radius)
        return torch.cat([volume, other], -1) if self.fuse == "concat" else (volume + other) / 2

    @property
    def _window(self) -> dict[str, Any]:
        """As published: x before y, centres of cells at whole numbers, the border repeated."""
        return dict(radius=self.radius, padding="border", align_corners=True, axis_order="xy")

    def _check_maps(self, query_maps: Layers, key_maps: Layers, clip: Sequence[int]) -> None:
        query_layers, key_layers = _layers(query_maps), _layers(key_maps)
        if len(query_layers) != len(key_layers) or not key_layers:
            raise ValueError(
                f"query_maps and key_maps must be of the same layers, got {len(query_layers)} and {len(key_layers)}"
            )
        for name, layers in (("query_maps", query_layers), ("key_maps", key_layers)):
            for maps, other in zip(layers, key_layers, strict=True):
                check_inputs(self, **{name: maps})
                if maps.ndim != 5 or maps.shape[:2] != tuple(clip) or 0 in maps.shape or maps.shape != other.shape:
                    raise ValueError(
                        f"{name} must be [{clip[0]}, {clip[1]}, h, w, C] as the video has frames, queries of the shape "
                        f"of keys, got {list(maps.shape)}, key_maps {list(other.shape)}"
                    )


def _layers(maps: Layers) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps)


def _cosine(maps: Tensor, support: Tensor, coords: Tensor, radius: int) -> Tensor:
    """`[B, T, N, P S]`: cosines of samples and supports. Samples are normalised, which is not a property of the map."""
    batch, frames = coords.shape[:2]
    offset = torch.arange(-radius, radius + 1, device=coords.device)
    x, y = torch.broadcast_tensors(coords[..., :1, None] + offset[:, None] + 0.5, coords[..., 1:, None] + offset + 0.5)
    x, y = (place.flatten(0, 1).flatten(1) for place in (x, y))
    samples = sample_features(maps.flatten(0, 1)[:, None], torch.zeros_like(x), y, x, maps.dtype)
    samples = samples.unflatten(0, (batch, frames)).unflatten(2, (coords.shape[2], -1))
    return torch.einsum("btnpc,bnsc->btnps", _unit(samples), _unit(support)).flatten(-2)


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).clamp(min=_FLOOR).sqrt()


def _check_places(queries: Tensor, frames: int) -> None:
    """Raise ValueError unless queries are finite and in a frame of the clip. Outside of the frame they read its border.

    A query that is not finite would spoil the tracks of all others.
    """
    if torch.compiler.is_compiling() or queries.numel() == 0:
        return
    if not queries.isfinite().all():
        raise ValueError("queries must be finite, got NaN or infinity")
    t = queries[..., 0]
    outside = t[(t < 0) | (t > frames - 1)]
    if outside.numel():
        raise ValueError(f"queries must have t from 0 to {frames - 1}, got {outside[0].item():g}")


def _shifted(output: TrackerOutput, threshold: float) -> TrackerOutput:
    """The same with a confidence that is 0.5 where it was `threshold`; its logit is shifted."""
    both = F.logsigmoid(-output.occlusion) + F.logsigmoid(-output.expected_distance)
    # Of p: log p - log (1 - p).
    logit = both - torch.log(-torch.expm1(both.clamp(max=-1e-7)))
    occlusion = math.log(threshold / (1 - threshold)) - logit
    return TrackerOutput(output.tracks, occlusion, torch.full_like(occlusion, _NEAR))


class DiTracker(Tracker):
    """`DiTrackerHead` behind an encoder.

    `features(video)`: `[B, T, H, W, 3]` in [-1, 1] -> queries and keys of the encoder and the map of the head's
    network, each `[B, T, h, w, C]`. They serve any number of queries.

    Args:
        encoder: returns query maps and key maps, `[B, T, h, w, C]` each, of a video `[B, T, h', w', 3]` in [-1, 1] at
            the resolution of the head.
        head: as above.
        resolution: (height, width) of the raster of video, queries and tracks; None for that of the head. Frames are
            resized.
        iterations: of the head.
        support: points per side of a grid of the first frame that are tracked beside every group of queries; published
            is 5. Their tracks are dropped.
        threshold: of the product of visibility and confidence, from which on a point is visible; published is 0.6.
            `TrackerOutput.confidence` is 0.5 there.
    """

    # Features depend on the first frame and on the frames that the encoder takes together.
    context, span = 1, 60

    def __init__(
        self,
        encoder: nn.Module,
        head: DiTrackerHead,
        resolution: tuple[int, int] | None = None,
        iterations: int = 6,
        *,
        support: int = 0,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        if support < 0:
            raise ValueError(f"support must be 0 or more, got {support}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
        self.encoder, self.head, self.iterations = encoder, head, iterations
        self.support, self.threshold = support, threshold
        self.resolution = head.resolution if resolution is None else resolution

    @classmethod
    def from_folder(cls, folder: str | Path, *, official: bool = False, merge: bool = False) -> DiTracker:
        """The published weights on CogVideoX-2B, in float32 and in evaluation mode on the CPU, at 480 x 720 pixels.

        Args:
            folder: with ``model.pth`` and ``pytorch_lora_weights.safetensors``. The one of CogVideoX-2B, as diffusers
                writes it, is the same, or ``CogVideoX-2b`` in it or beside it, or named in its ``ditracker.json``:
                ``{"cogvideox": "PATH"}``.
            official: latents as in the published evaluation: drawn from the posterior (seed 0), of tiles of the frames.
            merge: adapters are merged into the weights, for inference; otherwise they can be trained.

        Raises:
            FileNotFoundError: a file or folder does not exist.
            ModuleNotFoundError: diffusers is not installed.
            ValueError: a file is damaged, names or shapes are not those of the published model, or the transformer is
                another one; the message lists what is missing, unexpected or of another shape.
        """
        from tritonkern.models.ditracker_folder import read_ditracker

        encoder, head = read_ditracker(Path(folder), official, merge)
        return cls(encoder, head, support=5, threshold=0.6).eval()

    def encode(self, video: Tensor) -> tuple[Tensor, ...]:
        """`features` of a video that is checked first, for `track` with any queries."""
        self.check_video(video)
        return self.features(video)

    def features(self, video: Tensor) -> tuple[Tensor, ...]:
        """Query maps, key maps, and the map of the head's network if it has one."""
        frames = rearrange(video, "b t h w c -> (b t) c h w")
        if frames.shape[-2:] != self.head.resolution:
            frames = F.interpolate(frames, self.head.resolution, mode="bilinear", antialias=True, align_corners=False)
        video = rearrange(frames, "(b t) c h w -> b t h w c", b=len(video))
        network = self.head.network_maps(video)
        return (*self.encoder(video), *(() if network is None else (network,)))

    def track(self, features: Sequence[Tensor], queries: Tensor) -> TrackerOutput:
        """Tracks of `queries` `[B, N, 3]` (t, y, x), of `features` as the method of this name returns them.

        Points of one call help each other. Without gradients, many points are tracked in groups.
        """
        _check_places(queries, features[0].shape[1])
        few = queries.shape[1]
        if not torch.is_grad_enabled():
            few = max(_TOGETHER, _POSITIONS // features[0].shape[1])
        grid = self._grid().to(queries).expand(len(queries), -1, -1)
        parts = []
        for part in queries.split(max(1, few), 1):
            output = self.refine(features, torch.cat([part, grid], 1))[-1]
            parts.append(TrackerOutput(*(x[:, : part.shape[1]] for x in output)))
        output = TrackerOutput(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))
        return output if self.threshold == 0.5 else _shifted(output, self.threshold)

    def _grid(self) -> Tensor:
        """The points `[1, support^2, 3]` (t, y, x) beside the queries, as far from the borders as published."""
        margin = self.resolution[1] / 64
        y, x = (torch.linspace(margin, side - margin, self.support) + 0.5 for side in self.resolution)
        return torch.cartesian_prod(torch.zeros(1), y, x).view(1, -1, 3)

    def refine(self, features: Sequence[Tensor], queries: Tensor) -> list[TrackerOutput]:
        """The result of every iteration, all points together."""
        query_maps, key_maps, *network = features
        (height, width), (rows, columns) = self.head.resolution, self.resolution
        size = queries.new_tensor([width / columns, height / rows])
        inside = torch.cat([queries[..., :1], queries[..., 1:] * size.flip(-1)], -1)
        steps = self.head.refine(query_maps, key_maps, network[0] if network else None, inside, self.iterations)
        return [step._replace(tracks=step.tracks / size) for step in steps]
