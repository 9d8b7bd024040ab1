"""Tracks drawn into their video."""

import colorsys
from collections.abc import Callable
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from tritonkern.files import atomic_path
from tritonkern.tracking.results import PointTracks
from tritonkern.tracking.video import VideoReader, VideoWriter

_TAIL_FRAMES = 12
_OUTLINE = (0, 0, 0)
# Shapes are drawn this many times larger, then averaged down: Pillow's own have hard edges and whole-pixel positions.
_OVERSAMPLING = 4
# Pixels; larger frames have larger shapes, whose edges need half as much.
_LARGE = 1280 * 720


def write_overlay(
    path: str | PathLike[str],
    video: str | PathLike[str] | np.ndarray | VideoReader,
    tracks: PointTracks,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> None:
    """Write `video` as an mp4 with the points of `tracks` drawn in: fading tails, hollow where not visible.

    One frame is held at a time. `progress` is called as `progress("writing", done, total)`.

    Raises:
        ValueError: `video` is not the one that `tracks` come from (another size, or fewer frames).
    """
    reader = video if isinstance(video, VideoReader) else VideoReader(video)
    frame_count = tracks.tracks.shape[1]
    if reader.size != tracks.size:
        raise ValueError(f"{reader.name} is {reader.size}, the tracks come from a video of {tracks.size}")
    colours = point_colours(tracks.queries)
    done = 0
    with atomic_path(path) as part, VideoWriter(part, tracks.fps) as writer:
        for done, frame in enumerate(reader.frames(frame_count), start=1):
            writer.write(draw_points(frame, tracks, done - 1, colours))
            if progress is not None:
                progress("writing", done, frame_count)
        if done < frame_count:
            raise ValueError(f"{reader.name} ends after {done} frames, the tracks have {frame_count}: give their video")


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


def draw_points(frame: np.ndarray, tracks: PointTracks, index: int, colours: np.ndarray | None = None) -> np.ndarray:
    """Frame `index` of the video, uint8 RGB `[H, W, 3]`, with the points drawn in; returns a new array.

    `colours` are uint8 RGB `[N, 3]`, by default `point_colours(tracks.queries)`.
    """
    if colours is None:
        colours = point_colours(tracks.queries)
    radius = _radius(frame.shape[1], frame.shape[0], len(colours))
    first = max(0, index - _TAIL_FRAMES)
    positions, seen = tracks.tracks[:, first : index + 1], tracks.visibility[:, first : index + 1]
    layer = _Layer(frame.shape[1], frame.shape[0])
    # Newer over older, so that a tail that crosses itself stays bright where it is new.
    for step in range(positions.shape[1] - 1):
        opacity = 0.9 * (step + 1) / positions.shape[1]
        for point in np.flatnonzero(seen[:, step] & seen[:, step + 1]):
            layer.segment(positions[point, step], positions[point, step + 1], 0.4 * radius, colours[point], opacity)
    for position, visible, colour in zip(positions[:, -1], seen[:, -1], colours, strict=True):
        hole = 0.0 if visible else 0.65 * radius
        layer.ring(position, radius + max(1.0, 0.2 * radius), hole, _OUTLINE)
        layer.ring(position, radius, hole, colour)
    return layer.over(frame)


def _radius(width: int, height: int, count: int) -> float:
    area = width * height
    return max(1.5, min(area**0.5 / 180, 0.2 * (area / count) ** 0.5))


class _Layer:
    """Shapes over a transparent picture, drawn enlarged: one layer for all of a frame's, however many they are."""

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
        """The layer laid over uint8 RGB `[H, W, 3]`."""
        picture = Image.fromarray(frame).convert("RGBA")
        return np.array(Image.alpha_composite(picture, self._image.reduce(self._scale)).convert("RGB"))


def _ink(colour: ArrayLike, opacity: float) -> tuple[int, ...]:
    return (*np.asarray(colour).tolist(), round(255 * opacity))
