"""Points followed through a video while it arrives, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tritonkern.models.tracker import Tracker
from tritonkern.tracking.raster import resized
from tritonkern.tracking.results import visible_points
from tritonkern.tracking.stream_features import StreamFeatures


class StreamOutput(NamedTuple):
    """The points in one frame of a stream, in the order in which they were added."""

    frame: int
    """Number of the frame, counted from 0."""
    ids: np.ndarray
    """int64 `[n]`, as `PointStream.add` returned them."""
    xy: np.ndarray
    """float32 `[n, 2]` in pixels of the video."""
    visible: np.ndarray
    """bool `[n]`: `confidence >= min_confidence`, and the position is inside the frame."""
    confidence: np.ndarray
    """float32 `[n]` in 0..1, as in `PointTracks`."""


@dataclass(frozen=True)
class _Point:
    id: int
    frame: int
    """In which it was picked; the one that comes next for a point from descriptors."""
    source: int
    """Whose features describe it: a frame, or -1, -2, ... of descriptors."""
    place: tuple[float, float]
    """(y, x) in the raster."""
    xy: tuple[float, float] | None
    """As it was given, in pixels of the video; None for a point from descriptors."""


class PointStream:
    """Points followed through frames that arrive one by one; see `PointTracker.stream`, which makes it.

    Frame numbers count the calls of `step`, from 0. A method that refuses its arguments leaves the stream as it was.
    """

    def __init__(
        self,
        model: Tracker,
        device: torch.device,
        size: tuple[int, int] | None,
        lookahead: int,
        max_points: int,
        max_sources: int,
        min_confidence: float,
        statistics: Sequence[Tensor] | None,
    ) -> None:
        self._model, self._device = model, device
        self._options = {
            "model": type(model).__name__, "resolution": list(model.resolution), "lookahead": lookahead,
            "max_points": max_points, "max_sources": max_sources, "min_confidence": min_confidence,
        }  # fmt: skip
        self.lookahead, self._max_points, self._max_sources = lookahead, max_points, max_sources
        self._min_confidence = min_confidence
        self.size = size
        """(width, height) of the frames; None before the first one."""
        self._features = StreamFeatures(model, device, lookahead, statistics)
        self._frames = 0
        self._ended = False
        self._last: Tensor | None = None  # the raster of the last frame
        self._points: dict[int, _Point] = {}
        self._next_id, self._next_descriptor = 0, -1

    @property
    def frames(self) -> int:
        """Frames that have arrived."""
        return self._frames

    @property
    def ids(self) -> np.ndarray:
        """Of all points, int64."""
        return np.array(list(self._points), dtype=np.int64)

    @property
    def oldest_frame(self) -> int:
        """The first frame that points may still be added in."""
        return self._features.oldest

    @torch.inference_mode()
    def add(
        self, points: Any = None, *, frame: int | None = None, descriptors: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Follow more points.

        Args:
            points: `[n, 2]` (x, y) in pixels.
            frame: the frame that they are in, from `oldest_frame` to the one that comes next, which is the default.
                They are in the outputs from this frame on, or from the next output if it is past.
            descriptors: what `descriptors` returned, of this stream or of one of another video, in place of points. The
                points are searched for from the next frame on.

        Returns:
            Their ids, int64 `[n]`. An id is never used again.

        Raises:
            ValueError: a point outside the frame or not finite, a frame that is no longer or not yet here, more than
                `max_points` points, points of more than `max_sources` frames, or descriptors of another model.
        """
        if (points is None) == (descriptors is None):
            raise ValueError("give either points or descriptors")
        if self._ended:
            raise ValueError("the stream has ended: make a new one")
        if descriptors is not None:
            if frame is not None:
                raise ValueError("frame goes with points: descriptors have none in this stream")
            return self._add_descriptors(descriptors)
        given = np.asarray(points, dtype=np.float64)
        if given.ndim != 2 or given.shape[1] != 2:
            raise ValueError(f"points must be [n, 2] with rows x, y, got shape {list(given.shape)}")
        frame = self._frames if frame is None else frame
        if not self.oldest_frame <= frame <= self._frames:
            raise ValueError(
                f"frame must be from {self.oldest_frame}, the oldest that is still here, to {self._frames}, the one "
                f"that comes next, got {frame}"
            )
        self._check_places(given)
        self._check_room(len(given), {frame} if len(given) else set())
        ids = range(self._next_id, self._next_id + len(given))
        for number, (x, y) in zip(ids, given.tolist(), strict=True):
            self._points[number] = _Point(number, frame, frame, (y, x), (x, y))
        self._next_id = ids.stop
        if len(given):
            self._features.keep(frame)
        return np.array(ids, dtype=np.int64)

    def remove(self, ids: Any) -> None:
        """Follow these points no longer.

        Raises:
            ValueError: an id that no point has.
        """
        numbers = [int(number) for number in np.asarray(ids, dtype=np.int64).reshape(-1)]
        unknown = [number for number in numbers if number not in self._points]
        if unknown:
            raise ValueError(f"ids: no point has the id {unknown[0]}")
        for number in numbers:
            self._points.pop(number, None)
        self._features.forget(numbers, {point.source for point in self._points.values()})

    @torch.inference_mode()
    def step(self, frame: Any) -> StreamOutput | None:
        """The next frame.

        Args:
            frame: uint8 RGB `[H, W, 3]`, an array or tensor, of the size of the first one; None for a frame that was
                lost, in whose place the one before it is seen again.

        Returns:
            The points in the frame `lookahead` frames ago, or None before there is one.

        Raises:
            ValueError: not such a frame, or positions that are not finite. The stream goes on without a frame that was
                refused.
        """
        if self._ended:
            raise ValueError("the stream has ended: make a new one")
        raster, size = self._raster(frame)
        if self.size is None and size is not None:
            self.size = size
            try:
                self._check_places(np.array([p.xy for p in self._points.values() if p.xy is not None]).reshape(-1, 2))
            except ValueError:
                self.size = None
                raise
        self._last = raster
        self._frames += 1
        self._features.push(raster)
        self._keep_sources()
        done = self._frames - 1 - self.lookahead
        return self._output(done) if done >= 0 else None

    @torch.inference_mode()
    def finish(self) -> list[StreamOutput]:
        """The points in the last `lookahead` frames. The stream has ended after it."""
        if self._ended:
            raise ValueError("the stream has ended: make a new one")
        self._ended = True
        self._features.finish(self._frames)
        self._keep_sources()
        first = max(0, self._frames - self.lookahead)
        return [self._output(number) for number in range(first, self._frames)]

    @torch.inference_mode()
    def descriptors(self, ids: Any) -> dict[str, Any]:
        """What describes these points, to find them in another video: features of the frames they were picked in.

        A dictionary of tensors, for `torch.save` and for `add`. It takes the memory of one frame's features for every
        frame in which one of the points was picked (2.4 MB of nano).

        Raises:
            ValueError: an id that no point has, or a point whose frame has no features yet, as they wait for later
                frames.
        """
        numbers = [int(number) for number in np.asarray(ids, dtype=np.int64).reshape(-1)]
        for number in numbers:
            if number not in self._points:
                raise ValueError(f"ids: no point has the id {number}")
            if self._points[number].source not in self._features.sources:
                raise ValueError(f"ids: the features of the frame of point {number} are not complete yet")
        points = [self._points[number] for number in numbers]
        sources = sorted({point.source for point in points})
        rows = [[sources.index(point.source), *self._place(point)] for point in points]
        return {
            "model": self._options["model"],
            "queries": torch.tensor(rows, dtype=torch.float64).view(-1, 3),
            "features": [[x.clone() for x in self._features.sources[source]] for source in sources],
        }

    @torch.inference_mode()
    def state_dict(self) -> dict[str, Any]:
        """All that the stream knows, for `load_state_dict`: dictionaries and lists of tensors and numbers, which
        `torch.save` writes and `torch.load` reads with `weights_only=True`."""
        return {
            "options": dict(self._options),
            "size": None if self.size is None else list(self.size),
            "frames": self._frames,
            "ended": self._ended,
            "last": None if self._last is None else self._last.clone(),
            "features": self._features.state_dict(),
            "points": [[p.id, p.frame, p.source, *p.place, *(p.xy or ())] for p in self._points.values()],
            "next": [self._next_id, self._next_descriptor],
        }

    @torch.inference_mode()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where the stream was that `state_dict` was called of. Its model and options must be those of this one.

        Raises:
            ValueError: another model or other options, or not a state of a stream.
        """
        keys = {"options", "size", "frames", "ended", "last", "features", "points", "next"}
        if not isinstance(saved, dict) or set(saved) != keys:
            raise ValueError("saved must be what state_dict returned")
        if saved["options"] != self._options:
            raise ValueError(f"saved is the state of a stream with {saved['options']}, this one has {self._options}")
        self._features.load_state_dict(saved["features"])
        self.size = None if saved["size"] is None else (saved["size"][0], saved["size"][1])
        self._frames, self._ended = saved["frames"], saved["ended"]
        self._last = None if saved["last"] is None else saved["last"].clone()
        self._points = {
            row[0]: _Point(row[0], row[1], row[2], (row[3], row[4]), (row[5], row[6]) if len(row) > 5 else None)
            for row in saved["points"]
        }
        self._next_id, self._next_descriptor = saved["next"]

    def _add_descriptors(self, descriptors: dict[str, Any]) -> np.ndarray:
        expected = self._features.shapes()
        try:
            queries, features = descriptors["queries"], [list(leaves) for leaves in descriptors["features"]]
            fitting = descriptors["model"] == self._options["model"]
            fitting &= all([(x.shape, x.dtype) for x in leaves] == expected for leaves in features)
            fitting &= queries.ndim == 2 and queries.shape[1] == 3 and bool(queries.isfinite().all())
            fitting &= bool(((queries[:, 0] >= 0) & (queries[:, 0] < max(len(features), 1))).all())
        except (KeyError, TypeError, AttributeError):
            fitting = False
        if not fitting:
            raise ValueError(f"descriptors must be what `descriptors` returned of a stream of {self._options['model']}")
        keys = [self._next_descriptor - number for number in range(len(features))]
        self._check_room(len(queries), set(keys))
        for key, leaves in zip(keys, features, strict=True):
            self._features.sources[key] = [x.to(self._device, copy=True) for x in leaves]
        ids = range(self._next_id, self._next_id + len(queries))
        for number, (index, y, x) in zip(ids, queries.tolist(), strict=True):
            self._points[number] = _Point(number, self._frames, keys[int(index)], (y, x), None)
        self._next_id, self._next_descriptor = ids.stop, self._next_descriptor - len(features)
        return np.array(ids, dtype=np.int64)

    def _check_places(self, given: np.ndarray) -> None:
        """Raise ValueError unless they are inside the frame, whose size may not be known yet."""
        width, height = (np.inf, np.inf) if self.size is None else self.size
        inside = ((given >= 0) & (given <= (width, height)) & np.isfinite(given)).all(1)  # NaN fails
        if not inside.all():
            number = int(np.flatnonzero(~inside)[0])
            x, y = given[number]
            raise ValueError(
                f"point {number + 1} of {len(given)} (x={x:g}, y={y:g}) is outside the frame: x must be 0 to {width:g} "
                f"and y 0 to {height:g}"
            )

    def _check_room(self, count: int, sources: set[int]) -> None:
        if len(self._points) + count > self._max_points:
            raise ValueError(
                f"{count} more points than the {len(self._points)} there are would be more than max_points="
                f"{self._max_points}: remove some first"
            )
        used = {point.source for point in self._points.values()} | sources
        if len(used) > self._max_sources:
            raise ValueError(
                f"the points would come from {len(used)} frames, whose features are kept, more than max_sources="
                f"{self._max_sources}: add points in fewer frames, or remove all those of an older one first"
            )

    def _raster(self, frame: Any) -> tuple[Tensor, tuple[int, int] | None]:
        """The frame at the model's resolution, and its size."""
        if frame is None:
            if self._last is None:
                raise ValueError("frame is None, which stands for the frame before it, and there is none")
            return self._last, None
        array = frame.detach().cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ValueError(f"frame must be uint8 RGB [H, W, 3], got {array.dtype} of shape {list(array.shape)}")
        size = array.shape[1], array.shape[0]
        if self.size is not None and size != self.size:
            raise ValueError(
                f"frame must be {self.size[0]}x{self.size[1]} as the first one, got {size[0]}x{size[1]}: resize it, or "
                "make a new stream"
            )
        return torch.from_numpy(resized(array, self._model.resolution)), size

    def _keep_sources(self) -> None:
        """Keep the features of frames that points were picked in before these existed."""
        for frame in {point.source for point in self._points.values() if point.source >= 0}:
            self._features.keep(frame)

    def _place(self, point: _Point) -> tuple[float, float]:
        """(y, x) in the raster, of the point as it was picked."""
        if point.xy is None:
            return point.place
        (width, height), (rows, columns) = cast(tuple[int, int], self.size), self._model.resolution
        return point.xy[1] * rows / height, point.xy[0] * columns / width

    def _output(self, frame: int) -> StreamOutput:
        points = [point for point in self._points.values() if point.frame <= frame]
        ids = np.array([point.id for point in points], dtype=np.int64)
        if not points:
            return StreamOutput(frame, ids, np.zeros((0, 2), np.float32), np.zeros(0, bool), np.zeros(0, np.float32))
        sources, places = [point.source for point in points], [self._place(point) for point in points]
        tracks, certainty = self._features.track(frame, ids.tolist(), sources, places)
        (width, height), (rows, columns) = cast(tuple[int, int], self.size), self._model.resolution
        xy = tracks.numpy() * np.array([width / columns, height / rows], dtype=np.float32)
        confidence = certainty.numpy()
        if not (np.isfinite(xy).all() and np.isfinite(confidence).all()):
            raise ValueError("the model gives positions that are not finite: its weights are damaged or untrained")
        for number, point in enumerate(points):
            if point.xy is not None and point.frame == frame:
                xy[number], confidence[number] = point.xy, 1
        visible = visible_points(xy, confidence, self._min_confidence, (width, height))
        return StreamOutput(frame, ids, xy, visible, confidence)
