"""DiffTrack: points tracked by the queries and keys of a video diffusion transformer, which saw no tracks in training.

Nam et al., "Emergent Temporal Correspondences from Video Diffusion Transformers", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tritonkern.functional import query_key_cost, query_key_matching
from tritonkern.models._cells import Corners, locate
from tritonkern.models._latents import encode_together
from tritonkern.models.cogvideox import CogVideoX
from tritonkern.models.difftrack_folder import read_folder
from tritonkern.models.hunyuan import HunyuanVideo
from tritonkern.models.tracker import Tracker
from tritonkern.nn.correlation import TrackerOutput

CLOSED = 1.5
"""Cells between a cell and the match of its match, up to which a point counts as visible."""
# Logit of what is known.
_CERTAIN = 8.0


class Preset(NamedTuple):
    """What a pass of the transformer is given, and which of its attention is read."""

    layers: tuple[int, ...]
    timesteps: tuple[float, ...]
    scale: float | None
    """Factor on the scores; None for D ** -0.5."""
    frames: int
    """Frames of a pass, the query's included."""


def preset_of(transformer: CogVideoX | HunyuanVideo, official_scale: bool = False) -> Preset:
    """The published preset, with 13 frames.

    CogVideoX 2B and 5B: layer 17, the last of 50 steps (timestep 19). HunyuanVideo: layer 16, the last of 30 steps of
    a schedule that is shifted by 7.

    Args:
        official_scale: the published tracking script divides by the root of the number of heads, not of D.

    Raises:
        ValueError: another number of heads and layers.
    """
    known = {
        (30, 30): ("CogVideoX 2B", 17, 19.0),
        (48, 42): ("CogVideoX 5B", 17, 19.0),
        (24, 60): ("HunyuanVideo", 16, 1000 * 7 / (30 + 6)),
    }
    size = transformer.num_heads, len(transformer.transformer_blocks)
    if size not in known:
        raise ValueError(
            f"preset: none is published for {size[0]} heads and {size[1]} layers, only for "
            f"{', '.join(f'{name} ({h} and {n})' for (h, n), (name, *_) in known.items())}; give a Preset"
        )
    _, layer, timestep = known[size]
    return Preset((layer,), (timestep,), transformer.num_heads**-0.5 if official_scale else None, 13)


def schedule(frames: int, *, length: int = 13, first: int = 0, interleaved: bool = True) -> list[list[int]]:
    """Frame numbers of every pass: frame `first`, then up to length - 1 others, until all were seen.

    Interleaved passes take every so many-th frame, so that each spans the clip; the last ones may see frames again.
    Otherwise consecutive frames are taken.

    Raises:
        ValueError: `first` is not a frame, or `length` below 2.
    """
    if not 0 <= first < frames:
        raise ValueError(f"first must be a frame from 0 to {frames - 1}, got {first}")
    if length < 2:
        raise ValueError(f"length must be 2 or more, got {length}")
    others, room = [frame for frame in range(frames) if frame != first], length - 1
    if not interleaved:
        return [[first, *others[start : start + room]] for start in range(0, len(others), room)]
    step = max(1, frames // room)
    chunks: list[list[int]] = []
    unseen = set(others)
    while unseen:
        chunks.append([first, *others[len(chunks) :: step][:room]])
        unseen -= set(chunks[-1])
    return chunks


class DiffTrack(Tracker):
    """Zero-shot tracking with a video diffusion transformer.

    Every frame is encoded alone. The frame of a query and some others form a clip that passes through the first layers
    of the transformer once; its four cells around the query are matched with those of the other frames by the queries
    and keys of one layer (`query_key_matching`). One pass serves all queries of a frame.

    `features(video)`: float `[B, T, H, W, 3]` in [-1, 1] -> latents `[B, T, h, w, C]`.

    Args:
        transformer: with the methods `grid` and `query_key` of `CogVideoX`.
        vae: of diffusers; None for a transformer of pixels.
        preset: layers, timesteps and scale.
        scheduler: with the method `add_noise(latents, noise, timesteps)` of diffusers' schedulers; needed for noise.
        resolution: (height, width) of the raster of video, queries and tracks.
        pixels: (height, width) that frames are resized to before they are encoded; None for `resolution`.
        prompt: `[1, L, text_dim]`, the embedding of the empty prompt; None for zeros.
        radius: of the soft-argmax around the best cell, in cells; None for the centre of the best cell.
        interleaved, average: as in `schedule`; whether the costs of frames that several passes see are averaged,
            otherwise the first pass counts.
        border: "border", or "zeros" as published: beyond the outermost cells positions are mixed with zero.
        visibility: "consistent": where the match of the match is within `CLOSED` cells; "all" as published.
        sample: draw latents from the posterior, by the generator `generator`, instead of its mean.
        noise: add noise of the preset's timestep, by the scheduler and the generator; published is none.
        scaled: multiply latents by the factor of the VAE.
    """

    context = 0  # frames are encoded alone
    closed: float = CLOSED
    prompt: Tensor

    def __init__(
        self,
        transformer: CogVideoX | HunyuanVideo,
        vae: Any = None,
        preset: Preset | None = None,
        *,
        scheduler: Any = None,
        resolution: tuple[int, int] = (256, 256),
        pixels: tuple[int, int] | None = None,
        prompt: Tensor | None = None,
        radius: float | None = None,
        interleaved: bool = True,
        average: bool = False,
        border: str = "border",
        visibility: str = "consistent",
        sample: bool = False,
        noise: bool = False,
        scaled: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if noise and scheduler is None:
            raise ValueError("noise needs a scheduler, by which it is added")
        self.resolution = resolution
        if border not in ("border", "zeros"):
            raise ValueError(f'border must be "border" or "zeros", got {border!r}')
        if visibility not in ("consistent", "all"):
            raise ValueError(f'visibility must be "consistent" or "all", got {visibility!r}')
        self.transformer, self.vae, self.radius = transformer, vae, radius
        self.preset = preset_of(transformer) if preset is None else preset
        wrong = [layer for layer in self.preset.layers if not 0 <= layer < len(transformer.transformer_blocks)]
        if wrong:
            raise ValueError(
                f"preset has layers {wrong}; the transformer has {len(transformer.transformer_blocks)}, from 0 on"
            )
        most = getattr(transformer, "max_frames", self.preset.frames)
        if not 2 <= self.preset.frames <= most:
            raise ValueError(f"preset must have from 2 to {most} frames in a pass, got {self.preset.frames}")
        self.pixels = resolution if pixels is None else pixels
        self.interleaved, self.average, self.border, self.visibility = interleaved, average, border, visibility
        self.scheduler, self.sample, self.noise, self.generator = scheduler, sample, noise, generator
        self.scaled = scaled
        empty = torch.zeros(1, 1, transformer.text_dim) if prompt is None else prompt
        self.register_buffer("prompt", empty)

    @classmethod
    def from_folder(cls, folder: str | Path, official: bool = False, **options: Any) -> DiffTrack:
        """CogVideoX 2B or 5B, or HunyuanVideo, of a folder as diffusers writes it, at 480 x 720 pixels.

        The embedding of the empty prompt is read from ``prompt_embeds.safetensors`` in the folder, or, of CogVideoX,
        made once by the folder's text encoder and tokenizer and written there.

        Args:
            folder: with ``transformer``, ``vae`` and, for noise, ``scheduler``.
            official: the choices of the published tracking script: its softmax scale, mixing with zero at the border,
                every point visible, and latents drawn from the posterior (seed 42), those of HunyuanVideo unscaled.
            options: as of the class.

        Raises:
            FileNotFoundError: the folder lacks its transformer, VAE or prompt.
            ModuleNotFoundError: diffusers is not installed.
            ValueError: another architecture, or damaged weights.
        """
        published: dict[str, Any] = {}
        transformer, vae, scheduler, prompt = read_folder(Path(folder))
        if official:
            published = {
                "border": "zeros",
                "visibility": "all",
                "sample": True,
                "generator": torch.Generator().manual_seed(42),
                "scaled": isinstance(transformer, CogVideoX),
            }
            if "preset" not in options:
                published["preset"] = preset_of(transformer, official_scale=True)
        fixed = {"scheduler": scheduler, "resolution": (480, 720), "prompt": prompt}
        return cls(transformer, vae, **(fixed | published | options)).eval()

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Latents `[B, T, h, w, C]` of `[B, T, H, W, 3]` in [-1, 1], each frame encoded alone."""
        frames = self._resized(video)
        latents = frames if self.vae is None else torch.stack([self._encode(x)[:, 0] for x in frames.split(1)])
        return rearrange(latents, "(b t) c h w -> b t h w c", b=len(video))

    @torch.no_grad()
    def encode_clip(self, video: Tensor) -> tuple[Tensor, list[int]]:
        """Latents `[1, K, C, h, w]` of one clip as the transformer was trained on it, and the frames that they show.

        A causal VAE encodes 1 + r (K - 1) frames together, as many as a pass takes. Without a VAE, K evenly spaced
        frames are taken.

        Args:
            video: uint8 `[1, T, H, W, 3]`.
        """
        count, most = video.shape[1], self.preset.frames
        if self.vae is None:
            frames = torch.linspace(0, count - 1, min(count, most)).round().long().tolist()
            return rearrange(self.features(video[:, frames] / 127.5 - 1), "b t h w c -> b t c h w"), frames
        ratio = self.vae.config.temporal_compression_ratio
        frames = list(range((min(count, ratio * (most - 1) + 1) - 1) // ratio * ratio + 1))
        return self._encode(self._resized(video[:, frames] / 127.5 - 1)).transpose(0, 1)[None], frames

    def _resized(self, video: Tensor) -> Tensor:
        """Frames `[B T, 3, h, w]` of `[B, T, H, W, 3]`."""
        frames = rearrange(video, "b t h w c -> (b t) c h w").to(self.prompt.dtype)
        if frames.shape[-2:] != self.pixels:
            frames = F.interpolate(frames, size=self.pixels, mode="bilinear", antialias=True, align_corners=False)
        return frames

    def _encode(self, frames: Tensor) -> Tensor:
        """Latents `[C, K, h, w]` of consecutive frames `[T, C, H, W]`."""
        return encode_together(self.vae, frames, sample=self.sample, generator=self.generator, scaled=self.scaled)

    @torch.no_grad()
    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """Tracks of `queries` `[B, N, 3]` (t, y, x) from latents as `features` returns them.

        Raises:
            ValueError: fewer than two frames, latents that are not finite, or shapes that do not fit.
        """
        batch, frames = features.shape[:2]
        if frames < 2:
            raise ValueError(f"video must have two frames or more, got {frames}")
        if not features.isfinite().all():
            raise ValueError("features must be finite: latents hold NaN or infinity")
        tracks = queries.new_zeros(batch, queries.shape[1], frames, 2)
        visible = torch.ones(tracks.shape[:3], dtype=torch.bool, device=tracks.device)
        own = queries[..., 0].round().long().clamp(0, frames - 1)
        latents = rearrange(features, "b t h w c -> b t c h w")
        for b in range(batch):
            for frame in own[b].unique().tolist():
                rows = own[b] == frame
                places = queries[b, rows].flip(-1)[:, :2]
                tracks[b, rows], visible[b, rows] = self._track_frame(latents[b : b + 1], frame, places)
        logit = torch.where(visible, -_CERTAIN, _CERTAIN).to(tracks.dtype)
        return TrackerOutput(tracks, logit, -_CERTAIN * torch.ones_like(logit))

    def _track_frame(self, latents: Tensor, frame: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tracks `[n, T, 2]` and visibility `[n, T]` of the points `places` `[n, 2]` (x, y) of one frame."""
        grid = self.grid(latents)
        corners = Corners.of(places, grid, self.resolution, self.border)
        frames = latents.shape[1]
        points = places.new_zeros(frames, corners.cells.numel(), 2)
        closed = torch.ones(frames, len(places), dtype=torch.bool, device=places.device)
        costs: dict[int, tuple[Tensor, int]] = {}
        cells = corners.cells.flatten()[None]
        seen = {frame}
        for chunk in schedule(frames, length=self.preset.frames, first=frame, interleaved=self.interleaved):
            query, key = self.query_key(latents[:, chunk])
            if self.average:
                cost = query_key_cost(query, key, cells=cells, scale=self.preset.scale)[0]
                for number, place in zip(chunk[1:], cost[1:], strict=True):
                    total, count = costs.get(number, (0, 0))
                    costs[number] = total + place, count + 1
            match = query_key_matching(query, key, grid=grid, cells=cells, scale=self.preset.scale, radius=self.radius)
            fresh = [i for i, number in enumerate(chunk) if number not in seen]
            numbers = [chunk[i] for i in fresh]
            seen.update(numbers)
            points[numbers] = match.points[0, fresh].to(points)
            if self.visibility == "consistent":
                nearest = (
                    match.index[0, fresh]
                    .unflatten(-1, corners.cells.shape)
                    .gather(-1, corners.nearest.expand(len(fresh), -1, 1))
                )
                closed[numbers] = self._closed(query[0], key[0], fresh, nearest[..., 0], corners, grid)
        if self.average:
            for number, (total, count) in costs.items():
                points[number] = locate(total / count, grid, self.radius).to(points)
        tracks = corners.blend(points.unflatten(1, corners.cells.shape))
        tracks[:, frame] = places
        return tracks, closed.T

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of the cells of `query_key(latents)`."""
        return self.transformer.grid(latents)

    def query_key(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[1, T, S, H, D]` of latents `[1, T, C, h, w]`, layers and timesteps side by side in D."""
        text = self.prompt.to(latents.dtype)
        found = []
        for timestep in self.preset.timesteps:
            time, noised = latents.new_tensor([timestep]), latents
            if self.noise:
                drawn = torch.randn(latents.shape, generator=self.generator).to(latents)
                noised = self.scheduler.add_noise(latents, drawn, time.round().long())
            found += self.transformer.query_key(noised, text, time, self.preset.layers)
        query, key = zip(*found, strict=True)
        return torch.cat(query, -1), torch.cat(key, -1)

    def _closed(
        self, query: Tensor, key: Tensor, frames: Sequence[int], best: Tensor, corners: Corners, grid: tuple[int, int]
    ) -> Tensor:
        """Whether the matches `best` `[F, n]` of the nearest cells lead back to them."""
        there, own = list(frames), [0] * len(frames)
        pairs = [torch.stack([x[there], x[own]], 1) for x in (query, key)]
        back = query_key_matching(*pairs, grid=grid, cells=best.clamp(min=0), scale=self.preset.scale).index[:, 1]
        home = corners.cells.gather(-1, corners.nearest)[:, 0]
        dx, dy = back % grid[1] - home % grid[1], back // grid[1] - home // grid[1]
        return (best >= 0) & (dx.square() + dy.square() <= self.closed**2)
