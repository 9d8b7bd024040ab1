"""Tracks drawn into their video."""

import colorsys
from collections.abc import Callable
from os import PathLike

import numpy as np
from PIL import Image, ImageDraw

from tritonkern.files import atomic_path
from tritonkern.tracking.results import PointTracks
from tritonkern.tracking.video import VideoReader, VideoWriter

_TAIL_FRAMES = 12
_OUTLINE = (0, 0, 0)
# Shapes are drawn this many times larger, then averaged down: Pillow's own have hard edges and whole-pixel positions.
_OVERSAMPLING = 4


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
    image = Image.fromarray(frame)
    inks = [tuple(colour) for colour in colours.tolist()]
    radius = _radius(frame.shape[1], frame.shape[0], len(inks))
    first = max(0, index - _TAIL_FRAMES)
    positions, seen = tracks.tracks[:, first : index + 1], tracks.visibility[:, first : index + 1]
    for tail, visible, ink in zip(positions, seen, inks, strict=True):
        _draw_tail(image, tail, visible, ink, 0.4 * radius)
    for position, visible, ink in zip(positions[:, -1], seen[:, -1], inks, strict=True):
        hole = 0.0 if visible else 0.65 * radius
        _draw_marker(image, position, radius + max(1.0, 0.2 * radius), hole, _OUTLINE)
        _draw_marker(image, position, radius, hole, ink)
    return np.array(image)


def _radius(width: int, height: int, count: int) -> float:
    area = width * height
    return max(1.5, min(area**0.5 / 180, 0.2 * (area / count) ** 0.5))


def _draw_marker(image: Image.Image, centre: np.ndarray, radius: float, hole: float, ink: tuple[int, ...]) -> None:
    stamp = _Stamp(image, centre, centre, radius)
    stamp.disc(centre, radius, 255)
    if hole:
        stamp.disc(centre, hole, 0)
    stamp.press(image, ink)


def _draw_tail(image: Image.Image, tail: np.ndarray, visible: np.ndarray, ink: tuple[int, ...], radius: float) -> None:
    steps = np.flatnonzero(visible[:-1] & visible[1:])
    if len(steps) == 0:
        return
    drawn = tail[np.union1d(steps, steps + 1)]
    stamp = _Stamp(image, drawn.min(axis=0), drawn.max(axis=0), radius)
    for step in steps:
        # Newer over older, so that a tail that crosses itself stays bright where it is new.
        stamp.segment(tail[step], tail[step + 1], radius, round(230 * (step + 1) / len(visible)))
    stamp.press(image, ink)


class _Stamp:
    """The opacity of one shape over the part of a picture that it touches, drawn enlarged."""

    def __init__(self, image: Image.Image, low: np.ndarray, high: np.ndarray, margin: float) -> None:
        limit = np.array(image.size)
        self._low = np.clip(np.floor(low - margin), 0, limit).astype(int)
        self._high = np.clip(np.ceil(high + margin), self._low, limit).astype(int)
        size = (self._high - self._low) * _OVERSAMPLING
        self._mask = Image.new("L", (int(size[0]), int(size[1])))
        self._draw = ImageDraw.Draw(self._mask)

    def disc(self, centre: np.ndarray, radius: float, opacity: int) -> None:
        x, y = (centre - self._low) * _OVERSAMPLING
        r = radius * _OVERSAMPLING
        # Pillow's boxes include their last pixel.
        self._draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=opacity)

    def segment(self, start: np.ndarray, end: np.ndarray, radius: float, opacity: int) -> None:
        corners = np.concatenate([start - self._low, end - self._low]) * _OVERSAMPLING - 0.5
        self._draw.line(corners.tolist(), fill=opacity, width=max(1, round(2 * radius * _OVERSAMPLING)))
        self.disc(end, radius, opacity)

    def press(self, image: Image.Image, ink: tuple[int, ...]) -> None:
        if self._mask.width and self._mask.height:
            box = (*self._low.tolist(), *self._high.tolist())
            image.paste(ink, box, self._mask.reduce(_OVERSAMPLING))
