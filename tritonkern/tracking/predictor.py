"""From a video to point tracks in its own pixels."""

import os
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritonkern.models import build_model
from tritonkern.models._streaming import StreamedTracker
from tritonkern.models.tracker import Tracker
from tritonkern.tracking.cotracker import Predictor, call_predictor
from tritonkern.tracking.queries import DEFAULT_GRID, QueryName, check_queries, grid_queries, open_queries
from tritonkern.tracking.raster import resized
from tritonkern.tracking.results import PointTracks, visible_points
from tritonkern.tracking.spans import Progress, SpanTracks, track_in_spans
from tritonkern.tracking.stored_tracks import StoredTracks
from tritonkern.tracking.stream import PointStream
from tritonkern.tracking.video import VideoReader, VideoSource, whole_number

VISIBLE = 0.5
"""Confidence from which on a point counts as visible."""
# Bytes of a result and of its conversions, per point and frame.
_BYTES_PER_POSITION = 40


class PointTracker:
    """Follows points through a video.

    ```python
    tracks = PointTracker()("video.mp4", grid=12)
    ```

    The packaged models see every frame at their own resolution, 256x256 pixels. Things that are only
    a few pixels wide there cannot be followed. How long clips are handled, and what confidence means:
    `tritonkern.tracking.spans.track_in_spans`.

    Args:
        model: a name known to `tritonkern.models.build_model`; a `tritonkern.models.Tracker`; or any object that is
            called as CoTracker's predictors are (`tritonkern.tracking.cotracker`).
        weights: checkpoint for a model that ships without weights, or the checkpoints of one that needs several.
        device: "cpu" or "cuda"; None takes the GPU where there is one.

    Raises:
        ValueError: unknown model, wrong checkpoint, or a device that this machine does not have.
        TypeError: `model` cannot be called.
    """

    def __init__(
        self,
        model: Any = "nano",
        weights: str | Path | Sequence[str | Path] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = choose_device(device)
        if isinstance(model, str):
            model = build_model(model, weights)
        elif weights is not None:
            raise ValueError("weights goes with the name of a model: load them into the model that is given instead")
        elif not callable(model):
            raise TypeError(f"model must be a name, a tracker or a predictor, got {type(model).__name__}")
        self.model = model.to(self.device).eval() if isinstance(model, nn.Module) else model

    def __call__(
        self,
        video: VideoSource | VideoReader,
        *,
        grid: int | None = None,
        queries: np.ndarray | str | PathLike[str] | None = None,
        query_frame: int = 0,
        max_frames: int | None = None,
        min_confidence: float = VISIBLE,
        progress: Progress | None = None,
    ) -> PointTracks:
        """Track a grid of points, or the given ones, through `video`.

        Args:
            video: anything that `VideoReader` reads, or a `VideoReader`.
            grid: points per side of a regular grid; 10 unless `queries` is given.
            queries: `[N, 3]` rows t, x, y, or the path of a file of them (`read_queries`): frame, and pixels of the
                original video, whose frame spans `[0, width] x [0, height]` (the centre of the first pixel is
                (0.5, 0.5)). Models take (t, y, x); this function takes t, x, y.
            query_frame: the frame in which the grid is placed.
            max_frames: read at most this many frames.
            min_confidence: a point that is inside the frame is visible from this confidence on, 0 to 1.
            progress: called as `progress(stage, done, total)` with the stages "reading" and "tracking", both in frames;
                the total is a hint or None. A video is read again from the start where a query is in a late frame
                (`tritonkern.tracking.spans.track_in_spans`).

        Returns:
            `PointTracks`. In its own frame a point is where the query says, visible, and has confidence 1. Of more than
            64 MB, its arrays are maps of a temporary file.

        Raises:
            FileNotFoundError, ValueError: no such video, unreadable video, queries outside the frame or clip, or more
                points than this machine's memory holds.
        """
        stored = StoredTracks()
        for _, tracks in self.spans(
            video, grid=grid, queries=queries, query_frame=query_frame, max_frames=max_frames,
            min_confidence=min_confidence, progress=progress,
        ):  # fmt: skip
            stored.append(tracks)
        return stored.tracks()

    def spans(
        self,
        video: VideoSource | VideoReader,
        *,
        grid: int | None = None,
        queries: np.ndarray | str | PathLike[str] | None = None,
        query_frame: int = 0,
        max_frames: int | None = None,
        min_confidence: float = VISIBLE,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, PointTracks]]:
        """The tracks of a call with these arguments, span by span while the video is read.

        ```python
        for first, tracks in PointTracker().spans("long.mp4", grid=12):
            tracks.tracks  # [N, t, 2] in frames first to first + t
        ```

        Memory does not grow with the number of frames: what is kept are the frames and features of one span (of up to
        `model.span` frames) and the features of the frames that have queries. Only an object with the signature of
        CoTracker's predictors gets the whole video at once, and makes one span of it.

        Returns:
            An iterator of pairs: the first frame of the span, and `PointTracks` of the frames of this span alone, whose
            `queries` count the frames of the video. The arguments are checked before it is returned.

        Raises:
            FileNotFoundError, ValueError: as the call; also while iterating.
        """
        if queries is not None and grid is not None:
            raise ValueError("give either grid or queries, not both")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence must be 0 to 1, got {min_confidence}")
        if max_frames is not None:
            max_frames = whole_number("max_frames", max_frames)
        reader = video if isinstance(video, VideoReader) else VideoReader(video)
        if queries is None:
            queries = grid_queries(DEFAULT_GRID if grid is None else grid, reader.size, query_frame)
        # As much as can be known before the clip is read, which may take long.
        rows, name = open_queries(queries)
        rows = check_queries(rows, reader.size, name=name)
        enough = 1 + int(rows[:, 0].max())
        count = reader.count_frames(enough if max_frames is None else min(enough, max_frames))
        check_queries(rows, reader.size, count, name)
        _check_memory(len(rows), reader, max_frames)
        report = progress or (lambda stage, done, total: None)
        return self._spans(reader, rows, name, max_frames, min_confidence, report)

    @torch.inference_mode()
    def _spans(
        self,
        reader: VideoReader,
        rows: np.ndarray,
        name: QueryName,
        max_frames: int | None,
        min_confidence: float,
        report: Progress,
    ) -> Iterator[tuple[int, PointTracks]]:
        total = min((n for n in (reader.frame_count, max_frames) if n is not None), default=None)

        def frames() -> Iterator[np.ndarray]:
            done = 0
            for done, frame in enumerate(reader.frames(max_frames), start=1):
                report("reading", done, total)
                yield frame
            check_queries(rows, reader.size, done, name)

        found: Iterable[SpanTracks]
        if isinstance(self.model, Tracker):
            height, width = self.model.resolution
            scale = np.array([width / reader.size[0], height / reader.size[1]])
            points = torch.from_numpy(np.column_stack([rows[:, 0], (rows[:, 1:] * scale)[:, ::-1]])).float()
            read = lambda: (resized(frame, (height, width)) for frame in frames())  # noqa: E731
            found = track_in_spans(self.model, read, points, self.device, report, total)
        else:
            scale = np.ones(2)
            clip = _whole_clip(frames(), reader.size)
            report("tracking", 0, len(clip))
            found = [SpanTracks(0, *call_predictor(self.model, clip, torch.from_numpy(rows).float(), self.device))]
            report("tracking", len(clip), len(clip))
        for start, positions, certainty in found:
            tracks, confidence = positions.numpy(), certainty.numpy()
            if not (np.isfinite(tracks).all() and np.isfinite(confidence).all()):
                raise ValueError("the model gives positions that are not finite: its weights are damaged or untrained")
            tracks /= scale.astype(np.float32)
            own_frame = rows[:, 0].astype(int) - start
            number = np.flatnonzero((own_frame >= 0) & (own_frame < tracks.shape[1]))
            tracks[number, own_frame[number]] = rows[number, 1:]
            confidence[number, own_frame[number]] = 1
            visibility = visible_points(tracks, confidence, min_confidence, reader.size)
            queries = rows.astype(np.float32)
            yield start, PointTracks(tracks, visibility, confidence, queries, reader.fps, reader.size)

    def stream(
        self,
        *,
        lookahead: int = 6,
        max_points: int = 1024,
        max_sources: int = 32,
        min_confidence: float = VISIBLE,
        size: tuple[int, int] | None = None,
        statistics: Sequence[Tensor] | None = None,
    ) -> PointStream:
        """Follow points through frames that arrive one by one, in memory that does not grow with their number.

        ```python
        stream = PointTracker().stream(lookahead=6)
        ids = stream.add([[120.0, 80.5]])  # (x, y) in pixels of the frame that comes next
        for frame in frames:  # uint8 RGB [H, W, 3]
            out = stream.step(frame)  # the points in the frame 6 frames ago; None before there is one
        rest = stream.finish()
        ```

        What a stream loses against a clip that is read as a whole: docs/tracking.md.

        Args:
            lookahead: frames that a result waits for, 0 or more, and which it then depends on.
            max_points: points at a time, at most.
            max_sources: frames with points at a time, at most. The features of each are kept, 2.4 MB of nano.
            min_confidence: a point that is inside the frame is visible from this confidence on, 0 to 1.
            size: (width, height) of the frames; None takes that of the first one.
            statistics: of a similar clip, for models with temporal adapters: `model.clip_statistics(video)`. None takes
                those of the last 24 frames, wherever the stream is.

        Raises:
            ValueError: an argument out of range, or a model that needs the whole clip.
        """
        for name, least, number in (
            ("lookahead", 0, lookahead), ("max_points", 1, max_points), ("max_sources", 1, max_sources)
        ):  # fmt: skip
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be a whole number of {least} or more, got {number!r}")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence must be 0 to 1, got {min_confidence}")
        model = self.model
        if not (isinstance(model, StreamedTracker) or isinstance(model, Tracker) and model.context == 0):
            raise ValueError(
                f"{type(model).__name__} cannot run frame by frame: a stream needs nano, chrono-nano, Chrono, or a "
                "tritonkern.models.Tracker whose features are those of one frame (context = 0)"
            )
        if statistics is not None and not isinstance(model, StreamedTracker):
            raise ValueError(f"statistics are those of temporal adapters, which {type(model).__name__} does not have")
        return PointStream(model, self.device, size, lookahead, max_points, max_sources, min_confidence, statistics)

    def as_predictor(self) -> Predictor:
        """This tracker with the signature of CoTracker's offline predictor, for programs that are written for it."""
        return Predictor(self)


def _whole_clip(frames: Iterable[np.ndarray], size: tuple[int, int]) -> Tensor:
    """uint8 `[T, H, W, 3]` of frames of `size` (width, height). Memory peaks at 1.07 times what it takes."""
    clip = np.empty((0, *size[::-1], 3), dtype=np.uint8)
    done = 0
    for frame in frames:
        if done == len(clip):
            # `resize` moves the pages of a large array and does not copy them.
            clip.resize((done + max(16, done // 16), *clip.shape[1:]), refcheck=False)
        clip[done] = frame
        done += 1
    clip.resize((done, *clip.shape[1:]), refcheck=False)
    return torch.from_numpy(clip)


def _check_memory(points: int, reader: VideoReader, max_frames: int | None) -> None:
    """Refuse a result that takes more than half of this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    positions = memory // 2 // _BYTES_PER_POSITION
    # Counting reads the whole file, which is in vain for the usual number of points.
    if points <= 10_000:
        return
    frames = max(1, reader.count_frames(max_frames or 1 << 40))
    if points * frames > positions:
        raise ValueError(
            f"{points} points in {frames} frames take {points * frames * _BYTES_PER_POSITION / 1e9:.0f} GB, more than "
            f"half of the memory of this machine ({memory / 1e9:.0f} GB): use at most {positions // frames} points "
            f"(a grid of {int((positions // frames) ** 0.5)}), or fewer frames"
        )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on: "cpu", "cuda" (also "cuda:1"), or for None the GPU if there is one.

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
