"""Tracks drawn into their video."""

import colorsys
from collections.abc import Callable, Iterator
from dataclasses import replace
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from tritonkern.files import atomic_path
from tritonkern.tracking.results import PointTracks
from tritonkern.tracking.video import VideoReader, VideoSource
from tritonkern.tracking.video_writer import VideoWriter

STYLES = ("tails", "dots")
_TAIL_FRAMES = 12
_OUTLINE = (0, 0, 0)
# A step longer than this fraction of the frame's sides is a jump, and one with less confidence at either end is unsure.
_JUMP, _SURE = 12 / 256, 0.8
# Shapes are drawn this many times larger, then averaged down: Pillow's own have hard edges and whole-pixel positions.
_OVERSAMPLING = 4
# Pixels; larger frames have larger shapes, whose edges need half as much.
_LARGE = 1280 * 720


def write_overlay(
    path: str | PathLike[str],
    video: VideoSource | VideoReader,
    tracks: PointTracks,
    progress: Callable[[str, int, int | None], None] | None = None,
    style: str = "tails",
    longer_side: int | None = None,
) -> None:
    """Write `video` as an mp4 with the points of `tracks` drawn in. One frame is held at a time.

    The pixel aspect of the video is kept, so that a player shows the overlay with the same shape.

    Args:
        path: the file to write.
        video: the video that the tracks come from, read with the same stride.
        tracks: the result of a `PointTracker`.
        progress: called as `progress("writing", done, total)`.
        style: "tails" (`draw_points`), or "dots" for the points without tails.
        longer_side: pixels of the overlay's longer side; larger videos are made smaller.

    Raises:
        ValueError: unknown style, or `video` is not the one that `tracks` come from (another size, or fewer frames).
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    reader = video if isinstance(video, VideoReader) else VideoReader(video)
    colours = point_colours(tracks.queries)
    size = fitting_size(reader.size, longer_side)
    with atomic_path(path) as part, VideoWriter(part, tracks.fps, reader.pixel_aspect) as writer:
        for index, frame in enumerate(frames_of_tracks(reader, tracks, size)):
            first = max(0, index - _TAIL_FRAMES)  # of a long clip, no more than the tails is copied
            drawn = resized(tracks.frames(first, index + 1), size)
            writer.write(draw_points(frame, drawn, index - first, colours, tails=style == "tails"))
            if progress is not None:
                progress("writing", index + 1, tracks.tracks.shape[1])


def frames_of_tracks(reader: VideoReader, tracks: PointTracks, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The frames of the video that `tracks` come from, resized to `size` (width, height); checks that it is the one."""
    frame_count = tracks.tracks.shape[1]
    if reader.size != tracks.size:
        raise ValueError(f"{reader.name} is {reader.size}, the tracks come from a video of {tracks.size}")
    done = 0
    for frame in reader.frames(frame_count):
        done += 1
        if size != reader.size:
            frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
        yield frame
    if done < frame_count:
        raise ValueError(f"{reader.name} ends after {done} frames, the tracks have {frame_count}: give their video")


def fitting_size(size: tuple[int, int], longer_side: int | None) -> tuple[int, int]:
    """`size` (width, height), made smaller so that no side is longer than `longer_side`."""
    factor = 1 if longer_side is None else min(1, longer_side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def resized(tracks: PointTracks, size: tuple[int, int]) -> PointTracks:
    """The tracks in pixels of the video resized to `size` (width, height)."""
    factor = np.divide(size, tracks.size).astype(np.float32)
    return replace(tracks, tracks=tracks.tracks * factor, size=size)


def point_colours(queries: np.ndarray) -> np.ndarray:
    """A colour for each of the queries `[N, 3]` (t, x, y): uint8 RGB `[N, 3]`.

    The hue runs from left to right and the lightness from top to bottom over the region that the queries span, so that
    neighbours look alike and a point that jumps to another object stands out.
    """
    position = queries[:, 1:].astype(np.float64)
    extent = np.ptp(position, axis=0)
    unit = (position - position.min(axis=0)) / np.where(extent > 0, extent, 1)
    colours = [colorsys.hls_to_rgb(0.75 * x, 0.68 - 0.2 * y, 1.0) for x, y in unit]
    return (np.array(colours) * 255).round().astype(np.uint8)


def draw_points(
    frame: np.ndarray, tracks: PointTracks, index: int, colours: np.ndarray | None = None, tails: bool = True
) -> np.ndarray:
    """Draw the points of frame `index` into it: uint8 RGB `[H, W, 3]`, returned as a new array.

    A visible point is a disc, a hidden one a ring. The tail connects the positions of the last 12 frames and fades. It
    has gaps where the point was hidden, and at jumps (more than 12/256 of the frame in one step) of which the tracker
    is unsure (a confidence of less than 0.8 before or after).

    `colours` are uint8 RGB `[N, 3]`, by default `point_colours(tracks.queries)`.
    """
    if colours is None:
        colours = point_colours(tracks.queries)
    radius = _radius(frame.shape[1], frame.shape[0], len(colours))
    layer = _Layer(frame.shape[1], frame.shape[0])
    if tails:
        first = max(0, index - _TAIL_FRAMES)
        positions = tracks.tracks[:, first : index + 1]
        connected = _connected(tracks, first, index)
        # Newer over older, so that a tail that crosses itself stays bright where it is new.
        for step in range(index - first):
            opacity = 0.9 * (step + 1) / (index - first + 1)
            for point in np.flatnonzero(connected[:, step]):
                layer.segment(positions[point, step], positions[point, step + 1], 0.4 * radius, colours[point], opacity)
    for position, visible, colour in zip(tracks.tracks[:, index], tracks.visibility[:, index], colours, strict=True):
        hole = 0.0 if visible else 0.65 * radius
        layer.ring(position, radius + max(1.0, 0.2 * radius), hole, _OUTLINE)
        layer.ring(position, radius, hole, colour)
    return layer.over(frame)


def _connected(tracks: PointTracks, first: int, last: int) -> np.ndarray:
    """Whether a line leads from each frame of `first` to `last` to the next: bool `[N, last - first]`."""
    frames = slice(first, last + 1)
    sure = tracks.confidence[:, frames] >= _SURE
    visible = tracks.visibility[:, frames]
    unsure_jump = jumps(tracks, frames) & ~(sure[:, :-1] & sure[:, 1:])
    return visible[:, :-1] & visible[:, 1:] & ~unsure_jump


def jumps(tracks: PointTracks, frames: slice = slice(None)) -> np.ndarray:
    """Whether a point moves more than 12/256 of the frame to the next frame, visible in both: bool `[N, T - 1]`."""
    step = np.diff(tracks.tracks[:, frames], axis=1) / np.array(tracks.size)
    visible = tracks.visibility[:, frames]
    return (np.hypot(step[..., 0], step[..., 1]) > _JUMP) & visible[:, :-1] & visible[:, 1:]


def _radius(width: int, height: int, count: int) -> float:
    area = width * height
    return max(1.5, min(area**0.5 / 180, 0.2 * (area / count) ** 0.5))


class _Layer:
    """A transparent picture over a frame, on which all shapes of the frame are drawn enlarged."""

    def __init__(self, width: int, height: int) -> None:
        self._scale = _OVERSAMPLING if width * height <= _LARGE else _OVERSAMPLING // 2
        self._image = Image.new("RGBA", (width * self._scale, height * self._scale))
        self._draw = ImageDraw.Draw(self._image)

    def ring(self, centre: np.ndarray, radius: float, hole: float, colour: ArrayLike) -> None:
        """A disc, or a ring whose inside shows what was drawn before; `hole` is the radius of the inside."""
        x, y = (centre * self._scale).tolist()
        r = radius * self._scale
        # Pillow's boxes include their last pixel.
        box = (x - r, y - r, x + r - 1, y + r - 1)
        ink = _ink(colour, 1.0)
        if hole:
            self._draw.ellipse(box, outline=ink, width=max(1, round((radius - hole) * self._scale)))
        else:
            self._draw.ellipse(box, fill=ink)

    def segment(self, start: np.ndarray, end: np.ndarray, radius: float, colour: ArrayLike, opacity: float) -> None:
        """A line with a round end."""
        ink = _ink(colour, opacity)
        x0, y0, x1, y1 = (np.concatenate([start, end]) * self._scale).tolist()
        r = radius * self._scale
        self._draw.line((x0 - 0.5, y0 - 0.5, x1 - 0.5, y1 - 0.5), fill=ink, width=max(1, round(2 * r)))
        self._draw.ellipse((x1 - r, y1 - r, x1 + r - 1, y1 + r - 1), fill=ink)

    def over(self, frame: np.ndarray) -> np.ndarray:
        """uint8 RGB `[H, W, 3]` with this layer over it."""
        picture = Image.fromarray(frame).convert("RGBA")
        return np.array(Image.alpha_composite(picture, self._image.reduce(self._scale)).convert("RGB"))


def _ink(colour: ArrayLike, opacity: float) -> tuple[int, ...]:
    return (*np.asarray(colour).tolist(), round(255 * opacity))
