"""From a video to point tracks in its own pixels."""

from collections.abc import Callable
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.models import build_model
from tritonkern.models.matching import MatchingTracker
from tritonkern.tracking.queries import check_queries, grid_queries
from tritonkern.tracking.results import PointTracks
from tritonkern.tracking.video import VideoReader

DEFAULT_GRID = 10
# Frames whose features are computed together, and how many of them at either end only serve as context. Temporal
# adapters reach six frames a layer, mostly less; features of this many frames fit in the memory of a laptop.
_SPAN, _CONTEXT = 192, 32
_QUERY_FRAMES = 16

Progress = Callable[[str, int, int | None], None]


class PointTracker:
    """Follows points through a video.

    ```python
    tracks = PointTracker()("video.mp4", grid=12)
    ```

    Clips of up to 192 frames are encoded as a whole. Longer ones are encoded in spans of 192 frames, of which the
    inner 128 count, so that memory stays bounded; every span is matched against the features of the query's frame.

    Args:
        model: a name known to `tritonkern.models.build_model`, or a tracker model itself.
        weights: checkpoint for a model that ships without weights.
        device: "cpu" or "cuda"; None takes the GPU where there is one.

    Raises:
        ValueError: unknown model, wrong checkpoint, or a device that this machine does not have.
    """

    def __init__(
        self,
        model: str | MatchingTracker = "chrono-nano",
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = choose_device(device)
        if isinstance(model, str):
            model = build_model(model, weights)
        elif weights is not None:
            raise ValueError("weights goes with the name of a model: load them into the model that is given instead")
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(
        self,
        video: str | PathLike[str] | np.ndarray | VideoReader,
        *,
        grid: int | None = None,
        queries: np.ndarray | None = None,
        query_frame: int = 0,
        max_frames: int | None = None,
        progress: Progress | None = None,
    ) -> PointTracks:
        """Track a grid of points, or the given ones, through `video`.

        Args:
            video: file, folder of images, uint8 frames `[T, H, W, 3]` in RGB, or an open `VideoReader`.
            grid: points a side of a regular grid; 10 unless `queries` is given.
            queries: `[N, 3]` rows t, x, y: frame, and pixels of the original video, whose frame spans
                `[0, width] x [0, height]` (the centre of the first pixel is (0.5, 0.5)).
            query_frame: the frame that the grid is laid on.
            max_frames: read only so many frames.
            progress: called as `progress(stage, done, total)` with the stages "reading" (frames; the total is a hint or
                None) and "tracking".

        Returns:
            `PointTracks`. In its own frame a point is where the query says, and visible.

        Raises:
            FileNotFoundError, ValueError: no such video, unreadable video, or queries outside the frame or clip.
        """
        if queries is not None and grid is not None:
            raise ValueError("give either grid or queries, not both")
        report = progress or (lambda stage, done, total: None)
        reader = video if isinstance(video, VideoReader) else VideoReader(video)
        if queries is None:
            queries = grid_queries(DEFAULT_GRID if grid is None else grid, reader.size, query_frame)
        # As much as can be known before the clip is read, which may take long.
        queries = check_queries(queries, reader.size)
        enough = 1 + int(queries[:, 0].max())
        count = reader.count_frames(enough if max_frames is None else min(enough, max_frames))
        check_queries(queries, reader.size, count)
        raster = self._read(reader, max_frames, report)
        check_queries(queries, reader.size, len(raster))

        height, width = self.model.resolution
        scale = np.array([width / reader.size[0], height / reader.size[1]])
        points = torch.from_numpy(np.column_stack([queries[:, 0], (queries[:, 1:] * scale)[:, ::-1]])).float()
        tracks, visibility = self._track(raster, points, report)
        tracks = (tracks / scale).astype(np.float32)
        if not np.isfinite(tracks).all():
            raise ValueError("the model gives positions that are not finite: its weights are damaged or untrained")

        number, own_frame = np.arange(len(queries)), queries[:, 0].astype(int)
        tracks[number, own_frame] = queries[:, 1:]
        visibility[number, own_frame] = True
        return PointTracks(tracks, visibility, queries.astype(np.float32), reader.fps, reader.size)

    def _read(self, reader: VideoReader, max_frames: int | None, report: Progress) -> Tensor:
        """The clip at the model's resolution, uint8 `[T, H, W, 3]`; no two frames are held at full size."""
        total = min((n for n in (reader.frame_count, max_frames) if n is not None), default=None)
        frames = []
        for frame in reader.frames(max_frames):
            frames.append(_resize(frame, self.model.resolution))
            report("reading", len(frames), total)
        return torch.stack(frames)

    def _track(self, raster: Tensor, queries: Tensor, report: Progress) -> tuple[np.ndarray, np.ndarray]:
        """Tracks `[N, T, 2]` (x, y) in raster pixels and visibility `[N, T]` of queries `[N, 3]` (t, y, x)."""
        spans = _spans(len(raster))
        query_frames, query_index = torch.unique(queries[:, 0].long(), return_inverse=True)
        wanted = [span for span in spans if span.holds(query_frames).any()]
        steps = len(wanted) + len(spans)
        report("tracking", 0, steps)

        # Two passes, as a query may lie in any span; the cache spares the common clip (one span) its second encoding.
        encode = lru_cache(maxsize=1)(lambda span: self._features(raster, span))
        sources = []
        for done, span in enumerate(wanted, start=1):
            sources.append(encode(span)[query_frames[span.holds(query_frames)] - span.start])
            report("tracking", done, steps)
        source = torch.cat(sources)

        tracks = np.empty((len(queries), len(raster), 2))
        visibility = np.empty((len(queries), len(raster)), dtype=bool)
        for done, span in enumerate(spans, start=len(wanted) + 1):
            for first in range(0, len(query_frames), _QUERY_FRAMES):
                # The frames of the queries come first, so that the span need not contain them.
                shown = source[first : first + _QUERY_FRAMES]
                group = torch.nonzero((query_index >= first) & (query_index < first + _QUERY_FRAMES))[:, 0]
                local = queries[group]
                local[:, 0] = query_index[group] - first
                output = self.model.track(torch.cat([shown, encode(span)])[None], local[None].to(self.device))
                tracks[group, span.start : span.stop] = output.tracks[0, :, len(shown) :].cpu().numpy()
                visibility[group, span.start : span.stop] = output.visible[0, :, len(shown) :].cpu().numpy()
            report("tracking", done, steps)
        return tracks, visibility

    def _features(self, raster: Tensor, span: "_Span") -> Tensor:
        """Features `[stop - start, h, w, C]` of a span, computed with its context."""
        context = raster[span.context_start : span.context_stop].to(self.device)
        features = self.model.features(context[None].float() / 127.5 - 1)[0]
        return features[span.start - span.context_start : span.stop - span.context_start]


class _Span(NamedTuple):
    start: int
    stop: int
    context_start: int
    context_stop: int

    def holds(self, frames: Tensor) -> Tensor:
        return (frames >= self.start) & (frames < self.stop)


def _spans(frame_count: int) -> list[_Span]:
    if frame_count <= _SPAN:
        return [_Span(0, frame_count, 0, frame_count)]
    inner = _SPAN - 2 * _CONTEXT
    spans = []
    for start in range(0, frame_count, inner):
        stop = min(start + inner, frame_count)
        spans.append(_Span(start, stop, max(start - _CONTEXT, 0), min(stop + _CONTEXT, frame_count)))
    return spans


def _resize(frame: np.ndarray, resolution: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, on the raster convention: position x becomes x * W_model / W, without a shift."""
    image = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=resolution, mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on: "cpu", "cuda" (also "cuda:1"), or where None, the GPU if there is one.

    Raises:
        ValueError: another device, or no GPU where one is asked for.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {str(device)!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this PyTorch finds no GPU; use cpu, or install a GPU build of PyTorch")
    return chosen
