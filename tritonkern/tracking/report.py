"""A page that shows a video and its tracks, as one file that needs no network."""

import base64
import html
import json
import os
import tempfile
from collections.abc import Callable
from importlib import resources
from os import PathLike
from pathlib import Path

import numpy as np

from tritonkern.files import atomic_path
from tritonkern.tracking.overlay import fitting_size, frames_of_tracks, jumps, point_colours
from tritonkern.tracking.results import PointTracks
from tritonkern.tracking.video import VideoReader, VideoSource
from tritonkern.tracking.video_writer import VideoWriter

# Pixels of the longer side, and quality: the page holds the video as text.
_LONGER_SIDE, _CRF = 640, 24
_MOST_POINTS = 2000
_MOST_FRAMES = 5000


def write_report(
    path: str | PathLike[str],
    video: VideoSource | VideoReader,
    tracks: PointTracks,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> None:
    """Write one HTML file with the video (longer side at most 640 pixels) and its tracks.

    The page draws the points, which can be switched on and off, lists them with the worst ones first (`worst_first`),
    and shows the path, confidence and visibility of one point over time. It loads nothing from a network. Of more than
    2000 points it has the worst 2000, and of more than 5000 frames the first 5000; it says so.

    Args:
        path: the file to write.
        video: the video that the tracks come from, read with the same stride.
        tracks: the result of a `PointTracker`.
        progress: called as `progress("report", done, total)`.

    Raises:
        ValueError: `video` is not the one that `tracks` come from.
    """
    reader = video if isinstance(video, VideoReader) else VideoReader(video)
    all_frames = tracks.visibility.shape[1]
    tracks = tracks.frames(0, _MOST_FRAMES)
    points = worst_first(tracks)[:_MOST_POINTS]
    jumped = jumps(tracks)[points].sum(axis=1)
    data = {
        "size": list(tracks.size),
        "fps": tracks.fps,
        "frames": tracks.tracks.shape[1],
        "points": points.tolist(),
        "colours": ["#" + bytes(colour).hex() for colour in point_colours(tracks.queries)[points]],
        "queries": tracks.queries[points].astype(float).round(2).tolist(),
        "jumps": jumped.tolist(),
        # [N, T, 2] float32 and [N, T] uint8, little-endian
        "tracks": _base64(tracks.tracks[points].astype("<f4").tobytes()),
        "confidence": _base64((tracks.confidence[points] * 255).round().astype(np.uint8).tobytes()),
        "visible": _base64(tracks.visibility[points].astype(np.uint8).tobytes()),
        "video": _base64(_small_video(reader, tracks, progress)),
    }
    name = os.fsencode(Path(reader.name).name).decode(errors="replace")
    count = len(tracks.tracks)
    shown = f"{count} points" if count <= _MOST_POINTS else f"the worst {_MOST_POINTS} of {count} points"
    page = (resources.files("tritonkern.tracking") / "report.html").read_text(encoding="utf-8")
    # In a script element, "</" could end it.
    page = page.replace("{{data}}", json.dumps(data).replace("</", "<\\/"))
    frames = (
        f"{all_frames} frames" if all_frames <= _MOST_FRAMES else f"the first {_MOST_FRAMES} of {all_frames} frames"
    )
    # Last, as a name may be "{{data}}".
    page = page.replace("{{title}}", html.escape(f"{name}: {shown}, {frames}"))
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8")


def worst_first(tracks: PointTracks) -> np.ndarray:
    """Indices of the points: those with the most jumps while visible first, then those with the least mean confidence.

    A jump is a step of more than 12/256 of the frame between two frames in which the point is visible.
    """
    return np.lexsort((tracks.confidence.mean(axis=1), -jumps(tracks).sum(axis=1)))


def _small_video(
    reader: VideoReader, tracks: PointTracks, progress: Callable[[str, int, int | None], None] | None
) -> bytes:
    size = fitting_size(reader.size, _LONGER_SIDE)
    with tempfile.TemporaryDirectory(prefix="tritonkern-") as folder:
        path = Path(folder) / "video.mp4"
        with VideoWriter(path, tracks.fps, reader.pixel_aspect, crf=_CRF) as writer:
            for done, frame in enumerate(frames_of_tracks(reader, tracks, size), start=1):
                writer.write(frame)
                if progress is not None:
                    progress("report", done, tracks.tracks.shape[1])
        return path.read_bytes()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
